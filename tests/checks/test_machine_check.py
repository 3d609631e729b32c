"""The machine check (--doctor true): it tries everything, names a remedy for what fails, and sets the exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import llm_sft
from utils.checks import machine

Problems = Callable[[], list[str]]


@pytest.mark.processes
@pytest.mark.optional
def test_a_machine_that_can_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert llm_sft.main(['--doctor', 'true', '--output_dir', str(tmp_path / 'new')]) == 0
    printed = capsys.readouterr().out
    for line in (
        'ok   float32 on c',
        'ok   bfloat16 on c',
        'ok   all-reduce of 2 processes over',
        'ok   4-bit layer: its',
        'note flash-linear-attention: not installed; a fast kernel for Qwen3.5',
        'note causal-conv1d: not installed; a fast kernel for Qwen3.5',
    ):
        assert line in printed
    assert f'GiB free at {tmp_path}\n' in printed and not (tmp_path / 'new').exists()
    assert 'note hub modelscope: http://127.0.0.1:9 does not answer\n     -> needed only for downloads' in printed
    assert printed.endswith('this machine can train\n')


def test_what_fails_is_named_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = tmp_path / 'requirements.txt'
    pins.write_text('# libraries\ntorch>=0.1,<0.2\nnot-a-package==1.0\n')
    monkeypatch.setattr(machine, '_REQUIRED', pins)  # the all-reduce workers start in its folder, which has no utils
    (tmp_path / 'file').touch()
    assert llm_sft.main(['--doctor', 'true', '--output_dir', str(tmp_path / 'out')]) == 1
    printed = capsys.readouterr().out
    assert (
        '(tested with <0.2,>=0.1), not-a-package missing (tested with ==1.0)\n     -> ' in printed
        and printed.startswith('FAIL libraries')
    )
    assert "No module named 'utils'" in printed.split('FAIL all-reduce of 2 processes over')[1]
    assert printed.endswith('2 checks failed\n')


# The compute capabilities of V100, T4, A100, RTX 3090, H100, B200, RTX 5090.
BUILT = {
    (7, 0): False, (7, 5): True, (8, 0): True, (8, 6): True, (9, 0): True, (10, 0): True, (12, 0): True,
}  # fmt: skip


def test_gpus_without_kernels_are_known() -> None:
    builds = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120', 'compute_120']
    assert {capability: machine._is_built_for(capability, builds) for capability in BUILT} == BUILT
    assert machine._is_built_for((8, 9), ['sm_80']) and not machine._is_built_for((9, 0), ['sm_80'])
    assert machine._is_built_for((9, 0), ['sm_90a']) and not machine._is_built_for((9, 1), ['sm_90a'])
    assert machine._is_built_for((13, 0), builds) and not machine._is_built_for((11, 0), builds[:-1])


class Cuda:
    """Stands in for the functions of torch.cuda that the check calls."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_arch_list(self) -> list[str]:
        return ['sm_75', 'sm_80', 'sm_90', 'compute_90']

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capability


@pytest.mark.parametrize(
    ('capability', 'kernel', 'works', 'says'),
    [
        ((9, 0), 'flash', True, 'flash; output and gradients are within 1.0e-03 of fp32'),
        ((9, 0), 'groups', None, 'The flash kernel is not used: it failed its trial'),
        ((7, 5), 'groups', None, 'The flash kernel is not used: it needs compute capability 8.0'),
        ((7, 0), 'groups', False, 'has none for sm_70, only for sm_75, sm_80, sm_90, compute_90'),
    ],
)
def test_kernels_of_a_gpu(
    capability: tuple[int, int], kernel: str, works: bool | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is faked. The real trial of a kernel is tested in tests/fast."""
    import torch

    from utils.fast import attention

    monkeypatch.setattr(torch, 'cuda', Cuda(capability))
    monkeypatch.setattr(machine.device, 'torch_name', lambda index: f'cuda:{index}')
    monkeypatch.setattr(attention, 'kernel_for', lambda case, used: kernel)
    monkeypatch.setattr(attention, 'trial_error', lambda name, case, used: 0.001)
    (finding,) = machine._nvidia(1)
    assert finding.works is works and says in finding.says
    assert bool(finding.remedy) == (works is False)


def test_a_mistyped_flag_is_answered_first(problems: Problems) -> None:
    assert llm_sft.main(['--doctor', 'true', '--lora_rnak', '3']) == 2
    assert "flag '--lora_rnak' is not known" in problems()[0]

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


def test_a_mistyped_flag_is_answered_first(problems: Problems) -> None:
    assert llm_sft.main(['--doctor', 'true', '--lora_rnak', '3']) == 2
    assert "flag '--lora_rnak' is not known" in problems()[0]

"""What a process sets up before it trains: determinism, memory of GPUs, the process group."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import hashes
from utils.base import device, dist
from utils.run import processes, program
from utils.run.processes import start_processes

Run = Callable[..., Path]


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """Bring the settings back that start_processes changes."""
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def test_deterministic_operations_are_switched_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    monkeypatch.setenv('MALLOC_ARENA_MAX', '4')
    start_processes('gloo', deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled() and 'CUBLAS_WORKSPACE_CONFIG' not in os.environ
    start_processes('gloo', deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    start_processes('gloo')
    assert torch.are_deterministic_algorithms_enabled(), 'a program without the flag changes nothing'


def test_a_deterministic_run_trains_and_resumes(run_sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU all operations are deterministic, so the bits are those without the flag."""
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    flags = ('--deterministic', 'true')
    run = run_sft(*flags)
    assert torch.are_deterministic_algorithms_enabled()
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-3'))
    plain = run_sft()
    assert not torch.are_deterministic_algorithms_enabled()
    assert hashes(run / 'checkpoint-6') == hashes(resumed / 'checkpoint-6') == hashes(plain / 'checkpoint-6')


def test_an_operation_that_torch_refuses_is_named(caplog: pytest.LogCaptureFixture) -> None:
    text = (
        "kthvalue CUDA does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms("
        "True)'. You can turn off determinism just for this operation."
    )

    def refused() -> int:
        raise RuntimeError(text)

    def other() -> int:
        raise RuntimeError('another error')

    assert program.run_program(refused) == 2
    assert caplog.records[-1].getMessage() == (
        '--deterministic true: this run needs kthvalue, which gives different bits each time on this device, and torch '
        'has no other version of it. Use --deterministic false.'
    )
    with pytest.raises(RuntimeError, match='another error'):
        program.run_program(other)


@pytest.mark.parametrize(('kind', 'system', 'given', 'expected'), [
    ('cuda', 'linux', {}, 'expandable_segments:True'), ('cuda', 'win32', {}, None), ('cpu', 'linux', {}, None),
    ('xpu', 'linux', {}, None), ('cuda', 'linux', {'PYTORCH_ALLOC_CONF': 'garbage_collection_threshold:0.8'},
    'garbage_collection_threshold:0.8'), ('cuda', 'linux', {'PYTORCH_CUDA_ALLOC_CONF': 'max_split_size_mb:64'}, None),
])  # fmt: skip
def test_memory_of_nvidia_gpus_grows_unless_the_environment_says_how(
    kind: str, system: str, given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'):
        monkeypatch.setenv(name, '')  # so that the test leaves nothing behind
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, 'visible_kind', lambda: kind)
    monkeypatch.setattr(sys, 'platform', system)
    processes._set_up_memory_of_gpus()
    assert os.environ.get('PYTORCH_ALLOC_CONF') == expected


@pytest.mark.parametrize(('backend', 'gpus', 'expected'), [
    ('nccl', 2, torch.device('cuda:1')), ('nccl', 4, None), ('gloo', 2, None),
])  # fmt: skip
def test_nccl_is_told_the_gpu_of_each_process(
    backend: str, gpus: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(device, 'kind', lambda: 'cuda')
    monkeypatch.setattr(device, 'count', lambda: gpus)
    monkeypatch.setattr(device, 'use', lambda index: None)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda name, **given: seen.update(given, name=name))
    for name, value in {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'RANK': '1', 'LOCAL_RANK': '1'}.items():
        monkeypatch.setenv(name, value)
    for name in ('ACCELERATE_BYPASS_DEVICE_MAP', 'ACCELERATE_TORCH_DEVICE'):
        monkeypatch.setenv(name, '')
    start_processes(backend)
    assert (seen['name'], seen['device_id']) == (backend, expected)

"""benchmarks/gpu.sh, the acceptance on a GPU, as far as it runs on a CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.flash_stand_in import flash_operators
from tests.support.runs import ROOT
from utils.fast.attention import RowAttention
from utils.fast.rows import RowMask

BENCHMARKS = ROOT / 'benchmarks'


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that imports a module of benchmarks/, which its programs import by its bare name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ('gpu', 'gpu_case', 'gpu_pieces', 'gpu_runs', 'contestants', 'train'):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_without_a_gpu_its_parts_for_the_cpu_run(tmp_path: Path) -> None:
    words = ['bash', str(BENCHMARKS / 'gpu.sh'), str(tmp_path / 'out'), '120', '--only', 'device,quantised,profile']
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, 'PYTHON': sys.executable}, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        'skip quantised/nf4: {"says": "no GPU"}',
        'skip quantised/nf4, double: {"says": "no GPU"}',
        'skip profile/a step: {"says": "no GPU"}',
        '4 cases, 0 failed, 3 skipped',
    ]
    content = json.loads((tmp_path / 'out' / 'gpu.json').read_text())
    assert content['machine']['device'] == 'no GPU' and content['machine']['torch'] == torch.__version__
    assert [found['ok'] for found in content['results']] == [True, None, None, None]
    assert '| nf4, double | skip | says no GPU |' in (tmp_path / 'out' / 'gpu.md').read_text()


def test_what_a_case_does_to_itself_is_its_result(modules: Any, tmp_path: Path) -> None:
    gpu = modules('gpu')
    case = modules('gpu_case').Case

    def fail() -> dict[str, Any]:
        os.write(1, b'printed by the case')
        raise ValueError('wrong')

    def run(work: Any, seconds: float = 20) -> dict[str, Any]:
        found: dict[str, Any] = gpu.run(case('part', 'name', work, seconds, 0, False), 100, tmp_path / 'log')
        return found

    assert run(lambda: {'ok': True, 'value': 2})['value'] == 2
    failed = run(fail)
    assert (failed['ok'], failed['says']) == (False, 'ValueError: wrong') and 'in fail' in failed['trace']
    assert 'printed by the case' in (tmp_path / 'log').read_text()
    assert run(lambda: os._exit(3))['says'] == 'the process ended without a result'  # type: ignore[func-returns-value]
    started = time.perf_counter()
    assert run(lambda: time.sleep(60), 0.5)['says'] == 'no result within 0 s'  # type: ignore[func-returns-value]
    assert time.perf_counter() - started < 20

    book = gpu.Book(tmp_path, {'device': 'none'})
    book.add({'part': 'speed', 'name': 'a | b', 'ok': None, 'says': 'skipped: 3 s are left'})
    book.add({'part': 'speed', 'name': 'c', 'ok': False, 'tokens': 12345.6, 'ms': {'mm': 1.23456}, 'trace': 'long'})
    assert len(json.loads((tmp_path / 'gpu.json').read_text())['results']) == 2
    assert '| c | FAIL | tokens 12346, ms mm 1.23 |' in (tmp_path / 'gpu.md').read_text()


def test_the_order_is_by_importance(modules: Any) -> None:
    """Whatever the time allows: correctness of pieces and two speeds come before whole classes and memory."""
    gpu = modules('gpu')
    every = [*modules('gpu_pieces').cases(True), *modules('gpu_runs').cases()]
    parts = list(dict.fromkeys(case.part for case in gpu.select(every, '')))
    assert parts == ['device', 'pieces', 'speed', 'programs', 'classes', 'quantised', 'memory', 'profile']
    assert {case.part for case in gpu.select(every, 'speed,memory')} == {'speed', 'memory'}
    with pytest.raises(SystemExit, match='--only sped: no such part. The parts are device, pieces'):
        gpu.select(every, 'speed,sped')
    speed = [case.name for case in gpu.select(every, 'speed')]
    assert len(speed) == 18 and speed[5] == '1.5B LoRA, alpaca, 64 rows: fast again'
    keys = {key for case in every if case.name.startswith('fp32') for key in case.work.args[0]}
    assert len(keys) >= 42


@pytest.mark.slow
def test_checks_and_measurements_run_on_a_tiny_model(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, runs = modules('gpu_pieces'), modules('gpu_runs')
    assert pieces.norms()['ok'] and pieces.head_and_loss()['ok']
    for name, window in (('GQA 28/4, 128, window', True), ('sinks and window', True), ('capped scores, window', True)):
        found = pieces.attention(name)
        assert found['ok'] is window and found['kernel'] == 'rows'
    monkeypatch.setitem(runs.SPEED, 'tiny', ('1.5B', 'all', 2, 2, 0))
    measured = runs.speed('tiny', 'fast')
    assert measured['steps'] == 7 and measured['tokens_per_second'] > 0
    found = runs.memory('1.5B', 'full', False, 64)
    assert found['estimated_gib'] > 0 and found['ok'] is False, 'a CPU counts no allocated memory'


def test_a_wrong_piece_is_noticed(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = modules('gpu_pieces')
    from utils.fast import chunked_loss, norm

    step = norm._NormStep.apply
    monkeypatch.setattr(norm._NormStep, 'apply', lambda x, *rest: step(x * (1 + 1e-4), *rest))
    monkeypatch.setattr(norm, '_kind_of', lambda layer, epsilon: 'round_last')
    assert not pieces.norms()['ok']
    monkeypatch.setattr(chunked_loss, '_FP16_SCALE', 1.0)
    loss = chunked_loss.summed_loss
    monkeypatch.setattr(chunked_loss, 'summed_loss', lambda *args: loss(*args) * 1.001)
    assert not pieces.head_and_loss()['ok']


def test_peers_get_flash_attention_from_torch(tmp_path: Path, modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that transformers looks for is made of torch's kernels."""
    from importlib.metadata import version

    monkeypatch.setattr(sys, 'path', [*sys.path])
    modules('flash_attn_stand_in').install(tmp_path / 'site')
    try:
        package = importlib.import_module('flash_attn')
        assert version('flash-attn') == '2.8.3' and importlib.import_module('flash_attn.bert_padding').pad_input
        torch.manual_seed(0)
        query, key, value = (torch.randn(12, heads, 8, dtype=torch.double) for heads in (4, 2, 2))
        ends = torch.tensor([0, 4, 5, 12])
        rows = [x.transpose(0, 1) for x in (query, key, value)]
        with flash_operators():
            found = package.flash_attn_varlen_func(
                query, key, value, ends, ends, 7, 7, causal=True, window_size=(2, 0), softmax_scale=0.3
            )
            expected = RowAttention.apply(*rows, None, RowMask((4, 1, 7), 3), 0.3, None)
            assert (found - expected).abs().max() < 1e-12
            whole = package.flash_attn_func(*(x.unflatten(0, (3, 4)) for x in (query, key, value)), causal=True)
        expected = RowAttention.apply(*rows, None, RowMask((4, 4, 4), None), 8**-0.5, None)
        assert (whole.flatten(0, 1) - expected).abs().max() < 1e-12
    finally:
        for name in ('flash_attn', 'flash_attn.bert_padding'):
            sys.modules.pop(name, None)

"""What only a GPU can show: its kernels against fp64, no wait for the device, quantised layers, a resumed run.

The checks are those of benchmarks/gpu.py. Each runs in this process, so that a debugger can follow it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.runs import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that runs all cases of a part, and returns what failed, by case."""
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))

    def run(part: str, *names: str) -> dict[str, Any]:
        cases = [*importlib.import_module('gpu_pieces').cases(True), *importlib.import_module('gpu_runs').cases()]
        chosen = [case for case in cases if case.part == part and (not names or case.name in names)]
        assert chosen
        found = {case.name: case.work() for case in chosen}
        return {name: result for name, result in found.items() if not result['ok']}

    yield run
    for name in ('gpu_case', 'gpu_pieces', 'gpu_runs', 'contestants', 'train'):
        sys.modules.pop(name, None)


def test_pieces_are_as_near_to_fp64_as_their_classes(checks: Any) -> None:
    assert checks('pieces') == {}


@pytest.mark.optional
def test_quantised_layers_compute_like_those_of_peft(checks: Any) -> None:
    assert checks('quantised') == {}


def test_a_resumed_run_is_bitwise_identical(checks: Any) -> None:
    assert checks('programs', 'resume, LoRA', 'resume, full', 'resume, packing') == {}

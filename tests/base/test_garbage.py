"""How often Python looks for unreachable cycles of objects."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.runs import ROOT
from utils.run.program import run_program


@pytest.fixture
def thresholds() -> Iterator[tuple[int, ...]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_a_program_searches_for_cycles_seldom(thresholds: tuple[int, ...]) -> None:
    gc.set_threshold(700, 10, 10)
    assert run_program(lambda: 0) == 0
    assert gc.get_threshold() == (50_000, 10, 100)


def test_searches_leave_out_what_was_imported_before_the_first_run() -> None:
    code = """
import gc, sys
from utils.run.processes import start_processes
start_processes('gloo')
frozen = gc.get_freeze_count()
made = [[] for _ in range(1000)]
start_processes('gloo')
print(frozen > 100_000, gc.get_freeze_count() == frozen)
"""
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == ['True', 'True']

"""How often Python looks for unreachable cycles of objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

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

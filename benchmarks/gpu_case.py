"""A case of benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What a case found, by name. `ok` is True or False, or None if nothing was checked.
Found = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One measurement or check. Cases with a low `order` come first. `seconds` is the longest time that it may take."""

    part: str
    name: str
    work: Callable[[], Found]
    seconds: float
    order: float
    needs_gpu: bool

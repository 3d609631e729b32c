"""Copies of adapter weights in the dtype of the computation, renewed once per optimizer step for all layers together.

Without these copies, each layer would convert its fp32 weights in every forward and every backward pass. On a GPU, the
conversions would start hundreds of small kernels per micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Steps:
    """Counts the steps of all optimizers in this process.

    `LowCopies` uses the count to know when a weight may have changed. torch's version counter of the weight is not
    enough, because the kernels of bitsandbytes change weights without changing the counter.
    """

    def __init__(self) -> None:
        self.number = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1


@lru_cache(maxsize=1)
def _steps() -> _Steps:
    return _Steps()


@dataclass
class _Copy:
    weight: torch.Tensor
    low: torch.Tensor
    # The number of changes of the weight and the number of optimizer steps at the time when it was copied.
    state: tuple[int, int] = (-1, -1)


class LowCopies:
    """Keeps a copy of each adapter weight in a smaller dtype, for example bf16. The weights themselves are in fp32.

    The first use of a copy after an optimizer step, or after another change of its weight, renews the copy.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.dtype], _Copy] = {}

    def of(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of `weight` in `dtype`, without gradient.

        If the weight has this dtype, no copy is made: the result shares the memory of the weight. Otherwise the result
        is the stored copy, which the next renewal overwrites.
        """
        if weight.dtype == dtype:
            return weight.detach()

        key = (id(weight), dtype)
        copy = self._copies.get(key)
        if copy is None or copy.low.device != weight.device:
            copy = self._copies[key] = _Copy(weight, torch.empty_like(weight, dtype=dtype, requires_grad=False))
        if copy.state != (weight._version, _steps().number):
            self._renew(weight.device)
        return copy.low

    @torch.no_grad()
    def _renew(self, device: torch.device) -> None:
        """Renew the copies on this device whose weights may have changed."""
        steps = _steps().number
        stale = [c for c in self._copies.values() if c.weight.device == device == c.low.device]
        stale = [c for c in stale if c.state != (c.weight._version, steps)]
        torch._foreach_copy_([c.low for c in stale], [c.weight for c in stale])
        for copy in stale:
            copy.state = (copy.weight._version, steps)

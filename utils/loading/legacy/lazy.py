"""Matrices that are computed one by one while a model is loaded, so that all of them never exist twice in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# How many elements are computed at a time.
_BLOCK = 2**18

# Rows are computed in multiples of this, so that a block starts at a whole word of packed zero points.
_ROWS = 32


class LazyMatrix(ABC):
    """Stands for a tensor in a state dict; the loader of transformers calls `value[...].to(device=..., dtype=...)`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Return (rows, columns)."""

    @abstractmethod
    def rows(self, which: slice) -> torch.Tensor:
        """Compute and return some rows."""

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.to()[index]

    def detach(self) -> LazyMatrix:
        """Return itself: it has no autograd graph."""
        return self

    def chunk(self, count: int) -> list[LazyMatrix]:
        """Return equal parts of the rows."""
        assert self.shape[0] % count == 0, 'checked by the family'
        rows = self.shape[0] // count
        return [_Part(whole=self, first=i * rows, count=rows) for i in range(count)]

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the matrix in `dtype`, fp32 by default. Temporary tensors take a few megabytes."""
        import torch

        result = torch.empty(self.shape, dtype=dtype or torch.float32)
        step = max(_BLOCK // self.shape[1] // _ROWS, 1) * _ROWS

        for first in range(0, self.shape[0], step):
            which = slice(first, min(first + step, self.shape[0]))
            result[which] = self.rows(which)

        return result if device is None else result.to(device)


@dataclass(frozen=True, kw_only=True)
class _Part(LazyMatrix):
    """Some contiguous rows of a lazy matrix."""

    whole: LazyMatrix
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, self.whole.shape[1]

    def rows(self, which: slice) -> torch.Tensor:
        return self.whole.rows(slice(self.first + which.start, self.first + which.stop))


def compute_all(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with every lazy matrix computed, for a loader that copies only tensors."""
    return {key: value.to() if isinstance(value, LazyMatrix) else value for key, value in state.items()}

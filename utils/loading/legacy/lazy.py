"""Matrices that are computed while a model is loaded, each when its turn comes, so that all never exist twice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Numbers computed at a time, and of how many rows: whole words of packed zero points are read so.
_BLOCK, _ROWS = 2**18, 32


class LazyMatrix(ABC):
    """What a loader takes in place of a tensor: it asks for `value[...].to(device=..., dtype=...)`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Return (rows, columns)."""

    @abstractmethod
    def rows(self, which: slice) -> torch.Tensor:
        """Return some rows as they are computed."""

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.to()[index]

    def detach(self) -> LazyMatrix:
        """Return itself, as no graph is ever attached."""
        return self

    def chunk(self, count: int) -> list[LazyMatrix]:
        """Return equal parts of the rows."""
        assert self.shape[0] % count == 0, 'checked by the family'
        each = self.shape[0] // count
        return [_Part(whole=self, first=i * each, count=each) for i in range(count)]

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the matrix in `dtype`, fp32 by default; what is computed on the way stays at some megabytes."""
        import torch

        result = torch.empty(self.shape, dtype=dtype or torch.float32)
        step = max(_BLOCK // self.shape[1] // _ROWS, 1) * _ROWS
        for first in range(0, self.shape[0], step):
            which = slice(first, min(first + step, self.shape[0]))
            result[which] = self.rows(which)
        return result if device is None else result.to(device)


@dataclass(frozen=True, kw_only=True)
class _Part(LazyMatrix):
    whole: LazyMatrix
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, self.whole.shape[1]

    def rows(self, which: slice) -> torch.Tensor:
        return self.whole.rows(slice(self.first + which.start, self.first + which.stop))


def computed(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with every lazy matrix computed, for a loader that copies tensors only."""
    return {key: value.to() if isinstance(value, LazyMatrix) else value for key, value in state.items()}

"""Matrices that are computed only when the loader copies them into the model.

If all matrices were computed before loading, they would be in memory in addition to the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# About this many elements are computed at a time.
_BLOCK = 2**18

# The number of rows in a block is a multiple of this number. So a block of GPTQ weights never starts in the middle of
# an int32 with packed zero points.
_ROWS = 32


class LazyMatrix(ABC):
    """A matrix that can replace a tensor in a state dict.

    It has the methods that the loader of transformers calls: `value[...].to(device=..., dtype=...)`.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Return (number of rows, number of columns)."""

    @abstractmethod
    def rows(self, which: slice) -> torch.Tensor:
        """Compute and return some rows. `which` is a slice of row indices. It must have a start and a stop."""

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.to()[index]

    def detach(self) -> LazyMatrix:
        """Return the matrix unchanged, because it has no autograd graph."""
        return self

    def chunk(self, count: int) -> list[LazyMatrix]:
        """Split the rows into `count` equal parts and return the parts as lazy matrices."""
        assert self.shape[0] % count == 0, 'checked by the family'
        rows = self.shape[0] // count
        return [_Part(whole=self, first=i * rows, count=rows) for i in range(count)]

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Compute the matrix and return it as a tensor in `dtype` (default fp32).

        The computation needs only a few megabytes of temporary memory.
        """
        import torch

        result = torch.empty(self.shape, dtype=dtype or torch.float32)
        step = max(_BLOCK // self.shape[1] // _ROWS, 1) * _ROWS

        for first in range(0, self.shape[0], step):
            which = slice(first, min(first + step, self.shape[0]))
            result[which] = self.rows(which)

        return result if device is None else result.to(device)


@dataclass(frozen=True, kw_only=True)
class _Part(LazyMatrix):
    """A part of the lazy matrix `whole`: `count` contiguous rows, from row `first` on."""

    whole: LazyMatrix
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, self.whole.shape[1]

    def rows(self, which: slice) -> torch.Tensor:
        return self.whole.rows(slice(self.first + which.start, self.first + which.stop))


def compute_all(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict with a computed tensor in place of every lazy matrix.

    This is for loaders that can copy only tensors.
    """
    return {key: value.to() if isinstance(value, LazyMatrix) else value for key, value in state.items()}

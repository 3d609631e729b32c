"""Rows that teach nothing, so that every process of a distributed run gets as many batches as the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Filled(Sequence[dict[str, Any]]):
    """A map-style data set and as many filler rows as make its length a multiple of `share`.

    Without them a distributed sampler starts over at its first rows, which would be trained twice in an epoch.
    """

    def __init__(self, rows: Any, share: int, pad_token_id: int) -> None:
        self.rows, self.size = rows, -(-len(rows) // share) * share
        # One token, no label: its loss is the sum over nothing.
        self.filler = {'input_ids': [pad_token_id], 'trained': (0, 0), 'prompt_length': 0}

    def __len__(self) -> int:
        return self.size

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        return [*self.rows.lengths(), *[1] * (self.size - len(self.rows))]

    def origin(self, index: int) -> str:
        """Return where a row came from."""
        return 'filler' if index < 0 else str(self.rows.origin(index))

    def row(self, index: int) -> dict[str, Any]:
        """Return one row by the index that it carries."""
        return self.filler if index < 0 else dict(self.rows.row(index))

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return the batches of `count` items that ask for most memory."""
        batches: list[list[dict[str, Any]]] = self.rows.heaviest(count)
        return batches

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or the filler behind the last one."""
        return self.rows[index] if index < len(self.rows) else self.filler

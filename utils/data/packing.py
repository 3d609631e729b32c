"""Which rows go together: packs that fill max_length, and the order of rows within an optimizer step."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from utils.data.encoded_rows import EncodedRows


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of rows in packs of at most `capacity` tokens: the longest first, each to the tightest room.

    A row longer than `capacity` is a pack of its own.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that still fit, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], -1))
        left, pack = room.pop(place) if place < len(room) else (max(capacity, lengths[index]), len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
        if left > lengths[index]:
            insort(room, (left - lengths[index], pack))
    return packs


def fewest(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of rows in as few packs as `best_fit` finds, filled alike where that fits as well."""
    packs = best_fit(lengths, capacity)
    even: list[list[int]] = [[] for _ in packs]
    loads = [(0, number) for number in range(len(packs))]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, number = loads[0]
        even[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    return even if max(loads)[0] <= capacity else packs


class PackedRows:
    """A map-style data set whose items are packs of rows."""

    def __init__(self, rows: EncodedRows, capacity: int) -> None:
        self.rows = rows
        self.packs = best_fit(rows.lengths(), capacity)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one pack: its rows as the rows of the data set are."""
        return {'rows': [self.rows[i] for i in self.packs[index]]}

    def lengths(self) -> list[int]:
        """Return the tokens of each pack."""
        lengths = self.rows.lengths()
        return [sum(lengths[i] for i in pack) for pack in self.packs]

    def origin(self, index: int) -> str:
        """Return where a row, not a pack, came from."""
        return self.rows.origin(index)

    def row(self, index: int) -> dict[str, Any]:
        """Return one row by the index that it carries."""
        return self.rows[index]

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return the batch of `count` packs that ask for most memory."""
        lengths = self.lengths()
        return [[self[i] for i in heapq.nlargest(count, range(len(self)), key=lengths.__getitem__)]]


class StepSampler(Sampler[int]):
    """The order of another sampler, rearranged within the rows of each optimizer step: which rows those are stays.

    For padded batches rows of like length stand together, so that little is padded. For rows laid end to end, where
    nothing is, batches get like numbers of tokens, so that none needs more memory, or more time on its device.
    """

    def __init__(self, order: Any, lengths: Sequence[int], *, batch: int, batches: int, pads: bool) -> None:
        self.order = order
        self.lengths = lengths
        self.batch = batch
        self.batches = batches
        self.pads = pads

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        indices, window = list(self.order), self.batch * self.batches
        for start in range(0, len(indices), window):
            rows = sorted(indices[start : start + window], key=lambda i: -self.lengths[i])
            yield from rows if self.pads or len(rows) < window else self._even(rows)

    def _even(self, rows: list[int]) -> list[int]:
        """Return sorted rows dealt to the batches forth and back: the batch with the longest gets the shortest too."""
        turns = [rows[i : i + self.batches] for i in range(0, len(rows), self.batches)]
        dealt = [turn[:: -1 if number % 2 else 1] for number, turn in enumerate(turns)]
        return [row for batch in zip(*dealt, strict=True) for row in batch]

    def set_epoch(self, epoch: int) -> None:
        """Set what the order is drawn from beside the seed."""
        self.order.set_epoch(epoch)

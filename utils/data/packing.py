"""Which rows share a batch: packs that fill max_length, and the order of rows within an optimizer step."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from utils.data.encoded_rows import EncodedRows


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return packs of row indices with at most `capacity` tokens each, by best-fit decreasing.

    The rows are placed from the longest to the shortest, each in the pack with the least room that still holds it.
    A row longer than `capacity` is a pack on its own.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that still fit, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        position = bisect_left(room, (lengths[index], -1))
        if position < len(room):
            left, pack = room.pop(position)
        else:
            left, pack = max(capacity, lengths[index]), len(packs)
            packs.append([])

        packs[pack].append(index)
        if left > lengths[index]:
            insort(room, (left - lengths[index], pack))
    return packs


def pack_evenly(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return as many packs of row indices as `best_fit` needs, with similar token counts where `capacity` allows."""
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
        """Return one pack: {'rows': its rows as EncodedRows returns them}."""
        return {'rows': [self.rows[i] for i in self.packs[index]]}

    def lengths(self) -> list[int]:
        """Return the number of tokens of each pack."""
        lengths = self.rows.lengths()
        return [sum(lengths[i] for i in pack) for pack in self.packs]

    def origin(self, index: int) -> str:
        """Return where a row, not a pack, came from."""
        return self.rows.origin(index)

    def row(self, index: int) -> dict[str, Any]:
        """Return the row, not the pack, with this index."""
        return self.rows[index]

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return one batch: the `count` packs with the most tokens."""
        lengths = self.lengths()
        longest = heapq.nlargest(count, range(len(self)), key=lengths.__getitem__)
        return [[self[i] for i in longest]]


class StepSampler(Sampler[int]):
    """Rearranges the order of another sampler within each optimizer step; every step keeps its rows.

    Padded batches get rows of similar length, so that they hold little padding. Concatenated batches get similar
    numbers of tokens, so that none of them needs more memory, or more time on its device, than the others.
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
        indices = list(self.order)
        step = self.batch * self.batches
        for start in range(0, len(indices), step):
            rows = sorted(indices[start : start + step], key=lambda i: -self.lengths[i])
            if self.pads or len(rows) < step:
                yield from rows
            else:
                yield from self._balanced(rows)

    def _balanced(self, rows: list[int]) -> list[int]:
        """Return sorted rows dealt to the batches in snake order: the batch with the longest row gets the shortest."""
        turns = [rows[i : i + self.batches] for i in range(0, len(rows), self.batches)]
        dealt = [turn[:: -1 if number % 2 else 1] for number, turn in enumerate(turns)]
        return [row for batch in zip(*dealt, strict=True) for row in batch]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order together with the seed."""
        self.order.set_epoch(epoch)

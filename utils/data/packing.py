"""Decides which rows share a batch: packs rows up to max_length tokens, and orders the rows of an optimizer step."""

from __future__ import annotations

import copy
import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from utils.data.encoded_rows import EncodedRows


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return packs of row indices with at most `capacity` tokens each, by best-fit decreasing.

    The rows are packed from the longest to the shortest. Each row goes into the fullest pack in which it still fits.
    A row longer than `capacity` gets a pack for itself.
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
    """Return packs of row indices with at most `capacity` tokens each, and with similar numbers of tokens.

    There are as many packs as `best_fit` returns. If packs with similar numbers of tokens would exceed
    `capacity`, the packs of `best_fit` are returned.
    """
    packs = best_fit(lengths, capacity)
    even: list[list[int]] = [[] for _ in packs]
    loads = [(0, number) for number in range(len(packs))]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, number = loads[0]
        even[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    return even if max(loads)[0] <= capacity else packs


class PackedRows:
    """A map-style data set of packs: lists of rows that together have at most `capacity` tokens."""

    def __init__(self, rows: EncodedRows, capacity: int) -> None:
        self.rows = rows
        self.packs = best_fit(rows.lengths(), capacity)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one pack as {'rows': list of rows}. A row is a dict with the token ids and more, as in EncodedRows."""
        return {'rows': [self.rows[i] for i in self.packs[index]]}

    def lengths(self) -> list[int]:
        """Return the number of tokens of each pack."""
        lengths = self.rows.lengths()
        return [sum(lengths[i] for i in pack) for pack in self.packs]

    def longest_first(self) -> PackedRows:
        """Return the same packs, those with the most tokens first."""
        made = copy.copy(self)
        lengths = self.lengths()
        made.packs = [self.packs[i] for i in sorted(range(len(self)), key=lambda i: -lengths[i])]
        return made

    def origin(self, index: int) -> str:
        """Return where the row with this index came from. The index is of a row, not of a pack."""
        return self.rows.origin(index)

    def row(self, index: int) -> dict[str, Any]:
        """Return the row with this index. The index is of a row, not of a pack."""
        return self.rows[index]

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return a list with one batch: the `count` packs with the most tokens, or all packs if there are fewer."""
        lengths = self.lengths()
        longest = heapq.nlargest(count, range(len(self)), key=lengths.__getitem__)
        return [[self[i] for i in longest]]


class StepSampler(Sampler[int]):
    """Reorders the rows of a sampler within each optimizer step. Each step keeps the same rows.

    `order` is the sampler. `batch` is the number of rows of a batch. `batches` is the number of batches of a step,
    summed over all processes.

    If `pads` is True, the rows of a batch are padded to the same length. So each batch gets rows of similar length. If
    `pads` is False, the rows of a batch are concatenated without padding. So all batches of a step get similar numbers
    of tokens, and need similar memory and time. If the last step has fewer rows, its rows are only sorted by length.
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
        """Distribute the sorted rows over the batches, and return the rows of all batches in one list.

        The rows are distributed in turns. In each turn, every batch gets one row. Every second turn goes through the
        batches in reverse order.
        """
        turns = [rows[i : i + self.batches] for i in range(0, len(rows), self.batches)]
        dealt = [turn[:: -1 if number % 2 else 1] for number, turn in enumerate(turns)]
        return [row for batch in zip(*dealt, strict=True) for row in batch]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The epoch and the seed decide the order."""
        self.order.set_epoch(epoch)

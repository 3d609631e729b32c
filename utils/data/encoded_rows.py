"""Stores encoded rows in flat arrays, in memory or in memory-mapped files. Defines the methods of a training set."""

from __future__ import annotations

import heapq
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.encode.encoded import Encoded

# Fields whose length differs from row to row, and their array types: ids and span limits are 32-bit integers, images
# and origins are texts as bytes. One array has the field of all rows, concatenated. The array `<name>_ends` has the
# position at which each row ends.
_RAGGED = {'ids': 'i', 'spans': 'i', 'images': 'B', 'origins': 'B'}
# `parts` stores the number of the part of the plan, and `times` how often an epoch trains the row.
_ARRAYS = {**_RAGGED, **{f'{name}_ends': 'q' for name in _RAGGED}, 'prompt_lengths': 'i', 'parts': 'i', 'times': 'i'}


class TrainRows(Protocol):
    """The methods that every training set has. An item of a training set is a row or a pack (a list of short rows).

    The training sets are EncodedRows, PackedRows, Filled and TrainingStream.
    """

    def lengths(self) -> list[int]:
        """Return the number of tokens of each item.

        A TrainingStream does not know all its rows. It returns estimates, and the list may be shorter than the stream.
        """

    def origin(self, index: int) -> str:
        """Return where a row came from: file and line, or data set and row number."""

    def row(self, index: int) -> dict[str, Any]:
        """Return one row as a dict. Its value under the key `row` equals `index`."""

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return one or two batches of up to `count` items, for a trial of the memory that training needs.

        The first batch has the longest items. The second batch, if there is one, has the rows with the most tokens that
        carry loss. A stream looks only at its first rows.
        """


class IndexedRows(TrainRows, Protocol):
    """A training set with a length and an item for each index: a torch map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class EncodedRows:
    """Rows of token ids, stored in flat arrays: a torch map-style data set.

    A row has one or more spans of tokens that carry loss. The last span is the last reply that carries loss.

    If `order` is None, the rows are returned in the order in which they are stored. Otherwise, `order` is a list of
    indices of stored rows, and the rows are returned in the order of the list. If an epoch trains a row twice, the row
    is stored once, and its index is twice in `order`.
    """

    def __init__(self, arrays: dict[str, Any] | None = None, order: Any = None) -> None:
        self.arrays: dict[str, Any] = arrays or {name: array(code) for name, code in _ARRAYS.items()}
        self.order = order
        self._spilled = dict.fromkeys(_RAGGED, 0)

    @classmethod
    def map(cls, folder: Path, name: str) -> EncodedRows:
        """Return the rows in files that `spill` wrote, as memory-mapped arrays.

        `folder` and `name` are the arguments that `spill` got. If an epoch trains a row several times, the returned
        object contains the row several times.
        """
        arrays: dict[str, Any] = {}
        for kind, code in _ARRAYS.items():
            file = folder / f'{name}.{kind}'
            if file.stat().st_size:
                arrays[kind] = np.memmap(file, dtype=code, mode='r')
            else:  # an empty file cannot be mapped
                arrays[kind] = np.empty(0, dtype=code)

        times = arrays['times']
        passes = int(times.max(initial=1))
        if passes == 1:
            return cls(arrays)
        return cls(arrays, np.concatenate([np.flatnonzero(times > done).astype(np.int32) for done in range(passes)]))

    @property
    def ids(self) -> Any:
        """Return the ids of all stored rows, concatenated."""
        return self.arrays['ids']

    @property
    def stored(self) -> int:
        """Return the number of stored rows. A row that an epoch trains several times counts once."""
        return len(self.arrays['prompt_lengths'])

    def append(self, row: Encoded, origin: str = '', *, part: int = 0, times: int = 1) -> None:
        """Add one row.

        `times` is how often an epoch trains the row. The row is stored once. The object that `map` returns contains the
        row `times` times.

        `origin` says where the row came from, for example file and line. `part` is the index of the row's data set in
        Plan.parts.
        """
        self._add('ids', row.input_ids)
        self._add('spans', (limit for span in (*row.earlier, row.trained) for limit in span))
        self._add('images', json.dumps(row.images).encode() if row.images else b'')
        self._add('origins', origin.encode())
        for kind, value in (('prompt_lengths', row.prompt_length), ('parts', part), ('times', times)):
            self.arrays[kind].append(value)

    def _add(self, kind: str, values: Iterable[int]) -> None:
        self.arrays[kind].extend(values)
        self.arrays[f'{kind}_ends'].append(self._spilled[kind] + len(self.arrays[kind]))

    def spill(self, folder: Path, name: str) -> None:
        """Append the rows in memory to files in `folder`, and remove the rows from memory.

        There is one file for each array. The names of the files begin with `name`, for example train.ids.
        """
        for kind in _RAGGED:
            self._spilled[kind] += len(self.arrays[kind])
        for kind, values in self.arrays.items():
            with (folder / f'{name}.{kind}').open('ab') as stream:
                values.tofile(stream)
            del values[:]

    def __len__(self) -> int:
        return self.stored if self.order is None else len(self.order)

    def _stored_index(self, index: int) -> int:
        """Return the index at which the row `index` is stored in the arrays. It equals `index` if `order` is None."""
        position = range(len(self))[index]
        return position if self.order is None else int(self.order[position])

    def _slice(self, kind: str, stored: int) -> Any:
        ends = self.arrays[f'{kind}_ends']
        start = int(ends[stored - 1]) if stored else 0
        return self.arrays[kind][start : int(ends[stored])]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row as a dict with the token ids, the spans of tokens that carry loss, and more.

        The key 'row' has the value `index`.
        """
        stored = self._stored_index(index)
        limits = self._slice('spans', stored).tolist()
        spans = list(zip(limits[::2], limits[1::2], strict=True))
        images = self._slice('images', stored)
        item = Encoded(
            input_ids=self._slice('ids', stored).tolist(),
            trained=spans[-1],
            prompt_length=int(self.arrays['prompt_lengths'][stored]),
            earlier=spans[:-1],
            images=tuple(json.loads(images.tobytes())) if len(images) else (),
        ).as_item()
        return {**item, 'row': index}

    def origin(self, index: int) -> str:
        """Return where a row came from: file and line, or data set and row number."""
        return str(self._slice('origins', self._stored_index(index)).tobytes(), 'utf-8')

    def row(self, index: int) -> dict[str, Any]:
        """Return the row with this index."""
        return self[index]

    def _ordered(self, values: Any) -> Any:
        return values if self.order is None else values[self.order]

    def sizes(self) -> Any:
        """Return the number of tokens of each row as an int32 array of shape (rows,)."""
        return self._ordered(np.diff(np.asarray(self.arrays['ids_ends']), prepend=0).astype(np.int32))

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        return [int(size) for size in self.sizes()]

    def trained_tokens(self) -> int:
        """Return the number of tokens that carry loss, in all rows together."""
        return int(self._trained_by_row().sum(dtype=np.int64))

    def parts(self) -> Any:
        """Return an int32 array of shape (rows,): for each row, the index of its data set in Plan.parts."""
        return self._ordered(np.asarray(self.arrays['parts'], dtype=np.int32))

    def _trained_by_row(self) -> Any:
        """Return an int64 array of shape (rows,): for each row, the number of tokens that carry loss.

        The first token of a row is not counted, because the model never predicts it.
        """
        if not self.stored:
            return np.empty(0, dtype=np.int64)
        limits = np.asarray(self.arrays['spans'])
        by_span = np.maximum(limits[1::2] - np.maximum(limits[::2], 1), 0)
        ends = np.asarray(self.arrays['spans_ends'])
        first_spans = np.concatenate([[0], ends[:-1] // 2]).astype(np.int64)
        return self._ordered(np.add.reduceat(by_span, first_spans))

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return one or two batches of up to `count` rows, for a trial of the memory that training needs.

        The first batch has the longest rows. The second batch has the rows with the most tokens that carry loss. If the
        two batches would have the same rows, the second one is left out.
        """
        trained = self._trained_by_row()
        by_length = heapq.nlargest(count, range(len(self)), key=self.sizes().__getitem__)
        by_loss = heapq.nlargest(count, range(len(self)), key=trained.__getitem__)
        batches = [by_length]
        if set(by_loss) != set(by_length):
            batches.append(by_loss)
        return [[self[index] for index in batch] for batch in batches]

    def evenly(self, count: int) -> EncodedRows:
        """Return `count` of these rows, evenly spaced. Returns all rows if `count` is negative or too large.

        If --overlong split cut a row into pieces, all its pieces together count as one row.
        """
        by_origin: dict[str, list[int]] = {}
        for index in range(len(self)):
            by_origin.setdefault(self.origin(index), []).append(index)
        if count < 0 or count >= len(by_origin):
            return self

        pieces = list(by_origin.values())
        chosen = [index for i in range(count) for index in pieces[i * len(pieces) // count]]
        return EncodedRows(self.arrays, self._ordered(np.arange(self.stored, dtype=np.int32))[chosen])

    def longest_first(self) -> EncodedRows:
        """Return the same rows sorted by length, the longest first."""
        by_length = np.argsort(-self.sizes(), kind='stable').astype(np.int32)
        return EncodedRows(self.arrays, self._ordered(np.arange(self.stored, dtype=np.int32))[by_length])


class Filled(Sequence[dict[str, Any]]):
    """A map-style data set with fillers at the end, so that its length is a multiple of `multiple`.

    `multiple` is the batch size times the number of processes. A filler is a row without loss. Without fillers, a
    distributed sampler repeats its first rows, and an epoch would train these rows twice.
    """

    def __init__(self, rows: IndexedRows, multiple: int, pad_token_id: int) -> None:
        self.rows = rows
        self.size = -(-len(rows) // multiple) * multiple
        # One token without a label: the loss of this row is an empty sum.
        self.filler = {'input_ids': [pad_token_id], 'trained': (0, 0), 'prompt_length': 0}

    def __len__(self) -> int:
        return self.size

    def lengths(self) -> list[int]:
        """Return the number of tokens of each item of `rows`, and then 1 for each filler."""
        return [*self.rows.lengths(), *[1] * (self.size - len(self.rows))]

    def origin(self, index: int) -> str:
        """Return where the row with this index came from. Return 'filler' for the index -1."""
        return 'filler' if index < 0 else self.rows.origin(index)

    def row(self, index: int) -> dict[str, Any]:
        """Return the row with this index. Return the filler for the index -1."""
        return self.filler if index < 0 else dict(self.rows.row(index))

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return the batches that `self.rows.heaviest` returns. They contain no fillers."""
        return self.rows.heaviest(count)

    def __getitem__(self, index: Any) -> Any:
        """Return the item with this index. Return the filler if the index is after the last row."""
        return self.rows[index] if index < len(self.rows) else self.filler


def length_statistics(rows: EncodedRows) -> dict[str, float]:
    """Return statistics of the rows for run.json.

    The statistics are the number of rows, the tokens per row (min, median, mean, p95, max), the total number of tokens,
    and the share of tokens that carry loss. A row that an epoch trains twice counts twice.

    If an epoch trains some rows several times, the key `distinct_rows` is added: the number of different rows. Without
    rows, the result is {'rows': 0}.
    """
    sizes = np.sort(rows.sizes())
    if not len(sizes):
        return {'rows': 0}

    tokens = int(sizes.sum(dtype=np.int64))
    return {
        'rows': len(sizes),
        'min': int(sizes[0]),
        'median': int(sizes[len(sizes) // 2]),
        'mean': round(tokens / len(sizes), 1),
        'p95': int(sizes[int(0.95 * (len(sizes) - 1))]),
        'max': int(sizes[-1]),
        'tokens': tokens,
        'trained_share': round(rows.trained_tokens() / tokens, 4),
        **({'distinct_rows': rows.stored} if len(rows) != rows.stored else {}),
    }

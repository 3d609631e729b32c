"""Encoded rows in flat arrays, in memory or mapped from files."""

from __future__ import annotations

import heapq
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.encode.encoded import Encoded

# Values of all rows end to end, each kind with the positions where rows end: 32-bit ids and spans, and text as bytes.
_RAGGED = {'ids': 'i', 'spans': 'i', 'images': 'B', 'origins': 'B'}
_ARRAYS = {**_RAGGED, **{f'{name}_ends': 'q' for name in _RAGGED}, 'prompt_lengths': 'i'}


class EncodedRows:
    """Rows of ids laid end to end in flat arrays: a torch map-style data set.

    A row has one or more spans that carry loss; the last one is that of its last reply.
    """

    def __init__(self, arrays: dict[str, Any] | None = None, order: Any = None) -> None:
        self.arrays: dict[str, Any] = arrays or {name: array(code) for name, code in _ARRAYS.items()}
        self.order = order
        self._spilled = dict.fromkeys(_RAGGED, 0)

    @classmethod
    def map(cls, folder: Path, name: str) -> EncodedRows:
        """Return the rows that were spilled to a folder under this name; they take no memory of their own."""
        arrays = {}
        for kind, code in _ARRAYS.items():
            file = folder / f'{name}.{kind}'
            empty = not file.stat().st_size  # which cannot be mapped
            arrays[kind] = np.empty(0, dtype=code) if empty else np.memmap(file, dtype=code, mode='r')
        return cls(arrays)

    @property
    def ids(self) -> Any:
        """Return the ids of all rows, end to end."""
        return self.arrays['ids']

    def append(self, row: Encoded, origin: str = '') -> None:
        """Add one row and where it came from."""
        self._add('ids', row.input_ids)
        self._add('spans', (place for span in (*row.earlier, row.trained) for place in span))
        self._add('images', json.dumps(row.images).encode() if row.images else b'')
        self._add('origins', origin.encode())
        self.arrays['prompt_lengths'].append(row.prompt_length)

    def _add(self, kind: str, values: Iterable[int]) -> None:
        self.arrays[kind].extend(values)
        self.arrays[f'{kind}_ends'].append(self._spilled[kind] + len(self.arrays[kind]))

    def spill(self, folder: Path, name: str) -> None:
        """Append what is held to the files of this name and let it go."""
        for kind in _RAGGED:
            self._spilled[kind] += len(self.arrays[kind])
        for kind, held in self.arrays.items():
            with (folder / f'{name}.{kind}').open('ab') as stream:
                held.tofile(stream)
            del held[:]

    def __len__(self) -> int:
        return len(self.arrays['prompt_lengths'])

    def _place(self, index: int) -> int:
        place = range(len(self))[index]
        return place if self.order is None else int(self.order[place])

    def _slice(self, kind: str, place: int) -> Any:
        ends = self.arrays[f'{kind}_ends']
        return self.arrays[kind][int(ends[place - 1]) if place else 0 : int(ends[place])]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row as Encoded.as_item does, and its index as `row`."""
        place = self._place(index)
        spans, images = self._slice('spans', place).tolist(), self._slice('images', place)
        pairs = list(zip(spans[::2], spans[1::2], strict=True))
        item = Encoded(
            input_ids=self._slice('ids', place).tolist(),
            trained=pairs[-1],
            prompt_length=int(self.arrays['prompt_lengths'][place]),
            earlier=pairs[:-1],
            images=tuple(json.loads(images.tobytes())) if len(images) else (),
        ).as_item()
        return {**item, 'row': index}

    def origin(self, index: int) -> str:
        """Return where a row came from: file and line, or data set and row."""
        return str(self._slice('origins', self._place(index)).tobytes(), 'utf-8')

    def row(self, index: int) -> dict[str, Any]:
        """Return one row by the index that it carries."""
        return self[index]

    def _ordered(self, values: Any) -> Any:
        return values if self.order is None else values[self.order]

    def sizes(self) -> Any:
        """Return the number of tokens of each row, an array."""
        return self._ordered(np.diff(np.asarray(self.arrays['ids_ends']), prepend=0).astype(np.int32))

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        return [int(size) for size in self.sizes()]

    def trained_tokens(self) -> int:
        """Return the number of tokens that carry loss."""
        return int(self._trained_by_span().sum(dtype=np.int64))

    def _trained_by_span(self) -> Any:
        """Return the number of predicted tokens of each span: nothing predicts the first token of a row."""
        spans = np.asarray(self.arrays['spans'])
        return np.maximum(spans[1::2] - np.maximum(spans[::2], 1), 0)

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return the batches of `count` rows that ask for most memory: the longest, and those with most loss."""
        ends = np.asarray(self.arrays['spans_ends'])
        firsts = np.concatenate([[0], ends[:-1] // 2]).astype(np.int64)
        trained = self._ordered(np.add.reduceat(self._trained_by_span(), firsts)) if len(self) else []
        by_length, by_loss = (
            heapq.nlargest(count, range(len(self)), key=weights.__getitem__) for weights in (self.sizes(), trained)
        )
        batches = [by_length, by_loss] if set(by_length) != set(by_loss) else [by_length]
        return [[self[index] for index in batch] for batch in batches]

    def longest_first(self) -> EncodedRows:
        """Return the same rows in the order of their length, the longest first."""
        order = np.argsort(-self.sizes(), kind='stable').astype(np.int32)
        return EncodedRows(self.arrays, self._ordered(np.arange(len(self), dtype=np.int32))[order])


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


def length_statistics(rows: EncodedRows) -> dict[str, float]:
    """Return tokens per row (min, median, mean, p95, max), in all, and the share of them that is trained."""
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
    }

"""Rows of data sets: found, converted, drawn and split in a first pass, read again as they are needed.

A first pass counts the rows and marks each with its use, one byte per row; what it draws is drawn from the whole set.
Rows themselves are never held, so data may be larger than memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import HubName
from utils.data.sources import Source, find_files, parse_source
from utils.data.tally import Tally
from utils.dataset import DATASET_MAPPING, RawRows
from utils.formats.columns import KNOWN_SHAPES, Converter, check_row, find_converter, needed_columns
from utils.formats.conversation import BadRow, Row
from utils.formats.data_file import Doubled, OnBad, Signature, UnreadableRow, read_rows, refuse, signature
from utils.formats.hub_dataset import HubDataset, RowStream
from utils.formats.images import state_of_images

# The use of a row.
UNUSED, TRAIN, VAL = range(3)
# Columns of other tools that mean what query and response mean.
_SAME_BY_ANOTHER_NAME = (
    ('prompt', 'completion'),
    ('prompt', 'response'),
    ('question', 'answer'),
    ('question', 'response'),
)

# A row read: its place, its columns, and the conversation in it or what is wrong with it.
ReadRow = tuple[str, dict[str, Any], Row | BadRow]


def _placed(name: str, rows: RawRows, digest: Any) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Yield the rows of a registered data set with their places, or why its entry drops them."""
    if isinstance(rows, RowStream):
        placed = rows.placed()
    else:
        placed = ((f'{name}: row {number}', dict(row)) for number, row in enumerate(rows, start=1))
    for place, row in placed:
        # Only text, numbers and lists or objects of them can reach a conversation; of other values the type is enough.
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
        yield place, row


def _converted(
    placed: Iterable[tuple[str, dict[str, Any] | BadRow]], name: str, *, folder: str | None = None
) -> Iterator[ReadRow]:
    """Yield the rows as conversations; the shape is found from the first row's columns."""
    converter: Converter | None = None
    needed: frozenset[str] = frozenset()
    for place, raw in placed:
        if isinstance(raw, BadRow):
            yield place, {}, type(raw)(f'dropped by {name}: {raw}', raw.column)
            continue
        if converter is None:
            converter = find_converter(raw)
            if converter is None:
                raise ConfigError(f'{place}: {_no_shape(name, list(map(str, raw)))}')
            needed = frozenset(raw)
        try:
            if find_converter(raw) is not converter:
                raise _other_shape(converter, needed, raw)
            row = check_row(converter(raw))
        except BadRow as problem:
            yield place, raw, problem
            continue
        row.origin, row.folder = place, folder
        if isinstance(raw, Doubled):
            row.notes += tuple(
                f'the JSON key `{key}` stands twice in an object: the last counts' for key in raw.keys_twice
            )
        yield place, raw, row


def _no_shape(name: str, columns: Sequence[str]) -> str:
    """Return that columns are no known shape, and what to do."""
    said = f'columns {", ".join(columns)} are no known shape. '
    if find_converter([column.strip().lower() for column in columns]):
        return f'{said}Write their names in lower case and without blanks.'
    for names in _SAME_BY_ANOTHER_NAME:
        if set(names) <= set(columns):
            return f'{said}Rename {names[0]} to query and {names[1]} to response.'
    if 'text' in columns:
        return (
            f'{said}To train on text alone, write each row as {{"query": "", "response": the text}}, and choose '
            '--template_type default-generation.'
        )
    return (
        f"{said}Known: {KNOWN_SHAPES}. Rename the columns of '{name}', or register a function in DATASET_MAPPING in "
        'utils/dataset.py.'
    )


def _other_shape(converter: Converter, first: frozenset[str], raw: Mapping[str, Any]) -> BadRow:
    """Return what is wrong with a row that another converter than that of the first row would read, or none."""
    needed = needed_columns(converter)
    if needed <= set(raw):
        others = ', '.join(sorted(set(raw) - first))
        return BadRow(f'the row has another shape than the first row, from its columns {others}', others)
    missing = ', '.join(sorted(needed - set(raw)))
    return BadRow(f'columns are missing that the first row has: {missing}', missing)


@dataclass(kw_only=True)
class Part:
    """A stream of rows that can be read again, and the use of each row that can be trained on."""

    name: str
    # Reads the rows anew; feeds what it reads to the hash object.
    read: Callable[[Any], Iterator[ReadRow]]
    is_val: bool = False
    # Which hub, id and revision served it, if one did.
    served: str = ''
    uses: bytearray = field(default_factory=bytearray)
    # The local files of the part, each as it was when the part was opened; none of a registered data set.
    files: Sequence[tuple[Path, Signature]] = ()
    has_images: bool = False
    # Positions, among all rows read, of the rows that cannot be trained on.
    unusable: array[int] = field(default_factory=lambda: array('Q'))
    # Hash of what was read when the rows were counted.
    content: str = ''
    # Replies before the last one that do not say themselves that they carry loss, and the rows that have any.
    earlier_replies: int = 0
    rows_with_earlier: int = 0

    def count(self, left_out: Tally, noted: Tally, digest: Any) -> None:
        """Read the part once and mark every row that can be trained on."""
        use, own = VAL if self.is_val else TRAIN, hashlib.sha256()
        for position, (place, _, row) in enumerate(self.read(own)):
            if isinstance(row, BadRow):
                left_out.add(str(row), place)
                self.unusable.append(position)
                continue
            self.uses.append(use)
            for note in row_notes(row):
                noted.add(note, place)
            earlier = sum(m['role'] == 'assistant' and not m.get('loss') for m in row.messages[:-1])
            self.earlier_replies += earlier
            self.rows_with_earlier += bool(earlier)
            self.has_images |= bool(row.images)
            own.update(state_of_images(row))
        self.content = own.hexdigest()
        digest.update(own.digest())

    def used(self) -> Iterator[tuple[int, ReadRow]]:
        """Yield every row with its use, as counted before; raises ConfigError where they are not the same rows."""
        position = 0
        for read in self.read(hashlib.sha256()):
            if isinstance(read[2], BadRow):
                yield UNUSED, read
            elif position < len(self.uses):
                yield self.uses[position], read
                position += 1
            else:
                position = -1
                break
        if position != len(self.uses):
            raise ConfigError(
                f"data set '{self.name}' gave other rows when it was read a second time. They must be the same."
            )


def open_parts(source: Source, bad: OnBad = refuse, hub: HubName = 'modelscope') -> list[Part]:
    """Return the parts of a data set: one to be split, or its training and its validation part."""
    if source.path is None:
        entry, served = DATASET_MAPPING[source.name], ''
        if isinstance(entry, HubDataset):
            train, val, served = entry.load(hub)
            logger.info(f'{source.name}: {served}')
            loaded: Any = train if val is None else (train, val)
        else:
            loaded = entry()
        halves = loaded if isinstance(loaded, tuple) else (loaded,)
        return [_registered(source.name, rows, half, served) for half, rows in enumerate(halves)]
    files = [(file, signature(file)) for file in find_files(source)]

    def read(digest: Any) -> Iterator[ReadRow]:
        for file, known in files:
            digest.update(f'{file}\n'.encode())
            try:
                rows = read_rows(file, bad=bad, known=known, digest=digest)
                yield from _converted(rows, str(file), folder=str(file.absolute().parent))
            except UnreadableRow as error:  # where the caller notes it, the rest of this file is passed over
                bad(error.place, error.problem)

    return [Part(name=source.name, read=read, files=files)]


def read_rows_at(files: Sequence[tuple[Path, Signature]], positions: Collection[int]) -> list[Row | BadRow]:
    """Return the rows at these positions among all rows of the files; only they are converted and checked."""
    found: list[Row | BadRow] = []
    start = 0
    for file, known in files:
        is_wanted = start in positions
        placed: list[tuple[str, dict[str, Any] | BadRow]] = []
        count = 0
        for place, raw in read_rows(file, known=known):
            # The first row of a file tells how all of its rows are converted.
            if count == 0 or start + count in positions:
                placed.append((place, raw))
            count += 1

        rows = [row for _, _, row in _converted(placed, str(file), folder=str(file.absolute().parent))]
        found += rows if is_wanted else rows[1:]
        start += count
    return found


def _registered(name: str, rows: RawRows, half: int, served: str) -> Part:
    shown = f'{name} (validation)' if half else name

    def read(digest: Any) -> Iterator[ReadRow]:
        again = rows
        if iter(rows) is rows:  # a generator can be read only once: the function is called anew
            loaded: Any = DATASET_MAPPING[name]()
            again = loaded[half] if isinstance(loaded, tuple) else loaded
        yield from _converted(_placed(shown, again, digest), shown)

    return Part(name=shown, read=read, is_val=bool(half), served=served)


# The parts of each data set that is streamed.
Streams = list[list[Part]]


def open_streams(words: Sequence[str], *, hub: HubName) -> Streams:
    """Return the parts of each data set to be streamed; raises ConfigError where its first row cannot be read."""
    sources = [open_parts(parse_source(word), hub=hub) for word in words]
    for part in itertools.chain.from_iterable(sources):
        next(part.read(hashlib.sha256()), None)
    return sources


def first_rows(sources: Streams, count: int) -> list[Row]:
    """Return the first rows of each data set, of its validation part where it has one: what a stream holds out."""
    heads = (parts[-1].read(hashlib.sha256()) for parts in sources)
    return [row for head in heads for row in itertools.islice((r for _, _, r in head if isinstance(r, Row)), count)]


def row_notes(row: Row) -> list[str]:
    """Return what is worth counting about a row that is used: its remarks, and what of it is not used."""
    return [*row.notes, *(f'{name} is not used' for name in row.unused)]

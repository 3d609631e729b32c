"""Reads the rows of data sets in two passes: the first counts the rows and marks their use, the second encodes them.

Only the use of each row is kept in memory, as one byte. So rows can be drawn from the whole set even if the data is
larger than memory.
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
from utils.formats.columns import (
    KNOWN_SHAPES,
    Converter,
    ambiguous_shapes,
    check_row,
    find_converter,
    needed_columns,
)
from utils.formats.conversation import BadRow, Row
from utils.formats.data_file import (
    OnBad,
    RowWithRepeatedKeys,
    Signature,
    UnreadableRow,
    read_rows,
    refuse,
    signature,
)
from utils.formats.hub_dataset import HubDataset, RowStream
from utils.formats.images import state_of_images
from utils.formats.reading import Reading

# Files are read with the names that they give their columns.
AS_WRITTEN = Reading()
# The number of rows of each stream in which the columns of --columns are looked for.
_FIRST_ROWS = 1000
# The use of a row.
UNUSED, TRAIN, VAL = range(3)

# (location, columns, the conversation in the columns or the problem with it)
ReadRow = tuple[str, dict[str, Any], Row | BadRow]


def _located(name: str, rows: RawRows, digest: Any) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Yield (location, row) for each row of a registered data set.

    If the entry of the data set drops a row, a BadRow with the reason is yielded instead of the row.
    """
    if isinstance(rows, RowStream):
        located = rows.with_locations()
    else:
        located = ((f'{name}: row {number}', dict(row)) for number, row in enumerate(rows, start=1))

    for location, row in located:
        # Only text, numbers, lists and objects can reach a conversation. For all other values the type is enough.
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
        yield location, row


def _converted(
    located: Iterable[tuple[str, dict[str, Any] | BadRow]],
    name: str,
    *,
    folder: str | None = None,
    reading: Reading = AS_WRITTEN,
    seen: dict[str, None] | None = None,
) -> Iterator[ReadRow]:
    """Convert the rows to conversations, and yield a ReadRow for each row.

    The columns of the first row decide which converter is used for all rows. `seen` gets the names of the columns of
    the first row, and of all columns that --columns renames.
    """
    converter: Converter | None = None
    first_columns: frozenset[str] = frozenset()
    seen = {} if seen is None else seen
    for location, written in located:
        if isinstance(written, BadRow):
            yield location, {}, type(written)(f'dropped by {name}: {written}', written.column)
            continue

        raw = reading.renamed(written, location)
        if converter is None:
            seen.update(dict.fromkeys(map(str, written)))
            converter = _first_converter(raw, written, location, reading)
            first_columns = frozenset(raw)
        elif raw is not written:
            seen.update(dict.fromkeys(reading.columns.keys() & written.keys()))

        try:
            if find_converter(raw) is not converter:
                raise _other_columns(converter, first_columns, raw)
            row = check_row(converter(raw))
        except BadRow as problem:
            yield location, raw, problem
            continue

        row.origin = location
        row.folder = folder
        if isinstance(raw, RowWithRepeatedKeys):
            row.notes += tuple(
                f'the JSON key `{key}` occurs twice in an object: the last value is used' for key in raw.repeated_keys
            )
        yield location, raw, row


def _first_converter(raw: Mapping[str, Any], written: Mapping[str, Any], location: str, reading: Reading) -> Converter:
    """Return the converter for the first row of a file. Raises ConfigError if no converter fits its columns.

    `raw` is the row with the columns renamed, `written` is the row as it is in the file.
    """
    converter = find_converter(raw)
    if converter is None:
        missing = reading.missing(list(map(str, written)), location)
        raise ConfigError(*missing, f'{location}: {_unknown_columns(list(map(str, raw)))}')
    return converter


def _unknown_columns(columns: Sequence[str]) -> str:
    """Return the error message for columns that no converter supports, with the best-fitting remedy."""
    problem = f'unknown columns {", ".join(columns)}. '
    if find_converter([column.strip().lower() for column in columns]):
        return f'{problem}Write their names in lower case and without blanks.'

    if shapes := ambiguous_shapes(columns):
        return _ambiguous(shapes, columns)
    return (
        f'{problem}Supported: {KNOWN_SHAPES}. Say which columns hold question and reply: --columns '
        'NAME=query,OTHER=response, or register a function in DATASET_MAPPING in utils/dataset.py.'
    )


def _ambiguous(shapes: Sequence[frozenset[str]], columns: Sequence[str]) -> str:
    """Return the error message for columns that fit several shapes, with a remedy for each shape."""
    names = {shape: '/'.join(column for column in columns if column in shape) for shape in shapes}
    every = frozenset().union(*shapes)
    choices = [
        f'to read {names[shape]}, add --columns {",".join(f"{column}=" for column in sorted(every - shape))}'
        for shape in shapes
    ]
    return f'the columns fit more than one shape of rows: {", ".join(names.values())}. Choose: {"; ".join(choices)}.'


def _other_columns(converter: Converter, first: frozenset[str], raw: Mapping[str, Any]) -> BadRow:
    """Return a BadRow that says why the converter of the first row cannot read this row."""
    needed = needed_columns(converter)
    if needed <= set(raw):
        others = ', '.join(sorted(set(raw) - first))
        return BadRow(f'the row has another shape than the first row, from its columns {others}', others)
    missing = ', '.join(sorted(needed - set(raw)))
    return BadRow(f'columns are missing that the first row has: {missing}', missing)


@dataclass(kw_only=True)
class Part:
    """A part of a data set that can be read several times. `uses` has the use of each row that can be trained on."""

    name: str
    # Reads the rows from the start, and updates the given hash object with the content that it reads.
    read: Callable[[Any], Iterator[ReadRow]]
    is_val: bool = False
    # The hub, id and revision of the download. Empty for files.
    served: str = ''
    uses: bytearray = field(default_factory=bytearray)
    # The local files of the part, each with its signature when the part was opened. Empty for a registered data set.
    files: Sequence[tuple[Path, Signature]] = ()
    has_images: bool = False
    # Positions, among all rows read, of the rows that cannot be trained on.
    unusable: array[int] = field(default_factory=lambda: array('Q'))
    # Hash of the content that the first pass read.
    content: str = ''
    # The number of replies before the last reply that are not marked to carry loss.
    earlier_replies: int = 0
    # The number of rows with such a reply.
    rows_with_earlier: int = 0
    # The number of rows of plain text.
    text_rows: int = 0
    # The names of the columns in the files: those of first rows, and those that --columns renames. Empty for a
    # registered data set, whose columns are not renamed.
    columns: dict[str, None] = field(default_factory=dict)

    def count(self, left_out: Tally, noted: Tally, digest: Any) -> None:
        """Read the part once, and set the use of every row that can be trained on. Updates the tallies and the hash."""
        use = VAL if self.is_val else TRAIN
        content = hashlib.sha256()
        for position, (location, _, row) in enumerate(self.read(content)):
            if isinstance(row, BadRow):
                left_out.add(str(row), location)
                self.unusable.append(position)
                continue

            self.uses.append(use)
            for note in row_notes(row):
                noted.add(note, location)

            earlier = sum(m['role'] == 'assistant' and not m.get('loss') for m in row.messages[:-1])
            self.earlier_replies += earlier
            self.rows_with_earlier += bool(earlier)
            self.has_images |= bool(row.images)
            self.text_rows += row.is_text
            content.update(state_of_images(row))

        self.content = content.hexdigest()
        digest.update(content.digest())

    def used(self) -> Iterator[tuple[int, ReadRow]]:
        """Yield (use, ReadRow) for every row, with the use that `count` set. The use of a BadRow is UNUSED.

        Raises ConfigError if the number of rows has changed since `count` read them.
        """
        position = 0
        for read in self.read(hashlib.sha256()):
            _, _, row = read
            if isinstance(row, BadRow):
                yield UNUSED, read
            elif position < len(self.uses):
                yield self.uses[position], read
                position += 1
            else:
                position = -1
                break

        if position != len(self.uses):
            raise ConfigError(
                f"data set '{self.name}': the second read returned other rows than the first. Make its function in "
                'utils/dataset.py deterministic: the same rows in the same order.'
            )


def open_parts(
    source: Source, bad: OnBad = refuse, hub: HubName = 'modelscope', reading: Reading = AS_WRITTEN
) -> list[Part]:
    """Return the parts of a data set: [training, validation] if it has both, else a single part that the run splits.

    `reading` is for files. The rows of a registered data set have the columns that its entry gives them.
    """
    if source.path is None:
        entry = DATASET_MAPPING[source.name]
        served = ''
        if isinstance(entry, HubDataset):
            train, val, served = entry.load(hub)
            logger.info(f'{source.name}: {served}')
            loaded: Any = train if val is None else (train, val)
        else:
            loaded = entry()
        halves = loaded if isinstance(loaded, tuple) else (loaded,)
        return [_registered(source.name, rows, half, served) for half, rows in enumerate(halves)]

    files = [(file, signature(file)) for file in find_files(source)]
    columns: dict[str, None] = {}

    def read(digest: Any) -> Iterator[ReadRow]:
        for file, known in files:
            digest.update(f'{file}\n'.encode())
            try:
                rows = read_rows(file, bad=bad, known=known, digest=digest, text_rows=reading.text_rows)
                folder = str(file.absolute().parent)
                yield from _converted(rows, str(file), folder=folder, reading=reading, seen=columns)
            except UnreadableRow as error:  # if `bad` does not raise, the rest of this file is skipped
                bad(error.location, error.problem)

    return [Part(name=source.name, read=read, files=files, columns=columns)]


def check_columns(parts: Iterable[Part], reading: Reading) -> None:
    """Raise ConfigError if --columns names a column that no row of the parts has had so far."""
    from_files = [part for part in parts if part.files]
    if not from_files:
        return
    seen = dict.fromkeys(itertools.chain.from_iterable(part.columns for part in from_files))
    if missing := reading.missing(seen, ', '.join(part.name for part in from_files)):
        raise ConfigError(*missing)


def read_rows_at(
    files: Sequence[tuple[Path, Signature]], positions: Collection[int], reading: Reading = AS_WRITTEN
) -> list[Row | BadRow]:
    """Return the rows at these positions among all rows of the files.

    Only these rows and the first row of each file are converted and checked.
    """
    found: list[Row | BadRow] = []
    start = 0
    for file, known in files:
        is_wanted = start in positions
        placed: list[tuple[str, dict[str, Any] | BadRow]] = []
        count = 0
        for place, raw in read_rows(file, known=known, text_rows=reading.text_rows):
            # The first row of a file is always kept: it decides how all rows of the file are converted.
            if count == 0 or start + count in positions:
                placed.append((place, raw))
            count += 1

        folder = str(file.absolute().parent)
        rows = [row for _, _, row in _converted(placed, str(file), folder=folder, reading=reading)]
        found += rows if is_wanted else rows[1:]
        start += count
    return found


def _registered(name: str, rows: RawRows, half: int, served: str) -> Part:
    """Return a part of a registered data set. `half` is 0 for the training part, 1 for the validation part."""
    shown = f'{name} (validation)' if half else name

    def read(digest: Any) -> Iterator[ReadRow]:
        again = rows
        if iter(rows) is rows:  # a generator can be read only once: call the function again
            loaded: Any = DATASET_MAPPING[name]()
            again = loaded[half] if isinstance(loaded, tuple) else loaded
        yield from _converted(_located(shown, again, digest), shown)

    return Part(name=shown, read=read, is_val=bool(half), served=served)


# The parts of each data set that is streamed.
Streams = list[list[Part]]


def open_streams(words: Sequence[str], *, hub: HubName, reading: Reading = AS_WRITTEN) -> Streams:
    """Return the parts of each data set to stream.

    Raises ConfigError if the first row of a part cannot be read, or if the first rows of all parts lack a column that
    --columns names.
    """
    sources = [open_parts(parse_source(word), hub=hub, reading=reading) for word in words]
    parts = list(itertools.chain.from_iterable(sources))
    for part in parts:
        for _ in itertools.islice(part.read(hashlib.sha256()), _FIRST_ROWS if reading.columns else 1):
            pass
    check_columns(parts, reading)
    return sources


def first_rows(sources: Streams, count: int) -> list[Row]:
    """Return the rows that a stream holds out: the first `count` rows of each data set.

    If a data set has a validation part, they are the first rows of the validation part.
    """
    found: list[Row] = []
    for parts in sources:
        readable = (row for _, _, row in parts[-1].read(hashlib.sha256()) if isinstance(row, Row))
        found += itertools.islice(readable, count)
    return found


def row_notes(row: Row) -> list[str]:
    """Return the remarks on a row that is used: the notes of the row, and one remark for each column that is unused."""
    return [*row.notes, *(f'{name} is not used' for name in row.unused)]

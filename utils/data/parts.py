"""Reads the rows of data sets in two passes: the first counts the rows and sets their use, the second returns them.

The use of a row is training, validation or unused. Only the use of each row is kept in memory, as one byte. So rows can
be drawn from the whole data set even if the data is larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import HubName, LossScope
from utils.data.sources import Source, find_files
from utils.data.tally import Tally
from utils.dataset import DATASET_MAPPING, RawRows
from utils.formats.columns import KNOWN_SHAPES, Converter, check_row, find_converter, needed_columns
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

# The values for the use of a row.
UNUSED, TRAIN, VAL = range(3)
# Follows the name of a data set in the name of its validation part.
VALIDATION = ' (validation)'
# Column names that other tools use for query and response.
_OTHER_NAMES = (
    ('prompt', 'completion'),
    ('prompt', 'response'),
    ('question', 'answer'),
    ('question', 'response'),
)

# (location, columns, conversation). If the columns contain no usable conversation, the third item is a BadRow.
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
        # Only text, numbers, lists and objects can get into a conversation. Of other values, only the type is hashed.
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
        yield location, row


def _converted(
    located: Iterable[tuple[str, dict[str, Any] | BadRow]], name: str, *, folder: str | None = None
) -> Iterator[ReadRow]:
    """Convert the rows to conversations, and yield a ReadRow for each row.

    The columns of the first row decide which converter is used for all rows.
    """
    converter: Converter | None = None
    first_columns: frozenset[str] = frozenset()
    for location, raw in located:
        if isinstance(raw, BadRow):
            yield location, {}, type(raw)(f'dropped by {name}: {raw}', raw.column)
            continue

        if converter is None:
            converter = find_converter(raw)
            if converter is None:
                raise ConfigError(f'{location}: {_unknown_columns(name, list(map(str, raw)))}')
            first_columns = frozenset(raw)

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


def _unknown_columns(name: str, columns: Sequence[str]) -> str:
    """Return the error message for columns that no converter supports, with the best-fitting remedy."""
    problem = f'unknown columns {", ".join(columns)}. '
    if find_converter([column.strip().lower() for column in columns]):
        return f'{problem}Write their names in lower case and without spaces.'

    for names in _OTHER_NAMES:
        if set(names) <= set(columns):
            return f'{problem}Rename {names[0]} to query and {names[1]} to response.'

    if 'text' in columns:
        return (
            f'{problem}To train on plain text, write each row as {{"query": "", "response": the text}}, and choose '
            '--template_type default-generation.'
        )
    return (
        f"{problem}Supported: {KNOWN_SHAPES}. Rename the columns of '{name}', or register a function in "
        'DATASET_MAPPING in utils/dataset.py.'
    )


def _other_columns(converter: Converter, first: frozenset[str], raw: Mapping[str, Any]) -> BadRow:
    """Return a BadRow that says why the converter of the first row cannot read this row."""
    needed = needed_columns(converter)
    if needed <= set(raw):
        others = ', '.join(sorted(set(raw) - first))
        return BadRow(f'the row has a different format than the first row, because it has the columns {others}', others)
    missing = ', '.join(sorted(needed - set(raw)))
    return BadRow(f'columns are missing that the first row has: {missing}', missing)


@dataclass(kw_only=True)
class Part:
    """The training rows, the validation rows, or all rows of a data set. They can be read several times.

    `uses` has the use of each row that can be trained on.
    """

    name: str
    # Reads the rows from the start, and updates the given hash object with the content that it reads.
    read: Callable[[Any], Iterator[ReadRow]]
    is_val: bool = False
    # The hub, id and revision of the download. It is empty for local files.
    served: str = ''
    uses: bytearray = field(default_factory=bytearray)
    # The local files of the part, each with its signature when the part was opened. A registered data set has none.
    files: Sequence[tuple[Path, Signature]] = ()
    has_images: bool = False
    # The positions of the rows that cannot be trained on, among all rows that were read.
    unusable: array[int] = field(default_factory=lambda: array('Q'))
    # Hash of the content that the first pass read.
    content: str = ''
    # The number of replies before the last reply for which the row itself does not say whether they carry loss, and the
    # number of rows with such a reply. The keys say which replies carry loss if --loss_scope is not typed.
    earlier_replies: Counter[LossScope] = field(default_factory=Counter)
    rows_with_earlier: Counter[LossScope] = field(default_factory=Counter)
    # The name in metrics, for a set of --val_dataset. Empty for all other parts.
    val_set: str = ''
    # How often an epoch trains each training row. A row that has 1 in `once_more` is trained once more than this.
    passes: int = 1
    once_more: bytearray = field(default_factory=bytearray)

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

            if earlier := open_replies(row):
                self.earlier_replies[row.loss_scope] += earlier
                self.rows_with_earlier[row.loss_scope] += 1
            self.has_images |= bool(row.images)
            content.update(state_of_images(row))

        self.content = content.hexdigest()
        digest.update(content.digest())

    def times(self, position: int) -> int:
        """Return how often an epoch trains the training row at this position among the rows in `uses`."""
        return self.passes + (self.once_more[position] if self.once_more else 0)

    def trained_rows(self) -> int:
        """Return the number of rows that an epoch trains. A row that is repeated counts each time."""
        return self.passes * self.uses.count(TRAIN) + self.once_more.count(1)

    def uses_digest(self) -> bytes:
        """Return bytes that differ if rows are used differently."""
        repeats = b'' if self.passes == 1 and not any(self.once_more) else f'x{self.passes}'.encode() + self.once_more
        return bytes(self.uses) + repeats

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


def draw_uses(parts: Sequence[Part], use: int, count: int, seed: int, *, drawn: int, rest: int) -> None:
    """Draw up to `count` of the rows whose use is `use`.

    The use of the drawn rows is set to `drawn`, the use of the rest to `rest`.
    """
    total = sum(part.uses.count(use) for part in parts)
    chosen = bytearray(total)
    for index in random.Random(seed).sample(range(total), min(count, total)):
        chosen[index] = 1

    index = 0
    for part in parts:
        position = part.uses.find(use)
        while position >= 0:
            part.uses[position] = drawn if chosen[index] else rest
            index += 1
            position = part.uses.find(use, position + 1)


def open_parts(source: Source, bad: OnBad = refuse, hub: HubName = 'modelscope') -> list[Part]:
    """Return the parts of a data set: [training, validation] if it has both, else a single part that the run splits."""
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

    def read(digest: Any) -> Iterator[ReadRow]:
        for file, known in files:
            digest.update(f'{file}\n'.encode())
            try:
                rows = read_rows(file, bad=bad, known=known, digest=digest)
                yield from _converted(rows, str(file), folder=str(file.absolute().parent))
            except UnreadableRow as error:  # if `bad` does not raise, the rest of this file is skipped
                bad(error.location, error.problem)

    return [Part(name=source.name, read=read, files=files)]


def read_rows_at(files: Sequence[tuple[Path, Signature]], positions: Collection[int]) -> list[Row | BadRow]:
    """Return the rows at these positions among all rows of the files.

    Only these rows and the first row of each file are converted and checked.
    """
    found: list[Row | BadRow] = []
    start = 0
    for file, known in files:
        is_wanted = start in positions
        placed: list[tuple[str, dict[str, Any] | BadRow]] = []
        count = 0
        for place, raw in read_rows(file, known=known):
            # The first row of a file is always kept: it decides how all rows of the file are converted.
            if count == 0 or start + count in positions:
                placed.append((place, raw))
            count += 1

        rows = [row for _, _, row in _converted(placed, str(file), folder=str(file.absolute().parent))]
        found += rows if is_wanted else rows[1:]
        start += count
    return found


def _registered(name: str, rows: RawRows, half: int, served: str) -> Part:
    """Return the training part (`half` is 0) or the validation part (`half` is 1) of a registered data set."""
    shown = name + VALIDATION if half else name

    def read(digest: Any) -> Iterator[ReadRow]:
        again = rows
        if iter(rows) is rows:  # a generator can be read only once: call the function again
            loaded: Any = DATASET_MAPPING[name]()
            again = loaded[half] if isinstance(loaded, tuple) else loaded
        yield from _converted(_located(shown, again, digest), shown)

    return Part(name=shown, read=read, is_val=bool(half), served=served)


def open_replies(row: Row) -> int:
    """Return the number of earlier replies for which the row does not say whether they carry loss."""
    return sum(message['role'] == 'assistant' and 'loss' not in message for message in row.messages[:-1])


def row_notes(row: Row) -> list[str]:
    """Return the notes of a row, and one more note for each of its unused columns."""
    return [*row.notes, *(f'{name} is not used' for name in row.unused)]

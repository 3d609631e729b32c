"""Reads the rows of data sets in two passes: the first decides the use of each row, the second returns the rows.

The use of a row is TRAIN, VAL (validation) or UNUSED. Memory holds the use of each row, but not the rows themselves. So
rows can be drawn from the whole data set even if the data is larger than memory.
"""

from __future__ import annotations

import hashlib
import itertools
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
from utils.data.own_rows import halves_of, located_rows
from utils.data.sources import Source, find_files, not_found_remedy, shadowed_id
from utils.data.tally import Tally
from utils.dataset import DATASET_MAPPING
from utils.formats.columns import (
    Converter,
    check_row,
    find_converter,
    needed_columns,
    tidy_columns,
)
from utils.formats.conversation import BadRow, Row
from utils.formats.data_file import Signature, ignore, read_rows, signature
from utils.formats.file_bytes import OnBad, UnreadableRow, refuse
from utils.formats.hub_dataset import HubDataset, RowStream
from utils.formats.hub_files import HubFiles
from utils.formats.images import state_of_images, with_image_files
from utils.formats.json_text import RowWithRepeatedKeys, repeated_key, with_columns
from utils.formats.reading import Reading
from utils.formats.table import Remark
from utils.formats.unknown_columns import unknown_columns

# Files are read with the names that they give their columns.
AS_WRITTEN = Reading()
# The values for the use of a row.
UNUSED, TRAIN, VAL = range(3)
# Follows the name of a data set in the name of its validation part.
VALIDATION = ' (validation)'
_DATASET_PY = 'utils/dataset.py'

# (location, columns, conversation). If the columns contain no usable conversation, the third item is a BadRow.
ReadRow = tuple[str, dict[str, Any], Row | BadRow]


def _hashed(
    located: Iterable[tuple[str, dict[str, Any] | BadRow]], digest: Any
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Yield each (location, row) unchanged, and update the hash object `digest` with the content of each row."""
    for location, row in located:
        # Only text, numbers, lists and objects can get into a conversation. Of other values, only the type is hashed.
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
        yield location, row


def _converted(
    located: Iterable[tuple[str, dict[str, Any] | BadRow]],
    name: str,
    *,
    folder: str | None = None,
    reading: Reading = AS_WRITTEN,
    seen: dict[str, None] | None = None,
    remark: Remark = ignore,
    of_function: bool = False,
) -> Iterator[ReadRow]:
    """Convert the rows of a data set, and yield (location, columns, conversation) for each row.

    If a row cannot be converted, a BadRow is yielded instead of the conversation. The columns of a row decide which
    converter is used. A row with another converter than the first row must have no column that the first row's
    converter requires, because such a row may lack a part. Raises ConfigError if no converter fits the first row.

    If the name of a column in the first row is a known name with capital letters or spaces, such as 'Query ', the
    column is read as 'query'. In this case, `remark` is called with a text for the log.

    `name` is the name of the data set or file in messages. Relative paths of images start in `folder`. The columns of
    the first row are added to `seen`, and also all columns that --columns renames. `of_function` says whether the rows
    come from an entry of DATASET_MAPPING: from a function, or from `to_row` of a HubDataset.
    """
    converter: Converter | None = None
    first_columns: frozenset[str] = frozenset()
    renamed: dict[str, str] = {}
    # The converters of rows in another format than the first row.
    others: list[Converter] = []
    seen = {} if seen is None else seen
    for location, written in located:
        if isinstance(written, BadRow):
            yield location, {}, type(written)(f'dropped by {name}: {written}', written.column)
            continue

        raw = reading.renamed(written, location)
        if converter is None:
            seen.update(dict.fromkeys(map(str, written)))
            renamed = tidy_columns(list(map(str, raw)))
            if renamed:
                shown = ', '.join(f"'{column}' as {read_as}" for column, read_as in renamed.items())
                remark(f'{name}: columns are read by other names than they are written: {shown}')
        if renamed:
            raw = with_columns(raw, renamed)
        if converter is None:
            converter = _first_converter(raw, written, location, name, reading, of_function=of_function)
            first_columns = frozenset(raw)
        elif raw is not written:
            seen.update(dict.fromkeys(reading.columns.keys() & written.keys()))

        try:
            own = find_converter(raw)
            if own is None or (own is not converter and not _is_other_format(converter, own, raw)):
                raise _other_columns(converter, first_columns, raw)
            if own is not converter and own not in others:
                others.append(own)
                needed = '/'.join(column for column in raw if column in needed_columns(own))
                remark(f'{name}: rows with {needed} are read too, from {location}: each row by its own columns')
            columns = dict(with_image_files(raw))
            row = check_row(own(columns))
        except BadRow as problem:
            yield location, raw, problem
            continue

        row.origin = location
        row.folder = folder
        if isinstance(raw, RowWithRepeatedKeys):
            row.notes = tuple(dict.fromkeys([*row.notes, *map(repeated_key, raw.repeated_keys)]))
        yield location, columns, row


def _first_converter(
    raw: Mapping[str, Any],
    written: Mapping[str, Any],
    location: str,
    name: str,
    reading: Reading,
    *,
    of_function: bool,
) -> Converter:
    """Return the converter for the first row of a file or data set. Raises ConfigError if none fits its columns.

    `written` is the row as it was read. `raw` is the same row with renamed columns. `name` is the name of the file or
    data set in messages.
    """
    converter = find_converter(raw)
    if converter is None:
        missing = reading.missing(list(map(str, written)), location)
        raise ConfigError(*missing, f'{location}: {unknown_columns(raw, name, of_function=of_function)}')
    return converter


def _is_other_format(first: Converter, own: Converter, raw: Mapping[str, Any]) -> bool:
    """Return whether a row is complete in another format than the first row, so that its own converter reads it.

    `first` is the converter of the first row, `own` the one that fits the columns of this row. Conversations and plain
    text are not read from one file: a cleaned copy could not hold both.
    """
    needed = needed_columns(first)
    is_text = 'text' in needed or 'text' in needed_columns(own)
    return needed.isdisjoint(raw) and not is_text


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

    `uses` has one byte for each row that can be trained on: TRAIN, VAL or UNUSED. It is empty until `count` is called.
    """

    name: str
    # Reads the rows from the start, and updates the given hash object with the content that it reads.
    read: Callable[[Any], Iterator[ReadRow]]
    is_val: bool = False
    # The hub, id and revision of the download, and its commit if the hub names it. Empty if the data is not from a hub.
    served: str = ''
    commit: str = ''
    # The files of the download, as <hub>:<id>@<revision>/<file>. Empty for other parts.
    hub_files: Sequence[str] = ()
    uses: bytearray = field(default_factory=bytearray)
    # The files of the part on this machine, each with its signature when the part was opened. A registered data set has
    # none.
    files: Sequence[tuple[Path, Signature]] = ()
    # Whether a row that can be trained on has images. Set by `count`.
    has_images: bool = False
    # The positions of the rows that cannot be trained on, among all rows that were read.
    unusable: array[int] = field(default_factory=lambda: array('Q'))
    # Remarks on how the files are read, as keys. They are added while the files are read.
    remarks: dict[str, None] = field(default_factory=dict)
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

    # The number of rows of plain text.
    text_rows: int = 0
    # The names of the columns in the files: those of first rows, and those that --columns renames. Empty for a
    # registered data set, whose columns are not renamed.
    columns: dict[str, None] = field(default_factory=dict)

    def source(self) -> dict[str, str]:
        """Return {'served': repository on the hub, 'commit': its commit} for lock.json. Unknown values are left out."""
        found = {'served': self.served, 'commit': self.commit}
        return {name: value for name, value in found.items() if value}

    def count(self, left_out: Tally, noted: Tally, digest: Any) -> None:
        """Read all rows once, and set the use of each row that can be trained on.

        The use is VAL in a validation part, and TRAIN in any other part. Counts skipped rows in `left_out` and notes in
        `noted`. Updates the hash object `digest` with the content of the rows.
        """
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
            images = state_of_images(row)
            self.has_images |= bool(images)
            self.text_rows += row.is_text
            content.update(images)

        self.content = content.hexdigest()
        digest.update(content.digest())

    def times(self, position: int) -> int:
        """Return how many times one epoch trains a row.

        `position` is the index of the row in `self.uses`. The value at this index must be TRAIN.
        """
        return self.passes + (self.once_more[position] if self.once_more else 0)

    def trained_rows(self) -> int:
        """Return the number of rows that an epoch trains. A row that is trained twice counts twice.

        Rows that are skipped later, when they are encoded, count too.
        """
        return self.passes * self.uses.count(TRAIN) + self.once_more.count(1)

    def uses_digest(self) -> bytes:
        """Return bytes, for a hash, that say how each row is used and how many times an epoch trains it."""
        repeats = b'' if self.passes == 1 and not any(self.once_more) else f'x{self.passes}'.encode() + self.once_more
        return bytes(self.uses) + repeats

    def used(self) -> Iterator[tuple[int, ReadRow]]:
        """Read the rows again, and yield (use, row) for each row. The use is TRAIN, VAL or UNUSED.

        A row is the tuple (location, columns, conversation). If it cannot be trained on, its use is UNUSED, and its
        third item is a BadRow. Raises ConfigError if the number of all other rows has changed since `count` read them.
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
                f"data set '{self.name}': the second read returned different rows. Make its function in "
                f'{_DATASET_PY} deterministic: the same rows in the same order.'
            )


def draw_uses(parts: Sequence[Part], old: int, count: int, seed: int, *, drawn: int, rest: int) -> None:
    """Draw up to `count` rows at random, and change their use. The use of a row is TRAIN, VAL or UNUSED.

    Rows are drawn from all rows with the use `old`. A drawn row gets the use `drawn`. A row with the use `old` that is
    not drawn gets the use `rest`. For example, old=TRAIN, drawn=VAL, rest=TRAIN turns up to `count` training rows into
    validation rows.
    """
    total = sum(part.uses.count(old) for part in parts)
    chosen = bytearray(total)
    for index in random.Random(seed).sample(range(total), min(count, total)):
        chosen[index] = 1

    index = 0
    for part in parts:
        position = part.uses.find(old)
        while position >= 0:
            part.uses[position] = drawn if chosen[index] else rest
            index += 1
            position = part.uses.find(old, position + 1)


def open_parts(
    source: Source, bad: OnBad = refuse, hub: HubName = 'modelscope', reading: Reading = AS_WRITTEN
) -> list[Part]:
    """Open a data set, and return [training part, validation part], or [part] if it has no validation split.

    `reading` has the flags that say how files are read, such as --columns. When a part is read, `bad` is called for
    each row of a file that cannot be read. Registered data sets ignore `bad` and `reading`, because DATASET_MAPPING
    says how their rows are read. Raises ConfigError if the data set cannot be opened.
    """
    if source.hub is not None:
        return _hub_parts(source, source.hub, bad, hub, reading)
    if source.path is None:
        entry = DATASET_MAPPING[source.name]
        if isinstance(entry, HubDataset):
            return _registered_parts(source.name, entry, hub)
        return _function_parts(source.name)

    if shadowed_id(source):
        logger.info(
            f'{source.name}: the local path {source.path.absolute()} is read. To read a data set of a hub with this '
            f'id, give hf:{source.name} or ms:{source.name}'
        )
    files = [(file, signature(file)) for file in find_files(source)]
    columns: dict[str, None] = {}
    remarks: dict[str, None] = {}
    read = _reader(files, [str(file) for file, _ in files], bad, reading, columns, remarks)
    return [Part(name=source.name, read=read, files=files, columns=columns, remarks=remarks)]


def _reader(
    files: Sequence[tuple[Path, Signature]],
    names: Sequence[str],
    bad: OnBad,
    reading: Reading,
    columns: dict[str, None],
    remarks: dict[str, None],
) -> Callable[[Any], Iterator[ReadRow]]:
    """Return a function that reads the files from the start. Its argument is a hash object.

    The function updates the hash with the content of the files and with `names`, which has one name for each file. It
    also adds keys to `columns` and `remarks`, which are the fields of a Part with these names.
    """

    def remark(text: str) -> None:
        remarks[text] = None

    def read(digest: Any) -> Iterator[ReadRow]:
        for (file, known), name in zip(files, names, strict=True):
            digest.update(f'{name}\n'.encode())
            try:
                rows = read_rows(file, bad=bad, known=known, digest=digest, text_rows=reading.text_rows, remark=remark)
                folder = str(file.absolute().parent)
                yield from _converted(rows, str(file), folder=folder, reading=reading, seen=columns, remark=remark)
            except UnreadableRow as error:
                rest = '' if bad is refuse else ' The rest of the file is not read.'
                bad(error.location, error.problem + rest)

    return read


def _hub_parts(source: Source, files: HubFiles, bad: OnBad, hub: HubName, reading: Reading) -> list[Part]:
    """Return [training part, validation part] of a data set of a hub. Its files are downloaded once per machine.

    If there is no validation split, the list has only the training part.
    """
    fetched = files.load(hub, remedy=not_found_remedy(source))
    at_commit = f' at commit {fetched.commit[:12]}' if fetched.commit else ''
    logger.info(f'{source.name} is read from {fetched.served}{at_commit}. Its rows: {fetched.chosen.about}')
    parts: list[Part] = []
    for names, is_val in ((fetched.chosen.train, False), (fetched.chosen.val, True)):
        if not names:
            continue
        # The hash covers the names in the repository, because the folder of the cache differs between machines.
        stored = [(path, signature(path)) for path in (fetched.folder / name for name in names)]
        columns: dict[str, None] = {}
        remarks: dict[str, None] = {}
        part = Part(
            name=_shown(source.name, is_val),
            read=_reader(stored, names, bad, reading, columns, remarks),
            files=stored,
            columns=columns,
            remarks=remarks,
            is_val=is_val,
            served=fetched.served,
            commit=fetched.commit,
            hub_files=[f'{fetched.served}/{name}' for name in names],
        )
        parts.append(part)
    return parts


def check_read_once(parts: Iterable[Part]) -> None:
    """Raise ConfigError if two parts read the same file of a hub. Parts of registered data sets are not compared."""
    # `check_sources` compares local files.
    readers: dict[str, str] = {}
    for part in parts:
        for file in part.hub_files:
            if file in readers:
                flag = 'val_dataset' if part.val_set else 'dataset'
                raise ConfigError(
                    f"--{flag}: '{readers[file]}' and '{part.name}' both read {file}, so its rows would be used "
                    'twice. Remove one of the two, or name other subsets or splits.'
                )
            readers[file] = part.name


def _shown(name: str, is_val: bool) -> str:
    return name + VALIDATION if is_val else name


def check_columns(parts: Iterable[Part], reading: Reading) -> None:
    """Raise ConfigError if --columns names a column that no row of a file has, among the rows read so far.

    Does nothing if all data sets are registered, if no row of a file was read, or if `reading.complete` is False.
    """
    from_files = [part for part in parts if part.files]
    if not from_files:
        return
    seen = dict.fromkeys(itertools.chain.from_iterable(part.columns for part in from_files))
    if not seen:
        return  # no row could be read, and each problem is reported
    if missing := reading.missing(seen, ', '.join(part.name for part in from_files)):
        raise ConfigError(*missing)


def read_rows_at(
    files: Sequence[tuple[Path, Signature]], positions: Collection[int], reading: Reading = AS_WRITTEN
) -> list[Row | BadRow]:
    """Return the rows at these positions, in the order of the files. Rows of all files are counted together, from 0.

    A row that cannot be trained on is returned as a BadRow. Only the returned rows and the first row of each file are
    converted and checked. Raises ConfigError if a file has changed since its signature was taken.
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


def _registered_parts(name: str, entry: HubDataset, hub: HubName) -> list[Part]:
    """Return [training part, validation part] of a registered data set. Its files are downloaded from a hub.

    If there is no validation split, the list has only the training part.
    """
    train, val, snapshot = entry.load(hub)
    logger.info(f'{name}: {snapshot.repo}')

    def part(rows: RowStream, is_val: bool) -> Part:
        shown = _shown(name, is_val)
        remarks: dict[str, None] = {}

        def read(digest: Any) -> Iterator[ReadRow]:
            located = _hashed(rows.with_locations(), digest)
            yield from _converted(located, shown, remark=remarks.setdefault, of_function=True)

        return Part(
            name=shown,
            read=read,
            is_val=is_val,
            served=str(snapshot.repo),
            commit=snapshot.commit,
            remarks=remarks,
        )

    return [part(rows, is_val) for rows, is_val in ((train, False), (val, True)) if rows is not None]


def _function_parts(name: str) -> list[Part]:
    """Return [training part, validation part] of a data set whose rows a function in DATASET_MAPPING returns.

    If the function returns no validation rows, the list has only the training part.
    """

    def part(half: int, rows: Any) -> Part:
        shown = _shown(name, half == 1)
        remarks: dict[str, None] = {}

        def read(digest: Any) -> Iterator[ReadRow]:
            located = located_rows(name, half, rows, shown)
            yield from _converted(_hashed(located, digest), shown, remark=remarks.setdefault, of_function=True)

        return Part(name=shown, read=read, is_val=half == 1, remarks=remarks)

    return [part(half, rows) for half, rows in enumerate(halves_of(name, logs=True)) if rows is not None]


def remarks_of(sources: Iterable[Sequence[Part]]) -> list[str]:
    """Return all remarks on how the files were read so far, e.g. that a column is read by another name.

    `sources` has one list for each data set: the parts of the data set.
    """
    return [remark for part in itertools.chain.from_iterable(sources) for remark in part.remarks]


def open_replies(row: Row) -> int:
    """Return the number of replies before the last message that have no key `loss`.

    The key says whether a reply carries loss.
    """
    return sum(message['role'] == 'assistant' and 'loss' not in message for message in row.messages[:-1])


def row_notes(row: Row) -> list[str]:
    """Return the notes of a row, and one more note for each of its unused columns and keys."""
    return [*row.notes, *map(unused_note, row.unused)]


def unused_note(name: str) -> str:
    """Return the note about a column or key that is not used, for example 'column `id`'."""
    return f'{name} is not used'

"""Rows of data sets: found, converted, drawn and split in a first pass, read again as they are needed.

A first pass counts the rows and marks each with its use, one byte per row; what it draws is drawn from the whole set.
Rows themselves are never held, so data may be larger than memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.data.sources import Source, find_files, parse_source
from utils.dataset import DATASET_MAPPING, RawRows
from utils.encode.image_slots import state_of_images
from utils.formats.columns import KNOWN_SHAPES, BadRow, Converter, check_row, find_converter, needed_columns
from utils.formats.converters import HubDataset, RowStream
from utils.formats.data_file import Doubled, OnBad, UnreadableRow, read_rows, refuse, signature
from utils.hub.clients import HubName
from utils.preprocess import LossScope, Row

# The use of a row.
UNUSED, TRAIN, VAL = range(3)
_NAMED_PER_REASON = 3
# Columns of other tools that mean what query and response mean.
_SAME_BY_ANOTHER_NAME = (
    ('prompt', 'completion'),
    ('prompt', 'response'),
    ('question', 'answer'),
    ('question', 'response'),
)

# A row read: its place, its columns, and the conversation in it or what is wrong with it.
ReadRow = tuple[str, dict[str, Any], Row | BadRow]


@dataclass(kw_only=True)
class Tally:
    """Rows counted by reason, and the places of the first of each."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= _NAMED_PER_REASON:
            self.places.setdefault(reason, []).append(place)

    def merge(self, other: Tally) -> None:
        """Add what another tally counted."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.places[reason] = [*self.places.get(reason, ()), *other.places[reason]][:_NAMED_PER_REASON]

    def __len__(self) -> int:
        return sum(self.counts.values())

    def lines(self, verb: str) -> list[str]:
        """Return one line per reason: how many rows, and where the first stand."""
        return [
            f'{count} rows {verb}: {reason} ({", ".join(self.places[reason])}'
            f'{", ..." if count > _NAMED_PER_REASON else ""})'
            for reason, count in self.counts.items()
        ]


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
    # Hash of what was read when the rows were counted.
    content: str = ''
    # Replies before the last one that do not say themselves that they carry loss, and the rows that have any.
    earlier_replies: int = 0
    rows_with_earlier: int = 0

    def count(self, left_out: Tally, noted: Tally, digest: Any) -> None:
        """Read the part once and mark every row that can be trained on."""
        use, own = VAL if self.is_val else TRAIN, hashlib.sha256()
        for place, _, row in self.read(own):
            if isinstance(row, BadRow):
                left_out.add(str(row), place)
                continue
            self.uses.append(use)
            for note in row_notes(row):
                noted.add(note, place)
            earlier = sum(m['role'] == 'assistant' and not m.get('loss') for m in row.messages[:-1])
            self.earlier_replies += earlier
            self.rows_with_earlier += bool(earlier)
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

    return [Part(name=source.name, read=read)]


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


def _draw(parts: Sequence[Part], use: int, count: int, seed: int, *, drawn: int, rest: int) -> None:
    """Draw `count` of the rows with this use, all where there are not more, and change the uses of those and others."""
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


def served_by(parts: Iterable[Part]) -> dict[str, str]:
    """Return what served each data set of a hub."""
    return {part.name: part.served for part in parts if part.served and not part.is_val}


def row_notes(row: Row) -> list[str]:
    """Return what is worth counting about a row that is used: its remarks, and what of it is not used."""
    return [*row.notes, *(f'{name} is not used' for name in row.unused)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rows a run uses; `digest` is a hash of all that was read and of the uses.

    `noted` counts remarks on all rows that can be trained on, `drawn` says which of them were drawn out and why.
    """

    parts: list[Part]
    left_out: Tally
    noted: Tally
    drawn: list[str]
    digest: str

    def decisions(self, loss_scope: LossScope) -> list[str]:
        """Return what of the rows is not learnt by decision: rows drawn out, and replies without loss."""
        replies = sum(part.earlier_replies for part in self.parts)
        rows = sum(part.rows_with_earlier for part in self.parts)
        if loss_scope != 'last_round' or not replies:
            return self.drawn
        return [
            *self.drawn,
            f'loss is on the last reply of a row because --loss_scope is last_round: {replies} earlier replies carry '
            f'no loss in {rows} of {sum(len(part.uses) for part in self.parts)} rows read',
        ]

    def used(self) -> Iterator[tuple[int, ReadRow]]:
        """Yield everything that was read, each with its use."""
        for part in self.parts:
            yield from part.used()

    def rows(self, *wanted: int) -> Iterator[tuple[int, Row]]:
        """Yield the rows of these uses in their order, each with its use."""
        for use, (_, _, row) in self.used():
            if use in wanted and isinstance(row, Row):
                yield use, row

    def lock(self) -> dict[str, dict[str, Any]]:
        """Return of each part how many rows are used, and a hash of what was read and of its uses."""
        return {
            part.name: {
                'rows': len(part.uses) - part.uses.count(UNUSED),
                'sha256': hashlib.sha256(part.content.encode() + part.uses).hexdigest(),
            }
            for part in self.parts
        }


def some_rows(rows: Plan | Streams, use: int, count: int) -> list[Row]:
    """Return up to `count` rows of a use, the first ones of each part in equal shares; of a stream its first ones."""
    if not isinstance(rows, Plan):
        return first_rows(rows, -(-count // len(rows)))[:count]
    parts = [part for part in rows.parts if use in part.uses]
    share = -(-count // max(len(parts), 1))
    found = ((row for u, (_, _, row) in part.used() if u == use and isinstance(row, Row)) for part in parts)
    return [row for part in found for row in itertools.islice(part, share)][:count]


def _drawn_out(sample: int, there: int, what: str, why: str) -> list[str]:
    """Return the decision that some rows are not used, [] where all are."""
    if sample >= there:
        return []
    return [f'rows = {sample} of {there} {what} because {why}: {there - sample} rows are not used']


def plan_rows(
    words: Sequence[str],
    *,
    seed: int = 42,
    test_ratio: float = 0.01,
    train_sample: int = -1,
    hub: HubName = 'modelscope',
    bad: OnBad = refuse,
) -> Plan:
    """Return which rows of all data sets are used: each sampled (#n) and split by itself, then drawn from together.

    The validation part is capped to max(1, train_sample * test_ratio). Raises ConfigError for what cannot be read and
    where no row is left.
    """
    parts: list[Part] = []
    left_out, noted, digest = Tally(), Tally(), hashlib.sha256()
    drawn: list[str] = []
    for word in words:
        source = parse_source(word)
        opened = open_parts(source, bad, hub)
        for part in opened:
            part.count(left_out, noted, digest)
        count = len(opened[0].uses)
        if source.sample is not None:
            if source.sample > count:
                logger.warning(f"--dataset '{word}' asks for {source.sample} rows of {count}: all of them are used")
            drawn += _drawn_out(source.sample, count, f"of --dataset '{word}'", f'--dataset {word} asks for them')
            _draw(opened[:1], TRAIN, source.sample, seed, drawn=TRAIN, rest=UNUSED)
            count = min(count, source.sample)
        if len(opened) == 1 and test_ratio > 0:
            chosen = min(max(1, round(count * test_ratio)), count - 1)
            _draw(opened, TRAIN, max(chosen, 0), seed, drawn=VAL, rest=TRAIN)
        parts += opened
    if bad is refuse and not any(TRAIN in part.uses for part in parts):
        raise ConfigError(
            f'no training row is left of {", ".join(words)}: '
            f'{len(left_out)} rows left out ({"; ".join(sorted(left_out.counts))}).'
        )
    if train_sample >= 0:
        why = f'--train_dataset_sample is {train_sample}'
        for use, sample, what in (
            (TRAIN, train_sample, 'for training'),
            (VAL, max(1, int(train_sample * test_ratio)), 'for validation'),
        ):
            drawn += _drawn_out(sample, sum(part.uses.count(use) for part in parts), what, why)
            _draw(parts, use, sample, seed, drawn=use, rest=UNUSED)
    for part in parts:
        digest.update(part.uses)
    return Plan(parts=parts, left_out=left_out, noted=noted, drawn=drawn, digest=digest.hexdigest())


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return `count` rows drawn from all of them, in their order; all where there are not more."""
    if count < 0 or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]

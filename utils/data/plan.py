"""Decides which rows a run trains on, and which rows it validates on."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import HubName, LossScope
from utils.data.parts import (
    TRAIN,
    UNUSED,
    VAL,
    Part,
    ReadRow,
    Streams,
    first_rows,
    open_parts,
    open_replies,
    remarks_of,
)
from utils.data.sources import parse_source
from utils.data.tally import Tally
from utils.formats.conversation import Row
from utils.formats.file_bytes import OnBad, refuse

# The number of rows of each stream that are read before training to see which replies carry loss.
_FIRST_ROWS = 64


def _draw(parts: Sequence[Part], use: int, count: int, seed: int, *, drawn: int, rest: int) -> None:
    """Draw up to `count` random rows among the rows whose use is `use`.

    The use of these rows is set: to `drawn` for the drawn rows, to `rest` for the others.
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


def served_by(parts: Iterable[Part]) -> dict[str, str]:
    """Return {name of the data set: hub, id and revision} for the data sets that were downloaded from a hub."""
    return {part.name: part.served for part in parts if part.served and not part.is_val}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Says which rows a run uses.

    `left_out` counts the rows that cannot be trained on. `noted` counts the notes on all other rows. `drawn` has a line
    of text for each decision to use only some of the available rows. `digest` is a hash of all rows and their uses.
    """

    parts: list[Part]
    left_out: Tally
    noted: Tally
    drawn: list[str]
    digest: str

    def decisions(self, loss_scope: LossScope | None) -> list[str]:
        """Return one line of text for each decision that excludes rows, or that says which replies carry loss."""
        replies: Counter[LossScope] = Counter()
        rows: Counter[LossScope] = Counter()
        for part in self.parts:
            replies += part.earlier_replies
            rows += part.rows_with_earlier
        total = sum(len(part.uses) for part in self.parts)
        return [
            *remarks_of([self.parts]),
            *self.drawn,
            *_loss_decisions(loss_scope, replies, rows, f'of {total} rows read'),
        ]

    def used(self) -> Iterator[tuple[int, ReadRow]]:
        """Yield (use, ReadRow) for every row of all parts."""
        for part in self.parts:
            yield from part.used()

    def rows(self, *wanted: int) -> Iterator[tuple[int, Row]]:
        """Yield (use, row) for each row whose use is in `wanted`, in the order of the data."""
        for use, (_, _, row) in self.used():
            if use in wanted and isinstance(row, Row):
                yield use, row

    def lock(self) -> dict[str, dict[str, Any]]:
        """Return {part: {'rows': number of used rows, 'sha256': hash of the content and the uses}} for lock.json."""
        return {
            part.name: {
                'rows': len(part.uses) - part.uses.count(UNUSED),
                'sha256': hashlib.sha256(part.content.encode() + part.uses).hexdigest(),
            }
            for part in self.parts
        }


def _loss_decisions(
    typed: LossScope | None, replies: Mapping[LossScope, int], rows: Mapping[LossScope, int], total: str
) -> list[str]:
    """Return the decisions about which replies carry loss. Rows with only one reply need no decision.

    `typed` is --loss_scope. `replies` has the numbers of earlier replies, and `rows` the numbers of rows with earlier
    replies, by the scope that holds if --loss_scope is not typed.
    """
    if typed == 'all_rounds':
        return []
    if typed == 'last_round':
        earlier = sum(replies.values())
        without = f'{earlier} earlier replies carry no loss in {sum(rows.values())} {total}'
        return [f'loss is on the last reply of a row because --loss_scope is last_round: {without}'] if earlier else []

    found = []
    if replies.get('all_rounds'):
        found.append(
            'loss is on every reply of rows with messages or conversations because --loss_scope is not typed: '
            f'{replies["all_rounds"]} earlier replies carry loss too in {rows["all_rounds"]} {total}'
        )
    if replies.get('last_round'):
        found.append(
            'loss is on the last reply of rows with a history because --loss_scope is not typed: '
            f'{replies["last_round"]} earlier replies carry no loss in {rows["last_round"]} {total}'
        )
    return found


def stream_decisions(typed: LossScope | None, sources: Streams) -> list[str]:
    """Return the decisions about which replies carry loss, from the first rows of each training stream."""
    replies: Counter[LossScope] = Counter()
    rows: Counter[LossScope] = Counter()
    read = 0
    for parts in sources:
        usable = (row for _, _, row in parts[0].read(hashlib.sha256()) if isinstance(row, Row))
        for row in itertools.islice(usable, _FIRST_ROWS):
            read += 1
            if earlier := open_replies(row):
                replies[row.loss_scope] += earlier
                rows[row.loss_scope] += 1
    return _loss_decisions(typed, replies, rows, f'of the first {read} rows')


def some_rows(rows: Plan | Streams, use: int, count: int) -> list[Row]:
    """Return up to `count` rows whose use is `use`: the first rows of each part, in equal shares.

    For streams, `use` is ignored.
    """
    if not isinstance(rows, Plan):
        return first_rows(rows, -(-count // len(rows)))[:count]

    parts = [part for part in rows.parts if use in part.uses]
    share = -(-count // max(len(parts), 1))
    found: list[Row] = []
    for part in parts:
        of_this_use = (row for u, (_, _, row) in part.used() if u == use and isinstance(row, Row))
        found += itertools.islice(of_this_use, share)
    return found[:count]


def _not_used(sample: int, available: int, what: str, why: str) -> list[str]:
    """Return a list with one line of text, which says that some rows are not used. Returns [] if all rows are used."""
    if sample >= available:
        return []
    return [f'rows = {sample} of {available} {what} because {why}: {available - sample} rows are not used']


def plan_rows(
    words: Sequence[str],
    *,
    seed: int = 42,
    test_ratio: float = 0.01,
    train_sample: int = -1,
    hub: HubName = 'modelscope',
    bad: OnBad = refuse,
) -> Plan:
    """Read all data sets once, and return the plan that says which rows are used.

    First, rows are drawn from each data set (name#count), and the data set is split into training and validation rows.
    Then up to `train_sample` training rows and up to max(1, train_sample * test_ratio) validation rows are drawn from
    all data sets together. Raises ConfigError if data cannot be read or no training row is left.
    """
    parts: list[Part] = []
    left_out = Tally()
    noted = Tally()
    digest = hashlib.sha256()
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
            drawn += _not_used(source.sample, count, f"of --dataset '{word}'", f'--dataset {word} asks for them')
            _draw(opened[:1], TRAIN, source.sample, seed, drawn=TRAIN, rest=UNUSED)
            count = min(count, source.sample)

        if len(opened) == 1 and test_ratio > 0:
            validation = min(max(1, round(count * test_ratio)), count - 1)
            _draw(opened, TRAIN, max(validation, 0), seed, drawn=VAL, rest=TRAIN)
        parts += opened

    if bad is refuse and not any(TRAIN in part.uses for part in parts):
        raise ConfigError(
            f'--dataset {" ".join(words)}: no training row is left, {len(left_out)} rows were skipped '
            f'({"; ".join(sorted(left_out.counts))}). Correct the rows, or name other data.'
        )

    if train_sample >= 0:
        why = f'--train_dataset_sample is {train_sample}'
        for use, sample, what in (
            (TRAIN, train_sample, 'for training'),
            (VAL, max(1, int(train_sample * test_ratio)), 'for validation'),
        ):
            drawn += _not_used(sample, sum(part.uses.count(use) for part in parts), what, why)
            _draw(parts, use, sample, seed, drawn=use, rest=UNUSED)

    for part in parts:
        digest.update(part.uses)
    return Plan(parts=parts, left_out=left_out, noted=noted, drawn=drawn, digest=digest.hexdigest())


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return up to `count` rows, drawn at random and kept in order. If `count` is negative, return all rows."""
    if count < 0 or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]

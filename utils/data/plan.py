"""Decides which rows a run trains on, and which rows it validates on."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import HubName, LossScope
from utils.data.parts import (
    AS_WRITTEN,
    TRAIN,
    UNUSED,
    VAL,
    Part,
    ReadRow,
    Streams,
    check_columns,
    first_rows,
    open_parts,
)
from utils.data.sources import parse_source
from utils.data.tally import Tally
from utils.formats.conversation import Row
from utils.formats.data_file import OnBad, refuse
from utils.formats.reading import Reading


def _draw(parts: Sequence[Part], use: int, count: int, seed: int, *, drawn: int, rest: int) -> None:
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


def served_by(parts: Iterable[Part]) -> dict[str, str]:
    """Return a dictionary with the hub, id and revision of each data set that came from a hub. The keys are names."""
    return {part.name: part.served for part in parts if part.served and not part.is_val}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Says which rows a run uses.

    `left_out` counts the rows that cannot be trained on. `noted` counts the remarks on all other rows. `drawn` has a
    line for each decision to use only some rows of a larger set. `digest` is a hash of all rows and their uses.
    """

    parts: list[Part]
    left_out: Tally
    noted: Tally
    drawn: list[str]
    digest: str

    def decisions(self, loss_scope: LossScope) -> list[str]:
        """Return the decisions that exclude rows, or say which tokens of rows carry loss."""
        decided = list(self.drawn)
        every = sum(len(part.uses) for part in self.parts)
        if texts := sum(part.text_rows for part in self.parts):
            decided.append(
                f'loss is on every token of {texts} of {every} rows read because they are plain text: no template is '
                'applied, and the end of sequence is added'
            )
        replies = sum(part.earlier_replies for part in self.parts)
        rows = sum(part.rows_with_earlier for part in self.parts)
        if loss_scope != 'last_round' or not replies:
            return decided
        return [
            *decided,
            f'loss is on the last reply of a row because --loss_scope is last_round: {replies} earlier replies carry '
            f'no loss in {rows} of {every} rows read',
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
        """Return, for lock.json, the number of used rows of each part and a hash of its content and uses."""
        return {
            part.name: {
                'rows': len(part.uses) - part.uses.count(UNUSED),
                'sha256': hashlib.sha256(part.content.encode() + part.uses).hexdigest(),
            }
            for part in self.parts
        }


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
    """Return a list with the decision that some available rows are not used. Returns [] if all rows are used."""
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
    reading: Reading = AS_WRITTEN,
) -> Plan:
    """Read all data sets once, and return the plan that says which rows are used.

    First, rows are drawn from each data set (name#count), and the data set is split into training and validation rows.
    Then up to `train_sample` training rows and up to max(1, train_sample * test_ratio) validation rows are drawn from
    all data sets together. Raises ConfigError if data cannot be read, if no row has a
    column that --columns names, or if no training row is left.
    """
    parts: list[Part] = []
    left_out = Tally()
    noted = Tally()
    digest = hashlib.sha256(repr(reading).encode())
    drawn: list[str] = []
    for word in words:
        source = parse_source(word)
        opened = open_parts(source, bad, hub, reading)
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
    check_columns(parts, reading)

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

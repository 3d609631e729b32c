"""Which rows a run trains on and which it holds out."""

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
from utils.data.parts import TRAIN, UNUSED, VAL, Part, ReadRow, Streams, first_rows, open_parts
from utils.data.sources import parse_source
from utils.data.tally import Tally
from utils.formats.conversation import Row
from utils.formats.data_file import OnBad, refuse


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

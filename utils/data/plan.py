"""Decides which rows a run trains on, and which rows it validates on."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import HubName, LossScope
from utils.data.mixture import Ingredient, mix
from utils.data.parts import (
    AS_WRITTEN,
    TRAIN,
    UNUSED,
    VAL,
    VALIDATION,
    Part,
    ReadRow,
    check_columns,
    check_read_once,
    draw_uses,
    open_parts,
    remarks_of,
)
from utils.data.sources import parse_source, val_set_names
from utils.data.tally import Tally
from utils.formats.conversation import Row
from utils.formats.file_bytes import OnBad, refuse
from utils.formats.reading import Reading


def served_by(parts: Iterable[Part]) -> dict[str, str]:
    """Return {name of the data set: hub, id and revision} for the data sets that were downloaded from a hub."""
    return {part.name.removesuffix(VALIDATION): part.served for part in parts if part.served}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Says which rows a run uses.

    `left_out` counts the rows that cannot be trained on. `noted` counts the notes on all other rows. `drawn` has one
    log line for each decision to use only some of the rows. `digest` is a hash of all rows, and of the use of each row
    (training, validation or none). `mixed` says whether the training rows are a mixture with shares.
    """

    parts: list[Part]
    left_out: Tally
    noted: Tally
    drawn: list[str]
    digest: str
    mixed: bool = False

    def decisions(self, loss_scope: LossScope | None) -> list[str]:
        """Return log lines: how files are read, which rows are not used, and which tokens carry loss."""
        replies: Counter[LossScope] = Counter()
        rows: Counter[LossScope] = Counter()
        for part in self.parts:
            replies += part.earlier_replies
            rows += part.rows_with_earlier

        decided = [*remarks_of([self.parts]), *self.drawn]
        total = sum(len(part.uses) for part in self.parts)
        if texts := sum(part.text_rows for part in self.parts):
            decided.append(
                f'loss is on every token of {texts} of {total} rows read because they are plain text: no template is '
                'applied, and the end of sequence is added'
            )
        return [*decided, *loss_decisions(loss_scope, replies, rows, f'of {total} rows read')]

    def used(self) -> Iterator[tuple[int, ReadRow]]:
        """Yield (use, ReadRow) for every row of all parts. The use is TRAIN, VAL or UNUSED."""
        for part in self.parts:
            yield from part.used()

    def rows(self, *wanted: int) -> Iterator[tuple[int, Row]]:
        """Yield (use, row) for each row whose use is in `wanted`, in the order of the data."""
        for use, (_, _, row) in self.used():
            if use in wanted and isinstance(row, Row):
                yield use, row

    def lock(self) -> dict[str, dict[str, Any]]:
        """Return the data entry of lock.json: {name of the part: {'rows': ..., 'sha256': ...}}.

        `rows` is the number of used rows. `sha256` is a hash of all rows, and of the use of each row (training,
        validation or none). The entry of a data set of a hub also has the keys `served` and `commit`. The entry of a
        validation set has the key `flag`.
        """
        return {
            part.name: {
                'rows': part.uses.count(VAL) + part.trained_rows(),
                'sha256': hashlib.sha256(part.content.encode() + part.uses_digest()).hexdigest(),
                **part.source(),
                **({'flag': 'val_dataset'} if part.val_set else {}),
            }
            for part in self.parts
        }

    def val_sets(self) -> dict[int, str]:
        """Return {index in `parts`: name in metrics} for the sets of --val_dataset."""
        return {number: part.val_set for number, part in enumerate(self.parts) if part.val_set}


def loss_decisions(
    typed: LossScope | None, earlier_replies: Mapping[LossScope, int], rows: Mapping[LossScope, int], total: str
) -> list[str]:
    """Return log lines that say which replies carry loss. Rows with only one reply need no line.

    `typed` is the value of --loss_scope: 'all_rounds' if every reply carries loss, 'last_round' if only the last reply
    of a row does. If `typed` is None, the format of each row decides its scope.

    An earlier reply is a reply before the last reply of its row. `earlier_replies` has the number of earlier replies,
    and `rows` the number of rows that have any. Each has two numbers: one for the rows whose format decides
    'all_rounds', and one for the rows whose format decides 'last_round'. `total` is the end of each line, for example
    'of 100 rows'.
    """
    if typed == 'all_rounds':
        return []
    if typed == 'last_round':
        earlier = sum(earlier_replies.values())
        without = f'{earlier} earlier replies carry no loss in {sum(rows.values())} {total}'
        return [f'loss is on the last reply of a row because --loss_scope is last_round: {without}'] if earlier else []

    found = []
    if earlier_replies.get('all_rounds'):
        found.append(
            'loss is on every reply of rows with messages or conversations because --loss_scope is not typed: '
            f'{earlier_replies["all_rounds"]} earlier replies carry loss too in {rows["all_rounds"]} {total}'
        )
    if earlier_replies.get('last_round'):
        found.append(
            'loss is on the last reply of rows with a history because --loss_scope is not typed: '
            f'{earlier_replies["last_round"]} earlier replies carry no loss in {rows["last_round"]} {total}'
        )
    return found


def _not_used(sample: int, available: int, what: str, why: str) -> list[str]:
    """Return [log line] if some rows are not used, else [].

    `what` names the rows in the line, e.g. 'for training'. `why` is the reason in the line.
    """
    if sample >= available:
        return []
    return [f'rows = {sample} of {available} {what} because {why}: {available - sample} rows are not used']


def part_not_used(part: Part) -> str:
    """Return the log line for a validation part that is not used."""
    return f'{part.name} is not used because --val_dataset names the validation rows'


@dataclass(kw_only=True)
class _Planner:
    """Reads data sets one after the other, and collects their parts for a plan."""

    seed: int
    hub: HubName
    bad: OnBad
    reading: Reading = AS_WRITTEN
    parts: list[Part] = field(default_factory=list)
    left_out: Tally = field(default_factory=Tally)
    noted: Tally = field(default_factory=Tally)
    drawn: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        self.digest.update(repr(self.reading).encode())

    def add_training(self, word: str, test_ratio: float | None) -> Ingredient:
        """Read a data set of --dataset, draw its rows (name#count), and hold rows out. Returns its training part.

        If `test_ratio` is None, nothing is held out, and a validation part of the data set is not used.
        """
        source = parse_source(word)
        opened = open_parts(source, self.bad, self.hub, self.reading)
        if test_ratio is None:
            self.drawn += [part_not_used(part) for part in opened[1:]]
            opened = opened[:1]
        check_read_once([*self.parts, *opened])
        for part in opened:
            part.count(self.left_out, self.noted, self.digest)

        self._draw(opened[0], source.sample, f"--dataset '{word}'", word)
        if len(opened) == 1 and test_ratio:
            count = opened[0].uses.count(TRAIN)
            validation = min(max(1, round(count * test_ratio)), count - 1)
            draw_uses(opened, TRAIN, max(validation, 0), self.seed, drawn=VAL, rest=TRAIN)
        self.parts += opened
        return Ingredient(word=word, part=opened[0], share=source.share)

    def add_validation(self, word: str, name: str, trained: Collection[str]) -> None:
        """Read a data set of --val_dataset: its validation part if it has one, else all its rows.

        Raises ConfigError if no row is left. Also raises ConfigError if a data set without a validation part is in
        `trained`.
        """
        source = parse_source(word)
        opened = open_parts(source, self.bad, self.hub, self.reading)
        part = opened[-1]
        if len(opened) == 1 and part.name in trained:
            raise ConfigError(
                f"--val_dataset '{word}': --dataset trains on the rows of this data set, which has no validation "
                'split. Remove the data set from --dataset or from --val_dataset.'
            )

        check_read_once([*self.parts, part])
        left_out = Tally()
        part.is_val = True
        part.val_set = name
        part.count(left_out, self.noted, self.digest)
        self.left_out.merge(left_out)
        if self.bad is refuse and not part.uses:
            raise ConfigError(f"--val_dataset '{word}': no row is left. {_skipped(left_out)}")
        self._draw(part, source.sample, f"--val_dataset '{word}'", word)
        self.parts.append(part)

    def _draw(self, part: Part, sample: int | None, given: str, word: str) -> None:
        """Draw `sample` rows from a part. All other rows become unused. Does nothing if `sample` is None.

        `word` is the word name#count. `given` is the flag and the word in quotes, for example "--dataset 'name#5'". Log
        lines contain both.
        """
        if sample is None:
            return
        use = VAL if part.is_val else TRAIN
        count = len(part.uses)
        if sample > count:
            logger.warning(f'{given} asks for {sample} rows, but there are only {count}. All of them are used.')
        flag = given.partition(' ')[0]
        self.drawn += _not_used(sample, count, f'of {given}', f'{flag} {word} asks for them')
        draw_uses([part], use, sample, self.seed, drawn=use, rest=UNUSED)

    def plan(self, *, mixed: bool = False) -> Plan:
        """Return the plan of the data sets that were added. `mixed` says whether --dataset gives shares."""
        for part in self.parts:
            self.digest.update(part.uses_digest())
        return Plan(
            parts=self.parts,
            left_out=self.left_out,
            noted=self.noted,
            drawn=self.drawn,
            digest=self.digest.hexdigest(),
            mixed=mixed,
        )


def _skipped(left_out: Tally) -> str:
    """Return the end of a message: how many rows were skipped and why, and a remedy."""
    reasons = '; '.join(sorted(left_out.counts))
    return f'{len(left_out)} rows were skipped ({reasons}). Correct the rows, or name other data.'


def plan_rows(
    words: Sequence[str],
    *,
    val_words: Sequence[str] = (),
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
    all data sets together. A negative `train_sample` draws all rows. If a word has a share (name%0.3), the function
    `mix` chooses the training rows of this second step.

    `val_words` are the words of --val_dataset. If there are any, nothing is split off, and the validation sets are used
    whole. `bad` is called for each line that cannot be read. Raises ConfigError if data cannot be read, if no row has a
    column that --columns names, or if the training set or a validation set is left without rows.
    """
    planner = _Planner(seed=seed, hub=hub, bad=bad, reading=reading)
    ingredients = [planner.add_training(word, None if val_words else test_ratio) for word in words]
    parts = [*planner.parts]
    if bad is refuse and not any(TRAIN in part.uses for part in parts):
        raise ConfigError(f'--dataset {" ".join(words)}: no training row is left. {_skipped(planner.left_out)}')

    why = f'--train_dataset_sample is {train_sample}'
    limits = [(VAL, max(1, int(train_sample * test_ratio)), 'for validation')]
    mixed = any(one.share is not None for one in ingredients)
    if mixed and (bad is refuse or all(TRAIN in one.part.uses for one in ingredients)):
        planner.drawn.append(mix(ingredients, limit=train_sample, seed=seed))
    elif not mixed:
        limits.insert(0, (TRAIN, train_sample, 'for training'))
    if train_sample >= 0:
        for use, sample, what in limits:
            planner.drawn += _not_used(sample, sum(part.uses.count(use) for part in parts), what, why)
            draw_uses(parts, use, sample, seed, drawn=use, rest=UNUSED)

    _add_validation_sets(planner, val_words, {one.part.name for one in ingredients})
    check_columns(planner.parts, reading)
    return planner.plan(mixed=mixed)


def plan_validation(
    val_words: Sequence[str],
    *,
    trained: Collection[str] = (),
    seed: int = 42,
    hub: HubName = 'modelscope',
    reading: Reading = AS_WRITTEN,
) -> Plan:
    """Read the data sets of --val_dataset once, and return the plan of their rows.

    If a set has a validation split, only this split is used. `trained` has the names of the data sets of --dataset.
    Raises ConfigError if a set of --val_dataset is also in `trained` and has no validation split. Also raises
    ConfigError if all rows of a set are skipped.
    """
    planner = _Planner(seed=seed, hub=hub, bad=refuse, reading=reading)
    _add_validation_sets(planner, val_words, trained)
    return planner.plan()


def _add_validation_sets(planner: _Planner, val_words: Sequence[str], trained: Collection[str]) -> None:
    for word, name in zip(val_words, val_set_names(val_words), strict=True):
        planner.add_validation(word, name, trained)


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return up to `count` rows, drawn at random and kept in order. If `count` is negative, return all rows."""
    if count < 0 or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]

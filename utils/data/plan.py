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
from utils.data.converted_rows import AS_WRITTEN, ReadRow
from utils.data.mixture import Ingredient, mix
from utils.data.open_parts import open_parts
from utils.data.parts import TRAIN, UNUSED, VAL, VALIDATION, Part, check_columns, check_read_once, draw_uses, remarks_of
from utils.data.sources import of_flag, parse_source, val_set_names
from utils.data.tally import Tally, counted
from utils.formats.conversation import Row
from utils.formats.file_bytes import OnBad, refuse
from utils.formats.reading import Reading


def served_by(parts: Iterable[Part]) -> dict[str, str]:
    """Return where each downloaded data set came from: a dict from its name to its hub, id and revision."""
    return {part.name.removesuffix(VALIDATION): part.served for part in parts if part.served}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Says which rows a run uses.

    `left_out` counts the rows that cannot be trained on. `noted` counts the notes on all other rows. `drawn` has log
    lines that say which rows are not used and which are repeated. `digest` is a hash of all rows, and of the use of
    each row (training, validation or none). `mixed` says whether --dataset gives a data set a share of the rows
    (name%0.3).
    """

    parts: list[Part]
    left_out: Tally
    noted: Tally
    drawn: list[str]
    digest: str
    mixed: bool = False

    def decisions(self, loss_scope: LossScope | None) -> list[str]:
        """Return log lines about how files are read, which rows are unused or repeated, and which tokens carry loss.

        `loss_scope` is the value of --loss_scope. It is None if the flag is not typed.
        """
        replies: Counter[LossScope] = Counter()
        rows: Counter[LossScope] = Counter()
        for part in self.parts:
            replies += part.earlier_replies
            rows += part.rows_with_earlier

        decided = [*remarks_of([self.parts]), *self.drawn]
        total = sum(len(part.uses) + len(part.unusable) for part in self.parts)
        if texts := sum(part.text_rows for part in self.parts):
            decided.append(
                f'loss is on every token of {texts} of {total} rows read because they are plain text: no template is '
                'applied, and the end of sequence is added'
            )
        return [*decided, *loss_decisions(loss_scope, replies, rows, f'of {total} rows read')]

    def used(self) -> Iterator[tuple[int, ReadRow]]:
        """Read the rows of all data sets, and yield (use, row) for each row. The use is TRAIN, VAL or UNUSED.

        A row is the tuple (location, columns, conversation).
        """
        for part in self.parts:
            yield from part.used()

    def rows(self, *wanted: int) -> Iterator[tuple[int, Row]]:
        """Yield (use, conversation) for each row whose use is in `wanted`, in the order of the data.

        A use is TRAIN, VAL or UNUSED.
        """
        for use, (_, _, row) in self.used():
            if use in wanted and isinstance(row, Row):
                yield use, row

    def lock(self) -> dict[str, dict[str, Any]]:
        """Return the entry `data` of lock.json, for example {'a.jsonl': {'rows': 100, 'sha256': 'e3b0...'}}.

        `rows` is the number of used rows. A row that an epoch trains twice counts twice. `sha256` is a hash of all
        rows, and of the use of each row (training, validation or none). A validation split has its own entry.

        A data set of a hub also has the key `served`: the hub, id and revision of the download. If the hub names the
        commit, the key `commit` has it. A data set of --val_dataset also has `'flag': 'val_dataset'`.
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
        """Return the names that metrics use for the data sets of --val_dataset, for example {2: 'math', 3: 'code'}.

        Each key is the index of a data set in `self.parts`.
        """
        return {number: part.val_set for number, part in enumerate(self.parts) if part.val_set}


def loss_decisions(
    typed: LossScope | None, earlier_replies: Mapping[LossScope, int], rows: Mapping[LossScope, int], total: str
) -> list[str]:
    """Return log lines that say whether the earlier replies of rows carry loss.

    An earlier reply is any reply of a row but the last. Earlier replies whose message has a key `loss` do not count,
    because the key decides whether they carry loss. If no earlier replies count, there are no lines.

    `typed` is the value of --loss_scope. With 'all_rounds', all earlier replies carry loss, and there are no lines.
    With 'last_round', none of them carries loss. If the flag is not typed, `typed` is None, and the format of each row
    decides its loss scope.

    `earlier_replies` is a dict from a loss scope to the number of earlier replies in the rows with this scope. `rows`
    is a dict from a loss scope to the number of rows that have earlier replies. `total` is the end of each line, for
    example 'of 100 rows'.
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
    """Return [log line] if `sample` rows are used and more are available. Returns [] if all are used.

    `what` names the rows in the line, e.g. 'for training'. `why` is the reason in the line.
    """
    if sample >= available:
        return []
    return [f'rows = {sample} of {available} {what} because {why}: {available - sample} rows are not used']


def part_not_used(part: Part) -> str:
    """Return the log line which says that `part` is not used because --val_dataset is given.

    `part` is the validation split of a data set of --dataset.
    """
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
        """Read a data set of --dataset, and choose its training rows and validation rows. Returns its training rows.

        `word` is the value of --dataset. If it has a number of rows (name#500), at most this number of rows is drawn at
        random, and the other rows are not used. The number does not apply to the rows of a validation split.

        If the data set has a validation split, all rows of this split are validation rows. Otherwise, the share
        `test_ratio` of the used rows is held out for validation. If the share is less than one row, one row is held
        out. If `test_ratio` is 0, or if there is only one row, no row is held out. If `test_ratio` is None, the data
        set gives no validation rows, and its validation split is not used.
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
        """Read a data set of --val_dataset: its validation split if it has one, else all its rows.

        `word` is the value of --val_dataset, `name` is the name of the data set in metrics. `trained` has the names of
        the data sets of --dataset. If the data set has no validation split and is in `trained`, raises ConfigError. If
        no row is left and `self.bad` is `refuse`, also raises ConfigError.
        """
        source = parse_source(word)
        try:
            opened = open_parts(source, self.bad, self.hub, self.reading)
        except ConfigError as error:
            raise ConfigError(*(of_flag(problem, 'val_dataset') for problem in error.problems)) from error
        part = opened[-1]
        if len(opened) == 1 and part.name in trained:
            raise ConfigError(
                f"--val_dataset '{word}': --dataset trains on the rows of this data set, which has no validation "
                'split. Remove the data set from --dataset or from --val_dataset.'
            )

        part.is_val = True
        part.val_set = name
        check_read_once([*self.parts, part])
        left_out = Tally()
        part.count(left_out, self.noted, self.digest)
        self.left_out.merge(left_out)
        if self.bad is refuse and not part.uses:
            raise ConfigError(f"--val_dataset '{word}': no row is left. {_skipped(left_out)}")
        self._draw(part, source.sample, f"--val_dataset '{word}'", word)
        self.parts.append(part)

    def _draw(self, part: Part, sample: int | None, given: str, word: str) -> None:
        """Draw up to `sample` random rows of a part. Its other rows become unused. If `sample` is None, do nothing.

        `word` and `given` are the names of the part in log lines. For --dataset name#5, `word` is "name#5", and `given`
        is "--dataset 'name#5'".
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
        """Return the plan of the data sets that were added.

        `mixed` says whether --dataset gives a data set a share of the training rows (name%0.3).
        """
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
    were = 'was' if len(left_out) == 1 else 'were'
    return f'{counted(len(left_out), "row")} {were} skipped ({reasons}). Correct the rows, or name other data.'


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
    """Read all data sets once, and return the plan: which rows are for training, for validation, or not used.

    `words` are the values of --dataset, and `val_words` are the values of --val_dataset. The rows are chosen in four
    steps:

    1. If a value has a number of rows (name#500), at most this number of rows is drawn from the data set.
    2. Rows are held out for validation. If a data set has a validation split, the rows of this split are held out.
    Otherwise, the share `test_ratio` of the rows is drawn. If there are `val_words`, no rows of --dataset are held out,
    and the rows of `val_words` are the validation rows.
    3. Training rows are chosen. If a value has a share of the training rows (name%0.3), the function `mix` chooses the
    training rows. Otherwise, at most `train_sample` training rows are drawn from all data sets together.
    4. At most max(1, train_sample * test_ratio) rows are drawn from the rows held out in step 2.

    A negative `train_sample` is no limit in steps 3 and 4.

    `bad` is called for each row of a file that cannot be read. Raises ConfigError if data cannot be read, or if no row
    has a column that --columns names. If `bad` is `refuse`, also raises ConfigError if the training set or a data set
    of `val_words` is left without rows.
    """
    planner = _Planner(seed=seed, hub=hub, bad=bad, reading=reading)
    ingredients = [planner.add_training(word, None if val_words else test_ratio) for word in words]
    parts = [*planner.parts]
    if bad is refuse and not any(TRAIN in part.uses for part in parts):
        raise ConfigError(f'--dataset {" ".join(words)}: no training row is left. {_skipped(planner.left_out)}')

    why = f'--train_dataset_sample is {train_sample}'
    limits = [(VAL, max(1, int(train_sample * test_ratio)), 'for validation')]
    mixed = any(one.share is not None for one in ingredients)
    # Without `refuse`, a data set may have no training row. Then no mixture is possible, and all rows stay as they are.
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

    `val_words` are the values of --val_dataset. If a data set has a validation split, only this split is used.
    `trained` has the names of the data sets of --dataset.

    Raises ConfigError if data cannot be read, or if all rows of a data set are skipped. If a data set has no validation
    split and is in `trained`, also raises ConfigError.
    """
    planner = _Planner(seed=seed, hub=hub, bad=refuse, reading=reading)
    _add_validation_sets(planner, val_words, trained)
    return planner.plan()


def _add_validation_sets(planner: _Planner, val_words: Sequence[str], trained: Collection[str]) -> None:
    for word, name in zip(val_words, val_set_names(val_words), strict=True):
        planner.add_validation(word, name, trained)


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return `count` rows, drawn at random and in their original order.

    If `count` is negative or too large, all rows are returned.
    """
    if count < 0 or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]

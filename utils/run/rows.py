"""Selects the rows given by the data flags, for training or for inference."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.errors import ConfigError, Problems
from utils.base.files import read_json, write_json
from utils.base.logger import logger
from utils.base.names import HubName
from utils.cli.arguments import CommonArguments, InferArguments, SftArguments, without_amount
from utils.cli.resolution import Decided, Ready, reading_of
from utils.data.held_out import held_out, read_held_out
from utils.data.parts import UNUSED, VAL, VALIDATION, remarks_of
from utils.data.plan import Plan, plan_rows, plan_validation
from utils.data.stream_parts import Streams, first_rows, open_streams, stream_decisions
from utils.formats.conversation import Row
from utils.formats.file_bytes import OnBad, refuse
from utils.formats.reading import Reading
from utils.run.folder import log_decisions
from utils.run.lock import DATA_FLAGS, check_same_data, recorded
from utils.run.record import Trained

HELD_OUT_JSON = 'held_out.json'
_INFER_REMEDY = 'type --dataset to answer all rows of a data set: which rows the run held out cannot be found out'


def rows_of(done: Ready[SftArguments]) -> Plan | Streams:
    """Return the rows of a training run, as Streams with --streaming true, else as a Plan.

    For a Plan, all data are read once. Logs the decisions (rows not drawn, replies that carry loss, validation splits
    not used), and adds them to `done`. For a Plan, also logs the notes on rows as warnings, and adds them to `done`.
    Raises ConfigError if --early_stop is set and there are no validation rows.
    """
    args = done.args
    rows = _opened(done)
    if args.early_stop and not _holds_out(rows, args):
        raise ConfigError(
            f'--early_stop {args.early_stop} needs validation rows, and none are held out. Raise --dataset_test_ratio '
            '(--stream_val_rows with --streaming true), or remove --early_stop.'
        )
    return rows


def _opened(done: Ready[SftArguments]) -> Plan | Streams:
    args = done.args
    if args.streaming:
        streams = open_streams(
            args.dataset,
            hub=args.hub,
            val_words=args.val_dataset or (),
            seed=args.dataset_seed,
            reading=reading_of(args),
        )
        _note(done, [*streams.decisions, *stream_decisions(args.loss_scope, streams)], [])
        return streams
    plan = plan_of(args, args.train_dataset_sample)
    _note(done, plan.decisions(args.loss_scope), plan.noted.lines('noted'))
    return plan


def _note(done: Ready[SftArguments], decisions: list[str], warnings: list[str]) -> None:
    """Log the decisions and warnings, and add them to `done`."""
    log_decisions(Decided(args=done.args, typed=done.typed, decisions=decisions, warnings=warnings))
    done.decisions += decisions
    done.warnings += warnings


def _holds_out(rows: Plan | Streams, args: SftArguments) -> bool:
    if isinstance(rows, Streams) and rows.val is None:
        return bool(first_rows(rows.sources, min(args.stream_val_rows, 1)))
    plan = rows.val if isinstance(rows, Streams) else rows
    return plan is not None and any(VAL in part.uses for part in plan.parts)


def plan_of(args: CommonArguments, train_sample: int, *, bad: OnBad = refuse) -> Plan:
    """Return the plan for these flags: which rows are read, and which are for training and for validation.

    `bad` is called for each line that cannot be read.
    """
    return plan_rows(
        args.dataset,
        val_words=args.val_dataset or (),
        seed=args.dataset_seed,
        test_ratio=args.dataset_test_ratio,
        train_sample=train_sample,
        hub=args.hub,
        bad=bad,
        reading=reading_of(args),
    )


def streams_lock(sources: Streams, count: int) -> dict[str, dict[str, Any]]:
    """Return the entry `data` of lock.json for a streamed run.

    For example, {'a.jsonl': {'rows': 100, 'sha256': 'e3b0...'}}. `rows` is the number of rows that were read, and
    `sha256` is a hash of these rows. If --dataset gives the data set a share (name%0.3), the hash covers the share too.

    From a data set of --dataset, the first max(1, `count`) usable rows are read. Without --val_dataset, they are read
    from the validation split if the data set has one. From a data set of --val_dataset, all rows are read.
    """
    found: dict[str, dict[str, Any]] = sources.val.lock() if sources.val else {}
    for parts, share in itertools.zip_longest(sources.sources, sources.shares):
        rows = first_rows([parts], max(count, 1))
        digest = hashlib.sha256(b'' if share is None else str(share).encode())
        for row in rows:
            digest.update(json.dumps([row.messages, row.tools, row.images], default=str).encode())
        found[parts[0].name] = {'rows': len(rows), 'sha256': digest.hexdigest(), **parts[0].source()}
    return found


def lock_of(rows: Plan | Streams, args: SftArguments) -> dict[str, dict[str, Any]]:
    """Return the entry `data` of lock.json: for each data set, the number of rows and a hash of the rows.

    With Streams, only the first rows of the data sets of --dataset are counted and hashed.
    """
    return rows.lock() if isinstance(rows, Plan) else streams_lock(rows, args.stream_val_rows)


def held_out_rows(rows: Plan | Streams, stream_val_rows: int) -> dict[str, Row]:
    """Return the validation rows of a training run, by their origin (file and line)."""
    plan = rows if isinstance(rows, Plan) else rows.val
    if isinstance(rows, Streams) and plan is None:
        return {row.origin: row for row in first_rows(rows.sources, stream_val_rows)}
    assert plan is not None, 'streams without a plan are above'
    return {row.origin: row for _, row in plan.rows(VAL)}


def keep_held_out(rows: Plan | Streams, run_dir: Path) -> None:
    """Write held_out.json, which says which rows are held out, so that llm_infer.py need not read all data.

    Nothing is written for streams without --val_dataset: they always hold out the first rows, or those of the
    validation split.
    """
    plan = rows if isinstance(rows, Plan) else rows.val
    if plan is not None and dist.is_main():
        write_json(run_dir / HELD_OUT_JSON, held_out(plan))


def rows_to_answer(done: Ready[InferArguments], trained: Trained | None) -> list[Row]:
    """Return the rows that llm_infer.py answers.

    The rows are chosen by the first condition of this list that is true:

    1. If --val_dataset is typed, or the training run had it and --dataset is not typed: the rows of --val_dataset.
    2. If --dataset is typed without --dataset_test_ratio: all rows of --dataset. If a data set has a validation split,
       only the rows of this split.
    3. If the model was trained by a run with the same data flags: the validation rows that the run held out.
    4. Otherwise: the validation rows that a training run with these flags would hold out.

    In cases 1 and 3, raises ConfigError if the flags are those of the training run, but the data have changed since. In
    changed data, other rows would be drawn for validation, and the model could have been trained on them.
    """
    args = done.args
    flags = trained.record.flags if trained is not None else {}
    if args.val_dataset:
        return _rows_of_sets(done, trained, args.val_dataset)
    if args.answers_whole_dataset(done.typed):
        if set(args.dataset) & set(flags.get('dataset', ())):
            done.warnings.append(
                '--dataset: the run was trained on one of these data sets, so trained rows may be answered. '
                'Leave --dataset out to answer only the rows that the run held out.'
            )
        reading = replace(reading_of(args), complete='columns' in done.typed)
        return _all_rows(args, reading)

    if flags.get('streaming'):
        streams = open_streams(args.dataset, hub=args.hub, reading=reading_of(args))
        _log(streams.decisions)
        count = int(flags['stream_val_rows'])
        _check_data(done, trained, streams_lock(streams, count))
        return first_rows(streams.sources, count)

    if trained is not None and _same_data_flags(done, trained):
        rows = _kept_rows(trained.checkpoint.absolute().parent, args.dataset, reading_of(args), args.hub)
        if rows is not None:
            return rows
    plan = plan_of(args, int(flags.get('train_dataset_sample', -1)))
    _check_data(done, trained, plan.lock())
    _log(remarks_of([plan.parts]))
    return [row for _, row in plan.rows(VAL)]


def _log(lines: Sequence[str]) -> None:
    for line in lines:
        logger.info(line)


def _rows_of_sets(done: Ready[InferArguments], trained: Trained | None, words: Sequence[str]) -> list[Row]:
    """Return the rows of the data sets of --val_dataset. The data sets of --dataset are not read.

    `words` are the values of --val_dataset. Raises ConfigError if the training run had the same --val_dataset and
    --dataset_seed, and the rows have changed since.
    """
    args = done.args
    flags = trained.record.flags if trained is not None else {}
    same = [flags.get('val_dataset'), flags.get('dataset_seed')] == [words, args.dataset_seed]
    if trained is not None and same:
        rows = _kept_rows(trained.checkpoint.absolute().parent, words, reading_of(args), args.hub)
        if rows is not None:
            return rows

    plan = plan_validation(words, seed=args.dataset_seed, hub=args.hub, reading=reading_of(args))
    trained_on = {without_amount(word) for word in flags.get('dataset', ())}
    done.warnings += [
        f'--val_dataset {part.name}: the run was trained on rows of it.'
        for part in plan.parts
        if part.name in trained_on
    ]
    if trained is not None and same:
        problems = Problems()
        now = plan.lock()
        done.warnings += check_same_data(trained.checkpoint, now, problems, remedy=_INFER_REMEDY, only=now)
        problems.raise_if_any()
    _log(remarks_of([plan.parts]))
    for line in plan.left_out.lines('left out'):
        logger.warning(line)
    return [row for _, row in plan.rows(VAL)]


def _kept_rows(run_dir: Path, words: Sequence[str], reading: Reading, hub: HubName) -> list[Row] | None:
    """Return the rows that held_out.json names.

    Returns None if the run has no held_out.json (older versions did not write it). Also returns None if `read_held_out`
    does, for example because a data file has changed.
    """
    file = run_dir / HELD_OUT_JSON
    if not file.is_file():
        return None
    keys = {'*': {'files_sha256': str | None, 'rows': list[int]}}
    kept = read_json(file, keys=keys, remedy='Remove the file: the rows are then found by reading all data.')
    return read_held_out(kept, words, reading, hub)


def _all_rows(args: InferArguments, reading: Reading) -> list[Row]:
    """Return the rows of --dataset. A data set with a validation split gives only the rows of this split."""
    plan = plan_rows(args.dataset, seed=args.dataset_seed, test_ratio=0.0, hub=args.hub, reading=reading)
    _log(remarks_of([plan.parts]))
    names = {part.name for part in plan.parts}
    chosen = [part for part in plan.parts if part.name + VALIDATION not in names]
    for part in chosen:
        what = 'its validation split' if part.is_val else 'the whole data set'
        logger.info(
            f'{part.name}: the rows to answer are from {what} ({len(part.uses) - part.uses.count(UNUSED)} rows)'
        )
    for line in plan.left_out.lines('left out'):
        logger.warning(line)

    used = (read for part in chosen for use, read in part.used() if use != UNUSED)
    return [row for _, _, row in used if isinstance(row, Row)]


def _check_data(done: Ready[InferArguments], trained: Trained | None, now: dict[str, dict[str, Any]]) -> None:
    if trained is None or not _same_data_flags(done, trained):
        return  # each data flag that differs already has a warning
    problems = Problems()
    done.warnings += check_same_data(trained.checkpoint, now, problems, remedy=_INFER_REMEDY)
    problems.raise_if_any()


def _same_data_flags(done: Ready[InferArguments], trained: Trained) -> bool:
    shared = [name for name in DATA_FLAGS if hasattr(done.args, name)]
    return all(getattr(done.args, name) == recorded(trained.record.flags, name) for name in shared)

"""The work of a run: the numbers of rows, tokens and steps, and the batch that needs the most memory.

The rows are encoded to count their tokens. If this is not possible, an upper bound is computed (see `plan_work`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Ready
from utils.cli.schedule import step_counts
from utils.data.encode_plan import encode_plan
from utils.data.encoded_rows import IndexedRows
from utils.data.packing import PackedRows
from utils.data.parts import VAL
from utils.data.plan import Plan
from utils.encode.encoded import IGNORE_INDEX, row_labels
from utils.estimate.gpus import longest_batch
from utils.estimate.memory import Batch, Mode
from utils.loading.new_tokens import add_to_tokenizer
from utils.model import load_tokenizer
from utils.run.new_tokens import find_new_tokens
from utils.run.open_model import open_encoder
from utils.run.rows import plan_of


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a run. `lines` describe it for the user.

    `counted` says whether the rows were encoded to count their tokens. `tokens` is the number of tokens in all steps:

    - If `counted` is True, it is exact for whole epochs. For --max_steps or a fraction of an epoch, it is estimated
      from the mean length of the rows.
    - If `counted` is False, it is an upper bound, or None if no bound is known.

    `batch` has the sizes of the batch that needs the most memory:

    - If `counted` is True, each size is the larger one of two batches: the batch with the longest rows, and the batch
      with the most trained tokens. With --packing, there is only the batch with the longest packs.
    - If `counted` is False, every row has --max_length tokens, and all tokens are trained. If --max_length is -1, a
      length is assumed.
    """

    lines: list[str]
    batch: Batch
    tokens: int | None = None
    counted: bool = False


def plan_work(
    done: Ready[SftArguments], model_dir: Path | None, mode: Mode | None, *, data_is_here: bool, has_vision: bool
) -> Work:
    """Return the work of a run. Decisions and warnings about the data and the steps are added to `done`.

    The result is an upper bound if the data or the tokenizer is not on this machine, if the data is streamed, or if the
    model has a vision tower. In all other cases, the rows are encoded and their tokens are counted. Raises ConfigError
    if the data cannot be used.
    """
    args = done.args
    if not data_is_here or args.streaming:
        why = 'a stream is not counted in advance' if args.streaming else 'data that is not here cannot be counted'
        evaluates = bool(args.val_dataset) or (args.stream_val_rows if args.streaming else args.dataset_test_ratio) > 0
        if args.streaming or args.train_dataset_sample < 0:
            return _bounded(done, None, f'training rows: not known: {why}', evaluates=evaluates)
        count = args.train_dataset_sample
        return _bounded(done, count, f'at most {count} training rows: {why}', evaluates=evaluates)

    plan = plan_of(args, args.train_dataset_sample)
    done.decisions += plan.decisions(args.loss_scope)
    done.warnings += [*plan.left_out.lines('skipped'), *plan.noted.lines('noted')]
    if model_dir is not None and not has_vision:
        return _encoded(done, plan, model_dir, padded=mode is not None and not mode.padding_free)

    train = sum(part.trained_rows() for part in plan.parts)
    val = sum(part.uses.count(VAL) for part in plan.parts)
    why = 'only the model counts the tokens of images' if has_vision else 'the tokenizer is not here'
    line = f'{train} training rows, {val} validation; tokens are not counted: {why}'
    work = _bounded(done, train, line, evaluates=val > 0)
    work.lines.extend(_sets(plan))
    return work


def _sets(plan: Plan) -> list[str]:
    """Return a list with one line for the user: the number of rows of each validation set (see --val_dataset).

    The list is empty if there is no validation set.
    """
    sets = [f'{part.val_set} {part.uses.count(VAL)} rows' for part in plan.parts if part.val_set]
    return [f'validation sets: {", ".join(sets)}'] if sets else []


def _bounded(done: Ready[SftArguments], rows: int | None, line: str, *, evaluates: bool) -> Work:
    """Return an upper bound of the work: every row has --max_length tokens, and all tokens are trained.

    `rows` is the largest possible number of training rows, or None if it is not known. `line` describes the rows for
    the user. `evaluates` says whether the run has validation rows.
    """
    args = done.args
    batch = longest_batch(args)
    lines = [line]
    steps = _steps(args, rows) if rows is not None or args.max_steps >= 0 else None
    tokens = None
    if steps is not None:
        per_step = args.batch_size * args.gradient_accumulation_steps * dist.world_size()
        trained_rows = steps * per_step
        if rows is not None and args.max_steps < 0:
            trained_rows = min(trained_rows, rows * math.ceil(args.num_train_epochs))
        tokens = trained_rows * batch.longest if args.max_length > 0 else None
        most = 'at most ' if args.max_steps < 0 else ''
        lines.append(f'{most}{_step_line(args, steps)}' + (f'; at most {tokens:,} tokens' if tokens else ''))
        lines.append(_counts_line(done, steps, evaluates=evaluates))

    length = f'{batch.longest} tokens'
    if args.max_length <= 0:
        length += ', because --max_length gives no bound'
    lines.append(f'memory is counted for rows of {length}, each token trained')
    return Work(lines=lines, batch=batch, tokens=tokens)


def _encoded(done: Ready[SftArguments], plan: Plan, model_dir: Path, *, padded: bool) -> Work:
    """Encode the rows and return the work of the run, with counted tokens.

    The encoded rows stay in the cache, where the run itself finds them.
    """
    args = done.args
    tokenizer = load_tokenizer(model_dir, model_type=args.model_type)
    new = add_to_tokenizer(tokenizer, find_new_tokens(args))
    encoder = open_encoder(args, tokenizer, system_typed='system' in done.typed, new_ids=new.ids)
    train, val, report = encode_plan(encoder, plan)
    done.warnings += report.lines()
    rows: IndexedRows = PackedRows(train, args.max_length) if args.packing else train

    candidates = [_measure_batch(batch, padded=padded) for batch in rows.heaviest(args.batch_size)]
    batch = Batch(
        tokens=max(one.tokens for one in candidates),
        longest=max(one.longest for one in candidates),
        trained=max(one.trained for one in candidates),
    )

    steps = _steps(args, len(rows))
    sizes = train.sizes()
    per_epoch = int(sizes.sum())
    # With --max_steps, tokens are steps times the mean number of tokens of a step. Without it, every epoch reads every
    # row once, even if the last step has fewer rows.
    per_step = per_epoch / max(len(rows), 1) * args.batch_size * args.gradient_accumulation_steps * dist.world_size()
    tokens = round(per_step * steps if args.max_steps >= 0 else per_epoch * args.num_train_epochs)

    skipped = len(report.left_out) + len(plan.left_out)
    packs = f', in {len(rows)} packs' if args.packing else ''
    lines = [
        f'{len(train)} training rows, {len(val)} validation, {skipped} skipped{packs}',
        f'{per_epoch:,} training tokens an epoch, {train.trained_tokens():,} of them trained; the longest row has '
        f'{int(sizes.max())}',
        _step_line(args, steps),
        _counts_line(done, steps, evaluates=len(val) > 0),
        f'the heaviest batch: {batch.tokens} tokens{" with padding" if padded else ""}, {batch.trained} trained',
        *_sets(plan),
    ]
    return Work(lines=lines, batch=batch, tokens=tokens, counted=True)


def _measure_batch(batch: list[dict[str, Any]], *, padded: bool) -> Batch:
    """Return the sizes of a batch of rows, or of packs of rows. If `padded` is True, `tokens` includes the padding."""
    rows = [row for item in batch for row in item.get('rows', [item])]
    lengths = [len(row['input_ids']) for row in rows]
    return Batch(
        tokens=len(rows) * max(lengths) if padded else sum(lengths),
        longest=max(lengths),
        trained=sum(label != IGNORE_INDEX for row in rows for label in row_labels(row)),
    )


def _steps(args: SftArguments, rows: int | None) -> int:
    """Return the number of optimizer steps of a run: --max_steps if it is set, else computed as in the trainer.

    With --packing, `rows` is the number of packs.
    """
    if args.max_steps >= 0 or rows is None:
        return args.max_steps
    batches = -(-rows // (args.batch_size * dist.world_size()))
    per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    return math.ceil(per_epoch * args.num_train_epochs)


def _counts_line(done: Ready[SftArguments], steps: int, *, evaluates: bool) -> str:
    """Return the line about warm-up, evaluations and checkpoints, and add the warnings of `step_counts` to `done`."""
    counts = step_counts(done.args, steps, evaluates=evaluates)
    done.warnings += counts.warnings
    return counts.describe()


def _step_line(args: SftArguments, steps: int) -> str:
    total = args.batch_size * args.gradient_accumulation_steps * dist.world_size()
    parts = f'batch {args.batch_size} x accumulation {args.gradient_accumulation_steps} x processes {dist.world_size()}'
    line = f'{steps} optimizer steps of {total} rows ({parts})'
    if args.max_minutes is not None:
        line += f', fewer if --max_minutes {args.max_minutes:g} needs it: a trial on this machine measures a step first'
    return line

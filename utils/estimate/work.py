"""What a run would go through: rows, tokens, steps and the heaviest batch, counted where it can be, else bounded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.base import dist
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Ready
from utils.data.encode_plan import encode_plan
from utils.data.encoded_rows import IndexedRows
from utils.data.packing import PackedRows
from utils.data.parts import TRAIN, VAL
from utils.data.plan import Plan
from utils.encode.encoded import IGNORE_INDEX, row_labels
from utils.estimate.gpus import longest_batch
from utils.estimate.memory import Batch, Mode
from utils.model import load_tokenizer
from utils.run.open_model import open_encoder
from utils.run.rows import plan_of


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run would go through, and the tokens of all of it: counted, a bound, or None where nothing is known."""

    lines: list[str]
    batch: Batch
    tokens: int | None = None
    counted: bool = False


def plan_work(
    done: Ready[SftArguments], model_dir: Path | None, mode: Mode | None, *, data_is_here: bool, sees: bool
) -> Work:
    """Return what a run would go through, its rows encoded where data and tokenizer are here, else its bound."""
    args = done.args
    if not data_is_here or args.streaming:
        why = 'a stream is not counted beforehand' if args.streaming else 'data that is not here cannot be counted'
        known = None if args.streaming or args.train_dataset_sample < 0 else args.train_dataset_sample
        shown = 'training rows: not known' if known is None else f'at most {known} training rows'
        return _bounded(args, known, f'{shown}: {why}')
    plan = plan_of(args, args.train_dataset_sample)
    done.decisions += plan.decisions(args.loss_scope)
    done.warnings += plan.noted.lines('noted')
    if model_dir is not None and not sees:
        return _encoded(done, plan, model_dir, padded=mode is not None and not mode.laid)
    train, val = (sum(part.uses.count(use) for part in plan.parts) for use in (TRAIN, VAL))
    why = 'images are counted by the model itself' if sees else 'the tokenizer is not here'
    return _bounded(args, train, f'{train} training rows, {val} validation; tokens are not counted: {why}')


def _bounded(args: SftArguments, rows: int | None, said: str) -> Work:
    """Return the most that a run can be: every row as long as --max_length allows and trained in each token."""
    batch = longest_batch(args)
    lines = [said]
    steps = _steps(args, rows) if rows is not None or args.max_steps >= 0 else None
    tokens = None
    if steps is not None:
        per_step = args.batch_size * args.gradient_accumulation_steps * dist.world_size()
        seen = steps * per_step if rows is None or args.max_steps >= 0 else rows * args.num_train_epochs
        tokens = seen * batch.longest if args.max_length > 0 else None
        lines.append(_step_line(args, steps) + (f'; at most {tokens:,} tokens' if tokens else ''))
    length = f'{batch.longest} tokens' + ('' if args.max_length > 0 else ', as --max_length gives no bound')
    return Work(
        lines=[*lines, f'memory is counted for rows of {length}, each token trained'], batch=batch, tokens=tokens
    )


def _encoded(done: Ready[SftArguments], plan: Plan, model_dir: Path, *, padded: bool) -> Work:
    """Return the work of data that is here, encoded as the run would, into the same cache."""
    args = done.args
    tokenizer = load_tokenizer(model_dir, model_type=args.model_type)
    encoder = open_encoder(args, tokenizer, system_typed='system' in done.typed)
    train, val, report = encode_plan(encoder, plan)
    rows: IndexedRows = PackedRows(train, args.max_length) if args.packing else train
    batches = [[row for item in batch for row in item.get('rows', [item])] for batch in rows.heaviest(args.batch_size)]
    lengths = [[len(row['input_ids']) for row in batch] for batch in batches]
    trained = [sum(label != IGNORE_INDEX for row in batch for label in row_labels(row)) for batch in batches]
    steps, sizes = _steps(args, len(rows)), train.sizes()
    batch = Batch(
        tokens=max(len(n) * max(n) if padded else sum(n) for n in lengths),
        longest=max(map(max, lengths)),
        trained=max(trained),
    )
    per_epoch = int(sizes.sum())
    # Steps are counted on rows, so a last step may be short and --max_steps may go over the data several times.
    per_step = per_epoch / max(len(rows), 1) * args.batch_size * args.gradient_accumulation_steps * dist.world_size()
    tokens = round(per_step * steps) if args.max_steps >= 0 else per_epoch * args.num_train_epochs
    said = f'{len(train)} training rows, {len(val)} validation, {len(report.left_out) + len(plan.left_out)} left out'
    lines = [
        said + (f', in {len(rows)} packs' if args.packing else ''),
        f'{per_epoch:,} training tokens an epoch, {train.trained_tokens():,} of them trained; the longest row has '
        f'{int(sizes.max())}',
        _step_line(args, steps),
        f'the heaviest batch: {batch.tokens} tokens{" with padding" if padded else ""}, {batch.trained} trained',
    ]
    return Work(lines=lines, batch=batch, tokens=tokens, counted=True)


def _steps(args: SftArguments, rows: int | None) -> int:
    """Return the optimizer steps of a run, as the trainer counts them."""
    if args.max_steps >= 0 or rows is None:
        return args.max_steps
    batches = -(-rows // (args.batch_size * dist.world_size()))
    per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    return per_epoch * args.num_train_epochs


def _step_line(args: SftArguments, steps: int) -> str:
    total = args.batch_size * args.gradient_accumulation_steps * dist.world_size()
    parts = f'batch {args.batch_size} x accumulation {args.gradient_accumulation_steps} x processes {dist.world_size()}'
    return f'{steps} optimizer steps of {total} rows ({parts})'

"""From the data flags of a command line to the rows that they name."""

from __future__ import annotations

from typing import Any

from utils.argument import CommonArguments, InferArguments, SftArguments
from utils.data_file import OnBad, refuse
from utils.preprocess import Row
from utils.reading import VAL, Plan, Streams, first_rows, open_streams, plan_rows
from utils.resolution import Resolution


def rows_of(done: Resolution[SftArguments]) -> Plan | Streams:
    """Return the rows of a training run: planned in a first pass, or opened as streams.

    What is not learnt of planned rows is added to the decisions, what is worth counting about them to the warnings.
    """
    args = done.args
    if args.streaming:
        return open_streams(args.dataset, hub=args.hub)
    plan = plan_of(args, args.train_dataset_sample)
    done.decisions += plan.decisions(args.loss_scope)
    done.warnings += plan.noted.lines('noted')
    return plan


def plan_of(args: CommonArguments, train_sample: int, *, bad: OnBad = refuse) -> Plan:
    """Return which rows a run with these flags uses; `bad` is told of lines that cannot be read."""
    return plan_rows(
        args.dataset,
        seed=args.dataset_seed,
        test_ratio=args.dataset_test_ratio,
        train_sample=train_sample,
        hub=args.hub,
        bad=bad,
    )


def validation_rows(args: InferArguments, record: dict[str, Any] | None) -> list[Row]:
    """Return the validation rows that the run of this record held out; of an untuned model, those a run would."""
    if record and record.get('streaming'):
        return first_rows(open_streams(args.dataset, hub=args.hub), int(record['stream_val_rows']))
    plan = plan_of(args, int(record['train_dataset_sample']) if record else -1)
    return [row for _, row in plan.rows(VAL)]

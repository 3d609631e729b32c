"""Measures how long steps, an evaluation and a checkpoint take, to plan the steps of a run with --max_minutes.

This trial comes before training. Afterwards the weights and all other state are bitwise the same as before.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from utils.base import device, dist
from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.proofs.first_step import FirstStepGate
from utils.run.lock import read_lock
from utils.train.deadline import PLANNED_SHARE, Costs, now
from utils.train.trainer import SftTrainer

_DECIDE_STEPS = {'max_minutes', 'max_steps', 'num_train_epochs'}
_SCRATCH = '.time_trial'
# At most this many steps are tried, and no further step after this share of the time is used. The first step is not
# counted if there are others, because it is slower than the later steps.
_STEPS = 3
_SHARE = 0.02
# At most this many batches of an evaluation are tried. Generating an answer takes long, so then one batch is tried.
_EVAL_BATCHES = 3


def keep_to_time(trainer: SftTrainer, args: SftArguments, typed_now: Collection[str], *, started: float) -> None:
    """Make the trainer end the run within --max_minutes. Does nothing without this flag.

    The number of steps is chosen from measured times, unless the run repeats an earlier run (--from_run). Then it does
    the same number of steps as the earlier run. But if the user typed --max_minutes, --max_steps or --num_train_epochs
    together with --from_run, the number is chosen from measured times again. With --verify true, it is never chosen
    again.

    `typed_now` has the names of the flags that the user typed. `started` is the time when the program started, as
    time.time returns it.
    """
    if args.max_minutes is None:
        return
    repeated = None
    # With --verify true, --max_steps is the number of steps to verify, and not the length of the run.
    if args.from_run is not None and (args.verify or not _DECIDE_STEPS & set(typed_now)):
        repeated = read_lock(Path(args.from_run)).get('timetable')
    trainer.deadline.set(args.max_minutes, started=started, repeated=repeated)
    trainer.add_callback(TimeTrial(trainer, resumed_from=args.resume_from_checkpoint))


class TimeTrial(FirstStepGate):
    """Measures how long steps, an evaluation and a checkpoint take.

    From these times, the number of steps that fits before the deadline is chosen.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the times and choose the number of steps.

        Does nothing if the number was already chosen by the run that this run resumes or repeats. Raises ConfigError if
        there is not enough time for one step.
        """
        trainer = self.trainer
        if trainer.timetable.segments:
            return

        began = now()
        trainer.in_preflight = True
        try:
            with self._scratch(_SCRATCH) as scratch, self._undone(scratch):
                costs = Costs(
                    step=self._step_seconds(),
                    evaluation=self._evaluation_seconds(),
                    checkpoint=self._checkpoint_seconds(scratch),
                    eval_steps=int(state.eval_steps),
                    save_steps=int(state.save_steps),
                )
        finally:
            trainer.in_preflight = False
        seconds = now() - began
        logger.info(f'time trial, {seconds:.1f} s: steps, an evaluation and a checkpoint were measured and undone')
        trainer.deadline.plan(costs)

    def _step_seconds(self) -> float:
        """Return the seconds of a typical step."""
        limit = _SHARE * self.trainer.deadline.left(PLANNED_SHARE)
        times: list[float] = []
        for number in range(_STEPS):
            began = now()
            self._step(number)
            times.append(now() - began)
            # All processes must do the same number of steps.
            if dist.from_all(sum(times) >= limit)[0]:
                break
        return statistics.fmean(times[1:] or times)

    def _step(self, number: int) -> None:
        """Do a whole optimizer step with typical rows."""
        trainer = self.trainer
        is_sharded = self._is_sharded()
        batches = trainer.typical_batches(number)
        collated = (trainer.data_collator(rows) for rows in batches)
        inputs, count = trainer.get_batch_samples(collated, len(batches), trainer.args.device)
        for index, batch in enumerate(inputs):
            is_last = index == len(inputs) - 1
            trainer.accelerator.gradient_state._set_sync_gradients(is_last)
            context: Any = contextlib.nullcontext()
            if not (is_last or is_sharded):
                context = trainer.accelerator.no_sync(model=trainer.model_wrapped)
            with context:
                trainer.training_step(trainer.model_wrapped, batch, count)
        self._optimize()
        device.wait()

    def _evaluation_seconds(self) -> float:
        """Return the estimated seconds of an evaluation. A few batches from short to long rows are measured."""
        trainer = self.trainer
        rows = trainer.eval_dataset
        if rows is None:
            return 0.0

        size = trainer.args.per_device_eval_batch_size
        batches = -(-len(rows) // (size * dist.world_size()))
        tried = min(batches, 1 if trainer.args.predict_with_generate else _EVAL_BATCHES)
        trainer.model_wrapped.eval()
        began = now()
        for number in range(tried):
            first = batches * (2 * number + 1) // (2 * tried) * size * dist.world_size()
            batch = [rows[index] for index in range(first, min(first + size, len(rows)))]
            trainer.prediction_step(trainer.model_wrapped, trainer.data_collator(batch), False)
        device.wait()
        seconds: float = (now() - began) / tried * batches
        return seconds

    def _checkpoint_seconds(self, scratch: Path) -> float:
        """Return the seconds that it takes to write a checkpoint. Raises ConfigError if it cannot be written."""
        began = now()
        self._save(scratch)
        return now() - began

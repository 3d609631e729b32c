"""Callbacks of the trainer: they stop a run, evaluate at its end, set the order of rows, and measure the speed."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base import device, dist, system
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.cli.schedule import StepCounts, step_counts
from utils.run.folder import Run

if TYPE_CHECKING:
    from utils.train.trainer import SftTrainer


class EvaluateAtEnd(TrainerCallback):
    """Requests an evaluation after the last step, so that the last checkpoint can be the best checkpoint."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Request an evaluation if this is the last step and the run has evaluations. Returns the control."""
        if state.global_step >= state.max_steps and str(args.eval_strategy.value) == 'steps':
            control.should_evaluate = True
        return control


class StepIntervals(TrainerCallback):
    """Sets the intervals of evaluations and checkpoints.

    If a flag gives an interval as a share of the run, the resulting number of steps is recorded.
    """

    def __init__(self, args: SftArguments, run: Run) -> None:
        self.flags = args
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the intervals in the trainer's state from the flags of this run, and record them.

        This is also done for a resumed run, because its state has the intervals of the checkpoint.
        """
        counts = self.set_intervals(args, state)
        # A DeepSpeed configuration can bring a schedule of its own, with its own warm-up.
        self._record(counts, schedule_is_ours=isinstance(kwargs['lr_scheduler'], LambdaLR))

    def set_intervals(self, args: TrainingArguments, state: TrainerState) -> StepCounts:
        """Compute the intervals for a run of state.max_steps steps, store them in the state, and return them."""
        evaluates = str(args.eval_strategy.value) == 'steps'
        counts = step_counts(self.flags, state.max_steps, evaluates=evaluates)
        state.logging_steps = self.flags.logging_steps
        state.save_steps = counts.saving
        if evaluates:
            state.eval_steps = counts.evaluation
        return counts

    def _record(self, counts: StepCounts, *, schedule_is_ours: bool) -> None:
        """Record the numbers of warm-up, evaluation and checkpoint steps if they differ from the flags.

        For example, --eval_steps 0.1 becomes 50 steps in a run of 500 steps. The warnings of `counts` are recorded and
        logged. If `schedule_is_ours` is False, DeepSpeed makes the learning-rate schedule, and the warm-up is not
        recorded.
        """
        flags = self.flags
        steps = counts.steps
        self.run.warnings += counts.warnings
        if dist.is_main():
            for line in counts.warnings:
                logger.warning(line)

        if schedule_is_ours and flags.lr_scheduler_type != 'constant':
            if flags.warmup_steps is None:
                self.run.decide(
                    'warmup_steps', counts.warmup, f'--warmup_ratio is {flags.warmup_ratio} of {steps} steps'
                )
            elif flags.warmup_steps != counts.warmup:
                self.run.decide('warmup_steps', counts.warmup, f'at most half of {steps} steps are warm-up')
        if counts.evaluation and flags.eval_steps < 1:
            self.run.decide('eval_steps', counts.evaluation, f'--eval_steps is {flags.eval_steps} of {steps} steps')
        if flags.save_steps is not None and flags.save_steps < 1:
            self.run.decide('save_steps', counts.saving, f'--save_steps is {flags.save_steps} of {steps} steps')


class EpochOrder(TrainerCallback):
    """Passes the number of each epoch to the sampler of --group_by_length, which shuffles each epoch differently.

    If a run resumes in the middle of an epoch, accelerate wraps this sampler in others, which skip and distribute the
    batches. The wrappers do not pass the epoch number on, so this callback sets it on the inner sampler.
    """

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the sampler's epoch to the number of complete epochs."""
        if self.trainer.order is not None:
            self.trainer.order.set_epoch(int(state.epoch or 0))


class Speedometer(TrainerCallback):
    """Counts the non-padding tokens and the seconds of training steps on this process.

    The first step, evaluations and saving are not counted.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._pending = 0
        self._since: float | None = None

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        """Count the tokens of one micro-batch. They are added to the totals when the step ends."""
        self._pending += int(inputs['row_lengths'].sum())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the measurement. The first step is not counted, because it is slower than the later steps.

        The peak memory is reset, so that it does not include what was needed to load the model.
        """
        self._since = None
        device.reset_peak()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Add the tokens and seconds of the step to the totals. The first step is only the start of the measurement."""
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
            self.tokens += self._pending
        self._pending = 0
        self._since = now

    def add_wait(self) -> None:
        """Add the time since the last step to the seconds of training.

        Call this after the CPU has waited for the device to complete the step. This wait is part of the training time.
        """
        now = time.perf_counter()
        if self.tokens and self._since is not None:
            self.seconds += now - self._since
        self._since = now

    def _restart(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    on_evaluate = on_save = on_log = _restart

    def tokens_per_second(self) -> float | None:
        """Return the non-padding tokens per second of this process, or None if no step was counted."""
        return round(self.tokens / self.seconds, 1) if self.seconds else None


class LogLines(TrainerCallback):
    """Logs the numbers of the trainer in lines, each with the step and the remaining time. Used without progress bars.

    The time is estimated from the steps of this process so far, with their evaluations and checkpoints.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._first = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the measurement before the first step."""
        if self._since is None:
            self._since = time.perf_counter()
            self._first = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log one line, for example `step 10 of 100, 0:01:30 left: {'loss': '2.625', 'learning_rate': '5e-05'}`."""
        done = state.global_step - self._first
        left = ''
        if self._since is not None and done and state.global_step < state.max_steps:
            seconds = (time.perf_counter() - self._since) / done * (state.max_steps - state.global_step)
            left = f', {timedelta(seconds=round(seconds))} left'
        shown = {
            name: f'{value:.4g}' if isinstance(value, float) else value
            for name, value in (logs or {}).items()
            if name != 'total_flos'
        }
        logger.info(f'step {state.global_step} of {state.max_steps}{left}: {shown}')


class EvaluationCutError(Exception):
    """Ends an evaluation early, because a signal stops the run."""


class StopCallback(TrainerCallback):
    """Stops the run after a signal: when the current step is complete, or in the middle of an evaluation."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ConfigError if the resumed run has no step left, because the training loop would still do one step."""
        if state.global_step >= state.max_steps:
            remedy = 'Raise --max_steps or --num_train_epochs.'
            if state.max_steps < self.trainer.deadline.asked:
                remedy = 'The time of --max_minutes set this end. Remove --max_minutes to train more steps.'
            raise ConfigError(
                f'--resume_from_checkpoint: no step is left to train. The checkpoint is of step {state.global_step}, '
                f'and this run ends at step {state.max_steps}. {remedy}'
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """If any process has received a stop signal, request a checkpoint and the end of training.

        If an evaluation is due at this step, it is not done now. The run that resumes from the checkpoint does it
        first. After the last step nothing is changed, because the run ends anyway. Returns the control.
        """
        trainer = self.trainer
        if trainer.stop_agreed and state.global_step < state.max_steps:
            trainer.evaluation_pending = control.should_evaluate
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise EvaluationCutError if any process has received a stop signal.

        Two evaluations are never stopped. One is the evaluation after the last step. The other is at the start of a
        resumed run, and replaces an evaluation that a signal prevented or stopped.
        """
        trainer = self.trainer
        if trainer.evaluation_pending or state.global_step >= state.max_steps:
            return
        trainer.stop_agreed = dist.sums([trainer.signals.signum])[0] > 0
        if trainer.stop_agreed:
            raise EvaluationCutError


class EarlyStop(TrainerCallback):
    """Ends the training after `patience` evaluations in a row that are not better than the best evaluation so far.

    Every process sees the same metrics, so all processes end at the same step. The state is part of each checkpoint.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: float | None = None
        self.best_step = 0
        self.count = 0
        # The reason why the training ended, or None if it goes on.
        self.reason: str | None = None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {'best': self.best, 'best_step': self.best_step, 'count': self.count}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint. Raises ConfigError if --early_stop allows no further step."""
        self.best = state['best']
        self.best_step = state['best_step']
        self.count = state['count']
        if self.count >= self.patience:
            raise ConfigError(
                f'--early_stop {self.patience}: no step is left to train. The last {self.count} evaluations up to the '
                f'checkpoint were not better than the evaluation at step {self.best_step}. Raise or remove '
                '--early_stop to continue training.'
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        """Compare the metric with the best value so far. Returns the control.

        After `patience` evaluations in a row without a new best value, a checkpoint and the end of training are
        requested.
        """
        name = f'eval_{args.metric_for_best_model}'
        value = (metrics or {})[name]
        if self.best is None or (value > self.best if args.greater_is_better else value < self.best):
            self.best = value
            self.best_step = state.global_step
            self.count = 0
            return control

        self.count += 1
        if self.count >= self.patience and state.global_step < state.max_steps:
            self.reason = (
                f'training ended at step {state.global_step} of {state.max_steps} because of --early_stop '
                f'{self.patience}: no evaluation after step {self.best_step} had a better {name} than {self.best:.6g}'
            )
            control.should_save = True
            control.should_training_stop = True
        return control


class EndedEarlyError(Exception):
    """Ends a resumed run before its first step.

    Some resumed runs begin with an evaluation that a stop signal had prevented or cut short. --early_stop can end
    training after this evaluation.
    """


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB: of all its tensors on GPUs, or of the process if there is no GPU.

    On a Mac, the GPU memory that is reserved now is returned, because the peak is not measured.
    """
    peak = system.peak_resident_bytes() if device.kind() == 'cpu' else device.peak_bytes()
    return round(peak / 2**30, 3)


def peak_reserved_gib() -> float | None:
    """Return the most memory that the allocator of torch reserved in GiB, or None on a CPU.

    It is the sum over all devices. On a Mac, the memory that is reserved now is returned.
    """
    return None if device.kind() == 'cpu' else round(device.peak_reserved_bytes() / 2**30, 3)

"""Callbacks of the trainer: stopping, a last evaluation, the order of rows, and counts of tokens and seconds."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base import dist
from utils.base.errors import ConfigError

if TYPE_CHECKING:
    from utils.train.trainer import SftTrainer


class EvaluateAtEnd(TrainerCallback):
    """Evaluates after the last step too, so that the last checkpoint can be the best."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for an evaluation at the last step."""
        if state.global_step >= state.max_steps and str(args.eval_strategy.value) == 'steps':
            control.should_evaluate = True
        return control


class EpochOrder(TrainerCallback):
    """Sets the epoch of the sampler that orders the rows of a step.

    In a resumed epoch this sampler is wrapped in samplers that skip and distribute batches, and they do not pass the
    epoch on.
    """

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch to the number of complete epochs."""
        if self.trainer.order is not None:
            self.trainer.order.set_epoch(int(state.epoch or 0))


class Speedometer(TrainerCallback):
    """Counts non-padding tokens and the seconds spent in training steps, excluding evaluation and saving."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._pending = 0
        self._since: float | None = None

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        """Add the tokens of one micro-batch."""
        self._pending += int(inputs['row_lengths'].sum())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start without a time, so that the first step, which warms up, is not counted."""
        self._since = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Add the tokens and seconds of the step."""
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
            self.tokens += self._pending
        self._pending = 0
        self._since = now

    def _restart(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    on_evaluate = on_save = on_log = _restart

    def tokens_per_second(self) -> float | None:
        """Return non-padding tokens per second of this process, None after a single step."""
        return round(self.tokens / self.seconds, 1) if self.seconds else None


class EvaluationCutError(Exception):
    """Raised to end an evaluation early because the run stops; the resumed run repeats the evaluation."""


class StopCallback(TrainerCallback):
    """Ends the run after the step in which all processes know of a signal; ends an evaluation early."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ConfigError if the resumed run has no step left: the training loop would add one step."""
        if state.global_step >= state.max_steps:
            raise ConfigError(
                f'--resume_from_checkpoint: the checkpoint is of step {state.global_step} and this run ends at step '
                f'{state.max_steps}: no step is left to train. Raise --max_steps or --num_train_epochs.'
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Request a checkpoint and the end of training; the resumed run makes up for an evaluation that is due."""
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
        """End an evaluation early once a process has a signal, except a repeated one and that of the last step."""
        trainer = self.trainer
        if trainer.evaluation_pending or state.global_step >= state.max_steps:
            return
        trainer.stop_agreed = dist.sums([trainer.signals.signum])[0] > 0
        if trainer.stop_agreed:
            raise EvaluationCutError


def peak_memory_gib() -> float:
    """Return the peak of GPU memory over all GPUs, or of resident memory if there is no GPU, in GiB."""
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    else:
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        unit = 1 if sys.platform == 'darwin' else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(peak / 2**30, 3)

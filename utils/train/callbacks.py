"""What happens between steps: a last evaluation, and honest counts of tokens, seconds and memory."""

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
    """Evaluates the last step too, so that the last checkpoint can be the best."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for an evaluation at the last step."""
        if state.global_step >= state.max_steps and str(args.eval_strategy.value) == 'steps':
            control.should_evaluate = True
        return control


class EpochOrder(TrainerCallback):
    """Tells the sampler of a step's rows which epoch begins.

    A resumed epoch's sampler lies inside samplers that skip and deal out batches, which do not pass this on.
    """

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch: the whole part of the epochs that are done."""
        if self.trainer.order is not None:
            self.trainer.order.set_epoch(int(state.epoch or 0))


class Speedometer(TrainerCallback):
    """Counts real tokens (padding is none) and the seconds of training steps, evaluation and saving left out."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._pending = 0
        self._since: float | None = None

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        """Add the tokens of one micro-batch."""
        self._pending += int(inputs['row_lengths'].sum())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Leave the first step out: it pays for warm-up."""
        self._since = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Close a step."""
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
            self.tokens += self._pending
        self._pending, self._since = 0, now

    def _restart(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    on_evaluate = on_save = on_log = _restart

    def tokens_per_second(self) -> float | None:
        """Return real tokens per second of this process, None after a single step."""
        return round(self.tokens / self.seconds, 1) if self.seconds else None


class EvaluationCutError(Exception):
    """An evaluation given up because the run is to stop; it is made up for on resuming."""


class StopCallback(TrainerCallback):
    """Ends the run at the step at which all processes know of a signal; cuts an evaluation off."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to go on with a run that has ended: the loop would train one step more."""
        if state.global_step >= state.max_steps:
            raise ConfigError(
                f'the checkpoint to resume from is of step {state.global_step} and this run ends at step '
                f'{state.max_steps}: nothing is left to train. Raise --max_steps or --num_train_epochs.'
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end; an evaluation that is due is left to the resumed run."""
        trainer = self.trainer
        if trainer.stop_agreed and state.global_step < state.max_steps:
            trainer.evaluation_pending = control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give an evaluation up once a process was told to stop; one that is made up for, and the last, is finished."""
        trainer = self.trainer
        if trainer.evaluation_pending or state.global_step >= state.max_steps:
            return
        trainer.stop_agreed = dist.sums([trainer.signals.signum])[0] > 0
        if trainer.stop_agreed:
            raise EvaluationCutError


def peak_memory_gib() -> float:
    """Return the peak of GPU memory, or of the process's resident memory where there is no GPU."""
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    else:
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    return round(peak / 2**30, 3)

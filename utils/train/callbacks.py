"""Callbacks of the trainer between steps: a last evaluation, the order of rows, and counts of tokens and seconds."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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


def peak_memory_gib() -> float:
    """Return the peak of GPU memory over all GPUs, or of resident memory if there is no GPU, in GiB."""
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    else:
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        unit = 1 if sys.platform == 'darwin' else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(peak / 2**30, 3)

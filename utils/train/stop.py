"""Ending a run on purpose: the first signal lets the step finish and a checkpoint be written, the second quits."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base import dist
from utils.base.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from utils.train.trainer import SftTrainer

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Schedulers and torchrun may both pass on the same signal: what follows so soon is no second wish.
_ECHO_SECONDS = 1.0
_NOTICE = b'\nfinishing this step and writing a checkpoint; once more quits at once\n'


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is kept in `signum`; a second one ends the process with 128 + n."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a data worker between its fork and ignore_signals
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
            if dist.is_main():
                os.write(2, _NOTICE)
        elif time.monotonic() - self._since > _ECHO_SECONDS:
            os._exit(128 + signum)


def ignore_signals() -> None:
    """Let a data worker live through a signal to the whole process group: the step under way still needs it.

    The training process ends its workers by a message, and a worker whose parent is gone ends by itself.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def deaf_to_signals(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the loader, its workers to ignore signals."""
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
    return loader


def _start_worker(then: Callable[[int], None] | None, worker_id: int) -> None:
    ignore_signals()
    if then is not None:
        then(worker_id)


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

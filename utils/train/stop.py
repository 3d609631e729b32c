"""Stops a run after SIGINT (Ctrl-C) or SIGTERM.

After the first signal the run completes the step, or ends an evaluation early, and writes a checkpoint. A second signal
ends the process at once.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from utils.base import dist

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A scheduler and torchrun may both forward the same signal. A second signal within this time is ignored.
_ECHO_SECONDS = 1.0
_NOTICE = b'\nfinishing this step and writing a checkpoint; a second signal quits at once\n'


class StopSignals:
    """A context in which the first SIGINT or SIGTERM is only stored in `signum`, and the user is told.

    A second signal ends the process with exit status 128 + signal number, unless it comes within a second of the first.
    """

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
            return  # this process is a data worker that has not called ignore_signals yet
        if not self.signum:
            self.signum = signum
            self._since = time.monotonic()
            if dist.is_main():
                os.write(2, _NOTICE)
        elif time.monotonic() - self._since > _ECHO_SECONDS:
            os._exit(128 + signum)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM in a data worker, so that it still loads the data of the current step.

    The worker ends when the training process tells it to, or when the training process no longer exists.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def with_workers_ignoring_signals(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Change the loader so that its workers ignore signals, and return the loader."""
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
    return loader


def _start_worker(init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    ignore_signals()
    if init_fn is not None:
        init_fn(worker_id)

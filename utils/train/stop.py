"""Ending a run on purpose: the first signal lets the step finish and a checkpoint be written, the second quits."""

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

"""Functions that differ between operating systems. Only this module imports modules that Windows does not have."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def peak_resident_bytes() -> int:
    """Return the largest resident memory that this process ever had."""
    try:
        import resource
    except ImportError:  # Windows
        psutil = importlib.import_module('psutil')  # accelerate requires it
        found = psutil.Process().memory_info()._asdict()
        return int(found.get('peak_wset', found['rss']))

    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock on this file, and hold the lock while the body runs.

    Only one process of the machine can hold the lock. If the process dies, the system releases the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as stream:
        _lock(stream)
        yield


def _lock(stream: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        _lock_on_windows(stream)
    else:
        fcntl.flock(stream, fcntl.LOCK_EX)


def _lock_on_windows(stream: IO[str]) -> None:
    """Lock the first byte of the file. Windows gives up after 10 seconds, so the call is repeated."""
    module: Any = importlib.import_module('msvcrt')
    while True:
        with contextlib.suppress(OSError):
            module.locking(stream.fileno(), module.LK_LOCK, 1)
            return


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to the disk. On Windows, folders cannot be opened, so nothing is done for a folder."""
    if os.name == 'nt' and path.is_dir():
        return
    mode = os.O_RDWR if os.name == 'nt' else os.O_RDONLY  # Windows flushes only what is open for writing
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

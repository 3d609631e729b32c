"""Functions that differ between operating systems. Only this module imports modules that Windows does not have."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import time
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


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder while the body runs, so that `is_held` is True for every process of this machine.

    If the process dies, the system releases the lock. Nothing is held on Windows, on file systems that have no locks
    for folders, and if another process does not release the lock within half a second.
    """
    handle = _lock_or_give_up(folder)
    if handle is None:
        yield
        return
    _close_in_forks()
    _HELD.add(handle)
    try:
        yield
    finally:
        _HELD.discard(handle)
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Return whether a process holds the lock on a folder (see `held_folder`).

    The answer comes from a shared lock, so that two processes that ask at once do not take each other for a holder.
    """
    try:
        handle = _lock_folder(folder, shared=True)
    except BlockingIOError:
        return True
    if handle is not None:
        os.close(handle)
    return False


# The open folders whose locks this process holds.
_HELD: set[int] = set()


def _lock_or_give_up(folder: Path) -> int | None:
    """Lock a folder as `_lock_folder` does, but return None if the lock is not free within half a second.

    Waiting helps if another process is in `is_held`, which holds the lock only for microseconds.
    """
    for _ in range(50):
        try:
            return _lock_folder(folder)
        except BlockingIOError:
            time.sleep(0.01)
    return None


def _lock_folder(folder: Path, *, shared: bool = False) -> int | None:
    """Lock a folder, and return its open file descriptor. Closing the descriptor releases the lock.

    By default, the lock is exclusive: BlockingIOError is raised if the folder has any other lock. With `shared`,
    BlockingIOError is raised only if the folder has an exclusive lock. Returns None if the folder cannot be opened,
    or if folders cannot be locked here.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # some network file systems
        os.close(handle)
        return None
    return handle


@functools.cache
def _close_in_forks() -> None:
    """Make forked processes close the folders of `_HELD`: a fork that outlives this process would hold the locks."""

    def close_all() -> None:
        for handle in _HELD:
            os.close(handle)
        _HELD.clear()

    os.register_at_fork(after_in_child=close_all)


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

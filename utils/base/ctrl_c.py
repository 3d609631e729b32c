"""Ends a command at Ctrl-C with one line. It imports only two small modules, so that it works from the start."""

from __future__ import annotations

import os
import signal
import types


def end_at_ctrl_c() -> None:
    """Make Ctrl-C end the process with a message and exit code 130. Does nothing if SIGINT is ignored.

    The programs call this function first, because Python would print a traceback while it imports modules.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_ctrl_c() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again, after `end_at_ctrl_c`."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signum: int, frame: types.FrameType | None) -> None:
    if os.environ.get('RANK', '0') == '0':
        os.write(2, b'error: stopped by Ctrl-C\n')
    os._exit(130)

"""The logger of the project. It writes plain lines to standard error. Ranks other than 0 log only errors."""

from __future__ import annotations

import io
import logging
import sys

from utils.base.dist import is_main

logger = logging.getLogger('assay')


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f'{record.levelname.lower()}: {text}'


def set_up_logging() -> None:
    """Make the logger write to standard error. Only the programs call this function; importing a module never does."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.propagate = False

    logger.setLevel(logging.INFO if is_main() else logging.ERROR)


def shows_bars() -> bool:
    """Return whether this process shows progress bars: the main process does, if standard error is a terminal."""
    return is_main() and sys.stderr.isatty()


def replace_unprintable() -> None:
    """Make the programs print '?' for characters that the terminal cannot encode, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='replace')

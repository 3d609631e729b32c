"""The project's one logger: plain lines on standard error, warnings only off rank 0."""

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
    """Attach one handler to the logger; called by the two programs, never on import."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if is_main() else logging.ERROR)


def show_what_can_be_shown() -> None:
    """Have a terminal of another encoding than UTF-8 show ? for what it lacks, where printing would end the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='replace')

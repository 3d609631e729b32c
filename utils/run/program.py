"""Runs either program: sets up logging, turns errors into messages, and returns the exit code."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

from utils.base import dist
from utils.base.ctrl_c import raise_at_ctrl_c
from utils.base.errors import ConfigError, Stopped
from utils.base.logger import logger

# The time that a process waits before it logs a failure that a different process caused. In this time torchrun usually
# ends the process.
_GRACE_SECONDS = 10
# The message of a gloo or nccl error contains one of these texts if a different process has ended.
_LOST_PEER = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'third_party/gloo', 'NCCL error')

# What torch says if --deterministic true refuses an operation.
_NOT_DETERMINISTIC = 'does not have a deterministic implementation'


def run_program(work: Callable[[], int | None]) -> int:
    """Call `work`, and return the exit code of the program.

    The exit code is the value that `work` returns, or 0 for None. It is 2 for problems that the user can fix; each
    problem is logged. It is 128 + n if signal n ended the program (130 for Ctrl-C, 143 for SIGTERM).

    Any other error is raised if the run has only one process. If it has several processes, the process that failed logs
    the error, and the exit code is 1. With several processes, this function does not return after an error: it ends the
    process with the exit code.
    """
    from utils.base.garbage import search_cycles_seldom
    from utils.base.logger import replace_unprintable, set_up_logging

    search_cycles_seldom()
    replace_unprintable()
    set_up_logging()
    _set_up_libraries()

    try:
        raise_at_ctrl_c()
        code = work() or 0
    except ConfigError as error:
        if not dist.is_main():
            time.sleep(_GRACE_SECONDS)  # rank 0 usually logs the same problem, and torchrun then ends this process
        for problem in error.problems:
            logger.error(problem)
        return _leave(2, '\n'.join(error.problems))
    except ModuleNotFoundError as error:
        library = (error.name or '').partition('.')[0]
        if library in ('', 'utils'):
            raise
        problem = _missing_library(library)
        logger.error(problem)
        return _leave(2, problem)
    except UnpicklingError:  # the error itself says how to load the file anyway, but that could run code from the file
        problem = (
            'a file of the model or of the resumed checkpoint is damaged, or holds more than tensors. '
            'Other objects can run code, so they are never loaded. Use weights stored as safetensors.'
        )
        logger.error(problem)
        return _leave(2, problem)
    except Stopped as stop:
        logger.warning(str(stop))
        return _leave(stop.code, str(stop))
    except KeyboardInterrupt:
        logger.error('stopped by Ctrl-C')
        return 130
    except Exception as error:
        if _NOT_DETERMINISTIC in str(error):
            problem = _without_determinism(error)
            logger.error(problem)
            return _leave(2, problem)
        if dist.world_size() == 1:
            raise
        return _report(error)

    if dist.world_size() > 1:
        import torch

        torch.distributed.destroy_process_group()
    return code


def _set_up_libraries() -> None:
    """Set environment variables that libraries read once, when they are imported. Variables of the user are kept."""
    from utils.base.logger import shows_bars

    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')  # send no usage statistics
    if not shows_bars():
        os.environ.setdefault('TQDM_DISABLE', '1')  # the bars of all libraries are made by tqdm


def _missing_library(library: str) -> str:
    """Return the message for a library that is not installed. It names the interpreter and the install command."""
    own = Path(__file__).parents[2] / '.venv' / 'bin' / 'python'
    remedy = f'{sys.executable} -m pip install -r requirements.txt'
    if own.is_file() and Path(sys.prefix).resolve() != own.parent.parent.resolve():
        remedy = f'use {own}, or: {remedy}'
    return f'{library}: not installed for {sys.executable}. To fix it, {remedy}'


def _without_determinism(error: Exception) -> str:
    """Return the message for an operation that torch refuses under --deterministic true."""
    operation = str(error).split()[0]
    return (
        f'--deterministic true: this run needs {operation}, which gives different bits each time on this device, and '
        'torch has no other version of it. Use --deterministic false.'
    )


def _report(error: Exception) -> int:
    """Log why this rank failed, and return the exit code 1.

    If the connection to a different rank was lost, wait first, so that the error of that rank is logged first.
    """
    import socket

    import torch

    rank = f'rank {dist.rank()} of {dist.world_size()} on {socket.gethostname()}'
    text = str(error)
    if isinstance(error, torch.distributed.DistError) or any(mark in text for mark in _LOST_PEER):
        time.sleep(_GRACE_SECONDS)
        logger.error(f'{rank} lost the connection to another rank, which failed or was killed: {text.splitlines()[0]}')
        return _leave(1, f'lost the connection to another rank: {text}')
    trace = traceback.format_exc()
    logger.error(f'{rank} failed:\n{trace}')
    return _leave(1, f'{type(error).__name__}: {text}', trace)


def _leave(code: int, message: str, trace: str = '') -> int:
    dist.report_failure(message, trace)
    if dist.world_size() > 1:
        # sys.exit would run destructors of a broken process group. They may hang while torchrun waits.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code

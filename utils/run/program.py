"""A program from start to exit code."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

from utils.base import dist
from utils.base.errors import ConfigError, Stopped
from utils.base.logger import logger

# How long a process that is not the cause of a failure stays silent, for torchrun to end it.
_GRACE_SECONDS = 10
# What gloo and nccl say when another process is gone.
_LOST_PEER = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'third_party/gloo', 'NCCL error')


def run_program(story: Callable[[], int | None]) -> int:
    """Run a program's story and return its exit code.

    2: something the user can fix, every problem listed; 128 + n: ended by signal n (130 Ctrl-C, 143 SIGTERM).
    """
    from utils.base.logger import replace_unprintable, set_up_logging

    replace_unprintable()
    set_up_logging()
    # Read once, when the library is imported: no usage figures are sent.
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    try:
        code = story() or 0
    except ConfigError as error:
        if not dist.is_main():
            time.sleep(_GRACE_SECONDS)  # rank 0 most often says the same, and torchrun then ends this process
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
    except UnpicklingError:  # whose text says how to run it all the same
        problem = (
            'a file of the model or of the checkpoint that is resumed is damaged, or holds more than tensors. '
            'That would be code, which is never run. Get it as safetensors, or start without it.'
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
        if dist.world_size() == 1:
            raise
        return _report(error)
    if dist.world_size() > 1:
        import torch

        torch.distributed.destroy_process_group()
    return code


def _missing_library(library: str) -> str:
    """Return which interpreter lacks a library, and the command that helps."""
    own = Path(__file__).parents[2] / '.venv' / 'bin' / 'python'
    remedy = f'{sys.executable} -m pip install -r requirements.txt'
    if own.is_file() and Path(sys.prefix).resolve() != own.parent.parent.resolve():
        remedy = f'use {own}, or: {remedy}'
    return f'{library}: not installed for {sys.executable}. To fix it, {remedy}'


def _report(error: Exception) -> int:
    """Say why this rank fails; where it fails because another one did, let that one speak."""
    import torch

    rank = f'rank {dist.rank()} of {dist.world_size()} on {socket.gethostname()}'
    text = str(error)
    if isinstance(error, torch.distributed.DistError) or any(mark in text for mark in _LOST_PEER):
        time.sleep(_GRACE_SECONDS)
        logger.error(f'{rank} lost the connection to another one, which failed or was killed: {text.splitlines()[0]}')
        return _leave(1, f'lost the connection to another rank: {text}')
    trace = traceback.format_exc()
    logger.error(f'{rank} failed:\n{trace}')
    return _leave(1, f'{type(error).__name__}: {text}', trace)


def _leave(code: int, message: str, trace: str = '') -> int:
    dist.report_failure(message, trace)
    if dist.world_size() > 1:
        # Not by sys.exit: destructors of a broken process group may hang, and torchrun would wait for this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code

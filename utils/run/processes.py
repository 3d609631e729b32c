"""The processes of a run: process group, GPUs, memory allocator."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import warnings
from datetime import timedelta

from utils.base import dist
from utils.base.errors import ConfigError

# Options of mallopt, malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def start_processes(backend: str, *, deepspeed: bool = False) -> None:
    """Join the process group where torchrun started several processes, and quiet the libraries."""
    # The tokenizer's threads are used before data workers are forked; without this each fork warns.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')
    # A kernel for each shape, about half a MiB: of rows laid end to end hardly two batches have the same.
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '256')
    import torch
    import transformers

    if not torch.cuda.is_available():
        _reuse_freed_memory()
    transformers.logging.set_verbosity_error()
    # peft reads a property that transformers 5 deprecates and imports torchao, which looks for what it does not need.
    warnings.filterwarnings('ignore', category=FutureWarning, module='transformers')
    for name in ('bitsandbytes', 'torchao', 'torch.utils._pytree'):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    # DeepSpeed calls collectives by the names that torch deprecates.
    warnings.filterwarnings('ignore', category=FutureWarning, module='torch.distributed')
    if not dist.is_main():
        transformers.logging.disable_progress_bar()
    if torch.cuda.is_available():
        _take_gpus(torch.cuda.device_count())
    if dist.world_size() > 1:
        # For ranks that are slow, as in generation; one that died is seen by torchrun and by its closed connections.
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    if deepspeed:
        import deepspeed as engine

        # Weights are sharded while they are read, before the trainer would join: it must know the world by then.
        engine.init_distributed(dist_backend=backend, verbose=False)


def _take_gpus(gpus: int) -> None:
    import torch

    own = dist.own_gpus(gpus)
    if not own:
        raise ConfigError(f'{dist.local_world_size()} processes for {gpus} GPUs: each needs its own. Start {gpus}.')
    torch.cuda.set_device(own[0])
    if len(own) > 1 and dist.world_size() > 1:
        # accelerate would refuse a model spread over GPUs in several processes, and take GPU local_rank for each.
        os.environ['ACCELERATE_BYPASS_DEVICE_MAP'] = 'true'
        os.environ['ACCELERATE_TORCH_DEVICE'] = f'cuda:{own[0]}'


def _reuse_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensor instead of returning it, which costs page faults each time.

    Attention of 200 tokens takes a third of the time then. Whoever sets a MALLOC_ variable keeps their own settings.
    """
    if platform.libc_ver()[0] != 'glibc' or any(name.startswith('MALLOC_') for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
        libc.mallopt(option, value)

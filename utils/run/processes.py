"""Sets up the processes of a run: the process group, the GPUs and the memory allocator."""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from datetime import timedelta
from pathlib import Path

from utils.base import device, dist
from utils.base.errors import ConfigError
from utils.base.garbage import freeze_imported
from utils.base.logger import logger, shows_bars
from utils.base.packages import leave_out
from utils.cli.arguments import CommonArguments, SftArguments
from utils.cli.ranges import is_of_bitsandbytes
from utils.cli.scores import own_words
from utils.data.sources import parse_source
from utils.loading.folder import read_config
from utils.loading.info import ModelInfo

# The programs: in a process of such a file, nothing runs after the program.
_PROGRAMS = ('llm_sft.py', 'llm_infer.py')
_OF_TORCHAO = ('adamw_torch_4bit', 'adamw_torch_8bit')
# Options of mallopt, from malloc.h.
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_MAX = -4


def start_processes(backend: str, *, deepspeed: bool = False, deterministic: bool | None = None) -> None:
    """Prepare this process for training or inference: choose its GPUs, and silence warnings of libraries.

    If torchrun started several processes, this process also joins the process group, and exchanges tensors by
    `backend`, a backend of torch.distributed. Raises ConfigError if there are more processes than GPUs. `deterministic`
    is the argument of torch.use_deterministic_algorithms. None leaves the setting of torch as it is.
    """
    _set_up_memory_of_gpus()
    if deterministic:
        # cuBLAS reads it when it starts. With this amount of workspace its results do not depend on the timing.
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    # The tokenizer uses threads before data workers are forked. Without this setting, it warns at each fork.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')
    # oneDNN caches one kernel of about 0.5 MiB per shape, and padding-free batches almost never repeat a shape.
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '256')
    is_first = 'torch' not in sys.modules
    import torch
    import transformers

    if is_first:  # else the objects of an earlier run in this process would never be freed
        freeze_imported()
    if deterministic is not None:
        torch.use_deterministic_algorithms(deterministic)
        # Memory is always written before it is read here, so filling it first would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.kind() == 'cpu':
        _reuse_freed_memory()
    transformers.logging.set_verbosity_error()
    # peft reads a property that transformers 5 deprecates. It also imports torchao, and torchao warns about optional
    # packages.
    warnings.filterwarnings('ignore', category=FutureWarning, module='transformers')
    for name in ('bitsandbytes', 'torchao', 'torch.utils._pytree'):
        logging.getLogger(name).setLevel(logging.ERROR)  # of all loggers below it, too
    # DeepSpeed calls collective operations by names that torch deprecates.
    warnings.filterwarnings('ignore', category=FutureWarning, module='torch.distributed')
    if not shows_bars():
        transformers.logging.disable_progress_bar()

    _log_device()
    own = range(0)
    if device.kind() != 'cpu':
        own = _take_gpus(device.count())
    if dist.world_size() > 1:
        # nccl would otherwise guess the GPU of each process at the first collective operation. A process with several
        # GPUs exchanges tensors on all of them, which nccl refuses if it is told one.
        bound = torch.device(device.torch_name(own[0])) if backend == 'nccl' and len(own) == 1 else None
        # The timeout is long enough for slow ranks, e.g. during generation. A rank that died is noticed earlier,
        # because its connections close.
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30), device_id=bound)
    if deepspeed:
        import deepspeed as engine

        # ZeRO-3 shards weights while they are read, so DeepSpeed must be ready before the trainer would prepare it.
        engine.init_distributed(dist_backend=backend, verbose=False)


def leave_out_unused(args: CommonArguments, info: ModelInfo, weights: Path) -> None:
    """Hide optional packages that this run does not use from all later imports, so that the run starts faster.

    `weights` is the folder or the file of the base model. Packages are hidden only if llm_sft.py or llm_infer.py is the
    main program. Any other program could later do another run in the same process, and that run could need the hidden
    packages. Nothing is hidden if --score names a function of the user, because the function could import any package.
    """
    # Functions of the user that return data sets need no such exception: they have imported their packages by now.
    program = getattr(sys.modules['__main__'], '__file__', None)
    if program is None or Path(program).name not in _PROGRAMS or own_words(args.score):
        return

    optim = args.optim if isinstance(args, SftArguments) else ''
    config = read_config(weights) if (weights / 'config.json').is_file() else {}
    is_packed = info.quantization is not None or 'quantization_config' in config
    used = {
        'deepspeed': isinstance(args, SftArguments) and args.deepspeed_config_path is not None,
        'bitsandbytes': is_packed or bool(args.quantization_bit) or is_of_bitsandbytes(optim),
        'torchao': is_packed or optim in _OF_TORCHAO,
        'gptqmodel': is_packed,
        'optimum': is_packed,
        # transformers imports it only to recognise its data sets. A function of the user may import it again.
        'datasets': any(parse_source(word).is_users_function for words in args.datasets_read() for word in words),
    }
    leave_out(name for name, is_used in used.items() if not is_used)


def _log_device() -> None:
    """Log which kind of device computes, and why. Warn if the machine has a device that torch cannot use."""
    used = device.kind()
    logger.info(f'device = {used} because {device.reason()}')
    seen = dist.visible_kind()
    if used == 'cpu' and seen != 'cpu':
        logger.warning(
            f'this machine has a device of kind {seen}, but {device.reason()}, so the CPU computes. Install a build of '
            f'torch and a driver for {seen}; --doctor true tests them.'
        )


def _set_up_memory_of_gpus() -> None:
    """Make torch use expandable memory segments on GPUs of NVIDIA and AMD, on Linux.

    Call this function before torch starts CUDA.

    Batches differ in length, so segments of fixed sizes would fragment the memory. If the environment already
    configures the allocator, nothing is changed.
    """
    if dist.visible_kind() != 'cuda' or not sys.platform.startswith('linux'):
        return
    if not {'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'} & os.environ.keys():
        os.environ['PYTORCH_ALLOC_CONF'] = 'expandable_segments:True'


def _take_gpus(gpus: int) -> range:
    """Make the first GPU of this process the current one, and return the indices of all its GPUs.

    Raises ConfigError if there are more processes than GPUs.
    """
    own = dist.own_gpus(gpus)
    if not own:
        raise ConfigError(
            f'torchrun: {dist.local_world_size()} processes for {gpus} GPUs, and each process needs its own GPU. '
            f'Use --nproc_per_node {gpus} or less.'
        )
    device.use(own[0])
    if len(own) > 1 and dist.world_size() > 1:
        # Here each of several processes spreads its model over several GPUs. Without the first variable accelerate
        # refuses such a model; without the second it would use the GPU with the number local_rank.
        os.environ['ACCELERATE_BYPASS_DEVICE_MAP'] = 'true'
        os.environ['ACCELERATE_TORCH_DEVICE'] = device.torch_name(own[0])
    return own


def _reuse_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensor. New memory from the system is slow (page faults).

    This makes attention over 200 tokens three times as fast. If an environment variable MALLOC_... is set, nothing is
    changed.
    """
    if platform.libc_ver()[0] != 'glibc' or any(name.startswith('MALLOC_') for name in os.environ):
        return
    import ctypes

    libc = ctypes.CDLL(None)
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
        libc.mallopt(option, value)

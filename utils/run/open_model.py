"""The first heavy step of both programs: processes, random state, and the model opened as the arguments say."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import platform
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.base.errors import ConfigError, Stopped
from utils.base.logger import logger
from utils.cli.arguments import CommonArguments, SftArguments
from utils.cli.resolution import Decide, log_decision
from utils.cli.resolve import quantized_problems
from utils.loading.devices import Spread
from utils.model import (
    LoadOptions,
    ModelInfo,
    Weights,
    get_model_tokenizer,
    has_package,
    pick_dtype,
    stored_quantization,
)

if TYPE_CHECKING:
    import torch

# Options of mallopt, malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


# How long a process that is not the cause of a failure stays silent, for torchrun to end it.
_GRACE_SECONDS = 10
# What gloo and nccl say when another process is gone.
_LOST_PEER = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'third_party/gloo', 'NCCL error')


def run_program(story: Callable[[], int | None]) -> int:
    """Run a program's story and return its exit code.

    2: something the user can fix, every problem listed; 128 + n: ended by signal n (130 Ctrl-C, 143 SIGTERM).
    """
    from utils.base.logger import set_up_logging, show_what_can_be_shown

    show_what_can_be_shown()
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
    own = Path(__file__).parent.parent / '.venv' / 'bin' / 'python'
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


def open_model(
    args: CommonArguments, info: ModelInfo, weights: Weights, *, trains: bool, decide: Decide = log_decision
) -> tuple[Any, Any, Any]:
    """Return (model, tokenizer, torch dtype). Full fine-tuning holds fp32 weights under autocast.

    `decide` is told what was left to the machine.
    """
    import torch

    # What was downloaded may be quantised without an entry that says so.
    stored = stored_quantization(weights.path) if info.quantization is None else None
    if problems := quantized_problems(args, replace(info, quantization=info.quantization or stored)):
        raise ConfigError(*problems)
    dtype, reason = pick_dtype(args.dtype)
    names = {torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.float32: 'fp32'}
    if args.dtype is None:
        decide('dtype', names[dtype], reason)
    if args.quantization_bit == 4 and args.bnb_4bit_comp_dtype is None:
        decide('bnb_4bit_comp_dtype', names[dtype], 'it follows the dtype')
    held = dtype
    sharding = isinstance(args, SftArguments) and (args.fsdp or args.deepspeed_config_path is not None)
    if trains and args.sft_type == 'full' and dtype != torch.float32 and not _deepspeed_path(args):
        held = torch.float32
        logger.info(f'weights are held in float32 and computed in {str(dtype).removeprefix("torch.")}: 16 bytes per '
                    'parameter with gradient and AdamW state')  # fmt: skip
    options = LoadOptions(
        torch_dtype=held,
        device_map=None if sharding else _device_map(args, info, held, trains=trains),
        flash_attention=_uses_flash_attention(args, dtype, decide),
        quantization_config=_quantization(args, dtype),
        distributed_config=_fully_sharded(args, held, dtype),
    )
    alive = _zero_3(args)  # as long as weights are read, transformers shards them by this configuration
    with contextlib.redirect_stdout(sys.stderr):  # gptqmodel prints there, where answers go
        model, tokenizer = get_model_tokenizer(info, weights, options)
    del alive
    return model, tokenizer, dtype


def _device_map(args: CommonArguments, info: ModelInfo, held: torch.dtype, *, trains: bool) -> Any:
    import torch

    if not torch.cuda.is_available():
        return None
    own = dist.own_gpus(torch.cuda.device_count())
    if len(own) == 1:
        return {'': own[0]}
    # Full fine-tuning holds a gradient per parameter as well; a tenth stays free for activations.
    width = held.itemsize * (2 if trains and args.sft_type == 'full' else 1)
    bits = args.quantization_bit or (4 if info.quantization else 8 * width)
    memory = {gpu: int(0.9 * torch.cuda.mem_get_info(gpu)[0]) for gpu in own}
    must_fit = trains or dist.world_size() > 1
    return Spread(memory=memory, parameter_bytes=width, linear_bytes=bits / 8, must_fit=must_fit)


def _deepspeed_path(args: CommonArguments) -> str | None:
    return args.deepspeed_config_path if isinstance(args, SftArguments) else None


def _fully_sharded(args: CommonArguments, held: torch.dtype, dtype: torch.dtype) -> Any:
    if not (isinstance(args, SftArguments) and args.fsdp):
        return None
    import torch
    from transformers.distributed import DistributedConfig

    if dtype == torch.float16:
        raise ConfigError('--fsdp true needs bf16 or fp32, this GPU has no bf16. Use --dtype fp32 or DeepSpeed.')
    return DistributedConfig(fsdp_size=dist.world_size(), fsdp_mixed_precision=held != dtype)


def _zero_3(args: CommonArguments) -> Any:
    path = _deepspeed_path(args)
    config = json.loads(Path(path).read_text(encoding='utf-8')) if path else {}
    if not isinstance(args, SftArguments) or config.get('zero_optimization', {}).get('stage') != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    batch = args.batch_size, args.gradient_accumulation_steps
    config.update(train_micro_batch_size_per_gpu=batch[0], gradient_accumulation_steps=batch[1])
    config['train_batch_size'] = batch[0] * batch[1] * dist.world_size()
    return HfDeepSpeedConfig(config)


def _uses_flash_attention(args: CommonArguments, dtype: torch.dtype, decide: Decide) -> bool:
    import torch

    fits = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8 and dtype != torch.float32
    if args.use_flash_attn and not fits:
        raise ConfigError(
            '--use_flash_attn true needs an NVIDIA GPU of compute capability 8 or more and bf16 or fp16. Leave it out.'
        )
    if args.use_flash_attn is not None:
        return args.use_flash_attn
    if not fits:
        reason = 'it needs an NVIDIA GPU of compute capability 8 or more and bf16 or fp16'
    elif has_package('flash_attn'):
        reason = 'it is installed and the GPU supports it'
    else:
        reason = 'flash-attn is not installed'
    uses = fits and has_package('flash_attn')
    decide('use_flash_attn', uses, reason)
    return uses


def _quantization(args: CommonArguments, dtype: torch.dtype) -> Any:
    if not args.quantization_bit:
        return None
    from transformers import BitsAndBytesConfig

    if args.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute, _ = pick_dtype(args.bnb_4bit_comp_dtype) if args.bnb_4bit_comp_dtype else (dtype, '')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
    )

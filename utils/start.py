"""The first heavy step of both programs: processes, random state, and the model opened as the arguments say."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from utils import dist
from utils.argument import CommonArguments
from utils.errors import ConfigError
from utils.logger import logger
from utils.model import (
    LoadOptions,
    ModelInfo,
    Weights,
    get_model_tokenizer,
    has_package,
    pick_dtype,
    stored_quantization,
)
from utils.resolve import quantized_problems

if TYPE_CHECKING:
    import torch


def run_program(story: Callable[[], None]) -> int:
    """Run a program's story and return its exit code: 2 with every problem listed for what the user can fix."""
    from utils.logger import set_up_logging

    set_up_logging()
    # Read once, when the library is imported: no usage figures are sent.
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    try:
        story()
    except ConfigError as error:
        for problem in error.problems:
            logger.error(problem)
        return 2
    except UnpicklingError:  # whose text says how to run it all the same
        logger.error(
            'a file of the model or of the checkpoint that is resumed is damaged, or holds more than tensors. '
            'That would be code, which is never run. Get it as safetensors, or start without it.'
        )
        return 2
    except KeyboardInterrupt:
        logger.error('stopped by Ctrl-C')
        return 130
    return 0


def start_processes(backend: str) -> None:
    """Join the process group where torchrun started several processes, and quiet the libraries."""
    # The tokenizer's threads are used before data workers are forked; without this each fork warns.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    # peft reads a property that transformers 5 deprecates and imports torchao, which looks for what it does not need.
    warnings.filterwarnings('ignore', category=FutureWarning, module='transformers')
    for name in ('bitsandbytes', 'torchao', 'torch.utils._pytree'):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    if not dist.is_main():
        transformers.logging.disable_progress_bar()
    if dist.world_size() > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.local_rank())
        torch.distributed.init_process_group(backend)


def open_model(args: CommonArguments, info: ModelInfo, weights: Weights, *, trains: bool) -> tuple[Any, Any, Any]:
    """Return (model, tokenizer, torch dtype). Full fine-tuning holds fp32 weights under autocast."""
    import torch

    # What was downloaded may be quantised without an entry that says so.
    stored = stored_quantization(weights.path) if info.quantization is None else None
    if problems := quantized_problems(args, replace(info, quantization=info.quantization or stored)):
        raise ConfigError(*problems)
    dtype, reason = pick_dtype(args.dtype)
    logger.info(f'dtype = {str(dtype).removeprefix("torch.")} because {reason}')
    held = dtype
    if trains and args.sft_type == 'full' and dtype != torch.float32:
        held = torch.float32
        logger.info(f'weights are held in float32 and computed in {str(dtype).removeprefix("torch.")}: 16 bytes per '
                    'parameter with gradient and AdamW state')  # fmt: skip
    options = LoadOptions(
        torch_dtype=held,
        device_map=_device_map(args, trains=trains),
        flash_attention=_uses_flash_attention(args, dtype),
        quantization_config=_quantization(args, dtype),
    )
    with contextlib.redirect_stdout(sys.stderr):  # gptqmodel prints there, where answers go
        model, tokenizer = get_model_tokenizer(info, weights, options)
    return model, tokenizer, dtype


def _device_map(args: CommonArguments, *, trains: bool) -> Any:
    import torch

    if not torch.cuda.is_available() or getattr(args, 'deepspeed_config_path', None):
        return None
    if dist.world_size() > 1:
        return {'': dist.local_rank()}
    return 'auto' if torch.cuda.device_count() > 1 else {'': 0}


def _uses_flash_attention(args: CommonArguments, dtype: torch.dtype) -> bool:
    import torch

    fits = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8 and dtype != torch.float32
    if args.use_flash_attn and not fits:
        raise ConfigError(
            '--use_flash_attn true needs an NVIDIA GPU of compute capability 8 or more and bf16 or fp16. Leave it out.'
        )
    return bool(args.use_flash_attn is not False and fits and has_package('flash_attn'))


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

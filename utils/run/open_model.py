"""Finds the base weights, and opens the model and its encoder, for both programs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from utils.base import device, dist
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.packages import has_package
from utils.cli.arguments import CommonArguments, SftArguments
from utils.cli.deepspeed import read_zero
from utils.cli.machine import check_chat_template
from utils.cli.resolution import Decide, Ready, log_decision
from utils.cli.resolve_common import quantized_problems
from utils.loading.chat_template import set_chat_template
from utils.loading.devices import Spread, pick_dtype
from utils.loading.folder import stored_quantization
from utils.loading.info import LoadOptions, ModelInfo
from utils.loading.new_tokens import mark_special
from utils.loading.opening import get_model_tokenizer, unembedded_from
from utils.loading.template_settings import parse_settings
from utils.loading.weights import Weights, locate

if TYPE_CHECKING:
    import torch

    from utils.encode.encoder import Encoder
    from utils.loading.image_processors import Images


def find_weights(done: Ready[Any]) -> Weights:
    """Return the location of the base weights on this machine, and log it. Missing weights are downloaded first.

    Raises ConfigError if --chat_template or --template_settings cannot be used with these weights.
    """
    weights = locate(done.info, revision=done.args.model_revision, hub_name=done.args.hub)
    logger.info(f'base weights = {weights.path} because {weights.reason}')
    check_chat_template(done.args, weights.path)
    return weights


def set_template(args: CommonArguments, tokenizer: Any) -> None:
    """Give the tokenizer the chat template of --chat_template and --template_settings, if they are given."""
    set_chat_template(tokenizer, args.chat_template, parse_settings(args.template_settings or ()))


def open_encoder(
    args: CommonArguments,
    tokenizer: Any,
    *,
    system_typed: bool,
    model: Any = None,
    images: Images | None = None,
    cuts: bool = True,
    new_ids: Collection[int] = (),
) -> Encoder:
    """Return the encoder (the object that converts rows to token ids) for these arguments.

    The tokenizer gets the chat template that the arguments name. `system_typed` says whether the user typed --system.
    With --template_type auto, only a typed --system is used.

    If `model` is given, rows with token ids outside of the model's embedding are refused. If `cuts` is False, rows may
    be longer than --max_length. `new_ids` are the ids of new tokens (--new_tokens). Those that end a turn become
    special tokens. `images` is given for a model that accepts images.
    """
    from utils.encode.make import make_encoder  # not before a model is open: --help does without it

    set_template(args, tokenizer)
    encoder = make_encoder(
        tokenizer,
        template_type=str(args.template_type),
        system=args.system,
        system_typed=system_typed,
        max_length=args.max_length if cuts else -1,
        images=images,
        loss_scope=args.loss_scope,
        overlong=args.overlong,
        embedding=None if model is None else unembedded_from(model, tokenizer),
    )
    mark_special(tokenizer, sorted(set(encoder.stop_ids).intersection(new_ids)))
    return encoder


def open_model(
    args: CommonArguments, info: ModelInfo, weights: Weights, *, trains: bool, decide: Decide = log_decision
) -> tuple[Any, Any, Any]:
    """Return (model, tokenizer, dtype of the computation).

    For full fine-tuning with a 16-bit dtype, the weights are in fp32, and autocast computes in the 16-bit dtype. With
    --full_weights bf16, the weights are in bf16. With DeepSpeed, the weights have the dtype of the computation, and
    DeepSpeed itself keeps fp32 weights. `decide` is called for the dtypes and for flash-attn if their flags are not
    set. Raises ConfigError if a flag does not fit the weights or the device.
    """
    import torch

    # Downloaded weights may be quantised although the registry entry of the model does not say so.
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
    if trains and isinstance(args, SftArguments) and args.sft_type == 'full' and not args.deepspeed_config_path:
        held = _held_dtype(args, dtype)

    shards = isinstance(args, SftArguments) and (args.fsdp or args.deepspeed_config_path is not None)
    options = LoadOptions(
        torch_dtype=held,
        device_map=None if shards else _device_map(args, info, held, trains=trains),
        flash_attention=_uses_flash_attention(args, dtype, decide),
        quantization_config=_quantization(args, dtype),
        distributed_config=_fully_sharded(args, held, dtype),
    )
    zero_3 = _zero_3(args)  # as long as this object exists, transformers shards the weights while it reads them
    with contextlib.redirect_stdout(sys.stderr):  # gptqmodel prints to stdout, but stdout is reserved for answers
        model, tokenizer = get_model_tokenizer(info, weights, options)
    del zero_3
    return model, tokenizer, dtype


def _held_dtype(args: SftArguments, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the weights in full fine-tuning. `dtype` is the dtype of the computation."""
    import torch

    if args.full_weights == 'bf16':
        logger.info('weights are stored in bfloat16 and rounded stochastically: 10 bytes per parameter with gradient '
                    'and AdamW state')  # fmt: skip
        return torch.bfloat16
    if dtype != torch.float32:
        logger.info(f'weights are stored in float32, and the model computes in {str(dtype).removeprefix("torch.")}: '
                    '16 bytes per parameter with gradient and AdamW state')  # fmt: skip
    return torch.float32


def _device_map(args: CommonArguments, info: ModelInfo, held: torch.dtype, *, trains: bool) -> Any:
    if device.kind() == 'cpu':
        return None
    own = dist.own_gpus(device.count())
    if len(own) == 1:
        return {'': device.address(own[0])}

    # Full fine-tuning also holds a gradient for each parameter. A tenth of the memory stays free for activations.
    width = held.itemsize * (2 if trains and args.sft_type == 'full' else 1)
    stored_bits = 4 if info.quantization else 8 * width
    bits = args.quantization_bit or stored_bits
    memory = {device.address(gpu): int(0.9 * device.memory(gpu)[0]) for gpu in own}
    must_fit = trains or dist.world_size() > 1
    return Spread(memory=memory, parameter_bytes=width, linear_bytes=bits / 8, must_fit=must_fit)


def _fully_sharded(args: CommonArguments, held: torch.dtype, dtype: torch.dtype) -> Any:
    if not (isinstance(args, SftArguments) and args.fsdp):
        return None
    import torch
    from transformers.distributed import DistributedConfig

    if dtype == torch.float16:
        raise ConfigError(
            '--fsdp true: it needs bf16 or fp32, and this GPU has no bf16. Use --dtype fp32, or use '
            '--deepspeed_config_path ds_config/zero3.json instead of --fsdp.'
        )
    return DistributedConfig(fsdp_size=dist.world_size(), fsdp_mixed_precision=held != dtype)


def _zero_3(args: CommonArguments) -> Any:
    """Return an HfDeepSpeedConfig. While this object exists, transformers shards the weights that it reads.

    Returns None if ZeRO stage 3 is not used.
    """
    if not isinstance(args, SftArguments) or args.deepspeed_config_path is None:
        return None
    zero = read_zero(args.deepspeed_config_path)
    if zero.stage != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    sizes = {
        'train_micro_batch_size_per_gpu': args.batch_size,
        'gradient_accumulation_steps': args.gradient_accumulation_steps,
        'train_batch_size': args.batch_size * args.gradient_accumulation_steps * dist.world_size(),
    }
    return HfDeepSpeedConfig({**zero.content, **sizes})


def _uses_flash_attention(args: CommonArguments, dtype: torch.dtype, decide: Decide) -> bool:
    import torch

    fits = device.has_flash_attention() and dtype != torch.float32
    if args.use_flash_attn and not fits:
        raise ConfigError(
            '--use_flash_attn true: it needs a GPU (AMD, or NVIDIA of compute capability 8 or more), and bf16 or fp16. '
            'Leave --use_flash_attn out.'
        )
    if args.use_flash_attn is not None:
        return args.use_flash_attn

    if not fits:
        reason = 'it needs a GPU (AMD, or NVIDIA of compute capability 8 or more), and bf16 or fp16'
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

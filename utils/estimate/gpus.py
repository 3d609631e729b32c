"""From the flags of a run to what it asks of each device, which GPUs that fits on, and how long it would take there."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from utils.cli.arguments import SftArguments
from utils.cli.deepspeed import ZeroConfig, read_zero
from utils.estimate.memory import GIB, Batch, Footprint, Mode, footprint
from utils.estimate.model_shape import Shape
from utils.loading.info import ModelInfo
from utils.loading.layers import ALL, native_names

# What a GPU needs beside tensors: the context and workspaces of the libraries, and what lies between blocks in use.
_CONTEXT, _FRAGMENTED = GIB, 0.05
# Share of the peak at which a training step multiplies: an assumption, no measurement.
UTILISATION = 0.4
_WIDTHS = {'bf16': 2, 'fp16': 2, 'fp32': 4}
_UNBOUNDED = 2048
# Values that optimizers keep of each parameter, by the beginning of their names.
_STATES = {'adamw': 2, 'ademamix': 3, 'lion': 1, 'rmsprop': 1, 'adagrad': 1, 'sgd': 0, 'adafactor': 0}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How a run is started: processes, GPUs of each, and whether there are GPUs."""

    processes: int = 1
    devices: int = 1
    gpu: bool = True


def mode_of(args: SftArguments, info: ModelInfo, shape: Shape, machine: Machine) -> Mode:
    """Return what of resolved arguments decides the memory of a run."""
    packed = _packing(args, info)
    zero = read_zero(args.deepspeed_config_path) if args.deepspeed_config_path else ZeroConfig(content={})
    sharding = f'zero{zero.stage}' if zero.stage in (2, 3) else ''
    if args.fsdp:
        sharding = 'fsdp'
    whole = sharding not in ('fsdp', 'zero3')
    return Mode(
        full=args.sft_type == 'full',
        compute=_WIDTHS[args.dtype or 'bf16'],
        packed=packed,
        targets=tuple(targets_of(args, info, shape)),
        rank=args.lora_rank,
        fused_norms=args.fused_norms and whole,
        optimizer_bytes=optimizer_bytes(args.optim),
        fused_mlp=args.fused_mlp and whole,
        fused=args.tuner_backend == 'swift' and whole and not packed and not args.lora_dropout_p,
        checkpointing=args.gradient_checkpointing,
        accumulates=args.gradient_accumulation_steps > 1,
        laid=args.padding_free is not False and shape.attention == 'rows' and whole,
        chunked=args.chunked_loss and whole,
        gpu=machine.gpu,
        sharding=sharding,
        offloads_optimizer=zero.offloads_optimizer,
        offloads_weights=zero.offloads_weights,
        processes=machine.processes,
        devices=machine.devices,
    )


def optimizer_bytes(name: str) -> int:
    """Return the bytes that an optimizer of --optim keeps of each trained parameter."""
    return _STATES[name.removeprefix('paged_').split('_')[0]] * (1 if '8bit' in name else 4)


def _packing(args: SftArguments, info: ModelInfo) -> str:
    if info.quantization == 'gptq':
        return 'gptq8' if 'int8' in info.model_id_or_path.lower() else 'gptq4'
    if args.quantization_bit == 8:
        return 'int8'
    if args.quantization_bit == 4:
        return 'nf4x2' if args.bnb_4bit_use_double_quant else 'nf4'
    return 'nf4' if info.quantization else ''


def targets_of(args: SftArguments, info: ModelInfo, shape: Shape) -> list[str]:
    """Return the names of layers that LoRA is on, none for full fine-tuning."""
    if args.sft_type == 'full':
        return []
    named = args.lora_target_modules or list(info.lora_target_modules)
    wanted = native_names([name for name in named if name != ALL], shape.linear)
    return list(dict.fromkeys([*wanted, *(shape.linear if ALL in named else ())]))


def longest_batch(args: SftArguments) -> Batch:
    """Return the heaviest batch that --max_length allows, for data that is not here; every token trained."""
    length = args.max_length if args.max_length > 0 else _UNBOUNDED
    tokens = args.batch_size * length
    return Batch(tokens=tokens, longest=length, trained=tokens)


def known_gpus() -> list[tuple[str, int, int]]:
    """Return name, GiB and peak of dense bf16 products (T4, V100: fp16) in TFLOP/s of GPUs, by the makers' sheets."""
    return [tuple(gpu) for gpu in json.loads(Path(__file__).with_name('gpus.json').read_text(encoding='utf-8'))]


def need(found: Footprint) -> float:
    """Return the GiB that a GPU must have for a footprint."""
    return (found.peak * (1 + _FRAGMENTED) + _CONTEXT) / GIB


def gpus_that_fit(shape: Shape, mode: Mode, batch: Batch) -> list[str]:
    """Return the names of the known GPUs whose memory is enough, each of as many as the mode has devices."""
    wanted = need(footprint(shape, replace(mode, gpu=True), batch))
    return [name for name, memory, _ in known_gpus() if memory >= wanted]


def flops(shape: Shape, mode: Mode, tokens: int) -> float:
    """Return the multiplications and additions of training on these tokens, those between tokens left out.

    2 per parameter and token forward, 2 back to the activations, 2 to the weights where all are trained, and 2 where
    the forward pass is done twice.
    """
    return (4 + 2 * mode.full + 2 * mode.checkpointing) * float(shape.active) * tokens


def seconds(work: float, tera: float, devices: int) -> float:
    """Return how long a GPU of this peak takes for its share; layers spread over GPUs work one after another."""
    return work / (tera * 1e12 * UTILISATION * devices)

"""Computes from the flags of a run which GPUs have enough memory for the run, and how long it takes on these GPUs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.cli.deepspeed import ZeroConfig, read_zero
from utils.estimate.memory import GIB, Batch, Footprint, Mode, footprint
from utils.estimate.model_shape import Shape
from utils.loading.info import ModelInfo
from utils.loading.layers import ALL, choose_layers, named_by, no_layer
from utils.run.new_tokens import find_new_tokens

# GPU memory that is needed in addition to the tensors: the bytes of the CUDA context and of library workspaces, and the
# share of the tensors' memory that is lost to fragmentation.
_CONTEXT = GIB
_FRAGMENTED = 0.05
# Share of the peak FLOP/s that a training step reaches. The value is assumed and was not measured.
UTILISATION = 0.4
# Bytes of a value in each dtype.
_WIDTHS = {'bf16': 2, 'fp16': 2, 'fp32': 4}
# The number of tokens per row that is assumed if --max_length is -1.
_UNBOUNDED = 2048
# Number of values that an optimizer keeps per parameter. The key is the first part of the optimizer's name.
_STATES = {'adamw': 2, 'ademamix': 3, 'lion': 1, 'rmsprop': 1, 'adagrad': 1, 'sgd': 0, 'adafactor': 0}

# Bytes per parameter of the optimizer of --full_weights bf16: the first moment in bf16 and the second one in fp32.
_BF16_ADAMW = 6
# The quantisations (keys of PACKED) of layers whose adapters are computed in one step, see fast/lora.py.
_FUSED_PACKING = ('', 'nf4', 'nf4x2', 'gptq4', 'gptq8')


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The number of processes of a run, the devices of each process, and whether the devices are GPUs."""

    processes: int = 1
    devices: int = 1
    gpu: bool = True


def mode_of(args: SftArguments, info: ModelInfo, shape: Shape, machine: Machine) -> Mode:
    """Return the settings of a run that determine how much memory it needs. If --dtype is not set, bf16 is assumed.

    Raises ConfigError if the DeepSpeed config cannot be read, or if a word of --lora_target_modules matches nothing.
    """
    packed = _packing(args, info)
    zero = read_zero(args.deepspeed_config_path) if args.deepspeed_config_path else ZeroConfig(content={})
    sharding = f'zero{zero.stage}' if zero.stage in (2, 3) else ''
    if args.fsdp:
        sharding = 'fsdp'
    # The fast path works only if each process has the whole weights.
    bf16_weights = args.sft_type == 'full' and args.full_weights == 'bf16'
    whole = sharding not in ('fsdp', 'zero3')
    return Mode(
        full=args.sft_type == 'full',
        trained=2 if bf16_weights else 4,
        compute=_WIDTHS[args.dtype or 'bf16'],
        packed=packed,
        targets=tuple(targets_of(args, info, shape)),
        rank=args.lora_rank,
        dora=args.sft_type == 'lora' and args.use_dora,
        **_saved(args, shape),
        fused_norms=args.fused_norms and whole,
        optimizer_bytes=_BF16_ADAMW if bf16_weights else optimizer_bytes(args.optim),
        fused_mlp=args.fused_mlp and whole,
        fused=args.tuner_backend == 'swift'
        and whole
        and packed in _FUSED_PACKING
        and not args.lora_dropout_p
        and not args.use_dora,
        saves_weights=packed in ('gptq4', 'gptq8') and args.tuner_backend == 'peft',
        checkpointing=args.gradient_checkpointing,
        accumulates=args.gradient_accumulation_steps > 1,
        padding_free=args.padding_free is not False and shape.attention in ('rows', 'mixed') and whole,
        chunked=args.chunked_loss and whole,
        gpu=machine.gpu,
        sharding=sharding,
        offloads_optimizer=zero.offloads_optimizer,
        offloads_weights=zero.offloads_weights,
        processes=machine.processes,
        devices=machine.devices,
    )


def _saved(args: SftArguments, shape: Shape) -> dict[str, Any]:
    """Return {field of Mode: value} for the weights that are trained directly, besides the adapter.

    These are the layers of --lora_modules_to_save, and the rows of new tokens in embedding and head (--new_tokens).
    Norms are left out, because they need little memory. For full fine-tuning, the dict is empty.
    """
    if args.sft_type == 'full':
        return {}
    words = args.lora_modules_to_save or []
    ends = {word.rpartition('.')[2] for word in words} & {'embed_tokens', 'lm_head'}
    both = bool(ends) and not shape.head
    trained = (both or 'embed_tokens' in ends, both or 'lm_head' in ends)
    tables = trained.count(False) - (not shape.head and not both)
    return {
        'trains_embedding': trained[0],
        'trains_head': trained[1],
        'token_rows': len(find_new_tokens(args)) * shape.hidden * tables,
        'saved': tuple(word for word in words if named_by([word], shape.paths)),
    }


def optimizer_bytes(name: str) -> int:
    """Return the number of bytes that an optimizer keeps per trained parameter. `name` is a value of --optim."""
    states = _STATES[name.removeprefix('paged_').split('_')[0]]
    return states * (1 if '8bit' in name else 4)


def _packing(args: SftArguments, info: ModelInfo) -> str:
    if info.quantization == 'gptq':
        return 'gptq8' if 'int8' in info.model_id_or_path.lower() else 'gptq4'
    if args.quantization_bit == 8:
        return 'int8'
    if args.quantization_bit == 4:
        return 'nf4x2' if args.bnb_4bit_use_double_quant else 'nf4'
    return 'nf4' if info.quantization else ''


def targets_of(args: SftArguments, info: ModelInfo, shape: Shape) -> list[str]:
    """Return the layers and stacked experts that LoRA adapts, by name or path. For full fine-tuning the list is empty.

    Raises ConfigError if a word of --lora_target_modules names neither a layer nor an expert. Layers of a vision tower
    are not known here, so nothing is raised for a model with a vision tower.
    """
    if args.sft_type == 'full':
        return []
    paths = list(shape.paths)
    chosen, unmatched = choose_layers(args.lora_target_modules or info.lora_target_modules, paths)

    experts = [name for word in unmatched for name in shape.stacked if f'.{name}'.endswith(f'.{word}')]
    missing = [
        word for word in unmatched if word not in ALL and not any(f'.{name}'.endswith(f'.{word}') for name in experts)
    ]
    if missing and not shape.tower:
        raise ConfigError(*(no_layer(word, shape.model_class, paths, list(shape.stacked)) for word in missing))
    return [*chosen, *experts]


def longest_batch(args: SftArguments) -> Batch:
    """Return the batch in which every row has --max_length tokens and every token is trained. No data is read."""
    length = args.max_length if args.max_length > 0 else _UNBOUNDED
    tokens = args.batch_size * length
    return Batch(tokens=tokens, longest=length, trained=tokens)


def known_gpus() -> list[tuple[str, int, int]]:
    """Return the known GPUs as (name, memory in GiB, peak in TFLOP/s).

    The peak is the speed of dense bf16 matrix products, from the data sheet. T4 and V100 have no bf16, so the speed of
    fp16 is given.
    """
    return [tuple(gpu) for gpu in json.loads(Path(__file__).with_name('gpus.json').read_text(encoding='utf-8'))]


def need(found: Footprint) -> float:
    """Return how many GiB of memory a GPU must have for a run with the footprint `found`."""
    return (found.peak * (1 + _FRAGMENTED) + _CONTEXT) / GIB


def gpus_that_fit(shape: Shape, mode: Mode, batch: Batch) -> list[str]:
    """Return the names of the known GPUs that have enough memory for one device of the run."""
    wanted = need(footprint(shape, replace(mode, gpu=True), batch))
    return [name for name, memory, _ in known_gpus() if memory >= wanted]


def flops(shape: Shape, mode: Mode, tokens: int) -> float:
    """Return the number of floating-point operations of training on `tokens` tokens.

    A parameter that is used for a token costs 2 operations in the forward pass, 2 for the gradient of activations, 2
    for its own gradient (only in full fine-tuning), and 2 if gradient checkpointing repeats the forward pass. Attention
    scores, adapters and vision towers are not counted.
    """
    return (4 + 2 * mode.full + 2 * mode.checkpointing) * float(shape.active) * tokens


def seconds(work: float, tera: float, devices: int) -> float:
    """Return the seconds that GPUs with a peak of `tera` TFLOP/s need for `work` operations.

    `devices` is the number of GPUs that work at the same time. GPUs that share the layers of one process work one after
    the other, so they count as a single GPU.
    """
    return work / (tera * 1e12 * UTILISATION * devices)

"""What is trained: LoRA adapters or all weights; and how an adapter is put on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError, did_you_mean, told
from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Decide, log_decision
from utils.encode.image_slots import find_towers
from utils.loading.packed import packed_classes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL = 'ALL'
# Query, key and value projections as the native classes name them, for a model that has no entry.
_QKV_NAMES = (('q_proj', 'k_proj', 'v_proj'), ('qkv_proj',), ('query_key_value',), ('c_attn',), ('W_pack',))

# Names of the fused 2023 layouts that recipes hold, and the native layers they are.
_OLD_NAMES = {
    'c_attn': ('q_proj', 'k_proj', 'v_proj'),
    'W_pack': ('q_proj', 'k_proj', 'v_proj'),
    'query_key_value': ('q_proj', 'k_proj', 'v_proj'),
    # Both output layers of a Qwen have one name: the parent tells them apart.
    'attn.c_proj': ('o_proj',),
    'mlp.c_proj': ('down_proj',),
    'c_proj': ('o_proj', 'down_proj'),
    'dense': ('o_proj',),
    'w1': ('up_proj',),
    'w2': ('gate_proj',),
    'dense_h_to_4h': ('gate_up_proj',),
    'dense_4h_to_h': ('down_proj',),
}


def linear_names(model: PreTrainedModel, frozen: Sequence[str] = ()) -> Counter[str]:
    """Return the last name of every linear layer, packed or not, and how often it occurs.

    The output head is left out, and what is in the modules of `frozen`.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D, *packed_classes())
    head = model.get_output_embeddings()
    return Counter(
        _last_name(name)
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and not _is_in(name, frozen)
    )


def _last_name(name: str) -> str:
    """Return a module's last name, with its parent's where it is a mere number."""
    parts = name.split('.')
    return '.'.join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _is_in(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f'{module}.') for module in modules)


def expert_names(model: PreTrainedModel) -> Counter[str]:
    """Return the name below its layer of every 3-D parameter, in which experts are stacked, and how often it occurs."""
    return Counter(
        re.sub(r'^.*?\.\d+\.', '', name)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not name.endswith('.weight')  # the weight of a convolution
    )


def _taken_for_experts(model: PreTrainedModel, names: Counter[str]) -> set[str]:
    """Return the names of linear layers that PEFT rewrites, on some mixtures, to the experts that had them once.

    The layers themselves, a shared expert's gate_proj say, are then out of its reach:
    https://github.com/huggingface/peft, utils/transformers_weight_conversion.py.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, conversions=None)
    return set(names) - set(config.target_modules or ())


def find_targets(
    model: PreTrainedModel, wanted: list[str] | None, frozen: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the names of modules and of expert parameters that LoRA is put on, none in the modules of `frozen`.

    A parameter is named from its end, whole parts: experts.down_proj. Raises ConfigError where a name matches nothing.
    """
    names, experts = linear_names(model, frozen), expert_names(model)
    if wanted is None:
        wanted = next((list(group) for group in _QKV_NAMES if set(group) <= set(names)), [ALL])
    wanted = native_names([name for name in wanted if name != ALL], names) + [ALL] * (ALL in wanted)
    found = {name: [e for e in experts if f'.{e}'.endswith(f'.{name}')] for name in wanted if name not in names}
    if missing := [name for name, matched in found.items() if not matched and name != ALL]:
        stacked = f' Its experts: {", ".join(sorted(experts))}.' if experts else ''
        raise ConfigError(
            *(
                f"--lora_target_modules '{name}' matches no linear layer of {type(model).__name__}"
                f'{did_you_mean(name, [*names, *experts])} Its layers: {", ".join(sorted(names))}; or ALL.{stacked}'
                f'{" It is one of what sees: add --freeze_vision false." if name in linear_names(model) else ""}'
                for name in missing
            )
        )
    taken = _taken_for_experts(model, names)
    if taken and ALL in wanted:
        logger.info(f'ALL leaves out {", ".join(sorted(taken))}: on this class PEFT puts these names on the experts')
    elif refused := [name for name in wanted if name in taken]:
        raise ConfigError(
            f'--lora_target_modules {", ".join(refused)}: on {type(model).__name__} PEFT puts these names on the '
            f'experts, not on linear layers. Name those instead: {", ".join(sorted(experts))}.'
        )
    modules = sorted(set(names) - taken) if ALL in wanted else [name for name in wanted if name in names]
    return modules, list(dict.fromkeys(e for matched in found.values() for e in matched))


def native_names(wanted: list[str], names: Collection[str]) -> list[str]:
    """Return the names with those of a fused 2023 layout replaced by the native ones, each once."""
    native: list[str] = []
    for name in wanted:
        new = _OLD_NAMES.get(name) or _OLD_NAMES.get(name.rpartition('.')[2], ())
        if name in names or not set(new) <= set(names) or not new:
            native.append(name)  # Qwen-VL's tower has a c_proj of its own
        if new and set(new) <= set(names):
            logger.info(f'lora_target_modules: {name} is {", ".join(new)} in the native class')
            native += new
    return list(dict.fromkeys(native))


def prepare_model(model: PreTrainedModel, args: SftArguments, decide: Decide = log_decision) -> Any:
    """Return the model ready to train and log what is trainable: a PeftModel with fp32 adapters, or all weights."""
    from utils.fast.gated_mlp import fuse_gates
    from utils.fast.layout import is_sharded
    from utils.fast.norm import fuse_norms

    towers = find_towers(model)
    if not args.freeze_vision and not towers:
        logger.warning('--freeze_vision false has no effect: the model sees no images')
    if args.sft_type == 'full':
        model.requires_grad_(True)
        for name in towers if args.freeze_vision else []:
            model.get_submodule(name).requires_grad_(False)
            logger.info(f'{name} stays as it is (--freeze_vision true)')
        prepared: Any = model
    else:
        prepared = _put_adapter(model, args, towers, decide)
    if args.fused_norms and not is_sharded(model) and (norms := fuse_norms(model)):
        logger.info(f'fused_norms = true: {norms} RMSNorm layers run in one step')
    if args.fused_mlp and not is_sharded(model) and (gates := fuse_gates(model)):
        logger.info(f'fused_mlp = true: {gates} gated MLPs keep what goes into their product alone')
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
        if args.sft_type == 'lora':
            # For reentrant checkpointing alone: embeddings need no gradients, nor does what is below the first adapter.
            model.disable_input_require_grads()
    # Under ZeRO-3 this process holds a part of each parameter, or none; DeepSpeed notes the whole size on it.
    sizes = [(getattr(p, 'ds_numel', p.numel()), p.requires_grad) for p in prepared.parameters()]
    trainable, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    logger.info(f'trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.4g} %)')
    return prepared


def _put_adapter(model: PreTrainedModel, args: SftArguments, towers: Sequence[str], decide: Decide) -> Any:
    """Return the model with a fresh LoRA adapter; raises ConfigError where a target matches nothing."""
    from peft import LoraConfig, TaskType, get_peft_model

    from utils.fast.layout import is_sharded
    from utils.fast.lora import fuse_lora

    frozen = towers if args.freeze_vision else []
    modules, parameters = find_targets(model, args.lora_target_modules, frozen)
    if not modules and not parameters:
        raise ConfigError(f'{type(model).__name__} has no layer that LoRA could be put on. Use --sft_type full.')
    targets = [*modules, *parameters]
    if args.lora_target_modules is None:
        decide('lora_target_modules', targets, 'the model has no entry and these are its names')
    elif set(targets) != set(args.lora_target_modules):
        typed = ','.join(args.lora_target_modules)
        decide('lora_target_modules', targets, f'these are the layers of {type(model).__name__} that {typed} names')
    if parameters and args.lora_dropout_p:
        raise ConfigError(
            f'--lora_dropout_p {args.lora_dropout_p} cannot be had on expert parameters ({parameters[0]}): '
            'they are adapted as weights, before any input. Give 0, or leave them out of --lora_target_modules.'
        )
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout_p,
        target_modules=modules,
        target_parameters=parameters or None,
        exclude_modules=rf'({"|".join(map(re.escape, frozen))})\..*' if frozen else None,
        task_type=TaskType.CAUSAL_LM,
    )
    matched, outside = linear_names(model, frozen) + expert_names(model), linear_names(model, towers)
    if towers and not frozen and all(matched[name] == outside[name] for name in modules):
        reached = ', '.join(sorted(linear_names(model) - outside))
        logger.warning(f'--freeze_vision false has no effect: no target is in {", ".join(towers)} ({reached})')
    prepared = get_peft_model(model, config)
    if args.tuner_backend == 'swift' and not is_sharded(model):
        fused, layers = fuse_lora(prepared)
        logger.info(f'tuner_backend = swift: {fused} of {layers} LoRA layers compute base and adapter in one step')
    logger.info('LoRA is on ' + ', '.join(f'{matched[name]} x {name}' for name in [*modules, *parameters]))
    return prepared


def load_adapter(model: PreTrainedModel, checkpoint: Path, base: Path | None = None, family: str | None = None) -> Any:
    """Return the base model with a checkpoint's adapter on it; raises ConfigError where they do not fit."""
    from peft import PeftModel
    from safetensors import SafetensorError

    from utils.loading.legacy.adapter import native_adapter

    try:
        with native_adapter(checkpoint, linear_names(model), base, family) as folder:
            return PeftModel.from_pretrained(model, str(folder))
    except ConfigError:
        raise
    except (RuntimeError, ValueError, OSError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(
            f'the adapter in {checkpoint} cannot be put on {type(model).__name__} {model.name_or_path}: '
            f'{told(error)[:300]} It is damaged, or was trained on another base model.'
        ) from error

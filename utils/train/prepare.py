"""What is trained: LoRA adapters or all weights; and how an adapter is put on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError, did_you_mean
from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Decide, log_decision
from utils.loading.layers import ALL, expert_names, find_towers, linear_names, native_names, taken_for_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Query, key and value projections as the native classes name them, for a model that has no entry.
_QKV_NAMES = (('q_proj', 'k_proj', 'v_proj'), ('qkv_proj',), ('query_key_value',), ('c_attn',), ('W_pack',))


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
    taken = taken_for_experts(model, names)
    if taken and ALL in wanted:
        logger.info(f'ALL leaves out {", ".join(sorted(taken))}: on this class PEFT puts these names on the experts')
    elif refused := [name for name in wanted if name in taken]:
        raise ConfigError(
            f'--lora_target_modules {", ".join(refused)}: on {type(model).__name__} PEFT puts these names on the '
            f'experts, not on linear layers. Name those instead: {", ".join(sorted(experts))}.'
        )
    modules = sorted(set(names) - taken) if ALL in wanted else [name for name in wanted if name in names]
    return modules, list(dict.fromkeys(e for matched in found.values() for e in matched))


def prepare_model(model: PreTrainedModel, args: SftArguments, decide: Decide = log_decision) -> Any:
    """Return the model ready to train and log what is trainable: a PeftModel with fp32 adapters, or all weights."""
    from utils.fast.gated_mlp import fuse_gates
    from utils.fast.norm import fuse_norms
    from utils.loading.layers import is_sharded

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

    from utils.fast.lora import fuse_lora
    from utils.loading.layers import is_sharded

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

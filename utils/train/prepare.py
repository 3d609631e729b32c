"""Make a loaded model ready to train: add LoRA adapters or make all weights trainable, and fuse layers."""

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

# The names that query, key and value projections have in different classes. A model without a registry entry gets LoRA
# on the first group of names that it has.
_QKV_NAMES = (('q_proj', 'k_proj', 'v_proj'), ('qkv_proj',), ('query_key_value',), ('c_attn',), ('W_pack',))


def find_targets(
    model: PreTrainedModel, wanted: list[str] | None, frozen: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return two lists: the names of the modules that get LoRA, and the names of the expert parameters that get LoRA.

    Modules inside the modules `frozen` are left out. An expert parameter is the stacked weight of all experts of a
    layer. It is named by the end of its path, e.g. experts.down_proj. Raises ConfigError if a name in `wanted` matches
    nothing.
    """
    names = linear_names(model, frozen)
    experts = expert_names(model)
    if wanted is None:
        wanted = next((list(group) for group in _QKV_NAMES if set(group) <= set(names)), [ALL])
    takes_all = ALL in wanted
    wanted = native_names([name for name in wanted if name != ALL], names)

    parameters: dict[str, None] = {}
    missing = []
    for name in wanted:
        if name in names:
            continue
        matched = [expert for expert in experts if f'.{expert}'.endswith(f'.{name}')]
        parameters.update(dict.fromkeys(matched))
        if not matched and name not in missing:
            missing.append(name)
    if missing:
        raise ConfigError(*(_no_match(model, name, list(names), list(experts)) for name in missing))

    taken = taken_for_experts(model, names)
    if taken and takes_all:
        logger.info(f'ALL skips {", ".join(sorted(taken))}: PEFT would add LoRA to the experts, not to linear layers')
    elif refused := [name for name in wanted if name in taken]:
        raise ConfigError(
            f'--lora_target_modules {", ".join(refused)}: on {type(model).__name__} PEFT puts these names on the '
            f'experts, not on linear layers. Use --lora_target_modules {",".join(sorted(experts))}.'
        )
    modules = sorted(set(names) - taken) if takes_all else [name for name in wanted if name in names]
    return modules, list(parameters)


def _no_match(model: PreTrainedModel, name: str, names: list[str], experts: list[str]) -> str:
    """Return the error message for a name that matches no layer. It lists the layers and experts of the model."""
    message = (
        f"--lora_target_modules '{name}' matches no linear layer of {type(model).__name__}"
        f'{did_you_mean(name, [*names, *experts])} Its layers: {", ".join(sorted(names))}; or ALL.'
    )
    if experts:
        message += f' Its experts: {", ".join(sorted(experts))}.'
    if name in linear_names(model):
        message += ' It belongs to the vision tower: add --freeze_vision false.'
    return message


def prepare_model(model: PreTrainedModel, args: SftArguments, decide: Decide = log_decision) -> Any:
    """Make the model ready to train, and return it. Log the number of trainable parameters.

    With --sft_type lora, the model is returned as a PeftModel with fp32 adapters. With --sft_type full, `model` itself
    is returned.
    """
    towers = find_towers(model)
    if not args.freeze_vision and not towers:
        logger.warning('--freeze_vision false has no effect: the model has no vision tower')

    if args.sft_type == 'full':
        model.requires_grad_(True)
        for name in towers if args.freeze_vision else []:
            model.get_submodule(name).requires_grad_(False)
            logger.info(f'{name} is not trained (--freeze_vision true)')
        prepared: Any = model
    else:
        prepared = _put_adapter(model, args, towers, decide)

    _fuse_layers(model, args)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
        if args.sft_type == 'lora':
            # transformers enables input gradients, but only reentrant checkpointing needs them. Without input gradients
            # neither the embeddings nor the layers below the first adapter compute gradients.
            model.disable_input_require_grads()
    _log_trainable(prepared)
    return prepared


def _fuse_layers(model: PreTrainedModel, args: SftArguments) -> None:
    """Fuse norms and gated MLPs as the flags say, and log how many were fused. Sharded models are not changed."""
    from utils.fast.gated_mlp import fuse_gates
    from utils.fast.norm import fuse_norms
    from utils.loading.layers import is_sharded

    if is_sharded(model):
        return
    if args.fused_norms and (norms := fuse_norms(model)):
        logger.info(f'fused_norms = true: {norms} RMSNorm layers run in one step')
    if args.fused_mlp and (gates := fuse_gates(model)):
        logger.info(f'fused_mlp = true: {gates} gated MLPs save only the factors of their product')


def _log_trainable(model: Any) -> None:
    trainable = 0
    total = 0
    for parameter in model.parameters():
        # Under ZeRO-3 this process may have only a part of the parameter; ds_numel is the size of the whole parameter.
        size = getattr(parameter, 'ds_numel', parameter.numel())
        total += size
        if parameter.requires_grad:
            trainable += size
    logger.info(f'trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.4g} %)')


def _put_adapter(model: PreTrainedModel, args: SftArguments, towers: Sequence[str], decide: Decide) -> Any:
    """Return the model with a new LoRA adapter.

    Raises ConfigError if a target name matches nothing, or if there is no layer for LoRA.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    from utils.fast.lora import fuse_lora
    from utils.loading.layers import is_sharded

    class_name = type(model).__name__
    frozen = towers if args.freeze_vision else []
    modules, parameters = find_targets(model, args.lora_target_modules, frozen)
    targets = [*modules, *parameters]
    if not targets:
        raise ConfigError(f'--sft_type lora: {class_name} has no layer for LoRA. Use --sft_type full.')

    if args.lora_target_modules is None:
        decide('lora_target_modules', targets, 'the model has no registry entry, and its layers have these names')
    elif set(targets) != set(args.lora_target_modules):
        typed = ','.join(args.lora_target_modules)
        decide('lora_target_modules', targets, f'these are the layers of {class_name} that {typed} names')
    if parameters and args.lora_dropout_p:
        raise ConfigError(
            f'--lora_dropout_p {args.lora_dropout_p} is not possible on expert parameters ({parameters[0]}): LoRA '
            'changes their weights directly and has no input to drop. Use --lora_dropout_p 0, or remove them from '
            '--lora_target_modules.'
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
    matched = linear_names(model, frozen) + expert_names(model)
    outside_towers = linear_names(model, towers)
    if towers and not frozen and all(matched[name] == outside_towers[name] for name in modules):
        in_towers = ', '.join(sorted(linear_names(model) - outside_towers))
        logger.warning(f'--freeze_vision false has no effect: no target is in {", ".join(towers)} ({in_towers})')

    prepared = get_peft_model(model, config)
    if args.tuner_backend == 'swift' and not is_sharded(model):
        fused, layers = fuse_lora(prepared)
        logger.info(f'tuner_backend = swift: {fused} of {layers} LoRA layers compute base and adapter in one step')
    logger.info('LoRA is on ' + ', '.join(f'{matched[target]} x {target}' for target in targets))
    return prepared

"""Make a loaded model ready to train: add LoRA adapters or make all weights trainable, and fuse layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base import device
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Decide, log_decision
from utils.loading.layers import (
    ALL,
    ALL_LINEAR,
    PATTERN,
    adapter_size,
    choose_layers,
    expert_names,
    find_towers,
    is_in,
    last_name,
    layer_size,
    linear_layers,
    named_by,
    no_layer,
    taken_for_experts,
    what_all_adds,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The stacked parameters of experts for which vLLM loads an adapter. It loads both or none.
_SERVED_EXPERTS = {'gate_up_proj', 'down_proj'}


def find_targets(
    model: PreTrainedModel, wanted: Sequence[str], frozen: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return two lists: the names or paths of the modules that get LoRA, and the expert parameters that get LoRA.

    `wanted` are the words of --lora_target_modules. Modules inside the modules `frozen` get no LoRA. An expert
    parameter is the stacked weight of all experts of a layer, given by the end of its path, e.g. experts.down_proj.

    Raises ConfigError if a word other than all-linear matches nothing, or if it names a layer on which PEFT cannot put
    LoRA.
    """
    paths = list(linear_layers(model, frozen))
    experts = expert_names(model)
    taken = taken_for_experts(model, Counter(map(last_name, paths)))
    modules, unmatched = choose_layers(wanted, paths, taken)

    parameters: dict[str, None] = {}
    missing = []
    for word in unmatched:
        matched = [expert for expert in experts if f'.{expert}'.endswith(f'.{word}')]
        parameters.update(dict.fromkeys(matched))
        if not matched and word not in ALL:
            missing.append(word)
    # A pattern that matches only layers that PEFT takes for experts selects none of them.
    matched_without = choose_layers([word for word in missing if word.startswith(PATTERN)], paths)
    missing = [word for word in missing if not word.startswith(PATTERN) or word in matched_without[1]]
    if missing:
        raise ConfigError(*(_no_match(model, word, paths, list(experts)) for word in missing))

    if refused := [name for name in [*modules, *matched_without[0]] if last_name(name) in taken]:
        raise ConfigError(
            f'--lora_target_modules {", ".join(refused)}: PEFT cannot put LoRA on these linear layers of '
            f'{type(model).__name__}, because it takes their names for names of the stacked experts. Remove these '
            f'names, or train the stacked experts with --lora_target_modules {",".join(sorted(experts))}.'
        )
    if taken and (several := [word for word in wanted if word in ALL or word.startswith(PATTERN)]):
        logger.info(
            f'--lora_target_modules {several[0]} puts no LoRA on the linear layers {", ".join(sorted(taken))}, '
            'because PEFT takes their names for names of the stacked experts.'
        )
    return modules, list(parameters)


def _no_match(model: PreTrainedModel, word: str, paths: Sequence[str], experts: list[str]) -> str:
    """Return the error message for a word that matches no layer, or only frozen layers."""
    message = no_layer(word, type(model).__name__, paths, experts)
    if choose_layers([word], list(linear_layers(model)))[0]:
        message += ' It belongs to the vision tower: add --freeze_vision false.'
    return message


def say_what_all_adds(model: PreTrainedModel, args: SftArguments) -> str | None:
    """Return a line that says how many layers and parameters all-linear would add to --lora_target_modules.

    Returns None for full fine-tuning, or if all linear layers get LoRA already. Call this before the model gets its
    adapter.
    """
    if args.sft_type == 'full':
        return None
    frozen = find_towers(model) if args.freeze_vision else []
    layers = linear_layers(model, frozen)
    taken = taken_for_experts(model, Counter(map(last_name, layers)))
    every, _ = choose_layers([ALL_LINEAR], list(layers), taken)
    named, _ = choose_layers(args.lora_target_modules or [], list(layers))

    sizes = {
        path: adapter_size(*layer_size(layer), args.lora_rank, dora=args.use_dora) for path, layer in layers.items()
    }
    trained = [sizes[path] for path in named_by(named, layers)]
    added = [sizes[path] for path in named_by(set(every) - set(named), layers)]
    return what_all_adds(len(added), sum(added), sum(trained)) if added else None


def prepare_model(
    model: PreTrainedModel,
    args: SftArguments,
    decide: Decide = log_decision,
    *,
    base: Path | None = None,
    family: str | None = None,
    token_ids: Sequence[int] = (),
) -> Any:
    """Make the model ready to train, and return it. Log the number of trainable parameters.

    With --sft_type lora, the model is returned as a PeftModel with fp32 adapters. With --sft_type full, `model` itself
    is returned. `token_ids` are the ids of new tokens (--new_tokens), whose rows of embedding and head are trained.
    Raises ConfigError if a flag about the adapter does not fit the model.

    `base` and `family` are only used for --adapter. `base` is the folder of the base model. `family` is the name of its
    Family (utils/loading/legacy), or None.
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
        start = _Start(base=base, family=family, token_ids=token_ids)
        prepared = _put_adapter(model, args, towers, decide, start)

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
    """Fuse norms, gated MLPs and attention layers as the flags say, and log how many were fused.

    Attention layers are fused only on CUDA. Sharded models are not changed.
    """
    from utils.fast.gated_mlp import fuse_gates
    from utils.fast.norm import fuse_norms
    from utils.fast.rotation import fuse_rotary
    from utils.loading.layers import is_sharded

    if is_sharded(model):
        return
    if args.fused_norms and (norms := fuse_norms(model)):
        logger.info(f'fused_norms = true: {norms} RMSNorm layers use a fused forward, which needs less memory')
    if args.fused_mlp and (gates := fuse_gates(model)):
        logger.info(f'fused_mlp = true: {gates} gated MLPs use a fused forward, which needs less memory')
    if args.fused_rotary and device.kind() == 'cuda' and (layers := fuse_rotary(model)):
        logger.info(f'fused_rotary = true: {layers} attention layers rotate queries and keys in one pass')


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


@dataclass(frozen=True, kw_only=True)
class _Start:
    base: Path | None
    family: str | None
    token_ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class _Places:
    """The modules and parameters of a model that an adapter changes."""

    # Linear layers that get LoRA, as PEFT takes them: by last name or by path.
    modules: list[str]
    # Stacked weights of experts that get LoRA, by the end of their path.
    parameters: list[str]
    # The paths of all layers that `modules` names.
    adapted: list[str]
    # Layers that are trained whole, as --lora_modules_to_save names them.
    saved: list[str]
    # `saved`, and the layers whose weight is tied to one of them.
    copied: list[str]
    # Whether the copies of embedding and head are one tensor.
    ties: bool


def _put_adapter(
    model: PreTrainedModel, args: SftArguments, towers: Sequence[str], decide: Decide, start: _Start
) -> Any:
    """Return the model with a new LoRA adapter, or with the adapter of --adapter.

    Raises ConfigError if a flag about the adapter does not fit the model, or if there is no layer for LoRA.
    """
    from utils.fast.frozen import fuse_packed
    from utils.fast.lora import fuse_lora
    from utils.loading.adapter import restore_adapter
    from utils.loading.layers import is_sharded
    from utils.train.saved_modules import check_tokens, hold_in_fp32

    frozen = towers if args.freeze_vision else []
    places = _find_places(model, args, frozen, decide)
    _warn_of_towers(model, places, [] if frozen else towers)
    experts = expert_names(model)
    counts = Counter(map(last_name, places.adapted)) + Counter({name: experts[name] for name in places.parameters})

    prepared = _add_adapter(model, args, places, frozen, start)
    if start.token_ids:
        check_tokens(prepared, start.token_ids)
    if args.deepspeed_config_path is None:  # DeepSpeed holds a copy of each trained weight in fp32 itself
        hold_in_fp32(prepared)
        if args.adapter is not None and places.saved:
            restore_adapter(prepared, Path(args.adapter))
    if args.tuner_backend == 'swift' and not is_sharded(model):
        fused, layers = fuse_lora(prepared)
        logger.info(
            f'tuner_backend = swift: {fused} of {layers} LoRA layers use a fused forward, which needs less memory'
        )
        packed = fuse_packed(prepared)
        if packed:
            logger.info(
                f'tuner_backend = swift: {packed} GPTQ layers unpack their weight a second time in the backward pass. '
                'So they need not keep the unpacked weight in memory'
            )
    logger.info('LoRA is on ' + ', '.join(f'{count} x {name}' for name, count in counts.items()))
    if places.parameters:
        _say_how_experts_are_served(places.parameters)
    return prepared


def _say_how_experts_are_served(parameters: Sequence[str]) -> None:
    """Log that vLLM can load an adapter of these expert parameters, or warn that it cannot.

    vLLM needs the adapters of both gate_up_proj and down_proj. See _stack_moe_lora_weights in
    https://github.com/vllm-project/vllm/blob/main/vllm/lora/model_manager.py
    """
    if {last_name(name) for name in parameters} == _SERVED_EXPERTS:
        logger.info(
            'the adapter of the experts has the names and shapes that vLLM loads. Serve it with --enable-lora. Some '
            'models also need --enable-mixed-moe-lora-format: see docs/models.md'
        )
        return
    logger.warning(
        '--lora_target_modules: vLLM cannot load the adapter of this run. In the experts, vLLM needs LoRA on both '
        f'gate_up_proj and down_proj, but LoRA is on {", ".join(parameters)} only. Name both, or merge the adapter '
        'with llm_infer.py --merge_lora_and_save true and serve the merged model.'
    )


def _find_places(model: PreTrainedModel, args: SftArguments, frozen: Sequence[str], decide: Decide) -> _Places:
    """Return the modules and parameters that the adapter changes.

    If --lora_target_modules or --lora_modules_to_save does not give the exact names of the layers, `decide` is called
    with the exact names. For example, all-linear becomes q_proj, k_proj and so on.

    Raises ConfigError if there is no layer for LoRA, or if a word of --lora_target_modules or --lora_modules_to_save
    cannot be used. Also raises ConfigError if another flag does not work with LoRA on expert parameters.
    """
    from utils.train.saved_modules import find_saved, with_tied

    class_name = type(model).__name__
    wanted = args.lora_target_modules or [ALL_LINEAR]
    modules, parameters = find_targets(model, wanted, frozen)
    targets = [*modules, *parameters]
    if not targets:
        raise ConfigError(f'--sft_type lora: {class_name} has no layer for LoRA. Use --sft_type full.')
    if set(targets) != set(wanted):
        typed = ' '.join(wanted)
        decide('lora_target_modules', targets, f'{typed} is replaced by layer names of {class_name}')
    if parameters:
        _check_experts(args, parameters[0])

    adapted = named_by(modules, linear_layers(model, frozen))
    saved = find_saved(model, args.lora_modules_to_save or [], adapted=adapted, frozen=frozen)
    if saved and set(saved) != set(args.lora_modules_to_save or []):
        decide('lora_modules_to_save', saved, f'--lora_modules_to_save is replaced by layer paths of {class_name}')
    copied, ties = with_tied(model, saved)
    return _Places(modules=modules, parameters=parameters, adapted=adapted, saved=saved, copied=copied, ties=ties)


def _check_experts(args: SftArguments, parameter: str) -> None:
    """Raise ConfigError if another flag does not work with LoRA on expert parameters.

    `parameter` is the name of one of these parameters, for the message.
    """
    if args.lora_dropout_p:
        raise ConfigError(
            f'--lora_dropout_p {args.lora_dropout_p} is not possible on expert parameters ({parameter}): LoRA '
            'changes their weights directly and has no input to drop. Use --lora_dropout_p 0, or remove the experts '
            'from --lora_target_modules.'
        )
    if args.use_dora:
        raise ConfigError(
            f'--use_dora true is not possible on expert parameters ({parameter}): PEFT has no DoRA for them. '
            'Remove --use_dora, or remove the experts from --lora_target_modules.'
        )


def _warn_of_towers(model: PreTrainedModel, places: _Places, towers: Sequence[str]) -> None:
    """Log a warning if vision towers are to be trained, but no layer inside them gets LoRA."""
    if not towers or any(is_in(path, towers) for path in places.adapted):
        return
    in_towers = sorted({last_name(path) for path in linear_layers(model) if is_in(path, towers)})
    logger.warning(
        f'--freeze_vision false has no effect: --lora_target_modules names no layer in {", ".join(towers)}. Add one or '
        f'more of these layers to --lora_target_modules: {", ".join(in_towers)}'
    )


def _add_adapter(
    model: PreTrainedModel, args: SftArguments, places: _Places, frozen: Sequence[str], start: _Start
) -> Any:
    """Return the model with the adapter of --adapter, or else with a new adapter.

    Raises ConfigError if the adapter of --adapter is not on the layers of `places`.
    """
    from peft import get_peft_model

    from utils.loading.adapter import load_adapter
    from utils.train.saved_modules import check_saved, token_tables

    if args.adapter is not None:
        prepared = load_adapter(model, Path(args.adapter), start.base, start.family, dropout=args.lora_dropout_p)
        _check_layers(prepared, args, places.adapted, places.parameters)
        check_saved(prepared, args, places.copied)
        return prepared

    config = _lora_config(args, places.modules, places.parameters, frozen, places.saved)
    config.ensure_weight_tying = places.ties
    config.trainable_token_indices = token_tables(model, start.token_ids, places.copied) or None
    prepared = get_peft_model(model, config)
    if args.use_dora:
        _start_dora(prepared)
    return prepared


def _lora_config(
    args: SftArguments,
    modules: list[str],
    parameters: list[str],
    frozen: Sequence[str],
    saved: Sequence[str],
) -> Any:
    """Return the settings of PEFT for an adapter on these modules and expert parameters.

    The layers `saved` are trained whole.
    """
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout_p,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        target_modules=modules,
        target_parameters=parameters or None,
        exclude_modules=rf'({"|".join(map(re.escape, frozen))})\..*' if frozen else None,
        modules_to_save=list(saved) or None,
        task_type=TaskType.CAUSAL_LM,
    )


def _check_layers(model: Any, args: SftArguments, expected: Sequence[str], parameters: Sequence[str]) -> None:
    """Raise ConfigError unless the adapter of --adapter is on exactly these layers and expert parameters.

    `expected` are the paths of the layers, and `parameters` the expert parameters.
    """
    from peft.tuners.lora import LoraLayer, ParamWrapper

    layers = model.get_base_model().named_modules()
    found = [path for path, layer in layers if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)]
    experts = model.peft_config['default'].target_parameters or ()
    if set(found) == set(expected) and set(experts) == set(parameters):
        return

    given = f'--adapter {args.adapter}'
    if args.freeze_vision and any(is_in(path, find_towers(model.get_base_model())) for path in found):
        raise ConfigError(f'{given}: the adapter is on layers of the vision tower. Add --freeze_vision false.')
    names = sorted({*map(last_name, found), *experts})
    raise ConfigError(
        f'--lora_target_modules {" ".join(args.lora_target_modules or [])}: these are not the layers of the adapter in '
        f'{args.adapter}. The adapter is on {len(found) + len(experts)} layers ({", ".join(names)}), and the flag '
        f'selects {len(expected) + len(parameters)}. Remove --lora_target_modules to use the layers of the adapter, or '
        'train a new adapter without --adapter.'
    )


def _start_dora(model: Any) -> None:
    """Set the magnitudes of new DoRA layers, so that an untrained adapter changes no output.

    In DoRA, each output is multiplied by a magnitude, and divided by the norm of its row of the weight. An untrained
    adapter needs magnitudes that are equal to the norms. PEFT rounds the magnitudes to the dtype of the weight, but
    computes the norms in fp32. So the magnitudes are set to the norms in fp32.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        norms = torch.linalg.norm(dequantize_module_weight(base).float(), dim=0 if isinstance(base, Conv1D) else 1)
        for magnitude in layer.lora_magnitude_vector.values():
            magnitude.weight.data = norms

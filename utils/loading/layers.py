"""Finds the linear layers, the experts and the vision towers of a model, and tells whether the model is sharded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from utils.base.errors import did_you_mean
from utils.base.logger import logger
from utils.loading.packed import packed_classes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The layer types that store only the keys and values of earlier tokens. All other types, for example linear attention,
# keep a recurrent state.
ATTENDING = frozenset({'full_attention', 'sliding_attention'})
# The layer types with a recurrent state in which utils/fast/recurrent.py keeps concatenated rows apart.
RECURRENT = frozenset({'linear_attention', 'conv'})


def is_sharded(model: Any) -> bool:
    """Return whether the weights are sharded by ZeRO-3 or FSDP."""
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    first = next(model.parameters()).data
    return type(first) is not torch.Tensor or first.numel() == 0 or bool(is_deepspeed_zero3_enabled())


# These values of --lora_target_modules select all linear layers. Both mean the same.
ALL_LINEAR = 'all-linear'
ALL = ('ALL', ALL_LINEAR)
# A value of --lora_target_modules that starts with this is a regular expression.
PATTERN = 're:'

# Layer name in the original code of 2023 -> names of the layers in the class of transformers that replace this layer.
# Many published training commands still use the old names.
_OLD_NAMES = {
    'c_attn': ('q_proj', 'k_proj', 'v_proj'),
    'W_pack': ('q_proj', 'k_proj', 'v_proj'),
    'query_key_value': ('q_proj', 'k_proj', 'v_proj'),
    # Qwen gives both output layers the name c_proj. Only the name of the parent module distinguishes them.
    'attn.c_proj': ('o_proj',),
    'mlp.c_proj': ('down_proj',),
    'c_proj': ('o_proj', 'down_proj'),
    'dense': ('o_proj',),
    'w1': ('up_proj',),
    'w2': ('gate_proj',),
    'dense_h_to_4h': ('gate_up_proj',),
    'dense_4h_to_h': ('down_proj',),
}


def linear_layers(model: PreTrainedModel, frozen: Sequence[str] = ()) -> dict[str, Any]:
    """Return a dict from path to layer for all linear layers. The paths are those of named_modules().

    Quantised layers are included. The output head and all layers inside the modules `frozen` are not included.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D, *packed_classes())
    head = model.get_output_embeddings()

    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and not is_in(path, frozen)
    }


def linear_names(model: PreTrainedModel, frozen: Sequence[str] = ()) -> Counter[str]:
    """Return a Counter from layer name to the number of linear layers with this name.

    The layer name is the last part of the layer's path, e.g. q_proj. The layers are those of `linear_layers`.
    """
    return Counter(map(last_name, linear_layers(model, frozen)))


def layer_size(layer: Any) -> tuple[int, int]:
    """Return the numbers of input and output features of a linear layer."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features


def adapter_size(inputs: int, outputs: int, rank: int, *, dora: bool) -> int:
    """Return the number of parameters of a LoRA adapter on a linear layer with these numbers of features."""
    return rank * (inputs + outputs) + (outputs if dora else 0)


def last_name(name: str) -> str:
    """Return the last part of a module's path, or the last two parts if the last part is a number."""
    parts = name.split('.')
    return '.'.join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def is_in(name: str, modules: Sequence[str]) -> bool:
    """Return whether the module `name` is in the list `modules` or inside a module of the list."""
    return any(name == module or name.startswith(f'{module}.') for module in modules)


def expert_names(model: PreTrainedModel) -> Counter[str]:
    """Return a Counter from the name of a stacked expert weight to the number of layers that have this weight.

    A stacked expert weight is a 3-D parameter with the matrices of all experts of a layer. The name is relative to the
    layer, for example `mlp.experts.gate_up_proj`.
    """
    return Counter(
        re.sub(r'^.*?\.\d+\.', '', name)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not name.endswith('.weight')  # A 3-D `.weight` belongs to a convolution.
    )


def taken_for_experts(model: PreTrainedModel, names: Counter[str]) -> set[str]:
    """Return the names in `names` that PEFT mistakes for stacked experts.

    Earlier versions of transformers gave these names to the expert layers of some models, and PEFT still maps them to
    the experts. So PEFT cannot put LoRA on a linear layer with such a name, for example gate_proj of a shared expert.
    See https://github.com/huggingface/peft, utils/transformers_weight_conversion.py.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, conversions=None)
    return set(names) - set(config.target_modules or ())


def native_names(wanted: list[str], names: Collection[str]) -> list[str]:
    """Return the layer names `wanted` without duplicates. Old names are replaced by the names in transformers.

    An old name is a name in the Python code that was published with a model in 2023. For example, c_attn becomes
    q_proj, k_proj and v_proj. `names` are the names of the model's layers. An old name is replaced only if the model
    has all new names. If the model also has the old name, the old name is kept and the new names are added.
    """
    native: list[str] = []

    for name in wanted:
        new = _OLD_NAMES.get(name) or _OLD_NAMES.get(name.rpartition('.')[2], ())
        replaceable = bool(new) and set(new) <= set(names)

        # The vision tower of Qwen-VL has layers named c_proj. So the name is kept, and the native names are added.
        if name in names or not replaceable:
            native.append(name)

        if replaceable:
            logger.info(f'lora_target_modules: using {", ".join(new)} for {name}, because the model has these layers')
            native += new

    return list(dict.fromkeys(native))


def choose_layers(
    wanted: Sequence[str], paths: Sequence[str], taken: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Return two lists: the targets for PEFT that `wanted` selects, and the words of `wanted` that select no layer.

    `wanted` are values of --lora_target_modules: names, paths or ends of paths of layers, `all-linear`, or patterns
    such as 're:.*_proj'. `paths` are the paths of the model's linear layers. A target is the path of one layer, or the
    end of a path, which selects all layers with this end.

    `taken` has the layer names that `taken_for_experts` returns. `all-linear` and patterns never select layers with
    these names.
    """
    names = Counter(map(last_name, paths))
    chosen: list[str] = []
    missing: list[str] = []

    for word in wanted:
        if word in ALL:
            found = sorted(set(names) - set(taken))
        elif word.startswith(PATTERN):
            pattern = re.compile(word.removeprefix(PATTERN))
            matched = [path for path in paths if pattern.fullmatch(path) and last_name(path) not in taken]
            found = _shortened(matched, names)
        else:
            found = [name for name in native_names([word], names) if name in names or named_by([name], paths)]

        chosen += found
        if not found:
            missing.append(word)

    return list(dict.fromkeys(chosen)), list(dict.fromkeys(missing))


def _shortened(paths: Sequence[str], names: Counter[str]) -> list[str]:
    """Return a shorter list of layer names and paths that selects the same layers as `paths`.

    If `paths` contains every layer of the model with the same name (e.g. q_proj), these paths are replaced by the name.
    `names` counts all layers of the model by name.
    """
    counts = Counter(map(last_name, paths))
    whole = [name for name, count in counts.items() if count == names[name]]
    return sorted(whole) + [path for path in paths if last_name(path) not in whole]


def named_by(targets: Collection[str], paths: Iterable[str]) -> list[str]:
    """Return the paths of the layers that PEFT selects with these targets.

    A target selects the path that is equal to it, and all paths that end in '.' + target. For example, the target
    q_proj selects layers.0.q_proj.
    """
    return [path for path in paths if any(f'.{path}'.endswith(f'.{target}') for target in targets)]


def no_layer(word: str, class_name: str, paths: Sequence[str], experts: Sequence[str] = ()) -> str:
    """Return the message for a word of --lora_target_modules that names no layer.

    The message suggests similar names. `paths` are the paths of the linear layers of the class `class_name`. `experts`
    are the names of the stacked experts of this class.
    """
    names = sorted(set(map(last_name, paths)))
    if word.startswith(PATTERN):
        message = (
            f"--lora_target_modules '{word}' matches the whole path of no linear layer of {class_name}"
            f'{did_you_mean(word.removeprefix(PATTERN), [*names, *paths])} Its paths are like {paths[0]}. For any path '
            f"with this name, write 're:.*\\.NAME'."
        )
    else:
        message = (
            f"--lora_target_modules '{word}' matches no linear layer of {class_name}"
            f'{did_you_mean(word, [*names, *experts, ALL_LINEAR])} Its layers: {", ".join(names)}; or {ALL_LINEAR}.'
        )
    if experts:
        message += f' Its experts: {", ".join(sorted(experts))}.'
    return message


def bad_pattern(word: str) -> str | None:
    """Return the problem with a word of --lora_target_modules, or None if it is a valid pattern or no pattern."""
    if not word.startswith(PATTERN):
        return None
    try:
        re.compile(word.removeprefix(PATTERN))
    except (re.error, OverflowError, RecursionError) as error:
        return f"--lora_target_modules '{word}' is not a regular expression of Python: {error}. Correct it, in quotes."
    if word == PATTERN:
        return f"--lora_target_modules '{word}' has no pattern. Write for example 're:.*\\.(q|v)_proj', in quotes."
    return None


def what_all_adds(layers: int, parameters: int, trained: int) -> str:
    """Return the line that says how many linear layers and parameters --lora_target_modules all-linear would add.

    `layers` is the number of linear layers that all-linear would add to the default layers of the model. `parameters`
    is the number of adapter parameters on these added layers. `trained` is the number of adapter parameters on the
    default layers.
    """
    return (
        f'lora_target_modules {ALL_LINEAR} would add {layers} linear layers: {trained + parameters:,} trainable '
        f'parameters instead of {trained:,}'
    )


def find_towers(model: Any) -> list[str]:
    """Return the paths of the vision towers, as in named_modules(). A text model has none, and the list is empty.

    A vision tower has parameters, and shares no submodule with the language model or the output head. So projectors and
    audio towers count as vision towers too. Modules inside a vision tower are not returned.
    """
    parts = (model.get_decoder(), model.get_output_embeddings())
    language = {id(module) for part in parts if part is not None for module in part.modules()}
    towers: list[str] = []

    for name, module in model.named_modules():
        inside_tower = any(name.startswith(f'{tower}.') for tower in towers)
        outside_language = all(id(child) not in language for child in module.modules())
        has_parameters = any(True for _ in module.parameters())

        if name and outside_language and not inside_tower and has_parameters:
            towers.append(name)

    return towers


def trains_towers(model: Any) -> bool:
    """Return whether a parameter of a vision tower is trained. Adapters are parameters too."""
    towers = (model.get_submodule(path) for path in find_towers(model))
    return any(parameter.requires_grad for tower in towers for parameter in tower.parameters())


def exclude_towers(quantization: Any, build: Callable[[], Any]) -> None:
    """Change `quantization` so that bitsandbytes quantises neither the vision towers nor the output head.

    Nothing is changed if the model has no vision tower, or if bitsandbytes is not used. `build` makes the model. It is
    called on the meta device, so the weights need no memory.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if not isinstance(quantization, BitsAndBytesConfig):
        return

    with torch.device('meta'):
        model = build()

    if towers := find_towers(model):
        head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        quantization.llm_int8_skip_modules = [*towers, *head]

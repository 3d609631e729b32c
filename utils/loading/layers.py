"""Finds the linear layers, the experts and the vision towers of a model, and tells whether the model is sharded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from utils.base.logger import logger
from utils.loading.packed import packed_classes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The layer types that store only the keys and values of earlier tokens. All other types, for example linear attention,
# keep a recurrent state.
ATTENDING = frozenset({'full_attention', 'sliding_attention'})


def is_sharded(model: Any) -> bool:
    """Return whether ZeRO-3 or FSDP shards the weights over several processes."""
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    first = next(model.parameters()).data
    return type(first) is not torch.Tensor or first.numel() == 0 or bool(is_deepspeed_zero3_enabled())


# This value of --lora_target_modules selects all linear layers.
ALL = 'ALL'

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


def linear_names(model: PreTrainedModel, frozen: Sequence[str] = ()) -> Counter[str]:
    """Return a Counter from layer name to the number of linear layers with this name.

    The layer name is the last part of the module's path, e.g. q_proj. Quantised layers are counted too. The output head
    and all layers inside the modules `frozen` are not counted.
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
    """Return the last part of a module's path, or the last two parts if the last part is a number."""
    parts = name.split('.')
    return '.'.join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _is_in(name: str, modules: Sequence[str]) -> bool:
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
    """Return the set of the names in `names` for which PEFT puts LoRA on the stacked experts, not on linear layers.

    This happens on some mixture-of-experts models, because in earlier versions of transformers their experts had these
    names. So LoRA cannot be put on linear layers with these names, for example gate_proj of a shared expert. See
    https://github.com/huggingface/peft, utils/transformers_weight_conversion.py.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, conversions=None)
    return set(names) - set(config.target_modules or ())


def native_names(wanted: list[str], names: Collection[str]) -> list[str]:
    """Return the layer names `wanted` without duplicates. Names of 2023 are replaced by names of the model's layers.

    `names` are the names of the model's layers. For example, c_attn becomes q_proj, k_proj and v_proj.
    """
    native: list[str] = []

    for name in wanted:
        new = _OLD_NAMES.get(name) or _OLD_NAMES.get(name.rpartition('.')[2], ())
        replaceable = bool(new) and set(new) <= set(names)

        # The vision tower of Qwen-VL has layers named c_proj. So the name is kept, and the native names are added.
        if name in names or not replaceable:
            native.append(name)

        if replaceable:
            logger.info(f'lora_target_modules: {name} is {", ".join(new)} in the native class')
            native += new

    return list(dict.fromkeys(native))


def find_towers(model: Any) -> list[str]:
    """Return the paths of the vision towers, as in named_modules(). A text model has none, and the list is empty.

    A vision tower is a module with parameters that shares no submodule with the language model or the output head, and
    that is not inside a larger module of this kind.
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


def exclude_towers(quantization: Any, build: Callable[[], Any]) -> None:
    """Change `quantization` so that bitsandbytes quantises neither the vision towers nor the output head.

    Nothing is changed if the model has no vision tower, or if bitsandbytes is not used. `build` must make the model. It
    is called on the meta device, so that the model has no weights.
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

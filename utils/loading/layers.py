"""Facts about the layers of a model: linear layers, experts, vision towers, sharding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from utils.base.logger import logger
from utils.loading.packed import packed_classes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Types of layers whose only state is keys and values of earlier tokens. Others, for example linear attention, keep
# a recurrent state.
ATTENDING = frozenset({'full_attention', 'sliding_attention'})


def is_sharded(model: Any) -> bool:
    """Return whether the weights are sharded over several processes (ZeRO-3, FSDP)."""
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    first = next(model.parameters()).data
    return type(first) is not torch.Tensor or first.numel() == 0 or bool(is_deepspeed_zero3_enabled())


# The value of --lora_target_modules that means all linear layers.
ALL = 'ALL'

# Layer names of the fused 2023 layouts, which recipes use -> the native layers.
_OLD_NAMES = {
    'c_attn': ('q_proj', 'k_proj', 'v_proj'),
    'W_pack': ('q_proj', 'k_proj', 'v_proj'),
    'query_key_value': ('q_proj', 'k_proj', 'v_proj'),
    # Qwen gives both output layers the same name; only the name of the parent distinguishes them.
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

    The output head and the layers inside the modules `frozen` are not counted.
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
    """Return the last part of a module's name; the last two parts if the last is a number."""
    parts = name.split('.')
    return '.'.join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _is_in(name: str, modules: Sequence[str]) -> bool:
    """Return whether a name is one of the modules or inside one of them."""
    return any(name == module or name.startswith(f'{module}.') for module in modules)


def expert_names(model: PreTrainedModel) -> Counter[str]:
    """Return the name within its layer of every 3-D parameter (stacked experts), and how often it occurs."""
    return Counter(
        re.sub(r'^.*?\.\d+\.', '', name)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not name.endswith('.weight')  # the weight of a convolution
    )


def taken_for_experts(model: PreTrainedModel, names: Counter[str]) -> set[str]:
    """Return the names of linear layers that PEFT applies to the stacked experts instead, as on some mixtures.

    In earlier versions of transformers the experts had these names. LoRA cannot be put on the linear layers, for
    example gate_proj of a shared expert: https://github.com/huggingface/peft,
    utils/transformers_weight_conversion.py.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, conversions=None)
    return set(names) - set(config.target_modules or ())


def native_names(wanted: list[str], names: Collection[str]) -> list[str]:
    """Return the wanted names, without duplicates; names of fused 2023 layouts are replaced by the native ones."""
    native: list[str] = []

    for name in wanted:
        new = _OLD_NAMES.get(name) or _OLD_NAMES.get(name.rpartition('.')[2], ())
        replaceable = bool(new) and set(new) <= set(names)

        # The vision tower of Qwen-VL has layers named c_proj: the name stays, and the native names are added.
        if name in names or not replaceable:
            native.append(name)

        if replaceable:
            logger.info(f'lora_target_modules: {name} is {", ".join(new)} in the native class')
            native += new

    return list(dict.fromkeys(native))


def find_towers(model: Any) -> list[str]:
    """Return the names of the vision towers: the largest modules outside the language model and its output head."""
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
    """Exclude the vision towers and the output head from quantisation by bitsandbytes.

    `build` makes the model; it runs on the meta device, without weights.
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

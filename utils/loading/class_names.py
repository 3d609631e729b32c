"""Maps the names of tensors in the files of a model to their names in the model's class.

transformers renames tensors on loading, and merges some of them, for example the experts of a layer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from utils.loading.opening import language_name

# PEFT puts these words into the path of a layer that it wraps.
_WRAPPED = ('.base_layer', '.original_module')
# Parts of the paths of tensors that belong to the adapter.
_OF_ADAPTER = ('.lora_', '.modules_to_save.')


def tensors_of_class(model: Any) -> dict[str, Any]:
    """Return the tensors of the model's state dict by name, without the tensors of an adapter on the model.

    A name is the name that the tensor has if the model has no adapter.
    """
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(part in f'.{name}' for part in _OF_ADAPTER):
            continue
        for word in _WRAPPED:
            name = name.replace(word, '')
        found[name] = tensor
    return found


def names_in_class(model: Any, stored: Collection[str]) -> dict[str, str | None]:
    """Return a dict from the names `stored` to names in the model's class, for the same tensors.

    `stored` are the names of tensors in the weight files of the model. For example, the name
    language_model.model.norm.weight in a file can be the name model.norm.weight in the class. If the class merges a
    tensor with others or splits it, the value is ''. If the class does not load a tensor, the value is None.
    """
    held = dict.fromkeys(tensors_of_class(model), True)
    return {name: _name_in_class(model, held, name) for name in stored}


def _name_in_class(model: Any, held: dict[str, bool], name: str) -> str | None:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = vars(model).get('_weight_conversions') or []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    for source in dict.fromkeys((name, language_name(name))):
        for rules in ((renamings, converters), ([], [])):
            # These are the two attempts of convert_and_load_state_dict_in_model in transformers.
            renamed, converter = rename_source_key(source, *rules, model.base_model_prefix, held)
            if renamed in held:
                return renamed if converter is None else ''
    return None

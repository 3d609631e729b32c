"""Family: the functions that convert the checkpoints of one model family of 2023 to a native class.

A model of 2023 came with its own Python code. The original checkpoints are the checkpoints for this code. A native
class is a class of transformers or of this project.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]
# A state dict: tensor name -> tensor. Tensors of files stay memory-mapped until they are used in a computation.
State = dict[str, 'torch.Tensor']

# Matches the names of tables, e.g. of rotary frequencies, that old code stored. Native classes compute these tables.
# The dot before `attn` and the `$` at the end are needed: without them, the pattern would also match `c_attn.bias`.
_COMPUTED = re.compile(
    r'(?:^|\.)(?:rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|attn\.masked_bias|attn\.bias|logn_tensor)$'
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The functions that convert the checkpoints of one model family of 2023, and the names of the native classes.

    A model of 2023 came with its own Python code. The original checkpoints are the checkpoints for this code. A native
    class is a class of transformers or of this project.

    `config` returns the arguments of the native configuration. It raises ConfigError if the native class does not
    support a value in the original config.json. `tensors` returns all tensors under the names in the native class. For
    an unknown name, some families raise ConfigError. The other families keep the name, and `check_loading` finds it.

    `config_class` and `model_class` are the names of the native classes. A name without a colon is a class of
    transformers. A name in the form 'module:class' is a class in utils/loading/legacy/classes/.
    """

    name: str
    # An original config.json belongs to the family if it has this model_type and `matches` returns True for it.
    model_type: str
    matches: Callable[[Config], bool] = lambda config: True
    config_class: str
    model_class: str
    config: Callable[[Config], dict[str, Any]]
    tensors: Callable[[State, Config], State]
    # Builds the tokenizer from the file `vocabulary`. If the folder has no such file, transformers opens the tokenizer.
    tokenizer: Callable[[Path], Any] | None = None
    vocabulary: str | None = None
    # The model_type in config.json after a class of this project saved the model. None if the class is in transformers.
    saved_model_type: str | None = None
    # If transformers knows saved_model_type too, only a config.json with this field was saved by a class of this
    # project.
    saved_field: str | None = None

    @property
    def model_types(self) -> tuple[str, ...]:
        """Return the model_type of the original layout, followed by saved_model_type if there is one."""
        return (self.model_type, self.saved_model_type) if self.saved_model_type else (self.model_type,)


def is_computed(key: str) -> bool:
    """Return whether `key` names a table that transformers computes, for example inv_freq of a rotary embedding.

    The checkpoints of 2023 contain these tables.
    """
    return _COMPUTED.search(key) is not None


def map_each(state: State, rename: Callable[[str, Any], Mapping[str, Any]]) -> State:
    """Call `rename(key, tensor)` for each tensor of `state`, and return all results in one dict.

    Tables that transformers computes itself, such as inv_freq, are left out. Raises ConfigError if two results contain
    the same name.
    """
    mapped: State = {}

    for key, tensor in state.items():
        if is_computed(key):
            continue

        for new, value in rename(key, tensor).items():
            if new in mapped:
                raise ConfigError(
                    f"the checkpoint has two tensors for '{new}', and one of them has the name '{key}'. Download or "
                    'copy the checkpoint again.'
                )
            mapped[new] = value

    return mapped


def same_tensors(state: State, original: Config) -> State:
    """Return `state` without the tables that transformers computes itself, such as inv_freq.

    The other tensors keep their names.
    """
    return map_each(state, lambda key, tensor: {key: tensor})


def unknown_key(key: str, family: str) -> ConfigError:
    """Return the error for a tensor whose name does not belong to the family."""
    return ConfigError(
        f"tensor '{key}' is unknown in models of family {family}: these are the weights of another model, or of a "
        'newer version of such a model. Give the --model_type of these weights.'
    )


def refuse(condition: bool, family: str, field: str, value: Any, why: str) -> None:
    """If `condition` is true, raise a ConfigError that names the field of config.json, its value and the reason."""
    if condition:
        raise ConfigError(f'{family}: config.json has {field} = {value!r}, {why}.')

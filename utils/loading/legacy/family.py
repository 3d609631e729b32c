"""Family: how checkpoints of one 2023 layout become a native class of transformers."""

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
# Tensors by name. Tensors of a file stay memory-mapped until they are used in a computation.
State = dict[str, 'torch.Tensor']

# Tables that old code stored and native code computes. Without the dot before `attn` and the anchor at the end, the
# pattern would match `c_attn.bias` too.
_COMPUTED = re.compile(
    r'(?:^|\.)(?:rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|attn\.masked_bias|attn\.bias|logn_tensor)$'
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: pure functions from the original layout to the native one.

    `config` returns the arguments of the native configuration. It raises ConfigError, with the name of the field, for
    what no native class computes exactly. `tensors` returns all native tensors from all original ones, and raises
    ConfigError for an original name that it does not know (see `map_each`). `config_class` and `model_class` are names
    in transformers, or 'module:class' in utils/loading/legacy/classes/ if transformers has no equal class.
    """

    name: str
    # The model_type of the original config.json, and a test of its other fields.
    model_type: str
    matches: Callable[[Config], bool] = lambda config: True
    config_class: str
    model_class: str
    config: Callable[[Config], dict[str, Any]]
    tensors: Callable[[State, Config], State]
    # Builds the tokenizer if the folder has the file `vocabulary`; otherwise tokenizer.json is read.
    tokenizer: Callable[[Path], Any] | None = None
    vocabulary: str | None = None
    # The model_type that a class of this project saves; None if the class is in transformers.
    saved_model_type: str | None = None
    # A field that marks a config.json of this project if transformers knows saved_model_type too.
    saved_field: str | None = None

    @property
    def model_types(self) -> tuple[str, ...]:
        """Return the model_type of the original layout and, if there is one, of the layout that this project saves."""
        return (self.model_type, self.saved_model_type) if self.saved_model_type else (self.model_type,)


def is_computed(key: str) -> bool:
    """Return whether a stored tensor is a table that native classes compute."""
    return _COMPUTED.search(key) is not None


def map_each(state: State, rename: Callable[[str, Any], Mapping[str, Any]]) -> State:
    """Return the results of `rename(key, tensor)` for all tensors except computed tables.

    Raises ConfigError if two results have the same name.
    """
    mapped: State = {}

    for key, tensor in state.items():
        if is_computed(key):
            continue

        for new, value in rename(key, tensor).items():
            if new in mapped:
                raise ConfigError(
                    f"the checkpoint holds '{new}' twice, the second time as '{key}'. Download or copy it again."
                )
            mapped[new] = value

    return mapped


def same_tensors(state: State, original: Config) -> State:
    """Return the tensors without computed tables; their names are those of the native class already."""
    return map_each(state, lambda key, tensor: {key: tensor})


def unknown_key(key: str, family: str) -> ConfigError:
    """Return the error for a tensor that a family does not have."""
    return ConfigError(
        f"tensor '{key}' is not one of family {family}: the checkpoint is of another model or newer. "
        'Pass the --model_type of this checkpoint.'
    )


def refuse(condition: bool, family: str, field: str, value: Any, why: str) -> None:
    """Raise ConfigError if `condition`: config.json asks for what the native class does not compute exactly."""
    if condition:
        raise ConfigError(f'{family}: config.json has {field} = {value!r}, {why}.')

"""How a 2023 checkpoint becomes a native transformers class: what a family module has to say."""

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
# Tensors by name; those of a file are memory-mapped until something computes with them.
State = dict[str, 'torch.Tensor']

# Tables that old code stored and native code computes. The dot before `attn` is escaped and the end is anchored:
# a loose pattern would swallow `c_attn.bias` as well.
_COMPUTED = re.compile(
    r'(?:^|\.)(?:rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|attn\.masked_bias|attn\.bias|logn_tensor)$'
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: pure functions from the original layout to the native one.

    `config` returns the native configuration's arguments and raises ConfigError, naming the field, for what no native
    class can do exactly. `tensors` returns every native tensor from all original ones; an original key that it does
    not know must raise ConfigError (see `map_each`). `modules` are 'module:class' in utils/loading/legacy/classes/
    where transformers has no equal class.
    """

    name: str
    # Original model_type of config.json, and what else tells the family apart.
    model_type: str
    matches: Callable[[Config], bool] = lambda config: True
    config_class: str
    model_class: str
    config: Callable[[Config], dict[str, Any]]
    tensors: Callable[[State, Config], State]
    # Builds the tokenizer from `vocabulary`, where that file lies in the directory; else tokenizer.json is read.
    tokenizer: Callable[[Path], Any] | None = None
    vocabulary: str | None = None
    # The model_type that a class of ours saves; None where transformers has the class.
    saved_model_type: str | None = None
    # A field that a class of ours saves beside a model_type that transformers has too.
    saved_field: str | None = None

    @property
    def model_types(self) -> tuple[str, ...]:
        """Return what config.json calls the original layout, and what it calls the one that a class of ours saves."""
        return (self.model_type, self.saved_model_type) if self.saved_model_type else (self.model_type,)


def is_computed(key: str) -> bool:
    """Return whether a stored tensor is a table that native classes compute themselves."""
    return _COMPUTED.search(key) is not None


def map_each(state: State, rename: Callable[[str, Any], Mapping[str, Any]]) -> State:
    """Return `rename(key, tensor)` over all tensors, computed tables dropped; raises for keys met twice."""
    mapped: State = {}
    for key, tensor in state.items():
        if is_computed(key):
            continue
        for new, value in rename(key, tensor).items():
            if new in mapped:
                raise ConfigError(f"the checkpoint holds '{new}' twice, the second time as '{key}'. Get it again.")
            mapped[new] = value
    return mapped


def same_tensors(state: State, original: Config) -> State:
    """Return the same tensors without stored tables: the names are the native class's already."""
    return map_each(state, lambda key, tensor: {key: tensor})


def unknown_key(key: str, family: str) -> ConfigError:
    """Return the error for a tensor that a family does not have."""
    return ConfigError(f"tensor '{key}' is not one of family {family}: the checkpoint is of another model or newer.")


def refuse(condition: bool, family: str, field: str, value: Any, why: str) -> None:
    """Raise ConfigError where a configuration asks for what the native class cannot do exactly."""
    if condition:
        raise ConfigError(f'{family}: config.json has {field} = {value!r}, {why}.')

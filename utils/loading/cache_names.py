"""The two names of the key-value cache.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache`, in every model, decoder layer and
attention layer (https://github.com/huggingface/transformers/releases/tag/v5.24.0). This project supports both names. So
its functions have no parameter for the cache, but receive the cache in `**kwargs`. The functions of this module find
the cache there under either name.

Remove this module once requirements.txt asks for 5.24 or later. Then the cache can be an ordinary parameter `cache`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The name since 5.24 comes first. An output of 5.24 also answers to the name before, but with a warning.
_NAMES = ('cache', 'past_key_values')


def named_cache(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key-value cache in `values` as a dict {name: cache}. The dict is empty if there is no cache.

    `values` are the keyword arguments or the output of a model or a layer. They have the cache under one of two names.
    """
    return next(({name: values[name]} for name in _NAMES if values.get(name) is not None), {})


def cache_of(values: Mapping[str, Any]) -> Any:
    """Return the key-value cache in `values`, or None if there is none."""
    return next(iter(named_cache(values).values()), None)


def without_cache(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `values` without the two names under which a key-value cache can be stored."""
    return {name: value for name, value in values.items() if name not in _NAMES}

"""Replace the class of a layer inside a model by a fused subclass, and restore the original class."""

from __future__ import annotations

import types

from torch import nn

# Cache of fused classes by (original class, mixin): layers of the same original class share one fused class.
_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def swap_class(layer: nn.Module, mixin: type[nn.Module]) -> None:
    """Change the class of a layer to a subclass of `mixin` and of its original class.

    For example, a LlamaRMSNorm becomes a FusedLlamaRMSNorm. The layer keeps its parameters, buffers and hooks.
    `restore_class` undoes the swap.
    """
    assert not isinstance(layer, mixin), f'{type(layer).__name__} already is a {mixin.__name__}'
    original = type(layer)
    if (original, mixin) not in _CLASSES:
        name = f'Fused{original.__name__}'
        _CLASSES[original, mixin] = type(name, (mixin, original), {'__module__': mixin.__module__})
    layer.__class__ = _CLASSES[original, mixin]
    _bind_hooked_forward(layer)


def restore_class(layer: nn.Module) -> None:
    """Give a layer back the class that it had before `swap_class`."""
    _, original = type(layer).__bases__
    layer.__class__ = original
    _bind_hooked_forward(layer)


def _bind_hooked_forward(layer: nn.Module) -> None:
    """Make accelerate's hooks call the forward of the layer's present class. Does nothing for a layer without hooks.

    If a model is spread over several devices, accelerate gives each layer a `forward` that moves the inputs and then
    calls `_old_forward`. That is still the forward of the class before the swap, so it is replaced.
    """
    if '_old_forward' in vars(layer):
        vars(layer)['_old_forward'] = types.MethodType(type(layer).forward, layer)

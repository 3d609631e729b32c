"""Change the class of a layer that is already part of a model, and change it back."""

from __future__ import annotations

import types

from torch import nn

# One class for all layers of a class, so that two of them still have the same type.
_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def swap_class(layer: nn.Module, mixin: type[nn.Module]) -> None:
    """Give a layer the methods of `mixin`: a LlamaRMSNorm becomes a FusedLlamaRMSNorm, a subclass of both.

    Parameters, buffers and hooks of the layer stay. `restore_class` undoes the swap.
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
    """Let accelerate's hooks call the forward of the layer's present class.

    In a model over several devices accelerate replaces `forward` on the layer itself with one that moves the inputs
    and calls `_old_forward`, which it bound to the class of that time.
    """
    if '_old_forward' in vars(layer):
        vars(layer)['_old_forward'] = types.MethodType(type(layer).forward, layer)

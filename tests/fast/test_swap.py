"""The class of a live layer is changed to a named subclass, and changed back."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from utils.fast.swap import restore_class, swap_class


class _Negated(nn.Module):
    """Mixin with another result, so that the forward that runs shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return minus what the original class returns."""
        result: torch.Tensor = super().forward(x)
        return -result


@pytest.mark.parametrize('hooked', [False, True], ids=['plain', 'hooked by accelerate'])
def test_a_layer_gets_a_named_class_and_its_own_back(hooked: bool) -> None:
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.linspace(-1, 1, 3)
    expected = layer(x)
    weight = layer.weight
    if hooked:
        add_hook_to_module(layer, AlignDevicesHook('cpu'))

    swap_class(layer, _Negated)
    swap_class(other, _Negated)
    assert type(layer).__name__ == 'FusedLinear' and type(layer).__module__ == _Negated.__module__
    assert type(layer) is type(other) and isinstance(layer, nn.Linear)
    assert layer.weight is weight and torch.equal(layer(x), -expected)
    assert torch.equal(copy.deepcopy(layer)(x), -expected)
    with pytest.raises(AssertionError, match='FusedLinear already is a _Negated'):
        swap_class(layer, _Negated)

    restore_class(layer)
    assert type(layer) is nn.Linear and type(other).__name__ == 'FusedLinear'
    assert layer.weight is weight and torch.equal(layer(x), expected)


def test_two_mixins_are_taken_off_in_turn() -> None:
    class _Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = super().forward(x)
            return 2 * result

    layer = nn.Identity()
    x = torch.ones(2)
    swap_class(layer, _Negated)
    swap_class(layer, _Doubled)
    assert torch.equal(layer(x), -2 * x)
    restore_class(layer)
    assert torch.equal(layer(x), -x)
    restore_class(layer)
    assert type(layer) is nn.Identity

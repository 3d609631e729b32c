"""Saves memory in frozen linear layers with quantised weights, by unpacking each weight twice.

The forward pass needs the unpacked weight, and so does the backward pass. Between them, gptqmodel keeps the unpacked
weights of all layers in memory, which takes as much memory as a model that is not quantised. With this module, the
weights are not kept, and the backward pass unpacks them again.

The letters at the end of a name are the dimensions of the tensor: I for input features, O for output features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.fast.swap import swap_class

# A function that returns the weight (O, I) of a frozen layer in a dtype.
WeightOf = Callable[[Any, torch.dtype], torch.Tensor]


def _plain(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    weight_OI: torch.Tensor = layer.weight
    return weight_OI.to(dtype)


def _unpack_bitsandbytes(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    weight = layer.weight
    weight_OI: torch.Tensor = sys.modules['bitsandbytes'].functional.dequantize_4bit(weight, weight.quant_state)
    return weight_OI.to(dtype)


def _unpack_gptq(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    # The forward of the layer computes the same number: it is above 1 if several weights are stacked in one layer.
    stacked = layer.g_idx.shape[0] // layer.in_features
    weight_IO: torch.Tensor = layer.dequantize_weight(num_itr=stacked)
    return weight_IO.to(dtype).t()


# The classes of layers that multiply their input by the weight that the function returns, and add a bias. The other
# classes of gptqmodel cannot train, or they repack their weights during an evaluation.
_FUNCTIONS: dict[str, WeightOf] = {
    'torch.nn.modules.linear.Linear': _plain,
    'bitsandbytes.nn.modules.Linear4bit': _unpack_bitsandbytes,
    'gptqmodel.nn_modules.qlinear.torch.TorchLinear': _unpack_gptq,
    'gptqmodel.nn_modules.qlinear.tritonv2.TritonV2Linear': _unpack_gptq,
}


def path_of(layer: nn.Module) -> str:
    """Return the name of a layer's class with its Python module, for example 'torch.nn.modules.linear.Linear'.

    By this name, classes of optional packages are recognised without importing the packages.
    """
    kind = type(layer)
    return f'{kind.__module__}.{kind.__qualname__}'


def find_weight(layer: nn.Module) -> WeightOf | None:
    """Return the function that gives the whole weight of this layer, or None if the class of the layer is not known.

    If the weight is quantised, the function unpacks it.
    """
    return _FUNCTIONS.get(path_of(layer))


class _FrozenStep(torch.autograd.Function):
    """Computes the output of a frozen quantised layer, without saving the unpacked weight for the backward pass.

    The backward pass unpacks the weight again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Module, compute: Callable[..., torch.Tensor]) -> torch.Tensor:
        ctx.layer = layer
        return compute(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad = grads[0]
        return grad @ _unpack_gptq(ctx.layer, grad.dtype), None, None


class _FusedPacked(nn.Module):
    """Mixin for quantised layers of gptqmodel, so that they save no unpacked weight for the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            out: torch.Tensor = super().forward(x)
            return out
        frozen: torch.Tensor = _FrozenStep.apply(x, self, super().forward)
        return frozen


def fuse_packed(model: nn.Module) -> int:
    """Change a model's GPTQ layers so that they save no unpacked weight for the backward pass.

    Returns the number of changed layers. Only the classes TorchLinear and TritonV2Linear of gptqmodel are changed.
    """
    layers = [layer for layer in model.modules() if find_weight(layer) is _unpack_gptq]
    for layer in layers:
        swap_class(layer, _FusedPacked)
    return len(layers)

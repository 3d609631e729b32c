"""LoRA layers for --tuner_backend swift: one step computes base and adapter, with little memory for the backward pass.

The letters at the end of a name are the dimensions of the tensor. For example, `a_RI` has the shape
[rank, input features].

    N: tokens
    I: input features
    O: output features
    R: rank of the adapter
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from utils.fast.frozen import WeightOf, find_weight, path_of
from utils.fast.low_copies import LowCopies
from utils.fast.swap import swap_class

# PEFT's layers that add the output of an adapter to the output of a linear layer.
_PEFT_LAYERS = (
    'peft.tuners.lora.layer.Linear',
    'peft.tuners.lora.bnb.Linear4bit',
    'peft.tuners.lora.gptq.GPTQLoraLinear',
)


class _LoraStep(torch.autograd.Function):
    """Computes y = base(x) + scale * (x @ A.T) @ B.T. The base layer is frozen, the LoRA matrices A and B are trained.

    `weight_of` returns the weight of the base layer. It is called in the backward pass, and only if x needs a gradient.
    `low_a_RI` and `low_b_OR` are A and B in the dtype of x. `a_RI` and `b_OR` are passed only to get their gradients.

    Only x, x @ A.T and the copies of A and B are saved for the backward pass, in the dtype of x. Layers with the same
    input, for example query, key and value, share the memory of x. PEFT's own layer saves a copy of x in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: nn.Module,
        weight_of: WeightOf,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        low_a_RI: torch.Tensor,
        low_b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        x_NI = x.flatten(0, -2)
        inner_NR = x_NI @ low_a_RI.t()
        out_NO: torch.Tensor = base(x_NI).addmm_(inner_NR, low_b_OR.t(), alpha=scale)
        ctx.base = base
        ctx.weight_of = weight_of
        ctx.scale = scale
        ctx.dtypes = a_RI.dtype, b_OR.dtype
        ctx.save_for_backward(x, inner_NR, low_a_RI, low_b_OR)
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, inner_NR, low_a_RI, low_b_OR = ctx.saved_tensors
        grad_NO = grads[0].flatten(0, -2)
        inner_grad_NR = (grad_NO @ low_b_OR).mul_(ctx.scale)

        x_grad = None
        if ctx.needs_input_grad[0]:
            weight_OI = ctx.weight_of(ctx.base, grad_NO.dtype)
            x_grad = (grad_NO @ weight_OI).addmm_(inner_grad_NR, low_a_RI).view_as(x)
        a_grad_RI = (inner_grad_NR.t() @ x.flatten(0, -2)).to(ctx.dtypes[0])
        b_grad_OR = (grad_NO.t() @ inner_NR).to(ctx.dtypes[1]).mul_(ctx.scale)
        return x_grad, None, None, a_grad_RI, b_grad_OR, None, None, None


def _adapter_in_use(layer: Any, kwargs: dict[str, Any]) -> str | None:
    """Return the name of the active adapter if `_LoraStep` can compute the layer now, otherwise None.

    `_LoraStep` can compute the layer under four conditions:

    - Exactly one adapter is active, and it is not merged or disabled.
    - No dropout is active.
    - The base layer is frozen.
    - `kwargs`, the keyword arguments of the forward, are empty.
    """
    active = layer.active_adapters
    if len(active) != 1 or layer.disable_adapters or layer.merged or kwargs or layer.base_layer.weight.requires_grad:
        return None
    name: str = active[0]
    drops_out = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    return None if drops_out else name


def _factors(layer: Any, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return four tensors: the LoRA matrices A and B of the adapter `name`, and both once more in `dtype`."""
    weights = layer.lora_A[name].weight, layer.lora_B[name].weight
    return *weights, *(layer.low_copies.of(weight, dtype) for weight in weights)


class _FusedLora(nn.Module):
    """Mixin for PEFT's LoRA layers on a frozen linear layer. It computes the output with `_LoraStep`.

    PEFT's own forward is called instead if `_adapter_in_use` returns None.
    """

    base_layer: nn.Module
    lora_A: nn.ModuleDict  # noqa: N815 - the name in PEFT
    lora_B: nn.ModuleDict  # noqa: N815 - the name in PEFT
    scaling: dict[str, float]
    weight_of: WeightOf

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the base layer plus the output of the adapter."""
        name = _adapter_in_use(self, kwargs)
        if name is None:
            out: torch.Tensor = super().forward(x, *args, **kwargs)
            return out

        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        adapter = _factors(self, name, x.dtype)
        fused: torch.Tensor = _LoraStep.apply(x, self.base_layer, self.weight_of, *adapter, self.scaling[name])
        return fused


def fuse_lora(model: nn.Module) -> tuple[int, int]:
    """Replace the forward of a model's LoRA layers by the fused forward.

    Returns the number of layers that were replaced, and the number of all LoRA layers. A layer is replaced if its base
    is a plain linear layer, a 4-bit layer of bitsandbytes, or a TorchLinear or TritonV2Linear of gptqmodel. Layers with
    DoRA, or with a bias in the adapter, are not replaced.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    copies = LowCopies()
    fused = 0
    for layer in layers:
        weight_of = _find_weight(layer)
        if weight_of is not None:
            swap_class(layer, _FusedLora)
            vars(layer).update(low_copies=copies, weight_of=weight_of)
            fused += 1
    return fused, len(layers)


def _find_weight(layer: LoraLayer) -> WeightOf | None:
    """Return a function that gives the base weight of a LoRA layer. Returns None if the layer cannot be fused."""
    if layer.lora_variant or any(layer.lora_bias.values()) or path_of(layer) not in _PEFT_LAYERS:
        return None
    return find_weight(layer.base_layer)

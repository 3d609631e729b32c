"""LoRA layers for --tuner_backend swift: one step computes base and adapter, with little memory for the backward pass.

Shapes in names: N tokens, I input features, O output features, R rank of the adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from utils.fast.low_copies import LowCopies
from utils.fast.swap import swap_class


class _LoraStep(torch.autograd.Function):
    """Computes y = x W^T + b + scale (x A^T) B^T. W and b are frozen, A and B are trained.

    `low_a_RI` and `low_b_OR` are A and B in the dtype of x. A and B themselves are only passed to get their gradients.
    Only x and x A^T are saved for the backward pass. Layers with the same input, such as query, key and value, share
    the memory of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        low_a_RI: torch.Tensor,
        low_b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        x_NI = x.flatten(0, -2)
        inner_NR = x_NI @ low_a_RI.t()
        out_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(inner_NR, low_b_OR.t(), alpha=scale)
        ctx.scale = scale
        ctx.dtypes = a_RI.dtype, b_OR.dtype
        ctx.save_for_backward(x, weight_OI, inner_NR, low_a_RI, low_b_OR)
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight_OI, inner_NR, low_a_RI, low_b_OR = ctx.saved_tensors
        x_grad, a_grad_RI, b_grad_OR = _gradients(ctx, grads[0], x, inner_NR, low_a_RI, low_b_OR, lambda: weight_OI)
        return x_grad, None, None, a_grad_RI, b_grad_OR, None, None, None


class _Lora4BitStep(torch.autograd.Function):
    """Computes y = base(x) + scale (x A^T) B^T for a layer of bitsandbytes with 4-bit weights. A and B are trained.

    Only x and x A^T are saved for the backward pass, in the dtype of x. PEFT's own layer saves a copy of x in fp32. The
    backward pass converts the weights to the dtype of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: nn.Module,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        low_a_RI: torch.Tensor,
        low_b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        inner_NR = x.flatten(0, -2) @ low_a_RI.t()
        out: torch.Tensor = base(x)
        out.flatten(0, -2).addmm_(inner_NR, low_b_OR.t(), alpha=scale)
        ctx.scale = scale
        ctx.base = base
        ctx.dtypes = a_RI.dtype, b_OR.dtype
        ctx.save_for_backward(x, inner_NR, low_a_RI, low_b_OR)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        def dequantised() -> torch.Tensor:
            weight = ctx.base.weight
            stored: torch.Tensor = sys.modules['bitsandbytes'].functional.dequantize_4bit(weight, weight.quant_state)
            return stored.to(grads[0].dtype)

        x, inner_NR, low_a_RI, low_b_OR = ctx.saved_tensors
        x_grad, a_grad_RI, b_grad_OR = _gradients(ctx, grads[0], x, inner_NR, low_a_RI, low_b_OR, dequantised)
        return x_grad, None, a_grad_RI, b_grad_OR, None, None, None


def _gradients(
    ctx: Any,
    grad: torch.Tensor,
    x: torch.Tensor,
    inner_NR: torch.Tensor,
    low_a_RI: torch.Tensor,
    low_b_OR: torch.Tensor,
    weight_of: Callable[[], torch.Tensor],
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, A and B for the gradient `grad` of the output. That of x is None if it is not needed.

    `ctx` holds the scale, and the dtypes of A and B. `weight_of` returns the weight (O, I) of the base layer. It is
    called only for the gradient of x.
    """
    grad_NO = grad.flatten(0, -2)
    inner_grad_NR = (grad_NO @ low_b_OR).mul_(ctx.scale)

    x_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = (grad_NO @ weight_of()).addmm_(inner_grad_NR, low_a_RI).view_as(x)
    a_grad_RI = (inner_grad_NR.t() @ x.flatten(0, -2)).to(ctx.dtypes[0])
    b_grad_OR = (grad_NO.t() @ inner_NR).to(ctx.dtypes[1]).mul_(ctx.scale)
    return x_grad, a_grad_RI, b_grad_OR


def _adapter_in_use(layer: Any, kwargs: dict[str, Any]) -> str | None:
    """Return the name of the adapter if a LoRA layer can be computed in one step now, otherwise None.

    One step is possible with exactly one active adapter that is not merged or disabled. It is not possible with active
    dropout, a trained base layer or keyword arguments.
    """
    active = layer.active_adapters
    if len(active) != 1 or layer.disable_adapters or layer.merged or kwargs or layer.base_layer.weight.requires_grad:
        return None
    name: str = active[0]
    drops_out = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    return None if drops_out else name


def _factors(layer: Any, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return four tensors of an adapter: A and B, then A and B in `dtype`."""
    weights = layer.lora_A[name].weight, layer.lora_B[name].weight
    return *weights, *(layer.low_copies.of(weight, dtype) for weight in weights)


class _FusedLora(Linear):
    """Mixin for PEFT's LoRA layer on a frozen linear layer. It computes the output with `_LoraStep`.

    PEFT's own forward is called instead if `_adapter_in_use` returns None.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the base layer plus the output of the adapter."""
        base = self.base_layer
        name = _adapter_in_use(self, kwargs)
        if name is None:
            out: torch.Tensor = super().forward(x, *args, **kwargs)
            return out

        device = x.device.type
        weight = base.weight
        bias = base.bias
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x = x.to(dtype)
            weight = weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)

        adapter = _factors(self, name, x.dtype)
        fused: torch.Tensor = _LoraStep.apply(x, weight, bias, *adapter, self.scaling[name])
        return fused


class _FusedLora4Bit(nn.Module):
    """Mixin for PEFT's LoRA layer on a layer with 4-bit weights. It computes the output with `_Lora4BitStep`."""

    base_layer: nn.Module
    lora_A: nn.ModuleDict  # noqa: N815 - the name in PEFT
    lora_B: nn.ModuleDict  # noqa: N815 - the name in PEFT
    scaling: dict[str, float]

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
        fused: torch.Tensor = _Lora4BitStep.apply(x, self.base_layer, *adapter, self.scaling[name])
        return fused


def fuse_lora(model: nn.Module) -> tuple[int, int]:
    """Replace the forward of a model's LoRA layers by the fused forward.

    Returns the number of layers that were replaced, and the number of all LoRA layers. Layers with 8-bit or GPTQ
    weights, Conv1D, DoRA and adapters with a bias are not replaced.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    copies = LowCopies()
    fused = 0
    for layer in layers:
        mixin = _mixin_for(layer)
        if mixin is not None:
            swap_class(layer, mixin)
            vars(layer)['low_copies'] = copies
            fused += 1
    return fused, len(layers)


def _mixin_for(layer: LoraLayer) -> type[nn.Module] | None:
    """Return the mixin that fuses a LoRA layer, or None if none does."""
    if layer.lora_variant or any(layer.lora_bias.values()):
        return None
    if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
        return _FusedLora
    # Both modules are loaded only if a model has such layers.
    peft_layers = sys.modules.get('peft.tuners.lora.bnb')
    bitsandbytes = sys.modules.get('bitsandbytes')
    if peft_layers is None or bitsandbytes is None or type(layer).__module__ != peft_layers.__name__:
        return None
    return _FusedLora4Bit if type(layer.base_layer) is bitsandbytes.nn.Linear4bit else None

"""LoRA layers for --tuner_backend swift: one step computes base and adapter, with little memory for the backward pass.

Shapes in names: N tokens, I input features, O output features, R rank of the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from utils.fast.swap import swap_class


class _LoraStep(torch.autograd.Function):
    """Computes y = x W^T + b + scale (x A^T) B^T. W and b are frozen, A and B are trained.

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
        scale: float,
    ) -> torch.Tensor:
        x_NI = x.flatten(0, -2)
        low_a_RI = a_RI.to(x.dtype)
        low_b_OR = b_OR.to(x.dtype)

        inner_NR = x_NI @ low_a_RI.t()
        out_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(inner_NR, low_b_OR.t(), alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight_OI, inner_NR, a_RI, b_OR)
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight_OI, inner_NR, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grads[0].flatten(0, -2)
        inner_grad_NR = (grad_NO @ b_OR.to(grad_NO.dtype)).mul_(ctx.scale)

        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad_NO @ weight_OI).addmm_(inner_grad_NR, a_RI.to(grad_NO.dtype)).view_as(x)
        a_grad_RI = (inner_grad_NR.t() @ x.flatten(0, -2)).to(a_RI.dtype)
        b_grad_OR = (grad_NO.t() @ inner_NR).to(b_OR.dtype).mul_(ctx.scale)
        return x_grad, None, None, a_grad_RI, b_grad_OR, None


class _FusedLora(Linear):
    """Mixin for PEFT's LoRA layer on a frozen linear layer. It computes the output with `_LoraStep`.

    PEFT's own forward is called instead if there is not exactly one active adapter, if the adapter is merged or
    disabled, if dropout is active, if the base layer is trained, or if there are keyword arguments.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the base layer plus the output of the adapter."""
        base = self.base_layer
        active = self.active_adapters
        has_one_adapter = len(active) == 1 and not self.disable_adapters and not self.merged and not kwargs
        if not has_one_adapter or base.weight.requires_grad or (self.training and self._drops_out(active[0])):
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

        (name,) = active
        fused: torch.Tensor = _LoraStep.apply(
            x, weight, bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )
        return fused

    def _drops_out(self, name: str) -> bool:
        return not isinstance(self.lora_dropout[name], nn.Identity)


def fuse_lora(model: nn.Module) -> tuple[int, int]:
    """Replace the forward of a model's LoRA layers by the fused forward.

    Returns the number of layers that were replaced, and the number of all LoRA layers. Quantised layers, Conv1D, DoRA
    and adapters with a bias are not replaced.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    fused = [layer for layer in layers if _can_be_fused(layer)]
    for layer in fused:
        swap_class(layer, _FusedLora)
    return len(fused), len(layers)


def _can_be_fused(layer: LoraLayer) -> bool:
    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
        return False
    return not layer.lora_variant and not any(layer.lora_bias.values())

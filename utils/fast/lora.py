"""tuner_backend swift: PEFT's own LoRA layers, base and adapter computed in one step that keeps the least for later."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import nn


class _LoraStep(torch.autograd.Function):
    """y = x W^T + b + scale (x A^T) B^T; keeps x, which neighbouring layers share, and x A^T. W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        low_down, low_up = down.to(x.dtype), up.to(x.dtype)
        between = rows @ low_down.t()
        out = F.linear(rows, weight, bias).addmm_(between, low_up.t(), alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, between, down, up)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, between, down, up = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        to_between = (grad @ up.to(grad.dtype)).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ weight).addmm_(to_between, down.to(grad.dtype)).view_as(x)
        to_down = (to_between.t() @ x.flatten(0, -2)).to(down.dtype)
        to_up = (grad.t() @ between).to(up.dtype).mul_(ctx.scale)
        return to_x, None, None, to_down, to_up, None


class SwiftLinear(Linear):
    """PEFT's LoRA layer on a frozen linear layer; what it does not compute itself it leaves to PEFT."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base layer's output plus the adapter's."""
        base = self.base_layer
        active = self.active_adapters
        plain = len(active) == 1 and not self.disable_adapters and not self.merged and not kwargs
        if not plain or base.weight.requires_grad or (self.training and self._drops_out(active[0])):
            out: torch.Tensor = super().forward(x, *args, **kwargs)
            return out
        device, weight, bias = x.device.type, base.weight, base.bias
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        (name,) = active
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        stepped: torch.Tensor = _LoraStep.apply(x, weight, bias, down, up, self.scaling[name])
        return stepped

    def _drops_out(self, name: str) -> bool:
        return not isinstance(self.lora_dropout[name], nn.Identity)


def fuse_lora(model: nn.Module) -> tuple[int, int]:
    """Give the LoRA layers of a model their one-step forward; returns how many have it and how many there are.

    The others stay PEFT's: quantised layers, Conv1D, DoRA and biases of the adapter.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    fused = [m for m in layers if type(m) is Linear and type(m.base_layer) is nn.Linear]
    fused = [m for m in fused if not m.lora_variant and not any(m.lora_bias.values())]
    for layer in fused:
        layer.__class__ = SwiftLinear
    return len(fused), len(layers)

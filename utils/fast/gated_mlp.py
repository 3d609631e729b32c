"""Fused act(gate) * up for gated MLPs (SwiGLU and the like) of any class.

Only gate and up are saved for the backward pass.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.fast.swap import swap_class

# The layers and the activation of a gated MLP under Llama's names, which most classes use.
_LAYERS = ('gate_proj', 'up_proj', 'down_proj')
_PARTS = {*_LAYERS, 'act_fn'}


class _GatedStep(torch.autograd.Function):
    """y = act(gate) * up. Saves only gate and up; the backward pass computes act(gate) again."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)

        gate_grad = None
        if ctx.needs_input_grad[0]:
            (gate_grad,) = torch.autograd.grad(activated, gate, grads[0] * up)
        up_grad = None
        if ctx.needs_input_grad[1]:
            up_grad = grads[0] * activated.detach()
        return gate_grad, up_grad, None


class _FusedGate(nn.Module):
    """Mixin for the class of a gated MLP: the same layers, and one step for what is between them."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down(act(gate(x)) * up(x))."""
        product: torch.Tensor = _GatedStep.apply(self.gate_proj(x), self.up_proj(x), self.act_fn)
        out: torch.Tensor = self.down_proj(product)
        return out


def fuse_gates(model: nn.Module) -> int:
    """Give the gated MLPs of a model the fused forward; returns how many have it.

    An MLP gets it if its class, with small layers in place of its own, gives exactly the same values.
    """
    fused = 0
    for block in list(model.modules()):
        if set(block._modules) != _PARTS or block._parameters or isinstance(block, _FusedGate):
            continue
        if _is_gated(block):
            swap_class(block, _FusedGate)
            fused += 1
    return fused


@torch.no_grad()
def _is_gated(block: nn.Module) -> bool:
    """Return whether the class of a block computes what `_FusedGate` does."""
    if len(inspect.signature(type(block).forward).parameters) != 2:
        return False

    layers = [torch.nn.utils.skip_init(nn.Linear, 8, 8, bias=False) for _ in _LAYERS]
    for number, layer in enumerate(layers, 1):
        layer.weight.copy_((number * torch.arange(64.0)).sin().view(8, 8))
    gate, up, down = layers
    act = block.get_submodule('act_fn')

    small = copy.copy(block)
    vars(small).pop('forward', None)  # accelerate's, in a model over several devices: it would call the block's layers
    small._modules = {**dict(zip(_LAYERS, layers, strict=True)), 'act_fn': act}
    x = torch.linspace(-3, 5, 24).sin().view(3, 8)
    return torch.equal(small(x), down(act(gate(x)) * up(x)))

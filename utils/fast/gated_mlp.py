"""Replaces the forward of gated MLPs (for example SwiGLU) by a fused forward that needs less memory.

A gated MLP computes down(act(gate(x)) * up(x)). The fused forward does not save act(gate(x)) for the backward pass. The
backward pass computes it again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.fast.kernel_trial import gate_kernel
from utils.fast.swap import swap_class

# The names of the layers and the activation of a gated MLP in Llama. Most other classes use the same names.
_LAYERS = ('gate_proj', 'up_proj', 'down_proj')
_PARTS = {*_LAYERS, 'act_fn'}


class _GatedStep(torch.autograd.Function):
    """Computes act(gate) * up, and saves only gate and up for the backward pass, which computes act(gate) again."""

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
    """Mixin for a gated MLP. It keeps the layers of the MLP, but does not save act(gate(x)) for the backward pass."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down(act(gate(x)) * up(x))."""
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        act = type(self.act_fn)
        kernel = gate_kernel(f'{act.__module__}.{act.__name__}', gate.dtype, gate.device)
        product: torch.Tensor = kernel(gate, up) if kernel else _GatedStep.apply(gate, up, self.act_fn)
        out: torch.Tensor = self.down_proj(product)
        return out


def fuse_gates(model: nn.Module) -> int:
    """Replace the forward of a model's gated MLPs by the fused forward, and return the number of replaced MLPs.

    An MLP is replaced only if its submodules are exactly gate_proj, up_proj, down_proj and act_fn, and if its own
    forward and the fused forward give bitwise the same output in a test. The test is made on a copy of the MLP that has
    small linear layers.
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
    """Return whether the forward of `block` computes the formula down(act(gate(x)) * up(x)).

    The test is made on a copy of the block with small linear layers. The output of the forward must be bitwise equal
    to the result of the formula.
    """
    if len(inspect.signature(type(block).forward).parameters) != 2:
        return False

    layers = [torch.nn.utils.skip_init(nn.Linear, 8, 8, bias=False) for _ in _LAYERS]
    for number, layer in enumerate(layers, 1):
        layer.weight.copy_((number * torch.arange(64.0)).sin().view(8, 8))
    gate, up, down = layers
    act = block.get_submodule('act_fn')

    small = copy.copy(block)
    vars(small).pop('forward', None)  # on several devices accelerate sets a forward that calls the original layers
    small._modules = {**dict(zip(_LAYERS, layers, strict=True)), 'act_fn': act}
    x = torch.linspace(-3, 5, 24).sin().view(3, 8)
    return torch.equal(small(x), down(act(gate(x)) * up(x)))

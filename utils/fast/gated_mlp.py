"""The gated blocks of any class (SwiGLU and its kin) with what is between their layers in one step that keeps least."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.fast.norm import put_before

# The layers and the activation of a gated block: Llama's names, which most classes have.
_LAYERS = ('gate_proj', 'up_proj', 'down_proj')
_PARTS = {*_LAYERS, 'act_fn'}


class _GatedStep(torch.autograd.Function):
    """y = act(gate) * up; keeps gate and up alone, the backward pass computes act(gate) again."""

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
            acted = ctx.act(gate)
        to_gate = torch.autograd.grad(acted, gate, grads[0] * up)[0] if ctx.needs_input_grad[0] else None
        return to_gate, grads[0] * acted.detach() if ctx.needs_input_grad[1] else None, None


class _FusedGate(nn.Module):
    """Put before a class of gated blocks: the same layers, with what is between them in one step."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down(act(gate(x)) * up(x))."""
        between: torch.Tensor = _GatedStep.apply(self.gate_proj(x), self.up_proj(x), self.act_fn)
        out: torch.Tensor = self.down_proj(between)
        return out


def fuse_gates(model: nn.Module) -> int:
    """Give the gated blocks of a model their one-step forward; returns how many have it.

    A class has it where its code, with small layers in place of the block's own, gives the very same values.
    """
    fused, classes = 0, dict[type[nn.Module], type[nn.Module]]()
    for block in list(model.modules()):
        if set(block._modules) != _PARTS or block._parameters or isinstance(block, _FusedGate):
            continue
        if _is_gated(block):
            put_before(block, _FusedGate, classes)
            fused += 1
    return fused


@torch.no_grad()
def _is_gated(block: nn.Module) -> bool:
    """Return whether the class of a block computes what `_FusedGate` does."""
    if len(inspect.signature(type(block).forward).parameters) != 2:
        return False
    small, act = copy.copy(block), block.get_submodule('act_fn')
    vars(small).pop('forward', None)  # of a model over several devices: it would call the block's own layers
    gate, up, down = layers = [torch.nn.utils.skip_init(nn.Linear, 8, 8, bias=False) for _ in _LAYERS]
    for number, layer in enumerate(layers, 1):
        layer.weight.copy_((number * torch.arange(64.0)).sin().view(8, 8))
    small._modules = {**dict(zip(_LAYERS, layers, strict=True)), 'act_fn': act}
    x = torch.linspace(-3, 5, 24).sin().view(3, 8)
    return torch.equal(small(x), down(act(gate(x)) * up(x)))

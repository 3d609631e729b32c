"""A fused RMSNorm that needs little memory for the backward pass.

On a CPU, its output is bitwise that of the original layer. On a GPU, a Triton kernel computes it if the kernel passes
its trial. The output can then differ by rounding.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from utils.fast.kernel_trial import norm_kernel
from utils.fast.swap import swap_class

# The kinds of RMSNorm. Each kind first computes x / rms(x) in fp32.
# round_first (Llama): round, then multiply by the weight. round_last (OLMo 2): multiply by the weight, then round.
# one_plus (Gemma): multiply by one plus the weight, then round.
Kind = Literal['round_first', 'round_last', 'one_plus']
_KINDS: tuple[Kind, ...] = ('round_first', 'round_last', 'one_plus')
# The classes store epsilon, the constant that is added to the mean square, under one of these attribute names.
_EPSILONS = ('variance_epsilon', 'eps', 'epsilon')


class _NormStep(torch.autograd.Function):
    """Computes RMSNorm: weight * x / rms(x). The backward pass normalises x again, to save memory.

    `kind` says in which order the result is multiplied and rounded, and whether 1 is added to the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: Kind) -> torch.Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
        ctx.kind = kind
        ctx.save_for_backward(x, weight, scale)
        if kind == 'round_first':
            return weight * (exact * scale).to(x.dtype)
        return (exact * scale).mul_(_factor(weight, kind, exact.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0]
        normal = x * scale

        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None, None

        factor = _factor(weight, ctx.kind, weight.dtype if ctx.kind == 'round_first' else scale.dtype)
        normal_grad = (grad * factor).to(scale.dtype)
        mean = torch.linalg.vecdot(normal_grad, normal).unsqueeze(-1).div_(x.shape[-1])
        x_grad = normal_grad.sub_(normal.mul_(mean)).mul_(scale).to(x.dtype)
        return x_grad, weight_grad, None, None


def _factor(weight: torch.Tensor, kind: Kind, dtype: torch.dtype) -> torch.Tensor:
    """Return the factor for the normalised x: 1 + `weight` if `kind` is 'one_plus', otherwise `weight`."""
    if kind == 'one_plus':
        return 1.0 + weight.to(torch.promote_types(dtype, torch.float32))
    return weight.to(dtype)


class _FusedNorm(nn.Module):
    """Mixin for an RMSNorm layer, so that it needs less memory for the backward pass.

    It keeps the weight and epsilon of the layer.
    """

    weight: nn.Parameter
    norm_kind: Kind
    norm_epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, normalised over its last dimension and multiplied by the weight (one_plus: 1 + the weight)."""
        weight = self.weight
        kernel = norm_kernel(self.norm_kind, x.dtype, weight.dtype, x.shape[-1], x.device, _NormStep.apply)
        normalised: torch.Tensor = (kernel or _NormStep.apply)(x, weight, self.norm_epsilon, self.norm_kind)
        return normalised


def fuse_norms(model: nn.Module) -> int:
    """Replace the forward of a model's RMSNorm layers by the fused forward, and return the number of replaced layers.

    A layer is replaced only if the name of its class ends in RMSNorm, and if a known variant of RMSNorm gives bitwise
    the same output on test inputs.
    """
    fused = 0
    for layer in list(model.modules()):
        fields = vars(layer)
        epsilon = next((fields[name] for name in _EPSILONS if isinstance(fields.get(name), float)), None)
        if not type(layer).__name__.endswith('RMSNorm') or epsilon is None or set(layer._parameters) != {'weight'}:
            continue
        if isinstance(layer, _FusedNorm):
            continue

        kind = _kind_of(layer, epsilon)
        if kind is not None:
            fields.update(norm_kind=kind, norm_epsilon=epsilon)
            swap_class(layer, _FusedNorm)
            fused += 1
    return fused


@torch.no_grad()
def _kind_of(layer: nn.Module, epsilon: float) -> Kind | None:
    """Return the first kind of RMSNorm that gives bitwise the same output as the layer on test inputs, or None."""
    weight = layer.get_parameter('weight')
    equal = set(_KINDS)
    # bf16 input is tried too, because under autocast layers with fp32 weights get bf16 input. In fp32 nothing is
    # rounded, so round_first and round_last give the same values.
    for dtype in (weight.dtype, torch.bfloat16):
        x = torch.linspace(-3, 5, 3 * weight.shape[-1], device=weight.device).sin().view(3, -1).to(dtype)
        expected = layer(x)
        found = {kind: _NormStep.apply(x, weight, epsilon, kind) for kind in equal}
        equal = {kind for kind, y in found.items() if y.dtype == expected.dtype and torch.equal(y, expected)}
    return next((kind for kind in _KINDS if kind in equal), None)

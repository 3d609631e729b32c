"""RMSNorm in one step that keeps its input alone, on the norm layers of any class that compute just that."""

from __future__ import annotations

import types
from typing import Any, Literal

import torch
from torch import nn

# What classes do after x / rms(x) in fp32: round and then multiply by the weight (Llama), multiply and then round
# (OLMo 2), or multiply by one plus the weight and then round (Gemma).
Kind = Literal['round_first', 'round_last', 'one_plus']
_KINDS: tuple[Kind, ...] = ('round_first', 'round_last', 'one_plus')
# The names under which classes hold what is added to the mean square.
_EPSILONS = ('variance_epsilon', 'eps', 'epsilon')


class _NormStep(torch.autograd.Function):
    """y = w x / rms(x), computed in fp32 and rounded to the dtype of x; the backward pass normalises x again."""

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
        normal = x * scale
        grad, to_weight = grads[0], None
        if ctx.needs_input_grad[1]:
            to_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None, None
        factor = _factor(weight, ctx.kind, weight.dtype if ctx.kind == 'round_first' else scale.dtype)
        inner = (grad * factor).to(scale.dtype)
        mean = torch.linalg.vecdot(inner, normal).unsqueeze(-1).div_(x.shape[-1])
        return inner.sub_(normal.mul_(mean)).mul_(scale).to(x.dtype), to_weight, None, None


def _factor(weight: torch.Tensor, kind: Kind, dtype: torch.dtype) -> torch.Tensor:
    return 1.0 + weight.to(torch.promote_types(dtype, torch.float32)) if kind == 'one_plus' else weight.to(dtype)


class _FusedNorm(nn.Module):
    """Put before a class of norm layers: the same weight and epsilon, in one step."""

    weight: nn.Parameter
    norm_kind: Kind
    norm_epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x normalised over its last dimension, in its dtype."""
        fused: torch.Tensor = _NormStep.apply(x, self.weight, self.norm_epsilon, self.norm_kind)
        return fused


def put_before(layer: nn.Module, mixin: type[nn.Module], classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Give a layer the forward of a mixin, its class else as it was; `classes` holds those made so far."""
    plain = type(layer)
    layer.__class__ = classes.setdefault(plain, type(plain.__name__, (mixin, plain), {}))
    if '_old_forward' in vars(layer):  # of a model over several devices: what moves inputs between them calls this
        vars(layer)['_old_forward'] = types.MethodType(mixin.forward, layer)


def fuse_norms(model: nn.Module) -> int:
    """Give the RMSNorm layers of a model their one-step forward; returns how many have it.

    A layer has it where its class gives, on random input, the very values of one of the kinds; others stay as they are.
    """
    fused, classes = 0, dict[type[nn.Module], type[nn.Module]]()
    for layer in list(model.modules()):
        fields = vars(layer)
        epsilon = next((fields[name] for name in _EPSILONS if isinstance(fields.get(name), float)), None)
        if not type(layer).__name__.endswith('RMSNorm') or epsilon is None or set(layer._parameters) != {'weight'}:
            continue
        if not isinstance(layer, _FusedNorm) and (kind := _kind(layer, epsilon)) is not None:
            fields.update(norm_kind=kind, norm_epsilon=epsilon)
            put_before(layer, _FusedNorm, classes)
            fused += 1
    return fused


@torch.no_grad()
def _kind(layer: nn.Module, epsilon: float) -> Kind | None:
    weight, same = layer.get_parameter('weight'), set(_KINDS)
    # In bf16 too: under autocast layers whose weights are fp32 get that, and only then the kinds differ.
    for dtype in (weight.dtype, torch.bfloat16):
        x = torch.linspace(-3, 5, 3 * weight.shape[-1], device=weight.device).sin().view(3, -1).to(dtype)
        expected = layer(x)
        found = {kind: _NormStep.apply(x, weight, epsilon, kind) for kind in same}
        same = {kind for kind, y in found.items() if y.dtype == expected.dtype and torch.equal(y, expected)}
    return next((kind for kind in _KINDS if kind in same), None)

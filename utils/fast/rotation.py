"""Applies rotary embedding to queries and keys in one pass, with a Triton kernel that must first pass a trial.

In transformers, the forward of an attention layer calls a function of its Python module, `apply_rotary_pos_emb`.
`fuse_rotary` gives the layer a copy of this forward. The copy calls another function under this name, which uses the
kernel. The Python module is not changed, so all other models of the process keep the original function.

The letters at the end of a name are the dimensions of the tensor. For example, `query_BHTD` has the shape
[rows, heads, tokens, width]. R is the number of values of a head that are rotated.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from utils.fast.kernel_trial import RotaryCase, Rotation, rotary_kernel
from utils.fast.swap import swap_class

_NAME = 'apply_rotary_pos_emb'
_PARAMETERS = ('q', 'k', 'cos', 'sin', 'unsqueeze_dim')


class _FusedRotary(nn.Module):
    """Base class of the mixins that `_mixin_for` makes, one mixin for each class of attention layers."""


def fuse_rotary(model: nn.Module) -> int:
    """Make a model's attention layers use the Triton kernel for rotary embedding. Returns the number of changed layers.

    A layer is changed only if the rotary function of its class equals Llama's: on test inputs, both must give bitwise
    the same results. The changed layer uses the kernel for all inputs for which the kernel passes its trial.
    """
    fused = 0
    for layer in list(model.modules()):
        if isinstance(layer, _FusedRotary):
            continue
        kind: Any = type(layer)
        mixin = _mixin_for(kind)
        if mixin is not None:
            swap_class(layer, mixin)
            fused += 1
    return fused


@lru_cache(maxsize=256)
def _mixin_for(kind: type[nn.Module]) -> type[_FusedRotary] | None:
    """Return a mixin class that makes layers of the class `kind` use the kernel for rotary embedding.

    The forward of the mixin is a copy of `kind.forward`. The copy calls a different rotary function, which uses the
    kernel. Returns None if `kind.forward` does not call a rotary function that equals Llama's.
    """
    forward = kind.forward
    if not isinstance(forward, types.FunctionType):
        return None
    undecorated = inspect.unwrap(forward)
    if _NAME not in undecorated.__code__.co_names:
        return None
    plain = undecorated.__globals__.get(_NAME)
    if plain is None or not _equals_llama(plain):
        return None

    fused = _copy_with(forward, {_NAME: rotation_over(plain)})
    # transformers and attention.py look up functions in the module of a layer's class.
    fields = {'forward': fused, '__module__': kind.__module__}
    return type(f'Rotary{kind.__name__}', (_FusedRotary,), fields)


def _copy_with(function: Any, names: Mapping[str, Any]) -> types.FunctionType:
    """Return a copy of a function in which `names` replace the globals that have the same names.

    If the function is decorated, the decorator's wrapper and the wrapped function are both copied. The globals are
    replaced only in the copy of the wrapped function. For example, transformers 5.24 uses a decorator to rename an
    argument.
    """
    closure = function.__closure__
    decorated = getattr(function, '__wrapped__', None)
    if decorated is None:
        found = {**function.__globals__, **names}
    else:
        found = function.__globals__
        inner = _copy_with(decorated, names)
        closure = tuple(types.CellType(inner) if c.cell_contents is decorated else c for c in closure or ())
    copy = types.FunctionType(function.__code__, found, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    if decorated is None:
        del copy.__wrapped__  # type: ignore[attr-defined]  # it is a copy of the function, not a decorator of it
    else:
        copy.__wrapped__ = inner  # type: ignore[attr-defined]
    return copy


@torch.no_grad()
def _equals_llama(rotate: Any) -> bool:
    """Return whether the function `rotate` equals Llama's function `apply_rotary_pos_emb` in parameters and results.

    The results are compared bitwise, on test inputs.
    """
    parameters = inspect.signature(rotate).parameters
    if tuple(parameters) != _PARAMETERS or parameters['unsqueeze_dim'].default != 1:
        return False

    for dtype in (torch.float32, torch.bfloat16):
        query_BHTD = torch.linspace(-3, 5, 48).sin().view(1, 2, 3, 8).to(dtype)
        key_BHTD = torch.linspace(-2, 4, 24).cos().view(1, 1, 3, 8).to(dtype)
        # The halves of these tables differ. A class that uses only one half is noticed.
        cos_BTR = torch.linspace(0, 9, 24).cos().view(1, 3, 8).to(dtype)
        sin_BTR = torch.linspace(0, 7, 24).sin().view(1, 3, 8).to(dtype)
        wanted = [_rotated(x, cos_BTR, sin_BTR) for x in (query_BHTD, key_BHTD)]
        try:
            found = rotate(query_BHTD, key_BHTD, cos_BTR, sin_BTR)
            other = rotate(query_BHTD.transpose(1, 2), key_BHTD.transpose(1, 2), cos_BTR, sin_BTR, unsqueeze_dim=2)
        except RuntimeError:  # it needs tables of another width
            return False
        if not all(map(torch.equal, found, wanted)):
            return False
        if not all(torch.equal(x.transpose(1, 2), y) for x, y in zip(other, wanted, strict=True)):
            return False
    return True


def _rotated(x_BHTD: torch.Tensor, cos_BTR: torch.Tensor, sin_BTR: torch.Tensor) -> torch.Tensor:
    """Return x [rows, heads, tokens, width] with Llama's rotary embedding applied to all values of each head."""
    low, high = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_BTR[:, None] + torch.cat((-high, low), dim=-1) * sin_BTR[:, None]


def rotation_over(plain: Rotation) -> Rotation:
    """Return a replacement for `plain`, the rotation function of an attention class.

    The replacement calls the kernel if the kernel can be used for the inputs. Otherwise it calls `plain`.
    """

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kernel = find_kernel(q, k, cos, sin, unsqueeze_dim, plain)
        if kernel is None:
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        if unsqueeze_dim == 1:
            return kernel(q, k, cos, sin)
        query_BTHD, key_BTHD = kernel(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return query_BTHD.transpose(1, 2), key_BTHD.transpose(1, 2)

    return rotate


def find_kernel(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int, plain: Rotation
) -> Rotation | None:
    """Return the kernel that can replace `plain` for these inputs, or None if no kernel can.

    `unsqueeze_dim` is the dimension of the heads in q and k. If it is 2, the caller must swap dimensions 1 and 2 of q
    and k before it calls the kernel, because the kernel takes heads in dimension 1.
    """
    is_known = q.dim() == k.dim() == 4 and cos.dim() == 3 and unsqueeze_dim in (1, 2)
    if not is_known or cos.shape != sin.shape or cos.requires_grad or sin.requires_grad:
        return None
    rows, tokens, rotated = cos.shape
    sizes = {(x.shape[0], x.shape[3 - unsqueeze_dim], x.shape[3], x.dtype) for x in (q, k)}
    if sizes != {(q.shape[0], tokens, q.shape[3], q.dtype)} or rows not in (1, q.shape[0]) or cos.dtype != sin.dtype:
        return None

    heads = (q.shape[unsqueeze_dim], k.shape[unsqueeze_dim])
    case = RotaryCase(*heads, width=q.shape[3], rotated=rotated, dtype=q.dtype, table_dtype=cos.dtype)
    return rotary_kernel(case, q.device, plain)

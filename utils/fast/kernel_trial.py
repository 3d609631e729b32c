"""Decides whether a Triton kernel is used: on this device, it must give the results of the code that it replaces.

The results may differ by rounding. Without a GPU, no kernel is tried and triton is not imported.

The letters at the end of a name are the dimensions of the tensor. For example, `logits_NV` has the shape
[positions, vocabulary].

    B: rows
    T: tokens
    R: values of a head that rotary embedding rotates
    N: positions
    V: vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from utils.base.logger import logger
from utils.cli.resolution import log_decision

Step = Callable[..., torch.Tensor]
# Takes queries and keys [rows, heads, tokens, width], and cosines and sines [rows, tokens, rotated values]. Returns the
# rotated queries and keys.
Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]
# Takes raw logits (N, V), targets (N) and a factor. Returns -log p(target) of each position, and overwrites the logits
# with the gradient of the sum of these losses, multiplied by the factor.
LossStep = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
# The classes of the activation silu in torch and in transformers.
_SILU = ('torch.nn.modules.activation.SiLU', 'transformers.activations.SiLUActivation')
_ROWS = 37
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The largest difference of an output value, in units of the last place, and the largest relative error of a gradient.
# In fp32, sums in another order differ by more units.
_MOST_ULPS = {torch.float32: 16.01, torch.bfloat16: 2.01, torch.float16: 2.01}
_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@lru_cache(maxsize=256)
def norm_kernel(
    kind: str, dtype: torch.dtype, weight_dtype: torch.dtype, width: int, device: torch.device, plain: Step
) -> Step | None:
    """Return the Triton kernel for RMSNorm, or None if the kernel cannot be used for these inputs.

    The kernel takes the same arguments as `plain`, the function that it replaces.
    """
    if device.type != 'cuda' or not {dtype, weight_dtype} <= set(_DTYPES):
        return None

    def load() -> Step:
        from utils.fast.triton_kernels import NormKernel

        return lambda x, weight: NormKernel.apply(x, weight, 1e-6, kind)

    inputs = [_values(_ROWS, width, dtype, device), 0.7 + 0.2 * _values(1, width, weight_dtype, device)[0]]
    if not _passes(f'norm {kind}, {width} wide', load, lambda x, weight: plain(x, weight, 1e-6, kind), inputs):
        return None
    from utils.fast.triton_kernels import NormKernel

    step: Step = NormKernel.apply
    return step


@lru_cache(maxsize=64)
def gate_kernel(activation: str, dtype: torch.dtype, device: torch.device) -> Step | None:
    """Return the kernel for silu(gate) * up, or None if the kernel cannot be used.

    `activation` is the class of the MLP's activation function, for example 'torch.nn.modules.activation.SiLU'.
    """
    if device.type != 'cuda' or dtype not in _DTYPES or activation not in _SILU:
        return None

    def load() -> Step:
        from utils.fast.triton_kernels import GateKernel

        step: Step = GateKernel.apply
        return step

    inputs = [_values(_ROWS, 300, dtype, device) * factor for factor in (3, 1)]
    return load() if _passes('gate', load, lambda gate, up: F.silu(gate) * up, inputs) else None


class RotaryCase(NamedTuple):
    """The sizes and dtypes of one attention layer that decide whether the kernel for rotary embedding can be used.

    Each head is `width` wide. The first `rotated` of its values are rotated. The tables of cosines and sines have the
    dtype `table_dtype`.
    """

    heads: int
    key_heads: int
    width: int
    rotated: int
    dtype: torch.dtype
    table_dtype: torch.dtype


@lru_cache(maxsize=64)
def rotary_kernel(case: RotaryCase, device: torch.device, plain: Rotation) -> Rotation | None:
    """Return the kernel for rotary embedding, or None if it cannot be used.

    `plain` is the function that the kernel replaces. The kernel returns the dtype that `plain` returns.
    """
    is_known = {case.dtype, case.table_dtype} <= set(_DTYPES) and case.rotated % 2 == 0
    if device.type != 'cuda' or not is_known:
        return None

    given = rotary_inputs(case, device)
    tables = given[2:]

    def load() -> Rotation:
        from utils.fast.triton_kernels import RotaryKernel

        dtype = plain(*given)[0].dtype
        return lambda query, key, cos, sin: RotaryKernel.apply(query, key, cos, sin, dtype)

    name = f'rotary embedding, {case.rotated} of {case.width} values in {case.dtype}'
    passes = _passes(name, lambda: joined(load(), *tables), joined(plain, *tables), given[:2])
    return load() if passes else None


def rotary_inputs(case: RotaryCase, device: torch.device, *, tokens: int = _ROWS) -> list[torch.Tensor]:
    """Return random inputs for the trial of a rotary kernel: queries, keys, cosines and sines.

    Queries and keys are [1, heads, tokens, width], and cosines and sines are [1, tokens, rotated values]. As in
    transformers, queries and keys are transposed views of tensors [1, tokens, heads, width].
    """
    query, key = (
        _values(tokens, heads * case.width, case.dtype, device).view(1, tokens, heads, case.width).transpose(1, 2)
        for heads in (case.heads, case.key_heads)
    )
    angle_BTR = 2 * _values(tokens, case.rotated, torch.float32, device)[None]
    return [query, key, angle_BTR.cos().to(case.table_dtype), angle_BTR.sin().to(case.table_dtype)]


def joined(rotate: Rotation, cos_BTR: torch.Tensor, sin_BTR: torch.Tensor) -> Step:
    """Return a function of queries and keys that calls `rotate` and returns both results in one flat tensor.

    The trial compares kernels by one output tensor. So the rotated queries and the rotated keys are concatenated.
    """
    return lambda query, key: torch.cat([x.flatten() for x in rotate(query, key, cos_BTR, sin_BTR)])


@lru_cache(maxsize=64)
def loss_kernel(
    dtype: torch.dtype, vocabulary: int, scale: float, cap: float | None, device: torch.device
) -> LossStep | None:
    """Return the kernel that computes the loss and overwrites the logits with their gradient.

    Returns None if the kernel cannot be used. The kernel takes logits as they come from the head's matrix product.
    Before it computes the loss, it multiplies them by `scale`. If `cap` is not None, it then caps them to
    cap * tanh(logits / cap).
    """
    if device.type != 'cuda' or dtype not in _DTYPES:
        return None

    def load() -> LossStep:
        from utils.fast.triton_kernels import loss_and_gradient

        return partial(loss_and_gradient, scale=scale, cap=cap)

    name = f'loss, {vocabulary} logits in {dtype}'
    is_used = _is_used(name, lambda: loss_difference(load(), dtype, vocabulary, scale, cap, device))
    return load() if is_used else None


def loss_difference(
    ours: LossStep, dtype: torch.dtype, vocabulary: int, scale: float, cap: float | None, device: torch.device
) -> str | None:
    """Return in words by how much the loss kernel `ours` is wrong, for example 'a gradient is off by 0.025'.

    Its losses and gradients are compared with those of torch in fp32. Returns None if only rounding differs.
    """
    factor = 0.5
    logits_NV = 3 * _values(5, vocabulary, dtype, device)
    targets_N = torch.arange(1, 6, device=device) * 7919 % vocabulary
    with conditions(device):
        leaf_NV = logits_NV.clone().requires_grad_()
        exact_NV = leaf_NV.float() * scale
        if cap is not None:
            exact_NV = cap * torch.tanh(exact_NV / cap)
        wanted_N = F.cross_entropy(exact_NV, targets_N, reduction='none')
        wanted_grads = torch.autograd.grad(factor * wanted_N.sum(), leaf_NV)

    losses_N = ours(logits_NV, targets_N, factor)
    failure = _output_error(losses_N, wanted_N.detach(), torch.float32)
    return failure or _gradient_error([logits_NV], wanted_grads, dtype)


@contextmanager
def conditions(device: torch.device) -> Iterator[None]:
    """A context for the trial of a kernel: gradients are computed, and autocast and gradient checkpointing are off.

    A trial may run in the forward pass of a checkpointed layer. If checkpointing were on, it would compute this layer
    again for the backward pass of the trial.
    """

    def unchanged(x: torch.Tensor) -> torch.Tensor:
        return x

    with (
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        saved_tensors_hooks(unchanged, unchanged),
    ):
        yield


def _values(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return random values [rows, width]. The random state of torch is not used or changed.

    Calls with the same sizes return the same values.
    """
    random = torch.Generator().manual_seed(rows + width)
    return torch.randn(rows, width, generator=random).to(device, dtype)


def _passes(name: str, load: Callable[[], Step], plain: Step, inputs: Sequence[torch.Tensor]) -> bool:
    """Try a kernel, log the result, and return whether its output and gradients equal those of `plain`, up to rounding.

    `load` returns the kernel. If `load` or the kernel raises an error, the kernel does not pass.
    """
    return _is_used(name, lambda: _difference(load(), plain, inputs))


def _is_used(name: str, trial: Callable[[], str | None]) -> bool:
    """Run the trial of a kernel, log its result, and return whether it passed.

    If the kernel passes, `trial` returns None. Otherwise `trial` returns the failure in words, or raises an error.
    """
    try:
        failure = trial()
    except Exception as raised:  # a kernel that cannot be built or started may raise any exception
        failure = f'{type(raised).__name__}: {raised}'
    if failure is None:
        log_decision(f'{name} kernel', 'triton', 'it passed its trial on this device')
    else:
        logger.warning(f'the Triton kernel for {name} is not used: {failure.rstrip()}. Plain torch is used instead.')
    return failure is None


def _difference(ours: Step, plain: Step, inputs: Sequence[torch.Tensor]) -> str | None:
    """Return in words by how much the results of two functions differ, or None if only rounding differs.

    Both functions are called with `inputs`. Their outputs and their gradients are compared. For example, the result is
    'a gradient is off by 0.025'.
    """
    found = []
    with conditions(inputs[0].device):
        for step in (ours, plain):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            out = step(*leaves)
            direction = torch.linspace(-1, 2, out.numel(), device=out.device).cos().view_as(out).to(out.dtype)
            found.append((out.detach(), torch.autograd.grad(out, leaves, direction)))

    (out, grads), (wanted, wanted_grads) = found
    dtype = inputs[0].dtype
    return _output_error(out, wanted, dtype) or _gradient_error(grads, wanted_grads, dtype)


def _output_error(out: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Return in words by how much `out` differs from `wanted`, or None if only rounding differs.

    `dtype` is the dtype of the inputs from which both were computed.
    """
    if out.dtype != wanted.dtype:
        return f'its output is {out.dtype} instead of {wanted.dtype}'
    # A norm may round inside to the dtype of its input, which may be smaller than the dtype of its output.
    eps = max(torch.finfo(x).eps for x in (wanted.dtype, dtype))
    exact = wanted.double()
    ulps = float(((out.double() - exact).abs() / (exact.abs().clamp_min(1e-3) * eps)).max())
    if not ulps <= _MOST_ULPS[dtype]:
        return f'its output is off by {ulps:.3g} units of the last place'
    return None


def _gradient_error(grads: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], dtype: torch.dtype) -> str | None:
    """Return in words by how much a gradient differs from the wanted one, or None if only rounding differs.

    `dtype` is the dtype of the inputs from which both were computed.
    """
    for grad, wanted_grad in zip(grads, wanted, strict=True):
        error = float((grad.double() - wanted_grad.double()).norm() / wanted_grad.double().norm())
        if not error <= _BOUND[dtype]:
            return f'a gradient is off by {error:.3g}'
    return None

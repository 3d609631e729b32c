"""Decides whether a Triton kernel is used: on this device, it must give the same results as the code that it replaces.

Without a GPU, no kernel is tried and triton is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from utils.base.logger import logger
from utils.cli.resolution import log_decision

Step = Callable[..., torch.Tensor]
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

    `activation` is the class name of the activation function in the MLP.
    """
    if device.type != 'cuda' or dtype not in _DTYPES or activation not in _SILU:
        return None

    def load() -> Step:
        from utils.fast.triton_kernels import GateKernel

        step: Step = GateKernel.apply
        return step

    inputs = [_values(_ROWS, 300, dtype, device) * factor for factor in (3, 1)]
    return load() if _passes('gate', load, lambda gate, up: F.silu(gate) * up, inputs) else None


def _values(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return random values (rows, width), the same in each call. The random state of torch is not used or changed."""
    random = torch.Generator().manual_seed(rows + width)
    return torch.randn(rows, width, generator=random).to(device, dtype)


def _passes(name: str, load: Callable[[], Step], plain: Step, inputs: Sequence[torch.Tensor]) -> bool:
    """Return whether a kernel gives the output and gradients of `plain`, up to rounding. The result is logged."""
    try:
        failure = _difference(load(), plain, inputs)
    except Exception as raised:  # a kernel that cannot be built or started may raise any exception
        failure = f'{type(raised).__name__}: {raised}'
    if failure is None:
        log_decision(f'{name} kernel', 'triton', 'it passed its trial on this device')
    else:
        logger.warning(f'the Triton kernel for {name} is not used: {failure}')
    return failure is None


def _difference(ours: Step, plain: Step, inputs: Sequence[torch.Tensor]) -> str | None:
    """Return in words by how much output or gradients differ. Returns None if they differ by no more than rounding."""
    found = []
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        for step in (ours, plain):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            out = step(*leaves)
            direction = torch.linspace(-1, 2, out.numel(), device=out.device).cos().view_as(out).to(out.dtype)
            found.append((out.detach(), torch.autograd.grad(out, leaves, direction)))

    (out, grads), (wanted, wanted_grads) = found
    if out.dtype != wanted.dtype:
        return f'its output is {out.dtype} instead of {wanted.dtype}'
    # A norm may round inside to the dtype of its input, which may be smaller than the dtype of its output.
    eps = max(torch.finfo(dtype).eps for dtype in (wanted.dtype, inputs[0].dtype))
    exact = wanted.double()
    ulps = float(((out.double() - exact).abs() / (exact.abs().clamp_min(1e-3) * eps)).max())
    if not ulps <= _MOST_ULPS[inputs[0].dtype]:
        return f'its output is off by {ulps:.3g} units of the last place'
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        error = float((grad.double() - wanted_grad.double()).norm() / wanted_grad.double().norm())
        if not error <= _BOUND[inputs[0].dtype]:
            return f'a gradient is off by {error:.3g}'
    return None

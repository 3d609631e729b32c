"""Triton kernels for GPUs: RMSNorm and the gate of an MLP, each in one pass over its input instead of many.

Import this module only if there is a GPU, because only the builds of torch for GPUs install triton.
`utils/fast/kernel_trial.py` decides whether the kernels are used. The kernels round at the same places as the code that
they replace.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# The kinds of norm.py, as numbers, because a kernel takes no text.
KINDS = {'round_first': 0, 'round_last': 1, 'one_plus': 2}
_GATE_BLOCK = 4096
# The number of programs of the backward pass of a norm for each multiprocessor. Each adds up a gradient of the weight.
_PROGRAMS = 8


@triton.jit
def _norm_forward(
    x: Any, weight: Any, y: Any, scales: Any, width: Any, epsilon: Any, KIND: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < width
    values = tl.load(x + row * width + at, mask=real, other=0.0)
    exact = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / width + epsilon)
    tl.store(scales + row, scale)

    factor = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    normal = exact * scale
    if KIND == 0:
        normal = normal.to(values.dtype).to(tl.float32)
    if KIND == 2:
        factor = factor + 1.0
    tl.store(y + row * width + at, (normal * factor).to(y.dtype.element_ty), mask=real)


@triton.jit
def _norm_backward(  # noqa: PLR0913 - a kernel takes no tuples
    grad: Any,
    x: Any,
    weight: Any,
    scales: Any,
    x_grad: Any,
    weight_grad: Any,
    rows: Any,
    width: Any,
    turns: Any,
    KIND: tl.constexpr,
    TRAINS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first = tl.program_id(0)
    step = tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    real = at < width
    factor = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    if KIND == 2:
        factor = factor + 1.0

    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    for turn in range(turns):
        row = first + turn * step
        place = row.to(tl.int64) * width + at
        there = at < tl.where(row < rows, width, 0)
        out_grad = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        scale = tl.load(scales + tl.minimum(row, rows - 1))
        normal = tl.load(x + place, mask=there, other=0.0).to(tl.float32) * scale
        inner = out_grad * factor
        mean = tl.sum(inner * normal, 0) / width
        tl.store(x_grad + place, ((inner - normal * mean) * scale).to(x_grad.dtype.element_ty), mask=there)
        if TRAINS:
            summed += out_grad * normal
    if TRAINS:
        tl.store(weight_grad + first * width + at, summed, mask=real)


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


class NormKernel(torch.autograd.Function):
    """Computes weight * x / rms(x) like `_NormStep` of norm.py. It saves x and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: str) -> torch.Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        dtype = torch.promote_types(weight.dtype, x.dtype) if kind == 'round_first' else x.dtype
        y = torch.empty_like(x, dtype=dtype)
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)

        block = triton.next_power_of_2(width)
        _norm_forward[(rows,)](
            x, weight, y, scales, width, epsilon, KIND=KINDS[kind], BLOCK=block, num_warps=_warps(block)
        )
        ctx.kind = kind
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, scales = ctx.saved_tensors
        width = x.shape[-1]
        rows = scales.numel()
        trains = ctx.needs_input_grad[1]
        programs = min(rows, _PROGRAMS * _multiprocessors(x.device))
        x_grad = torch.empty_like(x)
        weight_grad = torch.empty(programs if trains else 1, width, dtype=torch.float32, device=x.device)

        block = triton.next_power_of_2(width)
        _norm_backward[(programs,)](
            grads[0].contiguous(),
            x,
            weight,
            scales,
            x_grad,
            weight_grad,
            rows,
            width,
            triton.cdiv(rows, programs),
            KIND=KINDS[ctx.kind],
            TRAINS=trains,
            BLOCK=block,
            num_warps=_warps(block),
        )
        return x_grad, weight_grad.sum(0).to(weight.dtype) if trains else None, None, None


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


@triton.jit
def _gate_forward(gate: Any, up: Any, out: Any, count: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    values = tl.load(gate + at, mask=real, other=0.0)
    exact = values.to(tl.float32)
    activated = (exact / (1.0 + tl.exp(-exact))).to(values.dtype).to(tl.float32)
    factor = tl.load(up + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, (activated * factor).to(values.dtype), mask=real)


@triton.jit
def _gate_backward(
    grad: Any, gate: Any, up: Any, gate_grad: Any, up_grad: Any, count: Any, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    values = tl.load(gate + at, mask=real, other=0.0)
    exact = values.to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-exact))
    activated = (exact * sigmoid).to(values.dtype).to(tl.float32)
    out_grad = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
    factor = tl.load(up + at, mask=real, other=0.0).to(tl.float32)
    tl.store(up_grad + at, (out_grad * activated).to(values.dtype), mask=real)
    through = (out_grad * factor).to(values.dtype).to(tl.float32)
    tl.store(gate_grad + at, (through * sigmoid * (1.0 + exact * (1.0 - sigmoid))).to(values.dtype), mask=real)


class GateKernel(torch.autograd.Function):
    """Computes silu(gate) * up like `_GatedStep` of gated_mlp.py, and saves only gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.contiguous()
        up = up.contiguous()
        out = torch.empty_like(gate)
        count = gate.numel()
        _gate_forward[(triton.cdiv(count, _GATE_BLOCK),)](gate, up, out, count, BLOCK=_GATE_BLOCK, num_warps=8)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        gate_grad = torch.empty_like(gate)
        up_grad = torch.empty_like(up)
        count = gate.numel()
        _gate_backward[(triton.cdiv(count, _GATE_BLOCK),)](
            grads[0].contiguous(), gate, up, gate_grad, up_grad, count, BLOCK=_GATE_BLOCK, num_warps=8
        )
        return gate_grad, up_grad

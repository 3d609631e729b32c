"""Triton kernels for GPUs: norm, gate and rotary embedding in one pass over their input, and the loss in two passes.

Import this module only if there is a GPU, because only the builds of torch for GPUs install triton.
`utils/fast/kernel_trial.py` decides whether the kernels are used. The kernels round at the same places as the code that
they replace.

The letters at the end of a name are the dimensions of the tensor. For example, `query_BHTD` has the shape
[rows, query heads, tokens, width].

    B: rows
    H: query heads
    G: key heads
    T: tokens
    D: width of a head
    R: values of a head that are rotated
    N: positions
    V: vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from utils.base.device import current

# The kinds of norm.py, as numbers, because a kernel takes no text.
KINDS = {'round_first': 0, 'round_last': 1, 'one_plus': 2}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_GATE_BLOCK = 4096
_LOSS_BLOCK = 8192
# The number of programs of the backward pass of a norm for each multiprocessor. Each adds up a gradient of the weight.
_PROGRAMS = 8


@triton.jit
def _norm_forward(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    scales: tl.tensor,
    width: tl.tensor,
    epsilon: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
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
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    x_grad: tl.tensor,
    weight_grad: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    turns: tl.tensor,
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
    """Computes RMSNorm, weight * x / rms(x), with the same rounding as `_NormStep` of norm.py.

    For the backward pass it saves x, the weight, and 1 / rms(x) of each vector.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: str) -> torch.Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        dtype = torch.promote_types(weight.dtype, x.dtype) if kind == 'round_first' else x.dtype
        y = torch.empty_like(x, dtype=dtype)
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)

        block = triton.next_power_of_2(width)
        with current(x.device):
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
        with current(x.device):
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
def _gate_forward(gate: tl.tensor, up: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    values = tl.load(gate + at, mask=real, other=0.0)
    exact = values.to(tl.float32)
    activated = (exact / (1.0 + tl.exp(-exact))).to(values.dtype).to(tl.float32)
    factor = tl.load(up + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, (activated * factor).to(values.dtype), mask=real)


@triton.jit
def _gate_backward(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    gate_grad: tl.tensor,
    up_grad: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
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
    """Computes silu(gate) * up, and saves only gate and up for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.contiguous()
        up = up.contiguous()
        out = torch.empty_like(gate)
        count = gate.numel()
        with current(gate.device):
            _gate_forward[(triton.cdiv(count, _GATE_BLOCK),)](gate, up, out, count, BLOCK=_GATE_BLOCK, num_warps=8)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        gate_grad = torch.empty_like(gate)
        up_grad = torch.empty_like(up)
        count = gate.numel()
        with current(gate.device):
            _gate_backward[(triton.cdiv(count, _GATE_BLOCK),)](
                grads[0].contiguous(), gate, up, gate_grad, up_grad, count, BLOCK=_GATE_BLOCK, num_warps=8
            )
        return gate_grad, up_grad


@triton.jit
def _rotate(  # noqa: PLR0913 - a kernel takes no tuples
    x: tl.tensor,
    y: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    rest: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    y_row: tl.tensor,
    y_head: tl.tensor,
    y_token: tl.tensor,
    table_row: tl.tensor,
    table_token: tl.tensor,
    BACK: tl.constexpr,
    ROUNDED: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) // tokens
    token = tl.program_id(0).to(tl.int64) % tokens
    at = tl.arange(0, BLOCK)[None, :]
    table = row * table_row + token * table_token + at
    in_half = at < HALF
    cos_low = tl.load(cos + table, mask=in_half, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + table + HALF, mask=in_half, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + table, mask=in_half, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + table + HALF, mask=in_half, other=0.0).to(tl.float32)

    head = tl.arange(0, HEADS).to(tl.int64)[:, None]
    source = x + row * x_row + token * x_token + head * x_head
    target = y + row * y_row + token * y_token + head * y_head
    real = (head < heads) & in_half
    low = tl.load(source + at, mask=real, other=0.0).to(tl.float32)
    high = tl.load(source + HALF + at, mask=real, other=0.0).to(tl.float32)

    # Both products and their sum are rounded, as in the classes.
    if BACK:
        first = (low * cos_low).to(ROUNDED).to(tl.float32) + (high * sin_high).to(ROUNDED).to(tl.float32)
        second = (high * cos_high).to(ROUNDED).to(tl.float32) - (low * sin_low).to(ROUNDED).to(tl.float32)
    else:
        first = (low * cos_low).to(ROUNDED).to(tl.float32) - (high * sin_low).to(ROUNDED).to(tl.float32)
        second = (high * cos_high).to(ROUNDED).to(tl.float32) + (low * sin_high).to(ROUNDED).to(tl.float32)
    tl.store(target + at, first.to(ROUNDED).to(y.dtype.element_ty), mask=real)
    tl.store(target + HALF + at, second.to(ROUNDED).to(y.dtype.element_ty), mask=real)

    if REST > 0:
        after = 2 * HALF + tl.arange(0, REST)[None, :]
        kept = (head < heads) & (after < 2 * HALF + rest)
        tl.store(target + after, tl.load(source + after, mask=kept, other=0.0).to(y.dtype.element_ty), mask=kept)


class RotaryKernel(torch.autograd.Function):
    """Rotates queries and keys like the function `apply_rotary_pos_emb` of Llama, in one pass.

    Queries and keys are [rows, heads, tokens, width]. Cosines and sines are [rows or 1, tokens, rotated values]. The
    first values of each head are rotated, and the others are copied. The last argument is the dtype of the results. The
    results are transposed views of tensors [rows, tokens, heads, width].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: torch.Tensor,
        key_BGTD: torch.Tensor,
        cos_BTR: torch.Tensor,
        sin_BTR: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.dtype = query_BHTD.dtype
        ctx.save_for_backward(cos_BTR, sin_BTR)
        rounded = torch.promote_types(query_BHTD.dtype, cos_BTR.dtype)
        query, key = (_rotated(x, cos_BTR, sin_BTR, dtype, rounded=rounded, back=False) for x in (query_BHTD, key_BGTD))
        return query, key

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos_BTR, sin_BTR = ctx.saved_tensors
        query, key = (_rotated(x, cos_BTR, sin_BTR, ctx.dtype, rounded=ctx.dtype, back=True) for x in grads)
        return query, key, None, None, None


def _rotated(
    x_BHTD: torch.Tensor,
    cos_BTR: torch.Tensor,
    sin_BTR: torch.Tensor,
    dtype: torch.dtype,
    *,
    rounded: torch.dtype,
    back: bool,
) -> torch.Tensor:
    """Return x in `dtype`, rotated by the angles of the given cosines and sines. If `back` is True, it is rotated back.

    The products of x with cosines and sines, and the sums of products, are rounded to the dtype `rounded`.
    """
    if x_BHTD.stride(3) != 1:
        x_BHTD = x_BHTD.contiguous()
    cos_BTR = cos_BTR.contiguous()
    sin_BTR = sin_BTR.contiguous()
    rows, heads, tokens, width = x_BHTD.shape
    y_BHTD = torch.empty(rows, tokens, heads, width, dtype=dtype, device=x_BHTD.device).transpose(1, 2)

    half = cos_BTR.shape[2] // 2
    rest = width - 2 * half
    padded_heads = triton.next_power_of_2(heads)
    block = triton.next_power_of_2(half)
    with current(x_BHTD.device):
        _rotate[(rows * tokens,)](
            x_BHTD,
            y_BHTD,
            cos_BTR,
            sin_BTR,
            tokens,
            heads,
            rest,
            *x_BHTD.stride()[:3],
            *y_BHTD.stride()[:3],
            0 if len(cos_BTR) == 1 else cos_BTR.stride(0),
            cos_BTR.stride(1),
            BACK=back,
            ROUNDED=_TYPES[rounded],
            HALF=half,
            HEADS=padded_heads,
            BLOCK=block,
            REST=triton.next_power_of_2(rest) if rest else 0,
            num_warps=4 if padded_heads * block <= 2048 else 8,
            # A product and a sum in one instruction would not round the product.
            enable_fp_fusion=False,
        )
    return y_BHTD


@triton.jit
def _loss_and_gradient(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    target = tl.load(targets + row)
    target_logit = _head_logit(tl.load(start + target), scale, cap, CAPPED)

    top = float('-inf')
    total = 0.0
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = _head_logit(tl.load(start + at, mask=at < width, other=0.0), scale, cap, CAPPED)
        values = tl.where(at < width, values, float('-inf'))
        higher = tl.maximum(top, tl.max(values, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(values - higher), 0)
        top = higher
    tl.store(losses + row, tl.log(total) + top - target_logit)
    # All threads must have read before one of them overwrites the logits.
    tl.debug_barrier()

    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = _head_logit(tl.load(start + at, mask=at < width, other=0.0), scale, cap, CAPPED)
        probability = tl.exp(values - top) / total
        gradient = tl.where(at == target, probability - 1.0, probability) * (factor * scale)
        if CAPPED:
            ratio = values / cap
            gradient = gradient * (1.0 - ratio * ratio)
        tl.store(start + at, gradient.to(logits.dtype.element_ty), mask=at < width)


@triton.jit
def _head_logit(product: tl.tensor, scale: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    value = product.to(tl.float32) * scale
    if CAPPED:
        # tanh(x) = 2 sigmoid(2 x) - 1
        value = cap * (2.0 / (1.0 + tl.exp(-2.0 * value / cap)) - 1.0)
    return value


def loss_and_gradient(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, factor: float, *, scale: float, cap: float | None
) -> torch.Tensor:
    """Return -log p(target) of each position, in fp32, and overwrite `logits_NV` with its gradient.

    At first, `logits_NV` holds the result of the head's matrix product. The logits of the model are this result
    multiplied by `scale`. If `cap` is not None, they are then capped to cap * tanh(logits / cap).

    The gradient is that of the sum of all -log p(target), multiplied by `factor`, with respect to `logits_NV`.
    """
    positions, vocabulary = logits_NV.shape
    losses_N = torch.empty(positions, dtype=torch.float32, device=logits_NV.device)
    with current(logits_NV.device):
        _loss_and_gradient[(positions,)](
            logits_NV,
            targets_N,
            losses_N,
            vocabulary,
            factor,
            scale,
            1.0 if cap is None else cap,
            CAPPED=cap is not None,
            BLOCK=min(_LOSS_BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=16,
        )
    return losses_N

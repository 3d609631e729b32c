"""Computes logits and loss in chunks and only at trained positions. The logits of all tokens are never held together.

Shapes in names: P trained positions, N positions of one chunk, V vocabulary, C hidden width, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn

from utils.base.device import sum_dtype
from utils.fast.constants import chunk_rows, part_rows
from utils.fast.kernel_trial import LossStep, loss_kernel

# In fp16, small probabilities would become zero before the trainer's loss scale multiplies them.
_FP16_SCALE = 256.0


@dataclass(frozen=True)
class Head:
    """An output head: logits = scale * (W h + b). If `cap` is set, the logits become cap * tanh(logits / cap).

    `linear` is a linear layer, or PEFT's wrapper around it (--lora_modules_to_save, --new_tokens). PEFT may hold the
    trained weights in fp32. They are then converted to `dtype`, the dtype of the model. Without a wrapper, `dtype` is
    None.
    """

    linear: nn.Module
    scale: float = 1.0
    cap: float | None = None
    dtype: torch.dtype | None = None

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight (V, C) that the model uses now."""
        weight: torch.Tensor = self.linear.weight  # type: ignore[assignment]
        return weight

    @property
    def size(self) -> int:
        """Return the number of rows V of the weight."""
        plain: Any = self.linear.original_module if isinstance(self.linear, AuxiliaryTrainingWrapper) else self.linear
        return len(plain.weight)

    @property
    def trained_rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the token ids (R) and the values (R, C) of the trained rows of a head with --new_tokens.

        Returns None if the head does not train single rows, or if the adapter is switched off.
        """
        if not isinstance(self.linear, TrainableTokensWrapper) or self.linear.disable_adapters:
            return None
        layer = self.linear.token_adapter
        (name,) = layer.active_adapters
        values_RC = layer.trainable_tokens_delta[name]
        return torch.tensor(layer.token_indices[name], device=values_RC.device), values_RC

    @property
    def device(self) -> torch.device:
        """Return the device of the weight."""
        return next(self.linear.parameters()).device

    @property
    def bias(self) -> torch.Tensor | None:
        """Return the bias (V) or None. PEFT uses no bias if the head has rows of new tokens (--new_tokens)."""
        if isinstance(self.linear, TrainableTokensWrapper):
            return None
        bias: torch.Tensor | None = self.linear.bias  # type: ignore[assignment]
        return bias

    def fixed(self) -> Head:
        """Return a head that always uses the present weight and bias, even if the adapter is switched later."""
        weight_VC, bias_V = self.weight.detach(), self.bias
        linear = nn.Linear(1, 1, bias=bias_V is not None, device='meta')
        linear.weight = nn.Parameter(weight_VC, requires_grad=False)
        if bias_V is not None:
            linear.bias = nn.Parameter(bias_V.detach(), requires_grad=False)
        return replace(self, linear=linear)

    def chunk(self, dtype: torch.dtype) -> int:
        """Return the number of positions in one chunk, if the logits are computed in this dtype."""
        return chunk_rows(self.size, dtype.itemsize, on_gpu=self.device.type != 'cpu')


def find_head(model: Any) -> Head | None:
    """Return the model's output head, or None if the head is not a plain linear layer.

    Scale and cap are read from the config fields that Gemma, Granite and Cohere use. The model's class may compute more
    than these fields say, so `head_is_exact` compares the head with the model.
    """
    linear = model.get_output_embeddings()
    is_wrapped = isinstance(linear, AuxiliaryTrainingWrapper)
    plain = linear.original_module if is_wrapped else linear
    if type(plain) is not nn.Linear or plain.weight.dim() != 2 or type(plain.weight.data) is not torch.Tensor:
        return None
    config = model.config.get_text_config().to_dict()
    scale = float(config.get('logit_scale') or 1.0) / float(config.get('logits_scaling') or 1.0)
    dtype = plain.weight.dtype if is_wrapped else None
    return Head(linear, scale=scale, cap=config.get('final_logit_softcapping'), dtype=dtype)


class _Selected(torch.autograd.Function):
    """Returns the rows of x (N, C) at P positions, as a tensor (P, C). No position may occur twice.

    So the backward pass writes each gradient once. The backward pass of plain indexing, x[positions], allows for equal
    positions. On a GPU it first sorts the positions, which is slow.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: torch.Tensor, positions_P: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(positions_P)
        ctx.shape = x_NC.shape
        return x_NC.index_select(0, positions_P)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (positions_P,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, positions_P, grads[0]), None


@contextmanager
def head_input(head: Head, positions_P: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """A context that yields a list, in which it collects the last hidden states (P, C) at `positions_P`.

    `positions_P` has indices into the flattened batch (all rows in one). No index occurs twice. The head itself gets an
    empty input, so it costs no time or memory.
    """
    collected: list[torch.Tensor] = []

    def take(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BTC = args[0]
        # If one process uses several GPUs, the last layer is on a different one than the batch.
        positions = positions_P.to(hidden_BTC.device, non_blocking=True)
        collected.append(_Selected.apply(hidden_BTC.flatten(0, 1), positions))
        return (hidden_BTC[:, :0].detach(), *args[1:])

    handle = head.linear.register_forward_pre_hook(take)
    try:
        yield collected
    finally:
        handle.remove()


def head_is_exact(model: Any, head: Head, ids: torch.Tensor) -> bool:
    """Return whether `head` gives the same logits as the model on ids (1, T), up to rounding in the head's dtype."""
    weight_VC = head.weight
    weight_VC = weight_VC.to(head.dtype or weight_VC.dtype)
    training = model.training
    model.eval()

    with torch.no_grad():
        collected: list[torch.Tensor] = []
        handle = head.linear.register_forward_pre_hook(lambda module, args: collected.append(args[0]))
        expected_TV = model(input_ids=ids, use_cache=False).logits[0].float()
        handle.remove()
        hidden_TC = collected[0][0].to(weight_VC.device, weight_VC.dtype)
        found_TV = _logits(hidden_TC, weight_VC, head).to(expected_TV.device)

    model.train(training)
    bound = 8 * torch.finfo(weight_VC.dtype).eps * float(expected_TV.abs().max())
    return found_TV.shape == expected_TV.shape and float((found_TV - expected_TV).abs().max()) <= bound


def summed_loss(hidden_PC: torch.Tensor, targets_P: torch.Tensor, head: Head, divisor: float) -> torch.Tensor:
    """Return the sum of -log p(target) over all positions, divided by `divisor`, as a scalar tensor with gradient.

    The loss is computed on the device of the head. The gradients are already computed in the forward pass.
    """
    hidden_PC, targets_P = (x.to(head.device, non_blocking=True) for x in (hidden_PC, targets_P))
    weight_VC = head.weight
    rows_R, values_RC = head.trained_rows or (None, None)
    if values_RC is not None:
        weight_VC = weight_VC.detach()  # only the gradient of the trained rows is computed
    total: torch.Tensor = _SummedLoss.apply(
        hidden_PC, weight_VC, head.bias, values_RC, rows_R, targets_P, head, divisor
    )
    return total


@torch.no_grad()
def scored(hidden_PC: torch.Tensor, targets_P: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors with a value per position: -log p(target), and whether the target is the likeliest token.

    They are on the device of the head.
    """
    hidden_PC, targets_P = (x.to(head.device, non_blocking=True) for x in (hidden_PC, targets_P))
    weight_VC = head.weight
    dtype = _compute_dtype(head, weight_VC)
    weight_VC = weight_VC.to(dtype)
    size = head.chunk(dtype)
    buffers = _Buffers()
    kernel = _kernel_for(head, weight_VC)

    losses = []
    hits = []
    for hidden_NC, targets_N in zip(hidden_PC.split(size), targets_P.split(size), strict=True):
        logits_NV = _products(hidden_NC.to(dtype), weight_VC, head, buffers)
        if kernel is not None:
            hits.append(logits_NV.argmax(dim=-1) == targets_N)  # scale and cap keep the order of the logits
            losses.append(kernel(logits_NV, targets_N, 1.0))
            continue
        for part_BV, targets_B in _parts(logits_NV, targets_N):
            exact_BV, _ = _exact(part_BV, head, buffers)
            losses.append(F.cross_entropy(exact_BV, targets_B, reduction='none'))
            hits.append(exact_BV.argmax(dim=-1) == targets_B)
    return torch.cat(losses), torch.cat(hits)


def head_logits(hidden_NC: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the logits (N, V) of the hidden states in fp32. All N positions are computed at the same time."""
    weight_VC = head.weight
    dtype = _compute_dtype(head, weight_VC)
    return _logits(hidden_NC.to(weight_VC.device, dtype), weight_VC.to(dtype), head)


def _compute_dtype(head: Head, weight: torch.Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype or weight.dtype


class _Buffers:
    """Memory for the logits of a chunk. All chunks use the same memory, because new memory is slow on a CPU."""

    def __init__(self) -> None:
        self._by_dtype: dict[torch.dtype, torch.Tensor] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an uninitialised tensor of this shape, in the memory of the last returned tensor of this dtype.

        No call may ask for a larger first dimension than the first call.
        """
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = torch.empty(*shape, dtype=dtype, device=device)
        return self._by_dtype[dtype][: shape[0]]


def _kernel_for(head: Head, weight_VC: torch.Tensor) -> LossStep | None:
    """Return the kernel for the loss of this head, or None if it cannot be used. The weight is in the compute dtype."""
    return loss_kernel(weight_VC.dtype, len(weight_VC), head.scale, head.cap, weight_VC.device)


def _products(hidden_NC: torch.Tensor, weight_VC: torch.Tensor, head: Head, buffers: _Buffers) -> torch.Tensor:
    """Return W h + b (N, V) in the dtype of the weight, in a buffer that the next chunk overwrites."""
    bias_V = head.bias
    products_NV = buffers.take((len(hidden_NC), len(weight_VC)), weight_VC.dtype, weight_VC.device)
    if bias_V is None:
        torch.mm(hidden_NC, weight_VC.t(), out=products_NV)
    else:
        torch.addmm(bias_V.to(weight_VC.dtype), hidden_NC, weight_VC.t(), out=products_NV)
    return products_NV


def _logits(hidden_NC: torch.Tensor, weight_VC: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the logits (N, V) in fp32."""
    buffers = _Buffers()
    return _exact(_products(hidden_NC, weight_VC, head, buffers), head, buffers)[0]


def _exact(products_NV: torch.Tensor, head: Head, buffers: _Buffers) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return two tensors: the logits (N, V) in fp32, and the derivative of the cap (N, V).

    `products_NV` is W h + b. If it is in fp32, it is overwritten. If the head has no cap, the second value is None, and
    the logits are in a buffer that the next call overwrites.
    """
    logits_NV = products_NV
    if products_NV.dtype != torch.float32:
        logits_NV = buffers.take(products_NV.shape, torch.float32, products_NV.device).copy_(products_NV)
    if head.scale != 1.0:
        logits_NV.mul_(head.scale)
    if head.cap is None:
        return logits_NV, None
    ratio_NV = logits_NV.div_(head.cap).tanh_()
    return ratio_NV * head.cap, 1 - ratio_NV.square()


def _parts(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parts of a chunk, (B, V) and (B), for calculations in fp32. A part is small enough for the CPU cache."""
    size = part_rows(logits_NV.shape[1], on_gpu=logits_NV.device.type != 'cpu')
    yield from zip(logits_NV.split(size), targets_N.split(size), strict=True)


def _loss_in_place(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    factor: float,
    head: Head,
    buffers: _Buffers,
    bias_grad_V: torch.Tensor | None,
) -> torch.Tensor:
    """Return -log p(target) of each position (N), and overwrite the logits with the gradient.

    `logits_NV` is W h + b. The gradient is that of the sum of the losses, multiplied by `factor`, with respect to this
    matrix. It is computed in fp32 and rounded to the dtype of the logits. Its sum over the positions is added to
    `bias_grad_V` before it is rounded.
    """
    losses = []
    for part_BV, targets_B in _parts(logits_NV, targets_N):
        exact_BV, slope_BV = _exact(part_BV, head, buffers)
        max_B1 = exact_BV.amax(dim=1, keepdim=True)
        target_logit_B1 = exact_BV.gather(1, targets_B[:, None])
        exp_sum_B1 = exact_BV.sub_(max_B1).exp_().sum(dim=1, keepdim=True)
        losses.append((exp_sum_B1.log() + max_B1 - target_logit_B1).squeeze(1))

        # The gradient of the logits is the softmax, minus one at the target.
        gradient_BV = exact_BV.mul_(factor / exp_sum_B1)
        # Each position has one target, so nothing is added twice and the result does not depend on an order.
        gradient_BV[torch.arange(len(part_BV), device=part_BV.device), targets_B] -= factor
        if slope_BV is not None:
            gradient_BV.mul_(slope_BV)
        if head.scale != 1.0:
            gradient_BV.mul_(head.scale)
        if bias_grad_V is not None:
            bias_grad_V += gradient_BV.sum(dim=0)
        part_BV.copy_(gradient_BV)
    return torch.cat(losses)


def _product_in_fp32(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the matrix product. On CUDA it is in fp32; elsewhere it is rounded to the dtype of the factors.

    ROCm counts as elsewhere: some of its versions have no product of 16-bit factors with an fp32 result.
    """
    if first.device.type == 'cuda' and torch.version.hip is None and first.dtype != torch.float32:
        return torch.mm(first, second, out_dtype=torch.float32)
    return first @ second


class _SummedLoss(torch.autograd.Function):
    """Computes the loss and the gradients of hidden states, weight and bias in the forward pass, chunk by chunk.

    The backward pass only multiplies the gradients by the gradient of the loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PC: torch.Tensor,
        weight_VC: torch.Tensor,
        bias_V: torch.Tensor | None,
        values_RC: torch.Tensor | None,
        rows_R: torch.Tensor | None,
        targets_P: torch.Tensor,
        head: Head,
        divisor: float,
    ) -> torch.Tensor:
        dtype = _compute_dtype(head, weight_VC)
        inner_scale = _FP16_SCALE if dtype == torch.float16 else 1.0 / divisor
        # In fp16 training the gradient of the hidden states stays in fp32 until it is multiplied by the loss scale.
        hidden_grad_dtype = torch.float32 if dtype == torch.float16 else dtype
        compute_weight_VC = weight_VC.to(dtype)
        size = head.chunk(dtype)
        buffers = _Buffers()
        kernel = _kernel_for(head, compute_weight_VC)

        hidden_grad_PC = torch.empty(hidden_PC.shape, dtype=hidden_grad_dtype, device=hidden_PC.device)
        weight_grad_VC = None
        bias_grad_V = None
        if bias_V is not None and ctx.needs_input_grad[2]:
            bias_grad_V = torch.zeros_like(bias_V, dtype=torch.float32)
        values_grad_RC = None if values_RC is None else torch.zeros_like(values_RC, dtype=torch.float32)
        total = hidden_PC.new_zeros((), dtype=sum_dtype(hidden_PC.device))

        for start in range(0, len(targets_P), size):
            hidden_NC = hidden_PC[start : start + size].to(dtype)
            targets_N = targets_P[start : start + size]
            grad_NV = _products(hidden_NC, compute_weight_VC, head, buffers)  # the logits, until the next line
            if kernel is None:
                losses_N = _loss_in_place(grad_NV, targets_N, inner_scale, head, buffers, bias_grad_V)
            else:
                losses_N = kernel(grad_NV, targets_N, inner_scale)
                if bias_grad_V is not None:
                    bias_grad_V += grad_NV.sum(dim=0, dtype=torch.float32)
            total += losses_N.to(total.dtype).sum()

            hidden_grad_PC[start : start + size] = grad_NV @ compute_weight_VC
            if ctx.needs_input_grad[1]:
                part_VC = _product_in_fp32(grad_NV.t(), hidden_NC)
                weight_grad_VC = part_VC.float() if weight_grad_VC is None else weight_grad_VC.add_(part_VC)
            if values_grad_RC is not None and rows_R is not None:
                values_grad_RC += grad_NV.index_select(1, rows_R).t() @ hidden_NC

        if ctx.needs_input_grad[1] and weight_grad_VC is None:  # there is no position
            weight_grad_VC = torch.zeros_like(weight_VC, dtype=torch.float32)
        for grad in (hidden_grad_PC, weight_grad_VC, bias_grad_V, values_grad_RC):
            if grad is not None:
                grad.mul_(1.0 / (divisor * inner_scale))
        if hidden_grad_dtype == dtype:
            hidden_grad_PC = hidden_grad_PC.to(hidden_PC.dtype)
        ctx.grads = hidden_grad_PC, weight_grad_VC, bias_grad_V, values_grad_RC
        ctx.dtypes = hidden_PC.dtype, weight_VC.dtype, None if bias_V is None else bias_V.dtype
        return (total / divisor).float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden_grad_PC, weight_grad_VC, bias_grad_V, values_grad_RC = ctx.grads
        # Drop the references: autograd gives a gradient to its parameter without a copy if nothing else refers to it.
        ctx.grads = None
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        scale = grads[0]
        return (
            (hidden_grad_PC * scale.to(hidden_grad_PC.dtype)).to(hidden_dtype),
            None if weight_grad_VC is None else weight_grad_VC.mul_(scale).to(weight_dtype),
            None if bias_grad_V is None else bias_grad_V.mul_(scale).to(bias_dtype),
            None if values_grad_RC is None else values_grad_RC.mul_(scale),
            None,
            None,
            None,
            None,
        )

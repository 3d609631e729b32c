"""Computes logits and loss in chunks and only at trained positions, so that the logits need little memory.

The letters at the end of a name are the dimensions of the tensor. For example, `hidden_PC` has the shape
[trained positions, hidden width].

    P: trained positions of the batch
    N: positions of one chunk
    B: positions of a part of a chunk
    V: vocabulary
    C: hidden width
    T: tokens
    R: rows of the weight that --new_tokens trains
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
    """An output head, which computes logits = scale * (weight @ hidden state + bias).

    If `cap` is not None, the logits then become cap * tanh(logits / cap).

    `linear` is the linear layer with weight and bias, or PEFT's wrapper around it (--lora_modules_to_save,
    --new_tokens). PEFT may hold the trained weights in fp32. They are then converted to `dtype`, the dtype of the
    model. If there is no wrapper, `dtype` is None.
    """

    linear: nn.Module
    scale: float = 1.0
    cap: float | None = None
    dtype: torch.dtype | None = None

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight [vocabulary, hidden width].

        If an adapter is on, this is the weight with the changes of the adapter.
        """
        weight: torch.Tensor = self.linear.weight  # type: ignore[assignment]
        return weight

    @property
    def size(self) -> int:
        """Return the size of the vocabulary, which is the number of rows of the weight."""
        plain: Any = self.linear.original_module if isinstance(self.linear, AuxiliaryTrainingWrapper) else self.linear
        return len(plain.weight)

    @property
    def trained_rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the ids of the tokens whose weight rows are trained, and these rows [number of ids, hidden width].

        Only the flag --new_tokens trains single rows. Returns None if the whole head or none of it is trained, and
        while the adapter is off.
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
        """Return the bias [vocabulary], or None if the head computes without a bias.

        If --new_tokens trains rows of the head, it computes without a bias, because PEFT's layer for new tokens does
        not add the bias.
        """
        if isinstance(self.linear, TrainableTokensWrapper):
            return None
        bias: torch.Tensor | None = self.linear.bias  # type: ignore[assignment]
        return bias

    def fixed(self) -> Head:
        """Return a head with the present weight and bias. Switching the adapter on or off does not change it."""
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
    than these fields say. So call `head_is_exact` to compare the head with the model.
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
    """Computes x[positions] for x [tokens, width], with a fast backward pass. No position may occur twice.

    The backward pass writes each gradient once. The backward pass of plain indexing also works for equal positions, but
    on a GPU it first sorts the positions, which is slow.
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
    """A context in which each forward pass appends the input of the output head to the yielded list.

    Only the hidden states at `positions_P` are appended, as one tensor [positions, hidden width]. The positions are
    indices into the flattened batch (all rows in one). No position may occur twice.

    The output head itself is called with an empty input, so that it takes no time and no memory.
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
    """Return whether `head` gives the same logits as the model on token ids [1, tokens], up to rounding."""
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
    """Return two tensors [positions]: -log p(target), and whether the target is the likeliest token.

    Both are on the device of the head.
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
    """Return the logits [positions, vocabulary] of these hidden states in fp32, computed all at once, not in chunks."""
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
        """Return an uninitialised tensor. All calls with the same dtype return the same memory.

        The first call with a dtype allocates a tensor. Each later call with this dtype returns the first `shape[0]`
        rows of the allocated tensor. So `shape[0]` must not be larger than in the first call, and the other numbers in
        `shape` must be the same.
        """
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = torch.empty(*shape, dtype=dtype, device=device)
        return self._by_dtype[dtype][: shape[0]]


def _kernel_for(head: Head, weight_VC: torch.Tensor) -> LossStep | None:
    """Return the Triton kernel that computes the loss of this head, or None if it cannot be used.

    `weight_VC` is the weight in the dtype of the computation.
    """
    return loss_kernel(weight_VC.dtype, len(weight_VC), head.scale, head.cap, weight_VC.device)


def _products(hidden_NC: torch.Tensor, weight_VC: torch.Tensor, head: Head, buffers: _Buffers) -> torch.Tensor:
    """Return weight @ hidden state + bias for each position: [positions, vocabulary], in the dtype of the weight.

    The next call with the same `buffers` overwrites the result.
    """
    bias_V = head.bias
    products_NV = buffers.take((len(hidden_NC), len(weight_VC)), weight_VC.dtype, weight_VC.device)
    if bias_V is None:
        torch.mm(hidden_NC, weight_VC.t(), out=products_NV)
    else:
        torch.addmm(bias_V.to(weight_VC.dtype), hidden_NC, weight_VC.t(), out=products_NV)
    return products_NV


def _logits(hidden_NC: torch.Tensor, weight_VC: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the logits [positions, vocabulary] in fp32."""
    buffers = _Buffers()
    return _exact(_products(hidden_NC, weight_VC, head, buffers), head, buffers)[0]


def _exact(products_NV: torch.Tensor, head: Head, buffers: _Buffers) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the logits in fp32, and the slope of the cap function at each of them, both [positions, vocabulary].

    The logits are computed from `products_NV`, which is weight @ hidden state + bias. They are multiplied by the head's
    scale, and then capped to cap * tanh(logits / cap). The slope is the derivative of this function. If the head has no
    cap, None is returned instead of the slope.

    If `products_NV` is in fp32, it is overwritten. The returned logits can be overwritten by the next call.
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
    """Yield the logits and targets of a few positions at a time, until all positions of the chunk are yielded.

    The caller converts these logits to fp32. On a CPU, they are so few that they fit in its cache.
    """
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
    """Return -log p(target) of each position, and overwrite `logits_NV` with the gradient of the loss.

    At first, `logits_NV` holds weight @ hidden state + bias. The loss is the sum of -log p(target), multiplied by
    `factor`. Its gradient with respect to `logits_NV` is computed in fp32.

    If `bias_grad_V` is not None, the gradient, summed over the positions, is added to it. After that, the gradient is
    rounded to the dtype of `logits_NV`.
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
    """Return first @ second. On an NVIDIA GPU it is in fp32, otherwise in the dtype of the factors."""
    # Some versions of ROCm have no product of 16-bit factors with an fp32 result.
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

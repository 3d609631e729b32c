"""The output head and the loss at trained positions alone, in chunks whose memory does not grow with the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Logits of one chunk: 32 MiB in fp32. Fewer rows make the matrix products slower, more only cost memory.
_CHUNK_LOGITS = 2**23
# In fp16 small probabilities would vanish before the trainer's loss scale reaches them.
_FP16_SCALE = 256.0


@dataclass(frozen=True)
class Head:
    """An output head as its class computes it: logits = cap(scale * (W h + b))."""

    linear: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    def chunk(self) -> int:
        """Return how many positions go through the head at once."""
        return max(16, _CHUNK_LOGITS // self.linear.out_features)


def find_head(model: Any) -> Head | None:
    """Return the model's head where it is a plain linear layer, None where logits must come from the class itself.

    The names of the fields are those of Gemma, Granite and Cohere. Whether they say all, `head_is_exact` tells.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or linear.weight.dim() != 2 or type(linear.weight.data) is not torch.Tensor:
        return None
    config = model.config.get_text_config().to_dict()
    scale = float(config.get('logit_scale') or 1.0) / float(config.get('logits_scaling') or 1.0)
    return Head(linear, scale=scale, cap=config.get('final_logit_softcapping'))


@contextmanager
def head_input(head: Head) -> Iterator[list[torch.Tensor]]:
    """Collect what goes into the head during a forward pass; the head itself is given no position and costs nothing."""
    collected: list[torch.Tensor] = []

    def take(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        collected.append(args[0])
        return (args[0][:, :0].detach(), *args[1:])

    handle = head.linear.register_forward_pre_hook(take)
    try:
        yield collected
    finally:
        handle.remove()


def head_is_exact(model: Any, head: Head, ids: torch.Tensor) -> bool:
    """Return whether the head gives the logits of the class on ids (1, T), to the rounding of its dtype."""
    training = model.training
    model.eval()
    with torch.no_grad():
        collected: list[torch.Tensor] = []
        handle = head.linear.register_forward_pre_hook(lambda module, args: collected.append(args[0]))
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        handle.remove()
        found = _logits(collected[0][0].to(head.linear.weight.dtype), head.linear.weight, head, _Room())[0]
    model.train(training)
    bound = 8 * torch.finfo(head.linear.weight.dtype).eps * float(expected.abs().max())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= bound


def summed_loss(hidden: torch.Tensor, targets: torch.Tensor, head: Head, divisor: float) -> torch.Tensor:
    """Return the sum of -log p(target) over hidden (P, C), divided by `divisor`; gradients are made on the way."""
    total: torch.Tensor = _SummedLoss.apply(hidden, head.linear.weight, head.linear.bias, targets, head, divisor)
    return total


@torch.no_grad()
def scored(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (-log p(target), whether it is the likeliest), each (P), from hidden (P, C)."""
    dtype = _compute_dtype(head.linear.weight)
    weight, size, room = head.linear.weight.to(dtype), head.chunk(), _Room()
    losses, hits = [], []
    for part, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits, _ = _logits(part.to(dtype), weight, head, room)
        losses.append(F.cross_entropy(logits, target, reduction='none'))
        hits.append(logits.argmax(dim=-1) == target)
    return torch.cat(losses), torch.cat(hits)


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _Room:
    """Memory for the logits of a chunk, which those of the next are written over: fresh memory is slow on a CPU."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, torch.Tensor] = {}

    def take(self, rows: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return (rows, V) of this dtype, holding anything, for a weight (V, C); chunks never grow."""
        if dtype not in self._held:
            self._held[dtype] = like.new_empty(rows, len(like), dtype=dtype)
        return self._held[dtype][:rows]


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, head: Head, room: _Room
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return fp32 logits (P, V) in `room` and their slope by the capped value, None where nothing is capped."""
    logits, bias = room.take(len(hidden), weight, weight.dtype), head.linear.bias
    if bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias.to(weight.dtype), hidden, weight.t(), out=logits)
    if logits.dtype != torch.float32:
        logits = room.take(len(hidden), weight, torch.float32).copy_(logits)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.cap is None:
        return logits, None
    ratio = logits.div_(head.cap).tanh_()
    return ratio * head.cap, 1 - ratio.square()


class _SummedLoss(torch.autograd.Function):
    """Computes the gradients of hidden states, weight and bias chunk by chunk in the forward pass, then scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: Head,
        divisor: float,
    ) -> torch.Tensor:
        dtype = _compute_dtype(weight)
        inner = _FP16_SCALE if dtype == torch.float16 else 1.0 / divisor
        low, size, room = weight.to(dtype), head.chunk(), _Room()
        kept = torch.float32 if dtype == torch.float16 else dtype
        to_hidden = torch.empty(hidden.shape, dtype=kept, device=hidden.device)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        to_bias = None if bias is None or not ctx.needs_input_grad[2] else torch.zeros_like(bias, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, len(targets), size):
            part, target = hidden[start : start + size].to(dtype), targets[start : start + size, None]
            logits, slope = _logits(part, low, head, room)
            top = logits.amax(dim=1, keepdim=True)
            gold = logits.gather(1, target)
            mass = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
            total += (mass.log() + top - gold).double().sum()
            # Softmax minus one at the target is the gradient of the logits.
            error = logits.mul_(inner / mass)
            error.scatter_add_(1, target, torch.full_like(gold, -inner))
            if slope is not None:
                error.mul_(slope)
            if head.scale != 1.0:
                error.mul_(head.scale)
            small = error if error.dtype == dtype else room.take(len(part), low, dtype).copy_(error)
            to_hidden[start : start + size] = small @ low
            if to_weight is not None:
                to_weight += small.t() @ part
            if to_bias is not None:
                to_bias += error.sum(dim=0)
        grads = [g for g in (to_hidden, to_weight, to_bias) if g is not None]
        for grad in grads:
            grad.mul_(1.0 / (divisor * inner))
        # In fp16 these stay fp32 until the loss scale has reached them: most would be too small for fp16 before.
        ctx.grads = to_hidden if kept != dtype else to_hidden.to(hidden.dtype), to_weight, to_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return (total / divisor).float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        to_hidden, to_weight, to_bias = ctx.grads
        ctx.grads = None  # a gradient that nothing else holds becomes that of the parameter as it is, without a copy
        scale, (of_hidden, of_weight, of_bias) = grads[0], ctx.dtypes
        return (
            (to_hidden * scale.to(to_hidden.dtype)).to(of_hidden),
            None if to_weight is None else to_weight.mul_(scale).to(of_weight),
            None if to_bias is None else to_bias.mul_(scale).to(of_bias),
            None,
            None,
            None,
        )

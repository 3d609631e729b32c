"""Attention for concatenated rows by the flash-attention kernels inside torch. The package flash-attn is not needed.

The letters at the end of a name are the dimensions of the tensor. For example, `query_HTD` has the shape
[query heads, tokens, width].

    T: tokens of all rows
    H: query heads
    G: key heads, which are also the value heads
    D: width of a query head or key head
    E: width of a value head
    W: width to which all heads are padded
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from utils.fast.attention_choice import flash_width

# The backward pass of torch.nn.attention.varlen cannot be used with sinks, so the operators below it are called.
_ATEN = torch.ops.aten


def flash_attention(
    query_HTD: torch.Tensor,
    key_GTD: torch.Tensor,
    value_GTE: torch.Tensor,
    sinks_H: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    longest: int,
    window: int | None,
    scaling: float,
) -> torch.Tensor:
    """Return the attention output [tokens, query heads, value width].

    `cu_seqlens` has the index of the first token of each row, and then the number of all tokens. For example, it is
    [0, 3, 5] for rows of 3 and 2 tokens. Its dtype is int32. `longest` is the length of the longest row. If `window` is
    not None, a query sees at most this many keys.
    """
    width = flash_width(query_HTD.shape[-1], value_GTE.shape[-1])
    query, key, value = (_padded(x.transpose(0, 1), width) for x in (query_HTD, key_GTD, value_GTE))
    out_THW: torch.Tensor = _FlashRows.apply(query, key, value, sinks_H, cu_seqlens, longest, window, scaling)
    return out_THW[..., : value_GTE.shape[-1]]


def _padded(x: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - x.shape[-1]
    if missing:
        x = F.pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()


class _FlashRows(torch.autograd.Function):
    """Causal attention inside each row, computed by torch's flash-attention kernels, with an optional window and sinks.

    A sink is an extra score in the softmax of a head. It takes a part of the attention weight, but adds nothing to the
    output. The kernels do not support sinks, so sinks are computed outside of the kernels:

    - The forward pass multiplies the output of the kernel by 1 minus the weight of the sink.
    - The backward kernel reads the output and the logsumexp of the scores. It gets the multiplied output, and a
      logsumexp that includes the sink. So its gradients include the effect of the sink.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_THW: torch.Tensor,
        key_TGW: torch.Tensor,
        value_TGW: torch.Tensor,
        sinks_H: torch.Tensor | None,
        cu_seqlens: torch.Tensor,
        longest: int,
        window: int | None,
        scaling: float,
    ) -> torch.Tensor:
        earlier_keys = -1 if window is None else window - 1
        out_THW: torch.Tensor
        out_THW, log_sum_HT, random_state, unused, _ = _ATEN._flash_attention_forward(
            query_THW,
            key_TGW,
            value_TGW,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=scaling,
            window_size_left=earlier_keys,
            window_size_right=0,
        )
        if sinks_H is not None:
            with_sink_HT = torch.logaddexp(log_sum_HT, sinks_H.to(log_sum_HT.dtype)[:, None])
            share_TH1 = (log_sum_HT - with_sink_HT).exp().t()[..., None]
            out_THW = (out_THW * share_TH1).to(query_THW.dtype)
            log_sum_HT = with_sink_HT

        ctx.settings = longest, earlier_keys, scaling
        ctx.save_for_backward(
            query_THW, key_TGW, value_TGW, out_THW, log_sum_HT, sinks_H, cu_seqlens, random_state, unused
        )
        return out_THW

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query_THW, key_TGW, value_TGW, out_THW, log_sum_HT, sinks_H, cu_seqlens, random_state, unused = (
            ctx.saved_tensors
        )
        longest, earlier_keys, scaling = ctx.settings
        grad_THW = grads[0].contiguous()
        query_grad, key_grad, value_grad = _ATEN._flash_attention_backward(
            grad_THW,
            query_THW,
            key_TGW,
            value_TGW,
            out_THW,
            log_sum_HT,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            0.0,
            True,
            random_state,
            unused,
            scale=scaling,
            window_size_left=earlier_keys,
            window_size_right=0,
        )
        sinks_grad_H = None
        if sinks_H is not None:
            exact = log_sum_HT.dtype
            mean_HT = torch.linalg.vecdot(grad_THW.to(exact), out_THW.to(exact)).t()
            sink_weight_HT = (sinks_H.to(exact)[:, None] - log_sum_HT).exp()
            sinks_grad_H = -(sink_weight_HT * mean_HT).sum(1).to(sinks_H.dtype)
        return query_grad, key_grad, value_grad, sinks_grad_H, None, None, None, None

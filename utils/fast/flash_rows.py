"""Attention for concatenated rows by the flash-attention kernels inside torch. The package flash-attn is not needed.

Shapes in names: T tokens of all rows, H query heads, G key and value heads, D width of a query or key head, E width of
a value head, W width of the padded heads, B rows.
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
    """Return the attention output (T, H, E).

    `cu_seqlens` (B + 1) are the positions at which rows start, and the end of the last row, in int32. `longest` is the
    length of the longest row. A query sees at most `window` keys. Heads are padded with zeros, which changes no score.
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
    """Causal attention inside each row by torch's flash-attention kernels, with a window and with sinks.

    A sink is one more score in the softmax of a head, without a value. The kernels do not support sinks. So the forward
    pass multiplies the output of the kernel by 1 minus the softmax weight of the sink. The backward kernel gets this
    product and a logsumexp that includes the sink. With these inputs, its gradients are right.
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

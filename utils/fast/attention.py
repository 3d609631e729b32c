"""Attention inside each row of rows laid end to end, on any device: nothing is padded and no row sees another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

# Queries that are attended at once: a block of scores stays in the cache, keys after it are never multiplied.
_BLOCK = 128
# Weights over at most so many keys are kept for the backward pass, those over more are computed again.
_KEPT_KEYS = 384
_LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar('row_lengths', default=None)


@dataclass(frozen=True)
class Rows:
    """What layers get in place of a mask: the lengths of the rows, and how many keys a query sees (None: all)."""

    lengths: tuple[int, ...]
    window: int | None

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Return (first key, first query, end) of each block of queries."""
        start = 0
        for length in self.lengths:
            for query in range(start, start + length, _BLOCK):
                first = start if self.window is None else max(start, query - self.window + 1)
                yield first, query, min(query + _BLOCK, start + length)
            start += length

    def groups(self) -> Iterator[list[tuple[int, int]]]:
        """Return (start, length) of rows, those of like length together: none is twice as long as another."""
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        group: list[tuple[int, int]] = []
        for start, length in sorted(zip(starts, self.lengths, strict=True), key=lambda row: -row[1]):
            if group and group[0][1] >= 2 * length:
                yield group
                group = []
            group.append((start, length))
        yield group


@contextmanager
def laid_end_to_end(lengths: Sequence[int]) -> Iterator[None]:
    """Tell the attention of a model in `attend_by_rows` how long the rows of the coming forward pass are."""
    token = _LENGTHS.set(tuple(lengths))
    try:
        yield
    finally:
        _LENGTHS.reset(token)


def attend_by_rows(model: Any) -> None:
    """Switch a model to this module's attention; batches that are not laid end to end run as they did before."""
    before = model.config._attn_implementation
    if before.startswith('flash_attention'):
        return  # its own varlen kernel reads the rows from position_ids
    name = f'rows_over_{before}'
    over = {'sdpa': (sdpa_attention_forward, sdpa_mask), 'eager': (_own_eager, eager_mask)}
    attention, mask = over[before]
    AttentionInterface.register(name, _attention_over(attention))
    # Under the same name, else the function would get no mask at all, silently.
    AttentionMaskInterface.register(name, _mask_over(mask))
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name


def _own_eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _mask_over(plain: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        lengths = _LENGTHS.get()
        if lengths is None:
            return plain(*args, **kwargs)
        if kwargs.get('use_vmap'):
            raise ValueError('the mask is more than causal, which rows laid end to end do not take.')
        return Rows(lengths, kwargs.get('local_size'))

    return mask


def _attention_over(plain: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if not isinstance(attention_mask, Rows):
            special = {name: x for name, x in (('softcap', softcap), ('s_aux', s_aux)) if x is not None}
            result: tuple[torch.Tensor, None] = plain(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **special, **kwargs
            )
            return result
        if kwargs.get('position_bias') is not None or kwargs.get('is_causal') is False:
            raise ValueError('a bias by position, or attention forward in time, is not for rows laid end to end.')
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        device = query.device.type
        if torch.is_autocast_enabled(device):
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        plain_scores = softcap is None and s_aux is None
        if dropout and not plain_scores:
            raise ValueError('dropout of attention together with capped scores or sinks is not for rows end to end.')
        q, k, v = (x.squeeze(0) for x in (query, key, value))
        if dropout or (plain_scores and device != 'cpu'):
            out = attend_in_groups(q, k, v, attention_mask, scaling=scaling, dropout=dropout)
        else:
            out = RowAttention.apply(q, k, v, s_aux, attention_mask, scaling, softcap)
        return out[None], None

    return attention


def attend_in_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, *, scaling: float, dropout: float
) -> torch.Tensor:
    """Return (T, H, D) by one library call per group of rows of like length, padded at their ends alone.

    Causal attention never looks at what comes after a row, so the padding needs no mask.
    """
    device, parts, order = query.device, [], []
    for group in rows.groups():
        longest = group[0][1]
        places = torch.arange(longest, device=device)
        starts, lengths = torch.tensor(group, device=device).t()[:, :, None]
        real = places < lengths
        index = torch.where(real, starts + places, starts)
        q, k, v = (x[:, index].transpose(0, 1) for x in (query, key, value))
        seen = None
        if rows.window is not None and longest > rows.window:
            back = places[:, None] - places
            seen = (back >= 0) & (back < rows.window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=seen is None, scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        parts.append(out.transpose(1, 2)[real])
        order.append(index[real])
    return torch.cat(parts)[torch.cat(order).argsort()]


@lru_cache(maxsize=64)
def _hidden(
    queries: int, keys: int, diagonal: int, repeats: int, dtype: torch.dtype, device: torch.device, *, low: bool = False
) -> torch.Tensor:
    """Return (1, repeats * queries, keys): -inf on and above a diagonal, or on and below it, 0 elsewhere."""
    # Added to scores: filling them through a mask of booleans is several times slower on a CPU.
    whole = torch.full((queries, keys), -torch.inf, dtype=dtype, device=device)
    return (whole.tril(diagonal) if low else whole.triu(diagonal)).repeat(repeats, 1)[None]


class RowAttention(torch.autograd.Function):
    """Causal attention block by block of queries, by matrix products: on a CPU quicker than the library's kernel.

    Takes query (H, T, D), key and value (K, T, .) with H a multiple of K, sinks (H) or None; returns (T, H, .). Keeps
    the weights of short rows alone: those of long ones are computed again in the backward pass, so that memory does
    not grow with the square of a row. Scores and weights are stored in the dtype of the query; softmax, and sums over
    blocks, are computed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        rows: Rows,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        ctx.settings = rows, scaling, softcap
        heads, tokens, _ = query.shape
        out = query.new_empty(tokens, heads, value.shape[-1])
        by_key = out.view(tokens, len(key), -1, value.shape[-1]).permute(1, 2, 0, 3)
        kept = []
        for first, start, end in rows.blocks():
            weights, _ = _weights(query, key, sinks, (first, start, end), ctx.settings)
            if _keeps(end - first, softcap):
                kept.append(weights)
            seen = torch.bmm(weights, value[:, first:end])
            by_key[:, :, start:end] = seen.view(len(key), -1, end - start, value.shape[-1])
        ctx.save_for_backward(query, key, value, sinks, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, sinks, *kept = ctx.saved_tensors
        rows, scaling, softcap = ctx.settings
        waiting = iter(kept)
        groups, exact = len(key), torch.promote_types(query.dtype, torch.float32)
        grad = grads[0].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        to_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        to_key, to_value = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (key, value))
        to_sinks = None if sinks is None else torch.zeros(groups, len(query) // groups, dtype=exact, device=key.device)
        for first, start, end in rows.blocks():
            if _keeps(end - first, softcap):
                weights, slope = next(waiting), None
            else:
                weights, slope = _weights(query, key, sinks, (first, start, end), ctx.settings)
            grad_block = grad[:, :, start:end].flatten(1, 2)
            to_value[:, first:end].add_(torch.bmm(weights.mT, grad_block))
            slopes = torch.bmm(grad_block, value[:, first:end].mT)
            if to_sinks is not None:
                by_head = (groups, len(query) // groups, end - start, -1)
                mean = torch.linalg.vecdot(slopes.to(exact), weights.to(exact)).view(by_head[:3])
                to_sinks -= ((1 - weights.sum(-1, dtype=exact).view(by_head[:3])) * mean).sum(-1)
            # Where one key has all the weight its difference to the mean is exactly 0, as it must be.
            scores = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)
            if slope is not None:
                scores = scores.mul_(slope)
            block = query[:, start:end].unflatten(0, (groups, -1)).flatten(1, 2)
            product = torch.bmm(scores, key[:, first:end]).mul_(scaling)
            to_query[:, start:end] = product.view(len(query), end - start, -1)
            to_key[:, first:end].add_(torch.bmm(scores.mT, block))
        grad_sinks = None if to_sinks is None or sinks is None else to_sinks.flatten().to(sinks.dtype)
        return to_query, to_key.mul_(scaling).to(key.dtype), to_value.to(value.dtype), grad_sinks, None, None, None


def _keeps(keys: int, softcap: float | None) -> bool:
    return keys <= _KEPT_KEYS and softcap is None


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    sinks: torch.Tensor | None,
    block: tuple[int, int, int],
    settings: tuple[Rows, float, float | None],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return one block's weights (K, H / K * queries, keys), and the slope of the cap where there is one."""
    (first, start, end), (rows, scaling, softcap) = block, settings
    kind, count, slope = (len(query) // len(key), query.dtype, query.device), end - start, None
    part = query[:, start:end].unflatten(0, (len(key), -1)).flatten(1, 2)
    # Keys after the row are hidden as those after a query are: the library's softmax needs whole vectors to be quick.
    wide = end - first if query.dtype == torch.float32 else min(-(-(end - first) // 32) * 32, key.shape[1] - first)
    after = _hidden(count, first + wide - start, 1, *kind)
    alone = first == start and softcap is None
    # The mask of the first block of a row is added by the product itself; otherwise to the columns it hides.
    added = after if alone else after[:, :1, :1]
    scores = torch.baddbmm(added, part, key[:, first : first + wide].mT, beta=float(alone), alpha=scaling)
    if softcap is not None:
        ratio = scores.div_(softcap).tanh_()
        slope = (1 - ratio.square())[..., : end - first]
        scores = ratio * softcap
    if not alone:
        scores[..., start - first :].add_(after)
    if rows.window is not None and end - first > rows.window:
        scores[..., :count].add_(_hidden(count, min(count, end - first), start - first - rows.window, *kind, low=True))
    if sinks is None:
        return scores.softmax(-1)[..., : end - first].contiguous(), slope
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = scores.to(exact)
    sink = sinks.to(exact).view(len(key), -1).repeat_interleave(end - start, 1)[..., None]
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sink)
    return scores.sub_(total).exp_()[..., : end - first].to(query.dtype), slope

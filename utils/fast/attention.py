"""Attention for concatenated rows without padding, on any device: a token attends only to tokens of its own row.

Shapes in names: T tokens of all rows, H query heads, G key and value heads, R = H / G query heads per key head,
Q queries of a block, K keys of a block, D width of a query or key head, E width of a value head, B rows of a group,
L length of its longest row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from utils.base.device import send
from utils.fast.constants import KEPT_KEYS, QUERY_BLOCK

# An attention implementation of transformers with this prefix is that of this module.
_PREFIX = 'rows_over_'
# The kernels of torch for groups of rows. The kernel of cuDNN is left out: it needs up to a second to prepare for
# each new shape, and groups almost never repeat a shape.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# The largest width of a head that flash attention takes.
_FLASH_WIDTH = 256

_ROWS: ContextVar[tuple[tuple[int, ...], torch.Tensor | None] | None] = ContextVar('rows', default=None)


class Block(NamedTuple):
    """A block of queries at the positions `start` to `end`, with keys at `first_key` to `end`; `end` is excluded."""

    first_key: int
    start: int
    end: int


@dataclass(frozen=True)
class RowMask:
    """The row lengths of a concatenated batch. Attention layers get this object instead of a mask tensor.

    A query sees the key at its own position and the keys before it in its row, at most `window` keys in all. If
    `window` is None, the number of keys is not limited.
    """

    lengths: tuple[int, ...]
    window: int | None
    # The position where each row starts, and the number of all tokens, (B + 1,) in int32 on the device. A kernel for
    # rows of different lengths takes them. None if the batch has no plan (data/collator.py).
    cu_seqlens: torch.Tensor | None = field(default=None, compare=False)
    _indices: dict[torch.device, tuple[list[torch.Tensor], torch.Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest row."""
        return max(self.lengths)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks of each row. A block has at most QUERY_BLOCK queries and all keys that they may see."""
        row_start = 0
        for length in self.lengths:
            row_end = row_start + length
            for start in range(row_start, row_end, QUERY_BLOCK):
                first_key = row_start
                if self.window is not None:
                    first_key = max(row_start, start - self.window + 1)
                yield Block(first_key, start, min(start + QUERY_BLOCK, row_end))
            row_start = row_end

    def groups(self) -> Iterator[list[tuple[int, int]]]:
        """Yield groups of rows of similar length. A group is a list of (start, length), with the longest row first.

        The longest row of a group is less than twice as long as its shortest row.
        """
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        by_length = sorted(zip(starts, self.lengths, strict=True), key=lambda row: -row[1])

        group: list[tuple[int, int]] = []
        for start, length in by_length:
            if group and group[0][1] >= 2 * length:
                yield group
                group = []
            group.append((start, length))
        yield group

    def group_indices(self, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return two things, both on the device: the token indices of each group, and where each token is found.

        The indices of a group have the shape (B, L). A row that is shorter than L is filled up with its first token.
        The second value (T) holds the position of each token in the groups, if all groups are flattened and joined.
        The result is computed once, on the CPU, and all layers use it.
        """
        if device not in self._indices:
            by_name = {}
            found_T = torch.empty(sum(self.lengths), dtype=torch.long)
            before = 0
            for number, group in enumerate(self.groups()):
                start_B1, length_B1 = torch.tensor(group).t()[:, :, None]
                offset_L = torch.arange(group[0][1])
                is_real_BL = offset_L < length_B1
                index_BL = torch.where(is_real_BL, start_B1 + offset_L, start_B1)
                found_T[index_BL[is_real_BL]] = before + is_real_BL.flatten().nonzero().squeeze(-1)
                before += index_BL.numel()
                by_name[str(number)] = index_BL
            *indices, found = send({**by_name, 'found': found_T}, device).values()
            self._indices[device] = indices, found
        return self._indices[device]


@contextmanager
def concatenated_rows(lengths: Sequence[int], cu_seqlens: torch.Tensor | None = None) -> Iterator[None]:
    """A context in which models that were passed to `attend_by_rows` treat their input as rows of these lengths.

    `cu_seqlens` are the starts of the rows on the device, as in RowMask.
    """
    token = _ROWS.set((tuple(lengths), cu_seqlens))
    try:
        yield
    finally:
        _ROWS.reset(token)


def unpadded(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs that say that no id (1, T) of concatenated rows is padding. Call the model with them.

    Without an attention mask, transformers looks for the rows in position_ids and reads the result from the device. The
    attention of this module takes the rows from the context and needs neither. flash-attn needs position_ids, and gets
    no mask.
    """
    uses_rows = model.config._attn_implementation.startswith(_PREFIX)
    return {'attention_mask': torch.ones_like(ids)} if uses_rows else {}


def attend_by_rows(model: Any) -> None:
    """Switch a model to this module's attention, which is used only inside the context `concatenated_rows`.

    Outside of the context, for example for padded batches, the model uses its own attention.
    """
    before = model.config._attn_implementation
    if before.startswith('flash_attention'):
        return  # the flash-attention kernel finds the rows from position_ids

    originals = {'sdpa': (sdpa_attention_forward, sdpa_mask), 'eager': (_eager_of_class, eager_mask)}
    attention, mask = originals[before]
    name = f'{_PREFIX}{before}'
    AttentionInterface.register(name, _attention_over(attention))
    # The mask needs the same name as the attention. With a different name, transformers silently passes no mask.
    AttentionMaskInterface.register(name, _mask_over(mask))
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name


def _eager_of_class(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _mask_over(original: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        rows = _ROWS.get()
        if rows is None:
            return original(*args, **kwargs)
        if kwargs.get('use_vmap'):
            raise ValueError('its mask is more than causal, which concatenated rows do not support')
        lengths, cu_seqlens = rows
        return RowMask(lengths, kwargs.get('local_size'), cu_seqlens)

    return mask


def _attention_over(original: Callable[..., Any]) -> Callable[..., Any]:
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
        if not isinstance(attention_mask, RowMask):
            special = {name: x for name, x in (('softcap', softcap), ('s_aux', s_aux)) if x is not None}
            result: tuple[torch.Tensor, None] = original(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **special, **kwargs
            )
            return result

        has_plain_scores = softcap is None and s_aux is None
        if kwargs.get('position_bias') is not None or kwargs.get('is_causal') is False:
            raise ValueError('concatenated rows support no position bias and no attention to later tokens')
        if dropout and not has_plain_scores:
            raise ValueError('concatenated rows support no attention dropout together with capped scores or sinks')

        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        device = query.device.type
        if torch.is_autocast_enabled(device):
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))

        query_HTD, key_GTD, value_GTE = (x.squeeze(0) for x in (query, key, value))
        if dropout or (has_plain_scores and device != 'cpu'):
            out_THE = attend_in_groups(query_HTD, key_GTD, value_GTE, attention_mask, scaling=scaling, dropout=dropout)
        else:
            out_THE = RowAttention.apply(query_HTD, key_GTD, value_GTE, s_aux, attention_mask, scaling, softcap)
        return out_THE[None], None

    return attention


def attend_in_groups(
    query_HTD: torch.Tensor,
    key_GTD: torch.Tensor,
    value_GTE: torch.Tensor,
    rows: RowMask,
    *,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Return the attention output (T, H, E). Calls torch's attention once for each group of rows of similar length.

    Rows are padded at their ends to the longest row of the group. The padding needs no mask, because causal attention
    never looks at later tokens.
    """
    device = query_HTD.device
    indices, found_T = rows.group_indices(device)
    parts = []
    for index_BL in indices:
        query_BHLD, key_BGLD, value_BGLE = (_gathered(x, index_BL) for x in (query_HTD, key_GTD, value_GTE))
        longest = index_BL.shape[1]
        is_seen_LL = None
        if rows.window is not None and longest > rows.window:
            offset_L = torch.arange(longest, device=device)
            distance_LL = offset_L[:, None] - offset_L
            is_seen_LL = (distance_LL >= 0) & (distance_LL < rows.window)

        repeats = query_BHLD.shape[1] // key_BGLD.shape[1]
        if repeats > 1 and not _takes_fewer_key_heads(query_BHLD, is_masked=is_seen_LL is not None):
            key_BGLD, value_BGLE = (x.repeat_interleave(repeats, dim=1) for x in (key_BGLD, value_BGLE))
        kernels = sdpa_kernel(_KERNELS) if device.type == 'cuda' else nullcontext()
        with kernels:
            out_BHLE = F.scaled_dot_product_attention(
                query_BHLD,
                key_BGLD,
                value_BGLE,
                attn_mask=is_seen_LL,
                dropout_p=dropout,
                is_causal=is_seen_LL is None,
                scale=scaling,
                enable_gqa=query_BHLD.shape[1] != key_BGLD.shape[1],
            )
        parts.append(out_BHLE.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, found_T)


def _gathered(x_HTD: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """Return the tokens of a group, (B, H, L, D)."""
    x_HBLD: torch.Tensor = x_HTD.index_select(1, index_BL.flatten()).unflatten(1, index_BL.shape)
    return x_HBLD.transpose(0, 1)


def _takes_fewer_key_heads(query_BHLD: torch.Tensor, *, is_masked: bool) -> bool:
    """Return whether a kernel that does not store all scores takes fewer key heads than query heads.

    On CUDA only flash attention does. Without it torch would store the scores of all pairs of tokens in fp32.
    """
    if query_BHLD.device.type != 'cuda':
        return True
    is_low = query_BHLD.dtype in (torch.float16, torch.bfloat16)
    has_flash = torch.cuda.get_device_capability(query_BHLD.device)[0] >= 8
    return is_low and has_flash and not is_masked and query_BHLD.shape[-1] <= _FLASH_WIDTH


@lru_cache(maxsize=64)
def _hiding_bias(
    queries: int, keys: int, diagonal: int, repeats: int, dtype: torch.dtype, device: torch.device, *, low: bool = False
) -> torch.Tensor:
    """Return a tensor (1, repeats * queries, keys) to add to scores: -inf hides a key from a query, 0 does not.

    It is a matrix (queries, keys), repeated `repeats` times. The matrix is -inf on and above the diagonal `diagonal`
    (numbered as in torch.triu), and 0 below it. With `low` it is -inf on and below the diagonal, and 0 above it.
    """
    # On a CPU, adding a bias is several times faster than filling the scores through a boolean mask.
    full_QK = torch.full((queries, keys), -torch.inf, dtype=dtype, device=device)
    bias_QK = full_QK.tril(diagonal) if low else full_QK.triu(diagonal)
    return bias_QK.repeat(repeats, 1)[None]


class RowAttention(torch.autograd.Function):
    """Causal attention by matrix products, one block of queries at a time. On a CPU it is faster than torch's own.

    Takes query (H, T, D), key (G, T, D), value (G, T, E) and sinks (H) or None. Returns the output (T, H, E).
    Attention weights are saved for the backward pass only if their block has few keys. All other weights are computed
    again, so that memory does not grow with the square of the row length. Scores and weights are stored in the dtype of
    the query. The softmax and the sums over blocks are computed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_HTD: torch.Tensor,
        key_GTD: torch.Tensor,
        value_GTE: torch.Tensor,
        sinks_H: torch.Tensor | None,
        rows: RowMask,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        ctx.settings = rows, scaling, softcap
        heads, tokens, _ = query_HTD.shape
        groups, _, width = value_GTE.shape
        out_THE = query_HTD.new_empty(tokens, heads, width)
        out_GRTE = out_THE.view(tokens, groups, -1, width).permute(1, 2, 0, 3)

        kept = []
        for block in rows.blocks():
            first_key, start, end = block
            weights, _ = _weights(query_HTD, key_GTD, sinks_H, block, ctx.settings)
            if _keeps_weights(end - first_key, softcap):
                kept.append(weights)
            mixed = torch.bmm(weights, value_GTE[:, first_key:end])
            out_GRTE[:, :, start:end] = mixed.view(groups, -1, end - start, width)

        ctx.save_for_backward(query_HTD, key_GTD, value_GTE, sinks_H, *kept)
        return out_THE

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query_HTD, key_GTD, value_GTE, sinks_H, *kept = ctx.saved_tensors
        rows, scaling, softcap = ctx.settings
        kept_weights = iter(kept)
        heads = len(query_HTD)
        groups = len(key_GTD)
        exact = torch.promote_types(query_HTD.dtype, torch.float32)
        device = key_GTD.device

        grad_GRTE = grads[0].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        query_grad_HTD = torch.empty_like(query_HTD, memory_format=torch.contiguous_format)
        key_grad_GTD = torch.zeros(key_GTD.shape, dtype=exact, device=device)
        value_grad_GTE = torch.zeros(value_GTE.shape, dtype=exact, device=device)
        sinks_grad_GR = None
        if sinks_H is not None:
            sinks_grad_GR = torch.zeros(groups, heads // groups, dtype=exact, device=device)

        for block in rows.blocks():
            first_key, start, end = block
            slope = None
            if _keeps_weights(end - first_key, softcap):
                weights = next(kept_weights)
            else:
                weights, slope = _weights(query_HTD, key_GTD, sinks_H, block, ctx.settings)

            # R query heads share a key head. Their queries in this block are joined into one dimension of R * Q.
            out_grad = grad_GRTE[:, :, start:end].flatten(1, 2)
            value_grad_GTE[:, first_key:end].add_(torch.bmm(weights.mT, out_grad))
            weights_grad = torch.bmm(out_grad, value_GTE[:, first_key:end].mT)

            if sinks_grad_GR is not None:
                shape_GRQ = (groups, heads // groups, end - start)
                mean_GRQ = torch.linalg.vecdot(weights_grad.to(exact), weights.to(exact)).view(shape_GRQ)
                sink_weight_GRQ = 1 - weights.sum(-1, dtype=exact).view(shape_GRQ)
                sinks_grad_GR -= (sink_weight_GRQ * mean_GRQ).sum(-1)

            # With this function of torch, the gradient is exactly 0 if one key has the whole weight.
            scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
            if slope is not None:
                scores_grad = scores_grad.mul_(slope)

            query_block = query_HTD[:, start:end].unflatten(0, (groups, -1)).flatten(1, 2)
            query_grad = torch.bmm(scores_grad, key_GTD[:, first_key:end]).mul_(scaling)
            query_grad_HTD[:, start:end] = query_grad.view(heads, end - start, -1)
            key_grad_GTD[:, first_key:end].add_(torch.bmm(scores_grad.mT, query_block))

        sinks_grad_H = None
        if sinks_grad_GR is not None and sinks_H is not None:
            sinks_grad_H = sinks_grad_GR.flatten().to(sinks_H.dtype)
        key_grad = key_grad_GTD.mul_(scaling).to(key_GTD.dtype)
        return query_grad_HTD, key_grad, value_grad_GTE.to(value_GTE.dtype), sinks_grad_H, None, None, None


def _keeps_weights(keys: int, softcap: float | None) -> bool:
    return keys <= KEPT_KEYS and softcap is None


def _weights(
    query_HTD: torch.Tensor,
    key_GTD: torch.Tensor,
    sinks_H: torch.Tensor | None,
    block: Block,
    settings: tuple[RowMask, float, float | None],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the attention weights of a block, (G, R * Q, K), and the derivative of the score cap.

    The derivative has the shape of the weights. It is None if scores are not capped. `settings` are the rows, the
    factor of the scores, and the cap or None.
    """
    first_key, start, end = block
    rows, scaling, softcap = settings
    groups = len(key_GTD)
    repeats = len(query_HTD) // groups
    queries = end - start
    keys = end - first_key
    query_block = query_HTD[:, start:end].unflatten(0, (groups, -1)).flatten(1, 2)

    # With 16-bit scores, torch's softmax is fast only if the number of keys is a multiple of 32. So the block also gets
    # keys after its end. The bias hides these keys, as it hides all keys after a query.
    padded_keys = keys
    if query_HTD.dtype != torch.float32:
        padded_keys = min(-(-keys // 32) * 32, key_GTD.shape[1] - first_key)

    later_bias = _hiding_bias(queries, first_key + padded_keys - start, 1, repeats, query_HTD.dtype, query_HTD.device)
    # In the first block of a row the bias covers all columns, so the matrix product can add it. In later blocks the
    # bias covers only the last columns and is added afterwards.
    is_first_block = first_key == start and softcap is None
    scores = torch.baddbmm(
        later_bias if is_first_block else later_bias[:, :1, :1],
        query_block,
        key_GTD[:, first_key : first_key + padded_keys].mT,
        beta=float(is_first_block),
        alpha=scaling,
    )

    slope = None
    if softcap is not None:
        ratio = scores.div_(softcap).tanh_()
        slope = (1 - ratio.square())[..., :keys]
        scores = ratio * softcap
    if not is_first_block:
        scores[..., start - first_key :].add_(later_bias)
    if rows.window is not None and keys > rows.window:
        window_bias = _hiding_bias(
            queries,
            min(queries, keys),
            start - first_key - rows.window,
            repeats,
            query_HTD.dtype,
            query_HTD.device,
            low=True,
        )
        scores[..., :queries].add_(window_bias)

    if sinks_H is None:
        return scores.softmax(-1)[..., :keys].contiguous(), slope
    exact = torch.promote_types(query_HTD.dtype, torch.float32)
    scores = scores.to(exact)
    sink = sinks_H.to(exact).view(groups, -1).repeat_interleave(queries, 1)[..., None]
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sink)
    return scores.sub_(total).exp_()[..., :keys].to(query_HTD.dtype), slope

"""Attention for concatenated rows, on any device.

A concatenated batch has its rows of tokens one after the other, without padding. A token attends only to tokens of its
own row.

This module computes attention in two ways:

- `RowAttention` cuts each row into blocks. A block is at most 128 consecutive queries of a row, with all keys that they
  may see. Blocks are padded to a few shapes. Blocks of equal shape form a group, and are computed together.
- `attend_in_groups` calls torch's own attention. Rows of similar length form a group, and each row is padded to the
  longest row of its group.

Other kernels are in flash_rows.py and flex_rows.py.

The letters at the end of a name are the dimensions of the tensor. For example, `query_HTD` has the shape
[query heads, tokens, width].

    T: tokens of all rows
    H: query heads
    G: key heads, which are also the value heads
    R: query heads that share one key head
    D: width of a query head or key head
    E: width of a value head
    B: blocks of a group of blocks, or rows of a group of rows
    Q: queries of a block, with padding
    K: keys of a block, with padding
    L: length of the longest row of a group of rows
    N: pairs of a query and a head in all blocks, with padding
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from utils.base.logger import logger
from utils.cli.resolution import log_decision
from utils.fast.attention_choice import AttentionCase, Kernel, candidates, repeats_keys
from utils.fast.constants import KEPT_KEYS
from utils.fast.flash_rows import flash_attention
from utils.fast.flex_rows import flex_rows_attention
from utils.fast.kernel_trial import conditions
from utils.fast.recurrent import keep_rows_apart
from utils.fast.rows import BlockGroup, RowMask, rows_of_batch

# On a GPU, torch's attention takes one of these kernels. cuDNN is not among them, because it prepares a plan for each
# new shape, which takes up to a second: https://github.com/modelscope/FunASR/issues/3704
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Row lengths, window, cap and largest relative error of the trial of a kernel. A row is longer than a block of kernels.
_TRIAL_LENGTHS = (3, 150, 1, 40)
_TRIAL_WINDOW = 20
_TRIAL_CAP = 30.0
_TRIAL_BOUND = 2e-2
# An attention implementation of transformers with this prefix is that of this module.
_PREFIX = 'rows_over_'


def unpadded(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return {'attention_mask': a tensor of ones} to pass to the model with concatenated rows, or an empty dict.

    `ids` are the token ids [1, tokens]. The mask has the same shape.

    Without a mask, transformers searches position_ids for the starts of rows, and the CPU waits for the device. If
    `attend_by_rows` has replaced the model's attention, the starts are not needed. The mask then prevents the search,
    and the attention ignores the mask.

    If `attend_by_rows` has not replaced the attention, the dict is empty. An example is the package flash-attn, which
    needs the starts that transformers finds.
    """
    uses_rows = model.config._attn_implementation.startswith(_PREFIX)
    return {'attention_mask': torch.ones_like(ids)} if uses_rows else {}


def attend_by_rows(model: Any) -> None:
    """Make a model compute the rows of a batch separately inside the context `concatenated_rows`.

    Inside the context, a token attends only to tokens of its own row, and recurrent layers start anew at each row.
    Outside of the context, the model computes as before, for example with padded batches.
    """
    before = model.config._attn_implementation
    flash_package = before.startswith('flash_attention')
    keep_rows_apart(model, flash_package=flash_package)
    if flash_package:
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
        rows = rows_of_batch()
        if rows is None:
            return original(*args, **kwargs)
        if kwargs.get('use_vmap'):
            raise ValueError('its mask is more than causal, which concatenated rows do not support')
        return RowMask(rows.lengths, kwargs.get('local_size'), rows.tensors)

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

        if kwargs.get('position_bias') is not None or kwargs.get('is_causal') is False:
            raise ValueError('concatenated rows support no position bias and no attention to later tokens')
        if dropout and (softcap is not None or s_aux is not None):
            raise ValueError('concatenated rows support no attention dropout together with capped scores or sinks')

        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        device = query.device.type
        if torch.is_autocast_enabled(device):
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))

        query_HTD, key_GTD, value_GTE = (x.squeeze(0) for x in (query, key, value))
        inputs = Inputs(query_HTD, key_GTD, value_GTE, s_aux, attention_mask, scaling, softcap, dropout)
        return inputs.attend_by(kernel_for(inputs.case(), query.device))[None], None

    return attention


class Inputs(NamedTuple):
    """The tensors and settings of one attention layer, for all rows of a concatenated batch.

    `query` is [query heads, tokens, width], `key` is [key heads, tokens, width], and `value` is
    [key heads, tokens, value width]. `sinks` [query heads] are extra scores in the softmax, or None. Scores are
    multiplied by `scaling`. If `softcap` is not None, the scores then become softcap * tanh(scores / softcap).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sinks: torch.Tensor | None
    rows: RowMask
    scaling: float
    softcap: float | None = None
    dropout: float = 0.0

    def case(self) -> AttentionCase:
        """Return the properties of these inputs and of their device by which a kernel is chosen."""
        query = self.query
        is_nvidia = query.is_cuda and torch.version.hip is None
        return AttentionCase(
            kind='rocm' if query.is_cuda and not is_nvidia else query.device.type,
            capability=torch.cuda.get_device_capability(query.device) if is_nvidia else (0, 0),
            dtype=query.dtype,
            heads=len(query),
            key_heads=len(self.key),
            query_width=query.shape[-1],
            value_width=self.value.shape[-1],
            window=self.rows.window is not None,
            softcap=self.softcap is not None,
            sinks=self.sinks is not None,
            dropout=self.dropout > 0,
        )

    def attend_by(self, kernel: Kernel) -> torch.Tensor:
        """Return the attention output [tokens, query heads, value width], computed by `kernel`."""
        device = self.query.device
        if kernel == 'flash':
            return flash_attention(
                *self[:4],
                self.rows.cu_seqlens(device),
                longest=self.rows.longest,
                window=self.rows.window,
                scaling=self.scaling,
            )
        if kernel == 'flex':
            assert self.softcap is not None
            mask = self.rows.block_mask(device)
            return flex_rows_attention(*self[:3], mask, softcap=self.softcap, scaling=self.scaling)
        if kernel == 'groups':
            return attend_in_groups(*self[:3], self.rows, scaling=self.scaling, dropout=self.dropout)
        out_THE: torch.Tensor = RowAttention.apply(*self[:-1])
        return out_THE


@lru_cache(maxsize=256)
def kernel_for(case: AttentionCase, device: torch.device) -> Kernel:
    """Return the first kernel of `candidates(case)` that passes a trial. The last candidate needs no trial.

    A trial compares output and gradients on small inputs with those of `RowAttention` in fp32. Each kernel is tried
    once per case, on `device`. If a kernel fails its trial or raises an error, a warning is logged and the next kernel
    is tried. If there is only one candidate, for example on a CPU, there is no trial.
    """
    possible = candidates(case)
    for kernel in possible[:-1]:
        try:
            error = trial_error(kernel, case, device)
            failure = None if error <= _TRIAL_BOUND else f'its values are off by {error:.1g}'
        except Exception as raised:  # a kernel that cannot be built or started may raise any exception
            failure = f'{type(raised).__name__}: {raised}'
        if failure is None:
            log_decision('attention kernel', kernel, 'it passed its trial on this device')
            return kernel
        logger.warning(f'the attention kernel {kernel} is not used: {failure.rstrip()}. Another kernel is used.')
    if case.kind != 'cpu':
        log_decision(
            'attention kernel', possible[-1], f'no faster one serves this attention in {case.dtype} on this device'
        )
    return possible[-1]


def trial_error(kernel: Kernel, case: AttentionCase, device: torch.device) -> float:
    """Return the largest relative error of a kernel's output and gradients, compared with `RowAttention` in fp32.

    The inputs are small and random. Their dtype, numbers of heads and widths are those of `case`. The random state of
    torch is not changed.
    """
    tokens = sum(_TRIAL_LENGTHS)
    shapes = [(case.heads, case.query_width), (case.key_heads, case.query_width), (case.key_heads, case.value_width)]
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(heads, tokens, width, generator=random) for heads, width in shapes]
    if case.sinks:
        tensors.append(torch.randn(case.heads, generator=random))
    direction_THE = torch.randn(tokens, case.heads, case.value_width, generator=random).to(device)
    rows = RowMask(_TRIAL_LENGTHS, _TRIAL_WINDOW if case.window else None)

    found: list[list[torch.Tensor]] = []
    for name, dtype in ((kernel, case.dtype), ('rows', torch.float32)):
        with conditions(device):
            given = [x.to(device, case.dtype).to(dtype).requires_grad_() for x in tensors]
            sinks = given[3] if case.sinks else None
            softcap = _TRIAL_CAP if case.softcap else None
            inputs = Inputs(given[0], given[1], given[2], sinks, rows, case.query_width**-0.5, softcap)
            out_THE = inputs.attend_by(name)
            grads = torch.autograd.grad(out_THE, given, direction_THE.to(dtype))
        found.append([x.detach().double() for x in (out_THE, *grads)])
    errors = [float((ours - exact).norm() / exact.norm()) for ours, exact in zip(*found, strict=True)]
    # A comparison with NaN is always false, so that NaN would not be the maximum.
    return max(error if error == error else float('inf') for error in errors)


def attend_in_groups(
    query_HTD: torch.Tensor,
    key_GTD: torch.Tensor,
    value_GTE: torch.Tensor,
    rows: RowMask,
    *,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Return the attention output [tokens, query heads, value width], computed by torch's own attention.

    Rows of similar length form a group. Each row is padded at its end to the longest row of its group, and torch's
    attention is called once for each group. The padding needs no mask, because causal attention never looks at later
    tokens. If the batch has further tokens after its last row, their output is 0.
    """
    device = query_HTD.device
    inputs = Inputs(query_HTD, key_GTD, value_GTE, None, rows, scaling)
    repeats = len(query_HTD) // len(key_GTD)
    groups, place_T = rows.group_indices(device)
    parts = []
    for index_BL in groups:
        query_BHLD, key_BGLD, value_BGLE = (
            x.index_select(1, index_BL.flatten()).unflatten(1, index_BL.shape).transpose(0, 1)
            for x in (query_HTD, key_GTD, value_GTE)
        )

        is_seen_LL = None
        longest = index_BL.shape[1]
        if rows.window is not None and longest > rows.window:
            offset_L = torch.arange(longest, device=device)
            distance_LL = offset_L[:, None] - offset_L
            is_seen_LL = (distance_LL >= 0) & (distance_LL < rows.window)

        if repeats > 1 and repeats_keys(inputs.case(), masked=is_seen_LL is not None):
            key_BGLD, value_BGLE = (x.repeat_interleave(repeats, dim=1) for x in (key_BGLD, value_BGLE))

        backends: AbstractContextManager[None] = sdpa_kernel(_BACKENDS) if device.type == 'cuda' else nullcontext()
        with backends:
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
    out_THE = torch.cat(parts).index_select(0, place_T)
    extra = query_HTD.shape[1] - rows.tokens
    return F.pad(out_THE, (0, 0, 0, 0, 0, extra)) if extra else out_THE


@lru_cache(maxsize=64)
def _hiding_bias(
    queries: int, keys: int, diagonal: int, repeats: int, dtype: torch.dtype, device: torch.device, *, low: bool = False
) -> torch.Tensor:
    """Return a tensor of 0 and -inf to add to attention scores. -inf hides a key from a query.

    Key number k is hidden from query number q if k - q >= `diagonal`. If `low` is True, the hidden keys are those with
    k - q <= `diagonal`. The shape is [1, repeats * queries, keys], with the same values for each of `repeats` query
    heads.
    """
    # On a CPU, adding a bias is several times faster than filling the scores through a boolean mask.
    full_QK = torch.full((queries, keys), -torch.inf, dtype=dtype, device=device)
    bias_QK = full_QK.tril(diagonal) if low else full_QK.triu(diagonal)
    return bias_QK.repeat(repeats, 1)[None]


class RowAttention(torch.autograd.Function):
    """Causal attention inside each row of a concatenated batch. On a CPU, it is faster than torch's own attention.

    The arguments are query [query heads, tokens, width], key [key heads, tokens, width], value
    [key heads, tokens, value width] and sinks [query heads] or None. The output is [tokens, query heads, value width].
    If the batch has further tokens after its last row, their output is 0.

    Each row is cut into blocks of queries. Blocks of equal shape are computed together, because a small matrix product
    takes longer to start than to compute.

    If scores are not capped, a block with few keys saves its attention weights for the backward pass. All other blocks
    compute them again, so that the memory does not grow with the square of the row length.
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
        width = value_GTE.shape[-1]
        padded = _PaddedBlocks(query_HTD, key_GTD, value_GTE, rows)

        # Scores and weights have the dtype of the query. The softmax, and the sums over blocks, are computed in fp32.
        out_NE = query_HTD.new_empty(len(padded.plan.queries.take), width)
        kept = []
        for number, group in enumerate(padded.plan.groups):
            query, key, value = padded.of_group(number)
            found = _weights(query, key, sinks_H, group, *ctx.settings)
            if _keeps_weights(group.keys, softcap):
                kept += [found.keys, found.sink]
            torch.bmm(found.keys, value, out=padded.part(out_NE, group))

        ctx.save_for_backward(query_HTD, key_GTD, value_GTE, sinks_H, *kept)
        return _placed(out_NE, padded.plan.queries.place, tokens, heads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query_HTD, key_GTD, value_GTE, sinks_H, *kept = ctx.saved_tensors
        rows, scaling, softcap = ctx.settings
        kept_weights = iter(kept)
        heads, tokens, _ = query_HTD.shape
        groups = len(key_GTD)
        exact = torch.promote_types(query_HTD.dtype, torch.float32)
        padded = _PaddedBlocks(query_HTD, key_GTD, value_GTE, rows)

        out_grad_NE = grads[0].reshape(-1, grads[0].shape[-1]).index_select(0, padded.plan.queries.take)
        if padded.plan.queries.is_real is not None:
            out_grad_NE.mul_(padded.plan.queries.is_real)  # 0 for padded queries, so they add nothing to any gradient
        query_grad_ND = torch.empty_like(padded.query_ND)
        sinks_grad_GR = None
        if sinks_H is not None:
            sinks_grad_GR = torch.zeros(groups, heads // groups, dtype=exact, device=query_HTD.device)

        key_grad = _KeyGradient(key_GTD, padded)
        value_grad = _KeyGradient(value_GTE, padded)
        for number, group in enumerate(padded.plan.groups):
            query, key, value = padded.of_group(number)
            if _keeps_weights(group.keys, softcap):
                weights, sink_weight, slope = next(kept_weights), next(kept_weights), None
            else:
                weights, sink_weight, slope = _weights(query, key, sinks_H, group, *ctx.settings)

            out_grad = padded.part(out_grad_NE, group)
            value_grad.add(group, weights.mT, out_grad)
            weights_grad = torch.bmm(out_grad, value.mT)

            if sinks_grad_GR is not None:
                shape_BGRQ = (len(group.blocks), groups, heads // groups, group.queries)
                mean_BGRQ = torch.linalg.vecdot(weights_grad.to(exact), weights.to(exact)).view(shape_BGRQ)
                sinks_grad_GR -= (sink_weight.view(shape_BGRQ) * mean_BGRQ).sum((0, 3))

            # With this function of torch, the gradient is exactly 0 if one key has the whole weight.
            scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
            if slope is not None:
                scores_grad = scores_grad.mul_(slope)
            torch.bmm(scores_grad, key, out=padded.part(query_grad_ND, group))
            key_grad.add(group, scores_grad.mT, query)

        query_grad_THD = _placed(query_grad_ND.mul_(scaling), padded.plan.queries.place, tokens, heads)
        sinks_grad_H = None
        if sinks_grad_GR is not None and sinks_H is not None:
            sinks_grad_H = sinks_grad_GR.flatten().to(sinks_H.dtype)
        key_grad_GTD = key_grad.total(scaling)
        return query_grad_THD.transpose(0, 1), key_grad_GTD, value_grad.total(), sinks_grad_H, None, None, None


class _PaddedBlocks:
    """The queries, keys and values of one attention layer, cut into blocks and padded.

    A block is at most 128 queries of a row, with all keys that they may see. Blocks of equal shape form a group.
    """

    def __init__(self, query_HTD: torch.Tensor, key_GTD: torch.Tensor, value_GTE: torch.Tensor, rows: RowMask) -> None:
        self.heads = len(key_GTD)
        self.repeats = len(query_HTD) // self.heads
        self.tokens = query_HTD.shape[1]
        self.plan = rows.block_plan(self.heads, self.repeats, query_HTD.device)
        self.query_ND = _by_head(query_HTD).index_select(0, self.plan.queries.take)
        self.key = _by_head(key_GTD)
        self.value = _by_head(value_GTE)

    def of_group(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (queries, keys, values) of the blocks in `self.plan.groups[number]`.

        The shapes of the three tensors are:

        - queries: [blocks * key heads, (query heads per key head) * (queries per block), width]
        - keys: [blocks * key heads, keys per block, width]
        - values: [blocks * key heads, keys per block, value width]
        """
        group = self.plan.groups[number]
        indices = self.plan.keys(number)
        key, value = (x.index_select(0, indices).view(-1, group.keys, x.shape[-1]) for x in (self.key, self.value))
        return self.part(self.query_ND, group), key, value

    def part(self, padded_ND: torch.Tensor, group: BlockGroup) -> torch.Tensor:
        return group.part(padded_ND, self.heads, self.repeats)


class _KeyGradient:
    """Sums the gradients of keys, or of values, over all blocks of queries.

    A key or value gets a gradient from each block whose queries may see it.
    """

    def __init__(self, key_GTD: torch.Tensor, padded: _PaddedBlocks) -> None:
        self.padded = padded
        # Gradients from the block of the key's own position. Each key has exactly one.
        self.own_ND = key_GTD.new_empty(len(padded.query_ND) // padded.repeats, key_GTD.shape[-1])
        # Gradients from later blocks of the row.
        self.later_TGD = None
        if any(group.earlier for group in padded.plan.groups):
            exact = torch.promote_types(key_GTD.dtype, torch.float32)
            self.later_TGD = key_GTD.new_zeros(padded.tokens, padded.heads, key_GTD.shape[-1], dtype=exact)

    def add(self, group: BlockGroup, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the matrix product left @ right to the gradients of the keys that the blocks in `group` use.

        `left` is [blocks * key heads, keys, n] and `right` is [blocks * key heads, n, width]. Here n is the number of
        queries of a block, times the query heads per key head.
        """
        own = group.part(self.own_ND, self.padded.heads, 1)
        if self.later_TGD is None or group.earlier == 0:
            torch.bmm(left, right, out=own)
            return

        grad = torch.bmm(left, right)
        own.copy_(grad[:, group.earlier : group.earlier + group.queries])
        earlier_BGKD = grad[:, : group.earlier].unflatten(0, (-1, self.padded.heads))
        for block, earlier_GKD in zip(group.blocks, earlier_BGKD, strict=True):
            self.later_TGD[block.first_key : block.start].add_(earlier_GKD.transpose(0, 1))

    def total(self, scaling: float = 1.0) -> torch.Tensor:
        """Return the summed gradients [key heads, tokens, width], multiplied by `scaling`."""
        padded = self.padded
        total_TGD = _placed(self.own_ND, padded.plan.place_keys, padded.tokens, padded.heads)
        if self.later_TGD is not None:
            total_TGD = self.later_TGD.add_(total_TGD)
        if scaling != 1.0:
            total_TGD = total_TGD.mul_(scaling)
        return total_TGD.to(self.own_ND.dtype).transpose(0, 1)


def _by_head(x_HTD: torch.Tensor) -> torch.Tensor:
    """Return x [heads, tokens, width] as a tensor [tokens * heads, width]."""
    return x_HTD.transpose(0, 1).reshape(-1, x_HTD.shape[-1])


def _placed(padded_ND: torch.Tensor, place: torch.Tensor, tokens: int, heads: int) -> torch.Tensor:
    """Return the vectors of the padded blocks in the order of the tokens, without padding: [tokens, heads, width].

    `place` has the index in `padded_ND` of each token and head. If the batch has further tokens after its last row,
    they get 0.
    """
    width = padded_ND.shape[-1]
    placed_THD = padded_ND.new_empty(tokens, heads, width)
    of_rows = len(place) // heads
    torch.index_select(padded_ND, 0, place, out=placed_THD[:of_rows].view(-1, width))
    placed_THD[of_rows:] = 0
    return placed_THD


def _keeps_weights(keys: int, softcap: float | None) -> bool:
    return keys <= KEPT_KEYS and softcap is None


class _Weights(NamedTuple):
    """The attention weights of a group of blocks, and what their backward pass needs.

    keys: the weights of the keys, [blocks * key heads, query heads per key head * queries, keys].
    sink: the weights of the attention sinks in fp32, in the shape of `keys` without the last dimension. None without
    sinks. They are stored because 1 minus the sum of the rounded key weights is too inexact for a small sink weight.
    slope: the derivative of the cap function at each score, in the shape of `keys`. None if scores are not capped.
    """

    keys: torch.Tensor
    sink: torch.Tensor | None
    slope: torch.Tensor | None


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    sinks_H: torch.Tensor | None,
    group: BlockGroup,
    rows: RowMask,
    scaling: float,
    softcap: float | None,
) -> _Weights:
    """Return the attention weights of the blocks in `group`.

    Scores are multiplied by `scaling`, and then capped to softcap * tanh(scores / softcap). If `softcap` is None,
    scores are not capped.
    """
    queries, earlier, keys = group.queries, group.earlier, group.keys
    repeats = query.shape[1] // queries

    later_bias = _hiding_bias(queries, keys - earlier, 1, repeats, query.dtype, query.device)
    # In the first block of a row the bias covers all columns, so the matrix product can add it. In later blocks the
    # bias covers only the last columns and is added afterwards.
    is_first_block = earlier == 0 and softcap is None
    scores = torch.baddbmm(
        later_bias if is_first_block else later_bias[:, :1, :1],
        query,
        key.mT,
        beta=float(is_first_block),
        alpha=scaling,
    )

    slope = None
    if softcap is not None:
        ratio = scores.div_(softcap).tanh_()
        slope = 1 - ratio.square()
        scores = ratio * softcap
    if not is_first_block:
        scores[..., earlier:].add_(later_bias)
    if rows.window is not None and earlier + queries > rows.window:
        window_bias = _hiding_bias(
            queries, min(queries, keys), earlier - rows.window, repeats, query.dtype, query.device, low=True
        )
        scores[..., :queries].add_(window_bias)

    if sinks_H is None:
        return _Weights(scores.softmax(-1), None, slope)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = scores.to(exact)
    sink_GRQ = sinks_H.to(exact).view(-1, repeats, 1).expand(-1, -1, queries)
    sink = sink_GRQ.flatten(1).repeat(len(group.blocks), 1)[..., None]
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sink)
    return _Weights(scores.sub_(total).exp_().to(query.dtype), (sink - total).exp_().squeeze(-1), slope)

"""Attention for concatenated rows by torch's flex_attention. It can cap scores, which the flash kernels cannot do.

The letters at the end of a name are the dimensions of the tensor. For example, `query_HTD` has the shape
[query heads, tokens, width].

    T: tokens of all rows
    H: query heads
    G: key heads, which are also the value heads
    D: width of a query head or key head
    E: width of a value head
    N: blocks of 128 queries or 128 keys
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128


def flex_rows_attention(
    query_HTD: torch.Tensor,
    key_GTD: torch.Tensor,
    value_GTE: torch.Tensor,
    mask: BlockMask,
    *,
    softcap: float,
    scaling: float,
) -> torch.Tensor:
    """Return the attention output [tokens, query heads, value width]. Scores become softcap * tanh(scores / softcap).

    On a GPU, flex_attention is compiled. Without compilation it would keep all scores in memory.
    """
    attend: Any = _compiled() if query_HTD.is_cuda else flex_attention
    out_1HTE = attend(
        query_HTD[None],
        key_GTD[None],
        value_GTE[None],
        score_mod=_cap(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=len(query_HTD) != len(key_GTD),
    )
    out_THE: torch.Tensor = out_1HTE[0].transpose(0, 1)
    return out_THE


def row_block_mask(lengths: Sequence[int], window: int | None, device: torch.device) -> BlockMask:
    """Return a mask for flex_attention in which a query sees only itself and earlier tokens of its row.

    `lengths` are the numbers of tokens of the rows. If `window` is not None, a query sees at most this many keys.
    """
    starts = [0, *accumulate(lengths)]
    tokens = starts[-1]
    number = -(-tokens // _BLOCK)

    first_blocks = []
    for query in range(0, tokens, _BLOCK):
        first_key = starts[bisect_right(starts, query) - 1]
        if window is not None:
            first_key = max(first_key, query - window + 1)
        first_blocks.append(first_key // _BLOCK)

    block_N = torch.arange(number)
    first_N = torch.tensor(first_blocks)
    # No mask [tokens, tokens] is made: the visible blocks are computed from the lengths.
    # The visible blocks come first. The other blocks follow, so that each block is listed once.
    order_NN = (first_N[:, None] + block_N) % number
    row_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return BlockMask.from_kv_blocks(
        (block_N - first_N + 1)[None, None].to(device, torch.int32),
        order_NN[None, None].to(device, torch.int32),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_sees(row_T, window),
        seq_lengths=(tokens, tokens),
    )


def _sees(row_T: torch.Tensor, window: int | None) -> Callable[..., torch.Tensor]:
    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = (row_T[query] == row_T[key]) & (key <= query)
        return seen if window is None else seen & (query - key < window)

    return sees


@lru_cache
def _cap(softcap: float) -> Callable[..., torch.Tensor]:
    """Return a function that turns a score into softcap * tanh(score / softcap).

    The same `softcap` gives the same function object, so that torch compiles it only once.
    """

    def cap(score: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@lru_cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)

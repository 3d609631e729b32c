"""Attention for concatenated rows by torch's flex_attention. It caps scores, which the flash kernels cannot do.

Shapes in names: T tokens of all rows, H query heads, G key and value heads, D width of a query or key head, E width of
a value head, N blocks of queries or keys.
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
    """Return the attention output (T, H, E). Scores become softcap * tanh(scores / softcap).

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
    """Return the mask of concatenated rows of these lengths. A query sees at most `window` keys of its row.

    The visible blocks are computed from the lengths, so that no mask (T, T) is made.
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
    """Return the function that caps scores: the same object for the same cap, so that torch compiles it only once."""

    def cap(score: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@lru_cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)

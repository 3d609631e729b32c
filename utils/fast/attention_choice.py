"""Chooses the attention kernels that can serve concatenated rows. The choice can be tested without a GPU."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

# flash: the flash-attention kernels inside torch. flex: torch's flex_attention, compiled. groups: torch's own attention
# on groups of padded rows. rows: this project's matrix products, which run on any device.
Kernel = Literal['flash', 'flex', 'groups', 'rows']

# torch builds its flash kernels for these widths of a head.
_FLASH_WIDTH = 256
_FLASH_STEP = 8
# On these GPUs (RTX 30, RTX 40, RTX 50), torch refuses some backward passes of heads that are wider than this.
_SMALL_WIDTH = 192
_SMALL_GPUS = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


class AttentionCase(NamedTuple):
    """The properties of a device and of an attention layer by which a kernel is chosen.

    `kind` is torch's type of the device, for example 'cuda', but 'rocm' for an AMD GPU. `capability` is the compute
    capability of an NVIDIA GPU, and (0, 0) for all other devices. `query_width` is the width of a query or key head,
    `value_width` the width of a value head. The last four fields say which features the layer uses.
    """

    kind: str
    capability: tuple[int, int]
    dtype: torch.dtype
    heads: int
    key_heads: int
    query_width: int
    value_width: int
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False


def candidates(case: AttentionCase) -> tuple[Kernel, ...]:
    """Return the kernels that can compute this case, the best one first.

    If all other kernels fail their trial, the last kernel is used without a trial.
    """
    plain = not case.softcap and not case.sinks
    if case.dropout:
        return ('groups',)
    if case.kind == 'cpu':
        return ('rows',)

    last: Kernel = 'groups' if plain else 'rows'
    if case.softcap and not case.sinks and is_recent_nvidia(case):
        return ('flex', last)
    return ('flash', last) if _flash_serves(case) else (last,)


def flash_width(query_width: int, value_width: int) -> int:
    """Return the width to which all heads are padded for torch's flash kernels.

    These kernels need the same width for queries, keys and values. It must be a multiple of 8.
    """
    return -(-max(query_width, value_width) // _FLASH_STEP) * _FLASH_STEP


def repeats_keys(case: AttentionCase, *, masked: bool) -> bool:
    """Return whether each query head must get its own copy of its key head before torch's attention is called.

    `masked` says whether torch's attention gets a mask.

    Several query heads can share one key head. On an NVIDIA GPU, torch's flash kernel computes shared heads without
    copies. If the flash kernel cannot run, torch uses its slowest kernel for shared heads, which keeps all scores in
    memory. With copies, torch uses a faster kernel.
    """
    if case.kind != 'cuda' or case.heads == case.key_heads:
        return False
    same_width = case.query_width == case.value_width
    return masked or not same_width or not _flash_serves(case)


def is_recent_nvidia(case: AttentionCase) -> bool:
    """Return whether the device is an NVIDIA GPU of the generation Ampere (A100, RTX 30) or newer."""
    return case.kind == 'cuda' and case.capability >= (8, 0)


def _flash_serves(case: AttentionCase) -> bool:
    width = flash_width(case.query_width, case.value_width)
    limit = _SMALL_WIDTH if case.capability in _SMALL_GPUS else _FLASH_WIDTH
    is_16_bit = case.dtype in (torch.bfloat16, torch.float16)
    return is_recent_nvidia(case) and is_16_bit and width <= limit and not case.softcap

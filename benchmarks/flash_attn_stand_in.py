"""A package `flash_attn` made of torch's own flash kernels, so that other trainers are measured at their best.

transformers and TRL use padding-free batches only with the package flash-attn, which has to be compiled for each
version of torch. Torch contains the same kernels. `install` writes a package that calls them into a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

_CODE = """
import torch

from utils.fast.flash_rows import flash_attention


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), **_):
    assert causal and not dropout_p
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window = None if window_size[0] < 0 else window_size[0] + 1
    ends = cu_seqlens_q.to(torch.int32)
    rows = (x.transpose(0, 1) for x in (q, k, v))
    return flash_attention(*rows, None, ends, longest=int(max_seqlen_q), window=window, scaling=scale)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
    rows, length = q.shape[:2]
    ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=q.device)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(*flat, ends, ends, length, length, dropout_p, softmax_scale, causal, window_size)
    return out.unflatten(0, (rows, length))


flash_attn_with_kvcache = None
"""
_PADDING = """
from transformers.modeling_flash_attention_utils import _pad_input as pad_input, _unpad_input as unpad_input
"""
_VERSION = '2.8.3'


def install(folder: Path) -> None:
    """Write the package into a folder, and put the folder on the path of this process."""
    package = folder / 'flash_attn'
    package.mkdir(parents=True)
    (package / '__init__.py').write_text(f"__version__ = '{_VERSION}'\n{_CODE}", encoding='utf-8')
    (package / 'bert_padding.py').write_text(_PADDING, encoding='utf-8')
    facts = folder / f'flash_attn-{_VERSION}.dist-info'
    facts.mkdir()
    (facts / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: flash-attn\nVersion: {_VERSION}\n', encoding='utf-8')
    (facts / 'top_level.txt').write_text('flash_attn\n', encoding='utf-8')
    sys.path.insert(0, str(folder))

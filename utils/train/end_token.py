"""An end of turn that the base model never learnt: LoRA, which leaves embedding and head alone, cannot teach it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from utils.base.logger import logger

_UNUSED = re.compile(r'unused|reserved|placeholder|extra_?\d', re.I)
# Rows that are looked at of each kind: enough for a median.
_LOOKED_AT = 64
# A row this much smaller than words' is as good as zero.
_ZERO = 1e-3
# How far unused rows must lie apart from words, and how near an end must come to them from there.
_APART, _NEAR = 0.3, 0.85


def warn_of_untrained_ends(model: Any, tokenizer: Any, stop_ids: Iterable[int]) -> None:
    """Warn about ends of turn whose rows in the output head are as those of tokens that were never used."""
    ends = sorted(set(stop_ids) or {tokenizer.eos_token_id})
    untrained = untrained_ids(model.get_output_embeddings(), tokenizer, ends)
    if untrained:
        names = ', '.join(repr(tokenizer.convert_ids_to_tokens(token)) for token in untrained)
        logger.warning(
            f'the base model never learnt {names}, at which a reply ends: its row in the output head is like those of '
            'unused tokens, and LoRA leaves it so. Answers may not stop. Use --sft_type full, the chat model of this '
            f'base, or a --template_type that ends with {tokenizer.eos_token!r}, e.g. default.'
        )


def untrained_ids(head: Any, tokenizer: Any, ids: Iterable[int]) -> list[int]:
    """Return those of the ids whose rows in the head are as near to unused tokens' rows as these are to each other.

    None where the head is not whole on this process, is quantised, or where unused rows are not told from words.
    """
    import torch

    weight = getattr(head, 'weight', None)
    if type(weight) is not torch.nn.Parameter or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        return []
    asked = [token for token in ids if token < len(weight)]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.added_tokens_decoder) | set(asked)
    unused = [i for text, i in vocabulary if _UNUSED.search(text) and i < len(weight) and i not in asked]
    unused += range(len(tokenizer), len(weight))
    words = [i for text, i in vocabulary if i not in special and i < len(weight) and not _UNUSED.search(text)]
    unused, words = unused[:: max(1, len(unused) // _LOOKED_AT)], words[:: max(1, len(words) // _LOOKED_AT)]
    if len(unused) < 4 or len(words) < 4 or not asked:
        return []

    def rows(chosen: list[int]) -> Any:
        return weight.detach()[torch.tensor(chosen, device=weight.device)].double().cpu()

    ends, blank, known = rows(asked), rows(unused), rows(words)
    bound = _ZERO * float(known.norm(dim=1).median())
    if float(blank.norm(dim=1).median()) <= bound:
        return [token for token, row in zip(asked, ends, strict=True) if float(row.norm()) <= bound]

    def nearness(found: Any) -> Any:
        return torch.nn.functional.normalize(found, dim=1) @ torch.nn.functional.normalize(blank, dim=1).T

    among = nearness(blank)
    each_other = float(among[~torch.eye(len(blank), dtype=torch.bool)].median())
    of_words = float(nearness(known).median())
    if each_other - of_words < _APART:
        return []
    near = of_words + _NEAR * (each_other - of_words)
    return [token for token, found in zip(asked, nearness(ends).median(dim=1).values, strict=True) if found >= near]

"""Find an end of turn that the base model never learnt: LoRA does not train the output head, so it cannot teach it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from utils.base.logger import logger

_UNUSED = re.compile(r'unused|reserved|placeholder|extra_?\d', re.I)
# How many rows of the head are compared of each kind: enough for a median.
_SAMPLE = 64
# A row whose norm is below this fraction of the median norm of words counts as zero.
_ZERO = 1e-3
# By how much unused rows must be more similar to each other than words are to them, as a cosine.
_MIN_SEPARATION = 0.3
# An end is untrained if its similarity lies at least this far on the way from that of words to that of unused rows.
_NEAR = 0.85


def warn_of_untrained_ends(model: Any, tokenizer: Any, stop_ids: Iterable[int]) -> None:
    """Warn about ends of turn whose rows in the output head look like those of unused tokens."""
    ends = sorted(set(stop_ids) or {tokenizer.eos_token_id})
    untrained = untrained_ids(model.get_output_embeddings(), tokenizer, ends)
    if untrained:
        names = ', '.join(repr(tokenizer.convert_ids_to_tokens(token)) for token in untrained)
        logger.warning(
            f'--template_type: the base model never learnt {names}, at which a reply ends: its row in the output head '
            'is like those of unused tokens, and LoRA does not change it. Answers may not stop. Use --sft_type full, '
            f'the chat model of this base, or a --template_type that ends with {tokenizer.eos_token!r}, e.g. default.'
        )


def untrained_ids(head: Any, tokenizer: Any, ids: Iterable[int]) -> list[int]:
    """Return the ids whose rows in the head are about as similar to rows of unused tokens as these are to each other.

    Returns none if the head is sharded or quantised, or if unused tokens cannot be distinguished from words.
    """
    import torch

    weight = getattr(head, 'weight', None)
    if type(weight) is not torch.nn.Parameter or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        return []

    checked = [token for token in ids if token < len(weight)]
    special = set(tokenizer.added_tokens_decoder) | set(checked)
    unused = []
    words = []
    for text, token in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token >= len(weight):
            continue
        if _UNUSED.search(text):
            if token not in checked:
                unused.append(token)
        elif token not in special:
            words.append(token)
    unused += range(len(tokenizer), len(weight))
    if not checked:
        return []

    unused = _sample(unused)
    words = _sample(words)
    if len(unused) < 4 or len(words) < 4:
        return []

    def rows(tokens: list[int]) -> Any:
        return weight.detach()[torch.tensor(tokens, device=weight.device)].double().cpu()

    end_rows = rows(checked)
    unused_rows = rows(unused)
    word_rows = rows(words)
    zero_norm = _ZERO * float(word_rows.norm(dim=1).median())
    if float(unused_rows.norm(dim=1).median()) <= zero_norm:
        return [token for token, row in zip(checked, end_rows, strict=True) if float(row.norm()) <= zero_norm]

    def similarity(found: Any) -> Any:
        """Return the cosine of each row with each unused row."""
        return torch.nn.functional.normalize(found, dim=1) @ torch.nn.functional.normalize(unused_rows, dim=1).T

    among_unused = similarity(unused_rows)
    is_pair = ~torch.eye(len(unused_rows), dtype=torch.bool)
    of_unused = float(among_unused[is_pair].median())
    of_words = float(similarity(word_rows).median())
    if of_unused - of_words < _MIN_SEPARATION:
        return []
    bound = of_words + _NEAR * (of_unused - of_words)
    of_ends = similarity(end_rows).median(dim=1).values
    return [token for token, found in zip(checked, of_ends, strict=True) if found >= bound]


def _sample(tokens: list[int]) -> list[int]:
    """Return about _SAMPLE of the tokens, evenly spread."""
    return tokens[:: max(1, len(tokens) // _SAMPLE)]

"""Find end-of-turn tokens that the base model never learnt.

The output head of a model has one row of weights for each token. Many models have tokens that no text of their training
contained, such as <unused1>. The rows of these unused tokens look alike. If the row of an end-of-turn token looks like
them, the base model never learnt this token. LoRA cannot teach it, because LoRA does not change the output head.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from utils.base.logger import logger

_UNUSED = re.compile(r'unused|reserved|placeholder|extra_?\d', re.I)
# At least this many unused tokens, and as many words, are taken as samples. This number is enough for a median.
_SAMPLE = 64
# A row whose norm is below this fraction of the median norm of words counts as zero.
_ZERO = 1e-3
# The test needs a clear difference: the similarity (cosine) among unused rows must be higher than the similarity of
# words to unused rows by at least this much.
_MIN_SEPARATION = 0.3
# Similarity to unused rows, on a scale on which words have 0 and unused rows have 1. An end token with at least this
# value counts as untrained.
_NEAR = 0.85


def warn_of_untrained_ends(
    model: Any, tokenizer: Any, stop_ids: Iterable[int], *, trained: Collection[int] = ()
) -> None:
    """Log a warning if the base model never learnt one of its end-of-turn tokens `stop_ids`.

    If `stop_ids` is empty, the end-of-sequence token is checked. The tokens `trained` are not checked, because the run
    trains their rows of the output head.
    """
    ends = sorted((set(stop_ids) or {tokenizer.eos_token_id}).difference(trained))
    untrained = untrained_ids(model.get_output_embeddings(), tokenizer, ends)
    if untrained:
        names = ', '.join(repr(tokenizer.convert_ids_to_tokens(token)) for token in untrained)
        remedy = 'Use --sft_type full, or the chat model of this base.'
        if tokenizer.eos_token_id not in untrained:
            remedy = (
                'Use --sft_type full, the chat model of this base, or a --template_type whose replies end with '
                f'{tokenizer.eos_token!r}, e.g. default.'
            )
        logger.warning(
            f'--template_type: replies end with {names}. The base model never learnt these tokens, and LoRA does not '
            f'train their rows in the output head. So the trained model may not end its answers. {remedy}'
        )


def untrained_ids(head: Any, tokenizer: Any, ids: Iterable[int]) -> list[int]:
    """Return those of `ids` that the base model never learnt. `head` is the output head, with one row for each token.

    An id is returned if its row looks like the rows of unused tokens, such as <unused1>. The result has the order of
    `ids`.

    Returns an empty list if the rows cannot be compared. This is so if the head is sharded or quantised, if there are
    fewer than 4 unused tokens, or if the rows of unused tokens look like the rows of words.
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
        return weight.detach()[torch.tensor(tokens, device=weight.device)].cpu().double()

    end_rows = rows(checked)
    unused_rows = rows(unused)
    word_rows = rows(words)
    zero_norm = _ZERO * float(word_rows.norm(dim=1).median())
    if float(unused_rows.norm(dim=1).median()) <= zero_norm:
        return [token for token, row in zip(checked, end_rows, strict=True) if float(row.norm()) <= zero_norm]

    def cosines_to_unused_rows(found: Any) -> Any:
        return torch.nn.functional.normalize(found, dim=1) @ torch.nn.functional.normalize(unused_rows, dim=1).T

    among_unused = cosines_to_unused_rows(unused_rows)
    is_pair = ~torch.eye(len(unused_rows), dtype=torch.bool)
    of_unused = float(among_unused[is_pair].median())
    of_words = float(cosines_to_unused_rows(word_rows).median())
    if of_unused - of_words < _MIN_SEPARATION:
        return []
    bound = of_words + _NEAR * (of_unused - of_words)
    of_ends = cosines_to_unused_rows(end_rows).median(dim=1).values
    return [token for token, found in zip(checked, of_ends, strict=True) if found >= bound]


def _sample(tokens: list[int]) -> list[int]:
    """Return evenly spaced tokens: from _SAMPLE to 2 * _SAMPLE of them, or all tokens if there are fewer."""
    return tokens[:: max(1, len(tokens) // _SAMPLE)]

"""Keeps the result of a row independent of the other rows in its batch.

This is needed because some rotary embeddings choose their frequencies by the longest row of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def _parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the rope_parameters of a config. If each type of layer has separate parameters, yield one dict per type."""
    found = config.get_text_config().to_dict().get('rope_parameters') or {}
    nested = [value for value in found.values() if isinstance(value, dict) and 'rope_type' in value]
    yield from nested or [found]


def depends_on_batch_from(config: Any) -> int | None:
    """Return the largest row length that does not change the rotary frequencies, or None if no length changes them.

    If a batch has a longer row, all rows of the batch get the frequencies of the longest row.
    """
    trained_length = getattr(config.get_text_config(), 'max_position_embeddings', None)
    limits = []
    for rope in _parameters(config):
        kind = str(rope.get('rope_type', ''))
        if 'dynamic' in kind:
            limits.append(trained_length)
        elif kind == 'longrope':
            limits.append(rope.get('original_max_position_embeddings') or trained_length)
    return min((limit for limit in limits if limit is not None), default=None)


def forget_longer_batches(model: Any) -> None:
    """Make the next forward pass choose its rotary frequencies by its own length, not by the length of earlier batches.

    A dynamic embedding keeps the frequencies of the longest batch so far, until a short batch comes. A resumed run has
    not seen the longest batch, so it would continue with different frequencies.
    """
    for module in model.modules():
        kinds = getattr(module, 'rope_type', None)
        if kinds is None or not hasattr(module, 'max_seq_len_cached'):
            continue
        by_layer = kinds.items() if isinstance(kinds, dict) else [('', kinds)]
        for layer, kind in by_layer:
            if 'dynamic' in str(kind):
                setattr(module, f'{layer}_max_seq_len_cached' if layer else 'max_seq_len_cached', 0)


def groups_of_rows(lengths: list[int], limit: int) -> list[list[int]]:
    """Return groups of row indices, one group for each forward pass.

    All rows of at most `limit` tokens form one group, and each longer row forms a group alone.
    """
    short = [index for index, length in enumerate(lengths) if length <= limit]
    long = [[index] for index, length in enumerate(lengths) if length > limit]
    return [short, *long] if short else long

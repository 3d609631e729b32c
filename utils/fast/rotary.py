"""Keeps the result of a row independent of the other rows in its batch, for models with certain rotary embeddings.

Dynamic and longrope embeddings choose their frequencies by the longest row of a batch.
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
    """Return the row length up to which the rotary frequencies do not depend on the batch.

    If a batch has a row above this length, all rows of the batch get the frequencies for the longest row. Returns None
    if the frequencies never depend on the batch.
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
    """Make the next forward pass of a model choose its rotary frequencies without regard to earlier batches.

    After a long batch, dynamic embeddings use the frequencies of this batch for shorter batches too. A resumed run has
    not computed the long batch. So without this function, its results would differ from those of an uninterrupted run.
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

    Each row longer than `limit` is a group of its own. All other rows are one group. For example, the lengths [3, 9, 2]
    and the limit 4 give [[0, 2], [1]].
    """
    short = [index for index, length in enumerate(lengths) if length <= limit]
    long = [[index] for index, length in enumerate(lengths) if length > limit]
    return [short, *long] if short else long

"""Rotary embeddings whose frequencies depend on the longest row of a batch, and how each row keeps its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def _parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the rope_parameters of a model, or those of each kind of layer."""
    found = config.get_text_config().to_dict().get('rope_parameters') or {}
    nested = [value for value in found.values() if isinstance(value, dict) and 'rope_type' in value]
    yield from nested or [found]


def depends_on_batch_from(config: Any) -> int | None:
    """Return the length up to which a row is the same in every batch, None if there is no such limit.

    In a batch with a longer row, all rows get the frequencies of the longest row.
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
    """Let the next forward pass use the frequencies of its own length, whatever came before.

    A dynamic embedding keeps the frequencies of the longest batch so far until a short one comes. A resumed run has
    not computed that batch and would continue with other frequencies.
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
    """Return the indices of rows that may share a forward pass: all up to `limit` tokens; each longer row alone."""
    short = [index for index, length in enumerate(lengths) if length <= limit]
    long = [[index] for index, length in enumerate(lengths) if length > limit]
    return [short, *long] if short else long

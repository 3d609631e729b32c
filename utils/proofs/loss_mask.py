"""What carries loss: rows that would teach nothing are kept out, the labels of real batches are checked, rows shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.encode.encoded import IGNORE_INDEX, NOTHING_TRAINED, spans_of
from utils.encode.encoder import Encoder
from utils.run.record import record_proof

# How many rows are collated and compared.
MASK_ROWS = 64
# Rows of one batch: a fault that mixes rows up does not show in a batch of one.
_BATCH_ROWS = 4


def prove_mask(
    rows: Iterable[dict[str, Any]],
    summary: dict[str, Any],
    collate: Callable[..., dict[str, Any]],
    encoder: Encoder,
    run_dir: Path,
) -> None:
    """Make batches of several rows as training does, and compare their labels with what the rows say is trained.

    Records the outcome; raises ConfigError where a label is missing, added, another token or in another place.
    """
    started = time.perf_counter()
    rows = list(rows)
    batches = [rows[start : start + _BATCH_ROWS] for start in range(0, len(rows), _BATCH_ROWS)]
    fault = next((f for batch in batches if (f := _fault(batch, collate, encoder))), None)
    empty = summary.get('left_out', {}).get(NOTHING_TRAINED, 0)
    share = 'of a stream the rows to come train what theirs say'
    if train := summary.get('train'):
        share = f'{train["rows"]} rows train {100 * train["trained_share"]:.4g} % of {train["tokens"]} tokens'
    says = fault or (
        f'{share}; in batches of {len(rows)} of them exactly these carry loss, each end of turn among them; '
        f'{empty or "no"} rows were left out because none of their tokens does'
    )
    seconds = round(time.perf_counter() - started, 2)
    record_proof(
        run_dir, 'loss', {'passed': fault is None, 'says': says, 'rows_checked': len(rows), 'seconds': seconds}
    )
    if fault:
        raise ConfigError(fault)
    logger.info(f'loss: {says}')


def _fault(rows: Sequence[dict[str, Any]], collate: Callable[..., dict[str, Any]], encoder: Encoder) -> str | None:
    """Return what a batch of these rows gets wrong, token by token in its place, or None."""
    batch = collate(rows)
    ids, labels = (batch[name].tolist() for name in ('input_ids', 'labels'))
    lengths = [len(row['input_ids']) for row in rows]
    if len(ids) == 1:  # one row, or rows laid end to end: each follows the one before
        ends = list(accumulate(lengths))
        parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        ids, labels, behind = (
            [ids[0][part] for part in parts],
            [labels[0][part] for part in parts],
            labels[0][ends[-1] :],
        )
    else:
        behind = [label for row, length in zip(labels, lengths, strict=True) for label in row[length:]]
        ids, labels = ([row[:length] for row, length in zip(x, lengths, strict=True)] for x in (ids, labels))
    for row, row_ids, row_labels in zip(rows, ids, labels, strict=True):
        if row_ids != row['input_ids']:
            return 'a batch holds other ids than its row says.'
        if fault := _label_fault(row, row_labels, encoder.tokenizer.decode):
            return fault
    if any(label != IGNORE_INDEX for label in behind):
        return 'a batch trains other tokens than its row says: some of the padding.'
    return None


def _label_fault(row: dict[str, Any], labels: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str | None:
    ids = row['input_ids']
    places = [place for start, end in spans_of(row) for place in range(max(start, 1), end)]
    found_places = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    wanted, found = [ids[place] for place in places], [labels[place] for place in found_places]
    if (found_places, found) == (places, wanted):
        return None
    if (found_places, found) == (places[:-1], wanted[:-1]):
        return (
            f'the end of turn {decode(wanted[-1:])!r} carries no loss in a batch: the model would never learn to stop.'
        )
    if found == wanted:
        return f'a batch trains the tokens of its row at other places: {found_places[:8]}, wanted {places[:8]}.'
    return (
        f'a batch trains other tokens than its row says: {len(found)} beginning {decode(found[:8])!r}, wanted '
        f'{len(wanted)} beginning {decode(wanted[:8])!r}.'
    )

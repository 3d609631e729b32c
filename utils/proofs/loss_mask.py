"""Check the labels in real batches: exactly the tokens that a row marks as trained must have a label."""

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

# The number of rows that are checked.
MASK_ROWS = 64
# The number of rows in one batch. It must be more than one, because a mistake may be that rows of a batch are mixed up.
_BATCH_ROWS = 4


def prove_mask(
    rows: Iterable[dict[str, Any]],
    summary: dict[str, Any],
    collate: Callable[..., dict[str, Any]],
    encoder: Encoder,
    run_dir: Path,
) -> None:
    """Make batches of the rows as in training, and compare the labels with the trained spans of the rows.

    The outcome is written to proofs.json, with the numbers of rows and tokens in `summary`. Raises ConfigError if a
    label is missing, added, wrong or at a wrong position, or if a batch has other ids than its rows.
    """
    started = time.perf_counter()
    rows = list(rows)
    fault = None
    for start in range(0, len(rows), _BATCH_ROWS):
        fault = _fault(rows[start : start + _BATCH_ROWS], collate, encoder)
        if fault:
            break

    says = fault or _sentence(len(rows), summary)
    seconds = round(time.perf_counter() - started, 2)
    outcome = {'passed': fault is None, 'says': says, 'rows_checked': len(rows), 'seconds': seconds}
    record_proof(run_dir, 'loss', outcome)
    if fault:
        raise ConfigError(fault)
    logger.info(f'loss: {says}')


def _sentence(checked: int, summary: dict[str, Any]) -> str:
    """Return a sentence with the results of a passed check, for proofs.json and the log."""
    found = (
        f'in {checked} rows, in batches of {_BATCH_ROWS}, exactly the marked tokens carry loss, each end of turn among '
        'them'
    )
    train = summary.get('train')
    if train is None:
        return f'the rows of a stream are not counted before training; {found}'
    share = f'{train["rows"]} rows train {100 * train["trained_share"]:.4g} % of {train["tokens"]} tokens'
    skipped = summary.get('left_out', {}).get(NOTHING_TRAINED, 0)
    return f'{share}; {found}; {skipped or "no"} rows were skipped because none of their tokens carries loss'


def _fault(rows: Sequence[dict[str, Any]], collate: Callable[..., dict[str, Any]], encoder: Encoder) -> str | None:
    """Make one batch of these rows, and return a description of the first fault, or None if there is no fault."""
    batch = collate(rows)
    ids, labels, padding_labels = _split(batch, [len(row['input_ids']) for row in rows])
    for row, row_ids, row_labels in zip(rows, ids, labels, strict=True):
        if row_ids != row['input_ids']:
            return 'a batch has other ids than its row. Please report this model.'
        if fault := _label_fault(row, row_labels, encoder.tokenizer.decode):
            return fault
    if any(label != IGNORE_INDEX for label in padding_labels):
        return 'a batch trains other tokens than its row marks: some of the padding. Please report this model.'
    return None


def _split(batch: dict[str, Any], lengths: Sequence[int]) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Split a batch into the ids of each row, the labels of each row, and the labels of the padding.

    `lengths` are the numbers of tokens of the rows.
    """
    ids = batch['input_ids'].tolist()
    labels = batch['labels'].tolist()
    if len(ids) > 1:
        row_ids = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        row_labels = [row[:length] for row, length in zip(labels, lengths, strict=True)]
        padding_labels = [label for row, length in zip(labels, lengths, strict=True) for label in row[length:]]
        return row_ids, row_labels, padding_labels

    # Here the batch has only one row, or its rows are concatenated.
    ends = list(accumulate(lengths))
    parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return [ids[0][part] for part in parts], [labels[0][part] for part in parts], labels[0][ends[-1] :]


def _label_fault(row: dict[str, Any], labels: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str | None:
    """Return a description of the fault in the labels of a row, or None if they are correct."""
    ids = row['input_ids']
    # The first token of a row has no token before it that could predict it.
    wanted_positions = [position for start, end in spans_of(row) for position in range(max(start, 1), end)]
    found_positions = [position for position, label in enumerate(labels) if label != IGNORE_INDEX]
    wanted = [ids[position] for position in wanted_positions]
    found = [labels[position] for position in found_positions]

    if (found_positions, found) == (wanted_positions, wanted):
        return None
    if (found_positions, found) == (wanted_positions[:-1], wanted[:-1]):
        return (
            f'the end of turn {decode(wanted[-1:])!r} carries no loss in a batch: the model would never learn to stop. '
            'Please report this model.'
        )
    if found == wanted:
        return (
            f'a batch trains the tokens of its row at other positions: {found_positions[:8]}, and the row marks '
            f'{wanted_positions[:8]}. Please report this model.'
        )
    return (
        f'a batch trains other tokens than its row marks: {len(found)} that start with {decode(found[:8])!r}, and the '
        f'row marks {len(wanted)} that start with {decode(wanted[:8])!r}. Please report this model.'
    )

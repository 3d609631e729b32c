"""What carries loss: rows that would teach nothing are kept out, the labels of real batches are checked, rows shown."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils import dist
from utils.encoder import Encoder
from utils.errors import ConfigError
from utils.logger import logger
from utils.preprocess import IGNORE_INDEX
from utils.proofs import record_proof

NOTHING_TRAINED = 'no token of it carries loss, so nothing would be learnt from it'
# How many rows are collated and compared.
MASK_ROWS = 64
# Black on green, and back: what is trained, in a terminal.
_COLOURS = ('\x1b[30;42m', '\x1b[0m')
MARKS = ('⟦', '⟧')

Spans = Sequence[tuple[int, int]]


def spans_of(row: dict[str, Any]) -> Spans:
    """Return the half-open spans of a row that carry loss, in their order."""
    return [*row.get('earlier', ()), row['trained']]


def trains_nothing(spans: Spans) -> bool:
    """Return whether no position is predicted: none is before the first one."""
    return not any(end > max(start, 1) for start, end in spans)


def show_row(tokenizer: Any, row: dict[str, Any], marks: tuple[str, str] = MARKS) -> str:
    """Return the row decoded, each trained span between the marks."""
    ids, text, position = row['input_ids'], '', 0
    for start, end in spans_of(row):
        before, trained = (tokenizer.decode(part) if part else '' for part in (ids[position:start], ids[start:end]))
        text += f'{before}{marks[0]}{trained}{marks[1]}'
        position = end
    return text + (tokenizer.decode(ids[position:]) if ids[position:] else '')


def show_samples(tokenizer: Any, rows: Sequence[dict[str, Any]], run_dir: Path) -> None:
    """Log rows with their trained parts in colour, or marked where there is no terminal; write them to sample.txt."""
    coloured = sys.stderr.isatty() and 'NO_COLOR' not in os.environ
    for row in rows:
        how = 'the trained part in colour' if coloured else 'the trained part between ⟦ and ⟧'
        logger.info(f'one row, {how}:\n{show_row(tokenizer, row, _COLOURS if coloured else MARKS)}')
    if dist.is_main():
        text = ''.join(show_row(tokenizer, row) + '\n' for row in rows)
        (run_dir / 'sample.txt').write_text(text, encoding='utf-8')


def prove_mask(
    rows: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    collate: Callable[..., dict[str, Any]],
    encoder: Encoder,
    run_dir: Path,
) -> None:
    """Make batches of single rows as training does, and compare their labels with what the rows say is trained.

    Records the outcome; raises ConfigError where a label is missing, added or another token.
    """
    started = time.perf_counter()
    fault = next((f for row in rows if (f := _fault(row, collate, encoder))), None)
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


def _fault(row: dict[str, Any], collate: Callable[..., dict[str, Any]], encoder: Encoder) -> str | None:
    ids, decode = row['input_ids'], encoder.tokenizer.decode
    wanted = [token for start, end in spans_of(row) for token in ids[max(start, 1) : end]]
    labels = collate([row])['labels'].flatten()
    found = labels[labels != IGNORE_INDEX].tolist()
    if found == wanted:
        return None
    if found == wanted[:-1]:
        return (
            f'the end of turn {decode(wanted[-1:])!r} carries no loss in a batch: the model would never learn to stop.'
        )
    return (
        f'a batch trains other tokens than its row says: {len(found)} beginning {decode(found[:8])!r}, wanted '
        f'{len(wanted)} beginning {decode(wanted[:8])!r}.'
    )

"""Shows encoded rows as text, with the spans that carry loss marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.logger import logger
from utils.encode.encoded import spans_of

# Written before and after a trained span in a terminal: black on green, and reset.
_COLOURS = ('\x1b[30;42m', '\x1b[0m')
MARKS = ('⟦', '⟧')


def show_row(tokenizer: Any, row: dict[str, Any], marks: tuple[str, str] = MARKS) -> str:
    """Return the text of the row, with the two texts of `marks` before and after each span that carries loss."""
    ids = row['input_ids']
    text = ''
    position = 0
    for start, end in spans_of(row):
        before = tokenizer.decode(ids[position:start]) if start > position else ''
        trained = tokenizer.decode(ids[start:end]) if end > start else ''
        text += f'{before}{marks[0]}{trained}{marks[1]}'
        position = end
    return text + (tokenizer.decode(ids[position:]) if ids[position:] else '')


def show_samples(tokenizer: Any, rows: Sequence[dict[str, Any]], run_dir: Path) -> None:
    """Log rows as text, and write them to sample.txt in the run folder. The spans that carry loss are marked.

    If standard error is a terminal and the variable NO_COLOR is not set, these spans are coloured in the log.
    Otherwise, and always in sample.txt, they are between ⟦ and ⟧. Only the main process writes sample.txt.
    """
    coloured = sys.stderr.isatty() and 'NO_COLOR' not in os.environ
    for row in rows:
        how = 'the trained part in colour' if coloured else 'the trained part between ⟦ and ⟧'
        logger.info(f'one row, {how}:\n{show_row(tokenizer, row, _COLOURS if coloured else MARKS)}')
    if dist.is_main():
        text = ''.join(show_row(tokenizer, row) + '\n' for row in rows)
        (run_dir / 'sample.txt').write_text(text, encoding='utf-8')

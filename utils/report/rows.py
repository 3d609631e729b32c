"""Compares the held-out rows: their losses before and after training, and their scores in two sets of answers.

report.html shows the losses. `python -m utils.report BEFORE.jsonl AFTER.jsonl` compares the scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import Keys, check_keys
from utils.report.page import Markup, page, section, table
from utils.run.outcome import mean_losses

# A row is known if its loss per token is below this number of nats.
KNOWN = 0.1
# A row is learnt if training took away more than this share of its loss. It is worse if training added more than this
# share, and the row is not known afterwards.
CHANGED = 0.1
# The number of rows of a kind that are named.
_NAMED = 5
_ANSWER_KEYS: Keys = {'origin': str, 'answer': str, 'scores': {'*': float}}

Row = dict[str, Any]


def kinds(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by the effect of training: {'got worse': [...], 'the base knew': [...], 'learnt': [...], ...}.

    The last key is 'not learnt'. All four keys exist, and the rows in a list keep their order. `rows` is the content of
    rows.jsonl. A row is left out if its loss before or after training is missing.
    """
    found: dict[str, list[Row]] = {'got worse': [], 'the base knew': [], 'learnt': [], 'not learnt': []}
    for row in rows:
        before = row['loss_before']
        after = row['loss_after']
        if before is None or after is None:
            continue
        if after > before * (1 + CHANGED) and after > KNOWN:
            found['got worse'].append(row)
        elif before < KNOWN:
            found['the base knew'].append(row)
        elif after < before * (1 - CHANGED):
            found['learnt'].append(row)
        else:
            found['not learnt'].append(row)
    return found


def losses_section(rows: Sequence[Row]) -> list[Markup]:
    """Return the tables of the losses per row, for report.html.

    Returns [] if no row has both a loss before training and a loss after it.
    """
    by_kind = kinds(rows)
    count = sum(map(len, by_kind.values()))
    if not count:
        return []

    lines = [
        [kind, len(of_kind), ', '.join(_loss(row) for row in _most_changed(of_kind))]
        for kind, of_kind in by_kind.items()
    ]
    losses = mean_losses(rows)
    mean = '' if losses is None else f': {losses.before:.4g} and {losses.after:.4g} over all their tokens'
    says = (
        f'Loss per token of {count} of {len(rows)} validation rows, before and after training{mean}. Known: below '
        f'{KNOWN} nats. Learnt: more than {CHANGED:.0%} less. Worse: more than {CHANGED:.0%} more, and not known '
        'afterwards. rows.jsonl has every row.'
    )
    return [Markup(f'<p class="faint">{says}</p>'), table(['rows that', 'count', 'first rows: before → after'], lines)]


def _most_changed(rows: Sequence[Row]) -> list[Row]:
    """Return the few rows whose loss increased most, sorted by the increase. A decrease is a negative increase."""
    return sorted(rows, key=lambda row: row['loss_before'] - row['loss_after'])[:_NAMED]


def _loss(row: Row) -> str:
    return f'{row["origin"]}: {row["loss_before"]:.3g} → {row["loss_after"]:.3g}'


def read_answers(file: Path) -> dict[str, Row]:
    """Return a dict from the origin of each row to its answer and scores. `file` is a file that llm_infer.py wrote.

    Raises ConfigError for any other file.
    """
    remedy = 'Give a file that llm_infer.py wrote to --result_path, or run llm_infer.py again to write a new file.'
    try:
        rows = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'{file}: the answers in this file cannot be read ({type(error).__name__}). {remedy}'
        ) from error
    for number, row in enumerate(rows, 1):
        check_keys(row, _ANSWER_KEYS, f'{file}:{number}', remedy=remedy)
    return {row['origin']: {'answer': row['answer'], 'scores': row['scores']} for row in rows}


def compare_answers(before: Path, after: Path, target: Path) -> None:
    """Print which rows have higher or lower scores in `after` than in `before`, and write these rows to a page.

    A few of these rows are printed, and the page has all of them. `before` and `after` are files of llm_infer.py, and
    `target` is the page. Rows are compared by the first score that both files have. Raises ConfigError if the files
    have no row or no score in common, or if `target` cannot be written.
    """
    left = read_answers(before)
    right = read_answers(after)
    common = [origin for origin in left if origin in right]
    score = next((name for o in common for name in left[o]['scores'] if name in right[o]['scores']), None)
    if score is None:
        raise ConfigError(
            f'{before} and {after}: no row has the same kind of score in both. Answer the same rows with the same '
            '--score.'
        )

    changed = {origin: right[origin]['scores'][score] - left[origin]['scores'][score] for origin in common}
    by_kind = {
        'won': [origin for origin in common if changed[origin] > 0],
        'lost': [origin for origin in common if changed[origin] < 0],
        'same': [origin for origin in common if changed[origin] == 0],
    }
    alone = len(left) + len(right) - 2 * len(common)
    left_out = f', {alone} rows are only in one of the files' if alone else ''
    print(f'{score} of {len(common)} rows{left_out}: ' + ', '.join(f'{len(v)} {name}' for name, v in by_kind.items()))
    for name in ('won', 'lost'):
        for origin in by_kind[name][:_NAMED]:
            print(f'  {name}: {origin}: {left[origin]["scores"][score]:g} -> {right[origin]["scores"][score]:g}')

    sections = [
        section(
            f'{len(by_kind[name])} rows {name}',
            table(
                ['row', 'before', 'after'],
                [[origin, left[origin]['answer'], right[origin]['answer']] for origin in by_kind[name]],
            )
            if by_kind[name]
            else '',
        )
        for name in ('won', 'lost')
    ]
    try:
        target.write_text(page('Answers compared', Markup('<h1>Answers compared</h1>'), *sections), encoding='utf-8')
    except OSError as error:
        raise ConfigError(
            f'--html: {target} cannot be written: {error.strerror}. Name another file with --html.'
        ) from error
    print(f'answers: {target}')

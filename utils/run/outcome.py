"""What a run tells at its end: whether training helped on the validation rows, and the commands to run next."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.files import read_json
from utils.run.lock import flag_words
from utils.run.record import RUN_JSON

# A run without validation rows has a warning if its last training loss is more than this factor above its first one.
# The loss of a step varies with its rows, so a small increase says nothing.
_ROSE = 1.5


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss per trained token before and after training, over the `rows` rows that have both."""

    rows: int
    before: float
    after: float


def mean_losses(rows: Sequence[Mapping[str, Any]]) -> Losses | None:
    """Return the losses before and after training, as means over all trained tokens of these rows.

    `rows` is the content of rows.jsonl. Rows without both losses are left out. Returns None if no row has both.
    """
    both = [row for row in rows if row['loss_before'] is not None and row['loss_after'] is not None]
    tokens = sum(row['trained_tokens'] for row in both)
    if not tokens:
        return None
    before, after = (
        sum(row[name] * row['trained_tokens'] for row in both) / tokens for name in ('loss_before', 'loss_after')
    )
    return Losses(rows=len(both), before=before, after=after)


def says_whether_it_helped(
    rows: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    *,
    holds_out: bool,
    flags: Mapping[str, Any],
) -> tuple[str, str | None]:
    """Return (a line for the log, a warning or None).

    The line has the loss of validation rows before and after training. If there are no validation rows (`holds_out` is
    False), it has the training loss instead, and the flag that holds out rows. The warning says that the loss rose.

    `rows` is the content of rows.jsonl, `history` that of history.json, and `flags` are the flags of the run.
    """
    if not holds_out:
        return _of_training(history, flags)

    losses = mean_losses(rows)
    if losses is None:
        evaluations = [entry for entry in history if 'eval_runtime' in entry]
        last = evaluations[-1] if evaluations else {}
        numbers = [
            f'{name.removeprefix("eval_")} {value:.4g}'
            for name, value in last.items()
            if name.startswith('eval_') and not re.search('runtime|per_second', name)
        ]
        return f'validation after training: {", ".join(numbers)}; before training, it was not measured', None

    line = (
        f'loss of {losses.rows} of {len(rows)} validation rows: {losses.before:.4g} before training, '
        f'{losses.after:.4g} after'
    )
    warning = None
    if not losses.after <= losses.before:
        warning = (
            f'training made the model worse on the validation rows: their loss was {losses.before:.4g} before training '
            f'and is {losses.after:.4g} now. Lower --learning_rate (it was {flags["learning_rate"]:g}), or train fewer '
            'steps.'
        )
    return line, warning


def _of_training(history: Sequence[Mapping[str, Any]], flags: Mapping[str, Any]) -> tuple[str, str | None]:
    remedy = '--stream_val_rows 100' if flags.get('streaming') else '--dataset_test_ratio 0.01'
    line = f'no rows were held out: nothing tells whether training helped. {remedy} holds out rows'
    steps = [(entry['step'], entry['loss']) for entry in history if 'loss' in entry]
    if not steps or not all(math.isfinite(loss) for _, loss in steps):
        return line, None

    (first, before), (last, after) = steps[0], steps[-1]
    if first != last:
        line += f'. Training loss: {before:.4g} at step {first}, {after:.4g} at step {last}'
    warning = None
    if after > before * _ROSE:
        warning = (
            f'the training loss rose from {before:.4g} at step {first} to {after:.4g} at step {last}. Lower '
            f'--learning_rate (it was {flags["learning_rate"]:g}).'
        )
    return line, warning


def tell_checkpoint(checkpoint: str, history: Sequence[Mapping[str, Any]], *, metric: str | None) -> str:
    """Return the line that names the checkpoint to use.

    `metric` is the name of the metric that chose it, for example 'loss'. It is None if there were no evaluations, and
    `checkpoint` is the last one.
    """
    if metric is None:
        return f'last checkpoint: {checkpoint}'
    step = int(Path(checkpoint).name.rpartition('-')[2])
    key = f'eval_{metric}'
    value = next((entry[key] for entry in reversed(history) if entry['step'] == step and key in entry), None)
    return f'best checkpoint: {checkpoint}' + ('' if value is None else f' (validation {metric} {value:.4g})')


def use_commands(checkpoint: Path | str, outcome: Mapping[str, Any]) -> dict[str, str]:
    """Return commands that use a checkpoint: 'next' answers the validation rows of the run, and 'chat' chats.

    'next' is left out if the run held out no rows. `outcome` is the content of run.json.
    """
    use = shlex.join(['python', 'llm_infer.py', *flag_words('ckpt_dir', checkpoint)])
    chat = {'chat': f'{use} --eval_human true'}
    held_out = outcome.get('data', {}).get('validation', {}).get('rows')
    return chat if held_out == 0 else {'next': use, **chat}


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json in a run folder, or {} if the file is missing."""
    file = run_dir / RUN_JSON
    found: dict[str, Any] = {}
    if file.is_file():
        keys = {'best_checkpoint': str}
        found = read_json(file, keys=keys, remedy='Move or delete the file. The commands are then shown without it.')
    return found

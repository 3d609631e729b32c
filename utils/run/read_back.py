"""Reads a run from its folder, for the report and for the comparison of two runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import Keys, check_keys, read_json
from utils.run.record import ANSWERS_JSON, PROOFS_JSON, RUN_JSON, RunRecord, read_run_record

HISTORY_JSON = 'history.json'
ROWS_JSONL = 'rows.jsonl'

_WITHOUT = 'Move or delete the file. The run is then shown without it.'
_PART = (None, dict)
# The types of what a report reads from the files of a run.
_OUTCOME_KEYS: Keys = {
    'last_evaluation': dict | None,
    'best_checkpoint': str | None,
    'data': (
        None,
        {
            'train': _PART,
            'validation': _PART,
            'left_out': _PART,
            'noted': _PART,
            'mixture': _PART,
            'validation_sets': (None, {'*': int}),
            'account': (None, {'fields': (None, {'*': dict}), 'unused': _PART}),
        },
    ),
    'decisions': list | None,
    'warnings': list | None,
    'versions': dict | None,
    'toolkit': (None, {'version': str, 'commit': str | None}),
}
_STEP_KEYS: Keys = {'step': float}
_PROOFS_KEYS: Keys = {'*': {'passed': bool | None, 'says': str | None, 'seconds': float | None}}
_ANSWER_KEYS: Keys = {
    'split': str,
    'messages': [{'role': str}],
    'tools': list | None,
    'wanted': str,
    'before': str,
    'after': str,
}
_ROW_KEYS: Keys = {'origin': str, 'loss_before': float | None, 'loss_after': float | None}


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The content of a run folder. A field is empty if its file is missing, for example because the run was stopped."""

    folder: Path
    record: RunRecord
    outcome: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    proofs: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    # The loss of each validation row before and after training.
    rows: list[dict[str, Any]] = field(default_factory=list)
    sample: str = ''

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Return the values logged under `key`, as a list of (step, value)."""
        return [(entry['step'], entry[key]) for entry in self.history if key in entry]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the content of rows.jsonl in a run folder. The list is empty if there is no such file.

    Raises ConfigError if the file is damaged.
    """
    file = folder / ROWS_JSONL
    if not file.is_file():
        return []
    remedy = 'Move or delete it to go on without the losses in it.'
    try:
        rows = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f'{file}: the file is not JSON lines ({error}). {remedy}') from error
    for number, row in enumerate(rows, 1):
        check_keys(row, _ROW_KEYS, f'{file}:{number}', remedy=remedy)
    return rows


def read_run_answers(folder: Path) -> list[dict[str, Any]]:
    """Return the content of answers.json in a run folder. The list is empty if there is no such file.

    Raises ConfigError if the file is damaged.
    """
    file = folder / ANSWERS_JSON
    return read_json(file, list, keys=_ANSWER_KEYS, remedy=_WITHOUT) if file.is_file() else []


def _without_null(content: dict[str, Any]) -> dict[str, Any]:
    found = {key: _without_null(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in found.items() if value is not None}


def read_run(folder: Path) -> RunFiles:
    """Return the content of a run folder. Raises ConfigError if it is no run folder, or if a JSON file is damaged."""

    def read(name: str, kind: type, keys: Keys) -> Any:
        file = folder / name
        return read_json(file, kind, keys=keys, remedy=_WITHOUT) if file.is_file() else kind()

    record = read_run_record(folder)
    sample = folder / 'sample.txt'
    return RunFiles(
        folder=folder,
        record=record,
        outcome=_without_null(read(RUN_JSON, dict, _OUTCOME_KEYS)),
        history=read(HISTORY_JSON, list, _STEP_KEYS),
        proofs=read(PROOFS_JSON, dict, _PROOFS_KEYS),
        answers=read_run_answers(folder),
        rows=read_rows(folder),
        sample=sample.read_text(encoding='utf-8', errors='replace') if sample.is_file() else '',
    )

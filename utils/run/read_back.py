"""Reads a run from its folder, for the report and for the comparison of two runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.run.record import ANSWERS_JSON, PROOFS_JSON, RUN_JSON, RunRecord, read_run_record

HISTORY_JSON = 'history.json'
ROWS_JSONL = 'rows.jsonl'


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
    try:
        return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
    except ValueError as error:
        raise ConfigError(
            f'{file}: the file is not JSON lines ({error}). Move or delete it to go on without the losses in it.'
        ) from error


def read_run(folder: Path) -> RunFiles:
    """Return the content of a run folder. Raises ConfigError if it is no run folder, or if a JSON file is damaged."""

    def read(name: str, kind: type) -> Any:
        file = folder / name
        remedy = 'Move or delete the file. The run is then shown without it.'
        return read_json(file, kind, remedy=remedy) if file.is_file() else kind()

    record = read_run_record(folder)
    sample = folder / 'sample.txt'
    return RunFiles(
        folder=folder,
        record=record,
        outcome=read(RUN_JSON, dict),
        history=read(HISTORY_JSON, list),
        proofs=read(PROOFS_JSON, dict),
        answers=read(ANSWERS_JSON, list),
        rows=read_rows(folder),
        sample=sample.read_text(encoding='utf-8') if sample.is_file() else '',
    )

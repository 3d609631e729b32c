"""A finished run read back from its folder: what the report shows and what two runs are compared by."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.before_after import ANSWERS_JSON
from utils.errors import ConfigError
from utils.proofs import PROOFS_JSON
from utils.resolve import SFT_ARGS
from utils.run_dir import RUN_JSON

HISTORY_JSON = 'history.json'


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run folder holds; parts that an older or stopped run lacks are empty."""

    folder: Path
    arguments: dict[str, Any]
    outcome: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    proofs: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    sample: str = ''

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) for every entry of the history that has the key."""
        return [(entry['step'], entry[key]) for entry in self.history if key in entry]


def read_run(folder: Path) -> RunFiles:
    """Return the run of a folder; raises ConfigError where it is none."""
    if not (folder / SFT_ARGS).is_file():
        raise ConfigError(f'{folder} is no run folder: it has no {SFT_ARGS}.')

    def read(name: str, empty: Any) -> Any:
        file = folder / name
        try:
            return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else empty
        except json.JSONDecodeError as error:
            raise ConfigError(f'{file} is not JSON: {error}.') from None

    sample = folder / 'sample.txt'
    return RunFiles(
        folder=folder,
        arguments=read(SFT_ARGS, {}),
        outcome=read(RUN_JSON, {}),
        history=read(HISTORY_JSON, []),
        proofs=read(PROOFS_JSON, {}),
        answers=read(ANSWERS_JSON, []),
        sample=sample.read_text(encoding='utf-8') if sample.is_file() else '',
    )

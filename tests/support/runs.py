"""Rows, flags and programs of small runs, and readers of their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from utils.base.checkpoint import MANIFEST
from utils.data.parts import TRAIN, VAL
from utils.data.plan import plan_rows, served_by
from utils.data.tally import Tally
from utils.formats.conversation import Row

ROOT = Path(__file__).resolve().parents[2]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines. Returns the path."""
    path.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')
    return path


@dataclass(kw_only=True)
class Rows:
    """The rows that a plan chooses, the skipped ones by reason, and the id that served each data set of a hub."""

    train: list[Row]
    val: list[Row]
    left_out: Tally
    served: dict[str, str]


def get_dataset(words: list[str], **options: Any) -> Rows:
    """Return the rows that plan_rows chooses with these options, in memory."""
    plan = plan_rows(words, **options)
    chosen = {use: [row for _, row in plan.rows(use)] for use in (TRAIN, VAL)}
    return Rows(train=chosen[TRAIN], val=chosen[VAL], left_out=plan.left_out, served=served_by(plan.parts))


def small_flags(model_dir: Path, data_file: Path, output: Path) -> list[str]:
    """Return flags of a run that takes about a second; flags after them override them."""
    flags = {
        'model_id_or_path': model_dir, 'dataset': data_file, 'output_dir': output, 'dtype': 'fp32',
        'dataset_test_ratio': 0.1, 'batch_size': 2, 'gradient_accumulation_steps': 2, 'learning_rate': 0.01,
        'max_steps': 6, 'eval_steps': 3, 'logging_steps': 1, 'dataloader_num_workers': 0, 'report_samples': 0,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f'--{name}', str(value))]
    return [*words, '--']


def run_program(name: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one of the two programs as a user does. Returns its output and exit code."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        timeout=300,
        check=False,
    )


def history(run: Path, step: int) -> list[dict[str, Any]]:
    """Return the log lines stored in a checkpoint, without timings."""
    state = json.loads((run / f'checkpoint-{step}' / 'trainer_state.json').read_text())
    return [{k: v for k, v in e.items() if 'runtime' not in k and 'second' not in k} for e in state['log_history']]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f'checkpoint-{step}'
    file = folder / 'adapter_model.safetensors'
    return load_file(file if file.is_file() else folder / 'model.safetensors')


def log_lines(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the log lines stored in a checkpoint, without timings."""
    state = json.loads((checkpoint / 'trainer_state.json').read_text())
    return [{k: v for k, v in e.items() if 'runtime' not in k and 'second' not in k} for e in state['log_history']]


def hashes(checkpoint: Path) -> dict[str, str]:
    """Return the sha256 of weights, optimizer and process states."""
    files = json.loads((checkpoint / MANIFEST).read_text())['files']
    found = {name: entry['sha256'] for name, entry in files.items() if name.endswith('.safetensors')}
    assert {'optimizer.safetensors', 'process_states.safetensors'} < set(found)
    return found


def assert_equal(resumed: Path, whole: Path) -> None:
    assert log_lines(resumed) == log_lines(whole)
    assert hashes(resumed) == hashes(whole)

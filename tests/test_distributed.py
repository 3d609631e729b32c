"""Two gloo processes stand for two devices: same numbers as one process, each row once per epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, small_flags

pytestmark = pytest.mark.slow


def launch(processes: int, words: list[str]) -> None:
    command = [sys.executable]
    if processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    done = subprocess.run(
        [*command, 'llm_sft.py', *words],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def history(run: Path) -> list[dict[str, Any]]:
    state = json.loads((run / 'checkpoint-6' / 'trainer_state.json').read_text())
    return [{k: v for k, v in e.items() if 'runtime' not in k and 'second' not in k} for e in state['log_history']]


def test_two_processes_equal_one_with_twice_the_accumulation(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    runs = []
    for processes, accumulation in ((1, 2), (2, 1)):
        out = tmp_path / str(processes)
        words = small_flags(model_dir, data_file, out)
        launch(processes, [*words, '--gradient_accumulation_steps', str(accumulation)])
        made = list(out.glob('tiny-llama/*'))
        assert len(made) == 1, 'all processes write to one folder'
        runs.append(history(made[0]))
    assert len(runs[0]) == len(runs[1])
    for one, two in zip(*runs, strict=True):
        assert set(one) == set(two)
        for key, value in one.items():
            assert two[key] == pytest.approx(value, abs=1e-5), key

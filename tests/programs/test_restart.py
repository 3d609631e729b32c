"""One and the same command restarts a run that is killed again and again, and ends with the result of an untouched run.

One driver process forks all runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, assert_equal

DRIVER = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import llm_sft
import utils.report.finish
from benchmarks.kill_resume import base_flags, start, wait
from utils.proofs import first_step
from utils.train import prepare
from utils.train.checkpoints import Checkpoints
from utils.train.trainer import SftTrainer

folder, processes = Path(sys.argv[2]), int(sys.argv[3])
base = [*base_flags(folder), '--lora_dropout_p', '0.1', *sys.argv[4:]]
step, seal = SftTrainer.training_step, Checkpoints._write_optimizer
finish = utils.report.finish.finish_run
killed_at = None

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def in_step(self, *args, **kwargs):
    if not self.in_preflight and self.state.global_step == killed_at:
        kill()
    return step(self, *args, **kwargs)

def in_save(self, partial):
    seal(self, partial)
    if partial.name == f'.checkpoint-{killed_at}.partial':
        kill()

def before_report(*args, **kwargs):
    if killed_at == 'report':
        kill()
    return finish(*args, **kwargs)

SftTrainer.training_step, Checkpoints._write_optimizer = in_step, in_save
utils.report.finish.finish_run = before_report

wait(start(base, folder / 'whole', processes))
codes = []
# Step 1 is before the first checkpoint. At steps 4 and 8 the kill comes while the checkpoint is written.
for killed_at in (1, 4, 8, 9, 'report', None, None):
    codes.append(wait(start([*base, '--resume_from_checkpoint', 'last'], folder / 'restarted', processes)))
(folder / 'codes.json').write_text(json.dumps(codes))
"""

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def restarted(folder: Path, processes: int, *flags: str) -> list[list[int]]:
    """Run the driver, and return the exit codes of the restarted runs."""
    done = subprocess.run(
        [sys.executable, '-c', DRIVER, str(ROOT), str(folder), str(processes), *flags],
        # A process that is forked after torch started threads would wait for them forever.
        cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    codes: list[list[int]] = json.loads((folder / 'codes.json').read_text())
    return codes


def runs_of(folder: Path, name: str) -> list[Path]:
    """Return the run folders, the oldest first."""
    return sorted((folder / name).glob('*/v*'), key=lambda run: int(run.name.split('-')[0][1:]))


def resumed_from(run: Path) -> Any:
    path = json.loads((run / 'sft_args.json').read_text())['resume_from_checkpoint']
    return path and f'{Path(path).parent.name.split("-")[0]}/{Path(path).name}'


@pytest.mark.parametrize(
    ('processes', 'flags'),
    [
        (1, ('--dataloader_num_workers', '1', '--logging_steps', '3')),
        (1, ('--streaming', 'true', '--stream_val_rows', '8')),
        (2, ()),
    ],
    ids=['worker', 'streaming', '2 processes'],
)
def test_the_same_command_again_and_again_ends_as_an_untouched_run(
    processes: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    codes = restarted(tmp_path, processes, *flags)
    assert codes[-2:] == [[0] * processes] * 2, (tmp_path / 'restarted' / 'log-0.txt').read_text()[-3000:]
    assert all(-9 in each for each in codes[:-2])

    (whole,) = runs_of(tmp_path, 'whole')
    runs = runs_of(tmp_path, 'restarted')
    assert len(runs) == len(codes) - 1, 'the last command found its run complete'
    assert [resumed_from(run) for run in runs] == [
        None, None, 'v1/checkpoint-2', 'v2/checkpoint-6', 'v3/checkpoint-8', 'v4/checkpoint-14',
    ]  # fmt: skip
    assert_equal(runs[-1] / 'checkpoint-16', whole / 'checkpoint-16')
    assert f'{runs[-1]} is complete: ' in (tmp_path / 'restarted' / 'log-0.txt').read_text()

"""--max_minutes with two processes whose clocks differ: both follow the first one, also when steps become slower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT, assert_equal, log_lines

DRIVER = """
import json, os, sys, types
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import llm_sft
from benchmarks.kill_resume import base_flags, start, wait
from utils.proofs import first_step, time_trial
from utils.train import deadline, prepare
from utils.train.trainer import SftTrainer

folder = Path(sys.argv[2])
base = [*base_flags(folder), '--max_steps', '60', '--save_steps', '10', '--eval_steps', '100', '--max_minutes', '1',
        '--preflight', 'false']
step, seconds = SftTrainer.training_step, [0.0]

def clock():
    # The clock of the second process runs a hundred times as fast.
    return seconds[0] * (100 if os.environ['RANK'] == '1' else 1)

def timed(self, *args, **kwargs):
    is_slow = not self.in_preflight and 10 <= self.state.global_step < 18
    seconds[0] += 1.5 if is_slow else 0.5
    return step(self, *args, **kwargs)

llm_sft.time = types.SimpleNamespace(time=clock)
deadline.now = time_trial.now = clock
SftTrainer.training_step = timed
codes = [wait(start(base, folder / 'whole', 2))]
(checkpoint,) = (folder / 'whole').glob('*/*/checkpoint-20')
codes.append(wait(start([*base, '--resume_from_checkpoint', str(checkpoint)], folder / 're', 2)))
(folder / 'codes.json').write_text(json.dumps(codes))
"""

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def test_processes_end_at_the_same_step_and_the_resumed_run_keeps_the_schedule(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-c', DRIVER, str(ROOT), str(tmp_path)],
        # A process that is forked after torch started threads would wait for them forever.
        cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    log = (tmp_path / 'whole' / 'log-0.txt').read_text()
    assert json.loads((tmp_path / 'codes.json').read_text()) == [[0, 0], [0, 0]], log[-3000:]

    (run,) = (tmp_path / 'whole').glob('*/v*')
    decided = [s for s in json.loads((run / 'run.json').read_text())['decisions'] if s.startswith('max_steps')]
    assert decided[0].startswith('max_steps = 55 of 60 because --max_minutes is 1 and a step takes 1 s')
    assert len(decided) > 1
    ends = [part['end'] for part in json.loads((run / 'lock.json').read_text())['timetable']]
    assert ends[0] == 55 and ends == sorted(ends, reverse=True)
    last = run / f'checkpoint-{ends[-1]}'
    assert log_lines(last)[-1]['step'] == ends[-1]

    (resumed,) = (tmp_path / 're').glob('*/v*')
    assert (
        json.loads((resumed / 'lock.json').read_text())['timetable']
        == json.loads((run / 'lock.json').read_text())['timetable']
    )
    assert_equal(resumed / last.name, last)

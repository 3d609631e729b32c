"""Two processes that are killed, stopped, interrupted or given NaN together. One driver process forks all runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT
from utils.base.checkpoint import all_checkpoints, damage

pytestmark = [pytest.mark.slow, pytest.mark.processes]

DRIVER = """
import json, math, os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import llm_sft
from benchmarks.kill_resume import STEPS, base_flags, compare, facts, run_folder, start, wait
from utils.proofs import first_step
from utils.train import prepare
from utils.train.checkpoints import Checkpoints
from utils.train.trainer import SftTrainer

folder = Path(sys.argv[2])
base = [*base_flags(folder), '--lora_dropout_p', '0.1']
step, write, compute_loss = SftTrainer.training_step, Checkpoints.write, SftTrainer.compute_loss
codes = {}

def run(name, *flags):
    codes[name] = wait(start([*base, *flags], folder / name, 2))

def signalled(self, *args, **kwargs):
    # One process alone is told, in the middle of step 8, which is evaluated.
    if self.state.global_step == 7 and os.environ['RANK'] == '1' and not self.in_preflight:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args, **kwargs)

def limited(self, checkpoint, **keywords):
    if checkpoint.name == 'checkpoint-4' and os.environ['RANK'] == '0':
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
    return write(self, checkpoint, **keywords)

def poisoned(self, model, inputs, *args, **kwargs):
    # The second process's rows of step 4 have no finite loss.
    loss = compute_loss(self, model, inputs, *args, **kwargs)
    is_bad = self.state.global_step == 3 and os.environ['RANK'] == '1' and not self.in_preflight
    return loss * math.nan if is_bad else loss

run('whole')
run('plain', '--preflight', 'false')
SftTrainer.training_step = signalled
run('stopped')
SftTrainer.training_step = step
run('resumed', '--resume_from_checkpoint', str(run_folder(folder / 'stopped') / 'checkpoint-8'))
Checkpoints.write = limited
run('full')
Checkpoints.write, SftTrainer.compute_loss = write, poisoned
run('poisoned')
whole = facts(folder / 'whole', 2)
found = {
    'codes': codes,
    'plain': compare(whole, facts(folder / 'plain', 2), 0),
    'resumed': compare(whole, facts(folder / 'resumed', 2), 8),
}
(folder / 'found.json').write_text(json.dumps(found))
"""


# A process that is forked after torch started threads would wait for them forever.
ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1'}


@pytest.fixture(scope='module')
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of all runs, and the results of the driver."""
    folder = tmp_path_factory.mktemp('runs')
    done = subprocess.run(
        [sys.executable, '-c', DRIVER, str(ROOT), str(folder)],
        cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, json.loads((folder / 'found.json').read_text())


def log(folder: Path, name: str) -> str:
    """Return the output of the first process. Without torchrun, the other one prints the same later."""
    return (folder / name / 'log-0.txt').read_text()


def run_of(folder: Path, name: str) -> Path:
    (run,) = (folder / name).glob('*/v*')
    return run


def test_the_first_step_gate_leaves_two_processes_as_they_were(driven: tuple[Path, dict[str, Any]]) -> None:
    _, found = driven
    assert found['codes']['whole'] == found['codes']['plain'] == [0, 0]
    assert found['plain'] == []


def test_a_signal_to_one_process_stops_both_at_one_step(driven: tuple[Path, dict[str, Any]]) -> None:
    folder, found = driven
    assert found['codes']['stopped'] == [143, 143] and found['codes']['resumed'] == [0, 0]
    assert found['resumed'] == [], 'log lines, weights, states and rows are those of the run never stopped'
    text = log(folder, 'stopped')
    assert text.count('stopped by SIGTERM after step 8 of 16') == 1 and 'Traceback' not in text
    assert 'torchrun --nproc_per_node 2 llm_sft.py' in text


def test_a_full_disk_of_two_processes_is_one_message(driven: tuple[Path, dict[str, Any]]) -> None:
    folder, found = driven
    assert found['codes']['full'] == [2, 2]
    run, text = run_of(folder, 'full'), log(folder, 'full')
    assert text.count('checkpoint-4 could not be written: ') == 1 and 'Traceback' not in text
    assert [p.name for p in run.iterdir() if 'checkpoint' in p.name] == ['checkpoint-2']
    assert damage(run / 'checkpoint-2') is None


def test_the_rows_of_another_process_are_named(driven: tuple[Path, dict[str, Any]]) -> None:
    folder, found = driven
    assert found['codes']['poisoned'] == [2, 2]
    text = log(folder, 'poisoned')
    assert text.count('step 4: the loss is not a finite number for ') == 1 and 'Traceback' not in text
    seen = [json.loads(line) for line in (folder / 'poisoned' / 'rows-1.jsonl').read_text().splitlines()]
    rows = {index for step, indices in seen if step == 3 for index in indices}
    named = text.split('step 4: the loss is not a finite number for ')[1].split('. Check')[0].split(', ')
    assert len(rows) == len(named) == 4
    assert [p.name for p in all_checkpoints(run_of(folder, 'poisoned'))] == ['checkpoint-2']


def test_killed_runs_go_on_to_the_same_bits() -> None:
    """A few kills of four modes; benchmarks/kill_resume.py has more kills and modes."""
    done = subprocess.run(
        [sys.executable, 'benchmarks/kill_resume.py', '--kills', '5', '--modes', 'lora, worker, log every 3', 'full',
         'lora, 2 processes', 'full, weights in bf16, 2 processes'],
        cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert '5 of 5 resumed runs equal the uninterrupted one' in done.stdout

"""--report_to: what trackers are given, through the callbacks of transformers and stand-ins for the packages."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, assert_equal, history, run_program, small_flags
from tests.support.trackers import calls, recorded, write_stand_ins
from utils.base.errors import Problems as CollectedProblems
from utils.base.scrub import scrubbed, scrubber
from utils.cli.trackers import TRACKERS, check_tracker_packages, variables_without_effect

Run = Callable[..., Path]
Problems = Callable[[], list[str]]


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder with stand-ins that this process imports. Comet is only found by a new process."""
    folder = write_stand_ins(tmp_path / 'packages')
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.partition('.')[0] in (*TRACKERS, 'stand_in') and not name.startswith('tensorboard'):
            del sys.modules[name]


def values(entries: list[dict[str, Any]], key: str) -> list[float]:
    """Return the values with this key in the log lines that a tracker got."""
    lines = [entry['kwargs'].get('metrics') or entry['args'][0] for entry in entries]
    return [line[key] for line in lines if key in line]


@pytest.mark.slow
def test_every_tracker_gets_the_name_of_the_run_its_project_and_each_log_line(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = write_stand_ins(tmp_path / 'packages')
    words = [*small_flags(model_dir, data_file, tmp_path / 'out'), '--report_to', *TRACKERS]
    projects = {'WANDB_PROJECT': 'mine', 'SWANLAB_PROJECT': 'mine too', 'COMET_API_KEY': 'x' * 20}
    told = run_program('llm_sft.py', *words, PYTHONPATH=str(folder), **projects)
    assert told.returncode == 0, told.stderr[-2000:]
    (run,) = (tmp_path / 'out').glob('*/*')
    assert [entry['kwargs'] for entry in calls(folder, 'wandb.init')] == [{'project': 'mine', 'name': run.name}]
    (swanlab,) = calls(folder, 'swanlab.init')
    assert swanlab['kwargs'] == {'project': 'mine too', 'experiment_name': run.name}
    (trackio,) = calls(folder, 'trackio.init')
    assert (trackio['kwargs']['project'], trackio['kwargs']['name']) == ('assay', run.name)
    assert trackio['kwargs']['private'] is True
    assert [entry['args'] for entry in calls(folder, 'mlflow.set_experiment')] == [['assay']]
    assert calls(folder, 'mlflow.start_run')[0]['kwargs']['run_name'] == run.name
    assert calls(folder, 'comet_ml.ExperimentConfig')[0]['kwargs'] == {'name': run.name}

    losses = [line['loss'] for line in history(run, 6) if 'loss' in line]
    checks = [line['eval_loss'] for line in history(run, 6) if 'eval_loss' in line]
    assert len(losses) == 6 and len(checks) == 2
    for name in ('wandb.log', 'swanlab.log', 'trackio.log', 'comet_ml.start().__internal_api__log_metrics__'):
        assert values(calls(folder, name), 'train/loss') == losses, name
        assert values(calls(folder, name), 'eval/loss') == checks, name
    assert values(calls(folder, 'mlflow.log_metrics'), 'loss') == losses
    config = calls(folder, 'wandb.config.update')[0]['args'][0]
    assert config['model_type'] == 'llama' and config['learning_rate'] == 0.01 and config['run_name'] == run.name
    assert config['peft_config']['default']['r'] == 8
    assert calls(folder, 'wandb.config.set')[0]['args'] == ['model/num_parameters', 52384]
    assert (run / 'runs').is_dir() and (run / 'images' / 'loss.png').is_file()


@pytest.mark.slow
def test_only_the_named_trackers_are_used(run_sft: Run, stand_ins: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_sft('--max_steps', '1', '--report_to', 'wandb', 'wandb')
    assert len(calls(stand_ins, 'wandb.init')) == 1 and not (run / 'runs').exists()
    assert json.loads((run / 'sft_args.json').read_text())['report_to'] == ['wandb']
    before = len(recorded(stand_ins))
    run = run_sft('--max_steps', '1', '--report_to', 'none')
    assert not (run / 'runs').exists() and (run / 'images' / 'loss.png').is_file()
    assert 'tensorboard --logdir' not in caplog.text
    run = run_sft('--max_steps', '1')
    assert len(list((run / 'runs').iterdir())) == 1 and f'tensorboard --logdir {run / "runs"}' in caplog.text
    assert len(recorded(stand_ins)) == before


@pytest.mark.slow
def test_a_tracker_that_cannot_open_a_run_ends_the_program_before_the_first_step(
    run_sft: Run, stand_ins: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('FAILING_CALL', 'wandb.init')
    words = sys.argv
    run = run_sft('--report_to', 'wandb', expect=2)
    assert problems() == [
        '--report_to wandb: the run cannot be opened: no connection for ~. Log in to the tracker or switch it to '
        'offline with its own settings, or remove wandb from --report_to.'
    ]
    assert not list(run.glob('checkpoint-*'))
    assert sys.argv is words and 'WANDB_X_DISABLE_META' not in os.environ, 'the environment is as before'


@pytest.mark.slow
def test_a_tracker_that_fails_later_does_not_end_the_run(
    run_sft: Run, stand_ins: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('FAILING_CALL', 'trackio.log')
    run = run_sft('--report_to', 'trackio', 'mlflow')
    warning = (
        '--report_to trackio failed and gets no more log lines: no connection for ~. The run continues, and the '
        'curves in its folder are complete.'
    )
    assert caplog.text.count(warning) == 1
    assert json.loads((run / 'run.json').read_text())['warnings'].count(warning) == 1
    assert len(values(calls(stand_ins, 'mlflow.log_metrics'), 'loss')) == 6
    assert len(calls(stand_ins, 'mlflow.end_run')) == 1 and not calls(stand_ins, 'trackio.finish')


@pytest.mark.slow
def test_a_resumed_run_is_a_run_of_its_own_and_has_the_same_bits(run_sft: Run, stand_ins: Path) -> None:
    flags = ('--save_total_limit', '-1', '--lora_dropout_p', '0.1')
    whole = run_sft(*flags)
    resumed = run_sft(*flags, '--report_to', 'wandb', '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    assert calls(stand_ins, 'wandb.init')[0]['kwargs']['name'] == resumed.name
    steps = values(calls(stand_ins, 'wandb.log'), 'train/global_step')
    assert min(steps) == 4 and max(steps) == 6


@pytest.mark.slow
@pytest.mark.processes
def test_only_the_main_process_reports(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    folder = write_stand_ins(tmp_path / 'packages')
    words = [*small_flags(model_dir, data_file, tmp_path / 'out'), '--max_steps', '2', '--report_to', 'wandb']
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    done = subprocess.run(
        [*command, str(ROOT / 'llm_sft.py'), *words],
        cwd=ROOT, text=True, capture_output=True, timeout=300, check=False,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len({entry['pid'] for entry in recorded(folder)}) == 1
    assert len(values(calls(folder, 'wandb.log'), 'train/loss')) == 2


def test_packages_that_are_missing_come_with_one_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr('utils.cli.trackers.has_package', lambda name: name == 'wandb')
    problems = CollectedProblems()
    check_tracker_packages(['wandb', 'comet', 'swanlab', 'none'], problems)
    assert problems.found == ['--report_to comet swanlab: not installed. Run: pip install comet-ml swanlab']


def test_a_folder_that_a_tracker_left_behind_is_not_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from utils.base.packages import has_package

    (tmp_path / 'wandb' / 'offline-run-1').mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not has_package('wandb') and has_package('torch')


def test_variables_that_ask_for_uploads_are_named() -> None:
    environment = {'WANDB_WATCH': 'false', 'WANDB_LOG_MODEL': 'end', 'COMET_LOG_ASSETS': '1', 'WANDB_PROJECT': 'x'}
    assert [line.split()[2] for line in variables_without_effect(['wandb', 'none'], environment)] == ['WANDB_LOG_MODEL']
    assert [line.split()[2] for line in variables_without_effect(['comet'], environment)] == ['COMET_LOG_ASSETS']


HIDDEN = {
    '/home/alice/models/a': '~/models/a',
    '/home/alice': '~',
    'no file /home/alice.': 'no file ~.',
    '/home/alice.old/x': '/home/user/x',
    'file:///home/alice/x': 'file://~/x',
    '{"x": "/home/alice", "y": 1}': '{"x": "~", "y": 1}',
    '/home/alice2/x and /home/bob/y': '/home/user/x and /home/user/y',
    '/Users/bob/y': '/Users/user/y',
    '/data/alice/models': '/data/user/models',
    'alice/my-model': 'user/my-model',
    'C:\\Users\\alice\\x': 'C:\\Users\\user\\x',
    'malice/alice-in-wonderland': 'malice/alice-in-wonderland',
    'a tale of alice': 'a tale of alice',
    'canary+12345': '<secret>',
    'x canary%2B12345 y': 'x <secret> y',
    'token hf_abcdefghijklmnopqrstuvwxyzABCDEFGH.': 'token <secret>.',
    'desk-aaaaaaaaaabbbbbbbbbbccccccccccddd': 'desk-aaaaaaaaaabbbbbbbbbbccccccccccddd',
    'adamw_torch': 'adamw_torch',
}


@pytest.mark.parametrize('text', HIDDEN)
def test_text_that_leaves_the_machine_is_scrubbed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {'HOME': '/home/alice', 'USER': 'alice', 'LOGNAME': 'alice'}.items():
        monkeypatch.setenv(name, value)
    clean = scrubber({'the variable X_TOKEN': 'canary+12345'})
    assert clean(text) == HIDDEN[text]
    nested = {text: [text, (text, 1, 2.5, None, True)], 'path': Path('/home/alice/b'), 'inf': math.inf}
    assert scrubbed(nested, clean) == {
        HIDDEN[text]: [HIDDEN[text], [HIDDEN[text], 1, 2.5, None, True]], 'path': '~/b', 'inf': math.inf,
    }  # fmt: skip


def test_without_a_home_folder_paths_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', '/')
    for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME'):
        monkeypatch.delenv(name, raising=False)
    assert scrubber({})('/data/models/a') == '/data/models/a'

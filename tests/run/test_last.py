"""--resume_from_checkpoint last: which checkpoint is taken, and which runs are skipped and why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import llm_sft
from tests.support.runs import ROOT, assert_equal, small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.system import is_held
from utils.run.folder import in_progress
from utils.run.last import _check_everywhere

LAST = ('--resume_from_checkpoint', 'last')
FLAGS = ('--max_steps', '4', '--eval_steps', '2', '--save_total_limit', '-1')


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a complete run. Its model and data are in the same folder as `out`."""
    folder = tmp_path_factory.mktemp('last')
    make_model().save_pretrained(folder / 'tiny-llama')
    make_tokenizer().save_pretrained(folder / 'tiny-llama')
    rows = [{'query': f'what is {i}?', 'response': f'it is {i}.'} for i in range(20)]
    data = write_jsonl(folder / 'qa.jsonl', rows)
    words = small_flags(folder / 'tiny-llama', data, folder / 'out')
    assert llm_sft.main([*words, *FLAGS, *LAST]) == 0
    return next((folder / 'out').glob('*/v0-*'))


@pytest.fixture
def killed(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the run as it would be if it had been killed in step 3."""
    run = tmp_path / 'out' / 'tiny-llama' / whole.name
    shutil.copytree(whole, run)
    shutil.rmtree(run / 'checkpoint-4')
    (run / 'run.json').unlink()
    return run


@pytest.fixture
def again(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Return a function that gives the same command again, with more flags, and returns its log."""
    folder = whole.parents[2]
    words = small_flags(folder / 'tiny-llama', folder / 'qa.jsonl', tmp_path / 'out')

    def run(*more: str, expect: int = 0) -> str:
        caplog.clear()
        assert llm_sft.main([*words, *FLAGS, *LAST, *more]) == expect
        return caplog.text

    return run


def newest(run: Path) -> Path:
    return max(run.parent.glob('v*'), key=lambda path: int(path.name.split('-')[0][1:]))


def test_without_a_run_a_new_one_starts_and_its_lock_repeats_no_word(whole: Path) -> None:
    lock = json.loads((whole / 'lock.json').read_text())
    assert '--resume_from_checkpoint' not in lock['command']
    (line,) = [s for s in json.loads((whole / 'run.json').read_text())['decisions'] if s.startswith('resume_from')]
    assert line == (f'resume_from_checkpoint = None because no run in {whole.parent} can be resumed: a new run starts')


@pytest.mark.slow
def test_the_same_command_goes_on_to_the_same_bits(killed: Path, whole: Path, again: Callable[..., str]) -> None:
    (killed / '.checkpoint-4.partial').mkdir()
    log = again()
    chosen = killed / 'checkpoint-2'
    assert (
        f'resume_from_checkpoint = {chosen} because it is the newest whole checkpoint of a run with the same flags, '
        'data and weights'
    ) in log
    assert '.checkpoint-4.partial was being written when that run ended.' in log
    resumed = newest(killed)
    assert_equal(resumed / 'checkpoint-4', whole / 'checkpoint-4')
    command = json.loads((resumed / 'lock.json').read_text())['command']
    assert command[command.index('--resume_from_checkpoint') + 1] == str(chosen)


def test_a_run_that_is_being_trained_is_not_resumed(killed: Path, again: Callable[..., str]) -> None:
    with in_progress(killed):
        log = again(expect=2)
        assert list(killed.parent.iterdir()) == [killed]
    assert f'--resume_from_checkpoint last: {killed} fits this command, and another process trains it now. Wait' in log


def test_a_second_run_from_a_run_in_progress_is_warned(
    killed: Path, again: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint that the other process is writing is not called deletable."""
    (killed / '.checkpoint-4.partial').mkdir()
    words = ('--resume_from_checkpoint', str(killed / 'checkpoint-2'), '--dry_run')
    with in_progress(killed):
        again(*words)
    printed = capsys.readouterr().out
    assert f'--resume_from_checkpoint {killed / "checkpoint-2"}: another process trains {killed} now.' in printed
    assert 'can be deleted' not in printed

    again(*words)
    printed = capsys.readouterr().out
    assert 'another process' not in printed and '.checkpoint-4.partial was being written when that run' in printed


def test_a_run_is_in_progress_until_its_process_dies_even_if_a_fork_lives_on(tmp_path: Path) -> None:
    code = (
        'import os, sys, time\n'
        'from pathlib import Path\n'
        'from utils.run.folder import in_progress\n'
        'with in_progress(Path(sys.argv[1])):\n'
        '    child = os.fork()\n'
        '    if child == 0:\n'  # a fork has closed the folder when its first line runs
        '        print(os.getpid(), flush=True)\n'
        '    time.sleep(60)\n'
    )
    with subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert is_held(tmp_path)
        process.kill()
        process.wait()
        try:
            assert not is_held(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)
    with in_progress(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


def test_a_command_that_asks_does_not_keep_a_run_from_its_lock(tmp_path: Path) -> None:
    """Thousands of questions from two threads meet many beginnings of a run."""
    ended = threading.Event()

    def ask() -> int:
        asked = 0
        while not ended.is_set():
            is_held(tmp_path)
            asked += 1
        return asked

    with ThreadPoolExecutor(2) as pool:
        askers = [pool.submit(ask) for _ in range(2)]
        seen = []
        for _ in range(200):
            with in_progress(tmp_path):
                seen.append(is_held(tmp_path))
        ended.set()
        assert min(asker.result() for asker in askers) > 0
    assert seen == [True] * 200
    assert not is_held(tmp_path)


def test_two_commands_that_ask_at_once_do_not_take_each_other_for_a_run(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(is_held, [tmp_path] * 4000))


def test_a_complete_run_is_not_trained_again(killed: Path, whole: Path, again: Callable[..., str]) -> None:
    shutil.copy(whole / 'run.json', killed)
    log = again()
    best = json.loads((whole / 'run.json').read_text())['best_checkpoint']
    assert f'{killed} is complete: it has the flags, data and weights of this command. Nothing is left to train.' in log
    assert f'best checkpoint: {best}' in log and f'python llm_infer.py --ckpt_dir {best}' in log
    assert list(killed.parent.iterdir()) == [killed]


def test_a_complete_run_whose_checkpoints_hold_weights_only_is_complete(
    killed: Path, whole: Path, again: Callable[..., str]
) -> None:
    for file in killed.glob('checkpoint-*/*.safetensors'):
        if not file.name.startswith('adapter'):
            file.unlink()
    shutil.copy(whole / 'run.json', killed)
    assert f'{killed} is complete' in again()


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_report_repeats_its_last_steps(
    killed: Path, whole: Path, again: Callable[..., str]
) -> None:
    shutil.copytree(whole / 'checkpoint-4', killed / 'checkpoint-4')
    log = again()
    assert f'{killed / "checkpoint-4"} is of the last step, and run.json is missing: it is skipped.' in log
    assert f'resume_from_checkpoint = {killed / "checkpoint-2"} because' in log
    assert (newest(killed) / 'report.html').is_file()


def test_a_last_checkpoint_alone_is_a_complete_run_without_a_report(
    killed: Path, whole: Path, again: Callable[..., str]
) -> None:
    shutil.rmtree(killed / 'checkpoint-2')
    shutil.copytree(whole / 'checkpoint-4', killed / 'checkpoint-4')
    log = again()
    assert f'{killed} was ended after its last step and before run.json and the report were written.' in log
    assert f'best checkpoint: {whole / "checkpoint-"}' in log


@pytest.mark.slow
def test_a_checkpoint_that_is_not_whole_is_skipped(killed: Path, whole: Path, again: Callable[..., str]) -> None:
    shutil.copytree(whole / 'checkpoint-4', killed / 'checkpoint-3')
    (killed / 'checkpoint-3' / 'manifest.json').unlink()
    file = killed / 'checkpoint-2' / 'adapter_model.safetensors'
    file.write_bytes(file.read_bytes()[:-1] + b'\x00\x00')
    log = again()
    assert (
        f'{killed / "checkpoint-3"} cannot be used, because it has no manifest.json, which is written last: it is '
        'incomplete: it is skipped.'
    ) in log
    assert f'{killed / "checkpoint-2"} cannot be used, because adapter_model.safetensors has ' in log
    assert f'resume_from_checkpoint = None because no run in {killed.parent} can be resumed: a new run starts' in log


@pytest.mark.slow
def test_a_checkpoint_of_weights_only_is_skipped(killed: Path, again: Callable[..., str]) -> None:
    (killed / 'checkpoint-2' / 'optimizer.safetensors').unlink()
    manifest = killed / 'checkpoint-2' / 'manifest.json'
    content = json.loads(manifest.read_text())
    del content['files']['optimizer.safetensors']
    manifest.write_text(json.dumps(content))
    assert (
        f'{killed / "checkpoint-2"} has no optimizer state (optimizer.safetensors): it was saved with '
        '--only_save_model true and cannot be resumed: it is skipped.'
    ) in again()


def test_a_run_that_saves_weights_only_is_warned(killed: Path, again: Callable[..., str]) -> None:
    log = again('--only_save_model', 'true', '--max_steps', '1')
    assert 'so a restarted command trains from the beginning. Add --only_save_model false.' in log


def edited(run: Path, name: str, **values: object) -> None:
    file = run / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def data_of(run: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((run / 'lock.json').read_text())['data']
    return found


@pytest.mark.slow
def test_runs_that_do_not_fit_are_skipped_with_the_reason(killed: Path, again: Callable[..., str]) -> None:
    others = {}
    for number in range(1, 7):
        others[number] = killed.parent / f'v{number}-20261128-120000'
        shutil.copytree(killed, others[number])
    edited(others[1], 'sft_args.json', learning_rate=0.5, lora_dropout_p=0.25)
    edited(others[2], 'lock.json', processes=2)
    edited(others[3], 'sft_args.json', base_model={'sha256': '0' * 64, 'source': 'elsewhere'})
    (source,) = data_of(killed)
    edited(others[4], 'lock.json', data={source: {'rows': 20, 'sha256': '1' * 64}})
    (others[5] / 'lock.json').unlink()
    (others[6] / 'sft_args.json').write_text('{')
    log = again()
    for number, reason in {
        1: 'other flags, --lora_dropout_p 0.25 (now 0.0), --learning_rate 0.5 (now 0.01)',
        2: 'it was trained by 2 processes (now 1)',
        3: 'other base weights',
        4: f'other rows of {source}',
        5: f'{others[5]}/lock.json cannot be read as JSON: No such file or directory',
    }.items():
        assert f'{others[number]}: {reason}: it is skipped.' in log
    assert f'{others[6]}: {others[6]}/sft_args.json cannot be read as JSON: ' in log
    assert f'resume_from_checkpoint = {killed / "checkpoint-2"} because' in log


@pytest.mark.slow
def test_a_repeated_run_is_not_taken_for_its_own_repetition(
    killed: Path, whole: Path, again: Callable[..., str]
) -> None:
    shutil.copy(whole / 'run.json', killed)
    log = again('--from_run', str(killed))
    assert f'no run in {killed.parent} can be resumed: a new run starts' in log
    assert_equal(newest(killed) / 'checkpoint-4', whole / 'checkpoint-4')


def test_a_dry_run_says_when_the_checkpoint_is_chosen(
    killed: Path, again: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    again('--dry_run', 'true')
    assert 'resume_from_checkpoint = last because it is chosen when the training starts' in capsys.readouterr().out
    assert list(killed.parent.iterdir()) == [killed]


def test_a_checkpoint_that_another_machine_does_not_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, 'from_all', lambda value: [value, False])
    with pytest.raises(ConfigError) as refused:
        _check_everywhere(tmp_path)
    assert refused.value.problems == (
        f'--resume_from_checkpoint last: process 0 found {tmp_path}, and process 1 has no such folder. Use an '
        '--output_dir that all machines share.',
    )


@pytest.mark.slow
def test_a_run_that_started_from_an_adapter_is_restarted_by_the_same_command(
    whole: Path, again: Callable[..., str], tmp_path: Path
) -> None:
    start = ('--adapter', str(whole / 'checkpoint-2'))
    log = again(*start)
    assert 'resume_from_checkpoint = None because no run in ' in log
    first = newest(tmp_path / 'out' / 'tiny-llama' / 'v0')
    trained = first.with_name('trained')
    shutil.copytree(first / 'checkpoint-4', trained)
    shutil.rmtree(first / 'checkpoint-4')
    (first / 'run.json').unlink()

    other = again('--adapter', str(whole / 'checkpoint-4'))
    assert (
        f'{first}: ' in other
        and f'it did not start from the adapter in {whole / "checkpoint-4"}: it is skipped' in other
    )
    without = again()
    assert f'{first}: it started from an adapter, and this command has no --adapter: it is skipped.' in without

    log = again(*start)
    assert f'resume_from_checkpoint = {first / "checkpoint-2"} because it is the newest whole checkpoint' in log
    assert 'adapter = None because the run continues with the adapter in the checkpoint' in log
    resumed = newest(first)
    assert_equal(resumed / 'checkpoint-4', trained)
    lock = json.loads((resumed / 'lock.json').read_text())
    assert lock['adapter'] == json.loads((first / 'lock.json').read_text())['adapter']
    assert '--adapter' not in lock['command']


@pytest.mark.slow
def test_a_run_whose_template_file_has_changed_is_skipped(again: Callable[..., str], tmp_path: Path) -> None:
    template = tmp_path / 'chat.jinja'
    template.write_text(
        '{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}'
        '{% if add_generation_prompt %}assistant: {% endif %}'
    )
    flags = ('--template_type', 'auto', '--chat_template', str(template), '--max_steps', '2')
    again(*flags)
    run = newest(tmp_path / 'out' / 'tiny-llama' / 'v0')
    again(*flags)
    assert newest(run) == run

    template.write_text(template.read_text().replace('}}: {{', '}}> {{'))
    log = again(*flags)
    assert f'{run}: {template} has changed since: it is skipped.' in log
    assert newest(run) != run

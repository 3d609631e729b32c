"""--from_run RUN --verify true: what is equal, the first value that differs, and its likely cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_sft
from tests.support.runs import small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer

Problems = Callable[[], list[str]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 6 steps with evaluations and checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp('verify')
    make_model().save_pretrained(folder / 'tiny-llama')
    make_tokenizer().save_pretrained(folder / 'tiny-llama')
    rows = [{'query': f'what is {i}?', 'response': f'it is {i}.' + ' yes' * (i % 5)} for i in range(40)]
    data = write_jsonl(folder / 'qa.jsonl', rows)
    words = small_flags(folder / 'tiny-llama', data, folder / 'out')
    more = ('--eval_steps', '2', '--save_total_limit', '-1', '--lora_dropout_p', '0.1')
    assert llm_sft.main([*words, *more]) == 0
    return next((folder / 'out').glob('*/*'))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may change."""
    copy = tmp_path / 'tiny-llama' / original.name
    shutil.copytree(original, copy)
    return copy


@pytest.fixture
def verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Return a function that verifies a run, and returns the exit code and the printed lines."""

    def call(run: Path, *flags: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        output = tmp_path / 'again'
        code = llm_sft.main(['--from_run', str(run), '--verify', 'true', '--output_dir', str(output), *flags])
        assert not [p for p in output.rglob('*') if p.is_file()], 'nothing is kept'
        return code, [line for line in capsys.readouterr().out.splitlines() if not line.startswith(('{', 'Loading'))]

    return call


def equal(run: Path, *, step: int, lines: int, evaluations: int, checkpoints: int) -> list[str]:
    return [
        f'equal to the bit up to step {step} of {run}',
        f'log lines (loss, gradient norm, learning rate): {lines}',
        f'evaluations: {evaluations}',
        f'checkpoints (sha256 of the weights): {checkpoints}',
    ]


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def test_a_run_is_equal_to_the_bit(original: Path, verify: Callable[..., Any]) -> None:
    assert verify(original) == (0, equal(original, step=6, lines=6, evaluations=3, checkpoints=3))


def test_the_first_steps_have_the_rates_of_the_whole_schedule(original: Path, verify: Callable[..., Any]) -> None:
    expected = equal(original, step=3, lines=3, evaluations=1, checkpoints=1)
    assert verify(original, '--max_steps', '3') == (0, expected)


def test_a_changed_version_is_told_if_nothing_else_differs(run: Path, verify: Callable[..., Any]) -> None:
    edit_json(run / 'lock.json', lambda lock: {**lock, 'versions': {**lock['versions'], 'torch': '1.0'}})
    code, printed = verify(run, '--max_steps', '1')
    assert code == 0 and printed[:-1] == equal(run, step=1, lines=1, evaluations=0, checkpoints=0)
    assert printed[-1].startswith('this differs and has no effect: torch is ')
    assert printed[-1].endswith(', the repeated run had 1.0')


def test_a_changed_loss_is_told_with_the_versions_and_the_machine(run: Path, verify: Callable[..., Any]) -> None:
    edit_json(
        run / 'lock.json',
        lambda lock: {
            **lock,
            'processes': 2,
            'versions': {**lock['versions'], 'torch': '1.0'},
            'machine': {**lock['machine'], 'processor': 'abacus', 'threads': 96},
        },
    )
    lines = json.loads((run / 'history.json').read_text())
    loss = lines[3]['loss']
    assert lines[3]['step'] == 3
    lines[3]['loss'] = loss * (1 + 1e-6)
    (run / 'history.json').write_text(json.dumps(lines))

    code, printed = verify(run)
    assert code == 1
    assert printed[0] == (
        f'different at step 3 (all is equal up to step 2): loss is {loss}, and {run} has {lines[3]["loss"]}'
    )
    assert printed[1] == 'size of the difference: 1e-06 of the value'
    assert printed[2] == 'likely cause: 1 processes train, the repeated run had 2'
    assert [line.split(' is ')[0] for line in printed[3:]] == [
        'likely cause: torch', 'likely cause: processor', 'likely cause: threads',
    ]  # fmt: skip
    assert printed[4].endswith(', the repeated run had abacus') and printed[5].endswith(', the repeated run had 96')


def test_a_rounding_without_a_known_cause_is_called_so(run: Path, verify: Callable[..., Any]) -> None:
    lines = json.loads((run / 'history.json').read_text())
    lines[0]['grad_norm'] *= 1 + 1e-6
    (run / 'history.json').write_text(json.dumps(lines))
    code, printed = verify(run)
    assert code == 1 and printed[0].startswith('different at step 1 (it is the first log line): grad_norm is ')
    assert printed[2] == (
        'likely cause: rounding, for example in a GPU kernel that is not deterministic. Flags, data, weights, versions '
        'and machine are those of the run.'
    )


def test_another_order_of_rows_is_found(
    original: Path, verify: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.data.packing import StepSampler

    iterate = StepSampler.__iter__
    monkeypatch.setattr(
        StepSampler, '__iter__', lambda self: iter([*list(iterate(self))[4:], *list(iterate(self))[:4]])
    )
    code, printed = verify(original)
    assert code == 1 and printed[0].startswith('different at step 1 (it is the first log line): loss is ')
    assert printed[2].startswith('likely cause: another order of the rows, another random state, or edited files')


def test_a_typed_flag_is_the_cause(original: Path, verify: Callable[..., Any]) -> None:
    code, printed = verify(original, '--learning_rate', '0.02')
    assert code == 1
    assert printed == [
        f'different at step 1 (it is the first log line): learning_rate is 0.01, and {original} has 0.005',
        'size of the difference: 0.5 of the value',
        'likely cause: --learning_rate is 0.02, the repeated run had 0.01',
    ]


def test_other_weights_at_a_checkpoint_are_found(run: Path, verify: Callable[..., Any]) -> None:
    def change(manifest: Any) -> Any:
        manifest['files']['adapter_model.safetensors']['sha256'] = 'f' * 64
        return manifest

    edit_json(run / 'checkpoint-4' / 'manifest.json', change)
    code, printed = verify(run)
    assert code == 1
    assert (
        printed[0].startswith(
            'different at step 4 (all is equal up to step 2): the sha256 of checkpoint-4/adapter_model.safetensors is '
        )
        or printed[0]
    )
    assert printed[0].endswith(f', and {run} has {"f" * 64}')


def test_a_log_line_that_is_not_repeated_is_found(run: Path, verify: Callable[..., Any]) -> None:
    lines = json.loads((run / 'history.json').read_text())
    lines.insert(1, {**lines[0], 'step': 1, 'eval_loss': 5.0})
    (run / 'history.json').write_text(json.dumps(lines))
    code, printed = verify(run, '--max_steps', '2')
    assert code == 1
    assert printed[0] == (
        f'different at step 1 (it is the first log line): the evaluation is None, and {run} has logged'
    )


def test_a_killed_run_with_fewer_lines_is_compared_as_far_as_it_went(run: Path, verify: Callable[..., Any]) -> None:
    (run / 'history.json').unlink()
    shutil.rmtree(run / 'checkpoint-6')
    assert verify(run) == (0, equal(run, step=4, lines=4, evaluations=2, checkpoints=2))
    for checkpoint in run.glob('checkpoint-*'):
        shutil.rmtree(checkpoint)


def test_lines_of_several_steps_are_compared_at_their_last_step(
    original: Path, verify: Callable[..., Any], tmp_path: Path
) -> None:
    before = set(original.parent.iterdir())
    assert llm_sft.main(['--from_run', str(original), '--logging_steps', '3']) == 0
    (sparse,) = set(original.parent.iterdir()) - before
    # Step 1 is always logged. At step 4 an evaluation is logged, and no loss.
    expected = equal(sparse, step=4, lines=2, evaluations=2, checkpoints=2)
    assert verify(sparse, '--max_steps', '5') == (0, expected)
    shutil.rmtree(sparse)


def test_a_resumed_run_is_repeated_from_its_checkpoint(original: Path, verify: Callable[..., Any]) -> None:
    before = set(original.parent.iterdir())
    command = json.loads((original / 'lock.json').read_text())['command']
    assert llm_sft.main([*command, '--resume_from_checkpoint', str(original / 'checkpoint-2')]) == 0
    (resumed,) = set(original.parent.iterdir()) - before
    expected = equal(resumed, step=4, lines=2, evaluations=1, checkpoints=1)
    assert verify(resumed, '--max_steps', '2') == (0, expected)
    shutil.rmtree(resumed)


def test_a_run_without_log_lines_is_refused(run: Path, verify: Callable[..., Any], problems: Problems) -> None:
    (run / 'history.json').write_text('[]')
    assert verify(run)[0] == 2
    assert problems() == [
        f'--from_run {run}: the run has no log line after step 0 to compare with. Give a run that has history.json or '
        'a checkpoint.'
    ]


def test_data_that_differ_are_refused_even_if_they_are_typed(
    run: Path, verify: Callable[..., Any], problems: Problems
) -> None:
    edit_json(
        run / 'lock.json',
        lambda lock: {**lock, 'data': {name: {**entry, 'sha256': '0' * 64} for name, entry in lock['data'].items()}},
    )
    (name,) = json.loads((run / 'lock.json').read_text())['data']
    assert verify(run, '--dataset', name)[0] == 2
    assert problems()[0].startswith(f'--from_run: the rows of {name} have changed since that run (sha256 000000')
    assert problems()[0].endswith('). Restore the earlier ones.'), 'a typed --dataset would not help'


def test_flags_that_contradict_a_verification_are_refused_together(
    run: Path, problems: Problems, tmp_path: Path
) -> None:
    assert llm_sft.main(['--verify', 'true', '--model_type', 'qwen-7b-chat']) == 2
    assert problems() == ['--verify true: no run is named. Add --from_run output/<model>/vN-<time>.']
    words = ['--from_run', str(run), '--verify', 'true', '--max_steps', '0', '--resume_from_checkpoint', 'last']
    assert llm_sft.main([*words, '--lora_rank', 'many']) == 2
    assert problems()[1:] == [
        "--lora_rank takes a whole number, got 'many'.",
        '--verify true: --max_steps takes 1 or more, got 0.',
        '--verify true repeats the first steps of a run, so it cannot start at a later checkpoint. Remove '
        '--resume_from_checkpoint.',
    ]

"""--early_stop: when a run ends, how it ends, and how it is resumed."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from tests.support.runs import assert_equal, history, log_lines, write_jsonl
from utils.train.callbacks import EarlyStop

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
GENERATING = ('--predict_with_generate', 'true', '--do_sample', 'false', '--max_new_tokens', '2', '--eval_steps', '1')

# A score with the values of VALUES, one for each evaluation of a file of 4 held-out rows.
OWN = """
VALUES = [1, 3, 2, 3, 2, 9]
calls = []


def scripted(answer, label, row):
    calls.append(row)
    return VALUES[(len(calls) - 1) // 4]
"""


def scripted(folder: Path) -> tuple[str, ...]:
    """Return the flags of a run that is scored with VALUES. Without the gate, each call is of an evaluation."""
    file = folder / 'scripted.py'
    file.write_text(OWN)
    return (*GENERATING, '--score', f'{file}:scripted', '--preflight', 'false')


class Arguments:
    """The arguments of the trainer that the callback reads."""

    metric_for_best_model = 'loss'

    def __init__(self, greater: bool) -> None:
        self.greater_is_better = greater


@pytest.mark.parametrize(
    ('values', 'greater', 'ends_at'),
    [
        ([3.0, 2.0, 2.5, 2.0, 1.0], False, 4),
        ([3.0, 2.0, 2.5, 1.0, 1.5, 1.0], False, 6),
        ([1.0, 2.0, 2.0, 3.0, 3.0, 2.0], True, 6),
        ([3.0, 2.0, 1.0], False, None),
    ],
)
def test_a_run_ends_after_n_evaluations_that_are_not_better(
    values: list[float], greater: bool, ends_at: int | None
) -> None:
    stop = EarlyStop(2)
    state = TrainerState(max_steps=100)
    ended = None
    for step, value in enumerate(values, start=1):
        state.global_step = step
        control = stop.on_evaluate(Arguments(greater), state, TrainerControl(), metrics={'eval_loss': value})  # type: ignore[arg-type]
        assert control.should_save == control.should_training_stop
        if control.should_training_stop:
            ended = step
            break
    assert ended == ends_at
    assert (stop.reason is not None) == (ends_at is not None)


@pytest.mark.slow
def test_an_early_end_is_a_finished_run(run_sft: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_sft(*scripted(tmp_path), '--early_stop', '2', '--save_steps', '100')
    reason = (
        'training ended at step 4 of 6 because of --early_stop 2: no evaluation after step 2 had a better '
        'eval_scripted than 3'
    )
    assert reason in caplog.text
    outcome = json.loads((run / 'run.json').read_text())
    assert (outcome['steps'], outcome['ended_early']) == (4, reason)
    assert outcome['decisions'][-1] == reason
    assert reason in (run / 'report.html').read_text(encoding='utf-8')
    assert [entry['eval_scripted'] for entry in history(run, 4) if 'eval_scripted' in entry] == [1, 3, 2, 3]
    # Only the last step was saved, so it is the best checkpoint there is.
    assert Path(outcome['best_checkpoint']).name == 'checkpoint-4'
    assert (run / 'checkpoint-4' / 'optimizer.safetensors').is_file()


@pytest.mark.slow
def test_the_last_step_is_no_early_end(run_sft: Run, tmp_path: Path) -> None:
    run = run_sft(*scripted(tmp_path), '--early_stop', '2', '--max_steps', '4')
    assert json.loads((run / 'run.json').read_text())['ended_early'] is None


@pytest.mark.slow
def test_the_loss_can_end_a_run(run_sft: Run) -> None:
    """With this rate the weights do not change visibly in one step, and later the loss grows."""
    run = run_sft('--learning_rate', '5', '--max_steps', '9', '--eval_steps', '1', '--early_stop', '1')
    losses = [entry['eval_loss'] for entry in history(run, max_step(run)) if 'eval_loss' in entry]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[:-1]))
    assert losses[-1] >= min(losses[:-1]) and len(losses) < 9


def max_step(run: Path) -> int:
    return int(json.loads((run / 'run.json').read_text())['steps'])


@pytest.mark.slow
def test_a_resumed_run_keeps_the_count(run_sft: Run, tmp_path: Path, problems: Problems) -> None:
    """The resumed run loads the score again, so its list of values starts after the values that were used."""
    flags = ('--early_stop', '3', '--save_total_limit', '-1')
    whole = run_sft(*scripted(tmp_path), *flags)
    assert max_step(whole) == 5
    flags_of_rest = scripted(tmp_path)
    file = tmp_path / 'scripted.py'
    file.write_text(OWN.replace('[1, 3, 2, 3, 2, 9]', '[3, 2, 9]'))
    resumed = run_sft(*flags_of_rest, *flags, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert max_step(resumed) == 5
    assert_equal(resumed / 'checkpoint-5', whole / 'checkpoint-5')

    run_sft(*flags_of_rest, *flags, '--resume_from_checkpoint', str(whole / 'checkpoint-5'), expect=2)
    assert problems() == [
        '--early_stop 3: no step is left to train. The last 3 evaluations up to the checkpoint were not better than '
        'the evaluation at step 2. Raise or remove --early_stop to continue training.'
    ]
    file.write_text(OWN.replace('[1, 3, 2, 3, 2, 9]', '[9]'))
    longer = ('--early_stop', '4', '--resume_from_checkpoint', str(whole / 'checkpoint-5'))
    assert max_step(run_sft(*flags_of_rest, *longer)) == 6


@pytest.mark.slow
def test_a_repeated_evaluation_can_end_a_resumed_run(
    run_sft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal cuts the evaluation that would have ended the run. The resumed run trains no further step."""
    from utils.train.trainer import SftTrainer

    flags = (*scripted(tmp_path), '--early_stop', '2', '--save_total_limit', '-1')
    whole = run_sft(*flags)
    original = SftTrainer.prediction_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, 'prediction_step', interrupted)
        stopped = run_sft(*flags, expect=143)
    (tmp_path / 'scripted.py').write_text(OWN.replace('[1, 3, 2, 3, 2, 9]', '[3]'))
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(stopped / 'checkpoint-4'))
    assert json.loads((resumed / 'run.json').read_text())['steps'] == 4
    assert json.loads((resumed / 'run.json').read_text())['ended_early'] is not None
    assert log_lines(resumed / 'checkpoint-4') == log_lines(whole / 'checkpoint-4')


def test_without_validation_rows_it_is_refused(run_sft: Run, problems: Problems, tmp_path: Path) -> None:
    run_sft('--early_stop', '2', '--dataset_test_ratio', '0', expect=2)
    message = (
        '--early_stop 2 needs validation rows, and none are held out. Raise --dataset_test_ratio (--stream_val_rows '
        'with --streaming true), or remove --early_stop.'
    )
    assert problems() == [message]
    rows = write_jsonl(tmp_path / 'rows.jsonl', [{'query': 'a', 'response': 'b'}] * 9)
    run_sft('--dataset', str(rows), '--streaming', 'true', '--stream_val_rows', '0', '--early_stop', '2', expect=2)
    assert problems() == [message, message]
    run_sft('--early_stop', '-1', expect=2)
    assert problems()[-1] == '--early_stop takes 0 or more, got -1.'

"""What the end of a run says: whether training helped, which checkpoint to use, and commands that work."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
from utils.run.outcome import Losses, mean_losses, says_whether_it_helped, use_commands

Run = Callable[..., Path]


def row(before: float | None, after: float | None, tokens: int = 1) -> dict[str, Any]:
    return {'origin': 'a', 'trained_tokens': tokens, 'loss_before': before, 'loss_after': after}


def test_the_losses_are_means_over_tokens_of_the_same_rows() -> None:
    rows = [row(4.0, 1.0, 3), row(2.0, 3.0), row(None, 9.0), row(9.0, None)]
    assert mean_losses(rows) == Losses(rows=2, before=3.5, after=1.5)
    assert mean_losses([row(None, 9.0)]) is None and mean_losses([]) is None


def test_the_end_says_the_validation_loss_before_and_after(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    run = run_sft('--compare_rows', '3')
    losses = mean_losses([json.loads(line) for line in (run / 'rows.jsonl').read_text().splitlines()])
    assert losses is not None and losses.after < losses.before
    said = f'loss of 3 of 4 validation rows: {losses.before:.4g} before training, {losses.after:.4g} after'
    last = json.loads((run / 'run.json').read_text())
    found = last['last_evaluation']['eval_loss']
    *_, best, line, use, chat = [record.getMessage() for record in caplog.records]
    assert line == said and best == f'best checkpoint: {run}/checkpoint-6 (validation loss {found:.4g})'
    assert use == f'next: python llm_infer.py --ckpt_dir {run}/checkpoint-6' and chat.startswith('chat: ')
    assert last['warnings'] == []
    page = (run / 'report.html').read_text()
    assert f'before and after training: {losses.before:.4g} and {losses.after:.4g} over all their tokens' in page


def test_a_loss_that_rose_is_a_warning_at_the_end_and_in_the_report(
    run_sft: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_sft('--learning_rate', '5', '--sft_type', 'full')
    (warning,) = json.loads((run / 'run.json').read_text())['warnings']
    assert warning.startswith('training made the model worse on the validation rows: their loss was ')
    assert warning.endswith('Lower --learning_rate (it was 5), or train fewer steps.')
    assert warning in [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert 'training made the model worse' in (run / 'report.html').read_text()


def test_without_validation_rows_nothing_says_whether_it_helped_and_no_command_fails(
    run_sft: Run, caplog: pytest.LogCaptureFixture, problems: Callable[[], list[str]]
) -> None:
    run = run_sft('--dataset_test_ratio', '0')
    losses = [e for e in json.loads((run / 'history.json').read_text()) if 'loss' in e]
    *_, last, line, chat = [record.getMessage() for record in caplog.records]
    assert last == f'last checkpoint: {run}/checkpoint-6'
    assert line == (
        'no rows were held out: nothing tells whether training helped. --dataset_test_ratio 0.01 holds out rows. '
        f'Training loss: {losses[0]["loss"]:.4g} at step 1, {losses[-1]["loss"]:.4g} at step 6'
    )
    assert chat == f'chat: python llm_infer.py --ckpt_dir {run}/checkpoint-6 --eval_human true'
    page = (run / 'report.html').read_text()
    assert f'--ckpt_dir {run}/checkpoint-6</pre>' not in page and '--eval_human true</pre>' in page

    words = shlex.split(chat.removeprefix('chat: python llm_infer.py').removesuffix('--eval_human true'))
    assert llm_infer.main(words) == 2 and problems()[-1].startswith('there are no validation rows to answer.')
    caplog.clear()
    assert llm_infer.main([*words, '--merge_lora_and_save', 'true']) == 0
    assert f'chat: python llm_infer.py --ckpt_dir {run}/checkpoint-6-merged --eval_human true' in caplog.text
    assert 'next: ' not in caplog.text


def test_a_training_loss_that_rose_is_a_warning_if_no_rows_are_held_out() -> None:
    flags = {'learning_rate': 5.0, 'streaming': True}
    history = [{'step': 1, 'loss': 2.0}, {'step': 9, 'loss': 3.1}]
    line, warning = says_whether_it_helped([], history, holds_out=False, flags=flags)
    assert '--stream_val_rows 100 holds out rows. Training loss: 2 at step 1, 3.1 at step 9' in line
    assert warning == 'the training loss rose from 2 at step 1 to 3.1 at step 9. Lower --learning_rate (it was 5).'
    assert says_whether_it_helped([], [*history, {'step': 10, 'loss': 2.9}], holds_out=False, flags=flags)[1] is None
    assert says_whether_it_helped([], [], holds_out=False, flags=flags)[0].endswith('holds out rows')


def test_a_run_that_measured_no_loss_before_says_so(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    generating = ('--predict_with_generate', 'true', '--max_new_tokens', '2', '--max_steps', '1', '--score', 'exact')
    run = run_sft(*generating)
    lines = [record.getMessage() for record in caplog.records]
    assert 'validation after training: exact 0, drift_kl ' in '\n'.join(lines)
    assert any(line.endswith('; before training, it was not measured') for line in lines)
    assert f'best checkpoint: {run}/checkpoint-1 (validation exact 0)' in lines


def test_an_older_run_without_counts_of_rows_gets_both_commands() -> None:
    assert list(use_commands('a b', {})) == ['next', 'chat']
    assert use_commands('a b', {})['next'] == "python llm_infer.py --ckpt_dir 'a b'"

"""The learning rate of each step against formulas written here, and the numbers of steps that follow from shares."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.support.runs import assert_equal, history, log_lines
from utils.base.checkpoint import all_checkpoints
from utils.cli.arguments import SftArguments
from utils.cli.parser import parse
from utils.cli.ranges import OPTIMIZERS, has_betas, has_epsilon, is_of_bitsandbytes
from utils.cli.schedule import step_counts
from utils.train.state import load_tree
from utils.train.trainer_args import make_schedule

Run = Callable[..., Path]
RATE = 0.01
KINDS = ('cosine', 'linear', 'polynomial', 'warmup_stable_decay')


def expected_rate(kind: str, step: int, *, steps: int, warmup: int, lowest: float, decay: int = 0) -> float:
    """Return the rate of a step, counted from 0. The step after the last one has the lowest rate."""
    if step < warmup:
        return RATE * (step + 1) / (warmup + 1)
    end = lowest * RATE
    if kind == 'warmup_stable_decay':
        done = max(0, step - (steps - decay)) / decay
    else:
        done = (step - warmup) / (steps - warmup)
    if kind in ('cosine', 'warmup_stable_decay'):
        return end + (RATE - end) * (1 + math.cos(math.pi * done)) / 2
    return RATE + (end - RATE) * done


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('lowest', [0.0, 0.1, 0.75])
@pytest.mark.parametrize('warmup', [0, 0.05, 0.99, 1, 5])
@pytest.mark.parametrize('steps', [1, 2, 7, 40])
def test_each_step_has_the_rate_of_the_formula(kind: str, lowest: float, warmup: float, steps: int) -> None:
    first = min(steps // 2, warmup if warmup >= 1 else math.ceil(warmup * steps))
    for share in (0.1, 0.5, 1.0) if kind == 'warmup_stable_decay' else (0.1,):
        decay = min(math.ceil(share * steps), steps - int(first))
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=RATE)
        schedule = make_schedule(
            optimizer, kind, learning_rate=RATE, warmup=warmup, steps=steps, min_lr_ratio=lowest, decay_ratio=share
        )
        rates = []
        for _ in range(steps + 1):
            rates.append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            schedule.step()
        wanted = [
            expected_rate(kind, step, steps=steps, warmup=int(first), lowest=lowest, decay=decay)
            for step in range(steps + 1)
        ]
        assert rates == pytest.approx(wanted, rel=1e-12, abs=1e-18)
        assert rates[steps] == lowest * RATE, 'the schedule ends exactly at the lowest rate'
        assert min(rates[:steps]) > 0


def test_a_schedule_without_a_lowest_rate_is_that_of_transformers() -> None:
    from transformers import get_scheduler

    for kind in ('cosine', 'linear', 'polynomial', 'cosine_with_restarts', 'inverse_sqrt', 'constant_with_warmup'):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=RATE)
        other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=RATE)
        (ours,) = make_schedule(optimizer, kind, learning_rate=RATE, warmup=3, steps=20).lr_lambdas
        (theirs,) = get_scheduler(kind, other, num_warmup_steps=3, num_training_steps=20).lr_lambdas
        assert [ours(step) for step in range(3, 21)] == [theirs(step) for step in range(3, 21)]


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_resumed_run_has_the_rates_of_the_formula_and_the_same_bits(kind: str, run_sft: Run) -> None:
    flags = ['--lr_scheduler_type', kind, '--min_lr_ratio', '0.2', '--warmup_steps', '2', '--max_steps', '7']
    flags += ['--adam_beta1', '0.8', '--adam_beta2', '0.95', '--adam_epsilon', '1e-6', '--save_total_limit', '-1']
    decay = 0
    if kind == 'warmup_stable_decay':
        flags += ['--decay_ratio', '0.4']
        decay = 3
    whole = run_sft(*flags)
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-7', whole / 'checkpoint-7')
    rates = [line['learning_rate'] for line in log_lines(resumed / 'checkpoint-7') if 'learning_rate' in line]
    wanted = [expected_rate(kind, step, steps=7, warmup=2, lowest=0.2, decay=decay) for step in range(7)]
    assert rates == pytest.approx(wanted, rel=1e-12)
    (group, *_) = load_tree(resumed / 'checkpoint-7' / 'optimizer.safetensors')['optimizer']['param_groups']
    assert (list(group['betas']), group['eps']) == ([0.8, 0.95], 1e-6)
    record = json.loads((resumed / 'sft_args.json').read_text())
    assert (record['adam_beta1'], record['adam_beta2'], record['adam_epsilon']) == (0.8, 0.95, 1e-6)


@pytest.mark.slow
def test_too_many_warmup_steps_are_limited_and_named(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    flags = ('--warmup_steps', '5', '--max_steps', '6', '--save_total_limit', '-1')
    run = run_sft(*flags)
    warning = (
        '--warmup_steps 5: the run has 6 steps, and at most half of them can be warm-up. 3 are used; give 3 or less.'
    )
    assert warning in caplog.text
    assert warning in json.loads((run / 'run.json').read_text())['warnings']
    record = json.loads((run / 'checkpoint-6' / 'sft_args.json').read_text())
    assert record['warmup_steps'] == 3 and record['asked']['warmup_steps'] == 5
    rates = [line['learning_rate'] for line in history(run, 6) if 'learning_rate' in line]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    caplog.clear()
    run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-3'))
    assert 'the run that is resumed had' not in caplog.text


@pytest.mark.slow
def test_shares_become_steps_that_are_recorded_and_resumed(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    flags = ['--max_steps', '7', '--eval_steps', '0.25', '--save_steps', '0.4', '--save_total_limit', '-1']
    whole = run_sft(*flags)
    assert [path.name for path in all_checkpoints(whole)] == ['checkpoint-4', 'checkpoint-7']
    assert [line['step'] for line in history(whole, 7) if 'eval_loss' in line] == [2, 4, 6, 7]
    record = json.loads((whole / 'checkpoint-4' / 'sft_args.json').read_text())
    assert (record['eval_steps'], record['save_steps'], record['warmup_steps']) == (2, 4, 1)
    assert record['asked'] | {'eval_steps': 0.25, 'save_steps': 0.4, 'warmup_steps': None} == record['asked']
    decisions = json.loads((whole / 'run.json').read_text())['decisions']
    assert 'eval_steps = 2 because --eval_steps is 0.25 of 7 steps' in decisions
    assert 'warmup_steps = 1 because --warmup_ratio is 0.05 of 7 steps' in decisions
    caplog.clear()
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-4'))
    assert 'the run that is resumed had' not in caplog.text
    assert_equal(resumed / 'checkpoint-7', whole / 'checkpoint-7')


@pytest.mark.slow
def test_a_share_of_a_streamed_run(run_sft: Run) -> None:
    run = run_sft('--streaming', 'true', '--stream_val_rows', '4', '--max_steps', '6', '--eval_steps', '0.5')
    assert [line['step'] for line in history(run, 6) if 'eval_loss' in line] == [3, 6]
    assert [path.name for path in all_checkpoints(run)] == ['checkpoint-3', 'checkpoint-6']


@pytest.mark.slow
def test_intervals_typed_on_resuming_are_used(run_sft: Run) -> None:
    run = run_sft('--eval_steps', '3', '--logging_steps', '3', '--save_total_limit', '-1')
    flags = ('--eval_steps', '2', '--logging_steps', '1', '--save_total_limit', '-1')
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-3'))
    assert [line['step'] for line in history(resumed, 6) if 'eval_loss' in line] == [3, 4, 6]
    assert [line['step'] for line in history(resumed, 6) if 'loss' in line] == [1, 3, 4, 5, 6]
    assert [path.name for path in all_checkpoints(resumed)] == ['checkpoint-4', 'checkpoint-6']


@pytest.mark.slow
def test_a_fraction_of_an_epoch_ends_within_it_and_resumes(run_sft: Run) -> None:
    half = run_sft('--max_steps', '-1', '--num_train_epochs', '0.5')
    assert json.loads((half / 'run.json').read_text())['steps'] == 5, 'half of 9 steps, rounded up'
    flags = ('--max_steps', '-1', '--num_train_epochs', '1.3', '--eval_steps', '6', '--save_total_limit', '-1')
    whole = run_sft(*flags)
    assert json.loads((whole / 'run.json').read_text())['steps'] == 12
    assert json.loads((whole / 'sft_args.json').read_text())['num_train_epochs'] == 1.3
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-6'))
    assert_equal(resumed / 'checkpoint-12', whole / 'checkpoint-12')


# (flags, steps): warm-up, decay, steps between evaluations and between checkpoints.
COUNTS: dict[tuple[tuple[str, Any], ...], tuple[int, tuple[int, int, int, int]]] = {
    (): (1000, (50, 0, 50, 50)),
    (('warmup_steps', 7), ('warmup_ratio', 0.5)): (1000, (7, 0, 50, 50)),
    (('warmup_steps', 0),): (1000, (0, 0, 50, 50)),
    (('lr_scheduler_type', 'constant'), ('warmup_steps', 9)): (1000, (0, 0, 50, 50)),
    (('lr_scheduler_type', 'warmup_stable_decay'),): (1000, (50, 100, 50, 50)),
    (('lr_scheduler_type', 'warmup_stable_decay'), ('decay_ratio', 1.0)): (10, (1, 9, 50, 50)),
    (('eval_steps', 0.1),): (15, (1, 0, 2, 2)),
    (('eval_steps', 0.1), ('save_steps', 0.2)): (15, (1, 0, 2, 4)),
    (('eval_steps', 4), ('save_steps', 0.5)): (20, (1, 0, 4, 12)),
    (('eval_steps', 0.001),): (15, (1, 0, 1, 1)),
}


@pytest.mark.parametrize('flags', COUNTS, ids=str)
def test_numbers_of_steps(flags: tuple[tuple[str, Any], ...]) -> None:
    steps, wanted = COUNTS[flags]
    counts = step_counts(SftArguments(**dict(flags)), steps, evaluates=True)
    assert (counts.warmup, counts.decay, counts.evaluation, counts.saving) == wanted
    assert counts.saving % counts.evaluation == 0 and not counts.warnings


def test_checkpoints_between_evaluations_are_named_once_the_steps_are_known() -> None:
    counts = step_counts(SftArguments(eval_steps=0.1, save_steps=5), 30, evaluates=True)
    assert counts.warnings == (
        '--save_steps 5 is not a multiple of --eval_steps 0.1 (3 steps): only the checkpoint of an evaluated step can '
        'become the best one.',
    )
    assert not step_counts(SftArguments(eval_steps=0.1, save_steps=5), 30, evaluates=False).warnings


def test_a_flag_typed_later_replaces_the_other_flag_of_the_warmup() -> None:
    def typed(argv: str, earlier: str = '') -> tuple[float, int | None, set[str]]:
        parsed = parse(SftArguments, argv.split(), program='x', about='', earlier=earlier.split())
        args = parsed.args
        return args.warmup_ratio, args.warmup_steps, set(parsed.typed)

    assert typed('--warmup_steps 5', '--warmup_ratio 0.1') == (0.05, 5, {'warmup_steps'})
    assert typed('--warmup_steps 5 -- --warmup_ratio 0.2') == (0.2, None, {'warmup_ratio'})
    assert typed('--warmup_steps 5 --warmup_ratio 0.2')[2] == {'warmup_steps', 'warmup_ratio'}


@pytest.mark.optional
def test_the_optimizers_with_betas_and_epsilon_are_those_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip('bitsandbytes')
    assert sum(map(is_of_bitsandbytes, OPTIMIZERS)) > 10
    for name in OPTIMIZERS:
        arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True)
        _, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        assert has_betas(name) == ('betas' in settings), name
        assert has_epsilon(name) == ('eps' in settings), name

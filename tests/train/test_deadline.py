"""--max_minutes with a clock that only training moves: the number of steps, the schedule, resuming and repeating."""

from __future__ import annotations

import json
import os
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_sft
from tests.support.runs import assert_equal, hashes, log_lines
from utils.base.checkpoint import all_checkpoints
from utils.run.open_model import open_model
from utils.train import deadline
from utils.train.deadline import Costs

pytestmark = pytest.mark.slow
Run = Callable[..., Path]
# 2 micro-batches are a step, and at most 60 steps. No evaluation is due before the last step.
FLAGS = (
    '--max_steps', '60', '--eval_steps', '100', '--report_samples', '0', '--group_by_length', 'false',
    '--lr_scheduler_type', 'linear', '--lora_dropout_p', '0.1',
)  # fmt: skip


class Clock:
    """A clock that training moves: `batch`, `evaluation` and `checkpoint` are the seconds of a micro-batch, etc."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.start = 0.0
        self.batch: Callable[[int], float] = lambda step: 0.5
        self.evaluation = 0.0
        self.checkpoint = 0.0
        self.seen: list[float] = []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock of the program. `start` seconds pass until the model is open."""
    from utils.train.checkpoints import Checkpoints
    from utils.train.trainer import SftTrainer

    fake = Clock()
    step, predict, write = SftTrainer.training_step, SftTrainer.prediction_step, Checkpoints.write
    opened = open_model

    def timed_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        fake.time += fake.batch(-1 if self.in_preflight else self.state.global_step)
        return step(self, *args, **kwargs)

    def timed_prediction(self: Any, *args: Any, **kwargs: Any) -> Any:
        fake.time += fake.evaluation
        return predict(self, *args, **kwargs)

    def timed_write(self: Any, *args: Any, **kwargs: Any) -> Any:
        fake.time += fake.checkpoint
        return write(self, *args, **kwargs)

    def timed_open(*args: Any, **kwargs: Any) -> Any:
        fake.time += fake.start
        return opened(*args, **kwargs)

    monkeypatch.setattr(deadline, 'now', lambda: fake.time)
    monkeypatch.setattr('utils.proofs.time_trial.now', lambda: fake.time)
    monkeypatch.setattr(llm_sft, 'time', types.SimpleNamespace(time=lambda: fake.time))
    monkeypatch.setattr('utils.run.open_model.open_model', timed_open)
    monkeypatch.setattr(SftTrainer, 'training_step', timed_step)
    monkeypatch.setattr(SftTrainer, 'prediction_step', timed_prediction)
    monkeypatch.setattr(Checkpoints, 'write', timed_write)
    return fake


def decided(run: Path) -> list[str]:
    decisions = json.loads((run / 'run.json').read_text())['decisions']
    return [line for line in decisions if line.startswith('max_steps')]


def steps_of(run: Path) -> int:
    return int(all_checkpoints(run)[-1].name.split('-')[1])


def rates(run: Path) -> list[float]:
    return [line['learning_rate'] for line in log_lines(all_checkpoints(run)[-1]) if 'learning_rate' in line]


def linear(steps: int) -> list[float]:
    """Return the rates of the linear schedule of --learning_rate 0.01 with --warmup_ratio 0.05."""
    warmup = -(-steps // 20)
    return [0.01 * ((k + 1) / (warmup + 1) if k < warmup else (steps - k) / (steps - warmup)) for k in range(steps)]


def test_the_count_of_steps_is_the_largest_that_fits() -> None:
    costs = Costs(step=2.0, evaluation=10.0, checkpoint=1.0, eval_steps=50, save_steps=100)
    # To step 100: 100 steps, 2 evaluations, 1 checkpoint. To step 101: one more of each, as the last step has both.
    assert costs.seconds(0, 100) == 221 and costs.seconds(0, 101) == 234
    assert costs.seconds(100, 101) == 13 and costs.seconds(99, 100) == 13
    assert costs.fitting(0, 1300, 221) == 100 == costs.fitting(0, 1300, 233.9)
    assert costs.fitting(0, 1300, 234) == 101
    assert costs.fitting(0, 90, 1000) == 90 and costs.fitting(0, 90, 12) == 0 and costs.fitting(40, 90, 1) == 40


def test_the_schedule_ends_on_time_with_its_rate_at_its_end(run_sft: Run, clock: Clock) -> None:
    """57 of 60 s are planned. The start takes 10, the trial 1 + 2, and the last checkpoint 2: 42 steps of 1 s."""
    clock.start = 10.0
    clock.checkpoint = 2.0
    run = run_sft(*FLAGS, '--max_minutes', '1', '--preflight', 'false')
    assert decided(run) == [
        'max_steps = 42 of 60 because --max_minutes is 1 and a step takes 1 s, a checkpoint 2 s (1 of them)'
    ]
    assert steps_of(run) == 42 and rates(run) == pytest.approx(linear(42))
    assert clock.time == 1057
    assert not (run / '.time_trial').exists()
    record = json.loads((run / 'sft_args.json').read_text())
    assert (record['max_steps'], record['asked']['max_steps']) == (42, 60)
    summary = log_lines(run / 'checkpoint-42')
    assert [line['step'] for line in summary if 'eval_loss' in line] == [42]


def test_evaluations_and_checkpoints_count(run_sft: Run, clock: Clock) -> None:
    """An evaluation is 2 batches of 3 s. The trial takes 2 + 6 + 2, so 47 s are left: 15 + 3 * (6 + 2) are 39."""
    clock.evaluation = 3.0
    clock.checkpoint = 2.0
    run = run_sft(*FLAGS, '--eval_steps', '5', '--max_minutes', '1', '--preflight', 'false', '--compare_rows', '0')
    assert decided(run) == [
        'max_steps = 15 of 60 because --max_minutes is 1 and a step takes 1 s, an evaluation 6 s (3 of them), '
        'a checkpoint 2 s (3 of them)'
    ]
    assert steps_of(run) == 15 and clock.time == 1049


def test_the_trial_changes_no_bit_and_all_steps_are_done_if_they_fit(run_sft: Run, clock: Clock) -> None:
    plain = run_sft(*FLAGS, '--max_steps', '6')
    timed = run_sft(*FLAGS, '--max_steps', '6', '--max_minutes', '60')
    assert decided(timed)[0].startswith('max_steps = 6 of 6 because --max_minutes is 60 and a step takes 1 s')
    assert log_lines(timed / 'checkpoint-6') == log_lines(plain / 'checkpoint-6')
    for name in ('adapter_model.safetensors', 'process_states.safetensors'):
        assert hashes(timed / 'checkpoint-6')[name] == hashes(plain / 'checkpoint-6')[name]


TIMED = ('--max_minutes', '1', '--preflight', 'false', '--save_total_limit', '-1')


def test_slower_steps_compress_the_rest_of_the_schedule(run_sft: Run, clock: Clock) -> None:
    """From step 11 on a step takes 2 s. The last step has the rate that step 55 of the planned schedule has."""
    clock.batch = lambda step: 0.5 if step < 10 else 1.0
    run = run_sft(*FLAGS, *TIMED)
    first, *later = decided(run)
    assert first == 'max_steps = 55 of 60 because --max_minutes is 1 and a step takes 1 s, a checkpoint 0 s (1 of them)'
    assert later[0] == (
        'max_steps = 53 of 60 because --max_minutes is 1 and steps are slower than planned: a step takes 1.1 s, '
        'a checkpoint 0 s (1 of them); the rest of the schedule is compressed'
    )
    assert steps_of(run) == 33 and clock.time == 1058
    found = rates(run)
    assert found[:13] == pytest.approx(linear(55)[:13])
    assert found[-1] == pytest.approx(linear(55)[-1])
    falling = found[3:]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == len(falling)
    timetable = json.loads((run / 'lock.json').read_text())['timetable']
    assert [part['end'] for part in timetable] == [55, 53, 48, 45, 43, 41, 39, 37, 35, 33]


def test_a_short_delay_changes_nothing(run_sft: Run, clock: Clock) -> None:
    """One step takes 1.4 s more than the others. The tolerance of a run of 60 s is 1.5 s."""
    clock.batch = lambda step: 1.2 if step == 10 else 0.5
    run = run_sft(*FLAGS, *TIMED)
    assert len(decided(run)) == 1 and steps_of(run) == 55


def test_a_run_whose_time_is_over_ends_at_the_step(
    run_sft: Run, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.batch = lambda step: 20.0 if step >= 5 else 0.5
    run = run_sft(*FLAGS, *TIMED)
    assert (
        '--max_minutes 1: the time is over, so training ends after step 7 of 16, before the learning rate reached the '
        'end of its schedule.'
    ) in caplog.text
    assert steps_of(run) == 7 and (run / 'report.html').is_file()
    assert [line['step'] for line in log_lines(run / 'checkpoint-7') if 'eval_loss' in line] == [7]


def test_the_end_of_a_timed_run_names_max_minutes(
    run_sft: Run, clock: Clock, problems: Callable[[], list[str]]
) -> None:
    clock.batch = lambda step: 20.0 if step >= 5 else 0.5
    run = run_sft(*FLAGS, *TIMED)
    run_sft(*FLAGS, *TIMED, '--resume_from_checkpoint', str(run / 'checkpoint-7'), expect=2)
    assert problems()[-1].endswith(
        'this run ends at step 7. The time of --max_minutes set this end. Remove --max_minutes to train more steps.'
    )


def test_a_resumed_run_keeps_the_schedule(run_sft: Run, clock: Clock) -> None:
    """Steps 10 to 19 are slow, so the schedule is compressed. The run is stopped after step 24 and resumed."""

    def slow(step: int) -> float:
        return 1.5 if 10 <= step < 20 else 0.5

    def stopping(step: int) -> float:
        if step == 23:
            os.kill(os.getpid(), signal.SIGTERM)
        return slow(step)

    clock.batch = slow
    whole = run_sft(*FLAGS, *TIMED)
    assert len(decided(whole)) > 1
    clock.batch = stopping
    stopped = run_sft(*FLAGS, *TIMED, expect=143)
    clock.batch = slow
    resumed = run_sft(*FLAGS, *TIMED, '--resume_from_checkpoint', str(stopped / 'checkpoint-24'))
    assert_equal(resumed / f'checkpoint-{steps_of(whole)}', whole / f'checkpoint-{steps_of(whole)}')
    (line,) = decided(resumed)
    assert line == f'max_steps = {steps_of(whole)} of 60 because it is the timetable of the resumed run (--max_minutes)'


def test_a_time_typed_on_resuming_compresses_what_is_left(
    run_sft: Run, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_sft(*FLAGS, '--save_steps', '20', '--save_total_limit', '-1')
    resumed = run_sft(
        *FLAGS, '--save_steps', '20', '--max_minutes', '0.4', '--resume_from_checkpoint', str(run / 'checkpoint-20'),
    )  # fmt: skip
    assert '--max_minutes is 0.4, the run that is resumed had None: the result will differ from it.' in caplog.text
    found = rates(resumed)
    assert 30 < len(found) < 45 and found[:20] == pytest.approx(linear(60)[:20])
    assert found[20] == pytest.approx(linear(60)[20]) and found[-1] == pytest.approx(linear(60)[-1])


def test_a_repeated_run_has_the_timetable_however_long_it_takes(run_sft: Run, clock: Clock) -> None:
    clock.batch = lambda step: 1.5 if 10 <= step < 20 else 0.5
    run = run_sft(*FLAGS, *TIMED)
    clock.batch = lambda step: 5.0
    before = set(run.parent.iterdir())
    assert llm_sft.main(['--from_run', str(run)]) == 0
    (repeated,) = set(run.parent.iterdir()) - before
    end = steps_of(run)
    assert_equal(repeated / f'checkpoint-{end}', run / f'checkpoint-{end}')
    assert decided(repeated) == [
        f'max_steps = {end} of 60 because it is the timetable of the repeated run (--max_minutes)'
    ]
    assert json.loads((repeated / 'lock.json').read_text()) == json.loads((run / 'lock.json').read_text())

    anew = run_sft(*FLAGS, '--from_run', str(run), *TIMED)
    assert decided(anew)[0].startswith('max_steps = 4 of 60 because --max_minutes is 1 and a step takes 10 s')


def test_a_stream_ends_on_time(run_sft: Run, clock: Clock) -> None:
    run = run_sft(*FLAGS, *TIMED, '--streaming', 'true', '--stream_val_rows', '4', '--dataset_test_ratio', '0')
    assert steps_of(run) == 55 and rates(run) == pytest.approx(linear(55))


def test_without_time_for_a_step_nothing_is_trained(
    run_sft: Run, clock: Clock, problems: Callable[[], list[str]]
) -> None:
    clock.start = 8.0
    run_sft(*FLAGS, '--max_minutes', '0.1', '--preflight', 'false', expect=2)
    # 8 s of the start, 1 s of the trial and 1 s for the step are 95 % of 0.1754 minutes.
    assert problems() == [
        '--max_minutes 0.1: no time is left for a step. The start took 9 s, and a step takes 1 s, a checkpoint 0 s '
        '(1 of them). Give at least --max_minutes 0.2.'
    ]


@pytest.mark.parametrize('value', ['0', '-1', 'nan', 'inf'])
def test_only_a_time_above_zero_is_taken(value: str, run_sft: Run, problems: Callable[[], list[str]]) -> None:
    run_sft(f'--max_minutes={value}', expect=2)
    assert problems() == [f'--max_minutes takes a number above 0, got {float(value)}.']

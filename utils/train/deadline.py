"""--max_minutes: chooses the number of steps from measured times, and ends the run earlier if steps become slower."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.files import write_json
from utils.base.logger import logger
from utils.base.names import LOCK_JSON
from utils.train.callbacks import StepIntervals

if TYPE_CHECKING:
    from utils.train.trainer import SftTrainer

# Training is planned to end after this share of the time. The rest is for the answers and the report at the end of the
# run, and for steps that are slower than the measured ones.
PLANNED_SHARE = 0.95
# The run is shortened only if it would end after this share of the time, so that small differences change nothing.
_TOLERATED_SHARE = 0.975
# A step time is the mean of the last _WINDOW steps without the slowest of them. With fewer than _ENOUGH steps, the time
# of the trial is used.
_WINDOW = 20
_ENOUGH = 3


def now() -> float:
    """Return the time in seconds, as time.time does. Tests replace this clock."""
    return time.time()


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The seconds that a step, an evaluation and a checkpoint take, and the intervals of evaluations and checkpoints.

    An interval is a number of steps.
    """

    step: float
    evaluation: float
    checkpoint: float
    eval_steps: int
    save_steps: int

    def seconds(self, done: int, end: int) -> float:
        """Return the seconds that the run still needs after step `done`, if it ends after step `end`."""
        evaluations = _count_left(done, end, self.eval_steps)
        checkpoints = _count_left(done, end, self.save_steps)
        return (end - done) * self.step + evaluations * self.evaluation + checkpoints * self.checkpoint

    def fitting(self, done: int, most: int, seconds: float) -> int:
        """Return the last step that the run can complete in `seconds`, together with its evaluations and checkpoints.

        `done` steps are already complete. The result is at most `most`.
        """
        low = done
        high = most
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(done, middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def told(self, done: int, end: int) -> str:
        """Return a text with the measured times, and the numbers of evaluations and checkpoints that are still to come.

        These are the evaluations and checkpoints after step `done` in a run that ends after step `end`.
        """
        text = f'a step takes {self.step:.3g} s'
        if self.evaluation:
            text += f', an evaluation {self.evaluation:.3g} s ({_count_left(done, end, self.eval_steps)} of them)'
        return text + f', a checkpoint {self.checkpoint:.3g} s ({_count_left(done, end, self.save_steps)} of them)'


def _count_left(done: int, end: int, every: int) -> int:
    """Return how many evaluations or checkpoints come after step `done`.

    There is one at each multiple of `every`, and one at the last step, which is `end`.
    """
    return -(-end // every) - done // every


class Deadline(TrainerCallback):
    """Ends a run within the time of --max_minutes. It does nothing until `set` is called.

    It sets the timetable of the run: the last step, and the position of each step in the learning-rate schedule.
    Process 0 measures the times and decides. All processes get the decision together with the loss of the step
    (Guard.judge), so they apply it at the same step.
    """

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer
        self.minutes: float | None = None
        # The number of steps that the flags ask for. It is 0 before the training.
        self.asked = 0
        # The last step of the run as all processes know it. It is 0 if nothing is to be changed.
        self.agreed = 0
        self._started = 0.0
        self._is_repeated = False
        self._trial: Costs | None = None
        self._steps: deque[float] = deque(maxlen=_WINDOW)
        self._evaluation: float | None = None
        self._checkpoint: float | None = None
        self._mark: float | None = None

    def set(self, minutes: float, *, started: float, repeated: list[dict[str, Any]] | None) -> None:
        """Limit the run to `minutes`. They are counted from `started`, the time.time() at the start of the program.

        If this run repeats an earlier run, `repeated` is the timetable in lock.json of the earlier run. Both runs then
        take the same steps, however long these take.
        """
        self.minutes = minutes
        self._started = started
        if repeated:
            self._is_repeated = True
            self.trainer.timetable.restore(repeated)

    def left(self, share: float) -> float:
        """Return the seconds until a share of the time limit has passed. The share is from 0 to 1."""
        assert self.minutes is not None, 'it is set'
        return self._started + share * self.minutes * 60 - now()

    def restore(self, stored: list[dict[str, Any]] | None) -> None:
        """Use the timetable `stored`, which was saved in the checkpoint from which this run resumes.

        Does nothing without --max_minutes. If this run repeats an earlier run, `stored` is ignored, and this run keeps
        the timetable of the earlier run.
        """
        # If this run repeats an earlier run, `set` has already set the timetable.
        if stored and self.minutes is not None and not self._is_repeated:
            self.trainer.timetable.restore(stored)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the last step of the run, if it resumes or repeats a run that has a timetable.

        Without a timetable, `plan` chooses the last step later from measured times.
        """
        self.asked = state.max_steps
        timetable = self.trainer.timetable
        if self.minutes is None or not timetable.segments:
            return
        earlier = 'repeated' if self._is_repeated else 'resumed'
        self._end_at(min(timetable.end, self.asked), f'it is the timetable of the {earlier} run (--max_minutes)')

    def plan(self, costs: Costs) -> None:
        """Choose the last step from the measured times. Raises ConfigError if there is no time for one more step."""
        state = self.trainer.state
        done = state.global_step
        self._trial = costs
        left = self.left(PLANNED_SHARE)
        end: int = dist.from_all(costs.fitting(done, self.asked, left))[0]
        if end <= done:
            used = self.left(1)
            assert self.minutes is not None, 'it is set'
            needed = (self.minutes * 60 - used + costs.seconds(done, done + 1)) / PLANNED_SHARE / 60
            raise ConfigError(
                f'--max_minutes {self.minutes:g}: no time is left for a step. The start took '
                f'{self.minutes * 60 - used:.0f} s, and {costs.told(done, done + 1)}. Give at least --max_minutes '
                f'{needed + 0.05:.1f}.'
            )

        if done == 0:
            self.trainer.timetable.plan(end)
        else:
            self.trainer.timetable.shorten(steps=self.asked, done=done, end=end)
        self._end_at(end, f'--max_minutes is {self.minutes:g} and {costs.told(done, end)}')

    def _end_at(self, end: int, reason: str) -> None:
        """Set the last step of the run.

        The step is logged with the reason and stored in sft_args.json. The timetable is written to lock.json.
        """
        trainer = self.trainer
        state = trainer.state
        state.max_steps = end
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, StepIntervals):
                callback.set_intervals(trainer.args, state)
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.total = end

        run = trainer.checkpoints.run
        run.decide('max_steps', end, reason, shown=f'{end} of {self.asked}')
        run.lock['timetable'] = trainer.timetable.state()
        if dist.is_main():
            write_json(Path(run.folder) / LOCK_JSON, run.lock)

    def proposal(self) -> int:
        """Return a new, earlier last step for the run, or 0 to keep the planned last step.

        Only process 0 decides, and all other processes return 0. So the sum over all processes is the value of
        process 0.
        """
        trainer = self.trainer
        if self.minutes is None or self._is_repeated or trainer.in_preflight or not dist.is_main():
            return 0
        state = trainer.state
        costs = self._costs()
        # The current step is almost complete, so its time is not needed any more.
        if costs.seconds(state.global_step, state.max_steps) - costs.step <= self.left(_TOLERATED_SHARE):
            return 0
        done = int(state.global_step)
        return max(costs.fitting(done, state.max_steps, self.left(PLANNED_SHARE) + costs.step), done + 1)

    def _costs(self) -> Costs:
        """Return the latest measured times.

        A time that was not measured yet is taken from the trial. Without a trial, it is 0.
        """
        state = self.trainer.state
        trial = self._trial
        step = trial.step if trial is not None else 0.0
        if len(self._steps) >= _ENOUGH:
            step = statistics.fmean(sorted(self._steps)[:-1])
        evaluates = self.trainer.eval_dataset is not None
        return Costs(
            step=step,
            evaluation=_latest(self._evaluation, trial.evaluation if trial else 0.0) if evaluates else 0.0,
            checkpoint=_latest(self._checkpoint, trial.checkpoint if trial else 0.0),
            eval_steps=int(state.eval_steps),
            save_steps=int(state.save_steps),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure the time of the step. If the processes agreed on an earlier end, shorten the schedule.

        Returns the control.
        """
        if self.minutes is None:
            return control
        if self._mark is not None:
            self._steps.append(now() - self._mark)
        self._mark = now()

        # A signal ends the run anyway. The resumed run measures again.
        if self.agreed and self.agreed < state.max_steps and not self.trainer.stop_agreed:
            self._shorten(state, control)
        return control

    def _shorten(self, state: TrainerState, control: TrainerControl) -> None:
        end = self.agreed
        planned = state.max_steps
        timetable = self.trainer.timetable
        steps = timetable.segments[0].steps if timetable.segments else self.asked
        if end == state.global_step:
            logger.warning(
                f'--max_minutes {self.minutes:g}: the time is over, so training ends after step {end} of {planned}, '
                'before the learning rate reached the end of its schedule.'
            )
            control.should_training_stop = True
            control.should_save = True

        timetable.shorten(steps=steps, done=state.global_step, end=end)
        reason = f'--max_minutes is {self.minutes:g} and steps are slower than planned: {self._told(state, end)}'
        self._end_at(end, reason)

    def _told(self, state: TrainerState, end: int) -> str:
        # Only process 0 logs the decision, and only its times were used.
        costs = self._costs()
        return f'{costs.told(state.global_step, end)}; the rest of the schedule is compressed'

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Store how many seconds the evaluation took, counted from the end of the last step.

        Nothing is stored for an evaluation before the first step.
        """
        self._evaluation = self._lap(self._evaluation)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Store how many seconds the checkpoint took, counted from the end of the last step or evaluation."""
        self._checkpoint = self._lap(self._checkpoint)

    def _lap(self, before: float | None) -> float | None:
        mark = self._mark
        self._mark = now()
        return before if mark is None else self._mark - mark


def _latest(measured: float | None, trial: float) -> float:
    return trial if measured is None else measured

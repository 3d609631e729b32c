"""--from_run RUN --verify true: repeats the first steps of a run, and compares log lines and weights bit by bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base import dist
from utils.base.checkpoint import MANIFEST, all_checkpoints, last_checkpoint
from utils.base.errors import ConfigError, Stopped
from utils.base.files import read_json
from utils.cli.arguments import SftArguments
from utils.run.folder import Run
from utils.run.lock import changes_since, read_lock
from utils.run.read_back import HISTORY_JSON
from utils.run.record import changed_flags, read_run_record
from utils.train.trainer import SftTrainer

# Differences below this share of a value are called rounding.
_ROUNDING = 1e-4
# Line of a log: its step and whether an evaluation wrote it.
Key = tuple[int, bool]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first value that differs between this run and the run in --from_run.

    `what` is the name of the value in messages. `now` is the value in this run, and `then` in the run in --from_run.
    """

    step: int
    what: str
    now: Any
    then: Any

    def size(self) -> float | None:
        """Return the difference as a share of the larger value, or None if the values are not numbers."""
        numbers = [value for value in (self.now, self.then) if isinstance(value, int | float)]
        if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
            return None
        now, then = map(float, numbers)
        return abs(now - then) / max(abs(now), abs(then))


def verify(trainer: SftTrainer, args: SftArguments, run: Run, *, steps: int) -> int:
    """Repeat about `steps` steps of the run in --from_run, print the result, and return the exit code.

    The repetition ends at the first value that differs. If all values are equal, it ends at the last step with a log
    line among the first `steps` steps. If none of these steps has a log line, it ends at the first later step with one.

    The exit code is 0 if all values are equal, and 1 if a value differs. Raises ConfigError if the run has no log
    lines, and Stopped if a signal ends the repetition.
    """
    repeated = Path(str(args.from_run))
    repetition = Repetition(trainer, repeated, steps)
    trainer.add_callback(repetition)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.stopped:
        raise Stopped(
            f'stopped after step {trainer.state.global_step}: the verification is not complete.',
            signum=trainer.signals.signum or 15,
        )

    difference = repetition.result()
    if dist.is_main():
        causes = _causes(repeated, run)
        lines = repetition.told_equal(causes) if difference is None else repetition.told(difference, causes)
        print('\n'.join(lines))
    return int(difference is not None)


class Repetition(TrainerCallback):
    """Compares log lines and checkpoints with those of the run in --from_run. Ends training at the first difference."""

    def __init__(self, trainer: SftTrainer, run_dir: Path, steps: int) -> None:
        self.trainer = trainer
        self.run_dir = run_dir
        self.steps = steps
        self.difference: Difference | None = None
        # The last step that is repeated. It has a log line.
        self.stop = 0
        self.lines: dict[Key, dict[str, Any]] = {}
        self.seen: set[Key] = set()
        self.weights: list[str] = []
        self._kept = [int(path.name.split('-')[1]) for path in all_checkpoints(run_dir)]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the log lines of the run in --from_run, and choose the last step to repeat.

        Raises ConfigError if there is no log line to compare with.
        """
        first = state.global_step
        lines = dist.from_all(_log_lines(self.run_dir) if dist.is_main() else [])[0]
        known = {_key(line): line for line in lines if line['step'] > first}
        if not known:
            raise ConfigError(
                f'--from_run {self.run_dir}: the run has no log line after step {first} to compare with. Give a run '
                f'that has {HISTORY_JSON} or a checkpoint.'
            )
        logged = [step for step, _ in known]
        self.stop = max((step for step in logged if step <= first + self.steps), default=min(logged))
        self.lines = {key: line for key, line in known.items() if key[0] <= self.stop}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save a checkpoint if the run in --from_run has one of this step, and stop after the last step."""
        control.should_save = state.global_step in self._kept
        if state.global_step >= self.stop:
            control.should_training_stop = True
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Compare the latest log line with that of the run in --from_run. Returns the control."""
        line = state.log_history[-1]
        key = _key(line)
        if _is_summary(line) or key not in self.lines:
            return control

        self.seen.add(key)
        names = sorted({*line, *self.lines[key]}, key=lambda name: (name != 'learning_rate', name != 'loss', name))
        for name in names:
            now = line.get(name)
            then = self.lines[key].get(name)
            if _is_compared(name) and now != then:
                self._end(control, Difference(step=state.global_step, what=name, now=now, then=then))
                break
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Compare the sha256 of the weights with those of the run in --from_run. Returns the control."""
        name = f'checkpoint-{state.global_step}'
        now, then = dist.from_all(
            [_weights(Path(folder) / name) for folder in (args.output_dir, self.run_dir)] if dist.is_main() else []
        )[0]
        changed = [file for file in sorted({*now, *then}) if now.get(file) != then.get(file)]
        if changed:
            what = f'the sha256 of {name}/{changed[0]}'
            shown = Difference(step=state.global_step, what=what, now=now.get(changed[0]), then=then.get(changed[0]))
            self._end(control, shown)
        else:
            self.weights.append(name)
        return control

    def _end(self, control: TrainerControl, difference: Difference) -> None:
        if self.difference is None:
            self.difference = difference
        control.should_training_stop = True
        control.should_evaluate = False
        control.should_save = False

    def result(self) -> Difference | None:
        """Return the first difference, or None if all values are equal."""
        absent = [key for key in self.lines if key not in self.seen]
        if self.difference is None and absent:
            step, is_evaluation = min(absent)
            what = 'the evaluation' if is_evaluation else 'the log line'
            return Difference(step=step, what=what, now=None, then='logged')
        return self.difference

    def told_equal(self, causes: Sequence[str]) -> list[str]:
        """Return the lines to print if all values of the two runs are equal.

        `causes` has a line for each flag, version and machine property that differs between the runs. The returned
        lines say that these differences had no effect.
        """
        evaluations = sum(is_evaluation for _, is_evaluation in self.lines)
        found = [
            f'log lines (loss, gradient norm, learning rate): {len(self.lines) - evaluations}',
            f'evaluations: {evaluations}',
            f'checkpoints (sha256 of the weights): {len(self.weights)}',
        ]
        lines = [f'equal to the bit up to step {self.stop} of {self.run_dir}', *found]
        return lines + [f'this differs and has no effect: {cause}' for cause in causes]

    def told(self, difference: Difference, causes: Sequence[str]) -> list[str]:
        """Return the lines to print if a value of the two runs differs.

        `causes` has a line for each flag, version and machine property that differs between the runs. The returned
        lines name these differences as likely causes.
        """
        equal = max((step for step, _ in self.seen if step < difference.step), default=None)
        before = 'it is the first log line' if equal is None else f'all is equal up to step {equal}'
        lines = [
            f'different at step {difference.step} ({before}): {difference.what} is {difference.now}, and '
            f'{self.run_dir} has {difference.then}'
        ]
        size = difference.size()
        if size is not None:
            lines.append(f'size of the difference: {size:.2g} of the value')
        if causes:
            return [*lines, *(f'likely cause: {cause}' for cause in causes)]

        if size is not None and size < _ROUNDING:
            guess = 'rounding, for example in a GPU kernel that is not deterministic'
        else:
            guess = 'another order of the rows, another random state, or edited files of the toolkit or its libraries'
        return [*lines, f'likely cause: {guess}. Flags, data, weights, versions and machine are those of the run.']


def _causes(repeated: Path, run: Run) -> list[str]:
    """Return a line for each flag, version and property of the machine that differs between the two runs.

    A different number of processes has a line too.
    """
    flags = changed_flags(read_run_record(repeated), run.record)
    causes = [f'--{name} is {now}, the repeated run had {then}' for name, now, then in flags]
    earlier = read_lock(repeated)
    if earlier['processes'] != run.lock['processes']:
        causes.append(f'{run.lock["processes"]} processes train, the repeated run had {earlier["processes"]}')
    return causes + changes_since(earlier, run.lock)


def _log_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return the log lines of a run, without the summary at its end.

    If the run did not end, the log lines in its last checkpoint are returned.
    """
    if (run_dir / HISTORY_JSON).is_file():
        lines: list[dict[str, Any]] = read_json(run_dir / HISTORY_JSON, list, keys={'step': int})
    else:
        checkpoint = last_checkpoint(run_dir)
        keys = {'log_history': [{'step': int}]}
        lines = read_json(checkpoint / 'trainer_state.json', keys=keys)['log_history'] if checkpoint else []
    return [line for line in lines if not _is_summary(line)]


def _key(line: dict[str, Any]) -> Key:
    return line['step'], any(name.startswith('eval_') for name in line)


def _is_summary(line: dict[str, Any]) -> bool:
    """Return whether a line is the summary that the trainer logs at the end of the training."""
    return 'train_runtime' in line


def _is_compared(name: str) -> bool:
    """Return False for a time or a speed in a log line, because they always differ, and True for all other values."""
    return not ('runtime' in name or 'per_second' in name)


def _weights(checkpoint: Path) -> dict[str, str]:
    """Return the sha256 of each file with weights of a checkpoint, from its manifest."""
    content = read_json(checkpoint / MANIFEST, keys={'files': {'*': {'sha256': str}}})['files']
    prefixes = ('model', 'adapter_model')
    return {name: entry['sha256'] for name, entry in content.items() if name.startswith(prefixes)}

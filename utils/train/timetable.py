"""The steps that a run takes under --max_minutes, and the position of each step in the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

# Returns a schedule that is made for a number of steps.
MakeSchedule = Callable[[int], LambdaLR]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a run in which the learning-rate schedule advances at a constant pace.

    For example, a run and its schedule have 100 steps. After 40 steps, the run turns out to be too slow, and must end
    after step 70. So the other 60 steps of the schedule are spread over 30 steps of the run:

        Segment(steps=100, first=40, position=40.0, last=69, end=70)

    - `steps`: the number of steps of the schedule.
    - `first`: how many steps of the run are complete when the segment begins.
    - `position`: the step of the schedule at which the segment begins. It can be fractional.
    - `last`: how many steps of the run are complete when the last step of the run begins.
    - `end`: the number of the last step of the run, counted from 1.

    The last step of the run has the learning rate of the last step of the schedule.

    `last` is `end` - 1 if the optimizer has skipped no steps. With fp16, the optimizer can skip steps. `end` counts the
    skipped steps, but `first` and `last` do not.
    """

    steps: int
    first: int
    position: float
    last: int
    end: int

    def at(self, count: int) -> float:
        """Return the position in the schedule after `count` optimizer steps.

        It is a number from 0 to `steps`, and can be fractional.
        """
        if self.last <= self.first:
            return float(self.steps - 1)
        pace = (self.steps - 1 - self.position) / (self.last - self.first)
        return min(self.position + (count - self.first) * pace, float(self.steps))


class Timetable:
    """Says at which step of the learning-rate schedule each step of a run is. Used for --max_minutes.

    It is a list of Segment objects. `plan` makes the first segment. `shorten` adds a segment that ends the run earlier.
    While the list is empty, the learning-rate schedule is not changed.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._schedule: LambdaLR | None = None
        self._make: MakeSchedule | None = None

    @property
    def end(self) -> int:
        """Return the number of the last step of the run."""
        return self.segments[-1].end

    def follow(self, schedule: LambdaLR, make: MakeSchedule) -> None:
        """Change `schedule` in place, so that it follows the segments. `make(n)` returns the schedule for n steps.

        The segments can be set before or after this call.
        """
        self._schedule = schedule
        self._make = make
        if self.segments:
            self._use()

    def plan(self, steps: int) -> None:
        """Plan a new run: it takes `steps` steps, and its schedule is made for this number of steps."""
        self.segments = [Segment(steps=steps, first=0, position=0.0, last=steps - 1, end=steps)]
        self._use()

    def shorten(self, *, steps: int, done: int, end: int) -> None:
        """End the run after step `end`, and go through the rest of the schedule faster.

        The schedule was made for `steps` steps, and `done` steps are complete. Step `end` gets the learning rate of the
        last step of the schedule.
        """
        assert self._schedule is not None, 'training has begun'
        count = self._schedule.last_epoch
        position = self._position(count) if self.segments else float(count)
        last = count + end - done - 1
        self.segments.append(Segment(steps=steps, first=count, position=position, last=last, end=end))
        self._use()

    def state(self) -> list[dict[str, Any]]:
        """Return the segments as dictionaries, for a checkpoint and for lock.json."""
        return [asdict(segment) for segment in self.segments]

    def restore(self, stored: list[dict[str, Any]]) -> None:
        """Replace the segments by `stored`, a list that `state()` returned earlier."""
        self.segments = [Segment(**segment) for segment in stored]
        if self._schedule is not None:
            self._use()

    def _position(self, count: int) -> float:
        segment = next(s for s in reversed(self.segments) if s.first <= count)
        return segment.at(count)

    def _use(self) -> None:
        """Apply the segments to the learning-rate schedule, and set the learning rate of the next step.

        From now on, the learning rate after n optimizer steps is the one that the original schedule has after
        `self._position(n)` steps.
        """
        schedule = self._schedule
        assert schedule is not None and self._make is not None, 'training has begun'
        functions: list[Any] = self._make(self.segments[0].steps).lr_lambdas
        share = functions[0]
        schedule.lr_lambdas = [lambda count: share(self._position(count))] * len(schedule.lr_lambdas)

        factor = share(self._position(schedule.last_epoch))
        rates = [base * factor for base in schedule.base_lrs]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group['lr'] = rate
        schedule._last_lr = rates

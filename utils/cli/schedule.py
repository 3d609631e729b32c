"""Computes numbers of steps (warm-up, decay, between evaluations) from the flags and the total number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.cli.arguments import SftArguments

# Schedules that can end at --min_lr_ratio.
ENDS_AT_A_RATIO = ('cosine', 'linear', 'polynomial', 'warmup_stable_decay')
STABLE_DECAY = 'warmup_stable_decay'


def count_warmup_steps(asked: float, steps: int) -> int:
    """Return the number of warm-up steps, which is at most half of all steps.

    If `asked` is below 1, it is a share of all steps, and the product is rounded up. Otherwise it is a number of steps.
    """
    wanted = math.ceil(asked * steps) if asked < 1 else int(asked)
    return min(wanted, steps // 2)


def count_decay_steps(share: float, steps: int, *, warmup: int) -> int:
    """Return the number of decay steps: `share` of all steps, rounded up, but at most the steps after the warm-up."""
    return min(math.ceil(share * steps), steps - warmup)


def count_interval(asked: float, steps: int) -> int:
    """Return the number of steps between two evaluations or checkpoints, by the rule of transformers.

    If `asked` is below 1, it is a share of all steps, and the product is rounded up. Otherwise it is a number of steps.
    """
    return math.ceil(asked * steps) if asked < 1 else int(asked)


def warmup_asked(args: SftArguments) -> float:
    """Return the warm-up that the flags ask for: 0, a share of the steps (below 1), or a number of steps."""
    if args.lr_scheduler_type == 'constant':
        return 0
    return args.warmup_ratio if args.warmup_steps is None else args.warmup_steps


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """The steps of a run: all steps, warm-up and decay, and the steps between evaluations and between checkpoints."""

    steps: int
    warmup: int
    # 0 for schedules other than warmup_stable_decay.
    decay: int
    # 0 for a run without evaluations.
    evaluation: int
    saving: int
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the counts as one line for the user."""
        parts = [f'{self.warmup} of {self.steps} steps are warm-up']
        if self.decay:
            parts.append(f'{self.decay} at the end are decay')
        if self.evaluation:
            parts.append(f'evaluations every {self.evaluation} steps and at the end')
        parts.append(f'checkpoints every {self.saving} steps and at the end')
        return ', '.join(parts)


def step_counts(args: SftArguments, steps: int, *, evaluates: bool) -> StepCounts:
    """Return the counts for a run of `steps` optimizer steps, with a warning for each flag that does not fit `steps`.

    If `evaluates` is False, the run has no evaluations, and the number of steps between evaluations is 0.
    """
    warnings = []
    asked = warmup_asked(args)
    warmup = count_warmup_steps(asked, steps)
    if asked >= 1 and asked > warmup:
        warnings.append(
            f'--warmup_steps {asked}: the run has {steps} steps, and at most half of them can be warm-up. '
            f'{warmup} are used; give {warmup} or less.'
        )

    save_asked = args.eval_steps if args.save_steps is None else args.save_steps
    evaluation = count_interval(args.eval_steps, steps) if evaluates else 0
    saving = count_interval(save_asked, steps)
    if evaluates and saving % evaluation:
        if save_asked < 1:
            saving += evaluation - saving % evaluation
        elif args.eval_steps < 1:
            warnings.append(not_a_multiple(saving, f'{args.eval_steps} ({evaluation} steps)'))

    is_decay = args.lr_scheduler_type == STABLE_DECAY
    return StepCounts(
        steps=steps,
        warmup=warmup,
        decay=count_decay_steps(args.decay_ratio, steps, warmup=warmup) if is_decay else 0,
        evaluation=evaluation,
        saving=saving,
        warnings=tuple(warnings),
    )


def not_a_multiple(save_steps: float, eval_steps: object) -> str:
    """Return the warning that some checkpoints are saved at steps without an evaluation."""
    return (
        f'--save_steps {save_steps} is not a multiple of --eval_steps {eval_steps}: '
        'only the checkpoint of an evaluated step can become the best one.'
    )

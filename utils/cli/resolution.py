"""A resolved command line: its arguments, its problems, and the reason for each automatic decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from utils.base.errors import Problems
from utils.base.logger import logger
from utils.cli.arguments import CommonArguments
from utils.formats.reading import Reading, read_columns
from utils.loading.info import ModelInfo

ArgumentsT = TypeVar('ArgumentsT', bound=CommonArguments)


@dataclass(kw_only=True)
class Decided(Generic[ArgumentsT]):
    """The arguments, the names of the typed flags, the automatic decisions with their reasons, and the warnings."""

    args: ArgumentsT
    typed: frozenset[str]
    decisions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def decide(self, name: str, value: Any, reason: str) -> None:
        """Set the argument `name` to `value`, and add this decision with its reason to `decisions`."""
        setattr(self.args, name, value)
        self.decisions.append(decision(name, value, reason))


@dataclass(kw_only=True)
class Ready(Decided[ArgumentsT]):
    """A command line that was checked and has no problems. A program can run with it."""

    info: ModelInfo


@dataclass(kw_only=True)
class Resolution(Decided[ArgumentsT]):
    """A command line that is being resolved, with the problems found so far.

    `info` is None until the model is known.
    """

    info: ModelInfo | None = None
    problems: Problems = field(default_factory=Problems)

    def checked(self) -> Ready[ArgumentsT]:
        """Return this command line as Ready. Raises ConfigError with all problems if there are any."""
        self.problems.raise_if_any()
        assert self.info is not None, 'an unknown model is a problem'
        return Ready(
            args=self.args,
            typed=self.typed,
            info=self.info,
            decisions=self.decisions,
            warnings=self.warnings,
        )

    def without_effect(self, names: tuple[str, ...], reason: str) -> None:
        """For each flag of `names` that was typed, add a warning that the flag has no effect, with the reason."""
        self.warnings += [f'--{name} has no effect: {reason}.' for name in names if name in self.typed]


# The type of a function that records a decision. Its parameters are the name of the argument, the value and the reason.
Decide = Callable[[str, Any, str], None]


def decision(name: str, value: Any, reason: str) -> str:
    """Return the log line of an automatic decision: 'name = value because reason'."""
    return f'{name} = {_shown(value)} because {reason}'


def log_decision(name: str, value: Any, reason: str) -> None:
    """Log an automatic decision. The decision is only logged and is not stored in a run folder."""
    logger.info(decision(name, value, reason))


def _shown(value: Any) -> str:
    """Return a value as the user would type it."""
    if isinstance(value, list):
        return ','.join(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def reading_of(args: CommonArguments) -> Reading:
    """Return the settings for reading data files, from --columns and --text_rows."""
    return Reading(columns=read_columns(args.columns or ())[0], text_rows=args.text_rows)


def run_name(args: CommonArguments) -> str:
    """Return the name of the folder in which the runs of a model are stored.

    It is the model type. For a model without a model type, it is the last part of the model's path or hub id, in lower
    case.
    """
    return args.model_type or Path(str(args.model_id_or_path)).resolve().name.lower()

"""What resolving a command line yields: arguments ready for use, and the reason for each automatic decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from utils.base.errors import Problems
from utils.base.logger import logger
from utils.cli.arguments import CommonArguments
from utils.loading.info import ModelInfo

ArgumentsT = TypeVar('ArgumentsT', bound=CommonArguments)


@dataclass(kw_only=True)
class Resolution(Generic[ArgumentsT]):
    """Arguments ready for use, the model's entry, and each automatic decision with its reason."""

    args: ArgumentsT
    typed: frozenset[str]
    info: ModelInfo | None = None
    decisions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)

    def decide(self, name: str, value: Any, reason: str) -> None:
        """Set an argument and record why it has this value."""
        setattr(self.args, name, value)
        self.decisions.append(decision(name, value, reason))

    def without_effect(self, names: tuple[str, ...], reason: str) -> None:
        """Warn about each of these flags that was typed."""
        self.warnings += [f'--{name} has no effect: {reason}.' for name in names if name in self.typed]


# Takes an argument's name, the value it is used with, and the reason.
Decide = Callable[[str, Any, str], None]


def decision(name: str, value: Any, reason: str) -> str:
    """Return the line that tells of an automatic decision."""
    return f'{name} = {_shown(value)} because {reason}'


def log_decision(name: str, value: Any, reason: str) -> None:
    """Log a decision where no run is there to keep it."""
    logger.info(decision(name, value, reason))


def _shown(value: Any) -> str:
    return ','.join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def run_name(args: CommonArguments) -> str:
    """Return the name a run's folder is filed under: the model type, or the last part of the path or id."""
    return args.model_type or Path(str(args.model_id_or_path)).resolve().name.lower()

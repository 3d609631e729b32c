"""What the user can fix: one exception, one collector, and the nearest names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field


class ConfigError(ValueError):
    """A mistake the user can correct. Carries every problem found, each a whole sentence."""

    def __init__(self, *problems: str) -> None:
        assert problems, 'a ConfigError states at least one problem'
        self.problems = problems
        super().__init__('\n'.join(problems))


class Stopped(Exception):
    """A run that ended early because a signal asked for it; its exit code is 128 + the signal's number."""

    def __init__(self, message: str, *, signum: int) -> None:
        self.code = 128 + signum
        super().__init__(message)


@dataclass
class Problems:
    """Collects problems so that all of one command line are reported together."""

    found: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Append one problem, once."""
        if problem not in self.found:
            self.found.append(problem)

    def raise_if_any(self) -> None:
        """Raise one ConfigError with everything found so far."""
        if self.found:
            raise ConfigError(*self.found)


def told(error: Exception) -> str:
    """Return in one line what an exception says; its kind too where its text alone would say little."""
    text = ' '.join(str(error).split())
    speaks = text and isinstance(error, OSError | ValueError | RuntimeError)
    return text if speaks else f'{type(error).__name__}: {text}'


def close_names(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Return the known names nearest to `name`, best first; case and `_`/`-` are ignored."""
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.lower().replace('_', '-'), candidate)
    matches = difflib.get_close_matches(name.lower().replace('_', '-'), folded, n=count, cutoff=0.7)
    return [folded[match] for match in matches]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `: did you mean 'x' or 'y'?`, or `.` where nothing is near."""
    names = close_names(name, known)
    return f': did you mean {" or ".join(repr(n) for n in names)}?' if names else '.'

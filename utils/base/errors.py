"""Errors that the user can correct: an exception, a list of problems, and suggestions of similar names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field


class ConfigError(ValueError):
    """A mistake that the user can correct. `problems` holds every problem found, each as a full message."""

    def __init__(self, *problems: str) -> None:
        assert problems, 'a ConfigError states at least one problem'
        self.problems = problems
        super().__init__('\n'.join(problems))


class Stopped(Exception):
    """Raised if a signal stopped the run. The exit code is 128 + the number of the signal."""

    def __init__(self, message: str, *, signum: int) -> None:
        self.code = 128 + signum
        super().__init__(message)


@dataclass
class Problems:
    """The problems of one command line, collected so that all are reported together."""

    found: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Append a problem, unless the list contains the same problem already."""
        if problem not in self.found:
            self.found.append(problem)

    def raise_if_any(self) -> None:
        """Raise one ConfigError with all problems found so far. Does nothing if there are no problems."""
        if self.found:
            raise ConfigError(*self.found)


def error_text(error: Exception) -> str:
    """Return the message of an exception in one line.

    The line starts with the exception type, except for OSError, ValueError and RuntimeError. The messages of these
    three are clear without the type.
    """
    text = ' '.join(str(error).split())
    is_clear = text and isinstance(error, OSError | ValueError | RuntimeError)
    return text if is_clear else f'{type(error).__name__}: {text}'


def close_names(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Return at most `count` known names that are similar to `name`, the most similar first.

    Case is ignored, and `_` equals `-`.
    """
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.lower().replace('_', '-'), candidate)
    matches = difflib.get_close_matches(name.lower().replace('_', '-'), folded, n=count, cutoff=0.7)
    return [folded[match] for match in matches]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: `: did you mean 'x' or 'y'?` with similar known names.

    Returns `.` if no known name is similar.
    """
    names = close_names(name, known)
    return f': did you mean {" or ".join(repr(n) for n in names)}?' if names else '.'

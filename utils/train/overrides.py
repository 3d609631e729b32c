"""Methods of a library's class that are overridden: what the library renames is an error here, not dead code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

MethodT = TypeVar('MethodT', bound=Callable[..., Any])


def overrides(base: type) -> Callable[[MethodT], MethodT]:
    """Return a decorator for a method that overrides one of `base`, compared when the class is made.

    Raises TypeError where `base` has no method of that name, or takes its parameters under other names or in another
    order. A method may leave the last parameters to *args and **kwargs.
    """

    def checked(method: MethodT) -> MethodT:
        name = method.__name__
        what = f'{base.__module__}.{base.__name__}.{name}'
        overridden = getattr(base, name, None)
        if not callable(overridden):
            raise TypeError(f'{what} is overridden here, and this version of the library has no such method')
        theirs = [p.name for p in _named(overridden)]
        ours = [p.name for p in _named(method)]
        if ours != theirs[: len(ours)] or (len(ours) < len(theirs) and not _takes_the_rest(method)):
            raise TypeError(f'{what} takes ({", ".join(theirs)}), the method that overrides it ({", ".join(ours)})')
        method.__overrides__ = what  # type: ignore[attr-defined]
        return method

    return checked


def _named(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a method that have names of their own, self included."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(method).parameters.values() if p.kind not in variable]


def _takes_the_rest(method: Callable[..., Any]) -> bool:
    kinds = [p.kind for p in inspect.signature(method).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds

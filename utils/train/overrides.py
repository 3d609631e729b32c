"""A decorator for methods that override a library's methods.

If a new version of the library renames such a method or its parameters, the import fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

MethodT = TypeVar('MethodT', bound=Callable[..., Any])


def overrides(base: type) -> Callable[[MethodT], MethodT]:
    """Return a decorator for methods that override a method of `base`.

    The decorator raises TypeError if `base` has no method of the same name, or if the names or the order of the
    parameters differ. A method can take the last parameters as **kwargs.
    """

    def checked(method: MethodT) -> MethodT:
        name = method.__name__
        what = f'{base.__module__}.{base.__name__}.{name}'
        overridden = getattr(base, name, None)
        if not callable(overridden):
            raise TypeError(f'{what} is overridden here, and this version of the library has no such method')

        expected = [p.name for p in _named_parameters(overridden)]
        found = [p.name for p in _named_parameters(method)]
        is_prefix = found == expected[: len(found)]
        is_complete = len(found) >= len(expected) or _takes_keywords(method)
        if not (is_prefix and is_complete):
            raise TypeError(f'{what} takes ({", ".join(expected)}), the method that overrides it ({", ".join(found)})')
        method.__overrides__ = what  # type: ignore[attr-defined]
        return method

    return checked


def _named_parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a method, including self, but not *args and **kwargs."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(method).parameters.values() if p.kind not in variable]


def _takes_keywords(method: Callable[..., Any]) -> bool:
    kinds = [p.kind for p in inspect.signature(method).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds

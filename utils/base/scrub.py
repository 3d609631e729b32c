"""Removes tokens, paths of the home folder and user names from text and settings that leave this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from utils.base.leak_scan import hide_secrets

# The variables that name the user, in the order in which Python reads them.
USER_VARIABLES = ('LOGNAME', 'USER', 'LNAME', 'USERNAME')
SOMEONE = 'user'


def user_names(environment: Mapping[str, str], home: Path) -> set[str]:
    """Return the names of the user: those in the environment, and the name of the home folder."""
    return {name for name in (*map(environment.get, USER_VARIABLES), home.name) if name}


def scrubber(secrets: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that replaces private text in a string: secrets, the home folder and user names.

    `secrets` is a dict from a description of each secret to its value, for example {'--hub_token': 'ms-...'}. A secret
    becomes <secret>, and the home folder becomes ~. A user name in a path becomes `user`.
    """
    home = Path.home()
    replaced = [
        (_any_of({str(home), str(home.resolve())} - {home.anchor}, before=r'(?<!\w)'), '~'),
        (re.compile(r'(?<=/home/)[^/\s"\']+|(?<=/Users/)[^/\s"\']+'), SOMEONE),
        (_any_of(user_names(os.environ, home), before=r'(?<=[/\\])'), SOMEONE),
        (_any_of(user_names(os.environ, home), before=r'(?<![\w./\\-])', after=r'(?=[/\\])'), SOMEONE),
    ]

    def clean(text: str) -> str:
        text = hide_secrets(text, secrets)
        for pattern, replacement in replaced:
            text = pattern.sub(replacement, text)
        return text

    return clean


def _any_of(texts: set[str], *, before: str, after: str = r'(?![\w-]|\.\w)') -> re.Pattern[str]:
    """Return a pattern that finds each of the texts.

    `before` and `after` are regular expressions for what stands directly before and after a text (lookarounds).
    """
    # The first alternative that matches is used, so longer texts come first. Without a text nothing matches.
    alternatives = '|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or '(?!)'
    return re.compile(f'{before}(?:{alternatives}){after}')


def scrubbed(value: Any, clean: Callable[[str], str]) -> Any:
    """Return a copy of settings as plain data, with `clean` applied to each text, also to the keys of dictionaries.

    Lists, tuples and sets become lists. An object of any other type is converted with str().
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {clean(str(key)): scrubbed(item, clean) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(scrubbed(item, clean) for item in value)
    if isinstance(value, list | tuple):
        return [scrubbed(item, clean) for item in value]
    return clean(str(value))

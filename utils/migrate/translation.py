"""The result of reading a recipe: the flags of llm_sft.py, a note for each key of the recipe, and the problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.base.errors import Problems, did_you_mean
from utils.cli.arguments import SftArguments, flag_types

# What happens with a key of a recipe. The order is that of the report.
Kind = Literal['used', 'default', 'different', 'without effect', 'not understood']

# Flags that recipes need and that this version does not have yet. A key for such a flag is reported and left out of
# the command. Remove a name here when the flag exists.
SOON = frozenset({'adapter', 'early_stop', 'lora_modules_to_save', 'use_dora', 'use_rslora'})
# True while --lora_target_modules does not take re:PATTERN.
SOON_PATTERNS = True

_FLAGS = flag_types(SftArguments)


@dataclass(frozen=True, kw_only=True)
class Note:
    """What happens with one key of a recipe, in one sentence."""

    kind: Kind
    key: str
    text: str


@dataclass(kw_only=True)
class Translation:
    """A recipe that is being translated. `values` holds the keys of the recipe, `environment` the variables before it.

    `processes` is the number of processes of the command. None: the recipe does not say it.
    """

    toolkit: str
    values: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    flags: dict[str, list[str]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)
    processes: int | None = None
    sharded: bool = False

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key. Returns `default` if the key is missing or empty."""
        value = self.values.get(key)
        return default if is_empty(value) else value

    def note(self, kind: Kind, key: str, text: str) -> None:
        """Add a note. The same note is added only once."""
        added = Note(kind=kind, key=key, text=text)
        if added not in self.notes:
            self.notes.append(added)

    def use(self, key: str, flag: str, value: Any, *, why: str = '', kind: Kind = 'used') -> None:
        """Set a flag of the command from a key. `why` says what is different here; without it the meaning is the same.

        A flag that this version does not have is left out, and the note says so.
        """
        words = [to_word(item) for item in (value if isinstance(value, list) else [value])]
        if flag in SOON and not has_flag(flag):
            self.note('different', key, f'left out: this version has no --{flag}')
            return
        assert has_flag(flag), f'--{flag} is no flag of llm_sft.py'

        self.flags[flag] = words
        text = f'--{flag} {" ".join(words)}'
        if why:
            self.note('different', key, f'{text}; {why}')
        else:
            self.note(kind, key, text)

    def refuse(self, key: str, problem: str) -> None:
        """Add a problem about a key, so that the command is not complete. The form is `<key>: <problem>. <remedy>`."""
        self.problems.add(f'{key}: {problem}')


# A function that translates one key of a recipe with its value.
Rule = Callable[[Translation, str, Any], None]


def is_empty(value: Any) -> bool:
    """Return whether a key is there but says nothing: null, an empty text, list or object."""
    return value is None or value in ('', [], {})


def is_off(value: Any) -> bool:
    """Return whether a value switches something off: false, 0 or the text of it."""
    return value is False or value == 0 or str(value).lower() in ('false', '0', 'no', 'off')


def is_on(value: Any) -> bool:
    """Return whether a value is given and does not switch something off."""
    return not is_empty(value) and not is_off(value)


def to_word(value: Any) -> str:
    """Return a value as the user would type it: true, 3 for 3.0, 1e-05, or the text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def to_number(value: Any) -> float | None:
    """Return a number that a recipe gives as number or as text. Returns None if it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def to_list(value: Any) -> list[Any]:
    """Return the items of a list, or of a text that separates them with commas."""
    if is_empty(value):
        return []
    if isinstance(value, list):
        return [item for item in value if not is_empty(item)]
    return [item.strip() for item in str(value).split(',') if item.strip()]


def has_flag(flag: str) -> bool:
    """Return whether this version has a flag."""
    return flag in _FLAGS


def same(flag: str, why: str = '') -> Rule:
    """Return a rule that sets a flag to the value of the key. `why` says what is different in meaning here."""
    return lambda t, key, value: t.use(key, flag, value, why=why)


def unused(why: str) -> Rule:
    """Return a rule for a key that has no effect here. The value is not shown, because it may be a token."""
    return lambda t, key, value: t.note('without effect', key, why)


def other(text: str) -> Rule:
    """Return a rule for a key that is different in meaning here. If its value is off, the key has no effect."""

    def rule(t: Translation, key: str, value: Any) -> None:
        if is_off(value):
            t.note('without effect', key, 'it is off')
        else:
            t.note('different', key, text)

    return rule


def refused(problem: str) -> Rule:
    """Return a rule for a key that cannot be translated. If its value is off, the key has no effect."""

    def rule(t: Translation, key: str, value: Any) -> None:
        if is_off(value):
            t.note('without effect', key, 'it is off')
        else:
            t.refuse(key, problem)

    return rule


def silent(t: Translation, key: str, value: Any) -> None:
    """Do nothing: the key is translated together with others."""


def apply_rules(t: Translation, rules: Mapping[str, Rule], families: Mapping[str, Rule]) -> None:
    """Apply the rule of each key of the recipe that is not empty. `families` holds rules for the starts of names."""
    for key, value in t.values.items():
        if is_empty(value):
            continue
        rule = rules.get(key) or next((found for start, found in families.items() if key.startswith(start)), None)
        if rule is not None:
            rule(t, key, value)
        else:
            t.note(
                'not understood', key, f'{t.toolkit} may know this key, and migrate does not{did_you_mean(key, rules)}'
            )


def apply_defaults(t: Translation, defaults: Mapping[str, Any]) -> None:
    """Set each flag whose default there differs from the one here, if no key of the recipe set it."""
    for flag, value in defaults.items():
        if flag not in t.flags:
            t.use(f'(--{flag})', flag, value, kind='default')

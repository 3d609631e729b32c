"""The translation of a recipe: the flags of llm_sft.py, a note for each key of the recipe, and the problems.

A rule is a function that translates one key of a recipe. It is called with the translation, the key and its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.base.errors import Problems, did_you_mean
from utils.cli.arguments import SftArguments, flag_types

# What happens with a key of a recipe. The order is that of the report.
Kind = Literal['used', 'default', 'different', 'without effect', 'not understood']

_FLAGS = flag_types(SftArguments)


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence that says how a key of a recipe was translated. `kind` is the section of the report that shows it."""

    kind: Kind
    key: str
    text: str


@dataclass(kw_only=True)
class Translation:
    """A recipe that is being translated. `flags` has the flags of the command for llm_sft.py so far.

    `values` has the keys and values of the recipe, and `environment` its environment variables. `processes` is the
    number of processes of the command. It is None if the recipe does not say this number. `sharded` says whether the
    command shards the model over the processes.
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
        """Set a flag of the command from a key of the recipe, and add a note.

        `why` says how the meanings of the key and the flag differ. If they differ, the kind of the note is `different`.
        Otherwise the kind is `kind`.
        """
        words = [to_word(item) for item in (value if isinstance(value, list) else [value])]
        assert has_flag(flag), f'--{flag} is no flag of llm_sft.py'

        self.flags[flag] = words
        text = f'--{flag} {" ".join(words)}'
        if why:
            self.note('different', key, f'{text}; {why}')
        else:
            self.note(kind, key, text)

    def refuse(self, key: str, problem: str) -> None:
        """Add the problem `<key>: <problem>`. `problem` has two sentences: the problem and the remedy."""
        self.problems.add(f'{key}: {problem}')


# A function that translates one key of a recipe with its value.
Rule = Callable[[Translation, str, Any], None]


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, or an empty text, list or object."""
    return value is None or value in ('', [], {})


def is_off(value: Any) -> bool:
    """Return whether a value switches something off: false, 0, or the text false, 0, no or off."""
    return value is False or value == 0 or str(value).lower() in ('false', '0', 'no', 'off')


def is_on(value: Any) -> bool:
    """Return whether a value is set and switches something on. It is not empty, false, 0, no or off."""
    return not is_empty(value) and not is_off(value)


def to_word(value: Any) -> str:
    """Return a value as the user would type it. For example, True becomes true, and 3.0 becomes 3."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def to_number(value: Any) -> float | None:
    """Return the number that a value (a number or a text) states. Returns None if it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def to_list(value: Any) -> list[Any]:
    """Return the items of a list, or of a text that separates them with commas: 'a, b' gives ['a', 'b']."""
    if is_empty(value):
        return []
    if isinstance(value, list):
        return [item for item in value if not is_empty(item)]
    return [item.strip() for item in str(value).split(',') if item.strip()]


def has_flag(flag: str) -> bool:
    """Return whether this version of llm_sft.py has a flag."""
    return flag in _FLAGS


def same(flag: str, why: str = '') -> Rule:
    """Return a rule that sets `flag` to the value of the key for which the rule is called.

    `why` says how the meanings of the flag and the key differ. If it is '', they do not differ.
    """
    return lambda t, key, value: t.use(key, flag, value, why=why)


def unused(why: str) -> Rule:
    """Return a rule for a key without effect in llm_sft.py. The rule adds a note with the text `why`.

    The report does not show the value of this key, because it can be a secret.
    """
    return lambda t, key, value: t.note('without effect', key, why)


def other(text: str) -> Rule:
    """Return a rule that sets no flag and adds a note to the report. `text` says what llm_sft.py does instead.

    If the value of the key is false, 0, no or off, the note says that the key has no effect.
    """

    def rule(t: Translation, key: str, value: Any) -> None:
        if is_off(value):
            t.note('without effect', key, 'it is off')
        else:
            t.note('different', key, text)

    return rule


def refused(problem: str) -> Rule:
    """Return a rule for a key that cannot be translated. The rule adds `problem` to the problems of the recipe.

    If the value of the key is false, 0, no or off, nothing is wrong. Then the rule adds only a note that the key has no
    effect.
    """

    def rule(t: Translation, key: str, value: Any) -> None:
        if is_off(value):
            t.note('without effect', key, 'it is off')
        else:
            t.refuse(key, problem)

    return rule


def silent(t: Translation, key: str, value: Any) -> None:
    """Do nothing, because this key is read in a different place, or has no meaning for llm_sft.py."""


def apply_rules(t: Translation, rules: Mapping[str, Rule], families: Mapping[str, Rule]) -> None:
    """Call the rule for each key of the recipe whose value is not empty.

    The rule is `rules[key]`. If `rules` has no such key, it is the first rule in `families` whose name is a prefix of
    the key. If a key has no rule, a note of the kind `not understood` is added.
    """
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
    """Set each flag of `defaults` that no key of the recipe has set.

    `defaults` has the defaults of the toolkit that differ from the defaults of llm_sft.py.
    """
    for flag, value in defaults.items():
        if flag not in t.flags:
            t.use(f'(--{flag})', flag, value, kind='default')

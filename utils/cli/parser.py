"""Parses a command line into the arguments of its program. Problems are collected, not raised."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from utils.base.errors import Problems, did_you_mean
from utils.base.logger import logger
from utils.cli.arguments import CommonArguments, flag_types
from utils.loading.layers import PATTERN

# Misspelt flags that are accepted, because scripts of users contain them. The value is the correct flag.
ALIASES = {'tuner_bankend': 'tuner_backend'}
# If a flag of this set is typed several times, all its values are used. For all other flags, the last value is used.
ADDING_UP = frozenset({'dataset', 'val_dataset', 'columns', 'template_settings'})
# Flags with a list of name=value. A comma separates two items only if a name and = follow, because a value may contain
# commas.
_SETTINGS = frozenset({'template_settings'})
_NEXT_SETTING = re.compile(r',(?=[A-Za-z_]\w*=)')
_JSON_SETTING = re.compile(r'\w+=[\[{"]')
# Flags that set the same thing in two ways. A flag that is typed later replaces the other flag.
_EITHER = {'warmup_steps': 'warmup_ratio', 'warmup_ratio': 'warmup_steps'}
# Matches a negative number with an exponent, e.g. -1e-4. argparse would take such a number for a flag.
_NEGATIVE = re.compile(r'-(\d+\.?\d*|\.\d+)[eE][-+]?\d+')

# The type of a flag that takes a whole number or a fraction.
_NUMBER = int | float

ArgumentsT = TypeVar('ArgumentsT', bound=CommonArguments)


@dataclass(frozen=True, kw_only=True)
class Parsed(typing.Generic[ArgumentsT]):
    """A parsed command line: the values, the names of the typed flags, and the problems."""

    args: ArgumentsT
    typed: frozenset[str]
    problems: Problems


def _unwrap_optional(hint: Any) -> Any:
    """Return the type hint without None: T for T | None. A hint without None is returned unchanged."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else _NUMBER


def _number(word: str) -> int | float:
    """Return the number in a word: an int if it is whole, else a float. Raises ValueError if it is not a number."""
    value = float(word)
    return int(value) if value.is_integer() else value


def _split_names(word: str) -> list[str]:
    # A comma in a pattern of --lora_target_modules belongs to the pattern.
    return [word] if word.startswith(PATTERN) else word.split(',')


def _split_settings(word: str) -> list[str]:
    return [word] if _JSON_SETTING.match(word) else _NEXT_SETTING.split(word)


def _convert(name: str, words: Sequence[str], hint: Any) -> Any:
    """Return the words typed for the flag `name` as a value of the flag's type.

    Raises ValueError if the words do not fit the type. Its message is shown to the user unchanged.
    """
    hint = _unwrap_optional(hint)

    # Python turns bytes that are not UTF-8 into surrogates. Text with surrogates cannot be tokenised or saved.
    if any('\ud800' <= character <= '\udfff' for character in ''.join(words)):
        # The value is not shown, because it may be a hub token. No log may contain a token.
        raise ValueError(f'--{name}: the value is not UTF-8. Type it in a terminal that is set to UTF-8.')

    if typing.get_origin(hint) is list:
        split = _split_settings if name in _SETTINGS else _split_names
        values = [part for word in words for part in split(word) if part]
        if not values:
            raise ValueError(f'--{name} needs at least one value.')
        return values

    if hint is bool and not words:
        return True
    if len(words) != 1:
        got = f'{len(words)}: {" ".join(words)}' if words else 'none'
        raise ValueError(f'--{name} takes one value, got {got}. Put a value with spaces in quotes.')

    word = words[0]
    if hint is bool:
        if word.lower() not in ('true', 'false'):
            raise ValueError(f"--{name} takes true or false, got '{word}'.")
        return word.lower() == 'true'

    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        for choice in choices:
            if word == str(choice):
                return choice
        raise ValueError(f"--{name} takes {', '.join(map(str, choices))}, got '{word}'.")

    kinds = {int: 'a whole number', float: 'a number', _NUMBER: 'a number'}
    convert = _number if hint == _NUMBER else hint
    try:
        return convert(word)
    except ValueError:
        raise ValueError(f"--{name} takes {kinds[hint]}, got '{word}'.") from None


def describe_default(f: dataclasses.Field[Any]) -> str:
    """Return the default of a flag as the user would type it, or 'None'."""
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    if isinstance(value, list):
        return ','.join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_type(hint: Any) -> str:
    """Return a description of the values that a flag accepts. --help and docs/flags.md show it."""
    hint = _unwrap_optional(hint)
    if typing.get_origin(hint) is Literal:
        return '|'.join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is list:
        return 'name ...'
    return {bool: 'true|false', int: 'int', float: 'float', str: 'text', _NUMBER: 'number'}[hint]


def _build_parser(cls: type, *, program: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=about, allow_abbrev=False)
    hints = flag_types(cls)
    spellings = {name: [other for other, target in ALIASES.items() if target == name] for name in hints}
    for f in dataclasses.fields(cls):
        parser.add_argument(
            f'--{f.name}',
            *(f'--{other}' for other in spellings[f.name]),
            dest=f.name,
            nargs='*',
            action='append',
            default=argparse.SUPPRESS,
            metavar=describe_type(hints[f.name]),
            help=f'{f.metadata["help"]} (default: {describe_default(f)})'.replace('%', '%%'),
        )
    return parser


def _report_unknown(words: Sequence[str], known: Sequence[str], *, ignore: bool, problems: Problems) -> None:
    """Add a problem for each unknown flag, and for each word that is neither a flag nor a value of a flag.

    Words after an unknown flag count as its values. If `ignore` is True, log a warning instead of adding a problem.
    """
    follows_unknown_flag = False
    for word in words:
        name = word.split('=')[0].lstrip('-')
        if word.startswith('-'):
            flag = word.split('=')[0]
            text = f"flag '{flag}' is not known{did_you_mean(name, known)}"
            follows_unknown_flag = True
        elif follows_unknown_flag:
            continue  # this word is a value of an unknown flag, and the flag is reported already
        else:
            text = (
                f"the word '{word}' belongs to no flag. Write flags as --name value, and values with spaces in quotes."
            )

        if ignore:
            logger.warning(f'{text} Ignored because --ignore_args_error is true.')
        else:
            problems.add(text)


def _join_negative_values(argv: Sequence[str]) -> list[str]:
    """Return the words with --name=-1e-4 in place of --name -1e-4.

    argparse would take the word -1e-4 for a flag. Negative numbers without an exponent need no change.
    """
    words: list[str] = []
    for word in argv:
        is_value = bool(words) and words[-1].startswith('--') and '=' not in words[-1]
        if is_value and _NEGATIVE.fullmatch(word):
            words[-1] += f'={word}'
        else:
            words.append(word)
    return words


def _split_at_separator(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the words of a command line before the word `--`, and the words after it.

    If there is no word `--`, all words count as after it: the first sequence is empty.
    """
    if '--' not in argv:
        return (), argv
    position = list(argv).index('--')
    return argv[:position], argv[position + 1 :]


def _values_typed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return a dict from each typed flag to the words after it, and a list of unknown flags and unexpected words."""
    namespace, unknown = parser.parse_known_args(_join_negative_values(argv))
    typed = {
        name: list(itertools.chain(*times)) if name in ADDING_UP else times[-1]
        for name, times in vars(namespace).items()
    }
    return typed, unknown


def parse(
    cls: type[ArgumentsT], argv: Sequence[str], *, program: str, about: str, earlier: Sequence[str] = ()
) -> Parsed[ArgumentsT]:
    """Parse the command line `argv`, and return the result with its problems. Only --help ends the program.

    A script can write its flags, then the word `--`, then the flags that its user typed. A flag after the `--` replaces
    the same flag before it. So --dataset after the `--` replaces the data sets before it. Without `--`, the values of
    several --dataset flags are joined into one list, as for each flag in ADDING_UP. Of any other flag, the last value
    counts.

    `earlier` is the command line of an earlier run. A flag in `argv` replaces the same flag in `earlier`.
    --warmup_steps and --warmup_ratio also replace each other.
    """
    parser = _build_parser(cls, program=program, about=about)
    typed: dict[str, list[str]] = {}
    unknown: list[str] = []
    for words in (earlier, *_split_at_separator(argv)):
        known, others = _values_typed(parser, words)
        typed = {name: given for name, given in typed.items() if _EITHER.get(name) not in known} | known
        unknown += others

    hints = flag_types(cls)
    problems = Problems()
    values: dict[str, Any] = {}
    for name, given in typed.items():
        try:
            values[name] = _convert(name, given, hints[name])
        except ValueError as error:
            problems.add(str(error))

    args = cls(**values)
    _report_unknown(unknown, list(hints), ignore=args.ignore_args_error, problems=problems)
    return Parsed(args=args, typed=frozenset(typed), problems=problems)

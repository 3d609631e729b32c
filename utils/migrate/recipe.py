"""Reads a recipe from a YAML file or from a shell command.

A recipe has the settings of a training run in a different toolkit.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.base.errors import ConfigError

Toolkit = Literal['LLaMA-Factory', 'axolotl', 'ms-swift']

_FORMS = 'a YAML file of LLaMA-Factory or axolotl, or a command line of swift sft, llamafactory-cli or axolotl'
# A key that every recipe of a toolkit has.
_MARKS: dict[str, Toolkit] = {'base_model': 'axolotl', 'model_name_or_path': 'LLaMA-Factory'}
_SWIFT_MARKS = ('tuner_type', 'train_type')
_LARGEST_FILE = 2**20
_ASSIGNMENT = re.compile(r'(?:export\s+)?([A-Za-z_]\w*)=(.*)', flags=re.DOTALL)
_VARIABLE = re.compile(r'\$(?:\{(\w+)\}|(\w+))')
_ARITHMETIC = re.compile(r'\$\(\(\s*(\d+)\s*([-+*/])\s*(\d+)\s*\)\)|\$\(\s*expr\s+(\d+)\s*\\?([-+*/])\s*(\d+)\s*\)')
# The words that start a training of ms-swift, and those of other programs of it.
_SWIFT_TRAINING = ('sft', 'pt')
_SWIFT_OTHERS = ('rlhf', 'infer', 'deploy', 'export', 'eval', 'app', 'merge-lora', 'rollout', 'sample')


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The keys and values of a recipe, its toolkit, the folder of its file, and its environment variables."""

    toolkit: Toolkit
    values: Mapping[str, Any]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def read_recipe(given: str) -> Recipe:
    """Return the recipe in `given`, which is the path of a file or the text of a command line.

    Raises ConfigError if the file cannot be read, if it has no command that trains, or if the recipe is not of a known
    toolkit.
    """
    path = Path(given)
    if not _is_file(path):
        if ' ' in given.strip():
            return _of_command(given, 'the command', Path())
        what = 'this is a folder' if _is_folder(path) else 'the file is not there'
        raise ConfigError(f'{given}: {what}. Give {_FORMS}.')

    if path.stat().st_size > _LARGEST_FILE:
        raise ConfigError(f'{given}: this file is too large to be a recipe. Give {_FORMS}.')
    text = _text_of(path)
    if path.suffix.lower() in ('.yaml', '.yml', '.json'):
        return _of_yaml(path, text)
    return _of_command(text, given, path.parent)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a command line is longer than a file name may be
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except OSError as error:
        raise ConfigError(f'{path}: the recipe cannot be read: {error.strerror}. Correct its permissions.') from None
    except UnicodeDecodeError:
        raise ConfigError(f'{path}: this file is not UTF-8. Save it as UTF-8, or give {_FORMS}.') from None


def _of_yaml(path: Path, text: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe in a YAML file. `changes` has keys from the command line, which replace keys of the file."""
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        # The text of the error quotes the file, which may hold a token.
        where = f'line {error.problem_mark.line + 1}: {error.problem}' if error.problem_mark else error.problem
        raise ConfigError(f'{path}: this is not YAML ({where}). Correct the file.') from None
    except yaml.YAMLError:
        raise ConfigError(f'{path}: this YAML cannot be read. Remove its control characters.') from None
    except (RecursionError, ValueError):
        raise ConfigError(
            f'{path}: this YAML has a value that is not a possible number or date, or is nested too deep. Correct the '
            'value.'
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: this YAML has no keys. Give {_FORMS}.')

    values = {str(key): value for key, value in content.items()} | dict(changes or {})
    return Recipe(toolkit=_recognise(values, str(path)), values=values, folder=path.parent)


def _recognise(values: Mapping[str, Any], shown: str) -> Toolkit:
    for mark, toolkit in _MARKS.items():
        if mark in values:
            return toolkit
    if 'model' in values and any(mark in values for mark in _SWIFT_MARKS):
        return 'ms-swift'
    raise ConfigError(
        f'{shown}: this recipe is not of a known toolkit: it has no key {" or ".join(_MARKS)}. Give {_FORMS}.'
    )


def _of_command(text: str, shown: str, folder: Path) -> Recipe:
    """Return the recipe of the first training command in a text. `shown` names the text in error messages.

    Shell variables in the command are replaced by the values that earlier lines of the text assign to them. Raises
    ConfigError if no line is a training command, or if a line cannot be read.
    """
    variables: dict[str, str] = {}
    for line in _lines(text):
        words = _words(_filled_in(line, variables), shown)
        before: dict[str, str] = {}
        while words and (match := _ASSIGNMENT.fullmatch(words[0])):
            before[match[1]] = match[2]
            words = words[1:]
        if words[:1] == ['export']:
            before |= {match[1]: match[2] for word in words[1:] if (match := _ASSIGNMENT.fullmatch(word))}
            words = []
        if not words:
            variables |= before
        elif (found := _training(words, {**variables, **before}, folder)) is not None:
            return found
    raise ConfigError(f'{shown}: there is no command that trains. Give {_FORMS}.')


def _lines(text: str) -> list[str]:
    """Return the lines of a shell script without comment lines.

    A line that ends in a backslash is joined with the next.
    """
    kept = [line for line in text.splitlines() if not line.lstrip().startswith('#')]
    joined = re.sub(r'\\\s*\n', ' ', '\n'.join(kept))
    return [line.strip() for line in joined.splitlines() if line.strip()]


def _filled_in(line: str, variables: Mapping[str, str]) -> str:
    """Return a line in which shell variables, and calculations such as $((8 * 2)), are replaced by their values.

    A variable that is not in `variables` is kept. Only calculations with two whole numbers are replaced.
    """
    filled = _VARIABLE.sub(lambda m: variables.get(m[1] or m[2], m[0]), line)
    return _ARITHMETIC.sub(_calculated, filled)


def _calculated(match: re.Match[str]) -> str:
    left, sign, right = (part for part in match.groups() if part is not None)
    one, two = int(left), int(right)
    if sign == '/':
        return str(one // two) if two else match[0]
    return str({'+': one + two, '-': one - two, '*': one * two}[sign])


def _words(line: str, shown: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(f'{shown}: a line of the command cannot be read ({error}). Correct its quotes.') from None


def _training(words: Sequence[str], environment: Mapping[str, str], folder: Path) -> Recipe | None:
    """Return the recipe that a training command states. Returns None for any other command.

    Raises ConfigError if the command trains in a way that is not supported, or if its recipe file cannot be read.
    """
    names = [Path(word).name for word in words]
    for position, name in enumerate(names):
        rest = list(words[position + 2 :])
        following = names[position + 1] if position + 1 < len(names) else ''
        if name in ('swift', 'megatron'):
            return _swift(name, following, rest, environment, folder)
        if name in ('sft.py', 'pt.py') and 'swift' in Path(words[position]).parts:
            return _swift('swift', name.removesuffix('.py'), list(words[position + 1 :]), environment, folder)
        if name in ('llamafactory-cli', 'lmf', 'axolotl') and following == 'train' and rest:
            return _with_file(rest, environment, folder)
        if name == 'axolotl.cli.train' and following:
            return _with_file(list(words[position + 1 :]), environment, folder)
    return None


def _swift(program: str, command: str, words: list[str], environment: Mapping[str, str], folder: Path) -> Recipe | None:
    if program == 'megatron' or command in _SWIFT_OTHERS:
        if program == 'megatron' or command == 'rlhf':
            raise ConfigError(
                f'{program} {command}: only supervised fine-tuning (swift sft) is supported. Train this stage with '
                'ms-swift.'
            )
        return None
    if command not in _SWIFT_TRAINING:
        return None
    if words and words[0].endswith(('.yaml', '.yml', '.json')):
        return _with_file(words, environment, folder)
    stage = {'swift pt': True} if command == 'pt' else {}
    return Recipe(toolkit='ms-swift', values=stage | _flags(words), folder=folder, environment=environment)


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """Return {name: value} for words of the forms --name value, --name=value and name=value.

    If a name has several values, they are returned as a list. The value of a name without a value is True. In names, -
    becomes _.
    """
    values: dict[str, Any] = {}
    name = ''
    for word in words:
        key, mark, value = word.partition('=')
        if word.startswith('--') and not mark:
            name = word[2:].replace('-', '_')
            values[name] = True
        elif (word.startswith('--') or not name) and mark:
            name = ''
            values[key.removeprefix('--').replace('-', '_')] = value
        elif name:
            earlier = values[name]
            values[name] = word if earlier is True else [*(earlier if isinstance(earlier, list) else [earlier]), word]
    return values


def _with_file(words: list[str], environment: Mapping[str, str], folder: Path) -> Recipe:
    """Return the recipe of a command. `words` are the words after the command that starts the training.

    The first word is the name of a YAML file, and flags after it replace keys of the file. If the first word is a flag,
    the recipe has only the flags.
    """
    if words[0].startswith('-'):
        found = {**_flags(words)}
        toolkit = _recognise(found, 'the command')
        return Recipe(toolkit=toolkit, values=found, folder=folder, environment=environment)
    places = [place for place in (Path(words[0]), folder / words[0]) if _is_file(place)]
    if not places:
        raise ConfigError(
            f'{words[0]}: the recipe file that the command names is not there. Start in the folder of this file, or '
            'write its whole path in the command.'
        )
    read = _of_yaml(places[0], _text_of(places[0]), _flags(words[1:]))
    return Recipe(toolkit=read.toolkit, values=read.values, folder=read.folder, environment=environment)

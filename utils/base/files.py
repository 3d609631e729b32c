"""Reads and writes JSON files. The content is checked on reading, because a file may be damaged."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError

_REMEDY = 'Download or copy the file again.'
# The types of the values of a JSON object, by key: {'steps': int, 'rows': dict | None}. An object inside is written as
# another such mapping, in which '*' stands for every key. [type] is a list of this type, and a tuple holds possible
# types. A key may be missing if None is possible.
Keys = Mapping[str, Any]
_NO_KEYS: Keys = types.MappingProxyType({})


def read_json(
    path: Path,
    kind: type[dict[str, Any]] | type[list[Any]] = dict,
    *,
    keys: Keys = _NO_KEYS,
    remedy: str = _REMEDY,
) -> Any:
    """Return the content of a JSON file. It must be an object if `kind` is dict, and a list if `kind` is list.

    An object, or each object of a list, must have values of the types in `keys`. Other keys are not checked.

    Raises ConfigError if the file cannot be read or holds another type. The message ends with `remedy`.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number too long
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f'{path} cannot be read as JSON: {why}. {remedy}') from None

    if not isinstance(content, kind):
        raise ConfigError(f'{path} holds a {type(content).__name__}, but a {kind.__name__} is expected. {remedy}')

    if keys and kind is list:
        for number, entry in enumerate(content, 1):
            check_keys(entry, keys, f'{path}, entry {number}', remedy=remedy)
    elif keys:
        check_keys(content, keys, str(path), remedy=remedy)
    return content


def check_keys(content: Any, keys: Keys, location: str, *, remedy: str = _REMEDY) -> None:
    """Raise ConfigError if `content` is not an object, or if one of its values does not have the type in `keys`.

    The message begins with `location` and ends with `remedy`.
    """
    if not isinstance(content, dict):
        raise ConfigError(f'{location}: it is a {type(content).__name__}, but a dict is expected. {remedy}')
    named = {key: of for key, of in keys.items() if key != '*'}
    if '*' in keys:
        named |= dict.fromkeys(content, keys['*'])
    if wrong := [key for key, of in named.items() if not fits(content.get(key), of)]:
        raise ConfigError(f'{location}: {wrong[0]} is missing or has the wrong type. {remedy}')


def fits(value: Any, of: Any) -> bool:
    """Return whether a value of a JSON file has the type `of`: a class, a union, list[...], Literal or `Keys`.

    An integer is a float too. True and False are no integers.
    """
    if isinstance(of, tuple):
        return any(fits(value, one) for one in of)
    if isinstance(of, list):
        return isinstance(value, list) and all(fits(item, of[0]) for item in value)
    if isinstance(of, Mapping):
        if not isinstance(value, dict):
            return False
        named = all(fits(value.get(key), one) for key, one in of.items() if key != '*')
        return named and ('*' not in of or all(fits(item, of['*']) for item in value.values()))

    arguments = typing.get_args(of)
    if typing.get_origin(of) is typing.Literal:
        return isinstance(value, tuple({type(one) for one in arguments}))
    if typing.get_origin(of) is list:
        return fits(value, list(arguments))
    if arguments:
        return fits(value, arguments)

    if of is None:
        return value is None
    if isinstance(value, bool):
        return of is bool
    return isinstance(value, (int, float) if of is float else of)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON in UTF-8 atomically: the text is written to a temporary file, which is then renamed."""
    temporary = path.with_name(f'.{path.name}.aside')
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    temporary.replace(path)


def use_default_modes(folder: Path) -> None:
    """Give all files in a folder the default permissions, which the umask decides.

    Some libraries write files that only their owner may read.
    """
    probe = folder / '.new'
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob('*'):
        if path.is_file():
            path.chmod(mode)

"""Reads and writes JSON files. The content is checked on reading, because a file may be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError

_REMEDY = 'Download or copy the file again.'


def read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]] = dict, *, remedy: str = _REMEDY) -> Any:
    """Return the content of a JSON file. It must be an object if `kind` is dict, and a list if `kind` is list.

    Raises ConfigError if the file cannot be read or holds another type. The message ends with `remedy`.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number too long
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f'{path} cannot be read as JSON: {why}. {remedy}') from None

    if not isinstance(content, kind):
        raise ConfigError(f'{path} holds a {type(content).__name__}, but a {kind.__name__} is expected. {remedy}')
    return content


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

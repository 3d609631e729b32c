"""JSON files that someone else may have written or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError


def read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]] = dict, *, remedy: str = 'Get it again.') -> Any:
    """Return the object or list in a file; raises ConfigError, which ends in the remedy, where it holds none."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number without end
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f'{path} cannot be read as JSON: {why}. {remedy}') from None
    if not isinstance(content, kind):
        raise ConfigError(f'{path} holds a {type(content).__name__}, where a {kind.__name__} must be. {remedy}')
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON, readable and in UTF-8, whole or not at all."""
    aside = path.with_name(f'.{path.name}.aside')
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    aside.replace(path)

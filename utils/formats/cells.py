"""Reads the values (cells) of a row: text, JSON text, paths of images. A bad value raises BadRow."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from utils.formats.conversation import BadRow
from utils.formats.json_text import JsonParser, repeated_key


@dataclass(frozen=True)
class Remarks:
    """The unused columns and keys of a row, and the notes about the row.

    Both are stored as the keys of a dict, which keeps the order and drops repetitions.
    """

    unused: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def note_unused(self, values: Mapping[str, Any], used: Collection[str], what: str) -> None:
        """Record each key that is not in `used` and whose value is not empty.

        A record is the word `what` and the key, for example 'column `id`'.
        """
        for key, value in values.items():
            if key not in used and not is_empty(value):
                self.unused[f'{what} `{key}`'] = None


def is_missing(value: Any) -> bool:
    """Return whether a cell is missing: null, NaN or infinite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def is_empty(value: Any) -> bool:
    """Return whether a value is missing, whitespace, or a list or object that contains only empty values."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def cell_of(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a cell. Returns None if the cell is missing."""
    value = row.get(column)
    return None if is_missing(value) else value


def as_text(value: Any, what: str, column: str = '') -> str:
    """Return a text unchanged, or a number as text. Raises BadRow for any other value.

    `what` names the value in the error message.
    """
    if is_missing(value):
        raise BadRow(f'null {what}', column or what)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f'{what} is a {type(value).__name__}, not text', column or what)
    return str(value)


def parsed_json(text: str, remarks: Remarks) -> Any:
    """Return the value of a JSON text, and note keys that occur twice.

    Raises ValueError if the text is not JSON, or RecursionError if it is nested too deeply.
    """
    parser = JsonParser()
    value = parser.parse(text)
    remarks.notes.update(dict.fromkeys(map(repeated_key, parser.repeated)))
    return value


def parse_json(value: Any, column: str, remarks: Remarks) -> Any:
    """Return the value of a cell that should have a list or an object. Returns None if the cell has only whitespace.

    Text is parsed as JSON, because a cell of a CSV file is always text. Raises BadRow if the text is not JSON. Any
    other value is returned unchanged.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None

    try:
        return parsed_json(value, remarks)
    except (ValueError, RecursionError):
        raise BadRow(f'{column} is text that is not JSON', column) from None


def parse_object(value: Any, remarks: Remarks) -> Any:
    """Return the object if the value is the JSON text of an object. Any other value is returned unchanged."""
    if not isinstance(value, str):
        return value

    try:
        parsed = parsed_json(value, remarks)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def check_json(value: Any, column: str) -> None:
    """Raise BadRow if JSON cannot represent the value, for example NaN, or a date from a parquet file."""

    def refuse(item: Any) -> NoReturn:
        raise BadRow(f'{column} holds a {type(item).__name__}, which JSON cannot represent', column)

    try:
        json.dumps(value, allow_nan=False, default=refuse)
    except TypeError:
        raise BadRow(f'{column} has a key that is not text', column) from None
    except RecursionError:
        raise BadRow(f'{column} is nested too deeply', column) from None
    except BadRow:
        raise
    except ValueError:
        raise BadRow(f'{column} holds NaN or Infinity, which JSON cannot represent', column) from None


def images_of(row: Mapping[str, Any], remarks: Remarks) -> list[str]:
    """Return the paths in the column `images`. A cell is one path, a list of paths, or a list of paths as JSON text.

    Raises BadRow for any other value. Returns [] if the cell is missing or empty.
    """
    images = cell_of(row, 'images')
    if isinstance(images, str) and not images.lstrip().startswith('['):
        images = [images] if images else []
    images = parse_json(images, 'images', remarks) or []
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise BadRow('images is neither a path nor a list of paths', 'images')
    return images

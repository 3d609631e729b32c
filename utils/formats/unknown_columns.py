"""The error message for rows whose columns fit no format. The remedy follows from what the rows hold."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from utils.formats.columns import KNOWN_SHAPES, ambiguous_shapes, find_converter

_DATASET_PY = 'utils/dataset.py'
# Names of columns with the question, in rows that have their replies in the columns `chosen` and `rejected`.
_ASKED = ('prompt', 'question', 'query', 'input')


def unknown_columns(row: Mapping[str, Any], file: str, *, of_function: bool) -> str:
    """Return the error message for a row whose columns no converter supports, with the best-fitting remedy.

    `file` is the name of the data file in messages. `of_function` says whether a function in utils/dataset.py returned
    the row. For such a row --columns is no remedy, because it renames only columns of files.
    """
    columns = list(map(str, row))
    problem = f'unknown columns {", ".join(columns)}. '
    tidy = [column.strip().lower() for column in columns]
    if find_converter(tidy):
        twice = [column for column, name in zip(columns, tidy, strict=True) if tidy.count(name) > 1]
        return f'{problem}Their names are equal without capital letters and spaces: {", ".join(twice)}. Rename one.'

    if shapes := ambiguous_shapes(columns):
        return _ambiguous(shapes, columns, of_function=of_function)
    if {'chosen', 'rejected'} <= row.keys():
        return problem + _preference(row, of_function=of_function)
    if key := _key_of_rows(row):
        return problem + _wrapped(key, file, of_function=of_function)
    if of_function:
        return f'{problem}Supported: {KNOWN_SHAPES}. Return rows with such columns from the function in {_DATASET_PY}.'
    return (
        f'{problem}Supported: {KNOWN_SHAPES}. Say which columns hold question and reply: --columns '
        f'NAME=query,OTHER=response, or register a function in DATASET_MAPPING in {_DATASET_PY}.'
    )


def _ambiguous(shapes: Sequence[frozenset[str]], columns: Sequence[str], *, of_function: bool) -> str:
    """Return the error message for columns that fit several converters, with a remedy.

    `shapes` has one set of column names for each of these converters.
    """
    names = {shape: '/'.join(column for column in columns if column in shape) for shape in shapes}
    problem = f'the columns fit more than one shape of rows: {", ".join(names.values())}.'
    if of_function:
        return f'{problem} Return only the columns of one shape from the function in {_DATASET_PY}.'

    every = frozenset().union(*shapes)
    choices = [
        f'to read {names[shape]}, add --columns {",".join(f"{column}=" for column in sorted(every - shape))}'
        for shape in shapes
    ]
    return f'{problem} Choose: {"; ".join(choices)}.'


def _preference(row: Mapping[str, Any], *, of_function: bool) -> str:
    """Return the end of the error message for a preference row, which has the columns `chosen` and `rejected`."""
    problem = 'These are preference rows, and this toolkit has no preference training. '
    if of_function:
        return f'{problem}To train the chosen replies, return query/response from the function in {_DATASET_PY}.'
    return f'{problem}To train the chosen replies, add --columns {_chosen_as(row)}.'


def _chosen_as(row: Mapping[str, Any]) -> str:
    """Return the value of --columns for training the chosen replies of preference rows like `row`.

    For example, if `question`, `chosen` and `rejected` hold text, the value is 'question=query,chosen=response'.
    """
    chosen = row['chosen']
    asked = next((column for column in _ASKED if column in row), None)
    if isinstance(chosen, list):
        first = chosen[0] if chosen and isinstance(chosen[0], Mapping) else {}
        is_reply = str(first.get('role', first.get('from'))).lower() in ('assistant', 'gpt')
        if not asked or not is_reply:
            return 'chosen=messages'
    if isinstance(chosen, list | Mapping):
        return 'chosen=completion' if asked == 'prompt' else f'{asked or "QUESTION"}=prompt,chosen=completion'
    if 'instruction' in row:
        return 'chosen=output'
    return f'{asked}=query,chosen=response' if asked else 'chosen=text'


def _key_of_rows(row: Mapping[str, Any]) -> str | None:
    """Return the first key of an object whose value is a list of rows of a known format, or None."""
    for key, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, Mapping) and find_converter(map(str, first)):
            return str(key)
    return None


def _wrapped(key: str, file: str, *, of_function: bool) -> str:
    """Return the end of the error message for an object like {key: [row, row]}, with a remedy.

    `of_function` says whether a function in utils/dataset.py returned the object. Otherwise, it is in the data file
    `file`.
    """
    problem = f'The rows are in the key {key} of this object. '
    if of_function:
        return f'{problem}Return them from the function in {_DATASET_PY}.'

    is_gzip = file.lower().endswith('.gz')
    read = f'{"gzip." if is_gzip else ""}open({json.dumps(file, ensure_ascii=False)}, "rb")'
    modules = 'json, gzip' if is_gzip else 'json'
    code = (
        f'import {modules}; json.dump(json.load({read})[{json.dumps(key, ensure_ascii=False)}], open("rows.json", "w"))'
    )
    return f'{problem}Write them to a file of their own: python -c {shlex.quote(code)}'

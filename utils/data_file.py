"""Data files as dictionaries with the place each came from: .json, .jsonl, .csv, .parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import ConfigError

SUFFIXES = ('.json', '.jsonl', '.csv', '.parquet')

# A row and where it stands, e.g. 'data/train.jsonl:12'.
PlacedRow = tuple[str, dict[str, Any]]


def read_rows(path: Path) -> Iterator[PlacedRow]:
    """Yield each row of a data file with its place; raises ConfigError naming file and line."""
    if path.stat().st_size == 0:
        raise ConfigError(f'data file {path} is empty (0 bytes): there is nothing to read in it.')
    readers = {'.json': _read_json, '.jsonl': _read_jsonl, '.csv': _read_csv, '.parquet': _read_parquet}
    count = 0
    for place, row in readers[path.suffix.lower()](path):
        if not isinstance(row, dict):
            raise ConfigError(f'{place}: a row must be an object with named columns, got {type(row).__name__}.')
        count += 1
        yield place, row
    if count == 0:
        raise ConfigError(f'data file {path} holds no rows.')


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise ConfigError(
            f'{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8. '
            f'Convert the file, e.g. iconv -f GB18030 -t UTF-8 {path.name}.'
        ) from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the items of a JSON array, or of JSON lines that were named .json."""
    text = _read_text(path)
    decoder = json.JSONDecoder()
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != '[':
        yield from _read_jsonl(path)
        return
    position, line, counted_to = start + 1, text.count('\n', 0, start + 1) + 1, start + 1
    expects_item = True
    while True:
        while position < len(text) and text[position] in ' \t\r\n':
            position += 1
        line += text.count('\n', counted_to, position)
        counted_to = position
        mark = text[position : position + 1]
        if mark == ']':
            return
        if mark == ',' and not expects_item:
            position, expects_item = position + 1, True
            continue
        if not mark or not expects_item:
            found = 'the end of the file' if not mark else repr(mark)
            raise ConfigError(f'{path}:{line}: the JSON array is broken here: expected , or ], found {found}.')
        try:
            row, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f'{path}:{error.lineno}: the JSON is broken in the row that starts at line {line}: {error.msg}.'
            ) from None
        yield f'{path}:{line}', row
        line += text.count('\n', position, end)
        position = counted_to = end
        expects_item = False


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read_text(path).split('\n'), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f'{path}:{number}: this line is not JSON ({error.msg} at column {error.colno}). '
                'A .jsonl file holds one object per line.'
            ) from None
        yield f'{path}:{number}', row


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(_read_text(path).splitlines(keepends=True), strict=True)
    line = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ConfigError(
                    f'{path}:{line}: this row does not have {len(reader.fieldnames or ())} cells as the header has.'
                )
            yield f'{path}:{line}', row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f'{path}:{line}: the CSV is broken here: {error}.') from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f'{path}: row {number}', row
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f'{path}: the parquet file cannot be read after row {number}: {error}') from None

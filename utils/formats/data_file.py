"""Data files as dictionaries with the place each came from, read in constant memory; text files also gzipped."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from utils.base.errors import ConfigError

SUFFIXES = ('.json', '.jsonl', '.csv', '.parquet', '.json.gz', '.jsonl.gz', '.csv.gz')

# A row and where it stands, e.g. 'data/train.jsonl:12'.
PlacedRow = tuple[str, dict[str, Any]]
# What is done about a row that cannot be read, given its place and what is wrong: raise, or note it and go on.
OnBad = Callable[[str, str], None]
Signature = tuple[int, int, int]

_BLOCK_BYTES = 1 << 20
_MAX_ROW_BYTES = 1 << 26
# Text shrinks 3 to 20 times. What swells more than this, beyond the first 64 MiB, was made to fill memory or disk.
_GZIP_RATIO, _GZIP_FREE_BYTES = 100, 1 << 26
_BLANK = re.compile(r'[ \t\r\n]*')
# Errors that near to the end of what is buffered may come from a value cut in two, such as `tru` or `\u00`.
_LONGEST_CUT = 12


class WrittenNumber(float):
    """A number of JSON that is text as it was written: 1.10 stays 1.10, and 1e22 is not 1e+22."""

    def __new__(cls, written: str) -> WrittenNumber:
        """Return the number that a text writes."""
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        """Return the text that was read."""
        return self.written


class Doubled(dict[str, Any]):
    """A row in which a JSON key stands twice in one object; the last one counts, as every JSON reader has it."""

    def __init__(self, row: dict[str, Any], keys: Iterable[str]) -> None:
        super().__init__(row)
        self.keys_twice = tuple(dict.fromkeys(keys))


class _JsonObjects:
    """Makes objects of the pairs that JSON gives, and remembers the keys that one object has twice."""

    def __init__(self) -> None:
        self.twice: list[str] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice += [name for name in made if names.count(name) > 1]
        return made

    def row(self, value: Any) -> Any:
        """Return a value whose objects were made here; a row with a key twice is marked."""
        if self.twice and isinstance(value, dict):
            value = Doubled(value, self.twice)
        self.twice.clear()
        return value


class UnreadableRow(ConfigError):
    """A row that cannot be read, with its place."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f'{place}: {problem}')
        self.place, self.problem = place, problem


def refuse(place: str, problem: str) -> NoReturn:
    """Raise: what a run does about a row that cannot be read."""
    raise UnreadableRow(place, problem)


def signature(path: Path) -> Signature:
    """Return size, time of change and inode, which tell whether a file is the one read before."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f'data file {path} cannot be read: {error.strerror}.') from None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def read_rows(
    path: Path, *, bad: OnBad = refuse, known: Signature | None = None, digest: Any = None
) -> Iterator[PlacedRow]:
    """Yield each row of a data file with its place; raises ConfigError naming file and line.

    `known` is the signature at an earlier reading: a file that changed since, or changes meanwhile, is refused.
    `digest` is a hash object that is fed what was read.
    """
    before = known or signature(path)
    if before[0] == 0:
        raise ConfigError(
            f'data file {path} is empty (0 bytes): there is nothing to read in it. Give another, or leave it out.'
        )
    readers = {'json': _read_json, 'jsonl': _read_jsonl, 'csv': _read_csv, 'parquet': _read_parquet}
    reader = readers[path.name.lower().removesuffix('.gz').rpartition('.')[2]]
    count = 0
    try:
        for place, row in reader(_Bytes(path, digest or hashlib.sha256()), bad):
            count += 1
            if isinstance(row, dict):
                yield place, row
            else:
                remedy = ' An array of rows belongs in a .json file: rename it.' if isinstance(row, list) else ''
                bad(place, f'a row must be an object with named columns, got {type(row).__name__}.{remedy}')
    except ConfigError:
        _check_unchanged(path, before)  # the truer reason, where it is one
        raise
    _check_unchanged(path, before)
    if count == 0:
        raise ConfigError(f'data file {path} holds no rows. Give another, or leave it out.')


def _check_unchanged(path: Path, before: Signature) -> None:
    if signature(path) != before:
        raise ConfigError(
            f'data file {path} changed while it was read, so its rows are neither the old ones nor the new ones. '
            'Wait until it is written, or give a copy of it.'
        )


class _Bytes:
    """A data file's bytes, unpacked, counted and hashed."""

    def __init__(self, path: Path, digest: Any) -> None:
        self.path, self.digest, self.total = path, digest, 0
        self.packed = path.suffix.lower() == '.gz'
        self.limit = max(_GZIP_FREE_BYTES, _GZIP_RATIO * path.stat().st_size)
        try:
            self.stream: Any = gzip.open(path) if self.packed else path.open('rb')  # noqa: SIM115 (closed at its end)
        except OSError as error:
            raise ConfigError(f'data file {path} cannot be read: {error.strerror}.') from None

    def _take(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            data = read(size)
        except (OSError, EOFError, zlib.error) as error:
            what = 'gzip file is broken' if self.packed else 'file cannot be read'
            raise ConfigError(
                f'{self.path}: the {what} after {self.total} bytes of data: {error}. Get it again.'
            ) from None
        self.total += len(data)
        if self.packed and self.total > self.limit:
            raise ConfigError(
                f'{self.path} unpacks to more than {_GZIP_RATIO} times its size, as no text of rows does: not read on. '
                'If it is meant, unpack it by hand.'
            )
        self.digest.update(data)
        if not data:
            self.stream.close()
        return data

    def block(self) -> bytes:
        return self._take(self.stream.read, _BLOCK_BYTES)

    def lines(self, bad: OnBad) -> Iterator[tuple[int, str]]:
        """Yield each line with its number; one that is not UTF-8 comes out empty where `bad` returns."""
        number = 0
        while line := self._take(self.stream.readline, _MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > _MAX_ROW_BYTES:
                refuse(f'{self.path}:{number}', f'a line of more than {_MAX_ROW_BYTES >> 20} MiB is no row.')
            try:
                text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
            except UnicodeDecodeError as error:
                bad(f'{self.path}:{number}', _not_utf8(self.path, error))
                text = '\n'
            yield number, text


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    said = f'byte 0x{error.object[error.start]:02x} is not UTF-8.'
    with path.open('rb') as stream:
        head = stream.read(1 << 10)
    if head.startswith(b'\x1f\x8b') and path.suffix.lower() != '.gz':
        return f'{said} The file is packed with gzip: rename it to {path.name}.gz.'
    encoding = _looks_like(head, error.object)
    return f'{said} It looks like {encoding}. Convert the file, e.g. iconv -f {encoding} -t UTF-8 {path.name}.'


def _looks_like(head: bytes, data: bytes) -> str:
    """Return the encoding that a file seems to be in, from its first bytes and from those that are not UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 'UTF-16'
    runs = re.findall(rb'[\x80-\xff]+', data)
    in_pairs = sum(len(run) for run in runs if len(run) > 1)
    try:
        data.decode('gb18030')
    except UnicodeDecodeError:
        return 'WINDOWS-1252'
    # A Chinese character is two bytes, most of them both above 127; accents of Western words stand alone.
    return 'GB18030' if 2 * in_pairs > sum(map(len, runs)) else 'WINDOWS-1252'


class _JsonText:
    """The text of a JSON file as far as it is needed: a block at a time, what was read let go."""

    def __init__(self, source: _Bytes) -> None:
        self.source = source
        self.text, self.position, self.line = '', 0, 1
        self._decode = codecs.getincrementaldecoder('utf-8-sig')().decode
        self._objects = _JsonObjects()
        self._parse = json.JSONDecoder(object_pairs_hook=self._objects, parse_float=WrittenNumber).raw_decode

    def _fill(self) -> bool:
        block = self.source.block()
        rest = self.text[self.position :]
        try:
            self.text, self.position = rest + self._decode(block, final=not block), 0
        except UnicodeDecodeError as error:
            line = self.line + rest.count('\n') + error.object.count(b'\n', 0, error.start)
            refuse(f'{self.source.path}:{line}', _not_utf8(self.source.path, error))
        return bool(block)

    def mark(self) -> str:
        """Return the next character that is no blank, '' at the end of the file."""
        while True:
            match = _BLANK.match(self.text, self.position)
            assert match is not None, 'matches the empty text'
            self.line += self.text.count('\n', self.position, match.end())
            self.position = match.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._fill():
                return ''

    def _refuse_value(self, position: int, why: str) -> NoReturn:
        line = self.line + self.text.count('\n', self.position, position)
        refuse(f'{self.source.path}:{line}', f'the JSON is broken in the row that starts at line {self.line}: {why}.')

    def value(self) -> Any:
        """Return the JSON value that starts here."""
        while True:
            self._objects.twice.clear()  # of a value that was cut by the end of what is buffered
            try:
                value, end = self._parse(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith('Unterminated') or error.pos + _LONGEST_CUT > len(self.text)
                if cut and len(self.text) - self.position < _MAX_ROW_BYTES and self._fill():
                    continue
                self._refuse_value(error.pos, error.msg)
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
                self._refuse_value(self.position, str(error))
            self.line += self.text.count('\n', self.position, end)
            self.position = end
            return self._objects.row(value)


def _read_json(source: _Bytes, bad: OnBad) -> Iterator[tuple[str, Any]]:
    """Yield the items of a JSON array, or of JSON lines that were named .json."""
    text, path = _JsonText(source), source.path
    if text.mark() != '[':
        yield from _read_jsonl(_Bytes(path, source.digest), bad)
        return
    text.position += 1
    expects_item = True
    while (mark := text.mark()) != ']':
        if mark == ',' and not expects_item:
            text.position, expects_item = text.position + 1, True
            continue
        if not mark or not expects_item:
            found = 'the end of the file' if not mark else repr(mark)
            refuse(f'{path}:{text.line}', f'the JSON array is broken here: expected , or ], found {found}.')
        yield f'{path}:{text.line}', text.value()
        expects_item = False
    text.position += 1
    if text.mark():
        refuse(f'{path}:{text.line}', 'something follows the end of the JSON array. A .json file holds one array.')


def read_objects(path: Path) -> Iterator[PlacedRow]:
    """Yield JSON objects that follow each other, with or without blanks, commas or brackets between them."""
    text, number = _JsonText(_Bytes(path, hashlib.sha256())), 0
    while mark := text.mark():
        if mark in ',[]':
            text.position += 1
            continue
        number, row = number + 1, text.value()
        if not isinstance(row, dict):
            refuse(
                f'{path}: object {number}',
                f'it must be an object with columns, got a {type(row).__name__}. Get it again.',
            )
        yield f'{path}: object {number}', row


def _read_jsonl(source: _Bytes, bad: OnBad) -> Iterator[tuple[str, Any]]:
    objects = _JsonObjects()
    parse = json.JSONDecoder(object_pairs_hook=objects, parse_float=WrittenNumber).decode
    seen = False
    for number, line in source.lines(bad):
        if not line.strip():
            continue
        first, seen = not seen, True
        place = f'{source.path}:{number}'
        try:
            row = objects.row(parse(line))
        except (ValueError, RecursionError) as error:
            if first and line.strip() in ('[', '{'):
                refuse(
                    place, 'JSON over several lines, and a .jsonl file holds one object per line. Rename it to .json.'
                )
            why = f'{error.msg} at column {error.colno}' if isinstance(error, json.JSONDecodeError) else str(error)
            bad(place, f'this line is not JSON ({why}). A .jsonl file holds one object per line.')
            continue
        yield place, row


def _check_header(place: str, cells: list[str]) -> None:
    """Refuse a header that no comma separates, or with several cells without a name (one may be an index)."""
    for mark, name in ((';', 'semicolons'), ('\t', 'tabs')):
        if len(cells) == 1 and mark in cells[0]:
            refuse(place, f'the header is separated by {name}, not by commas. Save the file with commas.')
    if sum(not cell.strip() for cell in cells) > 1:
        refuse(place, 'cells of the header are empty, as trailing commas make them. Remove the columns without a name.')


def _read_csv(source: _Bytes, bad: OnBad) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_MAX_ROW_BYTES)
    reader = csv.reader((text for _, text in source.lines(bad)), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None:
                header = cells or None
                _check_header(f'{source.path}:{line}', cells)
                if twice := [name for name in cells if cells.count(name) > 1]:
                    refuse(
                        f'{source.path}:{line}', f"the header names '{twice[0]}' twice. Rename or remove one of them."
                    )
            elif cells and len(cells) != len(header):
                bad(f'{source.path}:{line}', f'this row does not have {len(header)} cells as the header has.')
            elif cells:
                yield f'{source.path}:{line}', dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        refuse(f'{source.path}:{line}', f'the CSV is broken here: {error}.')


def own_keys(value: Any) -> Any:
    """Return a value without the keys that are null: a struct has the keys of all rows, a row only some of them."""
    if isinstance(value, dict):
        return {key: own_keys(item) for key, item in value.items() if item is not None}
    return [own_keys(item) for item in value] if isinstance(value, list) else value


def _read_parquet(source: _Bytes, bad: OnBad) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    while source.block():
        pass  # for the digest alone
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f'{source.path}: row {number}', {name: own_keys(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f'{source.path}: the parquet file cannot be read after row {number}: {error}. Get it again.'
        ) from None

"""Readers for data files. A reader yields each row as a dictionary, with the location of the row.

Memory use is constant. Files compressed with gzip can be read.
"""

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
from utils.base.names import TextRows

# Files with rows. Files with TEXT_SUFFIXES hold plain text without rows of their own.
SUFFIXES = ('.json', '.jsonl', '.csv', '.parquet', '.json.gz', '.jsonl.gz', '.csv.gz')

TEXT_SUFFIXES = ('.txt', '.md', '.txt.gz', '.md.gz')

# (location of a row, e.g. 'data/train.jsonl:12', the row)
LocatedRow = tuple[str, dict[str, Any]]
# Called as f(location, problem) for a row that cannot be read. It raises an error, or records the problem and returns.
OnBad = Callable[[str, str], None]
Signature = tuple[int, int, int]

_BLOCK_BYTES = 1 << 20
_MAX_ROW_BYTES = 1 << 26
# gzip compresses text 3 to 20 times. A file that expands to more than 100 times its size, and to more than 64 MiB, was
# probably made to fill the memory or the disk.
_GZIP_RATIO = 100
_GZIP_FREE_BYTES = 1 << 26
_BLANK = re.compile(r'[ \t\r\n]*')
# If a JSON error is this close to the end of the buffer, the value may only be truncated, such as `tru` or `\u00`.
_MAX_TRUNCATED = 12


_USE_ANOTHER = 'Use another file, or remove this one from --dataset.'
_CHECK_PATH = 'Check its path and its permissions.'
_DOWNLOAD_AGAIN = 'Download or copy the file again.'


class WrittenNumber(float):
    """A JSON number that keeps its text: 1.10 stays 1.10, and 1e22 does not become 1e+22."""

    def __new__(cls, written: str) -> WrittenNumber:
        """Parse the text of a number, and keep the text."""
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        """Return the text of the number in the file."""
        return self.written


class RowWithRepeatedKeys(dict[str, Any]):
    """A row with a JSON object that has the same key twice (`repeated_keys`). The last value of a key is used."""

    def __init__(self, row: dict[str, Any], keys: Iterable[str]) -> None:
        super().__init__(row)
        self.repeated_keys = tuple(dict.fromkeys(keys))


class _JsonObjects:
    """Makes a dict from the pairs of each JSON object, for a JSON parser. Records keys that an object has twice."""

    def __init__(self) -> None:
        self.repeated: list[str] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            self.repeated += [name for name in made if names.count(name) > 1]
        return made

    def row(self, value: Any) -> Any:
        """Return the value, as RowWithRepeatedKeys if repeated keys were recorded. Clears the recorded keys."""
        if self.repeated and isinstance(value, dict):
            value = RowWithRepeatedKeys(value, self.repeated)
        self.repeated.clear()
        return value


class UnreadableRow(ConfigError):
    """A row cannot be read. The error holds the location of the row."""

    def __init__(self, location: str, problem: str) -> None:
        super().__init__(f'{location}: {problem}')
        self.location = location
        self.problem = problem


def refuse(location: str, problem: str) -> NoReturn:
    """Raise UnreadableRow. With this function as `bad`, the first row that cannot be read ends the run."""
    raise UnreadableRow(location, problem)


def signature(path: Path) -> Signature:
    """Return (size, modification time, inode) of a file. If one of them differs later, the file was changed."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f'{path}: the data file cannot be read: {error.strerror}. {_CHECK_PATH}') from None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def read_rows(
    path: Path,
    *,
    bad: OnBad = refuse,
    known: Signature | None = None,
    digest: Any = None,
    text_rows: TextRows = 'document',
) -> Iterator[LocatedRow]:
    """Yield each row of a data file with its location. `bad` is called for a row that cannot be read.

    A text file has one row, or with 'paragraph' a row for each run of lines that are not blank. Its only column is
    `text`, which is empty for a file without text.

    Raises ConfigError if the file cannot be read, or has no rows. `known` is the signature from an earlier reading.
    Raises ConfigError if the file changed since then, or changes while it is read. `digest` is a hash object; it is
    updated with all bytes that are read.
    """
    before = known or signature(path)
    kind = path.name.lower().removesuffix('.gz').rpartition('.')[2]
    is_text = path.name.lower().endswith(TEXT_SUFFIXES)
    if before[0] == 0 and not is_text:
        raise ConfigError(f'{path}: the data file is empty (0 bytes). {_USE_ANOTHER}')

    readers = {'json': _read_json, 'jsonl': _read_jsonl, 'csv': _read_csv, 'parquet': _read_parquet}
    reader = _TEXT_READERS[text_rows] if is_text else readers[kind]
    count = 0
    try:
        for location, row in reader(_Bytes(path, digest or hashlib.sha256()), bad):
            count += 1
            if isinstance(row, dict):
                yield location, row
            else:
                remedy = ' Rename the file to .json if it holds an array of rows.' if isinstance(row, list) else ''
                bad(location, f'a row must be an object with named columns, got {type(row).__name__}.{remedy}')
    except ConfigError:
        _check_unchanged(path, before)  # if the file changed, this is the cause of the error
        raise
    _check_unchanged(path, before)

    if count == 0:
        raise ConfigError(f'{path}: the data file holds no rows. {_USE_ANOTHER}')


def _check_unchanged(path: Path, before: Signature) -> None:
    if signature(path) != before:
        raise ConfigError(
            f'{path}: the data file changed while being read. Wait until it is complete, or use a copy of it.'
        )


class _Bytes:
    """Reads the bytes of a data file, and decompresses, counts and hashes them."""

    def __init__(self, path: Path, digest: Any) -> None:
        self.path = path
        self.digest = digest
        self.total = 0
        self.is_gzip = path.suffix.lower() == '.gz'
        self.limit = max(_GZIP_FREE_BYTES, _GZIP_RATIO * path.stat().st_size)
        try:
            self.stream: Any = gzip.open(path) if self.is_gzip else path.open('rb')  # noqa: SIM115 (_take closes it)
        except OSError as error:
            raise ConfigError(f'{path}: the data file cannot be read: {error.strerror}. {_CHECK_PATH}') from None

    def _take(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            data = read(size)
        except (OSError, EOFError, zlib.error) as error:
            what = 'gzip file is broken' if self.is_gzip else 'file cannot be read'
            raise ConfigError(
                f'{self.path}: the {what} after {self.total} bytes of data: {error}. {_DOWNLOAD_AGAIN}'
            ) from None

        self.total += len(data)
        if self.is_gzip and self.total > self.limit:
            raise ConfigError(
                f'{self.path}: the file expands to more than {_GZIP_RATIO} times its size, which text never does, so '
                'reading stopped. If this is intended, decompress it yourself.'
            )

        self.digest.update(data)
        if not data:
            self.stream.close()
        return data

    def block(self) -> bytes:
        return self._take(self.stream.read, _BLOCK_BYTES)

    def lines(self, bad: OnBad) -> Iterator[tuple[int, str]]:
        """Yield (number, line) for each line. If a line is not UTF-8, calls `bad` and yields an empty line."""
        number = 0
        while line := self._take(self.stream.readline, _MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > _MAX_ROW_BYTES:
                refuse(
                    f'{self.path}:{number}',
                    f'this line exceeds {_MAX_ROW_BYTES >> 20} MiB, the limit for a row. Split the row, or check that '
                    'the file has line breaks.',
                )
            try:
                text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
            except UnicodeDecodeError as error:
                bad(f'{self.path}:{number}', _not_utf8(self.path, error))
                text = '\n'
            yield number, text


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Return the error message for text that is not UTF-8. The message names the likely encoding."""
    problem = f'byte 0x{error.object[error.start]:02x} is not UTF-8.'
    with path.open('rb') as stream:
        head = stream.read(1 << 10)
    if head.startswith(b'\x1f\x8b') and path.suffix.lower() != '.gz':
        return f'{problem} The file is compressed with gzip: rename it to {path.name}.gz.'

    encoding = _guess_encoding(head, error.object)
    return f'{problem} It looks like {encoding}. Convert the file, e.g. iconv -f {encoding} -t UTF-8 {path.name}.'


def _guess_encoding(head: bytes, data: bytes) -> str:
    """Return the likely encoding of a file, from its first bytes and from the bytes that are not UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 'UTF-16'

    runs = re.findall(rb'[\x80-\xff]+', data)
    in_pairs = sum(len(run) for run in runs if len(run) > 1)
    try:
        data.decode('gb18030')
    except UnicodeDecodeError:
        return 'WINDOWS-1252'

    # A Chinese character has two bytes, usually both above 127. Accented letters of Western words are single bytes.
    return 'GB18030' if 2 * in_pairs > sum(map(len, runs)) else 'WINDOWS-1252'


class _JsonText:
    """The text of a JSON file, read in blocks into a buffer. Parsed text is removed from the buffer."""

    def __init__(self, source: _Bytes) -> None:
        self.source = source
        self.text = ''
        self.position = 0
        self.line = 1
        self._decode = codecs.getincrementaldecoder('utf-8-sig')().decode
        self._objects = _JsonObjects()
        self._parse = json.JSONDecoder(object_pairs_hook=self._objects, parse_float=WrittenNumber).raw_decode

    def _fill(self) -> bool:
        """Append the next block to the unparsed text. Returns False at the end of the file."""
        block = self.source.block()
        rest = self.text[self.position :]
        try:
            self.text = rest + self._decode(block, final=not block)
            self.position = 0
        except UnicodeDecodeError as error:
            line = self.line + rest.count('\n') + error.object.count(b'\n', 0, error.start)
            refuse(f'{self.source.path}:{line}', _not_utf8(self.source.path, error))
        return bool(block)

    def next_character(self) -> str:
        """Skip whitespace and return the next character without consuming it. Returns '' at the end of the file."""
        while True:
            match = _BLANK.match(self.text, self.position)
            assert match is not None, 'the pattern also matches an empty text'
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
        """Return the JSON value that starts at the current position. Raises UnreadableRow if the JSON is broken."""
        while True:
            self._objects.repeated.clear()  # an attempt that failed at the end of the buffer may have recorded keys
            try:
                value, end = self._parse(self.text, self.position)
            except json.JSONDecodeError as error:
                is_truncated = error.msg.startswith('Unterminated') or error.pos + _MAX_TRUNCATED > len(self.text)
                if is_truncated and len(self.text) - self.position < _MAX_ROW_BYTES and self._fill():
                    continue
                self._refuse_value(error.pos, error.msg)
            except (ValueError, RecursionError) as error:  # a number is too long, or values are nested too deeply
                self._refuse_value(self.position, str(error))

            self.line += self.text.count('\n', self.position, end)
            self.position = end
            return self._objects.row(value)


def _read_json(source: _Bytes, bad: OnBad) -> Iterator[tuple[str, Any]]:
    """Yield the items of a JSON array. If the file does not start with '[', it is read as JSON lines."""
    path = source.path
    text = _JsonText(source)
    if text.next_character() != '[':
        yield from _read_jsonl(_Bytes(path, source.digest), bad)
        return

    text.position += 1
    expects_item = True
    while (character := text.next_character()) != ']':
        if character == ',' and not expects_item:
            text.position += 1
            expects_item = True
            continue
        if not character or not expects_item:
            found = repr(character) if character else 'the end of the file'
            refuse(f'{path}:{text.line}', f'the JSON array is broken here: expected , or ], found {found}.')
        yield f'{path}:{text.line}', text.value()
        expects_item = False

    text.position += 1
    if text.next_character():
        refuse(
            f'{path}:{text.line}',
            'something follows the end of the JSON array. A .json file holds one array: remove what follows it.',
        )


def read_objects(path: Path) -> Iterator[LocatedRow]:
    """Yield each JSON object of a file that contains several objects in sequence.

    Whitespace, commas and square brackets between the objects are ignored.
    """
    text = _JsonText(_Bytes(path, hashlib.sha256()))
    number = 0
    while character := text.next_character():
        if character in ',[]':
            text.position += 1
            continue

        number += 1
        row = text.value()
        if not isinstance(row, dict):
            refuse(
                f'{path}: object {number}',
                f'expected an object with named columns, got {type(row).__name__}. {_DOWNLOAD_AGAIN}',
            )
        yield f'{path}: object {number}', row


def _read_jsonl(source: _Bytes, bad: OnBad) -> Iterator[tuple[str, Any]]:
    objects = _JsonObjects()
    parse = json.JSONDecoder(object_pairs_hook=objects, parse_float=WrittenNumber).decode
    is_first = True
    for number, line in source.lines(bad):
        if not line.strip():
            continue

        location = f'{source.path}:{number}'
        try:
            row = objects.row(parse(line))
        except (ValueError, RecursionError) as error:
            if is_first and line.strip() in ('[', '{'):
                refuse(
                    location,
                    'the JSON value spans several lines, but a .jsonl file holds one object per line. '
                    'Rename the file to .json.',
                )
            is_first = False
            why = f'{error.msg} at column {error.colno}' if isinstance(error, json.JSONDecodeError) else str(error)
            bad(location, f'this line is not JSON ({why}). A .jsonl file holds one object per line.')
            continue

        is_first = False
        yield location, row


def _read_document(source: _Bytes, bad: OnBad) -> Iterator[tuple[str, Any]]:
    """Yield one row with the whole text of the file, unchanged."""
    lines: list[str] = []
    for _, line in source.lines(bad):
        if source.total > _MAX_ROW_BYTES:
            refuse(
                str(source.path),
                f'the document exceeds {_MAX_ROW_BYTES >> 20} MiB, which no row may. Split the file, or add '
                '--text_rows paragraph.',
            )
        lines.append(line)
    yield f'{source.path}:1', {'text': ''.join(lines)}


def _read_paragraphs(source: _Bytes, bad: OnBad) -> Iterator[tuple[str, Any]]:
    """Yield a row for each run of lines that are not blank. The line break after its last line is left out."""
    paragraph: list[str] = []
    first = 1
    has_text = False
    for number, line in source.lines(bad):
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield f'{source.path}:{first}', {'text': ''.join(paragraph).rstrip('\r\n')}
            paragraph = []
            has_text = True
    if paragraph or not has_text:
        yield f'{source.path}:{first}', {'text': ''.join(paragraph).rstrip('\r\n')}


_TEXT_READERS: dict[TextRows, Callable[[_Bytes, OnBad], Iterator[tuple[str, Any]]]] = {
    'document': _read_document,
    'paragraph': _read_paragraphs,
}


def _check_header(location: str, cells: list[str]) -> None:
    """Raise UnreadableRow if a header has no commas, repeated names, or several empty cells.

    One empty cell is allowed, because the header of an index column is often empty.
    """
    for mark, name in ((';', 'semicolons'), ('\t', 'tabs')):
        if len(cells) == 1 and mark in cells[0]:
            refuse(location, f'the header is separated by {name}, not by commas. Save the file with commas.')
    if sum(not cell.strip() for cell in cells) > 1:
        refuse(location, 'several cells of the header are empty, e.g. after trailing commas. Remove these columns.')
    repeated = [name for name in cells if cells.count(name) > 1]
    if repeated:
        refuse(location, f"the header names '{repeated[0]}' twice. Rename or remove one of these columns.")


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
            elif cells and len(cells) != len(header):
                bad(
                    f'{source.path}:{line}',
                    f'the number of cells in this row is {len(cells)}, but the header has {len(header)}. '
                    'Quote cells that contain commas.',
                )
            elif cells:
                yield f'{source.path}:{line}', dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        refuse(f'{source.path}:{line}', f'the CSV is broken here: {error}. Check the quotes in this row.')


def without_null_keys(value: Any) -> Any:
    """Return a value without the keys whose value is null.

    A struct in a parquet file has the same keys in every row. If the source row lacks a key, the value is null.
    """
    if isinstance(value, dict):
        return {key: without_null_keys(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_null_keys(item) for item in value]
    return value


def _read_parquet(source: _Bytes, bad: OnBad) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    while source.block():
        pass  # only to update the digest

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    cells = {name: without_null_keys(value) for name, value in row.items()}
                    yield f'{source.path}: row {number}', cells
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f'{source.path}: the parquet file cannot be read after row {number}: {error}. {_DOWNLOAD_AGAIN}'
        ) from None

"""Readers for data files. A reader yields each row as a dictionary, with the location of the row.

Memory use does not grow with the number of rows. Files compressed with gzip can be read, except parquet files.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from utils.base.errors import ConfigError
from utils.base.names import TextRows
from utils.formats import table
from utils.formats.file_bytes import CHECK_PATH, DOWNLOAD_AGAIN, MAX_ROW_BYTES, FileBytes, OnBad, refuse
from utils.formats.json_text import JsonParser
from utils.formats.table import Remark

# Files with rows. Files with TEXT_SUFFIXES hold plain text without rows of their own.
SUFFIXES = ('.json', '.jsonl', '.csv', '.tsv', '.parquet', '.json.gz', '.jsonl.gz', '.csv.gz', '.tsv.gz')
# The kinds of files for messages.
KINDS = '.json, .jsonl, .csv, .tsv, .txt, .md (each also .gz) or .parquet'

TEXT_SUFFIXES = ('.txt', '.md', '.txt.gz', '.md.gz')

# (location of a row, e.g. 'data/train.jsonl:12', the row)
LocatedRow = tuple[str, dict[str, Any]]
Signature = tuple[int, int, int]
# Yields (location, row) for each row of a file that can be read.
_Reader = Callable[[FileBytes, OnBad, Remark], Iterator[tuple[str, Any]]]

_BLANK = re.compile(r'[ \t\r\n]*')
# If a JSON error is this close to the end of the buffer, the value may only be truncated, such as `tru` or `\u00`.
_MAX_TRUNCATED = 12

_USE_ANOTHER = 'Use another file, or remove this one from --dataset.'


def signature(path: Path) -> Signature:
    """Return (size, modification time, inode) of a file. If one of them differs later, the file has changed.

    Raises ConfigError if the file does not exist or cannot be accessed.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f'{path}: the data file cannot be read: {error.strerror}. {CHECK_PATH}') from None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def ignore(remark: str) -> None:
    """Do nothing with a remark."""


def read_rows(
    path: Path,
    *,
    bad: OnBad = refuse,
    known: Signature | None = None,
    digest: Any = None,
    text_rows: TextRows = 'document',
    remark: Remark = ignore,
) -> Iterator[LocatedRow]:
    """Yield (location, row) for each row of a data file, in the order of the file.

    If a row cannot be read, but the rows after it can, `bad` is called with its location and the problem. If `bad` does
    not raise an error, reading continues with the next row. If the rest of the file cannot be read either, for example
    because a JSON array is broken, UnreadableRow (a ConfigError) is raised.

    A text file gives one row, which has only the column `text`. If `text_rows` is 'paragraph', a text file gives one
    row for each paragraph. Blank lines separate paragraphs. An empty text file gives one row with an empty text.

    `known` is the signature of the file when it was opened earlier in the run. `digest` is a hash object. It is updated
    with the bytes of the file, after decompression and conversion to UTF-8. `remark` is called with each remark on how
    the file is read.

    Raises ConfigError if the file cannot be read, if it has neither readable nor unreadable rows, or if its signature
    differs from `known` or changes while the file is read. A different signature is found only when the reading ends.
    """
    before = known or signature(path)
    kind = path.name.lower().removesuffix('.gz').rpartition('.')[2]
    is_text = path.name.lower().endswith(TEXT_SUFFIXES)
    if before[0] == 0 and not is_text:
        raise ConfigError(f'{path}: the data file is empty (0 bytes). {_USE_ANOTHER}')

    readers: dict[str, _Reader] = {
        'json': _read_json,
        'jsonl': _read_jsonl,
        'csv': _read_csv,
        'tsv': _read_tsv,
        'parquet': _read_parquet,
    }
    reader = _TEXT_READERS[text_rows] if is_text else readers[kind]
    count = 0

    def counted_bad(location: str, problem: str) -> None:
        nonlocal count
        count += 1
        bad(location, problem)

    try:
        source = FileBytes(path, digest or hashlib.sha256(), is_text=kind != 'parquet')
        for location, row in reader(source, counted_bad, remark):
            count += 1
            if isinstance(row, dict):
                yield location, row
            else:
                is_array = isinstance(row, list) and kind == 'jsonl'
                remedy = ' Rename the file to .json if it holds an array of rows.' if is_array else ''
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
            f'{path}: the data file has changed since it was opened. Wait until it is complete, or use a copy of it.'
        )


def _spans_lines(line: str, error: Exception, following: str) -> bool:
    """Return whether the JSON value in `line` continues in `following`, the text after the line.

    `error` is the error of parsing `line`. Returns False if `line` is a row that was cut off. A row was cut off if it
    has a string without a closing quote, or if `following` starts with {, which begins the next row. But after a line
    that ends with [, the { continues the value.
    """
    if not isinstance(error, json.JSONDecodeError) or error.msg.startswith('Unterminated'):
        return False
    start = line.rstrip()
    is_row = following.lstrip().startswith('{') and not start.endswith('[')
    return error.pos >= len(start) and bool(following.strip()) and not is_row


class _JsonText:
    """The text of a JSON file, read in blocks into a buffer. Parsed text is removed from the buffer."""

    def __init__(self, source: FileBytes) -> None:
        self.source = source
        self.text = ''
        self.position = 0
        self.line = 1
        self._decode = codecs.getincrementaldecoder('utf-8-sig')().decode
        self._parser = JsonParser()

    def _fill(self) -> bool:
        """Append the next block to the unparsed text. Returns False at the end of the file.

        Raises UnreadableRow if the block is not UTF-8.
        """
        block = self.source.block()
        rest = self.text[self.position :]
        try:
            self.text = rest + self._decode(block, final=not block)
            self.position = 0
        except UnicodeDecodeError as error:
            line = self.line + rest.count('\n') + error.object.count(b'\n', 0, error.start)
            refuse(f'{self.source.path}:{line}', self.source.not_utf8(error))
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

    def spans_lines(self) -> bool:
        """Return whether the JSON value at the current position goes on after the end of its line."""
        line, _, following = self.text[self.position :].partition('\n')
        try:
            self._parser.parse(line)
        except (ValueError, RecursionError) as error:
            return _spans_lines(line, error, following)
        finally:
            self._parser.repeated.clear()
        return False

    def _refuse_value(self, position: int, why: str) -> NoReturn:
        line = self.line + self.text.count('\n', self.position, position)
        refuse(f'{self.source.path}:{line}', f'the JSON is broken in the row that starts at line {self.line}: {why}.')

    def value(self) -> Any:
        """Return the JSON value that starts at the current position.

        Raises UnreadableRow if the JSON is broken, or if the value is larger than the limit for a row.
        """
        while True:
            self._parser.repeated.clear()  # an attempt that failed at the end of the buffer may have recorded keys
            try:
                value, end = self._parser.parse_start(self.text, self.position)
            except json.JSONDecodeError as error:
                is_truncated = error.msg.startswith('Unterminated') or error.pos + _MAX_TRUNCATED > len(self.text)
                is_short = len(self.text) - self.position < MAX_ROW_BYTES
                if is_truncated and not is_short:
                    refuse(
                        f'{self.source.path}:{self.line}',
                        f'the row that starts here exceeds {MAX_ROW_BYTES >> 20} MiB, the limit for a row. Split the '
                        'row.',
                    )
                if is_truncated and self._fill():
                    continue
                self._refuse_value(error.pos, error.msg)
            except (ValueError, RecursionError) as error:  # a number is too long, or values are nested too deeply
                self._refuse_value(self.position, str(error))

            self.line += self.text.count('\n', self.position, end)
            self.position = end
            return self._parser.row(value)


def _read_json(source: FileBytes, bad: OnBad, remark: Remark) -> Iterator[tuple[str, Any]]:
    """Yield (location, item) for each item of a JSON array, or for each JSON value of a file without an array.

    The file has no array if its first character, after whitespace, is not '['. If the first line of such a file holds
    only a part of a value, the values may have several lines each. Otherwise, the file is read as JSON lines.
    """
    path = source.path
    text = _JsonText(source)
    if text.next_character() != '[':
        if text.spans_lines():
            while text.next_character():
                yield f'{path}:{text.line}', text.value()
        else:
            yield from _read_jsonl(FileBytes(path, source.digest), bad, remark)
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
            expected = 'a row or ]' if expects_item else ', or ]'
            refuse(f'{path}:{text.line}', f'the JSON array is broken here: expected {expected}, found {found}.')
        yield f'{path}:{text.line}', text.value()
        expects_item = False

    text.position += 1
    if text.next_character():
        refuse(
            f'{path}:{text.line}',
            'something follows the end of the JSON array. A .json file holds one array: remove what follows it.',
        )


def read_objects(path: Path) -> Iterator[LocatedRow]:
    """Yield (location, object) for each JSON object of a file that contains several objects in sequence.

    Whitespace, commas and square brackets between the objects are ignored. The location names the number of the object,
    counted from 1. Raises UnreadableRow if the JSON is broken, or if a value between the objects is not an object.
    """
    text = _JsonText(FileBytes(path, hashlib.sha256()))
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
                f'expected an object with named columns, got {type(row).__name__}. {DOWNLOAD_AGAIN}',
            )
        yield f'{path}: object {number}', row


def _read_jsonl(source: FileBytes, bad: OnBad, remark: Remark) -> Iterator[tuple[str, Any]]:
    path = source.path
    parser = JsonParser()
    is_first = True
    # The last line, if it is not JSON: (location, text, error). It is reported when it is known what follows it.
    broken: tuple[str, str, Exception] | None = None
    for number, line in source.lines(bad):
        if not line.strip():
            continue

        if broken is not None:
            location, text, problem = broken
            if is_first and _spans_lines(text, problem, line):
                refuse(
                    location,
                    'the JSON value spans several lines, but a .jsonl file holds one object per line. '
                    'Rename the file to .json.',
                )
            _tell_broken(bad, location, text, problem, is_last=False)
            is_first = False
            broken = None

        text = line.rstrip('\r\n')
        try:
            row = parser.row(parser.parse(text))
        except (ValueError, RecursionError) as error:
            parser.repeated.clear()
            broken = (f'{path}:{number}', text, error)
            continue

        is_first = False
        yield f'{path}:{number}', row

    if broken is not None:
        _tell_broken(bad, *broken, is_last=True)


def _tell_broken(bad: OnBad, location: str, line: str, error: Exception, *, is_last: bool) -> None:
    """Call `bad` for a line that is not JSON because of `error`. `is_last` says whether no row follows the line."""
    why = str(error)
    is_cut = False
    if isinstance(error, json.JSONDecodeError):
        why = f'{error.msg} at column {error.colno}'
        is_cut = error.msg.startswith('Unterminated') or error.pos + _MAX_TRUNCATED > len(line)

    if is_last and is_cut and line.lstrip().startswith('{'):
        bad(
            location,
            f'this line is not JSON ({why}): the file ends before the row does, so it was not written or copied '
            'completely. Remove this line, or write the other rows to a new file with --check_dataset true '
            '--write_clean NEW.jsonl.',
        )
    else:
        bad(location, f'this line is not JSON ({why}). Write one JSON object per line.')


def _read_document(source: FileBytes, bad: OnBad, remark: Remark) -> Iterator[tuple[str, Any]]:
    """Yield one row with the whole text of the file, unchanged.

    Raises UnreadableRow if the text is not UTF-8 or exceeds the limit for a row.
    """
    lines: list[str] = []
    for _, line in source.lines(refuse):  # without an unreadable line, the text would not be the document
        if source.total > MAX_ROW_BYTES:
            refuse(
                str(source.path),
                f'the document exceeds {MAX_ROW_BYTES >> 20} MiB, which no row may. Split the file, or add '
                '--text_rows paragraph.',
            )
        lines.append(line)
    yield f'{source.path}:1', {'text': ''.join(lines)}


def _read_paragraphs(source: FileBytes, bad: OnBad, remark: Remark) -> Iterator[tuple[str, Any]]:
    """Yield a row for each paragraph. A paragraph consists of lines without a blank line between them.

    A line with only whitespace is blank. The line break at the end of a paragraph is left out. A file that has only
    blank lines gives one row with an empty text. Raises UnreadableRow if a line is not UTF-8.
    """
    paragraph: list[str] = []
    first = 1
    has_text = False
    for number, line in source.lines(refuse):  # a text without one of its lines is no row
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield f'{source.path}:{first}', {'text': ''.join(paragraph).rstrip('\r\n')}
            paragraph = []
            has_text = True
    if paragraph or not has_text:
        yield f'{source.path}:{first}', {'text': ''.join(paragraph).rstrip('\r\n')}


_TEXT_READERS: dict[TextRows, _Reader] = {
    'document': _read_document,
    'paragraph': _read_paragraphs,
}


def _read_csv(source: FileBytes, bad: OnBad, remark: Remark) -> Iterator[tuple[str, Any]]:
    return table.read_table(source, bad, remark, usual=',')


def _read_tsv(source: FileBytes, bad: OnBad, remark: Remark) -> Iterator[tuple[str, Any]]:
    return table.read_table(source, bad, remark, usual='\t')


def without_null_keys(value: Any) -> Any:
    """Return a value without the keys whose value is null. Keys of nested objects are removed too.

    A struct in a parquet file has the same keys in every row. If the source row lacks a key, the value is null.
    """
    if isinstance(value, dict):
        return {key: without_null_keys(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_null_keys(item) for item in value]
    return value


def _read_parquet(source: FileBytes, bad: OnBad, remark: Remark) -> Iterator[tuple[str, Any]]:
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
            f'{source.path}: the parquet file cannot be read after row {number}: {error}. {DOWNLOAD_AGAIN}'
        ) from None

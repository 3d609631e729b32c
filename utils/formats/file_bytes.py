"""Reads the bytes of a data file. Compressed bytes are decompressed, and UTF-16 and UTF-32 are converted to UTF-8."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from utils.base.errors import ConfigError
from utils.formats.encodings import guess_encoding

# Called as f(location, problem) for a row that cannot be read. It raises an error, or records the problem and returns.
OnBad = Callable[[str, str], None]

BLOCK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 26
CHECK_PATH = 'Check its path and its permissions.'
DOWNLOAD_AGAIN = 'Download or copy the file again.'

# gzip compresses text 3 to 20 times. A file that expands to more than 100 times its size, and to more than 64 MiB, was
# probably made to fill the memory or the disk.
_GZIP_RATIO = 100
_GZIP_FREE_BYTES = 1 << 26
# The first bytes of a file, from which its kind is recognised.
_HEAD_BYTES = 64
# The byte-order marks of text that is converted to UTF-8, and its encoding. The mark of UTF-32-LE starts like the mark
# of UTF-16-LE.
_WIDE = (
    (codecs.BOM_UTF32_LE, 'utf-32'),
    (codecs.BOM_UTF32_BE, 'utf-32'),
    (codecs.BOM_UTF16_LE, 'utf-16'),
    (codecs.BOM_UTF16_BE, 'utf-16'),
)
# The first bytes of files that are not text, and the remedy for such a file.
_NOT_TEXT = (
    (b'\x1f\x8b', 'The file is compressed with gzip: rename it to {name}.gz.'),
    (b'PAR1', 'This is a parquet file: rename it to {stem}.parquet.'),
    (b'PK\x03\x04', 'This is an Excel workbook or a zip archive. Unpack it, or save the table as CSV UTF-8.'),
)


class UnreadableRow(ConfigError):
    """A row, or the rest of the file from this row on, cannot be read. The error holds the location of the row."""

    def __init__(self, location: str, problem: str) -> None:
        super().__init__(f'{location}: {problem}')
        self.location = location
        self.problem = problem


def refuse(location: str, problem: str) -> NoReturn:
    """Raise UnreadableRow.

    Pass this function to a reader as its argument `bad`. Then the reader stops at the first row that cannot be read.
    """
    raise UnreadableRow(location, problem)


# The name under which `_mark` is registered as an error handler of codecs.
_MARKED = 'assay_marked'


def _mark(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return a replacement for an invalid character, and the position after it. UTF-8 cannot contain the replacement.

    An invalid character is half of a character (a lone surrogate), or in UTF-32 also a number beyond Unicode.
    """
    try:
        return codecs.lookup_error('surrogatepass')(error)
    except UnicodeDecodeError as invalid:
        return '\udfff', invalid.end


class _Converted(io.RawIOBase):
    """A stream that converts text in UTF-16 or UTF-32 to UTF-8.

    An incomplete or invalid character becomes bytes that are not UTF-8. So the reader reports the line that has it, and
    can read the other lines.
    """

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream = stream
        codecs.register_error(_MARKED, _mark)
        self._decoder = codecs.getincrementaldecoder(encoding)(_MARKED)
        self._ready = b''

    def readable(self) -> bool:
        """Return True: the stream can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Write the next bytes into the buffer. Returns the number of bytes, which is 0 at the end of the file."""
        while not self._ready:
            block = self._stream.read(BLOCK_BYTES)
            self._ready = self._decoder.decode(block).encode('utf-8', 'surrogatepass')
            if not block:
                if not self._decoder.getstate()[0]:
                    return 0
                self._decoder.reset()
                self._ready = b'\xff'

        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)


class FileBytes:
    """Reads the bytes of a data file, counts them in `total`, and updates the hash object `digest` with them.

    If the file name ends with .gz, the bytes are decompressed. A text file in UTF-16 or UTF-32 with a byte-order mark
    is converted to UTF-8. The bytes are counted and hashed after this.
    """

    def __init__(self, path: Path, digest: Any, *, is_text: bool = True) -> None:
        """Open the file. Raises ConfigError if this fails.

        If `is_text` is True, raises UnreadableRow (a ConfigError) if the first bytes show that the file is not text.
        """
        self.path = path
        self.digest = digest
        self.total = 0
        self.is_gzip = path.suffix.lower() == '.gz'
        # The encoding of the file if it is converted to UTF-8, else ''.
        self.converted = ''
        try:
            self.limit = max(_GZIP_FREE_BYTES, _GZIP_RATIO * path.stat().st_size)
            self.stream: Any = gzip.open(path) if self.is_gzip else path.open('rb')  # noqa: SIM115 (_take closes it)
        except OSError as error:
            raise ConfigError(f'{path}: the data file cannot be read: {error.strerror}. {CHECK_PATH}') from None
        if is_text:
            self._recognise(self._guarded(self.stream.peek, _HEAD_BYTES)[:_HEAD_BYTES])

    def _recognise(self, head: bytes) -> None:
        """Convert the stream to UTF-8 if its first bytes, `head`, are a byte-order mark of UTF-16 or UTF-32.

        Raises UnreadableRow if `head` is the start of a gzip, parquet or zip file. Raises UnreadableRow also if `head`
        has NUL bytes but no byte-order mark, because the encoding is then not certain.
        """
        self.converted = next((encoding for mark, encoding in _WIDE if head.startswith(mark)), '')
        if self.converted:
            self.stream = io.BufferedReader(_Converted(self.stream, self.converted), BLOCK_BYTES)
            return

        name = self.path.name
        for start, remedy in _NOT_TEXT:
            if head.startswith(start):
                self.stream.close()
                shown = remedy.format(name=name, stem=name.partition('.')[0])
                refuse(f'{self.path}:1', f'the file is not text. {shown}')
        if b'\0' in head:
            self.stream.close()
            even, odd = head[::2].count(0), head[1::2].count(0)
            encoding = 'UTF-16LE' if odd > even else 'UTF-16BE'
            refuse(f'{self.path}:1', f'the text has NUL bytes, so it is probably not UTF-8. {_convert(encoding, name)}')

    def _guarded(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except (OSError, EOFError, zlib.error) as error:
            problem = 'the gzip file is broken' if self.is_gzip else 'the file cannot be read'
            raise ConfigError(
                f'{self.path}: {problem} after {self.total} bytes of data ({error}). {DOWNLOAD_AGAIN}'
            ) from None

    def _take(self, read: Callable[[int], bytes], size: int) -> bytes:
        data = self._guarded(read, size)
        self.total += len(data)
        if self.is_gzip and self.total > self.limit:
            raise ConfigError(
                f'{self.path}: the file expands to more than {_GZIP_RATIO} times its size, which text never does, so '
                'reading stopped. If this size is intended, decompress the file and give the decompressed file instead.'
            )

        self.digest.update(data)
        if not data:
            self.stream.close()
        return data

    def block(self) -> bytes:
        """Return the next bytes of the file. Returns b'' at the end."""
        return self._take(self.stream.read, BLOCK_BYTES)

    def lines(self, bad: OnBad) -> Iterator[tuple[int, str]]:
        """Yield (number, line) for each line, with its line break. Numbers are counted from 1.

        If a line is not UTF-8, `bad` is called, and a line break alone is yielded. Raises UnreadableRow if a line
        exceeds the limit for a row.
        """
        number = 0
        while line := self._take(self.stream.readline, MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                refuse(
                    f'{self.path}:{number}',
                    f'this line exceeds {MAX_ROW_BYTES >> 20} MiB, the limit for a row. Split the row, or check that '
                    'the file has line breaks.',
                )
            try:
                text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
            except UnicodeDecodeError as error:
                bad(f'{self.path}:{number}', self.not_utf8(error))
                text = '\n'
            yield number, text

    def not_utf8(self, error: UnicodeDecodeError) -> str:
        """Return the message for a byte that is not UTF-8, with a remedy. The message names the likely encoding.

        If this object converts the file from UTF-16 or UTF-32 (see `converted`), the message says instead that a
        character is incomplete or invalid.
        """
        if self.converted:
            return (
                f'an incomplete or invalid character: the file is marked as {self.converted.upper()}. {DOWNLOAD_AGAIN}'
            )

        problem = f'byte 0x{error.object[error.start]:02x} is not UTF-8.'
        return f'{problem} {_convert(guess_encoding(error.object[error.start :]), self.path.name)}'


def _convert(encoding: str, name: str) -> str:
    """Return sentences that name the likely encoding and the command that converts the file to UTF-8."""
    command = f'iconv -f {encoding} -t UTF-8 {name}'
    if name.lower().endswith('.gz'):
        command = f'gzip -dc {name} | iconv -f {encoding} -t UTF-8'
    return f'It looks like {encoding}. Convert the file, e.g. {command}.'

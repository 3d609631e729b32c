"""The cleaned copy of the data (--write_clean): the rows of --dataset that a run can use, without repeated rows."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from utils.base.errors import ConfigError
from utils.data.tally import counted
from utils.formats.conversation import Row
from utils.formats.messages_form import json_line, messages_form

NOT_DRAWN_ROW = 'row that is not drawn (--train_dataset_sample, or # or % after a data set)'
OF_VALIDATION = 'row of a validation set'


class CleanCopy:
    """Writes rows to a new file of JSON lines. The file is complete or absent. It is absent if no row was written.

    A conversation is written in the column `messages`, plain text in the column `text`.

    The rows are written to a temporary file in the same folder, which `finish` renames. If the name ends in .gz, the
    file is compressed. Each method raises ConfigError if the file cannot be written.
    """

    def __init__(self, path: Path, *, marks_loss: bool, sees_images: bool = False) -> None:
        """Open the temporary file. Its folder is created if it does not exist.

        With `marks_loss`, replies without loss get `"loss": false`. `sees_images` says whether the model accepts
        images. If it is False, the bytes of images are not written.
        """
        self.path = path
        self.marks_loss = marks_loss
        self.sees_images = sees_images
        # Whether the rows are plain text. None before the first row.
        self.is_text: bool | None = None
        self.rows = 0
        # The numbers of rows that can be trained on and that are not written, by reason.
        self.skipped: Counter[str] = Counter()
        # The numbers of rows in which an unused column or key is not copied.
        self.not_copied: Counter[str] = Counter()
        self._temporary = path.with_name(f'.{path.name}.aside')
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._temporary.open('wb')
        self._stream: Any = self._file
        if path.suffix.lower() == '.gz':
            self._stream = gzip.GzipFile(filename='', mode='wb', fileobj=self._file, mtime=0)

    def __enter__(self) -> CleanCopy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Delete the temporary file if it is not renamed."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, row: Row) -> None:
        """Write a row. Raises ConfigError if the file would hold both conversations and plain text."""
        if self.is_text not in (None, row.is_text):
            raise ConfigError(
                f'--write_clean {self.path}: {row.origin} and the rows before it are of two kinds, conversations and '
                'plain text, and a file can hold only one kind. Run the command once for each kind of data, each time '
                'with a new file for --write_clean.'
            )
        self.is_text = row.is_text
        folder = self.path.absolute().parent
        made = messages_form(row, folder, marks_loss=self.marks_loss, sees_images=self.sees_images)
        with _named(self.path):
            self._stream.write(json_line(made.row))
        self.rows += 1
        self.not_copied.update(set(made.not_copied))

    def skip(self, reason: str) -> None:
        """Count, under `reason`, a row that could be trained on but is not written."""
        self.skipped[reason] += 1

    def finish(self) -> None:
        """Give the temporary file its final name. Does not rename it if no row was written.

        Raises ConfigError if a file with the final name exists.
        """
        with _named(self.path):
            if self._stream is not self._file:
                self._stream.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            if not self.rows:
                return
            if self.path.exists():
                raise ConfigError(f'--write_clean {self.path} was made by another program meanwhile. Name a new file.')
            self._temporary.rename(self.path)

    def record(self, left_out: Mapping[str, int]) -> dict[str, Any]:
        """Return the counts for the report. `left_out` maps reasons to the number of rows that cannot be trained on."""
        return {
            'file': str(self.path),
            'rows': self.rows,
            'not_written': dict(self.skipped + Counter(left_out)),
            'not_copied': dict(self.not_copied),
        }


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """A context that turns an OSError into a ConfigError that names the file `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f'--write_clean {path} cannot be written: {error.strerror}. Give a file in another folder.'
        ) from error


def lines(record: Mapping[str, Any], read: int) -> list[str]:
    """Return the counts as lines of text.

    `record` is the result of `CleanCopy.record`. `read` is the number of all rows that the data check read.
    """
    counts = ', '.join(f'{count} {reason}' for reason, count in record['not_written'].items())
    said = f'wrote {record["rows"]} of {read} rows to {record["file"]}'
    if not record['rows']:
        said = f'wrote no file {record["file"]}: none of {read} rows can be written'
    found = [said + (f'; not written: {counts}' if counts else '')]
    if record['not_copied']:
        names = ', '.join(f'{name} in {counted(rows, "row")}' for name, rows in record['not_copied'].items())
        found.append(f'not copied: {names}')
    return found

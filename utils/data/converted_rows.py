"""Converts the rows of a file or data set to conversations. The first row limits the formats of the other rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.base.errors import ConfigError
from utils.formats.columns import Converter, find_converter, needed_columns, tidy_columns
from utils.formats.conversation import BadRow, Row
from utils.formats.data_file import ignore
from utils.formats.images import with_image_files
from utils.formats.json_text import RowWithRepeatedKeys, repeated_key, with_columns
from utils.formats.reading import Reading
from utils.formats.row_check import check_row
from utils.formats.table import Remark
from utils.formats.unknown_columns import unknown_columns

# Files are read with the names that they give their columns.
AS_WRITTEN = Reading()

# (location, columns, conversation). If the columns contain no usable conversation, the third item is a BadRow.
ReadRow = tuple[str, dict[str, Any], Row | BadRow]


def converted(
    located: Iterable[tuple[str, dict[str, Any] | BadRow]],
    name: str,
    *,
    folder: str | None = None,
    reading: Reading = AS_WRITTEN,
    seen: dict[str, None] | None = None,
    remark: Remark = ignore,
    of_function: bool = False,
) -> Iterator[ReadRow]:
    """Convert the rows of a data set, and yield (location, columns, conversation) for each row.

    The columns of a row decide its format. If a row cannot be converted, a BadRow is yielded instead of the
    conversation. Raises ConfigError if the format of the first row is unknown or not clear, or if --columns gives two
    columns of a row the same name.

    A row may have a different format than the first row. But it is a BadRow if it has a column that the first format
    requires, because it may be an incomplete row of the first format. It is also a BadRow if only one of the two
    formats is plain text.

    If the columns of the first row fit a format only without capital letters and outer spaces, they are renamed in all
    rows. For example, 'Query ' is read as 'query'. `remark` is called with a text for the log if columns are renamed in
    this way, and once for each format that differs from the first format.

    `name` is the name of the data set or file in messages. Relative paths of images start in `folder`. The columns of
    the first row are added to `seen`, and also all columns that --columns renames. `of_function` says whether the rows
    come from an entry of DATASET_MAPPING: from a function, or from `to_row` of a HubDataset.
    """
    conversion = _Conversion(
        name=name,
        folder=folder,
        reading=reading,
        seen={} if seen is None else seen,
        remark=remark,
        of_function=of_function,
    )
    for location, written in located:
        if isinstance(written, BadRow):
            yield location, {}, type(written)(f'dropped by {name}: {written}', written.column)
        else:
            yield conversion.convert(location, written)


@dataclass(kw_only=True)
class _Conversion:
    """Converts rows one after another. The fields above the blank line are the arguments of `converted`."""

    name: str
    folder: str | None
    reading: Reading
    seen: dict[str, None]
    remark: Remark
    of_function: bool

    # The converter and the columns of the first row. The converter is None until the first row is converted.
    first: Converter | None = None
    first_columns: frozenset[str] = frozenset()
    # {column in the file: the known name by which it is read}, for names such as 'Query '.
    tidied: dict[str, str] = field(default_factory=dict)
    # The converters of rows in another format than the first row.
    others: list[Converter] = field(default_factory=list)

    def convert(self, location: str, written: dict[str, Any]) -> ReadRow:
        """Return (location, columns, conversation or BadRow). Raises ConfigError in the same cases as `converted`."""
        raw = self.reading.renamed(written, location)
        if self.first is None:
            self._tidy(raw, written)
        if self.tidied:
            raw = with_columns(raw, self.tidied)
        if self.first is None:
            self._begin(raw, written, location)
        elif raw is not written:
            self.seen.update(dict.fromkeys(self.reading.columns.keys() & written.keys()))

        try:
            converter = self._converter_of(raw, location)
            columns = dict(with_image_files(raw))
            row = check_row(converter(columns))
        except BadRow as problem:
            return location, raw, problem

        row.origin = location
        row.folder = self.folder
        if isinstance(raw, RowWithRepeatedKeys):
            row.notes = tuple(dict.fromkeys([*row.notes, *map(repeated_key, raw.repeated_keys)]))
        return location, columns, row

    def _tidy(self, raw: Mapping[str, Any], written: Mapping[str, Any]) -> None:
        """Set `tidied` for the columns of the first row. Call `remark` if a column is read by another name.

        `written` is the first row with the column names of the file. All these names are added to `seen`. `raw` is the
        same row with the names of --columns.
        """
        self.seen.update(dict.fromkeys(map(str, written)))
        self.tidied = tidy_columns(list(map(str, raw)))
        if self.tidied:
            shown = ', '.join(f"'{column}' as {read_as}" for column, read_as in self.tidied.items())
            self.remark(f'{self.name}: columns are read by other names than they are written: {shown}')

    def _begin(self, raw: Mapping[str, Any], written: Mapping[str, Any], location: str) -> None:
        """Store the converter of the first row. `raw` is the row `written` with renamed columns.

        Raises ConfigError if no converter fits its columns.
        """
        self.first = find_converter(raw)
        self.first_columns = frozenset(raw)
        if self.first is None:
            missing = self.reading.missing(list(map(str, written)), location)
            unknown = unknown_columns(raw, self.name, of_function=self.of_function)
            raise ConfigError(*missing, f'{location}: {unknown}')

    def _converter_of(self, raw: Mapping[str, Any], location: str) -> Converter:
        """Return the converter that fits the columns of a row. Raises BadRow if the row cannot be read."""
        assert self.first is not None, 'set by the first row'
        own = find_converter(raw)
        if own is self.first:
            return own
        if own is None or not _is_other_format(self.first, own, raw):
            raise _other_columns(self.first, self.first_columns, raw)
        if own not in self.others:
            self.others.append(own)
            needed = '/'.join(column for column in raw if column in needed_columns(own))
            self.remark(f'{self.name}: rows with {needed} are read too, from {location}: each row by its own columns')
        return own


def _is_other_format(first: Converter, own: Converter, raw: Mapping[str, Any]) -> bool:
    """Return whether a row may have a different format than the first row.

    `first` is the converter of the first row. `own` is a different converter, and fits the columns of this row.

    Returns False if the row has a column that `first` requires, because the row may be an incomplete row of the first
    format. Also returns False if one of the formats is plain text, because the file of --write_clean cannot hold both
    plain text and conversations.
    """
    needed = needed_columns(first)
    is_text = 'text' in needed or 'text' in needed_columns(own)
    return needed.isdisjoint(raw) and not is_text


def _other_columns(converter: Converter, first: frozenset[str], raw: Mapping[str, Any]) -> BadRow:
    """Return a BadRow that says why the converter of the first row cannot read this row."""
    needed = needed_columns(converter)
    if needed <= set(raw):
        others = ', '.join(sorted(set(raw) - first))
        return BadRow(f'the row has a different format than the first row, because it has the columns {others}', others)
    missing = ', '.join(sorted(needed - set(raw)))
    return BadRow(f'columns are missing that the first row has: {missing}', missing)


def open_replies(row: Row) -> int:
    """Return the number of replies before the last message that have no key `loss`.

    The key says whether a reply carries loss.
    """
    return sum(message['role'] == 'assistant' and 'loss' not in message for message in row.messages[:-1])


def row_notes(row: Row) -> list[str]:
    """Return the notes of a row, and one more note for each of its unused columns and keys."""
    return [*row.notes, *map(unused_note, row.unused)]


def unused_note(name: str) -> str:
    """Return the note that a column or key is not used. For 'column `id`', it is 'column `id` is not used'."""
    return f'{name} is not used'

"""Reads tables in text files: CSV and TSV, also with the separators and empty cells that spreadsheet programs write."""

from __future__ import annotations

import csv
import itertools
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from utils.formats.file_bytes import MAX_ROW_BYTES, FileBytes, OnBad, refuse

# Called with a remark on how a file is read.
Remark = Callable[[str], None]

_NAMES = {',': 'commas', ';': 'semicolons', '\t': 'tabs', '|': 'vertical bars'}
_SEPARATORS = (',', ';', '\t')
# Excel reads such a first line, and some programs write it for Excel.
_STATED = re.compile(r'"?sep=(.)"?\r?\n?', re.IGNORECASE)
# The separator is found from so many lines and characters at the start of a file.
_HEAD_LINES = 200
_HEAD_CHARACTERS = 1 << 20
_STATE_IT = 'Write the separator into a line before the header: sep=; or sep=, or sep= and a tab.'


def _named(separator: str) -> str:
    return _NAMES.get(separator, f"'{separator}'")


def _first_lines(lines: Iterator[tuple[int, str]]) -> list[str]:
    found: list[str] = []
    size = 0
    for _, text in lines:
        found.append(text)
        size += len(text)
        if len(found) == _HEAD_LINES or size > _HEAD_CHARACTERS:
            break
    return found


def _widths(head: Sequence[str], separator: str) -> list[int]:
    """Return the number of cells of each row in `head`, the first lines of a file. Rows without any text are skipped.

    The list ends before the first row that is not valid CSV, or that does not end within `head`.
    """
    found: list[int] = []
    try:
        for cells in csv.reader(head, delimiter=separator, strict=True):
            if any(cell.strip() for cell in cells):
                found.append(len(cells))
    except csv.Error:
        pass
    return found


def _find_separator(location: str, head: Sequence[str], usual: str) -> str:
    """Return the separator of a table, from its header and its first rows.

    Returns `usual` if no separator splits the header into several cells. If several separators split the header, the
    one that gives the header and all rows the same number of cells is returned. Raises UnreadableRow if there is no
    such separator, or more than one. Raises UnreadableRow also if the rows use a different separator than the header.
    """
    widths = {separator: _widths(head, separator) for separator in _SEPARATORS}
    possible = [separator for separator, found in widths.items() if found[:1] > [1]]
    if not possible:
        return usual

    even = [separator for separator in possible if len(set(widths[separator])) == 1]
    if len(possible) > 1 and len(even) != 1:
        counts = ' and '.join(f'{widths[separator][0]} cells with {_named(separator)}' for separator in possible)
        refuse(location, f'the separator cannot be told: the header has {counts}. {_STATE_IT}')

    chosen = even[0] if even else possible[0]
    cells, *rows = widths[chosen]
    others = [separator for separator in _SEPARATORS if separator != chosen]
    other = next((mark for mark in others if len(widths[mark]) > 1 and set(widths[mark][1:]) == {cells}), None)
    if other is not None and cells not in rows:
        refuse(
            location,
            f'the separator cannot be told: the header has {cells} cells with {_named(chosen)}, and the rows have '
            f'{cells} cells with {_named(other)}. Write the same separator in the header and in the rows.',
        )
    return chosen


def _column_names(location: str, cells: list[str]) -> list[str]:
    """Return the names in a header. Empty cells at its end are dropped.

    Among the remaining cells, one may be empty, because the header of an index column is often empty. Raises
    UnreadableRow if several of them are empty, or if a name occurs twice.
    """
    names = list(cells)
    while names and not names[-1].strip():
        names.pop()
    if sum(not name.strip() for name in names) > 1:
        refuse(location, 'several cells of the header are empty. Name these columns, or remove them.')
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        refuse(location, f"the header names '{repeated[0]}' twice. Rename or remove one of these columns.")
    return names


def _misfit(cells: Sequence[str], names: Sequence[str], width: int, separator: str) -> str | None:
    """Return the problem with the number of cells in a row. Returns None if the cells fit the header.

    `names` are the column names in the header. `width` is the number of cells in the header, including empty cells
    after the last name. A row may have empty cells after the last named column, because spreadsheet programs write
    such cells.
    """
    beyond = next((number for number, cell in enumerate(cells) if number >= len(names) and cell.strip()), None)
    if beyond is not None and len(cells) <= width:
        return (
            f'cell {beyond + 1} of this row holds text, and its column has no name in the header. Name the column, or '
            'remove the text.'
        )
    if beyond is not None or len(cells) < len(names):
        return (
            f'the number of cells in this row is {len(cells)}, but the header has {len(names)}. '
            f'Quote cells that contain {_named(separator)} or line breaks.'
        )
    return None


def read_table(source: FileBytes, bad: OnBad, remark: Remark, *, usual: str) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) for each row of a table. `usual` is a comma for a CSV file, and a tab for a TSV file.

    The cells are separated by `usual`, unless the first line of the file states a different separator (sep=;), or the
    header and the first rows show one. Then `remark` is called with a sentence about the separator.

    Blank lines are skipped. A line with only separators is a row with empty cells. But such lines after the last row
    are skipped, and `remark` is called with a sentence that gives their number.

    If a row has a wrong number of cells, `bad` is called, and the row is not yielded. Raises UnreadableRow if a line is
    not UTF-8, if the header cannot be used, if the separator is not clear, or if the quotes in a row are broken.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    path = source.path
    # A cell may have several lines, so without the text of a line no row of the file is certain.
    lines = source.lines(refuse)
    head = _first_lines(lines)
    stated = _STATED.fullmatch(head[0]) if head else None
    skipped = 1 if stated else 0
    if stated and stated[1] not in '"\r\n':
        separator, why = stated[1], 'its first line says so'
    else:
        separator, why = _find_separator(f'{path}:1', head, usual), 'its header has several cells with them'
    if separator != usual:
        remark(f'{path}: the cells are separated by {_named(separator)} because {why}')

    reader = csv.reader(itertools.chain(head[skipped:], (text for _, text in lines)), delimiter=separator, strict=True)
    names: list[str] = []
    width = 0
    # The lines that have only separators so far: they are skipped if no row follows.
    empty = array('Q')
    line = skipped + 1
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells) and len(cells) != 1:
                if cells:
                    empty.append(line)
            elif not names:
                names = _column_names(f'{path}:{line}', cells)
                width = len(cells)
                empty = array('Q')
            else:
                yield from ((f'{path}:{number}', dict.fromkeys(names, '')) for number in empty)
                empty = array('Q')
                if problem := _misfit(cells, names, width, separator):
                    bad(f'{path}:{line}', problem)
                else:
                    yield f'{path}:{line}', dict(zip(names, cells, strict=False))
            line = skipped + reader.line_num + 1
    except csv.Error as error:
        refuse(f'{path}:{line}', f'the CSV is broken here: {error}. Check the quotes in this row.')
    if empty:
        remark(f'{path}: lines with only separators after the last row are skipped: {len(empty)}, from line {empty[0]}')

"""How data files are read: new names for columns (--columns), and the rows of text files (--text_rows)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.base.errors import ConfigError, did_you_mean
from utils.base.names import TextRows
from utils.formats.columns import KNOWN_COLUMNS
from utils.formats.json_text import RowWithRepeatedKeys


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data files are read.

    `columns` is a dict from the name of a column in the file to its new name. If the new name is '', the column is
    dropped.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    # The rows of a text file: the whole document, or its paragraphs.
    text_rows: TextRows = 'document'
    # True: a column of `columns` that no row has is an error. False: it is ignored, as for the names of an earlier run.
    complete: bool = True

    def renamed(self, row: dict[str, Any], location: str) -> dict[str, Any]:
        """Return the row with its columns renamed. Raises ConfigError if two columns would get the same name.

        A column that --columns drops is renamed to 'NAME (left out)'. No format reads a column of this name, so the
        column is reported as not used.
        """
        if self.columns.keys().isdisjoint(row):
            return row

        made: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name, value in row.items():
            new = self.columns.get(name, name) or f'{name} (left out)'
            if new in sources:
                renamed = sources[new] if name == new else name
                raise ConfigError(
                    f"{location}: --columns renames the column {renamed} to '{new}', but the file already has a column "
                    f"'{new}'. To drop the file's own '{new}', add '{new}=' to --columns. To keep it, remove "
                    f"'{renamed}={new}' from --columns."
                )
            made[new] = value
            sources[new] = name
        return RowWithRepeatedKeys(made, row.repeated_keys) if isinstance(row, RowWithRepeatedKeys) else made

    def missing(self, seen: Collection[str], where: str) -> list[str]:
        """Return a message for each column of --columns that the data does not have.

        If `complete` is False, the list is empty. `seen` are the columns of the data, and `where` is the name of the
        data.
        """
        return [
            f"--columns '{name}={new}': {where} has no column {name}{did_you_mean(name, seen)} Its columns are "
            f'{", ".join(seen)}. Write the name in the file first: NAME={new or "(nothing)"}.'
            for name, new in self.columns.items()
            if self.complete and name not in seen
        ]


def read_columns(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return ({name in the file: new name}, problems) for the words of --columns.

    A word NAME=COLUMN renames the column NAME of the file to COLUMN. If COLUMN is empty, the column is dropped. A word
    is wrong if it has no NAME, if no format reads a column COLUMN, or if NAME or COLUMN is in an earlier word. A wrong
    word adds nothing to the dict, and `problems` has a message about it.
    """
    columns: dict[str, str] = {}
    problems: list[str] = []
    for word in words:
        name, mark, new = word.rpartition('=')
        name = name.strip()
        new = new.strip()
        if not mark or not name:
            problems.append(
                f"--columns '{word}': this does not give a column a name. Write NAME=COLUMN, the name in the file "
                'first, e.g. --columns question=query,answer=response'
            )
        elif new and new not in KNOWN_COLUMNS:
            problems.append(
                f"--columns '{word}': no format reads a column {new}{did_you_mean(new, KNOWN_COLUMNS)} Choose among "
                f'{", ".join(KNOWN_COLUMNS)}.'
            )
        elif name in columns:
            problems.append(f"--columns '{word}': the column {name} is given twice. Remove one of the two words.")
        elif new and new in columns.values():
            other = next(source for source, target in columns.items() if target == new)
            problems.append(
                f"--columns '{word}': the column {other} is renamed to {new} too. Remove one of the two words."
            )
        else:
            columns[name] = new
    return columns, problems

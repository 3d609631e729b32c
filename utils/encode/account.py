"""Counts the characters of the data by their outcome, which is what happened to them.

The main outcomes are `trained` (carries loss), `context` (in the rendered row, without loss), `cut` (removed by the cut
to max_length), `left out` (the whole row is not trained on) and `not used` (not in the rendered row).

A row has texts, such as the content of a message or the name of a tool. The rendered row is the one text that the
template makes of them. The account searches the texts of the row in the rendered row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.encode.encoded import Encoded
from utils.encode.marker_search import Again, correct_positions
from utils.encode.row_texts import RowText, row_texts
from utils.encode.text_search import NOT_USED, SearchedText, search_texts
from utils.formats.conversation import Row

LEFT_OUT, NOT_DRAWN = 'left out', 'not drawn'

# Names of columns and keys are data. Beyond this number of names, the account must not grow with the data.
_MOST_FIELDS = 500
OTHER_FIELDS = f'another column or key than the first {_MOST_FIELDS}'


def _counted_name(name: str, counted: Mapping[str, Any]) -> str:
    """If `counted` contains `name`, or has fewer than _MOST_FIELDS names, return `name`. Else return OTHER_FIELDS."""
    return name if name in counted or len(counted) < _MOST_FIELDS else OTHER_FIELDS


@dataclass(kw_only=True)
class Account:
    """Counts the characters of many rows.

    `fields` is a dict from a kind of text to {outcome: number of characters}. An outcome is what happened to the
    characters, for example `trained` or `context` (see the head of this module).

    `unused` is a dict from a column, key or kind of text to the number of encoded rows in which at least a part of its
    text is not used.

    Example of `fields`: {'user text': {'context': 9}}
    Example of `unused`: {'column `source`': 3}
    """

    fields: dict[str, dict[str, int]] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)

    def _count(self, label: str, outcome: str, characters: int) -> None:
        if characters:
            counts = self.fields.setdefault(_counted_name(label, self.fields), {})
            counts[outcome] = counts.get(outcome, 0) + characters

    def _count_unused(self, name: str, rows: int) -> None:
        name = _counted_name(name, self.unused)
        self.unused[name] = self.unused.get(name, 0) + rows

    def skip(self, raw: Mapping[str, Any], reason: str) -> None:
        """Count the characters of a row that is not trained on. Their outcome is `reason`, for example 'left out'.

        `raw` is the row before conversion to a chat. The row is not counted in `unused`.
        """
        for row_text in row_texts(raw):
            self._count(row_text.label, reason, len(row_text.text))

    def add(self, row: Row, encoded: Encoded, again: Again) -> None:
        """Count the characters of an encoded row by kind of text and outcome.

        If the position of a text in the rendered row is not certain, `again` encodes the row again, with a marker (a
        made-up word) in place of this text.
        """
        rendered = SearchedText(encoded)
        results = list(search_texts(row, encoded, rendered))
        correct_positions(results, rendered, row, again)

        missed: dict[str, None] = {}
        for result in results:
            self._settle(result.row_text, result.counts, missed)
        # Several names of one row may be counted together.
        for name in dict.fromkeys(_counted_name(name, self.unused) for name in missed):
            self._count_unused(name, 1)

    def _settle(self, row_text: RowText, counts: dict[str, int], missed: dict[str, None]) -> None:
        assert sum(counts.values()) == len(row_text.text), 'the parts sum to the whole'
        for outcome, count in counts.items():
            self._count(row_text.label, outcome, count)
        if counts.get(NOT_USED) and row_text.text.strip():
            missed[row_text.name] = None

    def merge(self, other: Account) -> None:
        """Add the counts of `other` to this account."""
        for label, counts in other.fields.items():
            for outcome, count in counts.items():
                self._count(label, outcome, count)
        for name, rows in other.unused.items():
            self._count_unused(name, rows)

    def lines(self, *, without: Collection[str] = ()) -> list[str]:
        """Return the counts as at most two lines. A line without content is left out.

        The columns and keys in `without` are left out of the second line, for example 'column `source`'.

        Example:
        ['text: user text: context 100 %; reply text: trained 90 %, cut 10 %', 'not used: column `source` in 3 rows']
        """
        shares = []
        for label, counts in self.fields.items():
            total = sum(counts.values())
            parts = ', '.join(f'{outcome} {100 * count / total:.4g} %' for outcome, count in counts.items())
            shares.append(f'{label}: {parts}')
        unused = {name: rows for name, rows in self.unused.items() if name not in without}
        names = ', '.join(f'{name} in {rows} row{"s" * (rows > 1)}' for name, rows in unused.items())
        return [*(['text: ' + '; '.join(shares)] if shares else []), *([f'not used: {names}'] if names else [])]

    def record(self) -> dict[str, Any]:
        """Return the counts as the JSON object that run.json and dataset_report.json store."""
        return {'fields': self.fields, 'unused': self.unused}

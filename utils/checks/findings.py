"""The findings of the data check: which rows have which problem, and where."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TextIO

from utils.data.tally import Tally


class Findings(Tally):
    """Counts rows by reason, and writes the reason and the location of each row to a file of JSON lines.

    A row that has the same problem in two columns is counted and written twice.
    """

    def __init__(
        self,
        kind: str,
        stream: TextIO,
        *,
        found: set[str] | None = None,
        instead: Mapping[str, Findings | None] | None = None,
    ) -> None:
        """Set up an empty tally.

        `kind` is written with each row, e.g. 'defect'. `stream` is the open file of findings (dataset_report.jsonl).
        The location of each row is added to the set `found`, if it is given.

        `instead` maps a reason to the findings that get the rows with this reason. If they are None, the rows are
        neither counted nor written.
        """
        super().__init__()
        self.kind = kind
        self.stream = stream
        self.found = found
        self.instead = instead or {}

    def add(self, reason: str, place: str, column: str = '', of: str = '', row: str = '') -> None:
        """Count the row at the location `place`, and write a line about it to the file of findings.

        `column` is the column with the problem. It is '' for the whole row, or if the column is not known. If another
        row has the same content or the same prompt, `of` is the location of the other row.

        If `row` is given, this location is added to `found` instead of `place`. This is needed if a training row equals
        an earlier validation row: `place` is the validation row, and `row` is the training row.
        """
        if reason in self.instead:
            other = self.instead[reason]
            if other is not None:
                other.add(reason, place, column)
            return

        super().add(reason, f'{place} {column}'.strip() + (f' of {of}' if of else ''))
        if self.found is not None:
            examined = row or place  # the path of an image may follow it in brackets
            self.found.add(examined.rpartition(' [')[0] if examined.endswith(']') else examined)

        # A row can have a detail, for example the image that cannot be read: rows.jsonl:3 [x.png].
        match = re.fullmatch(r'(.*?):(?: row | object )?(\d+)(?: \[(.*)\])?', place, flags=re.DOTALL)
        file, line = (match[1], int(match[2])) if match else (place, None)
        record = {'kind': self.kind, 'reason': reason, 'file': file, 'line': line, 'column': column}
        if match and match[3]:
            record['detail'] = match[3]
        if of:
            record['of'] = of
        self.stream.write(json.dumps(record, ensure_ascii=False) + '\n')


def by_reason(findings: Findings) -> dict[str, dict[str, Any]]:
    """Return {reason: {'rows': number of rows, 'first': locations of the first rows}}."""
    return {reason: {'rows': n, 'first': findings.places[reason]} for reason, n in findings.counts.items()}

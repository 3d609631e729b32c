"""The score of the quick start, and an example of one's own: `--score tools/sql_score.py:right`."""

from __future__ import annotations

from collections.abc import Mapping

from utils.formats.demo_sql import is_right


def right(answer: str, label: str, row: Mapping[str, str]) -> bool:
    """Return whether the SQL of the answer returns the same as the SQL of the label, on random tables in SQLite.

    `row` is a row of the data set sql-demo. Its query holds the definition of the table.
    """
    return is_right({'query': row['query'], 'response': label}, answer)

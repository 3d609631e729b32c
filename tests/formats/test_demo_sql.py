"""The demonstration data: its layout, the separation of its two halves, and which answers are right."""

from __future__ import annotations

import random
import re

import pytest

from utils.formats import demo_sql
from utils.formats.demo_sql import held_out_rows, is_right, train_rows

Row = dict[str, str]
TRAIN, HELD = train_rows(), held_out_rows()


def names(row: Row) -> tuple[str, list[str]]:
    match = re.search(r'CREATE TABLE (\w+) \((.*)\);', row['query'])
    assert match is not None
    return match.group(1), [part.split()[0] for part in match.group(2).split(', ')]


def blanked(row: Row) -> str:
    """Return the question without the names and values of the row."""
    table, columns = names(row)
    question = row['query'].splitlines()[-1]
    values = re.findall(r"'(\w+)%?'|\b(\d+(?:\.\d+)?)\b", row['response'])
    words = [name.replace('_', ' ') for name in (table, *columns)] + [text or number for text, number in values]
    for word in sorted(words, key=len, reverse=True):
        question = re.sub(rf'(?<![\w.]){re.escape(word)}(?![\w])', '_', question)
    return question


def mutations(row: Row) -> list[str]:
    """Return wrong variants of the row's SQL: column, aggregate, comparison, value, order, limit, missing parts."""
    sql, (_, columns) = row['response'], names(row)
    found = []
    for column in columns:
        if re.search(rf'\b{column}\b', sql):
            found += [re.sub(rf'\b{column}\b', other, sql) for other in columns if other != column and other not in sql]
    swaps = {'MAX': 'MIN', 'MIN': 'AVG', 'AVG': 'SUM', 'SUM': 'MAX', 'DESC': 'ASC', 'ASC': 'DESC'}
    found += [re.sub(rf'\b{old}\b', new, sql) for old, new in swaps.items() if re.search(rf'\b{old}\b', sql)]
    found += [re.sub(r"'(\w+)(%?)'", r"'z\1\2'", sql), sql.replace("%'", "'"), sql.replace('DISTINCT ', '')]
    found += [re.sub(r'(LIMIT|>|<|>=|<=|BETWEEN) (\d+)', lambda m: f'{m[1]} {int(m[2]) + 1}', sql)]
    found += [
        sql.replace(' > ', ' >= '),
        sql.replace(' < ', ' <= '),
        sql.replace(' >= ', ' > '),
        sql.replace(' <= ', ' < '),
    ]
    found += [sql.replace(' = ', ' != '), sql.replace(' != ', ' = ')]
    if 'BETWEEN' not in sql:
        found += [re.sub(r' AND .*;', ';', sql), sql.replace(' AND ', ' OR ')]
    return sorted(set(found) - {sql})


def test_counts_shape_and_determinism() -> None:
    assert len(TRAIN) >= 1000 and 200 <= len(HELD) <= 240
    state = random.getstate()
    assert train_rows() == TRAIN and held_out_rows() == HELD
    assert random.getstate() == state
    assert len({row['query'] for row in TRAIN}) == len(TRAIN)
    for row in TRAIN + HELD:
        assert row['query'].strip() and row['response'].endswith(';') and '\n' not in row['response']
        assert 3 <= len(names(row)[1]) <= 5


@pytest.mark.slow
def test_reference_is_right_and_finds_rows() -> None:
    for row in TRAIN[::8] + HELD:
        assert is_right(row, row['response'])
        assert any(demo_sql._run(row, row['response'], seed, False) for seed in range(3)), row


def test_halves_share_no_name_and_no_wording() -> None:
    seen_names = {name for row in TRAIN for name in (names(row)[0], *names(row)[1])}
    unseen_names = {name for row in HELD for name in (names(row)[0], *names(row)[1])}
    assert not seen_names & unseen_names
    assert not {blanked(row) for row in TRAIN} & {blanked(row) for row in HELD}


def test_other_answers_are_wrong() -> None:
    for row, other in zip(HELD, HELD[1:] + HELD[:1], strict=True):
        assert not is_right(row, other['response'])


def test_mutated_sql_is_wrong() -> None:
    wrong = [(row, sql) for row in HELD for sql in mutations(row)]
    missed = [(row['response'], sql) for row, sql in wrong if is_right(row, sql)]
    print(len(wrong), 'mutations,', len(missed), 'missed', missed)
    assert len(wrong) > 500 and not missed


def test_fences_and_trailing_text() -> None:
    row = HELD[0]
    sql = row['response']
    for answer in (f'Here:\n```sql\n{sql}\n```\nIt counts.', f'```\n{sql}', f'{sql} This works.', sql.rstrip(';')):
        assert is_right(row, answer)


def test_only_one_plain_select_is_run() -> None:
    for row in HELD[:12]:
        table, sql = names(row)[0], row['response']
        hostile = [
            '',
            'not sql',
            "ATTACH 'x.db' AS x;",
            'PRAGMA query_only=0;',
            f'DELETE FROM {table};',
            f'DROP TABLE {table};',
        ]
        hostile += [
            f'INSERT INTO {table} {sql}',
            f'{sql} DROP TABLE {table};',
            f'{sql} {sql}',
            f'PRAGMA user_version; {sql}',
        ]
        hostile += [
            "SELECT load_extension('x');",
            'WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT * FROM n;',
        ]
        hostile += [f'SELECT COUNT(*) FROM {", ".join(f"{table} t{n}" for n in range(9))};', '\x00', "SELECT '\ud800';"]
        for answer in hostile:
            assert not is_right(row, answer), answer

"""Demonstration data. A query has a table definition and a question, and the response is one line of SQLite.

All rows are generated from word lists with a fixed seed. The held-out rows ask for the same kinds of SQL as the
training rows, and use the same short phrases for conditions ("at least 5"). But their table names, column names, text
values and sentences are different. So a model that memorises the training rows cannot answer the held-out rows.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import zlib
from functools import cache
from pathlib import Path
from typing import Any

TRAIN_ROWS = 1200
HELD_OUT_ROWS = 204
SEED = 7
# An answer is compared with the reference on FILLS tables of CELLS rows each.
FILLS = 12
CELLS = 40
TASK = 'Write one SQLite query.'

# (word in the question, word in the SQL). AGGREGATES fills the slots {f} and {F}, ORDERS fills {o} and {O}.
AGGREGATES = (('highest', 'MAX'), ('lowest', 'MIN'), ('average', 'AVG'), ('total', 'SUM'))
ORDERS = (('highest', 'DESC'), ('lowest', 'ASC'))


# The keys of demo_sql.json (training rows use what begins with seen, held-out rows what begins with unseen):
# - words: an entry for each subject, with table names, text columns (name:kind) and number columns. A row uses only one
#   entry. A number column has the SQL type REAL if a dot follows its name, else INT.
# - values: the text values for each kind of text column.
# - text_tests, number_tests: conditions in SQL, and phrases for them that follow "with" or "having". {c} is the column,
#   {v} and {u} are values, {p} is the beginning of a value.
# - patterns: the kinds of SQL, each with sentences that ask for it. {t} is the table, {a} the requested column, {b} a
#   number column, {g} a text column, {n} a small number. {w} and {w2} are conditions in words, {q} and {q2} the same
#   conditions in SQL.
@cache
def _words() -> dict[str, Any]:
    """Return the content of demo_sql.json: the words and sentences from which the rows are made.

    Training rows and held-out rows use different words and sentences of this file, but the same phrases for conditions.
    """
    found: dict[str, Any] = json.loads(Path(__file__).with_name('demo_sql.json').read_text(encoding='utf-8'))
    return found


def train_rows() -> list[dict[str, str]]:
    """Return the training rows, each {'system', 'query', 'response'}. The rows are the same on each call.

    No two rows have the same query.
    """
    return _rows(False, TRAIN_ROWS, SEED)


def held_out_rows() -> list[dict[str, str]]:
    """Return the held-out rows, each {'system', 'query', 'response'}. The rows are the same on each call.

    No two rows have the same query.
    Their table names, column names, text values and sentences do not occur in the training rows.
    """
    return _rows(True, HELD_OUT_ROWS, SEED + 1)


def both_splits() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (training rows, held-out rows)."""
    return train_rows(), held_out_rows()


def _rows(unseen: bool, count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    patterns = _words()['patterns']
    rows: dict[str, str] = {}
    while len(rows) < count:
        # The patterns are used in turn, so that any long sequence of rows contains all patterns.
        query, response = _row(rng, unseen, patterns[len(rows) % len(patterns)])
        rows.setdefault(query, response)
    return [{'system': TASK, 'query': query, 'response': response} for query, response in rows.items()]


def _row(rng: random.Random, unseen: bool, pattern: dict[str, Any]) -> tuple[str, str]:
    """Return (query, response) of one row, made from the pattern. If `unseen` is True, it is a held-out row."""
    names = rng.choice(_words()['unseen_words' if unseen else 'seen_words'])
    tables = names['tables'].split()
    texts = names['texts'].split()
    numbers = names['numbers'].split()
    rng.shuffle(texts)
    rng.shuffle(numbers)

    slots = {'t': rng.choice(tables), 'n': str(rng.randint(2, 7))}
    used = []
    for slot, pool in (('g', texts), ('b', numbers), ('a', texts if rng.random() < 0.7 else numbers)):
        if '{' + slot + '}' in pattern['sql']:
            used.append(pool.pop())
            slots[slot] = used[-1].split(':')[0].rstrip('.')

    asked = {name: value.replace('_', ' ') for name, value in slots.items()}
    asked['f'], slots['F'] = rng.choice(AGGREGATES)
    asked['o'], slots['O'] = rng.choice(ORDERS)
    for mark in ('', '2'):
        if '{q' + mark + '}' in pattern['sql']:
            used.append((texts if rng.random() < 0.5 else numbers).pop())
            asked['w' + mark], slots['q' + mark] = _condition(rng, unseen, used[-1])

    spare = texts + numbers
    while len(used) < 3 or (len(used) < 5 and rng.random() < 0.25):
        used.append(spare.pop(rng.randrange(len(spare))))
    rng.shuffle(used)

    columns = ', '.join(_definition(column) for column in used)
    question = rng.choice(pattern['unseen' if unseen else 'seen']).format(**asked)
    return f'CREATE TABLE {slots["t"]} ({columns});\n{question}', pattern['sql'].format(**slots)


def _definition(column: str) -> str:
    if ':' in column:
        return column.split(':')[0] + ' TEXT'
    return column.rstrip('.') + (' REAL' if column.endswith('.') else ' INT')


def _condition(rng: random.Random, unseen: bool, column: str) -> tuple[str, str]:
    """Return a random condition on a column, as (words, SQL)."""
    name, _, kind = column.partition(':')
    slots = {'c': name.rstrip('.')}
    if kind:
        test = rng.choice(_words()['text_tests'])
        slots['v'] = rng.choice(_words()['unseen_values' if unseen else 'seen_values'][kind].split())
        slots['p'] = slots['v'][: rng.randint(1, 2)]
    else:
        test = rng.choice(_words()['number_tests'])
        low = rng.randint(3, 90)
        half = '.5' if name.endswith('.') and rng.random() < 0.5 else ''
        slots |= {'v': f'{low}{half}', 'u': str(low + rng.randint(5, 60))}

    asked = slots | {'c': slots['c'].replace('_', ' ')}
    return rng.choice(test['phrases']).format(**asked), test['sql'].format(**slots)


def is_right(row: dict[str, str], answer: str) -> bool:
    """Return whether the SQL of the answer selects the same records as the reference SQL, row['response'].

    Both are run several times on the table that row['query'] creates, each time with different random records. The
    records are chosen so that a wrong column, constant or comparison nearly always changes the result. The order of the
    selected records matters only if the reference SQL sorts.

    If the answer has a fenced code block, only this block is used. The SQL ends at the first semicolon. The answer is
    wrong if a second statement follows the semicolon. Any other text after the semicolon is ignored. An answer is also
    wrong if it is not a plain SELECT, is longer than 2000 characters, or runs too long.

    Raises ValueError if row['query'] has no CREATE TABLE statement.
    """
    sql = _statement(answer)
    if not sql:
        return False

    for seed in range(FILLS):
        with_order = 'ORDER BY' in row['response']
        wanted = _run(row, row['response'], seed, with_order)
        got = _run(row, sql, seed, with_order)
        if wanted is None or wanted != got:
            return False
    return True


def _statement(answer: str) -> str:
    """Return the SQL in an answer, without the semicolon.

    Returns '' if the SQL is too long, or if a second statement follows.
    """
    fenced = re.search(r'```\w*\s(.*?)(?:```|$)', answer, re.DOTALL)
    text, _, rest = (fenced.group(1) if fenced else answer).strip().partition(';')
    verbs = r'\s*(select|insert|update|delete|replace|drop|create|alter|attach|detach|pragma|vacuum)\b'
    return '' if len(text) > 2000 or re.match(verbs, rest, re.IGNORECASE) else text


def _fill(row: dict[str, str], seed: int) -> tuple[str, list[tuple[str | float, ...]]]:
    """Return the CREATE TABLE statement in row['query'], and random records for this table.

    The records depend only on `row` and `seed`. Raises ValueError if row['query'] has no CREATE TABLE statement.
    """
    match = re.search(r'CREATE TABLE \w+ \((.*)\);', row['query'])
    if match is None:
        raise ValueError('the query holds no CREATE TABLE line')

    rng = random.Random(zlib.crc32(row['query'].encode()) + seed)
    columns = [_cells(rng, definition, row['response']) for definition in match.group(1).split(', ')]
    return match.group(0), list(zip(*columns, strict=True))


def _cells(rng: random.Random, definition: str, sql: str) -> list[str | float]:
    """Return random cells for a column.

    If the SQL compares the column with a value, many cells equal this value or are close to it. But if the SQL sorts,
    number cells are random and unique.
    """
    name, kind = definition.split()
    if kind == 'TEXT':
        # The values have different frequencies, so that counts per group differ.
        pool = [f'{name}{size}' for size in range(1, 7) for _ in range(size)]
        for text in re.findall(rf"\b{name} (?:=|!=|LIKE) '(\w+)", sql):
            # The text, two values that begin with the text, and a value that contains it, so that = and LIKE differ.
            pool = [text] * 6 + [text + 'ora', text + 'elin', 'Q' + text] + pool[::4]
        return [rng.choice(pool) for _ in range(CELLS)]

    if 'ORDER BY' in sql:  # unique values, so that the order is unique
        return [float(value) for value in rng.sample(range(1, 200), CELLS)]

    cells: list[str | float] = [float(rng.randint(1, 200)) for _ in range(CELLS)]
    cells[0] = cells[1]  # a repeated value, so that DISTINCT always changes the result
    near: list[float] = []
    for pair in re.findall(rf'\b{name} (?:[<>]=?|BETWEEN) ([\d.]+)(?: AND ([\d.]+))?', sql):
        for limit in pair:
            near += [float(limit) + step for step in (-1, 0, 0, 1)] if limit else []
    if near:
        cells[2::2] = [rng.choice(near) for _ in cells[2::2]]
    return cells


def _allow(action: int, name: str | None, *_: str | None) -> int:
    """Return SQLITE_OK for the actions that a SELECT needs, else SQLITE_DENY. sqlite3 calls this as its authorizer."""
    plain = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
    return sqlite3.SQLITE_OK if plain else sqlite3.SQLITE_DENY


def _run(row: dict[str, str], sql: str, seed: int, with_order: bool) -> list[tuple[object, ...]] | None:
    """Return the records that `sql` selects from the table that row['query'] creates.

    Returns None if `sql` fails, takes too many steps, or does more than select.

    If `with_order` is True, the records have the order that the SQL gives them. Otherwise they are sorted. `seed` is
    the seed of the random records in the table.
    """
    create, records = _fill(row, seed)
    db = sqlite3.connect(':memory:')
    try:
        db.execute(create)
        table = create.split()[2]
        db.executemany(f'INSERT INTO {table} VALUES ({", ".join("?" * len(records[0]))})', records)
        db.set_authorizer(_allow)
        db.set_progress_handler(lambda: 1, 1_000_000)  # runs after a million steps; 1 aborts the query
        found = [tuple(round(x, 6) if isinstance(x, float) else x for x in record) for record in db.execute(sql)]
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return None
    finally:
        db.close()
    return found if with_order else sorted(found, key=repr)

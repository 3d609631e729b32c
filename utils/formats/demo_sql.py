"""Demonstration data: a table definition and a question in, one line of SQLite out.

All of it is made here from word lists with a fixed seed. The held-out rows share the intents of the
training rows and the small phrases of a condition ("at least 5"), but no table name, column name,
text value or sentence: a right answer there shows a skill and not a remembered line.
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

TRAIN_ROWS, HELD_OUT_ROWS, SEED = 1200, 204, 7
FILLS, CELLS = 12, 40  # an answer is compared on so many data sets of so many rows
TASK = 'Write one SQLite query.'

# {f} in words is {F} in SQL, and {o} is {O}.
AGGREGATES = (('highest', 'MAX'), ('lowest', 'MIN'), ('average', 'AVG'), ('total', 'SUM'))
ORDERS = (('highest', 'DESC'), ('lowest', 'ASC'))


@cache
def _words() -> dict[str, Any]:
    """Return the lists that rows are made from, those of training rows and those of held-out rows apart.

    words: tables, text columns, each with its kind of value, and number columns, a trailing dot meaning REAL; a row
    mixes words of one entry only, so that it reads sensibly. values: by kind. tests: conditions in SQL and as phrases
    to follow "with" or "having"; {c} is the column, {v} and {u} the values, {p} the start of a value. patterns: one
    intent each, its SQL and the sentences that ask for it; {t} is the table, {a} the column asked for, {b} a number
    column, {g} a text column, {n} a small number; {w} and {w2} are conditions in words, {q} and {q2} the same in SQL.
    """
    found: dict[str, Any] = json.loads(Path(__file__).with_name('demo_sql.json').read_text(encoding='utf-8'))
    return found


def train_rows() -> list[dict[str, str]]:
    """Return the training rows, each {'system', 'query', 'response'}: always the same, no query twice."""
    return _rows(False, TRAIN_ROWS, SEED)


def held_out_rows() -> list[dict[str, str]]:
    """Return the rows to measure with: same shape, other names, values and sentences than the training rows."""
    return _rows(True, HELD_OUT_ROWS, SEED + 1)


def _rows(new: bool, count: int, seed: int) -> list[dict[str, str]]:
    rng, patterns = random.Random(seed), _words()['patterns']
    rows: dict[str, str] = {}
    while len(rows) < count:
        # Patterns take turns: every stretch of rows holds all of them.
        query, response = _row(rng, new, patterns[len(rows) % len(patterns)])
        rows.setdefault(query, response)
    return [{'system': TASK, 'query': query, 'response': response} for query, response in rows.items()]


def _row(rng: random.Random, new: bool, pattern: dict[str, Any]) -> tuple[str, str]:
    names = rng.choice(_words()['unseen_words' if new else 'seen_words'])
    tables, texts, numbers = (names[part].split() for part in ('tables', 'texts', 'numbers'))
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
            asked['w' + mark], slots['q' + mark] = _condition(rng, new, used[-1])
    spare = texts + numbers
    while len(used) < 3 or (len(used) < 5 and rng.random() < 0.25):
        used.append(spare.pop(rng.randrange(len(spare))))
    rng.shuffle(used)
    columns = ', '.join(_definition(column) for column in used)
    question = rng.choice(pattern['unseen' if new else 'seen']).format(**asked)
    return f'CREATE TABLE {slots["t"]} ({columns});\n{question}', pattern['sql'].format(**slots)


def _definition(column: str) -> str:
    if ':' in column:
        return column.split(':')[0] + ' TEXT'
    return column.rstrip('.') + (' REAL' if column.endswith('.') else ' INT')


def _condition(rng: random.Random, new: bool, column: str) -> tuple[str, str]:
    name, _, kind = column.partition(':')
    slots = {'c': name.rstrip('.')}
    if kind:
        test = rng.choice(_words()['text_tests'])
        slots['v'] = rng.choice(_words()['unseen_values' if new else 'seen_values'][kind].split())
        slots['p'] = slots['v'][: rng.randint(1, 2)]
    else:
        test = rng.choice(_words()['number_tests'])
        low = rng.randint(3, 90)
        half = '.5' if name.endswith('.') and rng.random() < 0.5 else ''
        slots |= {'v': f'{low}{half}', 'u': str(low + rng.randint(5, 60))}
    asked = slots | {'c': slots['c'].replace('_', ' ')}
    return rng.choice(test['phrases']).format(**asked), test['sql'].format(**slots)


def is_right(row: dict[str, str], answer: str) -> bool:
    """Return whether the answer's SQL gives the rows that the row's own SQL gives.

    Both run on the row's table, filled several times with different made-up data around the values of the
    reference, so that a wrong column, value or comparison shows. The order of the rows counts only
    where the reference sorts. A fenced block is taken out of its fence and text after the first
    semicolon is dropped; a second statement, or one that is not a plain SELECT, is wrong.
    """
    sql = _statement(answer)
    if not sql:
        return False
    for seed in range(FILLS):
        with_order = 'ORDER BY' in row['response']
        wanted, got = (_run(row, text, seed, with_order) for text in (row['response'], sql))
        if wanted is None or wanted != got:
            return False
    return True


def _statement(answer: str) -> str:
    fenced = re.search(r'```\w*\s(.*?)(?:```|$)', answer, re.DOTALL)
    text, _, rest = (fenced.group(1) if fenced else answer).strip().partition(';')
    verbs = r'\s*(select|insert|update|delete|replace|drop|create|alter|attach|detach|pragma|vacuum)\b'
    return '' if len(text) > 2000 or re.match(verbs, rest, re.IGNORECASE) else text


def _fill(row: dict[str, str], seed: int) -> tuple[str, list[tuple[str | float, ...]]]:
    """The row's CREATE TABLE and the data for it, the same for the same row and seed."""
    match = re.search(r'CREATE TABLE \w+ \((.*)\);', row['query'])
    if match is None:
        raise ValueError('the query holds no CREATE TABLE line')
    rng = random.Random(zlib.crc32(row['query'].encode()) + seed)
    columns = [_cells(rng, definition, row['response']) for definition in match.group(1).split(', ')]
    return match.group(0), list(zip(*columns, strict=True))


def _cells(rng: random.Random, definition: str, sql: str) -> list[str | float]:
    """One column's cells: many at or next to the values that the SQL compares this column with."""
    name, kind = definition.split()
    if kind == 'TEXT':
        # Uneven groups, so that a count per group tells them apart.
        pool = [f'{name}{size}' for size in range(1, 7) for _ in range(size)]
        for text in re.findall(rf"\b{name} (?:=|!=|LIKE) '(\w+)", sql):
            # The value, longer ones and one that holds it further in: = and LIKE differ.
            pool = [text] * 6 + [text + 'ora', text + 'elin', 'Q' + text] + pool[::4]
        return [rng.choice(pool) for _ in range(CELLS)]
    if 'ORDER BY' in sql:  # no value twice: the sort has one right result
        return [float(value) for value in rng.sample(range(1, 200), CELLS)]
    cells: list[str | float] = [float(rng.randint(1, 200)) for _ in range(CELLS)]
    cells[0] = cells[1]  # DISTINCT always shows
    limits = re.findall(rf'\b{name} (?:[<>]=?|BETWEEN) ([\d.]+)(?: AND ([\d.]+))?', sql)
    near = [float(limit) + step for pair in limits for limit in pair if limit for step in (-1, 0, 0, 1)]
    if near:
        cells[2::2] = [rng.choice(near) for _ in cells[2::2]]
    return cells


def _allow(action: int, name: str | None, *_: str | None) -> int:
    plain = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
    return sqlite3.SQLITE_OK if plain else sqlite3.SQLITE_DENY


def _run(row: dict[str, str], sql: str, seed: int, with_order: bool) -> list[tuple[object, ...]] | None:
    create, records = _fill(row, seed)
    db = sqlite3.connect(':memory:')
    try:
        db.execute(create)
        table = create.split()[2]
        db.executemany(f'INSERT INTO {table} VALUES ({", ".join("?" * len(records[0]))})', records)
        db.set_authorizer(_allow)
        db.set_progress_handler(lambda: 1, 1_000_000)  # the first call, after a million steps, ends it
        found = [tuple(round(x, 6) if isinstance(x, float) else x for x in record) for record in db.execute(sql)]
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return None
    finally:
        db.close()
    return found if with_order else sorted(found, key=repr)

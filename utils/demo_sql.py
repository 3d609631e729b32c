"""Demonstration data: a table definition and a question in, one line of SQLite out.

All of it is made here from word lists with a fixed seed. The held-out rows share the intents of the
training rows and the small phrases of a condition ("at least 5"), but no table name, column name,
text value or sentence: a right answer there shows a skill and not a remembered line.
"""

from __future__ import annotations

import random
import re
import sqlite3
import zlib
from typing import NamedTuple

TRAIN_ROWS, HELD_OUT_ROWS, SEED = 1200, 204, 7
FILLS, CELLS = 12, 40  # an answer is compared on so many data sets of so many rows
TASK = 'Write one SQLite query.'

# One vocabulary per line: tables | text columns, each with its kind of value | number columns,
# a trailing dot meaning REAL. A row mixes words of one line only, so that it reads sensibly.
SEEN_WORDS = """
ships ferries tankers tugs yachts barges canoes dinghies fishing_boats | captain:p harbour:l flag:l hull:m mood:s home_port:l navigator:p paint:m anchor_type:m | tons. crew_size masts top_speed cabins engine_power decks sails knots
products toys jackets lamps chairs shoes snacks kettles gift_boxes | brand:p seller:p colour:m origin:l stock_state:s fabric:m importer:p shelf:s | price. stock discount weight. sold rating margin buttons returns
employees nurses drivers clerks cooks guards bakers shop_managers | first_name:p boss:p office:l shift:s uniform:m mentor:p hometown:l mindset:s | salary. age overtime bonus. sick_days years_served children shifts pension.
rivers lakes peaks forests islands caves canyons deserts nature_parks | region:l explorer:p climate:s rock:m country:l ranger:p gravel:m season:s | depth. height. area. rainfall visitors bird_count trails bridges_built campsites
books films songs paintings podcasts poems statues comics board_games | author:p publisher:p genre:s cover:m birthplace:l editor:p frame:m studio:l | pages minutes copies awards edition player_count chapters scenes readers
cows goats orchards crops barns tractors vineyards sheep olive_groves | farmer:p village:l soil:m health:s vet_name:p fence:m valley:l | harvest. acres. milk_yield calves rows_planted hectares. eggs horns seeds
houses hotels museums towers bridges schools castles flats petrol_stations | architect:p street:l landlord:p roof:m condition:s carpet:m district:l tenant:p | floors rooms rent. windows lifts repair_cost doors stairs balconies
players teams races stadiums cyclists runners swimmers boxers chess_clubs | coach:p city:l sponsor:p league:s jersey:m rival:p medal:m arena:l | goals wins losses points laps seat_count fouls medals sprints
parcels letters orders invoices pallets refunds vans crates bank_transfers | sender:p receiver:p depot:l status:s wrapping:m courier:p priority:s customs_town:l | amount. units tax. tariff days_late item_count stamps scans kilos.
gardens roses shrubs ponds hedges greenhouses herbs flower_beds | gardener:p nursery:l petal:m growth:s pot:m planter:p suburb:l | blooms thorns leaves roots. buds sunshine_hours width. bees
concerts choirs bands violins drums festivals music_shows | singer:p venue:l mode_name:s strings:m composer:p promoter:p wood:m square:l | tickets encores volume. members keys speakers stages fans
planets_seen stars comets moons meteors star_maps | astronomer:p observatory:l visibility:s crust:m finder:p tint:m | craters rings radius. brightness. tails spots gravity. sightings
"""  # noqa: E501 -- one vocabulary, one line
UNSEEN_WORDS = """
probes satellites telescopes rockets space_suits | operator:p launch_site:l phase:s shell:m | mass. orbits fuel_load. antennas
patients wards surgeons clinics blood_tests | doctor:p town:l diagnosis:s bandage:m | beds pulse dose. visit_count
trains trams stations railcars night_buses | conductor:p terminus:l signal:s livery:m | wagons stops delay. ticket_sales
laptops printers servers routers spare_disks | vendor:p site:l mode:s casing:m | cores ports voltage. memory_size
recipes cakes soups stews lunch_menus | chef:p province:l taste:s topping:m | calories servings sugar. baking_time
"""  # noqa: E501
SEEN_VALUES = {
    'p': 'Alma Boris Carla Dmitri Edith Farid Greta Hugo Ines Jonas Keiko Liam Marta Nils Olga Pablo '
    'Quentin Rosa Sven Tessa Umberto Vera Walter Ximena Yusuf Zelda',
    'l': 'Oslo Lima Cairo Porto Delhi Turin Accra Quito Malmo Bergen Hanoi Perth Leeds Izmir Nairobi '
    'Sofia Vienna Kazan Utrecht Zagreb Jakarta Dublin Fargo',
    's': 'active paused closed early late strong weak open mixed quiet ready broken busy lively empty '
    'modern hidden rapid tender gloomy useful yearly',
    'm': 'oak steel brass wool slate red blue green copper glass linen clay violet marble rubber bamboo '
    'yellow silk granite leather paper orange crystal',
}
UNSEEN_VALUES = {
    'p': 'Ruben Saskia Tomas Ursula Viktor Wanda Xavier Yara Zoltan Petra',
    'l': 'Dakar Kyoto Genoa Tampa Basel Cusco Split Narvik',
    's': 'stable urgent idle calm severe sweet final spare',
    'm': 'amber tin cotton ivory purple zinc pearl velvet',
}


class Pattern(NamedTuple):
    """One intent: its SQL and two disjoint sets of sentences that ask for it."""

    sql: str
    seen: str
    unseen: str


# Conditions in SQL and as phrases to follow "with" or "having": {c} is the column, {v} and
# {u} the values, {p} the start of a value. A slash separates phrasings, here and below.
TEXT_TESTS = (
    ("{c} = '{v}'", "{c} '{v}'/{c} equal to '{v}'"),
    ("{c} != '{v}'", "{c} other than '{v}'/{c} not '{v}'"),
    ("{c} LIKE '{p}%'", "{c} starting with '{p}'"),
)
NUMBER_TESTS = (
    ('{c} > {v}', '{c} above {v}/{c} over {v}/{c} greater than {v}'),
    ('{c} < {v}', '{c} below {v}/{c} under {v}/{c} less than {v}'),
    ('{c} >= {v}', '{c} at least {v}'),
    ('{c} <= {v}', '{c} at most {v}'),
    ('{c} BETWEEN {v} AND {u}', '{c} between {v} and {u}/{c} from {v} to {u}'),
)
# {f} in words is {F} in SQL, and {o} is {O}.
AGGREGATES = (('highest', 'MAX'), ('lowest', 'MIN'), ('average', 'AVG'), ('total', 'SUM'))
ORDERS = (('highest', 'DESC'), ('lowest', 'ASC'))
# {t} is the table, {a} the column asked for, {b} a number column, {g} a text column, {n} a small
# number; {w} and {w2} are conditions in words, {q} and {q2} the same in SQL.
PATTERNS = (
    Pattern(
        'SELECT COUNT(*) FROM {t} WHERE {q};',
        'How many {t} have {w}?/Count the {t} with {w}./How many {t} are there with {w}?'
        '/Give the number of {t} with {w}./What is the number of {t} that have {w}?',
        'Tell me how many of the {t} have {w}./I need a count of all {t} having {w}.',
    ),
    Pattern(
        'SELECT {a} FROM {t} WHERE {q};',
        'List the {a} of {t} with {w}./What {a} do {t} with {w} have?/Give the {a} of all {t} with {w}.'
        '/For {t} with {w}, show the {a}./Show the {a} of the {t} that have {w}.',
        'I need the {a} of those {t} having {w}./Find the {a} for the {t} with {w}.',
    ),
    Pattern(
        'SELECT {a} FROM {t} WHERE {q} AND {q2};',
        'List the {a} of {t} with {w} and {w2}./Give the {a} of all {t} with {w} and {w2}.'
        '/For {t} with {w} and {w2}, show the {a}./Show the {a} of the {t} that have {w} and {w2}.',
        'I need the {a} of those {t} having {w} and {w2}./Find the {a} for the {t} with {w} and also {w2}.',
    ),
    Pattern(
        'SELECT {F}({b}) FROM {t};',
        'What is the {f} {b} of the {t}?/Give the {f} {b} over all {t}./Show the {f} {b} among {t}.'
        '/Find the {f} {b} of all {t}./Over all {t}, what is the {f} {b}?',
        'Tell me the {f} {b} across the {t}./I need to know the {f} {b} across all {t}.',
    ),
    Pattern(
        'SELECT {F}({b}) FROM {t} WHERE {q};',
        'What is the {f} {b} of {t} with {w}?/Give the {f} {b} over all {t} with {w}.'
        '/For {t} with {w}, show the {f} {b}./Find the {f} {b} of the {t} that have {w}.',
        'Tell me the {f} {b} across the {t} having {w}./I need to know the {f} {b} of those {t} with {w}.',
    ),
    Pattern(
        'SELECT {a} FROM {t} ORDER BY {b} {O} LIMIT {n};',
        'List the {a} of the {n} {t} with the {o} {b}./Which {n} {t} have the {o} {b}? Show the {a}.'
        '/Give the {a} of the {n} {t} that have the {o} {b}./Show the {n} {t} with the {o} {b} by {a}.',
        'I need the {a} for the {n} {t} having the {o} {b}./Tell me the {a} of the {n} {t} with the {o} {b}.',
    ),
    Pattern(
        'SELECT DISTINCT {a} FROM {t};',
        'List the different {a} of the {t}./What different {a} do the {t} have?/Show all different {a} of the {t}.'
        '/Which different {a} are there among the {t}?/Give every different {a} in the {t}.',
        'Tell me the different {a} found across {t}./I need each different {a} for the {t}.',
    ),
    Pattern(
        'SELECT COUNT(DISTINCT {a}) FROM {t};',
        'How many different {a} do the {t} have?/Count the different {a} of the {t}.'
        '/Give the number of different {a} among the {t}./How many different {a} are there in the {t}?',
        'Tell me how many different {a} the {t} have./I need a count of the different {a} across all {t}.',
    ),
    Pattern(
        'SELECT {g}, COUNT(*) FROM {t} GROUP BY {g};',
        'How many {t} are there for each {g}?/Count the {t} per {g}./For each {g}, count the {t}.'
        '/Give the number of {t} per {g}./Show how many {t} each {g} has.',
        'Tell me how many {t} we have for each {g}./I need a count of all {t} per {g}.',
    ),
    Pattern(
        'SELECT {g}, {F}({b}) FROM {t} GROUP BY {g};',
        'What is the {f} {b} of {t} for each {g}?/Give the {f} {b} of the {t} per {g}.'
        '/For each {g}, show the {f} {b} of the {t}./Show the {f} {b} per {g} among the {t}.',
        'Tell me the {f} {b} across the {t} for each {g}./I need to know the {f} {b} per {g} over the {t}.',
    ),
)


def train_rows() -> list[dict[str, str]]:
    """Return the training rows, each {'system', 'query', 'response'}: always the same, no query twice."""
    return _rows(False, TRAIN_ROWS, SEED)


def held_out_rows() -> list[dict[str, str]]:
    """Return the rows to measure with: same shape, other names, values and sentences than the training rows."""
    return _rows(True, HELD_OUT_ROWS, SEED + 1)


def _rows(new: bool, count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        # Patterns take turns: every stretch of rows holds all of them.
        query, response = _row(rng, new, PATTERNS[len(rows) % len(PATTERNS)])
        rows.setdefault(query, response)
    return [{'system': TASK, 'query': query, 'response': response} for query, response in rows.items()]


def _row(rng: random.Random, new: bool, pattern: Pattern) -> tuple[str, str]:
    tables, texts, numbers = (
        part.split() for part in rng.choice((UNSEEN_WORDS if new else SEEN_WORDS).strip().splitlines()).split('|')
    )
    rng.shuffle(texts)
    rng.shuffle(numbers)
    slots = {'t': rng.choice(tables), 'n': str(rng.randint(2, 7))}
    used = []
    for slot, pool in (('g', texts), ('b', numbers), ('a', texts if rng.random() < 0.7 else numbers)):
        if '{' + slot + '}' in pattern.sql:
            used.append(pool.pop())
            slots[slot] = used[-1].split(':')[0].rstrip('.')
    asked = {name: value.replace('_', ' ') for name, value in slots.items()}
    asked['f'], slots['F'] = rng.choice(AGGREGATES)
    asked['o'], slots['O'] = rng.choice(ORDERS)
    for mark in ('', '2'):
        if '{q' + mark + '}' in pattern.sql:
            used.append((texts if rng.random() < 0.5 else numbers).pop())
            asked['w' + mark], slots['q' + mark] = _condition(rng, new, used[-1])
    spare = texts + numbers
    while len(used) < 3 or (len(used) < 5 and rng.random() < 0.25):
        used.append(spare.pop(rng.randrange(len(spare))))
    rng.shuffle(used)
    columns = ', '.join(_definition(column) for column in used)
    sentences = (pattern.unseen if new else pattern.seen).split('/')
    question = rng.choice(sentences).format(**asked)
    return f'CREATE TABLE {slots["t"]} ({columns});\n{question}', pattern.sql.format(**slots)


def _definition(column: str) -> str:
    if ':' in column:
        return column.split(':')[0] + ' TEXT'
    return column.rstrip('.') + (' REAL' if column.endswith('.') else ' INT')


def _condition(rng: random.Random, new: bool, column: str) -> tuple[str, str]:
    name, _, kind = column.partition(':')
    slots = {'c': name.rstrip('.')}
    if kind:
        sql, phrases = rng.choice(TEXT_TESTS)
        slots['v'] = rng.choice((UNSEEN_VALUES if new else SEEN_VALUES)[kind].split())
        slots['p'] = slots['v'][: rng.randint(1, 2)]
    else:
        sql, phrases = rng.choice(NUMBER_TESTS)
        low = rng.randint(3, 90)
        half = '.5' if name.endswith('.') and rng.random() < 0.5 else ''
        slots |= {'v': f'{low}{half}', 'u': str(low + rng.randint(5, 60))}
    asked = slots | {'c': slots['c'].replace('_', ' ')}
    return rng.choice(phrases.split('/')).format(**asked), sql.format(**slots)


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

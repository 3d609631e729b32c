"""Every message for users has a test that triggers it. A row of the table is a message and the name of its test.

For a new message, write a test that reaches it (a row of tests/programs/test_every_error.py is shortest), then
`python -m pytest tests/programs/test_every_error.py --record-errors` adds the row. Delete a message that cannot be
reached. A row is compared with the code here, and in every test run with the messages that its test reached
(conftest.py).
"""

from __future__ import annotations

import ast

from tests.support.error_sites import ROOT, STATES, read_table, sites


def test_every_message_has_a_test_and_every_row_a_message() -> None:
    found, table = {site.key for site in sites()}, read_table()
    untested, gone = sorted(found - table.keys()), sorted(table.keys() - found)
    assert not untested, 'messages without a test; reach them, then --record-errors:\n' + '\n'.join(untested)
    assert not gone, 'rows without a message; run their tests with --record-errors:\n' + '\n'.join(gone)
    assert len(table) == len(sites()) > 250, 'both sides were counted'


def test_the_tests_of_all_rows_are_there() -> None:
    table = read_table()
    tests: dict[str, set[str]] = {}
    for name in {row.partition('::')[0] for row in table.values()}:
        tree = ast.parse((ROOT / name).read_text(encoding='utf-8'))
        tests[name] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    absent = [
        f'{key}: {row}'
        for key, row in table.items()
        if row.split('::')[1].partition('[')[0] not in tests[row.split('::')[0]]
    ]
    assert not absent, 'rows whose test is gone:\n' + '\n'.join(absent)


def test_every_kind_of_config_error_counts() -> None:
    trees = [ast.parse(path.read_text(encoding='utf-8')) for path in (ROOT / 'utils').rglob('*.py')]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds = {c.name for c in classes if 'ConfigError' in map(ast.unparse, c.bases)}
    assert kinds == {'UnreadableRow', 'BadImage'} and kinds < STATES

"""Every message for users has a test that makes it speak; both sides are counted."""

from __future__ import annotations

import ast
import json

from tests.error_sites import ROOT, TABLE, sites


def test_every_message_has_a_test_that_is_there() -> None:
    found = {site.key for site in sites()}
    table: dict[str, str] = json.loads(TABLE.read_text(encoding='utf-8'))
    missing, gone = sorted(found - table.keys()), sorted(table.keys() - found)
    assert not missing and not gone, (
        f'{len(missing)} of {len(found)} messages without a row in {TABLE.name}:\n'
        + '\n'.join(missing)
        + f'\n{len(gone)} rows without a message:\n'
        + '\n'.join(gone)
        + '\nrun the tests that reach them with --record-errors'
    )
    assert len(found) == len(table) > 150
    tests: dict[str, set[str]] = {}
    for name in {row.partition('::')[0] for row in table.values()}:
        tree = ast.parse((ROOT / name).read_text(encoding='utf-8'))
        tests[name] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for key, row in table.items():
        file, _, test = row.partition('::')
        assert test.partition('[')[0] in tests[file], f'{key}: {row} is no test'

"""Messages for users and the tests that make them speak, as far as they are recorded: every row must stay true."""

from __future__ import annotations

import ast
import json

from tests.error_sites import ROOT, TABLE, sites


def test_every_recorded_message_is_there_and_so_is_its_test() -> None:
    found = {site.key for site in sites()}
    table: dict[str, str] = json.loads(TABLE.read_text(encoding='utf-8'))
    gone = sorted(table.keys() - found)
    assert not gone, 'rows without a message; run the tests that reach them with --record-errors:\n' + '\n'.join(gone)
    assert (len(table), len(found)) == (56, 204), 'recorded messages, and all of them'
    tests: dict[str, set[str]] = {}
    for name in {row.partition('::')[0] for row in table.values()}:
        tree = ast.parse((ROOT / name).read_text(encoding='utf-8'))
        tests[name] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for key, row in table.items():
        file, _, test = row.partition('::')
        assert test.partition('[')[0] in tests[file], f'{key}: {row} is no test'

"""Every call in the code that states a problem to the user, and the test that triggers it.

tests/support/error_sites.json names a test for each call. `pytest --record-errors` adds the calls that its tests
reach; every test run compares the rows of its tests with the calls that they reached.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name('error_sites.json')
_KEY_LENGTH = 70
# Names of calls that make a ConfigError or collect its text, including helper functions of single files.
STATES = {'ConfigError', 'UnreadableRow', 'BadImage', 'refuse', 'bad', 'bad_image', 'unknown_key', 'problems.add'}


class Site(NamedTuple):
    """A call that states a problem: its file, its lines, and a key that survives moved lines and moved functions."""

    file: str
    first: int
    last: int
    key: str


def _states_problem(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return called in STATES or called.endswith('.problems.add')


def _text(node: ast.Call) -> str:
    """Return the constant words of the call, or the call itself if it has hardly any."""
    constants = [c.value for argument in node.args for c in ast.walk(argument) if isinstance(c, ast.Constant)]
    text = ' '.join(' '.join(c for c in constants if isinstance(c, str)).split())
    return text if len(text) > 12 else ' '.join(ast.unparse(node).split())


def sites() -> list[Site]:
    """Return every call, ordered by file and line."""
    found: list[Site] = []
    keys: Counter[str] = Counter()
    for path in sorted([*(ROOT / 'utils').rglob('*.py'), *ROOT.glob('llm_*.py')]):
        file = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding='utf-8'))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        calls = [n for n in ast.walk(tree) if _states_problem(n)]
        for call in sorted(calls, key=lambda n: (n.lineno, n.col_offset)):
            assert isinstance(call, ast.Call), 'filtered'
            around = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
            inside = '.'.join(f.name for f in sorted(around, key=lambda f: f.lineno))
            key = f'{inside}: {_text(call)[:_KEY_LENGTH].strip()}'
            keys[key] += 1
            key += f' [{keys[key]}]' if keys[key] > 1 else ''
            found.append(Site(file, call.lineno, call.end_lineno or call.lineno, key))
    return found


def read_table() -> dict[str, str]:
    """Return the test of each call."""
    table: dict[str, str] = json.loads(TABLE.read_text(encoding='utf-8'))
    return table


class Recorder:
    """Records which test reaches which call, while the tests run in this process."""

    def __init__(self) -> None:
        self.reached: dict[str, list[str]] = {}
        self.passed: set[str] = set()
        self._by_file: dict[str, list[Site]] = {}
        for site in sites():
            self._by_file.setdefault(str(ROOT / site.file), []).append(site)

    def watch(self, owner: Any, name: str) -> None:
        """Record each call of a method before it runs."""
        real = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            test, _, phase = os.environ.get('PYTEST_CURRENT_TEST', '').rpartition(' (')
            if phase == 'call)':  # the calls that fixtures reach depend on which tests run
                self._note(sys._getframe(1), test)
            return real(*args, **kwargs)

        setattr(owner, name, noted)

    def _note(self, frame: Any, test: str) -> None:
        while frame is not None:  # the problem may be stated by a function that the call uses
            for site in self._by_file.get(frame.f_code.co_filename, []):
                tests = self.reached.setdefault(site.key, [])
                if site.first <= frame.f_lineno <= site.last and test not in tests:
                    tests.append(test)
            frame = frame.f_back

    def untrue(self) -> list[str]:
        """Return the rows whose test passed in this run without reaching the call."""
        rows = read_table().items()
        return [f'{key}: {test}' for key, test in rows if test in self.passed and test not in self.reached.get(key, [])]

    def write(self) -> None:
        """Add what passed tests reached to the table. Remove rows that are wrong or whose call no longer exists."""
        kept = {key: test for key, test in read_table().items() if f'{key}: {test}' not in self.untrue()}
        found = {key: [test for test in tests if test in self.passed] for key, tests in self.reached.items()}
        rows = {site.key: kept.get(site.key) or next(iter(found.get(site.key, [])), None) for site in sites()}
        table = {key: rows[key] for key in sorted(rows) if rows[key]}
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

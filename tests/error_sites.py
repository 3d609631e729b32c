"""Every place in the code that tells a user what is wrong, and the test that makes it speak.

`pytest --record-errors` writes down which test reaches which place (tests/error_sites.json); a plain run of
test_error_sites.py holds that table against the code.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name('error_sites.json')
_KEY_LENGTH = 70


class Site(NamedTuple):
    """A call that states a problem: its file, its lines, and a key that survives moved lines."""

    file: str
    first: int
    last: int
    key: str


def _states_problem(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return called == 'ConfigError' or called == 'problems.add' or called.endswith('.problems.add')


def _text(node: ast.Call) -> str:
    """Return the words of the call that are fixed, or, where it passes a problem on, how it does."""
    constants = [c.value for argument in node.args for c in ast.walk(argument) if isinstance(c, ast.Constant)]
    text = ' '.join(' '.join(c for c in constants if isinstance(c, str)).split())
    return text if len(text) > 12 else ast.unparse(node)


def sites() -> list[Site]:
    """Return every place, in the order of files and lines."""
    found: list[Site] = []
    keys: Counter[str] = Counter()
    for path in sorted([*(ROOT / 'utils').rglob('*.py'), *ROOT.glob('llm_*.py')]):
        file = path.relative_to(ROOT).as_posix()
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if _states_problem(n)]
        for call in sorted(calls, key=lambda n: (n.lineno, n.col_offset)):
            assert isinstance(call, ast.Call), 'filtered'
            key = f'{file}: {_text(call)[:_KEY_LENGTH].strip()}'
            keys[key] += 1
            key += f' [{keys[key]}]' if keys[key] > 1 else ''
            found.append(Site(file, call.lineno, call.end_lineno or call.lineno, key))
    return found


class Recorder:
    """Notes, while tests run in this process, which of them reaches which place."""

    def __init__(self) -> None:
        self.reached: dict[str, str] = {}
        self._by_file: dict[str, list[Site]] = {}
        for site in sites():
            self._by_file.setdefault(str(ROOT / site.file), []).append(site)

    def watch(self, owner: Any, name: str) -> None:
        """Note each call of a method before it runs."""
        real = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._note(sys._getframe(1))
            return real(*args, **kwargs)

        setattr(owner, name, noted)

    def _note(self, frame: Any) -> None:
        for site in self._by_file.get(frame.f_code.co_filename, []):
            if site.first <= frame.f_lineno <= site.last:
                self.reached.setdefault(site.key, os.environ['PYTEST_CURRENT_TEST'].rpartition(' (')[0])

    def write(self) -> None:
        """Add what was reached to the table; rows of places that are gone are dropped, others keep their test."""
        before = json.loads(TABLE.read_text(encoding='utf-8')) if TABLE.is_file() else {}
        keys = [site.key for site in sites()]
        table = {key: before.get(key) or self.reached[key] for key in keys if key in before or key in self.reached}
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

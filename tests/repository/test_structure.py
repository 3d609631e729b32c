"""The structure of the project: rooms, cost of imports, and forbidden constructs."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

from tests.support.runs import ROOT

# The rooms of utils/, from the lowest to the highest, and the rooms that each may import. A registry counts as a
# room. A room imports only rooms that are listed before it.
ROOMS = {
    'base': '',
    'preprocess': '',
    'hub': 'base',
    'formats': 'base hub',
    'dataset': 'formats',
    'loading': 'base hub formats',
    'model': 'base preprocess loading',
    'encode': 'base preprocess formats loading',
    'data': 'base formats dataset loading encode',
    'cli': 'base preprocess hub formats loading model data',
    'fast': 'base loading data cli',
    'run': 'base preprocess formats loading encode data cli',
    'infer': 'base preprocess formats loading encode data cli run',
    'serve': 'base preprocess formats loading encode data cli infer',
    'estimate': 'base hub loading model encode data cli fast run',
    'checks': 'base hub formats loading model encode data cli fast run',
    'train': 'base loading model encode data cli fast run infer',
    'proofs': 'base preprocess formats loading encode cli run train',
    'export': 'base hub formats loading model encode cli run proofs',
    'report': 'base formats cli run train proofs',
    'old_commands': 'export report',
    'migrate': 'base formats cli',
}
# The registries that users edit; nothing else is in the root of utils/.
REGISTRIES = {'dataset', 'model', 'preprocess'}
# Rooms whose modules import only the standard library at module level, and the modules of data that a
# command line needs. Exceptions are the native classes of 2023, which need torch.
LIGHT = {'base', 'preprocess', 'hub', 'formats', 'dataset', 'loading', 'model', 'cli', 'run', 'migrate'}
LIGHT_OF_DATA = {
    'utils.data.converted_rows', 'utils.data.held_out', 'utils.data.mixture', 'utils.data.open_parts',
    'utils.data.own_rows', 'utils.data.parts', 'utils.data.plan',
    'utils.data.sources', 'utils.data.stream_parts', 'utils.data.tally',
}  # fmt: skip
NOT_LIGHT = 'utils.loading.legacy.classes.'
FORBIDDEN = (
    'trust_remote_code=True', 'pickle.load', 'pickle.dump', 'torch.save', 'weights_only=False', 'eval(', 'exec(',
)  # fmt: skip


@functools.cache
def modules() -> dict[str, Path]:
    """Return the modules of utils by their dotted names, without the empty __init__ files."""
    files = [file for file in (ROOT / 'utils').rglob('*.py') if file.name != '__init__.py']
    return {'.'.join(file.relative_to(ROOT).with_suffix('').parts): file for file in files}


def room_of(module: str) -> str:
    """Return the room of a module: the first name after utils."""
    return module.split('.')[1]


def imports(path: Path, *, module_level: bool) -> list[str]:
    """Return the modules that a file imports, without those only for type checkers."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == 'TYPE_CHECKING']
    for_types = {id(node) for block in checking for node in ast.walk(block)}
    found: list[str] = []
    for node in tree.body if module_level else ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f'{node.module}.{alias.name}' for alias in node.names]
            found += [name if name in modules() else node.module for name in inner]
    return found


def test_the_table_of_rooms_has_no_circle() -> None:
    before: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= before, f'{room} imports a room above it'
        before.add(room)


def test_every_module_lies_in_a_room_and_imports_as_the_table_says() -> None:
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, path in modules().items():
        room = room_of(name)
        assert room in ROOMS, f'{name} lies in no room'
        for imported in imports(path, module_level=False):
            if imported.startswith('utils.') and room_of(imported) != room:
                assert room_of(imported) in ROOMS[room].split(), f'{name} imports {imported}'
                used[room].add(room_of(imported))
    assert {room: ' '.join(sorted(found)) for room, found in used.items()} == {
        room: ' '.join(sorted(allowed.split())) for room, allowed in ROOMS.items()
    }, 'the table names no import that is not there'


def test_modules_import_each_other_in_no_circle() -> None:
    left = {name: set(imports(path, module_level=False)) & set(modules()) for name, path in modules().items()}
    assert len(left) > 120
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f'a circle among {sorted(left)}'


def test_the_root_of_utils_holds_the_registries_alone() -> None:
    assert {file.stem for file in (ROOT / 'utils').glob('*.py')} == {'__init__', *REGISTRIES}
    assert not [file for file in (ROOT / 'utils').iterdir() if file.is_file() and file.suffix != '.py']


def test_light_rooms_import_the_standard_library_alone() -> None:
    checked = 0
    for name, path in modules().items():
        if name.startswith(NOT_LIGHT) or not (room_of(name) in LIGHT or name in LIGHT_OF_DATA):
            continue
        for imported in imports(path, module_level=True):
            top = imported.split('.')[0]
            assert top in ('utils', *sys.stdlib_module_names), f'{name} imports {imported}'
            checked += 1
    assert checked > 400


def test_tests_import_no_other_test() -> None:
    files = [*(ROOT / 'tests').rglob('*.py')]
    assert len(files) > 70
    for file in files:
        for imported in imports(file, module_level=False):
            parts = imported.split('.')
            assert parts[0] != 'tests' or parts[1] == 'support', f'{file} imports {imported}'


def test_every_room_has_tests() -> None:
    rooms = {file.relative_to(ROOT / 'tests').parts[0] for file in (ROOT / 'tests').rglob('test_*.py')}
    assert set(ROOMS) - REGISTRIES - {'old_commands'} <= rooms
    assert not [*(ROOT / 'tests').glob('test_*.py')], 'each test file lies in the room that it tests'


def test_importing_does_nothing() -> None:
    """Module bodies hold definitions, imports and constants, and no statement with an effect."""
    allowed = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If,
    )  # fmt: skip
    seen = 0
    for path in modules().values():
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, allowed), f'{path}:{node.lineno}'
            if isinstance(node, ast.If):
                assert ast.unparse(node.test) in ("__name__ == '__main__'", 'TYPE_CHECKING'), f'{path}:{node.lineno}'
            seen += 1
    assert seen > 200


def test_no_code_of_a_checkpoint_is_ever_run_and_nothing_is_pickled() -> None:
    checked = 0
    for path in [*modules().values(), ROOT / 'llm_sft.py', ROOT / 'llm_infer.py']:
        text = path.read_text(encoding='utf-8')
        for forbidden in FORBIDDEN:
            text = text.replace('ast.literal_eval(', '')
            lines = [line for line in text.splitlines() if forbidden in line and '.eval(' not in line]
            assert not [x for x in lines if not x.strip().startswith(('#', '"""'))], f'{path}: {forbidden}'
            checked += 1
    assert checked == 7 * (len(modules()) + 2)

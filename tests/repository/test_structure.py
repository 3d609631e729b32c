"""The shape of the project itself: layers, names, what importing costs, what is never done."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from tests.support.runs import ROOT

# A module imports only from lower layers, or from those before it in layers 4 to 6. Layers 0-3: standard library only.
LAYERS: list[list[str]] = [
    ['errors', 'json_file', 'dist', 'logger', 'cache', 'version'],
    [
        'preprocess',
        'native.images',
        'native.image_readers',
        'vision',
        'text_tokenizer',
        'account',
        'encoder',
        'auto_encoder',
        'as_written',
        'fingerprint',
        'placement',
        'checkpoint',
        'data_file',
        'convert',
        'demo_sql',
        'native.gguf',
        'hub_clients',
        'hub',
        'leak_scan',
        'native.family',
        'native.read',
        'native.lazy',
        'native.open',
        'native.packed',
        'native.export',
        'native.sentencepiece_bpe',
        'native.tiktoken_bpe',
        'native.xverse_tokenizer',
        'native.modules.alibi',
        'native.modules.qwen_long',
        'native.modules.qwen_vl',
        'native.internlm',
        'native.xverse',
        'native.baichuan',
        'native.baichuan_13b',
        'native.baichuan_4bits',
        'native.chatglm2',
        'native.polylm',
        'native.gptq',
        'native.qwen',
        'native.qwen_vl',
        'native.registry',
        'native.adapter',
    ],
    ['model', 'dataset_rows', 'dataset', 'sources', 'reading'],
    ['argument', 'parser', 'resolution', 'limits', 'scale', 'resolve', 'lock', 'machine_check'],
    [
        'run_dir',
        'row_plan',
        'proofs',
        'mask_gate',
        'encoded_rows',
        'encoding',
        'packing',
        'stream',
        'collator',
        'filler',
        'attention',
        'loss',
        'norm',
        'gated',
        'rotary',
        'scoring',
        'lora',
        'metrics',
        'generation',
        'layout',
        'tuner',
        'shapes',
        'footprint',
        'estimate',
        'chat',
        'plot',
        'model_card',
        'push',
        'script_table',
        'work_plan',
        'docs',
        'start',
        'answering',
        'tree_file',
        'random_state',
        'stop',
        'guards',
        'end_token',
    ],
    ['trainer_args', 'callbacks', 'push_callback', 'resume', 'trainer'],
    [
        'doctor',
        'dry_run',
        'before_after',
        'template_proof',
        'jinja_template',
        'merge',
        'secrecy',
        'machine_doctor',
        'loss_proof',
        'preflight',
        'page',
        'svg',
        'run_files',
        'run_report',
        'report',
        'compare',
        'demo_report',
    ],
]
FORBIDDEN = (
    'trust_remote_code=True', 'pickle.load', 'pickle.dump', 'torch.save', 'weights_only=False', 'eval(', 'exec(',
)  # fmt: skip
LEVEL = {name: (level, position) for level, names in enumerate(LAYERS) for position, name in enumerate(names)}


def modules() -> dict[str, Path]:
    files = (ROOT / 'utils').rglob('*.py')
    found = {'.'.join(f.relative_to(ROOT / 'utils').with_suffix('').parts): f for f in files}
    return {name: f for name, f in found.items() if not name.endswith('__init__')}


def imports(path: Path, *, module_level: bool) -> list[str]:
    """Return the modules a file imports, those only for type checkers left out."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    nodes = tree.body if module_level else ast.walk(tree)
    found: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f'utils.{a.name}' for a in node.names] if node.module == 'utils' else [node.module]
    return found


def test_every_module_has_a_layer_and_imports_downwards() -> None:
    assert set(modules()) == set(LEVEL), 'each module stands in exactly one layer'
    checked = 0
    for name, path in modules().items():
        for imported in imports(path, module_level=False):
            if imported.startswith('utils.'):
                target = imported.removeprefix('utils.')
                assert LEVEL[target] < LEVEL[name], f'{name} imports {target}'
                checked += 1
    assert checked > 80


def test_low_layers_import_the_standard_library_alone() -> None:
    checked = 0
    for name, path in modules().items():
        light = LEVEL[name][0] <= 3 and not name.startswith('native.modules.')
        if light or name in ('start', 'run_dir', 'docs'):
            for imported in imports(path, module_level=True):
                top = imported.split('.')[0]
                assert top == 'utils' or top in sys.stdlib_module_names, f'{name} imports {imported}'
                checked += 1
    assert checked > 80


def test_importing_does_nothing() -> None:
    """Module bodies hold definitions, imports and constants; no statement that acts."""
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

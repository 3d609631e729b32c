"""Generates parts of the documentation pages, e.g. the tables of flags and models, from the code.

`python -m tools.docs --write` updates these parts. `python -m tools.docs --check` fails if a part is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from tools.flag_table import flag_table, translation_problems
from tools.script_table import script_table
from utils.dataset import DATASET_MAPPING
from utils.formats.hub_dataset import HubDataset
from utils.loading.info import ModelInfo
from utils.loading.legacy.registry import FAMILIES
from utils.model import MODEL_MAPPING
from utils.preprocess import AUTO, TEMPLATE_MAPPING

ROOT = Path(__file__).resolve().parent.parent
READMES = ('README.md', 'README_CN.md')

# Models that always had a native class in transformers, but that are also compared with logits of the original code.
GOLDEN_NATIVE = frozenset({'ziya2-13b', 'ziya2-13b-chat', 'seqgpt-560m'})


def proof(key: str, info: ModelInfo) -> str:
    """Return a short text that says what the tests prove about a registry entry, for the table of models.

    The tests use small models of the entry's class, and the chat template of the entry.
    """
    if info.family is not None or key in GOLDEN_NATIVE:
        return 'golden logits of the original code'
    known = info.template != AUTO or info.chat_template or info.embedded
    return 'class and template' if known else 'class only'


def native_class(info: ModelInfo) -> str:
    """Return the name of the model class that is used to open a registry entry."""
    return FAMILIES[info.family].model_class.rpartition(':')[2] if info.family else str(info.model_class)


def model_table() -> str:
    """Return a Markdown table with one line for each entry of MODEL_MAPPING."""
    lines = ['| model_type | ModelScope | Hugging Face | class | template | LoRA targets | proven |', '|' + '---|' * 7]
    for key, info in MODEL_MAPPING.items():
        ids = (
            info.model_id_or_path,
            'the same' if info.hf_model_id == info.model_id_or_path else info.hf_model_id or '',
        )
        cells = (key, *ids, native_class(info), info.template, ', '.join(info.lora_target_modules), proof(key, info))
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def dataset_table() -> str:
    """Return a Markdown table of the registered data sets on the hubs."""
    lines = ['| dataset | ModelScope | Hugging Face | subsets | train; validation |', '|---|---|---|---|---|']
    for name, entry in DATASET_MAPPING.items():
        if isinstance(entry, HubDataset):
            ids = ', now '.join((entry.id, *entry.moved))
            splits = '; '.join(filter(None, (', '.join(entry.train), ', '.join(entry.val))))
            lines.append(f'| {name} | {ids} | {entry.hf_id or ""} | {", ".join(entry.subsets)} | {splits} |')
    return '\n'.join(lines)


def template_names() -> str:
    """Return the names of the registered templates, separated by commas."""
    return ', '.join(f'`{name}`' for name in TEMPLATE_MAPPING)


def dataset_names() -> str:
    """Return the names of the registered data sets, separated by commas."""
    return ', '.join(f'`{name}`' for name in DATASET_MAPPING)


BLOCKS: dict[str, Callable[[], str]] = {
    'flags-common': lambda: flag_table('common'),
    'flags-sft': lambda: flag_table('sft'),
    'flags-infer': lambda: flag_table('infer'),
    'flags-common-cn': lambda: flag_table('common', chinese=True),
    'flags-sft-cn': lambda: flag_table('sft', chinese=True),
    'flags-infer-cn': lambda: flag_table('infer', chinese=True),
    'models': model_table,
    'datasets': dataset_table,
    'dataset-names': dataset_names,
    'template-names': template_names,
    'scripts': script_table,
}


def pages() -> list[Path]:
    """Return the paths of all documentation pages of the project. The READMEs are first."""
    readmes = [ROOT / name for name in READMES]
    others = [ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md', ROOT / 'scripts/README.md', ROOT / 'tests/README.md']
    return [*readmes, *others, *sorted((ROOT / 'docs').rglob('*.md'))]


def render(text: str) -> str:
    """Return the text with each `<!-- generated NAME -->` block updated. Raises KeyError if BLOCKS lacks a NAME."""

    def block(match: re.Match[str]) -> str:
        return f'<!-- generated {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->'

    return re.sub(r'<!-- generated ([\w-]+) -->\n.*?<!-- end -->', block, text, flags=re.DOTALL)


def main(argv: list[str]) -> int:
    """Update or check the pages, and return the exit code.

    The exit code is 1 if `translation_problems` returns a message, and then no page is updated or checked. The exit
    code is also 1 if --check finds a page that is out of date. It is 2 for wrong arguments, else 0.
    """
    if argv not in (['--write'], ['--check']):
        print('usage: python -m tools.docs --write | --check', file=sys.stderr)
        return 2

    problems = translation_problems()
    if problems:
        print('\n'.join(problems), file=sys.stderr)
        return 1

    stale = []
    for path in pages():
        text = path.read_text(encoding='utf-8')
        updated = render(text)
        if updated == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if argv == ['--write']:
            path.write_text(updated, encoding='utf-8')

    if stale and argv == ['--check']:
        print(f'stale: {", ".join(stale)}. Run python -m tools.docs --write', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""The READMEs: generated blocks, the file tree, the links."""

from __future__ import annotations

import re
from dataclasses import fields

from tests.conftest import ROOT
from utils import docs
from utils.argument import InferArguments, SftArguments


def test_generated_blocks_are_fresh_and_hold_every_flag() -> None:
    assert docs.main(['--check']) == 0
    flags = {f.name for cls in (SftArguments, InferArguments) for f in fields(cls)}
    for name in docs.READMES:
        text = (ROOT / name).read_text(encoding='utf-8')
        assert set(re.findall(r'<!-- generated ([\w-]+) -->', text)) == set(docs.BLOCKS)
        assert flags <= set(re.findall(r'^\| `--(\w+)` \|', text, flags=re.MULTILINE))
    assert len(flags) == 88


def test_file_tree_names_what_is_there() -> None:
    there = {p.name for p in ROOT.iterdir() if p.name not in ('output', '__pycache__') and not p.name.startswith('.')}
    for name in docs.READMES:
        tree = (ROOT / name).read_text(encoding='utf-8').split('```\nllm_sft.py')[1].split('```')[0]
        named = set(re.findall(r'[\w.-]+(?:\.py|\.txt)|\b\w+(?=/)', 'llm_sft.py' + tree))
        missing = {n for n in there if n not in named} - {
            'LICENSE',
            'CHANGELOG.md',
            'README.md',
            'README_CN.md',
            'pyproject.toml',
        }
        assert not missing, f'{name} does not name {missing}'
        assert not {n for n in named if n.endswith(('.py', '.txt'))} - {p.name for p in ROOT.rglob('*.py')} - there


def test_links_and_pictures_exist() -> None:
    checked = 0
    for name in docs.READMES:
        for target in re.findall(r'\]\((?!http)([^)#]+)\)', (ROOT / name).read_text(encoding='utf-8')):
            assert (ROOT / target).exists(), f'{name}: {target}'
            checked += 1
    assert checked >= 3


def test_code_blocks_name_real_scripts_and_flags() -> None:
    known = {f.name for cls in (SftArguments, InferArguments) for f in fields(cls)}
    checked = 0
    for name in docs.READMES:
        for block in re.findall(r'```bash\n(.*?)```', (ROOT / name).read_text(encoding='utf-8'), flags=re.DOTALL):
            for script in re.findall(r'bash (scripts/\S+\.sh)', block):
                assert (ROOT / script).is_file(), script
                checked += 1
            for flag in re.findall(r'--(\w+)', block):
                assert flag in known, flag
                checked += 1
    assert checked > 20

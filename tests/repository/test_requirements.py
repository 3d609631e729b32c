"""requirements.txt is enough: packages of requirements-all.txt are imported only by the flags that need them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.runs import ROOT

# Hides some packages, as if they were not installed, and runs programs one after the other.
HIDING = """
import importlib.machinery, json, sys
hidden, programs = set(json.loads(sys.argv[1])), json.loads(sys.argv[2])

class Hiding:
    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition('.')[0] in hidden:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
import llm_infer, llm_sft
for program, words in programs:
    code = {'sft': llm_sft, 'infer': llm_infer}[program].main([word.replace('RUN', RUN) for word in words])
    assert code == 0, (program, words, code)
    RUN = str(next(Path(OUTPUT).glob('*/v0*/checkpoint-2')))
"""


def named(file: str) -> set[str]:
    """Return the packages that a requirements file names."""
    return set(re.findall(r'^([\w-]+)[=><~]', (ROOT / file).read_text(encoding='utf-8'), flags=re.MULTILINE))


def test_the_exact_set_lies_in_the_ranges() -> None:
    exact = dict(re.findall(r'^([\w.-]+)==(\S+)$', (ROOT / 'constraints.txt').read_text(), flags=re.MULTILINE))
    versions = {canonicalize_name(name): version for name, version in exact.items()}
    checked = 0
    for file in ('requirements.txt', 'requirements-all.txt'):
        for line in (ROOT / file).read_text(encoding='utf-8').splitlines():
            if line.startswith(('#', '-r')):
                continue
            wanted = Requirement(line)
            assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), line
            checked += 1
    assert checked >= 28 and len(versions) > 100, 'what packages need of others is fixed too'


@pytest.mark.slow
def test_training_and_answering_need_no_optional_library(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    hidden = named('requirements-all.txt') | {'torchao'}  # torchao comes with gptqmodel
    assert {'deepspeed', 'bitsandbytes', 'gptqmodel', 'optimum', 'trl'} <= hidden
    assert not hidden & named('requirements.txt')
    runner = tmp_path / 'hiding.py'
    runner.write_text(
        f'from pathlib import Path\nOUTPUT, RUN = {str(tmp_path / "output")!r}, ""\n{HIDING}', encoding='utf-8'
    )
    common = ['--model_id_or_path', str(model_dir), '--dataset', str(data_file), '--max_steps', '2', '--dtype', 'fp32']
    train = [*common, '--save_steps', '1', '--output_dir', str(tmp_path / 'output')]
    programs = [
        ('sft', train),
        ('sft', [*train, '--resume_from_checkpoint', 'RUN', '--max_steps', '3']),
        ('sft', [*train, '--sft_type', 'full']),
        ('infer', ['--ckpt_dir', 'RUN', '--merge_lora_and_save', 'true', '--max_new_tokens', '2']),
    ]
    done = subprocess.run(
        [sys.executable, str(runner), json.dumps(sorted(hidden)), json.dumps(programs)],
        cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(list((tmp_path / 'output').glob('*/v*/report.html'))) == 3

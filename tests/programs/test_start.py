"""What a program imports when it starts: optional packages that the run does not use stay out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.runs import ROOT, run_program, small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.cli.arguments import SftArguments
from utils.dataset import DATASET_MAPPING
from utils.loading.info import ModelInfo
from utils.run import processes

OPTIONAL = {'bitsandbytes', 'datasets', 'deepspeed', 'gptqmodel', 'optimum', 'torchao'}


@pytest.fixture(scope='module')
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp('start')
    make_model().save_pretrained(folder / 'tiny-llama')
    make_tokenizer().save_pretrained(folder / 'tiny-llama')
    data = write_jsonl(folder / 'qa.jsonl', [{'query': f'what is {i}?', 'response': f'it is {i}.'} for i in range(8)])
    return [*small_flags(folder / 'tiny-llama', data, folder / 'out'), '--max_steps', '1']


def run(*flags: str) -> tuple[set[str], list[str]]:
    """Run llm_sft.py, and return the names of the packages that it imported, and its other lines on stderr."""
    done = run_program('llm_sft.py', *flags, PYTHONPROFILEIMPORTTIME='1')
    assert done.returncode == 0, done.stderr[-2000:]
    imports = [line for line in done.stderr.splitlines() if line.startswith('import time:')]
    others = [line for line in done.stderr.splitlines() if not line.startswith('import time:')]
    modules = [line.rsplit('|', 1)[1].strip() for line in imports]
    # Python also prints a line with the bare name of a package whose import failed.
    return {name.partition('.')[0] for name in modules if '.' in name}, others


@pytest.mark.optional
@pytest.mark.slow
@pytest.mark.parametrize(
    ('flags', 'used'), [([], set()), (['--quantization_bit', '4'], {'bitsandbytes'})], ids=['plain', '4-bit']
)
def test_packages_that_the_run_does_not_use_are_not_imported(
    words: list[str], flags: list[str], used: set[str]
) -> None:
    imported, others = run(*words, *flags)
    assert {'torch', 'peft', 'transformers'} <= imported
    assert imported & OPTIONAL == used
    assert not [line for line in others if 'warn' in line.lower() or 'kernels' in line]


@pytest.mark.optional
@pytest.mark.slow
@pytest.mark.parametrize('flag', ['--check_dataset', '--dry_run'])
def test_a_check_of_a_gguf_model_imports_no_package_that_it_does_not_use(
    words: list[str], flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / 'tiny.gguf'
    folder = words[words.index('--model_id_or_path') + 1]
    command = [sys.executable, ROOT / 'tests/support/convert_hf_to_gguf.py', folder, '--outfile', gguf]
    subprocess.run([*command, '--outtype', 'f32'], check=True, capture_output=True)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))  # the file is converted now
    imported, others = run(*words, '--model_id_or_path', str(gguf), flag, 'true')
    assert {'torch', 'transformers'} <= imported
    assert not imported & OPTIONAL
    assert not [line for line in others if 'warn' in line.lower() or 'Failed' in line]


@pytest.mark.parametrize(
    ('program', 'score', 'hides'),
    [
        ('llm_sft.py', 'rouge', True),
        ('llm_infer.py', 'exact', True),
        ('llm_sft.py', 'mine.py:score', False),
        ('pytest', 'rouge', False),
        (None, 'rouge', False),
    ],
)
def test_packages_are_hidden_only_where_nothing_else_can_need_them(
    program: str | None, score: str, hides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run in the process, or a function of the user, may import what this run does not use."""
    hidden: list[str] = []
    monkeypatch.setattr(processes, 'leave_out', hidden.extend)
    monkeypatch.setitem(sys.modules, '__main__', SimpleNamespace(**({'__file__': program} if program else {})))
    args = SftArguments(score=[score], dataset=['sql-demo', 'alpaca-en#9'])
    processes.leave_out_unused(args, ModelInfo(model_id_or_path='a/b', template='auto'), Path('nowhere'))
    assert set(hidden) == (OPTIONAL if hides else set())


def test_datasets_is_not_hidden_from_a_function_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[str] = []
    monkeypatch.setattr(processes, 'leave_out', hidden.extend)
    monkeypatch.setitem(sys.modules, '__main__', SimpleNamespace(__file__='llm_sft.py'))
    monkeypatch.setitem(DATASET_MAPPING, 'mine', lambda: [{'query': 'a', 'response': 'b'}])
    args = SftArguments(dataset=['sql-demo'], val_dataset=['mine#9'])
    processes.leave_out_unused(args, ModelInfo(model_id_or_path='a/b', template='auto'), Path('nowhere'))
    assert set(hidden) == OPTIONAL - {'datasets'}

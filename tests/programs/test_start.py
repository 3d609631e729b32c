"""What a program imports when it starts: optional packages that the run does not use stay out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import run_program, small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.run import processes


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
    optional = {'bitsandbytes', 'deepspeed', 'gptqmodel', 'optimum', 'torchao'}
    assert imported & optional == used
    assert not [line for line in others if 'warn' in line.lower() or 'kernels' in line]


def test_nothing_is_left_out_in_a_process_that_may_do_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(names: object) -> None:
        raise AssertionError(names)

    monkeypatch.setattr(processes, 'leave_out', refuse)
    processes.leave_out_unused(None, None, Path())  # type: ignore[arg-type]

"""--adapter and --new_tokens on two gloo processes: the numbers of one process, the same bits after resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_sft
from tests.support.runs import ROOT, assert_equal, log_lines, small_flags, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.optional]


def test_two_processes_train_as_one_does(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    flags = [*small_flags(model_dir, data_file, tmp_path / 'out'), '--group_by_length', 'false']

    def words(name: str, *more: str) -> list[str]:
        return [*flags, '--output_dir', str(tmp_path / name), '--save_total_limit', '-1', *more]

    assert llm_sft.main(words('first', '--max_steps', '3', '--lora_rank', '4', '--use_dora', 'true')) == 0
    start = ['--adapter', str(next((tmp_path / 'first').glob('*/*/checkpoint-3')))]
    assert llm_sft.main(words('one', *start)) == 0

    two = ['--gradient_accumulation_steps', '1', '--only_save_model', 'false']
    zero = ['--deepspeed_config_path', 'ds_config/zero2.json']
    resume = ['--resume_from_checkpoint', f'glob:{tmp_path}/two/*/*/checkpoint-3']
    tokens = tmp_path / 'tokens.txt'
    tokens.write_text('<tool>\n</tool>\n')
    rows = [{'query': f'what is {i}?', 'response': f'<tool>look up {i % 5}</tool>'} for i in range(40)]
    data = write_jsonl(tmp_path / 'rows.jsonl', rows)
    adding = ['--new_tokens', str(tokens), '--lora_modules_to_save', 'model.norm', '--dataset', str(data)]
    assert llm_sft.main(words('tokens-one', *adding)) == 0
    resume_tokens = ['--resume_from_checkpoint', f'glob:{tmp_path}/tokens/*/*/checkpoint-3']
    runs = [
        ['llm_sft', words('tokens', *adding, *two)],
        ['llm_sft', words('tokens-resumed', *adding, *resume_tokens, *two)],
        ['llm_sft', words('tokens-zero', *adding, *two, *zero)],
        ['llm_sft', words('two', *start, *two)],
        ['llm_sft', words('resumed', *resume, *two)],
        ['llm_sft', words('zero', *start, *two, *zero)],
    ]
    plan = tmp_path / 'plan.json'
    plan.write_text(json.dumps({'runs': runs, 'notes': str(tmp_path), 'fail': None}))
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         str(ROOT / 'tests' / 'support' / 'distributed_driver.py'), str(plan)],
        cwd=ROOT, text=True, capture_output=True, timeout=500, check=False, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]

    found: dict[str, Path] = {path.name: next(path.glob('*/*')) for path in tmp_path.iterdir() if path.is_dir()}
    assert_equal(found['resumed'] / 'checkpoint-6', found['two'] / 'checkpoint-6')
    assert_equal(found['tokens-resumed'] / 'checkpoint-6', found['tokens'] / 'checkpoint-6')
    for one, others in (('one', ('two', 'zero')), ('tokens-one', ('tokens', 'tokens-zero'))):
        wanted = log_lines(found[one] / 'checkpoint-6')
        for name in others:
            lines: list[dict[str, Any]] = log_lines(found[name] / 'checkpoint-6')
            assert len(lines) == len(wanted) >= 8
            for line, other in zip(lines, wanted, strict=True):
                assert line.get('loss', 0) == pytest.approx(other.get('loss', 0), abs=2e-4), (name, line)

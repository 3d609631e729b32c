"""Progress bars are for a terminal. In a file or pipe, each logging step is one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from tests.support.runs import run_program, small_flags
from utils.train import callbacks
from utils.train.callbacks import LogLines

Run = Callable[..., Path]


@pytest.mark.slow
def test_a_pipe_gets_lines_without_bars(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    flags = [*small_flags(model_dir, data_file, tmp_path / 'out'), '--report_samples', '2']
    done = run_program('llm_sft.py', *flags)
    assert done.returncode == 0, done.stderr
    written = done.stdout + done.stderr
    assert not re.search(r'\r|\x1b|it/s|s/it|\d%\|', written)
    steps = [line for line in written.splitlines() if re.match('step .*loss', line)]
    found = [
        re.fullmatch(r"step (\d) of 6(, 0:00:\d\d left)?: \{'loss': '[\d.]+', .*'learning_rate': '.*", s) for s in steps
    ]
    assert [match[1] for match in found if match] == ['1', '2', '3', '4', '5', '6']
    assert [bool(match[2]) for match in found if match] == [True] * 5 + [False]
    assert sum("{'eval_loss': " in line for line in steps) == 2

    checkpoint = next((tmp_path / 'out').glob('*/*/checkpoint-6'))
    answered = run_program('llm_infer.py', '--ckpt_dir', str(checkpoint), '--max_new_tokens', '2')
    assert answered.returncode == 0 and '%|' not in answered.stderr


def test_a_terminal_gets_bars(
    run_sft: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr('utils.train.trainer_args.shows_bars', lambda: True)
    run_sft('--max_steps', '2')
    shown = capsys.readouterr()
    assert "{'loss': " in shown.out and '| 2/2 [' in shown.err
    assert 'step 1 of 2' not in caplog.text


def test_the_remaining_time_is_that_of_the_steps_of_this_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = iter([100.0, 120.0])
    monkeypatch.setattr(callbacks.time, 'perf_counter', lambda: next(times))
    args: Any = None
    lines = LogLines()
    with caplog.at_level('INFO', 'assay'):
        lines.on_step_begin(args, TrainerState(global_step=500, max_steps=1000), TrainerControl())
        resumed = TrainerState(global_step=510, max_steps=1000)
        lines.on_log(args, resumed, TrainerControl(), logs={'loss': 2.0, 'total_flos': 1.0})
    assert [record.getMessage() for record in caplog.records] == ["step 510 of 1000, 0:16:20 left: {'loss': '2'}"]

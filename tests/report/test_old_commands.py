"""Commands of earlier versions do the work of the new ones, and name them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ('old', 'new', 'runs'),
    [
        ('push', 'utils.export.push RUN', 1),
        ('compare', 'utils.report RUN OTHER', 2),
        ('run_report', 'utils.report RUN', 1),
    ],
)
def test_a_command_of_an_earlier_version_names_the_new_one_and_does_its_work(
    old: str, new: str, runs: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, '-m', f'utils.{old}', *[str(tmp_path)] * runs],
        cwd=ROOT, check=False, capture_output=True, encoding='utf-8',
    )  # fmt: skip
    first, *more = done.stderr.splitlines()
    assert first == f'python -m utils.{old} is now: python -m {new}'
    assert done.returncode == 2 and 'is not a run folder, because it has no sft_args.json' in more[0]

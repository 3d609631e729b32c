"""Scripts run under bash with stand-ins for python and torchrun."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import ROOT

SFT = sorted((ROOT / 'scripts').glob('*/*/sft.sh'))
# Writes the program, the visible GPUs and the arguments to a file that the caller names for the run.
STAND_IN = """#!/bin/sh
printf '%s\\0' "${0##*/}" "${CUDA_VISIBLE_DEVICES-}" "$@" > "$RECORD"
"""
# Started from another folder, in one bash for all scripts.
DRIVER = 'for s in "$@"; do RECORD="$RECORDS/${s//\\//_}" bash "$s" $WORDS || echo "$s" >> "$RECORDS/failed"; done'
MACHINES = {'NNODES': '2', 'NODE_RANK': '1', 'MASTER_ADDR': '10.0.0.1'}


@dataclass(frozen=True)
class Started:
    """What a script would run: the program, the GPUs it would see, how many processes, and the flags."""

    program: str
    gpus: list[str]
    launcher: list[str]
    flags: list[str]

    @property
    def processes(self) -> int:
        """Return the number of processes on all machines."""
        if self.program == 'python':
            return 1
        machines = int(self.launcher[self.launcher.index('--nnodes') + 1]) if '--nnodes' in self.launcher else 1
        return machines * int(self.launcher[self.launcher.index('--nproc_per_node') + 1])


def run_scripts(folder: Path, scripts: list[Path], words: str, **env: str) -> dict[Path, Started]:
    """Return what each of these scripts would run with the same added words."""
    for name in ('python', 'torchrun'):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    records = folder / 'records'
    records.mkdir()
    own = {k: v for k, v in os.environ.items() if k not in ('CUDA_VISIBLE_DEVICES', 'NPROC_PER_NODE', *MACHINES)}
    path = f'{folder}:{os.environ["PATH"]}'
    subprocess.run(
        ['bash', '-c', DRIVER, 'bash', *map(str, scripts)],
        # An activated environment, so that the stand-ins come first in PATH.
        cwd=folder, check=True,
        env={**own, 'VIRTUAL_ENV': str(folder), 'PATH': path, 'RECORDS': str(records), 'WORDS': words, **env},
    )  # fmt: skip
    assert not (records / 'failed').exists(), (records / 'failed').read_text()
    found = {}
    for script in scripts:
        program, gpus, *said = (records / str(script).replace('/', '_')).read_text().split('\0')[:-1]
        start = next(i for i, word in enumerate(said) if word.endswith('.py'))
        assert said[start] == {'sft.sh': 'llm_sft.py', 'infer.sh': 'llm_infer.py'}[script.name]
        found[script] = Started(program, [g for g in gpus.split(',') if g], said[:start], said[start + 1 :])
    return found

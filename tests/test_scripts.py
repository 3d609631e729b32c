"""Every script under scripts/, run under bash with stand-ins for python and torchrun that record their arguments."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.argument import InferArguments, SftArguments
from utils.parser import parse
from utils.resolve import resolve_infer, resolve_sft

SCRIPTS = sorted((ROOT / 'scripts').glob('*/*/*.sh'))
STAND_IN = '#!/usr/bin/env bash\nprintf "%s\\0" "$(basename "$0")" "$@" > "$RECORD"\n'


@pytest.fixture(scope='module')
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('bin')
    for name in ('python', 'torchrun'):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return folder


def record(script: Path, stand_ins: Path, tmp_path: Path, *words: str) -> list[str]:
    """Return the words the script would run, started from a foreign folder."""
    target = tmp_path / 'record'
    env = {**os.environ, 'PATH': f'{stand_ins}:{os.environ["PATH"]}', 'RECORD': str(target)}
    subprocess.run(['bash', str(script), *words], cwd=tmp_path, env=env, check=True)
    return target.read_text().split('\0')[:-1]


def test_every_script_resolves_and_states_only_what_differs_from_the_defaults(stand_ins: Path, tmp_path: Path) -> None:
    seen = 0
    for script in SCRIPTS:
        text = script.read_text()
        assert text.startswith('#!/usr/bin/env bash\n# '), script
        assert 'set -euo pipefail' in text and 'token' not in text
        mode = script.parent.name
        if script.name == 'sft.sh':
            program, *words = record(script, stand_ins, tmp_path, '--seed', '7')
            words = words[words.index('llm_sft.py') + 1 :]
            parsed = parse(SftArguments, words, program='x', about='x')
            done = resolve_sft(parsed)
            assert not done.problems.found, (script, done.problems.found)
            assert done.args.seed == 7, 'flags of the command line come last and win'
            assert script.parent.parent.name == str(done.args.model_type).replace('-', '_').replace('.', '_')
            assert mode.startswith(('lora', 'qlora', 'full'))
            assert (done.args.sft_type == 'full') == mode.startswith('full')
            assert bool(done.args.quantization_bit) == mode.startswith('qlora')
            assert (program == 'torchrun') == ('ddp' in mode)
            defaults = {f.name: f.default for f in fields(SftArguments) if f.default is not MISSING}
            restated = [n for n in parsed.typed - {'seed'} if getattr(parsed.args, n) == defaults.get(n)]
            assert not restated, f'{script} restates the default of {restated}'
        else:
            _, name, *words = record(script, stand_ins, tmp_path, 'some/checkpoint', '--eval_human', 'true')
            assert script.name == 'infer.sh' and name == 'llm_infer.py'
            infer = resolve_infer(parse(InferArguments, [*words, '--model_type', 'llama2-7b'], program='x', about='x'))
            assert infer.args.ckpt_dir == 'some/checkpoint' and infer.args.eval_human
            assert (script.parent / 'sft.sh').is_file()
        seen += 1
    assert seen == 8


def test_infer_scripts_ask_for_a_checkpoint(stand_ins: Path, tmp_path: Path) -> None:
    asked = 0
    for script in (s for s in SCRIPTS if s.name == 'infer.sh'):
        done = subprocess.run(['bash', str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode != 0 and 'usage: infer.sh CHECKPOINT' in done.stderr
        asked += 1
    assert asked == 4


def test_arguments_golden_list() -> None:
    """Flags and defaults are a promise: a change here is made on purpose."""
    golden = json.loads((ROOT / 'tests' / 'golden_arguments.json').read_text())
    found = {
        cls.__name__: {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
        for cls in (SftArguments, InferArguments)
    }
    assert found == golden
    assert (len(found['SftArguments']), len(found['InferArguments'])) == (76, 37)

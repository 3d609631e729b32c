"""Every script under scripts/, run under bash with stand-ins for python and torchrun that record their arguments."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT
from tests.support.script_runs import MACHINES, SFT, Started, run_scripts
from tools.script_table import read_script
from utils.cli.arguments import InferArguments, SftArguments
from utils.cli.parser import parse
from utils.cli.resolution import Resolution
from utils.cli.resolve import resolve_sft
from utils.cli.resolve_infer import resolve_infer
from utils.loading.info import QKV
from utils.model import MODEL_MAPPING
from utils.preprocess import AUTO

INFER = sorted((ROOT / 'scripts').glob('*/*/infer.sh'))
VARIANTS = {'plain': {}, 'four': {'NPROC_PER_NODE': '4'}, 'machines': {**MACHINES, 'CUDA_VISIBLE_DEVICES': '6,7'}}


@pytest.fixture(scope='module')
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Path, Started]]:
    """Return the command of every sft.sh, for each variant of the environment."""
    return {name: run_scripts(tmp_path_factory.mktemp(name), SFT, '--seed 7', **env) for name, env in VARIANTS.items()}


def resolved(flags: list[str]) -> tuple[frozenset[str], Resolution[SftArguments]]:
    """Return the typed flags and the resolved arguments."""
    parsed = parse(SftArguments, flags, program='x', about='x')
    return parsed.typed, resolve_sft(parsed)


def test_every_script_is_seen() -> None:
    assert len(SFT) == len(INFER) >= 97 and [s.parent for s in SFT] == [s.parent for s in INFER]
    assert len({s.parent.parent for s in SFT}) >= 43


def test_every_script_has_a_header_and_passes_its_words_on() -> None:
    for script in SFT + INFER:
        lines = script.read_text().splitlines()
        assert lines[0] == '#!/usr/bin/env bash' and lines[1].startswith('# ') and lines[1].endswith('.'), script
        assert 'source scripts/env.sh' in lines, script
        assert 'set -euo pipefail' in lines and 'token' not in script.read_text().lower(), script
        assert lines[-1].endswith('-- "$@"' if script.name == 'sft.sh' else '"${@:2}"'), script


def test_flags_resolve_and_state_only_what_differs(started: dict[str, dict[Path, Started]]) -> None:
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(SftArguments)
    }
    seen = 0
    for script, found in started['plain'].items():
        typed, done = resolved(found.flags)
        assert not done.problems.found and not done.warnings, (script, done.problems.found, done.warnings)
        assert done.args.seed == 7, 'flags of the command line come last and win'
        assert done.info is not None and done.args.model_type in MODEL_MAPPING
        assert script.parent.parent.name == str(done.args.model_type).replace('-', '_').replace('.', '_')
        typed_values = vars(parse(SftArguments, found.flags, program='x', about='x').args)
        restated = [name for name in typed - {'seed'} if typed_values[name] == defaults[name]]
        assert not restated, f'{script} restates the default of {restated}'
        assert typed_values['template_type'] != done.info.template, f'{script} restates the template of its model'
        if 'lora_target_modules' in typed:
            targets = done.info.lora_target_modules
            assert set(typed_values['lora_target_modules']) != set(targets), script
            all_layers = done.info.template == AUTO and targets != QKV
            assert not all_layers, f'{script}: its model names all its linear layers by itself'
        seen += 1
    assert seen >= 97


def test_a_data_set_typed_after_a_script_replaces_its_own(tmp_path: Path) -> None:
    [script] = [s for s in SFT if s.parts[-3:-1] == ('qwen_7b_chat', 'qlora')]
    found = run_scripts(tmp_path, [script], '--dataset a.jsonl --dataset b.jsonl')[script]
    assert parse(SftArguments, found.flags, program='x', about='x').args.dataset == ['a.jsonl', 'b.jsonl']


def mode_of(found: Started, done: Resolution[SftArguments]) -> str:
    """Return the folder name that follows from a command line."""
    args, info = done.args, done.info
    assert info is not None
    packed = bool(args.quantization_bit) or info.quantization is not None
    parts = {
        'full': args.sft_type == 'full',
        'qlora': args.sft_type == 'lora' and packed,
        'lora': args.sft_type == 'lora' and not packed,
        'mp': len(found.gpus) > found.processes,
        'ddp': found.program == 'torchrun',
        'ds': args.deepspeed_config_path == 'ds_config/zero2.json',
        'ds3': args.deepspeed_config_path == 'ds_config/zero3.json',
        'fsdp': args.fsdp,
    }
    return '_'.join(name for name, is_so in parts.items() if is_so)


def test_folder_names_say_what_the_flags_and_the_launcher_do(started: dict[str, dict[Path, Started]]) -> None:
    modes = set()
    for script, found in started['plain'].items():
        _, done = resolved(found.flags)
        assert script.parent.name == mode_of(found, done), script
        path = done.args.deepspeed_config_path
        assert path is None or (ROOT / path).is_file(), path
        modes.add(script.parent.name)
    assert {'lora', 'qlora', 'full', 'lora_ddp', 'lora_mp', 'lora_mp_ddp', 'qlora_ddp_ds', 'full_ddp_ds3'} < modes
    assert len(modes) >= 16


def test_the_table_has_a_row_for_every_script_and_reads_it_as_bash_does(
    started: dict[str, dict[Path, Started]],
) -> None:
    text = (ROOT / 'scripts' / 'README.md').read_text(encoding='utf-8')
    rows = {
        row[1]: row for row in re.findall(r'^\| (\S+) \| \[\S+\]\((\S+)\) \| (.+) \| (\d+) \| (\S+) \|$', text, re.M)
    }
    assert list(rows) == [script.relative_to(ROOT / 'scripts').as_posix() for script in SFT]
    unknown = 0
    for script, found in started['plain'].items():
        model, path, hardware, batch, memory = rows[script.relative_to(ROOT / 'scripts').as_posix()]
        said, args = read_script(script), resolved(found.flags)[1].args
        assert [*said.words, '--', '--seed', '7'] == found.flags, script
        assert said.machine.processes == found.processes and said.machine.gpu == bool(found.gpus), script
        assert said.machine.devices == max(1, len(found.gpus) // found.processes), script
        assert model == args.model_type and hardware in script.read_text(encoding='utf-8'), path
        assert int(batch) == args.batch_size * args.gradient_accumulation_steps * found.processes
        unknown += memory == 'unknown'
        assert memory == 'unknown' or 1 < float(memory) < 130, script
    assert unknown == 6


def test_the_effective_batch_is_the_same_on_any_number_of_processes(started: dict[str, dict[Path, Started]]) -> None:
    seen = 0
    for variant in started.values():
        for script, found in variant.items():
            args = resolved(found.flags)[1].args
            batch = args.batch_size * args.gradient_accumulation_steps * found.processes
            assert batch == (32 if args.model_type == 'seqgpt-560m' else 16), (script, found)
            seen += 1
    assert seen == 3 * len(SFT)


def test_several_processes_and_machines_start_through_one_launcher(started: dict[str, dict[Path, Started]]) -> None:
    several = {script for script, found in started['plain'].items() if found.program == 'torchrun'}
    assert len(several) >= 45
    for script in SFT:
        plain, four, machines = (started[name][script] for name in VARIANTS)
        if script not in several:
            assert plain.launcher == four.launcher == machines.launcher == []
            continue
        assert plain.launcher == ['--standalone', '--nproc_per_node', str(plain.processes)]
        assert four.launcher == ['--standalone', '--nproc_per_node', '4']
        assert machines.launcher == [
            '--nnodes', '2', '--node_rank', '1', '--master_addr', '10.0.0.1', '--master_port', '29500',
            '--nproc_per_node', str(plain.processes),
        ]  # fmt: skip
        assert machines.gpus == ['6', '7'], 'what the caller sets is kept'


def test_several_machines_need_to_know_each_other(tmp_path: Path) -> None:
    script = next(s for s in SFT if s.parent.name == 'lora_ddp')
    env = {**os.environ, 'NNODES': '2'}
    done = subprocess.run(['bash', str(script)], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and 'NODE_RANK: the number of this machine, 0 on the first' in done.stderr


def test_infer_scripts_take_a_checkpoint_and_more_flags(tmp_path: Path) -> None:
    seen = 0
    for script, found in run_scripts(tmp_path, INFER, 'some/checkpoint --eval_human true').items():
        words = [*found.flags, '--model_type', 'llama2-7b']
        infer = resolve_infer(parse(InferArguments, words, program='x', about='x'))
        assert found.program == 'python' and not infer.problems.found, script
        assert infer.args.ckpt_dir == 'some/checkpoint' and infer.args.eval_human
        seen += 1
    assert seen >= 97
    done = subprocess.run(['bash', str(INFER[0])], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0 and 'usage: infer.sh CHECKPOINT' in done.stderr


def test_arguments_golden_list() -> None:
    """Flags and defaults are a promise to users: change them only on purpose."""
    golden = json.loads((ROOT / 'tests' / 'golden_arguments.json').read_text())
    found: dict[str, dict[str, Any]] = {
        cls.__name__: {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
        for cls in (SftArguments, InferArguments)
    }
    assert found == golden
    assert (len(found['SftArguments']), len(found['InferArguments'])) == (107, 49)


@pytest.mark.parametrize('active', ['', 'VIRTUAL_ENV', 'CONDA_PREFIX'])
def test_scripts_use_the_environment_of_the_checkout_where_no_other_is_active(active: str, tmp_path: Path) -> None:
    own, other = tmp_path / '.venv' / 'bin', tmp_path / 'other'
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / 'python').write_text(f'#!/bin/sh\necho {folder}\n')
        (folder / 'python').chmod(0o755)
    plain = {k: v for k, v in os.environ.items() if k not in ('VIRTUAL_ENV', 'CONDA_PREFIX')}
    env = {**plain, 'PATH': f'{other}:{os.environ["PATH"]}', **({active: 'x'} if active else {})}
    found = subprocess.run(
        ['bash', '-c', f'set -euo pipefail; source {ROOT}/scripts/env.sh; python'],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(other if active else own)

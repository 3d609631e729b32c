"""One script of each mode trains for real: a tiny checkpoint replaces its model, and added flags make the run short.

There is no GPU, so the modes behave as on any CPU machine: `mp` modes, which spread layers over GPUs, hold them
all on the CPU, and processes communicate over gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_sft
from tests.support.runs import ROOT, write_jsonl
from tests.support.script_runs import SFT, Started, run_scripts
from utils.hub.clients import Repo, connect
from utils.model import MODEL_MAPPING

# For each mode, its script and the class of its checkpoint, as config.json names it.
ONE_OF_EACH = {
    'lora': ('llama2_7b_chat', 'llama'),
    'qlora': ('llama2_7b_chat', 'llama'),
    'full': ('seqgpt_560m', 'bloom'),
    'lora_mp': ('gpt_oss_20b', 'gpt_oss'),
    'qlora_mp': ('llama2_70b_chat', 'llama'),
    'full_mp': ('qwen_7b_chat', 'qwen2'),
    'lora_ddp': ('internlm_20b', 'llama'),
    'qlora_ddp': ('internlm_20b_chat', 'llama'),
    'full_ddp': ('llama3_2_1b_instruct', 'llama'),
    'lora_mp_ddp': ('qwen_7b_chat', 'qwen2'),
    'full_mp_ddp': ('qwen_7b_chat', 'qwen2'),
    'lora_ddp_ds': ('mistral_7b_chat', 'mistral'),
    'qlora_ddp_ds': ('llama2_13b_chat', 'llama'),
    'lora_ddp_ds3': ('mistral_nemo_12b_instruct', 'mistral'),
    'full_ddp_ds3': ('llama3_1_8b_instruct', 'llama'),
    'full_ddp_fsdp': ('qwen2_5_7b_instruct', 'qwen2'),
}
SHORT = {
    'max_steps': 2, 'eval_steps': 2, 'max_length': 64, 'batch_size': 1, 'gradient_accumulation_steps': 1,
    'dtype': 'fp32', 'dataloader_num_workers': 0, 'report_samples': 0,
}  # fmt: skip
SCRIPTS = {mode: ROOT / 'scripts' / model / mode / 'sft.sh' for mode, (model, _) in ONE_OF_EACH.items()}
ALONE = [mode for mode in ONE_OF_EACH if 'ddp' not in mode]
TOGETHER = [mode for mode in ONE_OF_EACH if 'ddp' in mode]


def place_checkpoint(folder_name: str, kind: str, tokenizer: Any) -> None:
    """Put a tiny checkpoint into the hub client's cache of this model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    key = next(k for k in MODEL_MAPPING if k.replace('-', '_').replace('.', '_') == folder_name)
    target = connect('modelscope', None).cached(Repo(hub='modelscope', id=MODEL_MAPPING[key].model_id_or_path), 'model')
    if target.is_dir():
        return
    sizes = {
        'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'vocab_size': 400,
        'num_key_value_heads': 2, 'head_dim': 8, 'max_position_embeddings': 128, 'num_local_experts': 2, 'n_head': 4,
        'num_experts_per_tok': 1, 'n_layer': 2, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 5,
    }  # fmt: skip
    known = AutoConfig.for_model(kind).to_dict()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{name: size for name, size in sizes.items() if name in known})
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)


@pytest.fixture
def started(tmp_path: Path, tokenizer: Any) -> dict[str, Started]:
    """Return the command that the script of each mode starts, for two processes and a short run."""
    for model, kind in dict.fromkeys(ONE_OF_EACH.values()):
        place_checkpoint(model, kind, tokenizer)
    rows = [{'query': f'what is {i}?', 'response': f'it is {i}.' + ' yes' * (i % 5)} for i in range(12)]
    short = {**SHORT, 'dataset': write_jsonl(tmp_path / 'rows.jsonl', rows), 'output_dir': tmp_path / 'output'}
    words = ' '.join(f'--{name} {value}' for name, value in short.items())
    (tmp_path / 'stand_ins').mkdir()
    found = run_scripts(tmp_path / 'stand_ins', list(SCRIPTS.values()), words, NPROC_PER_NODE='2')
    return {mode: found[script] for mode, script in SCRIPTS.items()}


def check_run(folder: Path, mode: str) -> None:
    """Check that a run of this mode trained two steps and saved what it trains."""
    (state,) = folder.glob('*/*/checkpoint-2/trainer_state.json')
    found = json.loads(state.read_text())
    assert found['global_step'] == 2 and any(entry.get('loss', 0) > 1 for entry in found['log_history']), mode
    weights = 'model.safetensors' if mode.startswith('full') else 'adapter_model.safetensors'
    assert (state.parent / weights).is_file(), mode


def test_there_is_one_of_every_mode() -> None:
    assert set(ONE_OF_EACH) == {script.parent.name for script in SFT}
    assert all(script.is_file() for script in SCRIPTS.values()) and len(ALONE) == 6 and len(TOGETHER) == 10


@pytest.mark.slow
@pytest.mark.optional
def test_scripts_of_one_process_train(started: dict[str, Started], tmp_path: Path) -> None:
    pytest.importorskip('bitsandbytes')
    for mode in ALONE:
        assert started[mode].program == 'python' and started[mode].processes == 1
        output = tmp_path / mode
        assert llm_sft.main([*started[mode].flags, '--output_dir', str(output)]) == 0, mode
        check_run(output, mode)


@pytest.mark.processes
@pytest.mark.optional
@pytest.mark.slow
def test_scripts_of_several_processes_train(started: dict[str, Started], tmp_path: Path) -> None:
    """The programs run one after another in one launch of two processes: importing the libraries takes longest."""
    pytest.importorskip('bitsandbytes')
    pytest.importorskip('deepspeed')
    runs: list[list[Any]] = []
    for mode in TOGETHER:
        assert started[mode].program == 'torchrun' and started[mode].processes == 2
        # test_distributed.py has the first-step gate under each kind of sharding; here one run of each sft_type does.
        gate = mode in ('lora_ddp', 'full_ddp')
        runs.append(
            ['llm_sft', [*started[mode].flags, '--output_dir', str(tmp_path / mode), '--preflight', str(gate).lower()]]
        )
    runs.append(['llm_sft', [*started['lora_ddp_ds'].flags, '--dry_run', 'true']])
    plan = tmp_path / 'plan.json'
    plan.write_text(json.dumps({'runs': runs, 'notes': str(tmp_path), 'fail': None}))
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', *started['lora_ddp'].launcher,
         str(ROOT / 'tests' / 'support' / 'distributed_driver.py'), str(plan)],
        cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count('memory of this CPU, 2 processes, ZeRO-2, GiB, an estimate') == 1, 'one process prints'
    for number, mode in enumerate(TOGETHER):
        check_run(tmp_path / mode, mode)
        parameters = json.loads((tmp_path / f'{number}-0.json').read_text())['parameters']
        assert any('DTensor' in name for name in parameters) == mode.endswith('fsdp'), mode


@pytest.mark.slow
def test_a_script_runs_as_it_is_from_any_folder(started: dict[str, Started], tmp_path: Path) -> None:
    """Here the real script runs the real python."""
    words = [word for name, value in SHORT.items() for word in (f'--{name}', str(value))]
    words += ['--dataset', str(tmp_path / 'rows.jsonl'), '--output_dir', str(tmp_path / 'lora')]
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        ['bash', str(SCRIPTS['lora']), *words], cwd=tmp_path, env={**os.environ, 'PATH': path, 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    check_run(tmp_path / 'lora', 'lora')

"""Which modes can be combined, and which layer goes to which GPU; GPUs are simulated by their memory sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_sft
from tests.support.runs import ROOT, small_flags
from utils.base import dist
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.loading.devices import Spread, resolve_device_map
from utils.loading.legacy.registry import FAMILIES

GIB = 2**30
ZERO_2, ZERO_3 = (('--deepspeed_config_path', str(ROOT / 'ds_config' / f'zero{stage}.json')) for stage in (2, 3))
QLORA, FSDP = ('--quantization_bit', '4'), ('--fsdp', 'true')
REFUSED = [
    # GPUs, processes per machine (0: not under torchrun), flags, what the message says
    (0, 0, FSDP, 'Start the command with: torchrun --nproc_per_node 2 llm_sft.py'),
    (4, 0, ZERO_2, 'Start the command with: torchrun --nproc_per_node 4 llm_sft.py'),
    (0, 1, FSDP, 'needs 2 or more processes, got 1'),
    (0, 2, (*FSDP, *ZERO_2), 'both shard the model. Remove one'),
    (0, 2, (*FSDP, *QLORA), 'cannot shard quantised weights. Use --deepspeed_config_path ds_config/zero2.json'),
    (
        0,
        2,
        (*FSDP, '--model_id_or_path', 'qwen/Qwen-7B-Chat-Int4'),
        "--fsdp true: the weights of 'qwen-7b-chat-int4' are stored quantised (gptq) and cannot be sharded",
    ),
    (0, 2, (*FSDP, '--dtype', 'fp16'), 'Use --dtype bf16 or fp32'),
    (
        0,
        2,
        (*FSDP, '--only_save_model', 'false'),
        'use --deepspeed_config_path ds_config/zero3.json instead of --fsdp',
    ),
    (0, 2, (*FSDP, '--resume_from_checkpoint', '.'), 'Remove --resume_from_checkpoint, or use'),
    (0, 2, (*FSDP, '--sft_type', 'full', '--optim', 'adamw_8bit'), 'Use --optim adamw_torch with --fsdp true'),
    (0, 2, (*FSDP, '--sft_type', 'full', '--optim', 'ademamix'), 'Use --optim adamw_torch with --fsdp true'),
    (0, 2, (*ZERO_3, *QLORA), 'does not shard quantised weights. Use ds_config/zero2.json'),
    (0, 2, (*ZERO_3, '--resume_from_checkpoint', '.'), 'holds no optimizer state of DeepSpeed'),
    (4, 2, ZERO_2, 'needs one GPU per process, but 4 GPUs are visible and 2 processes were started. Use --nproc'),
    (4, 2, FSDP, '--fsdp true needs one GPU per process'),
    (4, 2, QLORA, '--quantization_bit 4 needs one GPU per process'),
    (2, 4, (), '4 processes for 2 GPUs, and each process needs its own GPU. Use --nproc_per_node 2'),
    (2, 2, (*QLORA, '--ddp_backend', 'gloo'), '--ddp_backend gloo with --quantization_bit 4 on GPUs'),
    (0, 2, (*QLORA, '--sft_type', 'full'), '4-bit weights cannot be trained'),
]


@pytest.mark.parametrize(('gpus', 'processes', 'flags', 'said'), REFUSED)
def test_combinations_that_cannot_work_say_what_to_use(
    gpus: int, processes: int, flags: tuple[str, ...], said: str, model_dir: Path, data_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, problems: Callable[[], list[str]],
) -> None:  # fmt: skip
    monkeypatch.setattr(dist, 'visible_gpus', lambda: gpus)
    if processes:
        world = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': str(processes), 'LOCAL_WORLD_SIZE': str(processes)}
        for name, value in world.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr('os._exit', lambda code: None)
    assert llm_sft.main([*small_flags(model_dir, data_file, tmp_path), *flags]) == 2
    assert any(said in line for line in problems()), problems()


def test_deepspeed_values_that_contradict_the_flags_are_named(
    model_dir: Path, data_file: Path, tmp_path: Path, problems: Callable[[], list[str]]
) -> None:
    config = tmp_path / 'ds.json'
    zero = {'stage': 2, 'offload_optimizer': {'device': 'cpu'}}
    adam = {'type': 'AdamW', 'params': {'lr': 'auto', 'betas': [0.9, 0.95], 'eps': 1e-6}}
    own = {'scheduler': {'type': 'WarmupLR'}, 'gradient_accumulation_steps': 7, 'optimizer': adam}
    config.write_text(json.dumps({'zero_optimization': zero, **own}))
    flags = ['--deepspeed_config_path', str(config), '--optim', 'adafactor', '--max_minutes', '30']
    assert llm_sft.main([*small_flags(model_dir, data_file, tmp_path), *flags]) == 2
    assert any('sets gradient_accumulation_steps to 7, and --gradient_accumulation_steps is 2. Set grad' in p
               for p in problems())  # fmt: skip
    assert any('sets betas to [0.9, 0.95], and --adam_beta1 and --adam_beta2 are [0.9, 0.999]' in p for p in problems())
    assert any('sets eps to 1e-06, and --adam_epsilon is 1e-08' in line for line in problems())
    assert any('sets the schedule in its block "scheduler", and --max_minutes' in line for line in problems())
    config.write_text(json.dumps({'zero_optimization': zero}))
    assert llm_sft.main([*small_flags(model_dir, data_file, tmp_path), *flags]) == 2
    assert any('offloads the optimizer, and --optim adafactor cannot be offloaded' in line for line in problems())
    before = len(problems())
    config.write_text(json.dumps({'zero_optimization': {'stage': 2, 'offload_optimizer': {}}}))
    assert llm_sft.main([*small_flags(model_dir, data_file, tmp_path), *flags]) == 2
    assert not any('offloads' in line for line in problems()[before:]), 'DeepSpeed offloads nothing without a device'


def test_a_deepspeed_checkpoint_of_another_number_of_processes_is_refused(
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    problems: Callable[[], list[str]],
) -> None:  # fmt: skip
    states = tmp_path / 'checkpoint-1' / 'global_step1'
    states.mkdir(parents=True)
    for rank in range(3):
        (states / f'zero_pp_rank_{rank}_mp_rank_00_optim_states.pt').touch()
    world = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2'}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('os._exit', lambda code: None)
    flags = [*ZERO_2, '--resume_from_checkpoint', str(states.parent)]
    assert llm_sft.main([*small_flags(model_dir, data_file, tmp_path), *flags]) == 2
    said = 'holds the optimizer state of 3 DeepSpeed processes, and this run has 2. Start the command with 3 processes.'
    assert any(said in line for line in problems()), problems()


def test_deepspeed_configurations_leave_to_the_trainer_what_it_knows() -> None:
    files = sorted((ROOT / 'ds_config').glob('*.json'))
    assert [f.stem for f in files] == ['zero2', 'zero2_offload', 'zero3', 'zero3_offload']
    for file in files:
        config = json.loads(file.read_text())
        zero = config.pop('zero_optimization')
        assert zero['stage'] == int(file.stem[4])
        assert ('offload_optimizer' in zero) == file.stem.endswith('offload')
        assert all(value in ('auto', {'enabled': 'auto'}) for value in config.values())


def model_of(name: str) -> Any:
    """Return a function that builds a model class at the size of a published model."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    llama = {'vocab_size': 32000, 'tie_word_embeddings': False}
    if name == 'qwen-14b':
        original = {
            'vocab_size': 152064, 'hidden_size': 5120, 'intermediate_size': 27392, 'num_hidden_layers': 40,
            'num_attention_heads': 40, 'kv_channels': 128, 'seq_length': 2048, 'rotary_emb_base': 10000,
            'layer_norm_epsilon': 1e-6, 'use_dynamic_ntk': True, 'use_logn_attn': True, 'no_bias': True,
            'max_position_embeddings': 8192, 'rotary_pct': 1.0, 'scale_attn_weights': True,
        }  # fmt: skip
        family = FAMILIES['qwen']
        from utils.loading.legacy.opening import _class

        return lambda: _class(family.model_class)(_class(family.config_class)(**family.config(original)))
    config = {
        'llama2-7b': LlamaConfig(**llama),
        'llama2-70b': LlamaConfig(
            **llama, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8,
        ),
        'qwen2.5-7b': Qwen2Config(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, tie_word_embeddings=False,
        ),
        'qwen2.5-3b': Qwen2Config(
            vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
    }[name]  # fmt: skip
    return lambda: AutoModelForCausalLM.from_config(config)


def bytes_of(model: Any, names: set[str] | None, *, linear: float) -> float:
    """Return the bytes of the parameters below these names; shared ones count once."""
    head = model.get_output_embeddings()
    quantised = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    return sum(
        p.numel() * (linear if id(p) in quantised else 2)
        for key, p in model.named_parameters()
        if names is None or any(key.startswith(f'{name}.') for name in names)
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama2-7b', 'llama2-70b', 'qwen-14b', 'qwen2.5-7b', 'qwen2.5-3b'])
def test_layers_are_spread_evenly_and_whole(name: str) -> None:
    from accelerate.utils import check_device_map

    make, checked = model_of(name), 0
    with torch.device('meta'):
        model = make()
    whole = {key for key, m in model.named_modules() if type(m).__name__ in (model._no_split_modules or ())}
    assert len(whole) == model.config.num_hidden_layers
    for gpus in (2, 4, 8):
        for linear in (2.0, 0.5):
            memory = dict.fromkeys(range(gpus), 160 * GIB // gpus)
            spread = Spread(memory=memory, parameter_bytes=2, linear_bytes=linear)
            found = resolve_device_map(spread, make)
            assert whole <= set(found), 'no layer is split'
            check_device_map(model, found)  # accelerate's own check: every parameter has a device
            layers = [found[key] for key in sorted(whole, key=lambda k: int(k.rsplit('.', 1)[-1]))]
            assert all(0 <= b - a <= 1 for a, b in pairwise(layers)), 'neighbours stand together'
            if model.config.get_text_config().tie_word_embeddings:
                assert found['lm_head'] == found['model.embed_tokens']
            share = bytes_of(model, None, linear=linear) / gpus
            largest = max(bytes_of(model, {block}, linear=linear) for block in found)
            if largest > share:
                continue
            for gpu in memory:
                load = bytes_of(model, {block for block, at in found.items() if at == gpu}, linear=linear)
                assert load == pytest.approx(share, rel=0.2), (gpus, linear, gpu)
            checked += 1
    assert checked >= 4


def test_larger_gpus_get_more_layers() -> None:
    memory = {0: 24 * GIB, 1: 24 * GIB, 2: 80 * GIB}
    found = resolve_device_map(Spread(memory=memory, parameter_bytes=2, linear_bytes=2), model_of('qwen-14b'))
    count = [sum(at == gpu and '.layers.' in name for name, at in found.items()) for gpu in memory]
    assert sum(count) == 40 and count[2] > 2 * count[1] and count[0] < count[1], 'the embedding takes room on the first'


def test_a_model_that_does_not_fit_is_refused_for_training_and_offloaded_for_answers() -> None:
    spread = Spread(memory={0: 6 * GIB, 1: 6 * GIB}, parameter_bytes=2, linear_bytes=2)
    with pytest.raises(ConfigError, match=r'needs 12\.6 GiB on GPUs \[0, 1\] with 6\.0, 6\.0 GiB usable: '):
        resolve_device_map(spread, model_of('llama2-7b'))
    assert resolve_device_map(Spread(memory=spread.memory, parameter_bytes=2, linear_bytes=2, must_fit=False),
                 model_of('llama2-7b')) == 'auto'  # fmt: skip
    quantised = Spread(memory=spread.memory, parameter_bytes=2, linear_bytes=0.5)
    assert set(resolve_device_map(quantised, model_of('llama2-7b')).values()) == {0, 1}


def test_the_blocks_that_are_logged_include_those_of_tied_weights(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    caplog.set_level('INFO')
    config = LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True)
    placed = resolve_device_map(
        Spread(memory={0: 40 * GIB}, parameter_bytes=2, linear_bytes=2),
        lambda: AutoModelForCausalLM.from_config(config),
    )
    assert 'lm_head' in placed and f'blocks per GPU: {{0: {len(placed)}}}' in caplog.text


@pytest.mark.parametrize(('gpus', 'processes'), [(8, 2), (8, 4), (4, 2), (8, 8), (5, 2)])
def test_processes_have_gpus_of_their_own(gpus: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    taken: list[int] = []
    for rank in range(processes):
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        own = dist.own_gpus(gpus)
        assert len(own) == gpus // processes
        memory = dict.fromkeys(own, 40 * GIB)
        placed = resolve_device_map(Spread(memory=memory, parameter_bytes=2, linear_bytes=2), model_of('llama2-7b'))
        assert set(placed.values()) == set(own)
        taken += own
    assert len(taken) == len(set(taken)) and max(taken) < gpus


def test_visible_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, 'has_gpu_device', lambda: True)
    for value, count in (('0,1,2', 3), ('', 0), ('-1', 0), ('GPU-5', 1)):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', value)
        assert dist.visible_gpus() == count
    monkeypatch.setattr(dist, 'has_gpu_device', lambda: False)
    assert dist.visible_gpus() == 0


@pytest.mark.parametrize(('rank', 'own'), [(0, [0, 1]), (1, [2, 3])])
def test_each_of_two_processes_spreads_over_its_half_of_four_gpus(
    rank: int, own: list[int], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.model import get_model_info
    from utils.run.open_model import _device_map
    from utils.run.processes import _take_gpus

    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda gpu: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    for name in ('ACCELERATE_BYPASS_DEVICE_MAP', 'ACCELERATE_TORCH_DEVICE'):
        monkeypatch.setenv(name, '')
    for name, value in {'LOCAL_RANK': rank, 'RANK': rank, 'LOCAL_WORLD_SIZE': 2, 'WORLD_SIZE': 2}.items():
        monkeypatch.setenv(name, str(value))
    _take_gpus(4)
    assert chosen == own[:1]
    assert os.environ['ACCELERATE_BYPASS_DEVICE_MAP'] == 'true'
    assert os.environ['ACCELERATE_TORCH_DEVICE'] == f'cuda:{own[0]}'
    info = get_model_info(None, str(model_dir))
    memory = dict.fromkeys(own, 9 * GIB)
    full = _device_map(SftArguments(sft_type='full'), info, torch.float32, trains=True)
    assert full == Spread(memory=memory, parameter_bytes=8, linear_bytes=8)
    monkeypatch.setenv('WORLD_SIZE', '1')
    qlora = _device_map(SftArguments(quantization_bit=4), info, torch.bfloat16, trains=False)
    assert qlora == Spread(memory=memory, parameter_bytes=2, linear_bytes=0.5, must_fit=False)

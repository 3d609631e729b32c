"""Checkpoints: states are kept bitwise without pickle, folders are complete or absent, and damage is named."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from utils.base.checkpoint import MANIFEST, all_checkpoints, damage, last_checkpoint, remove, rotate, seal
from utils.cli.ranges import OPTIMIZERS, SCHEDULERS
from utils.run.record import record_proof
from utils.train.state import load_tree, random_state, save_tree, set_random_state

Run = Callable[..., Path]


def same(a: Any, b: Any) -> bool:
    """Return whether two trees are equal in types, keys, order and bits."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def test_a_tree_comes_back_bit_for_bit(tmp_path: Path) -> None:
    nan = torch.tensor([0x7FC12345, 0x7F800001], dtype=torch.int32).view(torch.float32)  # two NaN values
    tree = {
        0: {'step': torch.tensor(3.0), 'exp_avg': torch.randn(3, 4).t(), 'empty': torch.empty(0, 2)},
        7: {'state1': torch.arange(256, dtype=torch.uint8), 'code': torch.randn(4).bfloat16(), 'half': nan.half()},
        'nan': nan,
        'negative zero': torch.tensor([-0.0]),
        'more': (
            torch.tensor([True, False]),
            torch.tensor([-1], dtype=torch.int8),
            torch.randn(2, dtype=torch.float64),
        ),
        'numbers': [0.1, 1e-300, -0.0, math.inf, -math.inf, math.nan, 2**70, True, None, 'Größe', (0.9, 0.999), {}],
    }
    save_tree(tmp_path / 'state.safetensors', tree)
    found = load_tree(tmp_path / 'state.safetensors')
    assert same(found, tree)
    assert math.copysign(1, found['numbers'][2]) == -1
    assert not same({**tree, 'nan': nan.clone().view(torch.int32).add(1).view(torch.float32)}, tree)


def test_a_tensor_held_twice_is_stored_once(tmp_path: Path) -> None:
    book = torch.randn(256)
    save_tree(tmp_path / 'state.safetensors', [{'map': book}, {'map': book}, book.clone()])
    with safe_open(tmp_path / 'state.safetensors', framework='pt') as file:
        assert len(list(file.keys())) == 2
    assert same(load_tree(tmp_path / 'state.safetensors'), [{'map': book}, {'map': book}, book])


@pytest.mark.parametrize('stranger', [np.float32(1), {1, 2}, object()])
def test_what_json_cannot_say_is_refused(stranger: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match='cannot be stored in'):
        save_tree(tmp_path / 'state.safetensors', {'a': [stranger]})


_BUILT_IN = ('adamw_torch', 'adamw_torch_fused', 'adafactor', 'sgd', 'adagrad', 'rmsprop')
# Without the paged ones, which need a GPU.
_ON_A_CPU = [
    name if name in _BUILT_IN else pytest.param(name, marks=pytest.mark.optional)
    for name in OPTIMIZERS
    if not name.startswith('paged')
]


@pytest.mark.parametrize('name', _ON_A_CPU)
def test_every_optimizer_goes_on_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    if name not in _BUILT_IN:
        pytest.importorskip('bitsandbytes')
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(
        TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, learning_rate=0.01)
    )

    def make(weight: torch.Tensor) -> tuple[torch.nn.Parameter, Any]:
        parameter = torch.nn.Parameter(weight.clone())
        return parameter, kind([{'params': [parameter], 'weight_decay': 0.01}], **keywords)

    def step(parameter: torch.nn.Parameter, optimizer: Any, number: int) -> None:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()

    # 8-bit optimizers keep 32-bit states for small weights.
    parameter, optimizer = make(torch.randn(80, 80, generator=torch.Generator().manual_seed(0)))
    for number in range(3):
        step(parameter, optimizer, number)
    save_tree(tmp_path / 'state.safetensors', optimizer.state_dict())
    assert same(load_tree(tmp_path / 'state.safetensors'), optimizer.state_dict())
    resumed, other = make(parameter.detach())
    other.load_state_dict(load_tree(tmp_path / 'state.safetensors'))
    for number in (3, 4):
        step(parameter, optimizer, number)
        step(resumed, other, number)
    assert same(resumed.detach(), parameter.detach())
    assert same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize('name', SCHEDULERS)
def test_every_schedule_goes_on_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    from utils.train.trainer_args import make_schedule

    def make() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, make_schedule(optimizer, name, learning_rate=0.1, warmup=0.25, steps=12, decay_ratio=0.3)

    _, schedule = make()
    for _ in range(5):
        schedule.step()
    save_tree(tmp_path / 'state.safetensors', schedule.state_dict())
    _, resumed = make()
    resumed.load_state_dict(load_tree(tmp_path / 'state.safetensors'))
    rates = []
    for one in (schedule, resumed):
        rates.append([])
        for _ in range(6):
            one.step()
            rates[-1].append(one.get_last_lr())
    assert rates[0] == rates[1] and len(rates[0]) == 6


def test_random_generators_come_back_from_a_file(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), float(np.random.normal()), torch.randn(3).tolist()]

    draw()  # Python's and NumPy's generators now hold a second normal number
    save_tree(tmp_path / 'state.safetensors', random_state())
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    set_random_state(load_tree(tmp_path / 'state.safetensors'))
    assert [draw(), draw()] == expected


def sealed(run: Path, step: int) -> Path:
    partial = run / f'.checkpoint-{step}.partial'
    (partial / 'part').mkdir(parents=True)
    for name in ('weights.safetensors', 'part/config.json', 'generation_config.json'):
        (partial / name).write_bytes(name.encode() * 50)
    seal(partial, run / f'checkpoint-{step}')
    assert not partial.exists()
    return run / f'checkpoint-{step}'


def test_any_flipped_bit_lost_byte_or_missing_file_is_named(tmp_path: Path) -> None:
    checkpoint = sealed(tmp_path, 5)
    assert damage(checkpoint) is None
    files = [p for p in checkpoint.rglob('*.*') if p.name not in (MANIFEST, 'generation_config.json')]
    assert len(files) == 2
    for path in files:
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert damage(checkpoint) == (
                f'{path.name} is corrupted: its bytes are not those that were written (sha256 differs)'
            )
        path.write_bytes(whole[:-1])
        assert damage(checkpoint) == f'{path.name} has {len(whole) - 1} bytes, it was written with {len(whole)}'
        path.unlink()
        assert damage(checkpoint) == f'{path.name} is missing'
        path.write_bytes(whole)
    (checkpoint / 'generation_config.json').write_text('{}')  # llm_infer.py does so
    (checkpoint / 'infer_result.jsonl').write_text('{}')
    assert damage(checkpoint) is None
    for content in ('{', '[]', '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": 1}}}'):
        (checkpoint / MANIFEST).write_text(content)
        assert damage(checkpoint) == f'its {MANIFEST} cannot be read: it is corrupted'
    (checkpoint / MANIFEST).unlink()
    assert damage(checkpoint) == f'it has no {MANIFEST}, which is written last: it is incomplete'


def test_oldest_checkpoints_go_and_the_best_and_last_stay(tmp_path: Path) -> None:
    made = {step: sealed(tmp_path, step) for step in (2, 4, 6, 10)}
    (tmp_path / '.checkpoint-12.partial').mkdir()
    rotate(tmp_path, limit=-1, best=None)
    assert all_checkpoints(tmp_path) == list(made.values()) and last_checkpoint(tmp_path) == made[10]
    rotate(tmp_path, limit=3, best=str(made[2]))
    assert all_checkpoints(tmp_path) == [made[2], made[6], made[10]]
    rotate(tmp_path, limit=1, best=str(made[2]))
    assert all_checkpoints(tmp_path) == [made[2], made[10]]
    rotate(tmp_path, limit=1, best=str(tmp_path.parent / 'elsewhere' / 'checkpoint-2'))
    assert all_checkpoints(tmp_path) == [made[10]]
    last = sealed(tmp_path, 12)
    rotate(tmp_path, limit=1, best=str(made[10]), keep_last=False)
    assert all_checkpoints(tmp_path) == [made[10]] and not last.exists()


def test_a_checkpoint_that_is_deleted_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = sealed(tmp_path, 5)
    seen: list[list[Path]] = []
    monkeypatch.setattr('shutil.rmtree', lambda *_, **__: seen.append(all_checkpoints(tmp_path)))
    remove(checkpoint)
    assert seen == [[]] and (tmp_path / '.checkpoint-5.removed' / 'weights.safetensors').is_file()


def test_proofs_are_merged_by_the_main_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_proof(tmp_path, 'mask', {'rows': 3})
    record_proof(tmp_path, 'merge', {'largest_difference': 0.0})
    record_proof(tmp_path, 'mask', {'rows': 4})
    monkeypatch.setenv('RANK', '1')
    record_proof(tmp_path, 'mask', {'rows': 5})
    assert json.loads((tmp_path / 'proofs.json').read_text()) == {
        'mask': {'rows': 4}, 'merge': {'largest_difference': 0.0},
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ['proofs.json']

"""A step on a GPU waits for nothing, and a step that is judged later is judged alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import assert_equal, log_lines
from tests.support.waits import Device, WaitError
from utils.base import device
from utils.base.checkpoint import all_checkpoints
from utils.train import callbacks, guard
from utils.train.trainer import SftTrainer

Run = Callable[..., Path]
Problems = Callable[[], list[str]]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge steps as on a GPU: one step late. AdamW skips steps by itself on a CPU too."""
    monkeypatch.setattr(guard, 'judges_late', lambda trainer: True)


@pytest.mark.parametrize('kind', ['lora', 'full'])
def test_steps_wait_for_nothing_on_the_device(
    kind: str, run_sft: Run, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps run with all parameters and sent batches on a stand-in for a device that refuses every wait."""
    found = Device()
    step = SftTrainer.training_step
    send = device.send
    optimize = torch.optim.AdamW.step
    steps: list[int] = []

    def sent(tensors: Any, target: torch.device) -> Any:
        copies = {name: x.clone() for name, x in send(tensors, target).items()}
        found.mark(*copies.values())
        return copies

    def training_step(self: SftTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.mark(*model.parameters(), *model.buffers())
        with found.refusing_to_wait():
            loss = step(self, model, inputs, *args, **kwargs)
        assert not inputs or found.has(loss)
        steps.append(self.state.global_step)
        return loss

    def pre_optimizer_step(self: guard.Guard, *args: Any, **kwargs: Any) -> None:
        with found.refusing_to_wait():
            judged(self, *args, **kwargs)

    def optimizer_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with found.refusing_to_wait():
            return optimize(self, *args, **kwargs)

    def read_later(values: torch.Tensor) -> Any:
        assert found.has(values)
        return values.detach().clone().numpy().copy().tolist

    judged = guard.Guard.on_pre_optimizer_step
    monkeypatch.setattr(device, 'send', sent)
    monkeypatch.setattr(SftTrainer, 'training_step', training_step)
    monkeypatch.setattr(guard.Guard, 'on_pre_optimizer_step', pre_optimizer_step)
    monkeypatch.setattr(torch.optim.AdamW, 'step', optimizer_step)
    monkeypatch.setattr(device, 'read_later', unwatched(read_later))
    flags = ('--preflight', 'false', '--logging_steps', '100', '--max_steps', '3', '--eval_steps', '3')
    run_sft(*flags, '--sft_type', kind, '--group_by_length', 'true')
    assert steps and set(steps) == {0, 1, 2} and found.operations > 1000


def unwatched(read: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """Let a function read a tensor: the copy of the real one needs no wait either."""

    def read_without_modes(values: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return read(values)

    return read_without_modes


def test_the_stand_in_notices_what_waits() -> None:
    found = Device()
    x = torch.tensor([1.0, 0.0, 2.0])
    found.mark(x)
    for wait in (
        lambda: float(x.sum()), lambda: x.tolist(), lambda: x[x > 0], lambda: (x > 0).nonzero(), lambda: x.cpu(),
        lambda: bool((x > 0).all()), lambda: torch.masked_select(x, x > 0), lambda: x.numpy(), lambda: x.unique(),
    ):  # fmt: skip
        with pytest.raises(WaitError), found.refusing_to_wait():
            wait()
    y = torch.tensor([1.0, 3.0])
    with found.refusing_to_wait():
        assert found.has(x * 2) and found.has((x * 2)[1:]) and not found.has(y * 2)
        assert (y * 2).tolist() == [2.0, 6.0] and float(y[y > 2]) == 3.0


def test_a_late_verdict_changes_nothing_in_a_good_run(run_sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ('--save_steps', '2', '--save_total_limit', '-1', '--logging_steps', '2')
    at_once = run_sft(*flags)
    monkeypatch.setattr(guard, 'judges_late', lambda trainer: True)
    later = run_sft(*flags)
    for number in (2, 4, 6):
        assert_equal(later / f'checkpoint-{number}', at_once / f'checkpoint-{number}')
    assert len(log_lines(later / 'checkpoint-6')) == 6


@pytest.mark.parametrize(('factor', 'said'), [(math.inf, 'the loss is finite, but its gradients are not'), (0.0, '')])
def test_a_bad_step_ends_the_run_alike_and_reaches_no_weight(
    factor: float, said: str, run_sft: Run, problems: Problems, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of step 3 are infinite, or all zero. Checkpoints are written after steps 2 and 4."""
    compute_loss = SftTrainer.compute_loss
    seen: dict[int, list[torch.Tensor]] = {}

    def hooked(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        if model.training and not self.in_preflight:
            seen[self.state.global_step] = [p.detach().clone() for p in model.parameters() if p.requires_grad]
            if self.state.global_step == 2:
                loss.register_hook(lambda gradient: gradient * factor)
        return loss

    monkeypatch.setattr(SftTrainer, 'compute_loss', hooked)
    flags = ('--save_steps', '2', '--save_total_limit', '-1', '--logging_steps', '100', '--eval_steps', '6')
    messages = []
    for is_late in (False, True):
        monkeypatch.setattr(guard, 'judges_late', lambda trainer, is_late=is_late: is_late)
        seen.clear()
        run = run_sft(*flags, expect=2)
        messages.append(problems()[-1].replace(str(run), ''))
        assert [p.name for p in all_checkpoints(run)] == ['checkpoint-2']
        assert max(seen) == (3 if is_late else 2), 'a late verdict comes after the next step was computed'
    assert messages[0] == messages[1] and messages[0].startswith('step 3: ') and said in messages[0]
    if said:
        assert messages[0].count(f'{data_file}:') == 4
        assert all(map(torch.equal, seen[3], seen[2])), 'the bad step changed no weight'


def test_a_row_whose_loss_is_nan_is_named_one_step_later(
    late: None, run_sft: Run, problems: Problems, monkeypatch: pytest.MonkeyPatch, data_file: Path
) -> None:
    from utils.fast.scoring import Scorer

    plain = Scorer.loss
    poisoned: list[int] = []

    def loss(self: Scorer, model: Any, batch: Any, divisor: float) -> torch.Tensor:
        found = plain(self, model, batch, divisor)
        rows = batch['rows'].tolist()
        if not poisoned and model.training and torch.is_grad_enabled() and len(seen) == 5:
            poisoned.append(rows[0])
        seen.append(rows)
        return found * math.nan if poisoned and poisoned[0] in rows else found

    seen: list[list[int]] = []
    monkeypatch.setattr(Scorer, 'loss', loss)
    run = run_sft('--preflight', 'false', '--save_steps', '1', '--save_total_limit', '-1', expect=2)
    (message,) = problems()
    found = re.match(r'step (\d+): the loss is not a finite number for (\S+):(\d+)\. Check these rows\.', message)
    assert found is not None and found[2] == str(data_file), message
    last = all_checkpoints(run)[-1]
    assert last.name == f'checkpoint-{int(found[1]) - 1}', 'it is judged before the next checkpoint'
    assert all(t.isfinite().all() for t in load_file(last / 'adapter_model.safetensors').values())


def test_steps_are_judged_late_where_the_optimizer_can_skip_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    def trainer(optimizer: Any, *, scaler: Any = None, deepspeed: bool = False, fsdp: bool = False) -> Any:
        return SimpleNamespace(
            optimizer=SimpleNamespace(optimizer=optimizer),
            accelerator=SimpleNamespace(scaler=scaler),
            is_deepspeed_enabled=deepspeed,
            is_distributed_loading_by_transformers=fsdp,
        )

    weights = [torch.nn.Parameter(torch.ones(2))]
    fused = torch.optim.AdamW(weights, fused=True)
    assert not guard.judges_late(trainer(fused)), 'on a CPU reading is free'
    monkeypatch.setattr(device, 'kind', lambda: 'cuda')
    assert guard.judges_late(trainer(fused))
    assert not guard.judges_late(trainer(torch.optim.AdamW(weights)))
    assert not guard.judges_late(trainer(torch.optim.SGD(weights)))
    assert not guard.judges_late(trainer(fused, scaler=object()))
    assert not guard.judges_late(trainer(fused, deepspeed=True))
    assert not guard.judges_late(trainer(fused, fsdp=True))


def test_batches_are_sent_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        'a': torch.arange(7), 'b': torch.arange(3, dtype=torch.int32), 'c': torch.ones(2, 5, dtype=torch.bfloat16),
        'd': torch.zeros(0, dtype=torch.long), 'e': torch.tensor([[True, False]]),
    }  # fmt: skip
    assert device.send(tensors, torch.device('cpu')) == tensors
    sent: list[tuple[Any, bool]] = []

    def to(self: torch.Tensor, target: Any, non_blocking: bool = False) -> torch.Tensor:
        sent.append((target, non_blocking))
        return self.clone()

    target = torch.device('cuda:0')
    monkeypatch.setattr(torch.Tensor, 'to', to)
    found = device.send(tensors, target)
    assert sent == [(target, False)], 'memory is pinned where a device is'
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape and torch.equal(found[name], x)


def test_the_plan_of_a_batch_is_what_its_labels_say() -> None:
    from utils.data.collator import Collator

    rows = [
        {'input_ids': [1, 2, 3, 4], 'trained': (2, 4), 'prompt_length': 2},
        {'input_ids': [5, 6], 'trained': (0, 2), 'prompt_length': 0},
        {'input_ids': [7, 8, 9], 'trained': (2, 3), 'prompt_length': 2, 'earlier': [(0, 1)]},
    ]
    laid, padded = (Collator(0, pads=pads)(rows) for pads in (False, True))
    for batch in (laid, padded):
        assert batch['targets'].tolist() == [3, 4, 6, 9] and batch['owners'].tolist() == [0, 0, 1, 2]
    assert laid['positions'].tolist() == [1, 2, 4, 7] and padded['positions'].tolist() == [1, 2, 4, 9]
    assert laid['cu_seqlens'].tolist() == [0, 4, 6, 9] and laid['cu_seqlens'].dtype == torch.int32
    assert 'cu_seqlens' not in padded and json.dumps(next(iter(laid))) == '"row_lengths"'


def test_the_wait_for_the_device_is_time_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a step ends when it is queued. Its log line comes after the wait, and starts the next step."""
    clock = iter([1.0, 1.5, 2.0, 6.0, 6.5])
    monkeypatch.setattr(callbacks.time, 'perf_counter', lambda: next(clock))
    speed = callbacks.Speedometer()
    speed.on_step_end()  # the first step is not counted
    speed.add_wait()
    speed.count({'row_lengths': torch.tensor([30, 70])})
    speed.on_step_end()
    speed.add_wait()
    speed.on_log()
    assert (speed.tokens, speed.seconds) == (100, 0.5 + 4.0)

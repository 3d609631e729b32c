"""NaN, infinity and zero gradients stop a run, and the message names their source."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.checkpoint import all_checkpoints
from utils.base.errors import ConfigError
from utils.cli.ranges import SCHEDULERS
from utils.cli.schedule import count_warmup_steps
from utils.train.trainer_args import make_schedule

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
SAVED_EACH_STEP = ('--save_steps', '1', '--save_total_limit', '-1')


@pytest.fixture(scope='module')
def poisoned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose logits are NaN from the first 'Q' of a row on; only one row has a 'Q'."""
    tokenizer, model = make_tokenizer(), make_model()
    (token,) = set(tokenizer('Q', add_special_tokens=False)['input_ids'])
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    folder = tmp_path_factory.mktemp('models') / 'poisoned'
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_with(poisoned: int | None, count: int = 24) -> list[dict[str, str]]:
    return [
        {'query': 'Q?' if i == poisoned else f'what is {i}?', 'response': f'the answer is {i}.'} for i in range(count)
    ]


def test_a_row_whose_loss_is_nan_stops_the_run_and_is_named(
    poisoned_model: Path, run_sft: Run, tmp_path: Path, problems: Problems
) -> None:
    data = write_jsonl(tmp_path / 'rows.jsonl', rows_with(20))
    flags = ('--model_id_or_path', str(poisoned_model), '--dataset', str(data), '--dataset_test_ratio', '0')
    run = run_sft(*flags, *SAVED_EACH_STEP, expect=2)
    (message,) = problems()
    step = re.match(r'step (\d+): the loss is not a finite number for ', message)
    assert step is not None and int(step[1]) > 1, message
    assert message[step.end() :].startswith(f'{data}:21. Check these rows.'), 'one row of the four of a step'
    last = all_checkpoints(run)[-1]
    assert last.name == f'checkpoint-{int(step[1]) - 1}'
    assert message.endswith(f'Nothing of this step is saved; the last good checkpoint of this run: {last}.')
    assert all(t.isfinite().all() for t in load_file(last / 'adapter_model.safetensors').values())
    assert not (run / 'run.json').exists()


@pytest.mark.slow
def test_the_first_step_gate_finds_a_long_row_whose_loss_is_nan(
    poisoned_model: Path, run_sft: Run, tmp_path: Path, problems: Problems
) -> None:
    rows = rows_with(20)
    rows[20]['response'] += ' yes' * 20
    data = write_jsonl(tmp_path / 'rows.jsonl', rows)
    flags = ('--model_id_or_path', str(poisoned_model), '--dataset', str(data))
    for ratio, part in (('0', 'loss'), ('0.9', 'validation loss')):
        run = run_sft(*flags, '--dataset_test_ratio', ratio, expect=2)
        assert problems()[-1].startswith(f'the first-step gate: the {part} is not a finite number for {data}:21. ')
        assert not all_checkpoints(run) and not (run / '.preflight').exists()
    assert len(problems()) == 2


@pytest.mark.slow
def test_a_validation_row_whose_loss_is_nan_stops_the_run(
    poisoned_model: Path, run_sft: Run, tmp_path: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = rows_with(None), rows_with(2, count=4)
    monkeypatch.setitem(__import__('utils.dataset').dataset.DATASET_MAPPING, 'two-parts', lambda: (train, val))
    flags = ('--model_id_or_path', str(poisoned_model), '--dataset', 'two-parts', '--max_steps', '3')
    run = run_sft(*flags, '--save_steps', '1', '--save_total_limit', '-1', expect=2)
    assert problems()[0].startswith(
        'step 3: the validation loss is not a finite number for two-parts (validation): row 3. Check these rows.'
    )
    assert [p.name for p in all_checkpoints(run)] == ['checkpoint-1', 'checkpoint-2']


@pytest.fixture
def gradients_times(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], None]:
    """Return a function that multiplies every gradient from one step on."""
    from utils.train.trainer import SftTrainer

    def plan(factor: float, step: int) -> None:
        compute_loss = SftTrainer.compute_loss

        def hooked(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(self, model, inputs, *args, **kwargs)
            if self.state.global_step + 1 >= step and not self.in_preflight and model.training:
                loss.register_hook(lambda gradient: gradient * factor)
            return loss

        monkeypatch.setattr(SftTrainer, 'compute_loss', hooked)

    return plan


def test_gradients_that_are_infinite_stop_the_run(
    run_sft: Run, gradients_times: Callable[[float, int], None], problems: Problems, data_file: Path
) -> None:
    gradients_times(math.inf, 3)
    run = run_sft(*SAVED_EACH_STEP, expect=2)
    (message,) = problems()
    assert re.match(r'step 3: the loss is finite, but its gradients are not \(norm (inf|nan)\)\. ', message)
    assert message.count(f'{data_file}:') == 4, 'all rows of the step'
    assert [p.name for p in all_checkpoints(run)] == ['checkpoint-1', 'checkpoint-2']


@pytest.mark.slow
@pytest.mark.parametrize('step', [1, 4])
def test_gradients_that_are_zero_stop_the_run(
    step: int, run_sft: Run, gradients_times: Callable[[float, int], None], problems: Problems
) -> None:
    gradients_times(0.0, step)
    run = run_sft(*SAVED_EACH_STEP, expect=2)
    (message,) = problems()
    assert re.match(
        rf'step {step}: the loss is \d\.\d+, but every gradient is exactly zero. None of the 8,192 trainable', message
    )
    assert len(all_checkpoints(run)) == step - 1


@pytest.mark.slow
def test_a_jump_of_the_loss_is_reported_with_its_row(
    run_sft: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{'query': 'ping', 'response': 'yes yes yes yes'}] * 40
    rows[7] = {'query': 'ping', 'response': 'zq xj kv wz qy'}
    data = write_jsonl(tmp_path / 'rows.jsonl', rows)
    run = run_sft(
        '--dataset', str(data), '--dataset_test_ratio', '0', '--batch_size', '1', '--gradient_accumulation_steps', '1',
        '--max_steps', '-1', '--seed', '4', '--save_steps', '100', '--sft_type', 'full',
        '--lr_scheduler_type', 'constant',
    )  # fmt: skip
    (spike,) = json.loads((run / 'run.json').read_text())['loss_spikes']
    assert spike['rows'] == [f'{data}:8'] and spike['step'] > 20 and spike['loss'] > 2 * spike['usual']
    assert (
        f'step {spike["step"]}: the loss jumped to ' in caplog.text
        and f'Check the rows with the highest loss: {data}:8' in caplog.text
    )


def test_steps_skipped_in_fp16_are_counted_until_it_is_not_the_scale(tmp_path: Path) -> None:
    from utils.train.guard import Guard

    trainer = SimpleNamespace(
        args=SimpleNamespace(fp16=True, output_dir=str(tmp_path)),
        signals=SimpleNamespace(signum=0),
        deadline=SimpleNamespace(proposal=lambda: 0),
        stop_agreed=False,
    )
    guard = Guard(trainer)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**16)
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.0)

    def step(number: int, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        guard.begin([])
        guard.losses, guard.norm = [loss.detach()], weight.grad.norm()
        guard.judge(f'step {number}')
        scaler.step(optimizer)
        scaler.update()

    handle = weight.register_hook(lambda gradient: gradient * math.inf)
    for number in range(19):
        step(number, weight.sum())
    assert guard.skipped == 19 and scaler.get_scale() == 2.0**-3
    handle.remove()
    step(19, weight.sum())
    assert guard.skipped == 19, 'a good step ends the row'
    for number in range(20, 39):
        guard.norm = math.inf
        guard.judge(f'step {number}')
    with pytest.raises(ConfigError, match='step 39: gradients overflow in fp16 at every loss scale, 20 steps in a'):
        guard.judge('step 39')
    guard.losses = [torch.tensor(math.nan)]
    with pytest.raises(ConfigError, match='step 40: the loss is not a finite number'):
        guard.judge('step 40')


@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, 5, 12, 16])
def test_one_epoch_of_few_rows_trains(rows: int, run_sft: Run, tmp_path: Path) -> None:
    """With default flags these rows are one optimizer step, which a warm-up from 0 would waste."""
    data = write_jsonl(tmp_path / 'few.jsonl', rows_with(None, rows))
    run = run_sft(
        '--dataset', str(data), '--dataset_test_ratio', '0', '--max_steps', '-1', '--batch_size', '1',
        '--gradient_accumulation_steps', '16',
    )  # fmt: skip
    assert json.loads((run / 'run.json').read_text())['steps'] == 1
    weights = load_file(run / 'checkpoint-1' / 'adapter_model.safetensors')
    changed = [name for name, tensor in weights.items() if 'lora_B' in name and bool(tensor.any())]
    assert len(changed) == len([name for name in weights if 'lora_B' in name]) > 0
    rates = [entry['learning_rate'] for entry in json.loads((run / 'history.json').read_text()) if 'loss' in entry]
    assert rates == [0.01]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['lora', 'full'])
def test_weights_that_stay_as_they_were_are_no_success(
    kind: str, run_sft: Run, problems: Problems, caplog: pytest.LogCaptureFixture
) -> None:
    """Learning rates so small that rounding removes the change of a weight."""
    rate = '1e-60' if kind == 'lora' else '1e-30'
    run = run_sft('--sft_type', kind, '--learning_rate', rate, '--only_save_model', 'false', expect=2)
    assert problems()[0].startswith(f'--learning_rate {float(rate)}: the weights after 6 steps are bitwise identical')
    assert 'best checkpoint' not in caplog.text and not (run / 'run.json').exists()


@pytest.mark.slow
def test_a_resumed_run_may_end_on_steps_that_change_no_bit(run_sft: Run) -> None:
    run = run_sft('--max_steps', '6')
    resumed = ('--learning_rate', '1e-60', '--resume_from_checkpoint', str(run / 'checkpoint-3'))
    assert (run_sft(*resumed) / 'run.json').is_file()


@pytest.mark.parametrize('name', SCHEDULERS)
@pytest.mark.parametrize('share', [0.0, 0.05, 0.3, 0.99])
@pytest.mark.parametrize('steps', [1, 2, 3, 7, 40])
def test_every_step_of_every_schedule_has_a_rate(steps: int, share: float, name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = make_schedule(optimizer, name, learning_rate=0.1, warmup=share, steps=steps, decay_ratio=0.3)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    warmup = 0 if name == 'constant' else count_warmup_steps(share, steps)
    assert warmup <= steps / 2 and min(rates) > 0
    assert rates[: warmup + 1] == pytest.approx([0.1 * (k + 1) / (warmup + 1) for k in range(warmup + 1)])
    assert all(later <= earlier for earlier, later in pairwise(rates[warmup:]))

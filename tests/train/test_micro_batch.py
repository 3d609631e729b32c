"""What the trainer does for each micro-batch besides computing it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from utils.infer.generation import generate_batch
from utils.train import trainer
from utils.train.trainer import SftTrainer, clear_only_trained

Run = Callable[..., Path]


def test_modules_are_visited_only_when_something_changed(run_sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation after step 3 switches dropout off, so step 4 switches it on again."""
    step = SftTrainer.training_step
    train = torch.nn.Module.train
    count = PreTrainedModel.num_parameters
    steps: list[int] = []
    visits: list[int] = []
    counts: list[int] = []
    tokens: list[int] = []
    is_step = False

    def training_step(self: SftTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal is_step
        is_step = not self.in_preflight
        steps.append(self.state.global_step)
        if is_step and inputs:
            tokens.append(inputs['input_ids'].numel())
        loss = step(self, model, inputs, *args, **kwargs)
        is_step = False
        assert all(module.training for module in model.modules())
        return loss

    def trained(self: torch.nn.Module, mode: bool = True) -> Any:
        if is_step:
            visits.append(steps[-1])
        return train(self, mode)

    def counted(self: Any, *args: Any, **kwargs: Any) -> int:
        found: int = count(self, *args, **kwargs)
        if kwargs.get('exclude_embeddings'):
            counts.append(found)
        return found

    monkeypatch.setattr(SftTrainer, 'training_step', training_step)
    monkeypatch.setattr(torch.nn.Module, 'train', trained)
    monkeypatch.setattr(PreTrainedModel, 'num_parameters', counted)
    run = run_sft('--drift', 'false', '--compare_rows', '0', '--lora_dropout_p', '0.1')
    assert max(steps) == 5 and set(visits) <= {0, 3} and 3 in visits
    state = json.loads((run / 'checkpoint-6' / 'trainer_state.json').read_text())
    assert len(counts) == 1 and state['total_flos'] == 6 * sum(tokens) * counts[0]


def test_only_gradients_of_trained_parameters_are_cleared() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    clear_only_trained(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.zero_grad()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]


def test_answers_of_an_evaluation_are_computed_in_the_dtype_of_the_training(
    run_sft: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full weights are in fp32, and would need twice the bytes for each token."""
    seen: list[tuple[bool, torch.dtype]] = []

    def noted(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu')))
        return generate_batch(model, *args, **kwargs)

    monkeypatch.setattr(trainer, 'generate_batch', noted)
    flags = ('--sft_type', 'full', '--dtype', 'bf16', '--predict_with_generate', 'true', '--max_new_tokens', '2')
    run_sft(*flags, '--max_steps', '1', '--only_save_model', 'true')
    assert seen and set(seen) == {(True, torch.bfloat16)}

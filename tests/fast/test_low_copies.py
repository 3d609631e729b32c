"""Adapters in bf16 are copied once per optimizer step, and a copy is never out of date."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.exactness import prepared
from tests.support.tiny_models import make_model
from utils.fast.low_copies import LowCopies

KEY = 'llama3.2-1b-instruct'
IDS = torch.tensor([[7, 8, 9, 10, 11]])


class Copies(TorchDispatchMode):
    """Counts the weights that are copied to another dtype, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.together: list[int] = []
        self.alone = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.together.append(len(args[0]))
        is_weight = func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter)
        self.alone += is_weight and args[0].dtype == torch.float32
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model() -> Any:
    return prepared(make_model().to(torch.bfloat16), KEY, 'lora')[0]


def adapters(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if 'lora_' in name]


def fresh_logits(model: Any) -> torch.Tensor:
    """Return the logits of a model with the same weights and no copies."""
    twin = prepared(make_model().to(torch.bfloat16), KEY, 'lora')[0]
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return twin(IDS).logits


def test_all_adapters_are_copied_together_once_per_step(model: Any) -> None:
    weights = adapters(model)
    assert len(weights) == 28 and {p.dtype for p in weights} == {torch.float32}
    model(IDS)  # makes the copies, layer by layer
    optimizer = torch.optim.SGD(weights, lr=0.5)
    for _ in range(2):
        with Copies() as copies:
            for _ in range(3):
                model(IDS).logits.float().square().mean().backward()
        assert copies.together in ([], [28]) and copies.alone == 0
        optimizer.step()
        optimizer.zero_grad()
    assert copies.together == [28]
    assert torch.equal(model(IDS).logits, fresh_logits(model))


class SilentSGD(torch.optim.Optimizer):
    """Changes weights without torch noticing, as a kernel does that gets their addresses."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        super().__init__(weights, {})

    def step(self, closure: Any = None) -> None:
        for weight in self.param_groups[0]['params']:
            before = weight._version
            weight.data.mul_(1.5)
            assert weight._version == before


def test_every_change_of_a_weight_reaches_its_copy(model: Any) -> None:
    weights = adapters(model)
    seen = [model(IDS).logits]

    def look() -> None:
        with torch.no_grad():
            logits = model(IDS).logits
        assert torch.equal(logits, fresh_logits(model))
        assert not any(torch.equal(logits, before) for before in seen)
        seen.append(logits)

    SilentSGD(weights).step()
    look()
    with torch.no_grad():
        weights[0].add_(0.3)
    look()
    state = {name: x * 1.1 if 'lora_B' in name else x for name, x in model.state_dict().items()}
    model.load_state_dict(state)
    look()
    with torch.no_grad():
        weights[3].detach().copy_(torch.full_like(weights[3], 0.2))  # as the first-step gate puts weights back
    look()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        adapters(twin)[1].add_(0.5)
    assert not torch.equal(twin(IDS).logits, seen[-1]) and torch.equal(model(IDS).logits, seen[-1])


def test_weights_of_the_dtype_are_not_copied() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    copies = LowCopies()
    same = copies.of(weight, torch.float32)
    assert same.data_ptr() == weight.data_ptr() and not same.requires_grad
    low = copies.of(weight, torch.bfloat16)
    assert low.dtype == torch.bfloat16 and not low.requires_grad and copies.of(weight, torch.bfloat16) is low
    assert copies.of(weight, torch.float16).dtype == torch.float16

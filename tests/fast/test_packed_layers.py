"""LoRA on packed GPTQ layers in one step, on the layers of gptqmodel and on stand-ins that need no package."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

from tests.support.old_models import quantised
from utils.fast.frozen import find_weight, fuse_packed
from utils.fast.lora import fuse_lora

INPUTS, GROUP = 64, 16
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class StandIn(nn.Module):
    """A layer that holds and computes what gptqmodel's TorchLinear does, with one integer per weight and act-order."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = INPUTS, outputs
        self.infeatures, self.outfeatures = INPUTS, outputs  # PEFT looks for these before it imports gptqmodel
        self.register_buffer('integers', torch.randint(-8, 8, (INPUTS, outputs)))
        self.register_buffer('scales', (torch.rand(INPUTS // GROUP, outputs) * 0.02).half())
        self.register_buffer('g_idx', (torch.arange(INPUTS) // GROUP)[torch.randperm(INPUTS)])
        self.register_buffer('bias', torch.randn(outputs).half())
        self.unpacked = 0

    @property
    def weight(self) -> torch.Tensor:
        """Return a tensor from which PEFT reads device and dtype."""
        return self.scales

    def dequantize_weight(self, num_itr: int = 1) -> torch.Tensor:
        """Return the weight, (inputs, outputs)."""
        assert num_itr == 1
        self.unpacked += 1
        weight: torch.Tensor = self.scales[self.g_idx] * self.integers
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W + b."""
        return torch.matmul(x, self.dequantize_weight().to(x.dtype)).add_(self.bias.to(x.dtype))


class Repacked(StandIn):
    """A layer of another class of gptqmodel."""


StandIn.__module__ = 'gptqmodel.nn_modules.qlinear.torch'
StandIn.__name__ = StandIn.__qualname__ = 'TorchLinear'
Repacked.__module__ = 'gptqmodel.nn_modules.qlinear.torch_aten_kernel'


def real_layer(outputs: int, bits: int) -> nn.Module:
    """Return a layer of gptqmodel with act-order and random weights."""
    pytest.importorskip('gptqmodel')
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer: nn.Module = TorchLinear(
        bits=bits, group_size=GROUP, sym=False, desc_act=True, in_features=INPUTS, out_features=outputs, bias=True
    )
    tensors, weight = quantised(outputs, INPUTS, bits=bits, group=GROUP, symmetric=False, act_order=True, offset=0)
    layer.load_state_dict({**tensors, 'bias': torch.randn(outputs).half()})
    weight_of = find_weight(layer)
    assert weight_of is not None
    found = weight_of(layer, torch.float32)
    assert (found - weight).abs().max() <= 2**-11 * weight.abs().max(), 'the products are rounded to fp16'
    return layer


def make_layer(kind: str, outputs: int) -> nn.Module:
    """Return a frozen layer without adapter."""
    if kind == 'stand-in':
        return StandIn(outputs)
    return real_layer(outputs, int(kind.split()[0]))


def adapted(layer: nn.Module) -> Any:
    """Return PEFT's LoRA layer on a layer, with random fp32 factors."""
    found = GPTQLoraLinear(layer, 'default', config=LoraConfig(lora_dropout=0.0), r=4, lora_alpha=8)
    for factor in (found.lora_A, found.lora_B):
        factor.float()
        nn.init.normal_(factor['default'].weight, std=0.05)
    return found


def largest_saved(model: nn.Sequential, x: torch.Tensor) -> tuple[list[torch.Tensor], int, int]:
    """Apply each layer of a model to x. Returns outputs and gradients, and two numbers of saved bytes.

    The first number is of tensors as large as x, each counted once. The second number is of tensors as large as a
    weight.
    """
    weight_sizes = {INPUTS * layer.out_features for layer in model}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    wanted = [p for p in (x, *model.parameters()) if p.requires_grad]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outs = [layer(x) for layer in model]
        sizes = [(t.numel(), t.numel() * t.element_size()) for t in saved.values()]
        grads = torch.autograd.grad(sum(out.float().square().sum() for out in outs), wanted)
    of_inputs = sum(size for count, size in sizes if count == x.numel())
    of_weights = sum(size for count, size in sizes if count in weight_sizes)
    return [*outs, *grads], of_inputs, of_weights


KINDS = [
    'stand-in', pytest.param('4 bits', marks=pytest.mark.optional), pytest.param('8 bits', marks=pytest.mark.optional)
]  # fmt: skip


@pytest.mark.parametrize('dtype', BOUND)
@pytest.mark.parametrize('kind', KINDS)
def test_adapters_on_packed_layers_in_one_step_compute_like_peft(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(adapted(make_layer(kind, outputs)) for outputs in (96, 32)))
    x = torch.randn(3, 7, INPUTS, dtype=dtype, requires_grad=True)
    expected, _, of_peft = largest_saved(model, x)
    assert len(expected) == 2 + 1 + 4
    assert of_peft == INPUTS * (96 + 32) * x.element_size(), 'the layers of gptqmodel save their weights'

    assert fuse_lora(model) == (2, 2)
    assert {type(layer).__name__ for layer in model} == {'FusedGPTQLoraLinear'}
    found, of_inputs, of_weights = largest_saved(model, x)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= BOUND[dtype] * theirs.norm()
    assert of_inputs == x.numel() * x.element_size(), 'both layers save the same x'
    assert of_weights == 0


@pytest.mark.parametrize('dtype', BOUND)
@pytest.mark.parametrize('kind', KINDS)
def test_packed_layers_without_adapter_save_nothing(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make_layer(kind, 96), make_layer(kind, 32), nn.Linear(INPUTS, 8, dtype=dtype))
    x = torch.randn(3, 7, INPUTS, dtype=dtype, requires_grad=True)
    expected, _, of_gptqmodel = largest_saved(model[:2], x)
    assert of_gptqmodel == INPUTS * (96 + 32) * x.element_size()

    assert fuse_packed(model) == 2 and fuse_packed(model) == 0
    assert [type(layer).__name__ for layer in model] == ['FusedTorchLinear', 'FusedTorchLinear', 'Linear']
    found, *saved = largest_saved(model[:2], x)
    assert len(found) == 3 and saved == [0, 0]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= 1e-6 * theirs.norm()
    with torch.no_grad():
        assert torch.equal(model[0](x), expected[0])


def test_weights_are_unpacked_only_for_the_gradient_of_the_input() -> None:
    torch.manual_seed(0)
    layer = StandIn(32)
    model = nn.Sequential(adapted(layer))
    assert fuse_lora(model) == (1, 1)
    x = torch.randn(5, INPUTS)
    model(x).sum().backward()
    assert layer.unpacked == 1, 'the forward pass unpacks them'
    model(x.requires_grad_()).sum().backward()
    assert layer.unpacked == 3
    assert x.grad is not None and math.isfinite(float(x.grad.sum()))


def test_other_packed_layers_and_disabled_adapters_are_left_to_peft() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(adapted(StandIn(32)), adapted(Repacked(32)))
    assert fuse_lora(model) == (1, 2)
    assert [type(layer).__name__ for layer in model] == ['FusedGPTQLoraLinear', 'GPTQLoraLinear']
    x = torch.randn(5, INPUTS)
    with_adapter = model[0](x)
    model[0].enable_adapters(False)
    assert torch.equal(model[0](x), model[0].base_layer(x)) and not torch.equal(model[0](x), with_adapter)

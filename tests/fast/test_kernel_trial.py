"""Triton kernels are used only where they compute like the steps that they replace."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.runs import ROOT
from tests.support.tiny_models import make_model
from utils.fast import gated_mlp, kernel_trial, norm
from utils.fast.gated_mlp import fuse_gates
from utils.fast.kernel_trial import _difference, _passes, gate_kernel, loss_difference, loss_kernel, norm_kernel
from utils.fast.norm import _NormStep, fuse_norms

CPU = torch.device('cpu')
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec('triton') is None, reason='triton comes with builds of torch for GPUs'
)
SILU = 'transformers.activations.SiLUActivation'


def test_no_kernel_is_tried_without_a_gpu() -> None:
    assert norm_kernel('round_first', torch.float32, torch.float32, 32, CPU, _NormStep.apply) is None
    assert gate_kernel(SILU, torch.float32, CPU) is None
    assert loss_kernel(torch.float32, 100, 1.0, None, CPU) is None
    assert 'utils.fast.triton_kernels' not in sys.modules


def test_other_activations_and_dtypes_have_no_kernel() -> None:
    """The device is only compared by its type, so no GPU is needed."""
    gpu = torch.device('cuda', 0)
    assert gate_kernel('torch.nn.modules.activation.GELU', torch.bfloat16, gpu) is None
    assert gate_kernel(SILU, torch.float64, gpu) is None
    assert norm_kernel('round_first', torch.float64, torch.float64, 32, gpu, _NormStep.apply) is None
    assert loss_kernel(torch.float64, 100, 1.0, None, gpu) is None


class Double(torch.autograd.Function):
    """Returns 2 x, with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * 2.05


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_trial_compares_output_dtype_and_gradients(dtype: torch.dtype) -> None:
    x = [torch.linspace(-3, 5, 40).to(dtype)]
    eps = torch.finfo(dtype).eps

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert _difference(lambda x: x + x, plain, x) is None
    assert _difference(lambda x: x * 2 * (1 + eps), plain, x) is None, 'one unit of the last place'
    assert 'its output is off by' in str(_difference(lambda x: x * 2 * (1 + 30 * eps), plain, x))
    assert _difference(lambda x: (x * 2).double(), plain, x) == f'its output is torch.float64 instead of {dtype}'
    assert _difference(Double.apply, plain, x) == 'a gradient is off by 0.025' or dtype == torch.bfloat16
    assert 'a gradient is off by' in str(_difference(Double.apply, plain, x))
    assert 'off by nan' in str(_difference(lambda x: x * torch.nan, plain, x))


def test_a_trial_in_a_checkpointed_layer_does_not_compute_the_layer_again() -> None:
    """A layer meets a kernel for the first time in its forward pass, which checkpointing repeats later."""
    calls = 0
    found = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        assert calls < 3
        if not found:
            found.append(_difference(F.silu, F.silu, [torch.ones(3)]))
        return F.silu(x)

    x = torch.ones(3, requires_grad=True)
    out = checkpoint(layer, x, use_reentrant=False)
    assert calls == 1 and found == [None]
    out.sum().backward()
    assert calls == 2 and x.grad is not None


def test_a_kernel_that_cannot_be_built_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Any:
        raise ImportError("No module named 'triton'")

    with caplog.at_level('INFO'):
        assert not _passes('gate', load, F.silu, [torch.ones(3)])
        assert _passes('gate', lambda: F.silu, F.silu, [torch.ones(3)])
    assert (
        "the Triton kernel for gate is not used: ImportError: No module named 'triton'. Plain torch is used instead."
        in caplog.text
    )
    assert 'gate kernel = triton because it passed its trial on this device' in caplog.text


def test_layers_use_the_kernels_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().eval()
    ids = torch.tensor([[7, 8, 9, 10]])
    expected = model(ids).logits
    assert (fuse_norms(model), fuse_gates(model)) == (5, 2)
    calls: list[str] = []

    def norm_step(*args: Any) -> Any:
        calls.append('norm')
        return _NormStep.apply(*args)

    def gate_step(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        calls.append('gate')
        return F.silu(gate) * up

    asked: list[Any] = []
    monkeypatch.setattr(norm, 'norm_kernel', lambda *args: asked.append(args) or norm_step)
    monkeypatch.setattr(gated_mlp, 'gate_kernel', lambda *args: asked.append(args) or gate_step)
    assert torch.equal(model(ids).logits, expected)
    assert (calls.count('norm'), calls.count('gate')) == (5, 2)
    assert ('round_first', torch.float32, torch.float32, 32, CPU, _NormStep.apply) in asked
    assert (SILU, torch.float32, CPU) in asked and SILU in kernel_trial._SILU


@pytest.mark.parametrize(('scale', 'cap'), [(1.0, None), (0.25, 3.0)])
def test_the_trial_of_the_loss_compares_losses_and_gradients(scale: float, cap: float | None) -> None:
    def ours(logits: torch.Tensor, targets: torch.Tensor, factor: float, *, more: float = 0, wrong: float = 1) -> Any:
        exact = scale * logits.clone().requires_grad_()
        exact = exact if cap is None else cap * torch.tanh(exact / cap)
        losses = F.cross_entropy(exact, targets, reduction='none')
        (grad,) = torch.autograd.grad(losses.sum(), exact)
        slope = 1 if cap is None else 1 - (exact.detach() / cap).square()
        logits.copy_(grad * slope * scale * factor * wrong)
        return losses.detach() + more

    def difference(kernel: Any) -> str | None:
        return loss_difference(kernel, torch.float32, 50, scale, cap, CPU)

    assert difference(ours) is None
    assert 'its output is off by' in str(difference(partial(ours, more=1e-4)))
    assert difference(partial(ours, wrong=1.01)) == 'a gradient is off by 0.01'
    assert 'off by nan' in str(difference(partial(ours, more=torch.nan)))


@pytest.mark.slow
@pytest.mark.optional
@needs_triton
def test_interpreted_kernels_compute_like_the_steps() -> None:
    words = [sys.executable, '-m', 'tests.support.interpreted_kernels']
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'TRITON_INTERPRET': '1'}, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(('norm ', 'gate ', 'rotary ', 'loss '))]
    assert done.returncode == 0 and len(lines) == 75, done.stderr
    assert [line for line in lines if not line.endswith(': None')] == []


@pytest.mark.slow
@pytest.mark.optional
@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    words = [sys.executable, '-m', 'tests.support.compiled_kernels']
    environment = {**os.environ, 'TRITON_CACHE_DIR': str(tmp_path)}
    environment.pop('TRITON_INTERPRET', None)
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 26, done.stderr

"""The parts of the fast path: attention by rows, the head in chunks, fused adapters, packs and row order."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from tests.support.exactness import bare_run, make_rows, open_tiny, plain_gradients, prepared
from tests.support.runs import ROOT, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.data.collator import Collator, refill
from utils.data.encode_plan import EncodedRows, PreparedData
from utils.data.packing import StepSampler, best_fit, pack_evenly
from utils.encode.encoded import Encoded
from utils.fast import attention, chunked_loss, constants
from utils.fast.attention import RowAttention, attend_in_groups
from utils.fast.chunked_loss import Head
from utils.fast.gated_mlp import _FusedGate, fuse_gates
from utils.fast.layout import exact_head, use_padding_free
from utils.fast.norm import _FusedNorm, fuse_norms
from utils.fast.rows import RowMask
from utils.fast.scoring import Scorer
from utils.infer.generation import generate_batch, generation_config
from utils.train.trainer import SftTrainer

Run = Callable[..., Path]
LENGTHS = (5, 1, 11, 8)
SHARPER = 8


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, cap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Return attention (T, H, D) of rows of LENGTHS, each row alone with its full matrix of scores."""
    outs = []
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    for q_row, k_row, v_row in zip(*(x.split(LENGTHS, dim=1) for x in (q, k, v)), strict=True):
        scores = q_row @ k_row.mT * 0.3
        if cap is not None:
            scores = (scores / cap).tanh() * cap
        place = torch.arange(scores.shape[-1])
        hidden = place > place[:, None]
        if window is not None:
            hidden |= place <= place[:, None] - window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, len(place), 1)], dim=-1)
        outs.append(scores.softmax(-1)[..., : len(place)] @ v_row)
    return torch.cat(outs, dim=1).transpose(0, 1)


@pytest.mark.on_device
@pytest.mark.parametrize(('padding', 'most_scores'), [(1, 2**22), (2, 2**22), (32, 2**22), (2, 40)])
@pytest.mark.parametrize('window', [None, 3, 7])
@pytest.mark.parametrize('cap', [None, 2.0])
@pytest.mark.parametrize('sinks', [False, True])
def test_attention_by_rows_is_attention(
    padding: int, most_scores: int, window: int | None, cap: float | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('utils.fast.rows.QUERY_BLOCK', 4)  # rows of several blocks; the weights of some blocks are kept
    monkeypatch.setattr(attention, 'KEPT_KEYS', 6)
    monkeypatch.setattr(constants, 'PADDED', padding)
    monkeypatch.setattr('utils.fast.rows.GROUP_SCORES', most_scores)
    torch.manual_seed(0)
    shapes = [(6, 25, 8), (2, 25, 8), (2, 25, 5), *([(6,)] if sinks else [])]
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    sink = inputs[3] if sinks else None
    rows = RowMask(LENGTHS, window)
    expected = by_definition(*inputs[:3], window, cap, sink)
    ways = [RowAttention.apply(*inputs[:3], sink, rows, 0.3, cap)]
    if cap is None and sink is None:
        ways.append(attend_in_groups(*inputs[:3], rows, scaling=0.3, dropout=0.0))
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, direction)
    for found in ways:
        assert (found - expected).abs().max() < 1e-12
        for ours, theirs in zip(torch.autograd.grad(found, inputs, direction), gradients, strict=True):
            assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize('most_keys', [0, 512])
@pytest.mark.parametrize('mean', [-4.0, 0.0])
def test_the_gradient_of_a_weak_sink_is_exact_in_bf16(
    mean: float, most_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, 'KEPT_KEYS', most_keys)  # 0: the weights are computed again in the backward pass
    torch.manual_seed(0)
    shapes = [(4, 25, 16), (2, 25, 16), (2, 25, 16), (4,)]
    given = [torch.randn(shape).bfloat16() for shape in shapes]
    given[3] += mean
    direction = torch.randn(25, 4, 16).bfloat16()
    exact = [x.double().requires_grad_() for x in given]
    expected = torch.autograd.grad(by_definition(*exact[:3], None, None, exact[3]), exact[3], direction.double())[0]
    inputs = [x.requires_grad_() for x in given]
    found = RowAttention.apply(*inputs, RowMask(LENGTHS, None), 0.3, None)
    gradient = torch.autograd.grad(found, inputs[3], direction)[0].double()
    assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_blocks_of_equal_padded_shape_are_computed_together() -> None:
    rows = RowMask((150, 20, 140, 30, 300), None)
    starts = [0, 150, 170, 310, 340]
    groups = rows.block_groups(heads=2)
    found = [(group.earlier, group.queries, group.keys, [block.start for block in group.blocks]) for group in groups]
    assert found == [
        (0, 32, 32, [starts[1], starts[3]]),
        (0, 128, 128, [starts[0], starts[2], starts[4]]),
        (128, 32, 160, [starts[0] + 128, starts[2] + 128]),
        (128, 128, 256, [starts[4] + 128]),
        (256, 64, 320, [starts[4] + 256]),
    ]
    assert [group.first for group in groups] == [0, 64, 448, 512, 640]
    most = constants.GROUP_SCORES // (128 * 128)
    assert [len(group.blocks) for group in RowMask((128,) * 5, None).block_groups(heads=most // 2)] == [2, 2, 1]
    assert [len(group.blocks) for group in RowMask((128,) * 5, None).block_groups(heads=2 * most)] == [1] * 5


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_a_row_is_bitwise_the_same_beside_any_number_of_other_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    length = 70
    inputs = [torch.randn(heads, length, 16).to(dtype) for heads in (6, 2, 2)]
    direction = torch.randn(length, 6, 16).to(dtype)
    found = []
    for others in ((), (70,), (65, 90, 3, 70, 200, 66)):
        count = sum(others)
        given = [torch.cat([torch.randn(len(x), count, 16).to(dtype), x], dim=1).requires_grad_() for x in inputs]
        out = RowAttention.apply(*given, None, RowMask((*others, length), None), 0.25, None)
        grads = torch.autograd.grad(out[count:], given, direction)
        assert not any(grad[:, :count].any() for grad in grads)
        found.append([out[count:], *(grad[:, count:] for grad in grads)])
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_groups_hold_rows_of_like_length() -> None:
    groups = list(RowMask((5, 40, 9, 30, 4), None).groups())
    assert groups == [[(5, 40), (54, 30)], [(45, 9), (0, 5)], [(84, 4)]]


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.on_device
@pytest.mark.parametrize(('scale', 'cap', 'bias'), [(1.0, None, False), (0.25, 3.0, True)])
def test_head_and_loss_in_chunks(scale: float, cap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 100, bias=bias)
    hidden, targets = torch.randn(50, 8, requires_grad=True), torch.randint(0, 100, (50,))
    logits = linear(hidden) * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction='sum') / 7
    wanted = [hidden, *linear.parameters()]
    gradients = torch.autograd.grad(2 * expected, wanted)
    monkeypatch.setattr(constants, 'CHUNK_BYTES', 6400)  # 16 positions
    monkeypatch.setattr(constants, 'PART_LOGITS', 500)  # 5 of them
    head = Head(linear, scale=scale, cap=cap)
    with Largest() as largest:
        found = chunked_loss.summed_loss(hidden, targets, head, 7)
        ours = torch.autograd.grad(2 * found, wanted)
        losses, hits = chunked_loss.scored(hidden, targets, head)
    assert largest.numel == 1600, 'logits of one chunk are the largest tensor'
    assert float((found - expected).abs()) < 1e-5
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(ours, gradients, strict=True))
    assert float((losses.sum() / 7 - expected).abs()) < 1e-5
    assert torch.equal(hits, logits.argmax(-1) == targets)


@pytest.mark.parametrize(('scale', 'cap', 'bias'), [(1.0, None, False), (0.25, 3.0, True)])
def test_a_kernel_for_the_loss_needs_no_logits_in_fp32(
    scale: float, cap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 100, bias=bias).bfloat16()
    hidden = torch.randn(50, 8).bfloat16().requires_grad_()
    targets = torch.randint(0, 100, (50,))
    head = Head(linear, scale=scale, cap=cap)
    wanted = [hidden, *linear.parameters()]
    expected = chunked_loss.summed_loss(hidden, targets, head, 7)
    gradients = torch.autograd.grad(2 * expected, wanted)
    expected_losses, expected_hits = chunked_loss.scored(hidden, targets, head)
    asked = []

    def kernel(logits: torch.Tensor, targets: torch.Tensor, factor: float) -> torch.Tensor:
        exact = scale * logits.float()
        exact = exact if cap is None else cap * torch.tanh(exact / cap)
        slope = exact.softmax(-1) - torch.nn.functional.one_hot(targets, 100)
        losses = torch.nn.functional.cross_entropy(exact, targets, reduction='none')
        logits.copy_(slope * factor * scale * (1 if cap is None else 1 - (exact / cap).square()))
        return losses

    monkeypatch.setattr(chunked_loss, 'loss_kernel', lambda *args: asked.append(args) or kernel)
    monkeypatch.setattr(chunked_loss, '_exact', None)
    monkeypatch.setattr(constants, 'CHUNK_BYTES', 3200)  # 16 positions
    found = chunked_loss.summed_loss(hidden, targets, head, 7)
    ours = torch.autograd.grad(2 * found, wanted)
    losses, hits = chunked_loss.scored(hidden, targets, head)
    assert asked == [(torch.bfloat16, 100, scale, cap, torch.device('cpu'))] * 2
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert all(((a - b).norm() <= 1e-2 * b.norm()) for a, b in zip(ours, gradients, strict=True))
    assert torch.allclose(losses, expected_losses) and torch.equal(hits, expected_hits)


@pytest.mark.parametrize('loss_scale', [1024.0, 65536.0])
@pytest.mark.parametrize('tokens', [64, 4096])
def test_gradients_in_fp16_are_as_near_as_those_of_torch(tokens: int, loss_scale: float) -> None:
    """The loss scale starts at 65536, which fp16 cannot hold, and must be applied before gradients are rounded."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 1000, bias=False).half()
    plain = torch.randn(tokens, 64, dtype=torch.half, requires_grad=True)
    ours = plain.detach().clone().requires_grad_()
    exact = plain.detach().double().requires_grad_()
    targets = torch.randint(0, 1000, (tokens,))
    logits = {plain: linear(plain).float(), exact: exact @ linear.weight.double().t()}
    for found in logits.values():
        (torch.nn.functional.cross_entropy(found, targets, reduction='sum') / tokens * loss_scale).backward()
    (chunked_loss.summed_loss(ours, targets, Head(linear), tokens) * loss_scale).backward()
    assert ours.grad is not None and plain.grad is not None and exact.grad is not None
    error, of_torch = (float((grad.double() - exact.grad).norm()) for grad in (ours.grad, plain.grad))
    assert error <= 2 * of_torch, (error / float(exact.grad.norm()), of_torch / float(exact.grad.norm()))


def test_a_head_of_another_kind_is_noticed() -> None:
    model = make_model()
    head = chunked_loss.find_head(model)
    ids = torch.tensor([[7, 8, 9, 10]])
    assert head is not None and chunked_loss.head_is_exact(model, head, ids)
    model.lm_head.register_forward_hook(lambda module, args, out: out.tanh())
    assert not chunked_loss.head_is_exact(model, head, ids)


def test_adapters_in_one_step_leave_the_rest_to_peft() -> None:
    x = torch.randint(6, 400, (1, 9))
    words = {
        'tuner_backend': 'peft',
        'fused_norms': False,
        'fused_mlp': False,
        'fused_rotary': False,
        'lora_dropout_p': 0.0,
    }
    plain, _ = prepared(make_model(), 'llama3.2-1b-instruct', 'lora', **words)
    swift, _ = prepared(make_model(), 'llama3.2-1b-instruct', 'lora')
    assert sum(type(m).__name__ == 'FusedLinear' for m in swift.modules()) == 14
    assert (swift(x).logits - plain(x).logits).abs().max() < 1e-6
    with swift.disable_adapter(), plain.disable_adapter():
        assert torch.equal(swift(x).logits, plain(x).logits)
    dropped, _ = prepared(make_model(), 'llama3.2-1b-instruct', 'lora', lora_dropout_p=0.5)
    torch.manual_seed(3)
    first = dropped(x).logits
    assert (first - dropped(x).logits).abs().max() > 1e-6, 'dropout acts'
    expected = swift(x).logits
    assert (swift.merge_and_unload()(x).logits - expected).abs().max() < 1e-5


class MeanRMSNorm(Olmo2RMSNorm):
    """A different class with the same name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


def norm_layers() -> list[torch.nn.Module]:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layers = [LlamaRMSNorm(48), Gemma3RMSNorm(48), Olmo2RMSNorm(48)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, mean=0.7, std=0.2)
    return layers


@pytest.mark.on_device
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_norms_in_one_step_are_those_of_their_classes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for layer, kind in zip(norm_layers(), ('round_first', 'one_plus', 'round_last'), strict=True):
        plain, fused = layer.to(dtype), copy.deepcopy(layer)
        assert fuse_norms(fused) == 1 and fused.norm_kind == kind and isinstance(fused, type(plain))
        x = torch.randn(2, 7, 48, dtype=dtype, requires_grad=True)
        assert torch.equal(plain(x), fused(x))
        direction = torch.randn_like(x)
        wanted = torch.autograd.grad(plain(x), [x, plain.weight], direction)
        found = torch.autograd.grad(fused(x), [x, fused.weight], direction)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * theirs.abs().max()
        low = torch.randn(2, 7, 48, dtype=torch.bfloat16)  # the input that layers with fp32 weights get under autocast
        assert plain(low).dtype == fused(low).dtype and torch.equal(plain(low), fused(low))
        frozen = copy.deepcopy(fused).requires_grad_(False)
        frozen(x).sum().backward()
        assert x.grad is not None and frozen.weight.grad is None


def test_norms_of_another_kind_are_left_alone() -> None:
    model = torch.nn.Sequential(MeanRMSNorm(48), torch.nn.LayerNorm(48), *norm_layers())
    assert fuse_norms(model) == 3
    assert type(model[0]) is MeanRMSNorm
    assert fuse_norms(make_model()) == 5


def test_layers_over_several_devices_run_in_one_step_too() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, ids = make_model().eval(), torch.tensor([[7, 8, 9, 10]])
    expected = model(ids).logits
    for layer in list(model.modules()):
        if type(layer).__name__ in ('LlamaRMSNorm', 'LlamaMLP'):
            add_hook_to_module(layer, AlignDevicesHook('cpu'))
    assert (fuse_norms(model), fuse_gates(model)) == (5, 2)
    called = [vars(layer)['_old_forward'].__func__ for layer in model.modules() if '_old_forward' in vars(layer)]
    assert called.count(_FusedNorm.forward) == 5 and called.count(_FusedGate.forward) == 2
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.on_device
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kind', ['llama.modeling_llama.LlamaMLP', 'gemma3.modeling_gemma3.Gemma3MLP'])
def test_gated_blocks_in_one_step_are_those_of_their_classes(kind: str, dtype: torch.dtype) -> None:
    module, _, name = kind.rpartition('.')
    config_name = f'{"Gemma3Text" if "Gemma3" in name else "Llama"}Config'
    config = getattr(transformers, config_name)(hidden_size=24, intermediate_size=40, num_attention_heads=2)
    plain = getattr(importlib.import_module(f'transformers.models.{module}'), name)(config).to(dtype)
    fused = copy.deepcopy(plain)
    assert fuse_gates(fused) == 1 and isinstance(fused, type(plain)) and fuse_gates(fused) == 0
    x = torch.randn(2, 7, 24, dtype=dtype, requires_grad=True)
    assert torch.equal(plain(x), fused(x))
    direction = torch.randn_like(x)
    wanted = torch.autograd.grad(plain(x), [x, *plain.parameters()], direction)
    found = torch.autograd.grad(fused(x), [x, *fused.parameters()], direction)
    assert len(found) == 4 and all(map(torch.equal, found, wanted))
    fused.up_proj.requires_grad_(False)
    frozen = torch.autograd.grad(fused(x.detach()), [fused.gate_proj.weight], direction)
    assert torch.equal(frozen[0], wanted[1])


class ScaledMLP(LlamaMLP):
    """A different class with the same attribute names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


def test_gated_blocks_of_another_kind_are_left_alone() -> None:
    config = transformers.LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)
    block, model = ScaledMLP(config), make_model()
    state = torch.get_rng_state()
    assert fuse_gates(block) == 0 and type(block) is ScaledMLP
    assert fuse_gates(model) == 2
    assert torch.equal(torch.get_rng_state(), state), 'looking draws nothing'


@pytest.mark.parametrize('checkpoints', [False, True])
def test_nothing_below_the_first_adapter_asks_for_gradients(checkpoints: bool) -> None:
    asked: list[bool] = []
    tuned, _ = prepared(make_model(), 'llama3.2-1b-instruct', 'lora', gradient_checkpointing=checkpoints)
    layers = tuned.get_base_model().model.layers
    layers[0].register_forward_pre_hook(lambda module, args: asked.append(args[0].requires_grad))
    layers[1].register_forward_pre_hook(lambda module, args: asked.append(args[0].requires_grad))
    ids = torch.tensor([[7, 8, 9, 10]])
    tuned(ids, labels=ids).loss.backward()
    assert asked[:2] == [False, True]
    assert all(p.grad is not None for name, p in tuned.named_parameters() if 'lora_' in name)


def test_bf16_is_as_near_to_fp32_as_plain_bf16() -> None:
    errors: dict[str, list[float]] = {'plain': [], 'fast': []}

    def sharp(seed: int) -> Any:
        """Return a model whose attention scores vary widely, as in trained models."""
        model = make_model(seed=seed)
        for name, parameter in model.named_parameters():
            if 'q_proj' in name or 'k_proj' in name:
                parameter.data *= SHARPER
        return model

    for seed in range(4):
        rows = make_rows(400, seed)
        count = sum(row['trained'][1] - max(1, row['trained'][0]) for row in rows)
        exact_model, _ = prepared(sharp(seed), 'llama3.2-1b-instruct', 'lora')
        _, exact = plain_gradients(exact_model, rows, count)
        words = {'tuner_backend': 'peft', 'fused_norms': False, 'fused_mlp': False, 'fused_rotary': False}
        plain, _ = prepared(sharp(seed).bfloat16(), 'llama3.2-1b-instruct', 'lora', **words)
        fast, args = prepared(sharp(seed).bfloat16(), 'llama3.2-1b-instruct', 'lora')
        with torch.autocast('cpu', torch.bfloat16):
            _, found = plain_gradients(plain, rows, count)
        base = fast.get_base_model()
        assert use_padding_free(base, args, longest=30)
        Scorer(base, exact_head(base, args)).loss(fast, Collator(5, pads=False)(rows), count).backward()
        ours = {n: p.grad for n, p in fast.named_parameters() if p.grad is not None}
        for name, gradients in (('plain', found), ('fast', ours)):
            errors[name].append(sum(float((gradients[n].float() - g).square().sum()) for n, g in exact.items()) ** 0.5)
    assert sum(errors['fast']) <= 1.05 * sum(errors['plain']), errors


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['lora', 'full'])
@pytest.mark.parametrize('key', ['llama3.2-1b-instruct', 'qwen3-30b-a3b', 'baichuan-13b'])
def test_five_steps_end_where_transformers_and_peft_end(key: str, kind: str, tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from utils.encode.encoded import row_labels
    from utils.train.trainer import TrainerSetup, make_trainer

    base = open_tiny(key, tmp_path / 'model')
    rows, tokenizer = make_rows(390), make_tokenizer()
    plain, _ = prepared(
        copy.deepcopy(base), key, kind, tuner_backend='peft', fused_norms=False, fused_mlp=False, fused_rotary=False
    )
    settings = {
        'per_device_train_batch_size': 2, 'gradient_accumulation_steps': 2, 'max_steps': 5, 'learning_rate': 1e-3,
        'max_grad_norm': 1.0, 'optim': 'sgd', 'lr_scheduler_type': 'cosine', 'warmup_steps': 0, 'use_cpu': True,
        'save_strategy': 'no', 'report_to': 'none', 'disable_tqdm': True, 'weight_decay': 0.01,
    }  # fmt: skip
    Trainer(
        model=plain,
        args=TrainingArguments(output_dir=str(tmp_path / 'plain'), **settings),
        train_dataset=[{'input_ids': row['input_ids'], 'labels': row_labels(row)} for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    ).train()

    fast, args = prepared(
        copy.deepcopy(base), key, kind, batch_size=2, gradient_accumulation_steps=2, max_steps=5, learning_rate=1e-3,
        warmup_ratio=0.0, optim='sgd', dataloader_num_workers=0, only_save_model=True, save_steps=100,
    )  # fmt: skip
    train = EncodedRows()
    for row in rows:
        train.append(Encoded(**row))
    setup = TrainerSetup(
        run=bare_run(tmp_path / 'fast'),
        tokenizer=tokenizer,
        dtype=torch.float32,
        generation=generation_config(args, tokenizer, []),
    )
    make_trainer(args, fast, PreparedData(train=train, val=EncodedRows(), summary={}), setup).train()
    start = dict(prepared(base, key, kind)[0].named_parameters())
    expected, moved = dict(plain.named_parameters()), 0.0
    for name, parameter in fast.named_parameters():
        assert (parameter - expected[name]).abs().max() < 1e-5, name
        moved = max(moved, float((parameter - start[name]).abs().max()))
    assert moved > 1e-4, 'something was learnt'


def test_packs_hold_every_row_once_and_are_nearly_full() -> None:
    assert best_fit([5, 3, 8, 1, 2, 9, 12], 10) == [[6], [5, 3], [2, 4], [0, 1]]
    rng = random.Random(0)
    lengths = [rng.randint(1, 300) for _ in range(2000)]
    packs = best_fit(lengths, 512)
    assert sorted(i for pack in packs for i in pack) == list(range(2000))
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= 512
    assert len(packs) <= 1.01 * sum(lengths) / 512 + 1


def test_fewest_packs_are_filled_alike_where_that_fits() -> None:
    assert pack_evenly([6, 5, 4, 3], 12) == [[0, 3], [1, 2]]
    lengths = [5, 5, 4, 4, 3, 3, 3]
    assert pack_evenly(lengths, 9) == best_fit(lengths, 9) == [[0, 2], [1, 3], [4, 5, 6]]
    assert pack_evenly([5], 2) == [[0]]


def test_micro_batches_of_a_step_are_joined_up_to_the_heaviest() -> None:
    rows = [
        {'input_ids': list(range(10 * n, 11 * n)), 'trained': (n // 2, n), 'prompt_length': n // 2, 'row': n}
        for n in (9, 2, 3, 4, 5, 6, 2, 3)
    ]
    batches = [Collator(0, pads=False)([row]) for row in rows]
    found = refill(batches, 9)
    assert len(found) == 8 and [bool(batch) for batch in found] == [False] * 4 + [True] * 4
    by_row: dict[tuple[int, ...], list[Any]] = {}
    for batch in found[4:]:
        assert list(batch) == list(batches[0]) and batch['input_ids'].shape[1] <= 9
        lengths = batch['row_lengths'].tolist()
        parts = [batch[name][0].split(lengths) for name in ('input_ids', 'position_ids', 'labels')]
        for index, prompt, *tensors in zip(batch['rows'], batch['prompt_lengths'], *parts, strict=True):
            by_row[int(index), int(prompt), len(by_row)] = [x.tolist() for x in tensors]
    expected = [(b['rows'].item(), b['prompt_lengths'].item()) for b in batches]
    assert sorted(key[:2] for key in by_row) == sorted(expected)
    wanted = [[b[name][0].tolist() for name in ('input_ids', 'position_ids', 'labels')] for b in batches]
    assert sorted(by_row.values()) == sorted(wanted)
    assert refill(batches, 8)[0] is not batches[0] and refill(batches[:2], 9) == batches[:2]


@pytest.mark.slow
def test_joined_micro_batches_give_the_same_training(run_sft: Run, tmp_path: Path) -> None:
    rows = [{'query': 'x' * n, 'response': 'yes ' * (n % 7 + 1)} for n in (90, 3, 12, 9, 4, 20, 7, 31)]
    common = (
        '--dataset', str(write_jsonl(tmp_path / 'rows.jsonl', rows)), '--dataset_test_ratio', '0', '--batch_size', '1',
        '--gradient_accumulation_steps', '8', '--max_steps', '3', '--save_steps', '3', '--logging_steps', '1',
    )  # fmt: skip
    calls: list[int] = []
    plain = SftTrainer.compute_loss

    def counted(self: SftTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self.in_preflight:
            calls.append(inputs['input_ids'].shape[1])
        return plain(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SftTrainer, 'compute_loss', counted)
        runs = [run_sft(*common, '--preflight', 'false', '--group_by_length', joins) for joins in ('false', 'true')]
    assert len(calls[:24]) == 24 and len(calls[24:]) == 12, 'four batches a step instead of eight'
    assert max(calls[24:]) == max(calls[:24])
    states = [json.loads((run / 'checkpoint-3' / 'trainer_state.json').read_text()) for run in runs]
    apart, joined = ([(e['loss'], e['grad_norm']) for e in s['log_history'] if 'loss' in e] for s in states)
    assert len(apart) == 3
    for found, expected in zip(joined, apart, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('pads', [True, False])
def test_a_step_keeps_its_rows_whatever_their_order(pads: bool) -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 300) for _ in range(70)]
    order = rng.sample(range(70), 70)
    found = list(StepSampler(order, lengths, batch=4, batches=4, pads=pads))
    padded = tokens = 0
    for start in range(0, 70, 16):
        window = found[start : start + 16]
        assert set(window) == set(order[start : start + 16])
        batches = [[lengths[i] for i in window[n : n + 4]] for n in range(0, len(window), 4)]
        if len(window) == 16:
            padded += sum(max(b) * len(b) - sum(b) for b in batches)
            tokens += max(map(sum, batches)) - min(map(sum, batches))
    before = [[lengths[i] for i in order[n : n + 4]] for n in range(0, 64, 4)]
    if pads:
        assert padded < 0.4 * sum(max(b) * len(b) - sum(b) for b in before)
    else:
        assert tokens < 0.2 * (max(map(sum, before)) - min(map(sum, before))) * 4


@pytest.mark.parametrize('key', ['llama3.2-1b-instruct', 'gpt-oss-20b', 'qwen3-next-80b-a3b-instruct'])
def test_rows_that_have_ended_leave_the_batch(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GenerationConfig

    model = open_tiny(key, tmp_path).eval()
    config = GenerationConfig(
        max_new_tokens=40, do_sample=False, eos_token_id=list(range(60)), pad_token_id=5, bos_token_id=1
    )
    rng, sizes = random.Random(0), []
    prompts = [[rng.randrange(60, 400) for _ in range(rng.randint(1, 20))] for _ in range(16)]
    generate = model.generate
    monkeypatch.setattr(model, 'generate', lambda **words: sizes.append(len(words['input_ids'])) or generate(**words))
    answers = generate_batch(model, prompts, config)
    leaving = list(sizes)
    assert answers == [generate_batch(model, [prompt], config)[0] for prompt in prompts]
    assert len({len(answer) for answer in answers}) > 3
    assert leaving[0] == 16 and (leaving == [16]) == (key == 'qwen3-next-80b-a3b-instruct')
    assert all(after <= before / 2 for before, after in itertools.pairwise(leaving))


def first_step(run: Path) -> tuple[float, float]:
    state = json.loads((run / 'checkpoint-1' / 'trainer_state.json').read_text())
    entry = next(e for e in state['log_history'] if 'loss' in e)
    return entry['loss'], entry['grad_norm']


@pytest.mark.slow
@pytest.mark.parametrize('bits', ['0', pytest.param('4', marks=pytest.mark.optional)])
def test_packed_padded_and_laid_out_rows_give_the_same_step(run_sft: Run, tmp_path: Path, bits: str) -> None:
    if bits == '4':
        pytest.importorskip('bitsandbytes')
    rows = [{'query': 'x' * n, 'response': 'yes ' * (n % 7 + 1)} for n in (3, 40, 9, 60)]
    common = (
        '--dataset', str(write_jsonl(tmp_path / 'four.jsonl', rows)), '--dataset_test_ratio', '0', '--max_steps', '1',
        '--save_steps', '1', '--max_grad_norm', '0', '--quantization_bit', bits,
    )  # fmt: skip
    ways = [
        (
            '--padding_free',
            'false',
            '--tuner_backend',
            'peft',
            '--chunked_loss',
            'false',
            '--fused_norms',
            'false',
            '--fused_mlp',
            'false',
            '--batch_size',
            '4',
        ),
        ('--padding_free', 'true', '--batch_size', '4'),
        ('--packing', 'true', '--max_length', '400', '--batch_size', '1', '--gradient_checkpointing', 'true'),
    ]
    found = [first_step(run_sft(*common, *way, '--gradient_accumulation_steps', '1')) for way in ways]
    for values in found[1:]:
        assert values == pytest.approx(found[0], abs=1e-5)


# Runs as many shapes as oneDNN keeps kernels for by default, twice, and prints when the second round starts.
MANY_SHAPES = """
from utils.run.processes import start_processes
start_processes('gloo')
import torch
weight = torch.zeros(8, 8).to_mkldnn()
for _ in range(2):
    print('again', flush=True)
    for rows in range(1, 301):
        torch._C._nn.mkldnn_linear(torch.zeros(rows, 8).to_mkldnn(), weight)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='this torch has no oneDNN')
@pytest.mark.parametrize('chosen', [None, '1024'])
def test_kernels_of_shapes_long_past_are_given_up(chosen: str | None) -> None:
    setting = {} if chosen is None else {'ONEDNN_PRIMITIVE_CACHE_CAPACITY': chosen}
    environment = {name: x for name, x in os.environ.items() if name != 'ONEDNN_PRIMITIVE_CACHE_CAPACITY'}
    done = subprocess.run(
        [sys.executable, '-c', MANY_SHAPES], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**environment, **setting, 'ONEDNN_VERBOSE': 'profile_create'},
    )  # fmt: skip
    made = [part.count('create:cache_miss') for part in done.stdout.split('again')[1:]]
    assert made[0] >= 300
    assert made[1] == (0 if chosen else pytest.approx(made[0], abs=1))


@pytest.mark.slow
def test_packing_needs_a_model_that_can(run_sft: Run, tmp_path: Path, problems: Callable[[], list[str]]) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=4)).save_pretrained(tmp_path / 'm')
    make_tokenizer().save_pretrained(tmp_path / 'm')
    run_sft('--model_id_or_path', str(tmp_path / 'm'), '--packing', 'true', expect=2)
    assert '--packing true is not possible: the attention of BloomForCausalLM' in problems()[0]
    run_sft('--packing', 'true', '--max_length', '-1', '--padding_free', 'false', expect=2)
    assert len(problems()) == 3

"""Rotary embedding in one pass: which classes get it, what else stays as it was, and what the kernel is given."""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3

from tests.support.tiny_models import make_model
from utils.cli.arguments import SftArguments
from utils.fast import rotation
from utils.fast.kernel_trial import RotaryCase, rotary_inputs, rotary_kernel
from utils.fast.rotation import _FusedRotary, _mixin_for, _rotated, find_kernel, fuse_rotary, rotation_over
from utils.fast.swap import restore_class
from utils.train.prepare import prepare_model

CPU = torch.device('cpu')
IDS = torch.tensor([[7, 8, 9, 10, 11]])
CASE = RotaryCase(4, 2, width=8, rotated=8, dtype=torch.float32, table_dtype=torch.float32)
# The attention classes of the models of MODEL_MAPPING, and two of 2023.
ROTATING = (
    'llama.LlamaAttention', 'qwen2.Qwen2Attention', 'qwen3.Qwen3Attention', 'qwen3_moe.Qwen3MoeAttention',
    'qwen3_next.Qwen3NextAttention', 'qwen3_5.Qwen3_5Attention', 'mistral.MistralAttention', 'phi3.Phi3Attention',
    'gemma2.Gemma2Attention', 'gemma3.Gemma3Attention', 'glm4_moe.Glm4MoeAttention', 'smollm3.SmolLM3Attention',
    'lfm2.Lfm2Attention', 'granite.GraniteAttention', 'hunyuan_v1_dense.HunYuanDenseV1Attention',
    'seed_oss.SeedOssAttention', 'olmo2.Olmo2Attention', 'glm4_moe_lite.Glm4MoeLiteAttention',
)  # fmt: skip
# These pair neighbouring values, have tables of half the width, round once, or rotate one tensor at a time.
OTHERS = ('glm4.Glm4Attention', 'gpt_oss.GptOssAttention', 'ernie4_5.Ernie4_5Attention', 'cohere.CohereAttention',
          'gemma4.Gemma4TextAttention', 'llama.LlamaMLP')  # fmt: skip


def class_of(name: str) -> Any:
    package, _, kind = name.partition('.')
    return getattr(importlib.import_module(f'transformers.models.{package}.modeling_{package}'), kind)


@pytest.mark.parametrize('name', [*ROTATING, *OTHERS])
def test_classes_that_rotate_like_llama_get_the_kernel(name: str) -> None:
    mixin = _mixin_for(class_of(name))
    assert (mixin is not None) is (name in ROTATING)
    if mixin is not None:
        assert mixin.__module__ == class_of(name).__module__


def eager_kernel(calls: list[Any]) -> Any:
    """Return a stand-in for `rotary_kernel` that computes by torch, and that records for which case it is asked."""

    def found(case: RotaryCase, device: torch.device, plain: Any) -> Any:
        calls.append((case, plain))
        return lambda q, k, cos, sin: (_rotated(q, cos, sin), _rotated(k, cos, sin))

    return found


def loss_of(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize('checkpointing', [False, True])
def test_only_the_fused_model_uses_the_kernel(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = (make_model().train() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    expected, gradients = loss_of(plain)
    calls: list[Any] = []
    monkeypatch.setattr(rotation, 'rotary_kernel', eager_kernel(calls))
    function = modeling_llama.apply_rotary_pos_emb

    assert fuse_rotary(model) == 2 and fuse_rotary(model) == 0
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    found, ours = loss_of(model)
    assert torch.equal(found, expected) and all(map(torch.equal, ours, gradients))
    assert calls == [(CASE, function)] * (4 if checkpointing else 2)

    calls.clear()
    loss_of(plain)
    assert calls == [] and modeling_llama.apply_rotary_pos_emb is function

    attention = model.model.layers[0].self_attn
    assert type(attention).__name__ == 'FusedLlamaAttention' and isinstance(attention, _FusedRotary)
    assert isinstance(copy.deepcopy(attention), _FusedRotary)
    restore_class(attention)
    loss_of(model)
    assert type(attention) is modeling_llama.LlamaAttention and len(calls) == (2 if checkpointing else 1)


def test_a_fused_layer_finds_the_other_functions_of_its_module() -> None:
    """The module's own attention is found by the module of the layer's class."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        attn_implementation='eager',
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    expected = model(IDS).logits
    assert fuse_rotary(model) == 1
    module = sys.modules[type(model.model.layers[0].self_attn).__module__]
    assert module is modeling_llama
    assert torch.equal(model(IDS).logits, expected)


def test_no_kernel_is_tried_without_a_gpu() -> None:
    assert rotary_kernel(CASE, CPU, modeling_llama.apply_rotary_pos_emb) is None
    gpu = torch.device('cuda', 0)
    for changed in ({'dtype': torch.float64}, {'table_dtype': torch.float64}, {'rotated': 7}):
        assert rotary_kernel(CASE._replace(**changed), gpu, modeling_llama.apply_rotary_pos_emb) is None
    assert 'utils.fast.triton_kernels' not in sys.modules


@pytest.mark.parametrize('dim', [1, 2])
@pytest.mark.parametrize('width', [8, 12])
def test_the_kernel_gets_heads_before_tokens(dim: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASE._replace(width=width)
    query, key, cos, sin = rotary_inputs(case, CPU, tokens=3)
    plain = modeling_phi3.apply_rotary_pos_emb
    expected = plain(query, key, cos, sin)
    asked: list[Any] = []

    def kernel(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        asked.append((q.shape, k.shape))
        return plain(q, k, cos, sin)

    monkeypatch.setattr(rotation, 'rotary_kernel', lambda found, *_: kernel if found == case else None)
    given = [x if dim == 1 else x.transpose(1, 2) for x in (query, key)]
    found = rotation_over(plain)(*given, cos, sin, unsqueeze_dim=dim)
    assert asked == [((1, 4, 3, width), (1, 2, 3, width))]
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours if dim == 1 else ours.transpose(1, 2), wanted)


def test_other_arguments_have_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, 'rotary_kernel', lambda *_: 'kernel')
    query, key, cos, sin = rotary_inputs(CASE, CPU, tokens=3)

    def kernel_for(q: Any = query, k: Any = key, cos: Any = cos, sin: Any = sin, dim: int = 1) -> Any:
        return find_kernel(q, k, cos, sin, dim, modeling_olmo2.apply_rotary_pos_emb)

    assert kernel_for() == 'kernel'
    assert kernel_for(q=query.repeat(2, 1, 1, 1), k=key.repeat(2, 1, 1, 1)) == 'kernel', 'all rows share the tables'
    assert kernel_for(k=key.half()) is None
    assert kernel_for(k=key[..., :4]) is None
    assert kernel_for(k=key[:, :, :2]) is None
    assert kernel_for(q=query[0], k=key[0]) is None
    assert kernel_for(cos=cos.clone().requires_grad_()) is None
    assert kernel_for(sin=sin.double()) is None
    assert kernel_for(cos=cos.repeat(3, 1, 1), sin=sin.repeat(3, 1, 1)) is None
    assert kernel_for(cos=cos[:, :2], sin=sin[:, :2]) is None
    assert kernel_for(dim=0) is None


@pytest.mark.parametrize(('kind', 'flag', 'fused'), [('cpu', True, 0), ('cuda', True, 2), ('cuda', False, 0)])
def test_layers_are_fused_on_a_gpu(kind: str, flag: bool, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr('utils.base.device.kind', lambda: kind)
    prepare_model(model, SftArguments(sft_type='full', fused_rotary=flag))
    assert sum(isinstance(layer, _FusedRotary) for layer in model.modules()) == fused

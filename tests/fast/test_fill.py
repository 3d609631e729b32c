"""Tokens after the rows of a concatenated batch, for which matrix products on a CPU are faster."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.support.exactness import make_rows, open_tiny, prepared
from tests.support.tiny_models import make_model
from utils.cli.arguments import SftArguments
from utils.data.collator import Collator
from utils.fast import fill
from utils.fast.attention import RowAttention, attend_in_groups
from utils.fast.fill import can_fill, filled
from utils.fast.layout import exact_head, use_padding_free
from utils.fast.rows import RowMask
from utils.fast.scoring import Scorer


@pytest.mark.parametrize(('tokens', 'after'), [(255, 255), (256, 256), (257, 264), (901, 904)])
def test_the_number_of_tokens_becomes_a_multiple_of_8(tokens: int, after: int) -> None:
    ids = torch.arange(1, tokens + 1)[None]
    other = torch.ones(3)
    inputs = filled({'input_ids': ids, 'position_ids': ids - 1, 'other': other})
    assert inputs['other'] is other
    for name, first in (('input_ids', 1), ('position_ids', 0)):
        assert inputs[name].tolist() == [[*range(first, first + tokens), *[0] * (after - tokens)]]


@pytest.mark.parametrize('way', ['rows', 'groups'])
def test_attention_gives_added_tokens_nothing(way: str) -> None:
    torch.manual_seed(0)
    rows = RowMask((5, 1, 11), None)
    inputs = [torch.randn(heads, 24, 8, dtype=torch.double) for heads in (6, 2, 2)]
    found = []
    for tokens in (17, 24):
        given = [x[:, :tokens].clone().requires_grad_() for x in inputs]
        if way == 'rows':
            out = RowAttention.apply(*given, None, rows, 0.3, None)
        else:
            out = attend_in_groups(*given, rows, scaling=0.3, dropout=0.0)
        grads = torch.autograd.grad(out, given, torch.ones_like(out))
        assert not out[17:].any()
        assert not any(grad[:, 17:].any() for grad in grads)
        found.append([out[:17], *(grad[:, :17] for grad in grads)])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize('with_head', [True, False])
def test_added_tokens_change_no_loss_and_no_gradient(with_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model()
    rows = make_rows(base.get_input_embeddings().weight.shape[0])
    tokens = sum(len(row['input_ids']) for row in rows)
    assert tokens % 8
    seen: list[int] = []
    found = []
    for fewest in (1000, 1):
        monkeypatch.setattr(fill, '_FEWEST_TOKENS', fewest)
        model = copy.deepcopy(base)
        assert use_padding_free(model, SftArguments(), longest=30)
        model.get_input_embeddings().register_forward_hook(lambda *args: seen.append(args[2].shape[1]))
        scorer = Scorer(model, exact_head(model, SftArguments()) if with_head else None)
        seen.clear()
        batch = Collator(5, pads=False)(rows)
        loss = scorer.loss(model, batch, 40)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), scorer.by_row(model, batch), *grads])
    assert seen == [-(-tokens // 8) * 8] * 2
    assert len(found[0]) > 10
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(('key', 'fills'), [('qwen3-0.6b', True), ('qwen3.5-0.8b', False), ('qwen3-30b-a3b', False)])
def test_recurrent_layers_and_experts_get_no_added_tokens(key: str, fills: bool, tmp_path: Path) -> None:
    model, _ = prepared(open_tiny(key, tmp_path / 'model'), key, 'lora')
    assert can_fill(model.get_base_model()) is fills

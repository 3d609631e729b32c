"""Models with recurrent layers on concatenated rows: gated delta nets and short convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.exactness import make_rows, open_tiny, prepared
from tests.support.modern_models import DELTA, SMALL
from utils.cli.arguments import SftArguments
from utils.data.collator import Collator
from utils.fast import attention
from utils.fast.layout import exact_head, use_padding_free
from utils.fast.scoring import Scorer

KEY = 'qwen3.5-0.8b'
pytestmark = pytest.mark.on_device


def test_checkpointing_recomputes_each_row_alone(tmp_path: Path) -> None:
    """The backward pass runs outside of the context that says where rows end."""
    found: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        base = open_tiny(KEY, tmp_path / f'model{checkpointing}')
        rows = make_rows(base.get_input_embeddings().weight.shape[0])
        model, args = prepared(base, KEY, 'full', gradient_checkpointing=checkpointing)
        assert model.is_gradient_checkpointing == checkpointing
        assert use_padding_free(model, args, longest=30)
        Scorer(model, exact_head(model, args)).loss(model, Collator(5, pads=False)(rows), 40).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_padded_batches_are_computed_as_before(tmp_path: Path) -> None:
    model = open_tiny(KEY, tmp_path / 'model').eval()
    rows = make_rows(model.get_input_embeddings().weight.shape[0])
    batch = Collator(5, pads=True)(rows)
    inputs = {name: batch[name] for name in ('input_ids', 'attention_mask')}
    with torch.no_grad():
        before = model(**inputs).logits
        assert use_padding_free(model, SftArguments(), longest=30)
        assert sum(type(m).__name__ == 'FusedQwen3_5GatedDeltaNet' for m in model.modules()) == 1
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize('key', [KEY, 'lfm2.5-1.2b-instruct'])
def test_rows_that_are_not_kept_apart_are_noticed(key: str, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    model = open_tiny(key, tmp_path / 'model')
    monkeypatch.setattr(attention, 'keep_rows_apart', lambda model, **_: 0)
    with caplog.at_level('INFO'):
        assert not use_padding_free(model, SftArguments(), longest=30)
    assert f'the logits of a row of {type(model).__name__} change by up to' in caplog.text


@pytest.mark.parametrize('kind', ['olmo_hybrid', 'lfm2_moe'])
def test_classes_without_an_entry_keep_rows_apart_too(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {**SMALL, **DELTA}
    if kind == 'lfm2_moe':
        experts = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 16, 'num_dense_layers': 1}
        settings = {**SMALL, **experts, 'layer_types': ['conv', 'full_attention']}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))
    with caplog.at_level('INFO'):
        assert use_padding_free(model, SftArguments(), longest=30), caplog.text

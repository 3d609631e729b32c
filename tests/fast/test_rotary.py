"""Rotary embeddings that depend on the longest row of a batch: each row is trained as if it were alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from utils.cli.arguments import SftArguments
from utils.data.collator import Collator, take_rows
from utils.encode.encoded import IGNORE_INDEX, row_labels
from utils.fast.layout import exact_head, use_padding_free
from utils.fast.rotary import depends_on_batch_from, groups_of_rows
from utils.fast.scoring import Scorer

LIMIT = 32
COMMON = {
    'vocab_size': 100, 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'num_key_value_heads': 4, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0,
}  # fmt: skip
LONGROPE = {
    'rope_type': 'longrope', 'rope_theta': 10000.0, 'short_factor': [1.0] * 4, 'long_factor': [4.0] * 4,
    'original_max_position_embeddings': LIMIT,
}  # fmt: skip
DYNAMIC = {'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 10000.0}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 10000.0, 'original_max_position_embeddings': LIMIT}


def make(kind: str) -> Any:
    """Return a model in eval mode that depends strongly on positions."""
    torch.manual_seed(0)
    if kind == 'longrope':
        phi = Phi3Config(
            **COMMON,
            max_position_embeddings=4 * LIMIT,
            original_max_position_embeddings=LIMIT,
            rope_parameters=dict(LONGROPE),
        )
        model: Any = Phi3ForCausalLM(phi)
    elif kind == 'dynamic':
        model = LlamaForCausalLM(LlamaConfig(**COMMON, max_position_embeddings=LIMIT, rope_parameters=DYNAMIC))
    else:
        model = LlamaForCausalLM(LlamaConfig(**COMMON, max_position_embeddings=4 * LIMIT, rope_parameters=YARN))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def make_rows() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    spans = {20: (10, 20), 60: (0, 60), 12: (0, 12), 45: (5, 40), LIMIT: (1, LIMIT)}
    return [
        {'input_ids': torch.randint(3, 100, (n,)).tolist(), 'trained': span, 'prompt_length': span[0], 'row': index}
        for index, (n, span) in enumerate(spans.items())
    ]


def by_definition(model: Any, row: dict[str, Any]) -> tuple[float, int]:
    """Return the summed loss of a row, computed on its ids alone by a fresh model."""
    fresh = copy.deepcopy(model)
    labels = torch.tensor(row_labels(row))[1:]
    log_p = fresh(input_ids=torch.tensor([row['input_ids']]), use_cache=False).logits[0, :-1].log_softmax(-1)
    trained = labels != IGNORE_INDEX
    return float(-log_p[trained].gather(1, labels[trained][:, None]).double().sum()), int(trained.sum())


@pytest.mark.parametrize('pads', [False, True])
@pytest.mark.parametrize('kind', ['longrope', 'dynamic', 'yarn'])
def test_a_row_is_scored_and_trained_as_it_is_alone(kind: str, pads: bool) -> None:
    model, rows = make(kind), make_rows()
    with torch.no_grad():
        expected = [by_definition(model, row) for row in rows]
    args = SftArguments(padding_free=False if pads else None)
    assert use_padding_free(model, args, longest=60) is not pads
    scorer, collate = Scorer(model, exact_head(model, args)), Collator(0, pads=pads)
    # The rows in one batch, and in batches that follow a longer one.
    for batches in ([rows], [rows[1:2], rows[3:4], rows[:1], rows[4:]]):
        found = torch.cat([scorer.by_row(model, collate(batch)) for batch in batches])
        wanted = [expected[row['row']] for batch in batches for row in batch]
        assert found[:, 0].tolist() == pytest.approx([loss for loss, _ in wanted], rel=1e-4)
        assert found[:, 2].tolist() == [tokens for _, tokens in wanted]
    gradients = []
    for batches in ([rows], [[row] for row in rows]):
        model.zero_grad()
        for batch in batches:
            scorer.loss(model, collate(batch), 100.0).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    largest = max(float(grad.abs().max()) for grad in gradients[1])
    for together, apart in zip(*gradients, strict=True):
        assert (together - apart).abs().max() < 1e-4 * largest


def test_where_a_row_begins_to_change_others() -> None:
    assert depends_on_batch_from(make('longrope').config) == LIMIT
    assert depends_on_batch_from(make('dynamic').config) == LIMIT
    assert depends_on_batch_from(make('yarn').config) is None
    assert groups_of_rows([5, 40, 32, 33], 32) == [[0, 2], [1], [3]]
    assert groups_of_rows([40], 32) == [[0]]


@pytest.mark.parametrize('pads', [False, True])
def test_rows_of_a_batch_are_the_batch_of_those_rows(pads: bool) -> None:
    rows, collate = make_rows(), Collator(0, pads=pads)
    taken, wanted = take_rows(collate(rows), [0, 2, 4]), collate([rows[0], rows[2], rows[4]])
    assert taken.keys() == wanted.keys()
    assert all(torch.equal(taken[name], x) for name, x in wanted.items())

"""The fast path equals plain transformers and PEFT on padded rows, for every native class of MODEL_MAPPING."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.exactness import LENGTHS, make_rows, open_tiny, plain_gradients, prepared
from tests.support.modern_models import PLAIN, SEEING
from tests.support.old_models import PROVEN
from utils.cli.arguments import SftArguments
from utils.data.collator import Collator
from utils.fast.layout import exact_head, use_padding_free
from utils.fast.scoring import Scorer
from utils.model import MODEL_MAPPING

BOUND = 1e-5
pytestmark = pytest.mark.on_device
# Classes whose rows stay padded, and a word of the logged reason.
PADDED = {
    'AlibiLlamaForCausalLM': 'ALiBi',
    'BloomForCausalLM': 'ALiBi',
    'QwenVLForCausalLM': 'has a vision tower',
    'Qwen2_5_VLForConditionalGeneration': 'has a vision tower',
    'Qwen3VLForConditionalGeneration': 'has a vision tower',
}
# One key for each way in which a model is opened as a native class.
SOURCES = [key for key in (*PLAIN, *SEEING, *PROVEN) if MODEL_MAPPING[key].quantization is None]


@pytest.fixture(autouse=True)
def small_batches_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('utils.fast.fill._FEWEST_TOKENS', 1)


@pytest.mark.parametrize('key', SOURCES)
def test_loss_and_gradients_are_those_of_plain_training(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = open_tiny(key, tmp_path / 'model')
    name = type(base).__name__
    rows = make_rows(base.get_input_embeddings().weight.shape[0])
    count = sum(row['trained'][1] - max(1, row['trained'][0]) for row in rows)
    for kind in ('lora', 'full'):
        plain, _ = prepared(
            copy.deepcopy(base), key, kind, tuner_backend='peft', fused_norms=False, fused_mlp=False, fused_rotary=False
        )
        expected_loss, expected = plain_gradients(plain, rows, count)
        fast, args = prepared(copy.deepcopy(base), key, kind)
        inner = fast.get_base_model() if kind == 'lora' else fast
        with caplog.at_level('INFO'):
            laid = use_padding_free(inner, args, longest=max(LENGTHS))
        assert laid == (name not in PADDED), caplog.text
        assert laid or PADDED[name] in caplog.text
        head = exact_head(inner, args)
        assert head is not None, name
        scorer, collate = Scorer(inner, head), Collator(5, pads=not laid)
        largest = max(float(g.abs().max()) for g in expected.values())
        for groups in ([rows], [[row] for row in rows]):  # all parts together, and one by one
            fast.zero_grad()
            losses = [scorer.loss(fast, collate(part), count) for part in groups]
            for loss in losses:
                loss.backward()
            assert abs(sum(float(loss.detach()) for loss in losses) - expected_loss) < BOUND, name
            found = {n: p.grad for n, p in fast.named_parameters() if p.grad is not None}
            assert found.keys() == expected.keys()
            worst = max(float((found[n] - g).abs().max()) for n, g in expected.items())
            assert worst < BOUND * max(1.0, largest), (name, kind, worst, largest)


@pytest.mark.parametrize('key', SOURCES)
def test_a_row_does_not_change_with_its_neighbours(key: str, tmp_path: Path) -> None:
    model = open_tiny(key, tmp_path / 'model').eval()
    args = SftArguments()
    if not use_padding_free(model, args, longest=max(LENGTHS)):
        assert type(model).__name__ in PADDED
        return
    rows = make_rows(model.get_input_embeddings().weight.shape[0])
    other = copy.deepcopy(rows)
    other[1]['input_ids'] = [i + 1 for i in rows[1]['input_ids']]
    with torch.no_grad():
        before, after = (logits_of(model, batch) for batch in (rows, other))
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, False]


def logits_of(model: Any, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, ...]:
    """Return the logits of each row of a batch of concatenated rows."""
    from utils.fast.rows import concatenated_rows

    batch = Collator(5, pads=False)(rows)
    lengths = batch['row_lengths'].tolist()
    keep = torch.arange(sum(lengths))
    with concatenated_rows(lengths):
        logits = model(
            input_ids=batch['input_ids'], position_ids=batch['position_ids'], use_cache=False, logits_to_keep=keep
        ).logits
    return logits[0].split(lengths)


def test_the_classes_that_were_compared() -> None:
    assert len(SOURCES) == 42

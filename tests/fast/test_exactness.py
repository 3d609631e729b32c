"""The fast path against plain transformers and PEFT on padded rows, for every native class of MODEL_MAPPING."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loading.legacy.test_models_2023 import PROVEN, original_folder
from tests.programs.test_models_modern import PLAIN, SEEING, saved_model
from utils.cli.arguments import SftArguments
from utils.data.collator import Collator
from utils.fast.layout import exact_head, lay_end_to_end
from utils.fast.scoring import Scorer
from utils.loading.info import LoadOptions
from utils.loading.opening import open_entry
from utils.model import MODEL_MAPPING
from utils.train.prepare import prepare_model

BOUND = 1e-5
LENGTHS = (11, 3, 30, 17)
# Classes whose rows stay padded, and the word of the reason that is logged.
PADDED = {
    'AlibiLlamaForCausalLM': 'ALiBi',
    'BloomForCausalLM': 'ALiBi',
    'Qwen3NextForCausalLM': 'linear_attention',
    'Qwen3_5ForCausalLM': 'linear_attention',
    'Qwen3_5MoeForCausalLM': 'linear_attention',
    'Lfm2ForCausalLM': 'conv',
    'QwenVLForCausalLM': 'sees images',
    'Qwen2_5_VLForConditionalGeneration': 'sees images',
    'Qwen3VLForConditionalGeneration': 'sees images',
}
# One key of each way in which a full-width model comes to a native class.
SOURCES = [key for key in (*PLAIN, *SEEING, *PROVEN) if MODEL_MAPPING[key].quantization is None]


def open_tiny(key: str, folder: Path) -> Any:
    """Return a tiny fp32 model of random weights of a key's class, through the key's own loader."""
    info = MODEL_MAPPING[key]
    folder = saved_model(key, folder) if key in PLAIN or key in SEEING else original_folder(key, folder)
    model = open_entry(folder, info, LoadOptions(torch_dtype=torch.float32))[0]
    for module in model.modules():  # some classes drop out by default
        for field in {'attention_dropout', 'residual_dropout'} & set(vars(module)):
            setattr(module, field, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.6)  # with larger weights the toys amplify rounding more than any real model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return model


def make_rows(size: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of different lengths; the second half of each is trained, one row wholly."""
    rng = random.Random(seed)
    spans = [(n // 2, n) for n in LENGTHS[:-1]] + [(0, LENGTHS[-1])]
    return [
        {'input_ids': [rng.randrange(6, size) for _ in range(n)], 'trained': span, 'prompt_length': span[0]}
        for n, span in zip(LENGTHS, spans, strict=True)
    ]


def plain_gradients(model: Any, rows: list[dict[str, Any]], divisor: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients as transformers computes them: padded rows, its own loss."""
    batch = Collator(5, pads=True)(rows)
    inputs = {name: batch[name] for name in ('input_ids', 'attention_mask', 'labels')}
    model.zero_grad()
    loss = model(**inputs, num_items_in_batch=divisor, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def prepared(model: Any, key: str, kind: str, **flags: Any) -> tuple[Any, SftArguments]:
    """Return the model with adapters that are not zero, or all weights trained."""
    args = SftArguments(sft_type=kind, lora_target_modules=list(MODEL_MAPPING[key].lora_target_modules), **flags)
    torch.manual_seed(1)
    tuned = prepare_model(model, args)
    for name, parameter in tuned.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return tuned.train(), args


@pytest.mark.parametrize('key', SOURCES)
def test_loss_and_gradients_are_those_of_plain_training(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = open_tiny(key, tmp_path / 'model')
    name = type(base).__name__
    rows = make_rows(base.get_input_embeddings().weight.shape[0])
    count = sum(row['trained'][1] - max(1, row['trained'][0]) for row in rows)
    for kind in ('lora', 'full'):
        plain, _ = prepared(copy.deepcopy(base), key, kind, tuner_backend='peft', fused_norms=False, fused_mlp=False)
        expected_loss, expected = plain_gradients(plain, rows, count)
        fast, args = prepared(copy.deepcopy(base), key, kind)
        inner = fast.get_base_model() if kind == 'lora' else fast
        with caplog.at_level('INFO'):
            laid = lay_end_to_end(inner, args, longest=max(LENGTHS))
        assert laid == (name not in PADDED), caplog.text
        assert laid or PADDED[name] in caplog.text
        head = exact_head(inner, args)
        assert head is not None, name
        scorer, collate = Scorer(inner, head), Collator(5, pads=not laid)
        largest = max(float(g.abs().max()) for g in expected.values())
        for groups in ([rows], [[row] for row in rows]):  # together, and one by one
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
    if not lay_end_to_end(model, args, longest=max(LENGTHS)):
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
    """Return the logits of each row of a batch laid end to end."""
    from utils.fast.attention import laid_end_to_end

    batch = Collator(5, pads=False)(rows)
    lengths = batch['row_lengths'].tolist()
    keep = torch.arange(sum(lengths))
    with laid_end_to_end(lengths):
        logits = model(
            input_ids=batch['input_ids'], position_ids=batch['position_ids'], use_cache=False, logits_to_keep=keep
        ).logits
    return logits[0].split(lengths)


def test_the_classes_that_were_compared() -> None:
    assert len(SOURCES) == 42

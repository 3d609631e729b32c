"""eval_drift_kl: the KL of base and tuned model on neutral texts, and what it must not change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.support.runs import assert_equal, hashes, history, write_jsonl
from utils.fast.chunked_loss import Head
from utils.fast.scoring import Scorer
from utils.model import load_model, load_tokenizer
from utils.train.drift import neutral_texts

Run = Callable[..., Path]
Problems = Callable[[], list[str]]


def kl_by_hand(model_dir: Path, checkpoint: Path) -> float:
    """Return KL(base || tuned) per token from two models in fp64, one text at a time."""
    tokenizer = load_tokenizer(model_dir)
    base: Any = load_model(model_dir, torch_dtype=torch.float64).eval()
    opened: Any = load_model(model_dir, torch_dtype=torch.float64)
    tuned = PeftModel.from_pretrained(opened, checkpoint).double().eval()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for text in neutral_texts():
            ids = torch.tensor([tokenizer(text)['input_ids']])
            p, q = (model(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in (base, tuned))
            total += (p.exp() * (p - q)).sum()
            count += len(p)
    return float(total) / count


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags',
    [
        (),
        ('--padding_free', 'false', '--chunked_loss', 'false', '--tuner_backend', 'peft'),
        ('--predict_with_generate', 'true', '--max_new_tokens', '2', '--lora_dropout_p', '0.5'),
        ('--lora_modules_to_save', 'lm_head'),
    ],
)
def test_the_drift_is_the_kl_of_two_models(run_sft: Run, model_dir: Path, flags: tuple[str, ...]) -> None:
    run = run_sft(*flags)
    found = {entry['step']: entry['eval_drift_kl'] for entry in history(run, 6) if 'eval_drift_kl' in entry}
    assert list(found) == [3, 6]
    for step, drift in found.items():
        assert drift == pytest.approx(kl_by_hand(model_dir, run / f'checkpoint-{step}'), rel=1e-3)
    assert found[6] > found[3] > 1e-4
    assert 'drift from the base on neutral texts, nats' in (run / 'report.html').read_text(encoding='utf-8')


@pytest.mark.parametrize(('scale', 'cap'), [(1.0, None), (0.5, None), (1.0, 3.0)])
def test_the_divergence_does_not_depend_on_the_head_or_the_chunks(
    scale: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('utils.fast.scoring._DIVERGENCE_LOGITS', 3 * 40)
    torch.manual_seed(0)
    hidden = {name: torch.randn(7, 8) for name in ('tuned', 'base')}
    head = Head(torch.nn.Linear(8, 40), scale=scale, cap=cap)
    logits = {}
    for name, x in hidden.items():
        scaled = scale * head.linear(x).detach()
        logits[name] = cap * (scaled / cap).tanh() if cap else scaled

    scorer = Scorer.__new__(Scorer)
    p, q = (logits[name].double().log_softmax(-1) for name in ('base', 'tuned'))
    expected = float((p.exp() * (p - q)).sum() / 7)
    for scorer.head, values in ((head, hidden), (None, logits)):
        found = iter((values['tuned'], values['base']))
        monkeypatch.setattr(scorer, '_predictors', lambda model, batch, found=found: (next(found),))
        assert scorer.divergence(None, torch.no_grad, {}) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_measuring_the_drift_changes_nothing_else(run_sft: Run) -> None:
    flags = ('--lora_dropout_p', '0.1', '--save_total_limit', '-1')
    measured = run_sft(*flags)
    plain = run_sft(*flags, '--drift', 'false')
    assert hashes(measured / 'checkpoint-6') == hashes(plain / 'checkpoint-6')
    assert not any('eval_drift_kl' in entry for entry in history(plain, 6))
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(measured / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', measured / 'checkpoint-6')


def test_the_drift_needs_an_adapter(run_sft: Run, problems: Problems, caplog: pytest.LogCaptureFixture) -> None:
    run_sft('--sft_type', 'full', '--drift', 'true', expect=2)
    assert problems() == [
        '--drift true: --sft_type full has no adapter that could be switched off to compare with the base. '
        'Remove --drift.'
    ]
    run = run_sft('--sft_type', 'full', '--max_steps', '1')
    assert 'drift = false because --sft_type full has no adapter' in caplog.text
    assert json.loads((run / 'sft_args.json').read_text())['drift'] is False


def test_the_neutral_texts_are_few_short_and_in_two_languages() -> None:
    """They hold about 350 tokens, which are computed twice; more would cost more than 1 % of a run."""
    texts = neutral_texts()
    chinese = [text for text in texts if re.search(r'[\u4e00-\u9fff]', text)]
    assert len(texts) == len(set(texts)) == 32 and len(chinese) == 16
    assert sum(map(len, texts)) < 1100 and max(map(len, texts)) < 60


@pytest.mark.slow
def test_a_streamed_run_is_measured_too(run_sft: Run, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / 'rows.jsonl', [{'query': f'a {i}', 'response': 'b'} for i in range(20)])
    run = run_sft('--dataset', str(rows), '--streaming', 'true', '--stream_val_rows', '4', '--max_steps', '2')
    assert any(entry.get('eval_drift_kl', 0) > 0 for entry in history(run, 2))

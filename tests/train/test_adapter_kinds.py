"""DoRA and rsLoRA: exact on the fast path, resumed to the same bits, merged, and refused where they cannot work."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_infer
import llm_sft
from tests.support.exactness import LENGTHS, make_rows, open_tiny, plain_gradients, prepared
from tests.support.modern_models import make_modern
from tests.support.runs import ROOT, assert_equal, weights
from tests.support.tiny_models import make_model
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.cli.parser import parse
from utils.cli.resolve import resolve_sft
from utils.data.collator import Collator
from utils.estimate.gpus import Machine, mode_of
from utils.estimate.memory import trained_parameters
from utils.estimate.model_shape import measure
from utils.fast.layout import exact_head, use_padding_free
from utils.fast.lora import _FusedLora
from utils.fast.scoring import Scorer
from utils.model import get_model_info
from utils.train.prepare import prepare_model

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
KINDS = {'dora': {'use_dora': True}, 'rslora': {'use_rslora': True}, 'both': {'use_dora': True, 'use_rslora': True}}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('key', ['llama3.2-1b-instruct', 'qwen3-0.6b', 'gemma2-2b-it'])
def test_loss_and_gradients_are_those_of_plain_training(key: str, kind: str, tmp_path: Path) -> None:
    base = open_tiny(key, tmp_path / 'model')
    rows = make_rows(base.get_input_embeddings().weight.shape[0])
    count = sum(row['trained'][1] - max(1, row['trained'][0]) for row in rows)
    off: dict[str, Any] = {'tuner_backend': 'peft', 'fused_norms': False, 'fused_mlp': False}
    plain, _ = prepared(copy.deepcopy(base), key, 'lora', **off, **KINDS[kind])
    expected_loss, expected = plain_gradients(plain, rows, count)

    fast, args = prepared(copy.deepcopy(base), key, 'lora', **KINDS[kind])
    fused = [module for module in fast.modules() if isinstance(module, _FusedLora)]
    assert (len(fused) > 0) == (kind == 'rslora'), 'the layers of DoRA stay those of PEFT'
    inner = fast.get_base_model()
    assert use_padding_free(inner, args, longest=max(LENGTHS))
    head = exact_head(inner, args)
    assert head is not None
    loss = Scorer(inner, head).loss(fast, Collator(5, pads=False)(rows), count)
    loss.backward()
    assert abs(float(loss.detach()) - expected_loss) < 1e-5
    found = {name: p.grad for name, p in fast.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and any('magnitude' in name for name in found) == (
        'dora' in str(KINDS[kind])
    )
    largest = max(1.0, *(float(g.abs().max()) for g in expected.values()))
    assert max(float((found[n] - g).abs().max()) for n, g in expected.items()) < 1e-5 * largest


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    for flags, scale in (({}, 32 / 16), ({'use_rslora': True}, 32 / 4)):
        model = prepare_model(make_model(), SftArguments(lora_rank=16, lora_target_modules=['q_proj'], **flags))
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.scaling == {'default': scale}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_untrained_dora_adapter_changes_nothing(dtype: torch.dtype) -> None:
    ids = torch.tensor([[3, 40, 41, 42, 4]])
    model = make_model().to(dtype).eval()
    with torch.no_grad():
        before = model(ids).logits
        after = prepare_model(model, SftArguments(use_dora=True, lora_target_modules=['ALL'])).eval()(ids).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize('kind', KINDS)
def test_the_estimate_counts_what_is_trained(kind: str) -> None:
    model = make_model()
    shape = measure(model)
    args = SftArguments(lora_target_modules=['all-linear'], **KINDS[kind])
    mode = mode_of(args, get_model_info(None, 'any'), shape, Machine())
    tuned = prepare_model(model, args)
    assert trained_parameters(shape, mode) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_run_resumes_repeats_and_merges(kind: str, run_sft: Run, problems: Problems) -> None:
    flags = [word for name in KINDS[kind] for word in (f'--{name}', 'true')]
    whole = run_sft(*flags)
    stored = json.loads((whole / 'checkpoint-6' / 'adapter_config.json').read_text())
    assert {name: stored[name] for name in ('use_dora', 'use_rslora')} == {
        'use_dora': False, 'use_rslora': False, **KINDS[kind],
    }  # fmt: skip
    magnitudes = [tensor for name, tensor in weights(whole, 6).items() if 'magnitude' in name]
    assert len(magnitudes) == (0 if kind == 'rslora' else 14)
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    before = set(whole.parent.iterdir())
    assert llm_sft.main(['--from_run', str(whole)]) == 0
    (repeated,) = set(whole.parent.iterdir()) - before
    assert_equal(repeated / 'checkpoint-6', whole / 'checkpoint-6')
    assert llm_infer.main(['--ckpt_dir', str(whole / 'checkpoint-6'), '--merge_lora_and_save', 'true']) == 0
    assert json.loads((whole / 'proofs.json').read_text())['merge']['passed']

    run_sft('--resume_from_checkpoint', str(whole / 'checkpoint-3'), expect=2)
    assert problems() == [
        f'--{name} false: the adapter in {whole / "checkpoint-3"} was trained with --{name} true. Use --{name} true, '
        'or remove --resume_from_checkpoint to start a new run.'
        for name in KINDS[kind]
    ]


@pytest.mark.slow
@pytest.mark.optional
def test_dora_on_a_quantised_base_learns_resumes_and_merges(run_sft: Run) -> None:
    pytest.importorskip('bitsandbytes')
    flags = ('--use_dora', 'true', '--quantization_bit', '4', '--eval_steps', '2', '--save_total_limit', '-1')
    whole = run_sft(*flags)
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-4'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    first, last = (weights(whole, step) for step in (2, 6))
    changed = [name for name in first if 'magnitude' in name and not torch.equal(first[name], last[name])]
    assert len(changed) == 14
    assert llm_infer.main(['--ckpt_dir', str(whole / 'checkpoint-6'), '--merge_lora_and_save', 'true']) == 0
    assert json.loads((whole / 'proofs.json').read_text())['merge']['passed']


def test_dora_is_refused_where_it_cannot_work(
    run_sft: Run, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('utils.cli.machine.has_package', lambda name: True)
    run_sft('--use_dora', 'true', '--fsdp', 'true', expect=2)
    assert any(
        line.startswith('--fsdp true shards the weights, but --use_dora true needs the whole weight of a layer.')
        for line in problems()
    )
    run_sft('--use_dora', 'true', '--deepspeed_config_path', str(ROOT / 'ds_config/zero3.json'), expect=2)
    assert any('ZeRO stage 3 shards the weights, but --use_dora true needs' in line for line in problems())
    assert llm_sft.main(['--model_type', 'qwen-7b-chat-int4', '--use_dora', 'true', '--dry_run', 'true']) == 2
    assert any(
        line.startswith("--use_dora true: the weights of 'qwen-7b-chat-int4' are stored quantised (gptq), and PEFT has")
        for line in problems()
    )
    run_sft('--use_dora', 'true', '--quantization_bit', '8', expect=2)
    assert problems()[-1].startswith('--use_dora true cannot read the weights of --quantization_bit 8. Use --quant')
    args = SftArguments(lora_target_modules=['q_proj', 'experts.down_proj'], use_dora=True)
    with pytest.raises(ConfigError, match=r'--use_dora true is not possible on expert parameters \(mlp.experts.down'):
        prepare_model(make_modern('qwen3-30b-a3b'), args)


def test_dora_and_rslora_have_no_effect_on_full_fine_tuning() -> None:
    words = ['--model_type', 'llama2-7b', '--sft_type', 'full', '--use_dora', 'true', '--use_rslora', 'true']
    done = resolve_sft(parse(SftArguments, words, program='x', about=''))
    assert not done.problems.found
    for name in ('use_dora', 'use_rslora'):
        assert f'--{name} has no effect: it is for --sft_type lora.' in done.warnings

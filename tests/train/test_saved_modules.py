"""--lora_modules_to_save: layers trained whole beside the adapter, tied heads too, exactly and in fp32."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llm_infer
import llm_sft
from tests.support.exactness import LENGTHS, make_rows, plain_gradients
from tests.support.runs import ROOT, assert_equal, weights
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.data.collator import Collator
from utils.estimate.gpus import Machine, mode_of
from utils.estimate.memory import Batch, footprint, trained_parameters
from utils.estimate.model_shape import measure
from utils.fast.layout import exact_head, use_padding_free
from utils.fast.scoring import Scorer
from utils.model import get_model_info
from utils.train.prepare import prepare_model

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
WORDS = (['embed_tokens'], ['lm_head'], ['embed_tokens', 'lm_head', 'model.norm'])


def model_of(*, tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny Llama whose head is tied or not."""
    model = make_model()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.to(dtype)


def saved_to(folder: Path, *, tied: bool) -> Path:
    model_of(tied=tied).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def prepared(model: Any, words: list[str], **flags: Any) -> tuple[Any, SftArguments]:
    args = SftArguments(lora_target_modules=['q_proj', 'v_proj'], lora_modules_to_save=words, **flags)
    torch.manual_seed(1)
    return prepare_model(model, args).train(), args


@pytest.mark.parametrize('words', WORDS)
@pytest.mark.parametrize('tied', [False, True])
def test_loss_and_gradients_are_those_of_plain_training(tied: bool, words: list[str]) -> None:
    base = model_of(tied=tied)
    rows = make_rows(400)
    count = sum(row['trained'][1] - max(1, row['trained'][0]) for row in rows)
    plain, _ = prepared(copy.deepcopy(base), words, tuner_backend='peft', fused_norms=False, fused_mlp=False)
    expected_loss, expected = plain_gradients(plain, rows, count)
    fast, args = prepared(copy.deepcopy(base), words)
    inner = fast.get_base_model()
    assert use_padding_free(inner, args, longest=max(LENGTHS))
    head = exact_head(inner, args)
    assert head is not None, 'the loss is computed in chunks'
    loss = Scorer(inner, head).loss(fast, Collator(5, pads=False)(rows), count)
    loss.backward()
    assert abs(float(loss.detach()) - expected_loss) < 1e-5
    found = {name: p.grad for name, p in fast.named_parameters() if p.grad is not None}
    whole = [name for name in expected if 'modules_to_save' in name]
    assert found.keys() == expected.keys()
    assert len(whole) == (1 if tied else len(words)) + (tied and 'model.norm' in words)
    assert max(float((found[n] - g).abs().max()) for n, g in expected.items()) < 1e-5


@pytest.mark.parametrize('tied', [False, True])
def test_copies_of_16_bit_layers_are_held_in_fp32_and_compute_as_before(tied: bool) -> None:
    base = model_of(tied=tied, dtype=torch.bfloat16).eval()
    ids = torch.tensor([[3, 40, 41, 42, 4]])
    with torch.no_grad():
        before = base(ids).logits
        model, args = prepared(base, ['embed_tokens', 'lm_head', 'model.norm'])
        assert torch.equal(model.eval()(ids).logits, before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and 'modules_to_save' in name}
    assert {p.dtype for p in trained.values()} == {torch.float32} and len(trained) == (2 if tied else 3)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is output.weight) == tied
    head = exact_head(model.get_base_model(), args)
    assert head is not None and head.dtype == torch.bfloat16
    loss = Scorer(model.get_base_model(), head).loss(model.train(), Collator(5, pads=True)(make_rows(400)), 30)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


@pytest.mark.parametrize('words', [*WORDS, ['o_proj']])
@pytest.mark.parametrize('tied', [False, True])
def test_the_estimate_counts_what_is_trained(tied: bool, words: list[str]) -> None:
    model = model_of(tied=tied)
    shape = measure(model)
    args = SftArguments(lora_target_modules=['q_proj'], lora_modules_to_save=words)
    mode = mode_of(args, get_model_info(None, 'any'), shape, Machine())
    tuned = prepare_model(model, args)
    norms = 32 if 'model.norm' in words else 0
    assert trained_parameters(shape, mode) + norms == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    batch = Batch(tokens=40, longest=20, trained=30)
    bare = mode_of(SftArguments(lora_target_modules=['q_proj']), get_model_info(None, 'any'), shape, Machine())
    with_head, without = (footprint(shape, one, batch) for one in (mode, bare))
    more = trained_parameters(shape, mode) - trained_parameters(shape, bare)
    assert (with_head.adapter - without.adapter, with_head.optimizer - without.optimizer) == (4 * more, 8 * more)
    assert (with_head.logits > without.logits) == ('lm_head' in words or (tied and 'embed_tokens' in words))


@pytest.mark.slow
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_a_run_resumes_repeats_goes_on_and_merges(dtype: str, tied: bool, run_sft: Run, tmp_path: Path) -> None:
    folder = saved_to(tmp_path / 'base', tied=tied)
    flags = ('--model_id_or_path', str(folder), '--dtype', dtype)
    saving = ('--lora_modules_to_save', 'lm_head', 'embed_tokens')
    whole = run_sft(*flags, *saving)
    first, last = (weights(whole, step) for step in (3, 6))
    for name in ('model.embed_tokens', 'lm_head'):
        key = f'base_model.model.{name}.weight'
        assert last[key].dtype == torch.float32 and not torch.equal(first[key], last[key])
    assert torch.equal(*(last[f'base_model.model.{n}.weight'] for n in ('model.embed_tokens', 'lm_head'))) == tied

    resumed = run_sft(*flags, *saving, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    before = set(whole.parent.iterdir())
    assert llm_sft.main(['--from_run', str(whole)]) == 0
    (repeated,) = set(whole.parent.iterdir()) - before
    assert_equal(repeated / 'checkpoint-6', whole / 'checkpoint-6')

    checkpoint = whole / 'checkpoint-6'
    on = run_sft(*flags, '--adapter', str(checkpoint), '--max_steps', '2', '--eval_steps', '1')
    again = run_sft(
        *flags, '--max_steps', '2', '--eval_steps', '1', '--resume_from_checkpoint', str(on / 'checkpoint-1')
    )
    assert_equal(again / 'checkpoint-2', on / 'checkpoint-2')

    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    proof = json.loads((whole / 'proofs.json').read_text())['merge']
    assert proof['passed'] and f'{"tied" if tied else "separate"} head' in proof['says']
    merged = AutoModelForCausalLM.from_pretrained(f'{checkpoint}-merged', dtype=torch.float32)
    stored = last['base_model.model.lm_head.weight']
    assert torch.equal(merged.lm_head.weight, stored), 'the base is stored in fp32, whatever the dtype of the run'
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--max_new_tokens', '4', '--do_sample', 'false']) == 0


@pytest.mark.slow
def test_an_adapter_that_starts_a_run_has_its_exact_tensors(run_sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import get_peft_model_state_dict

    from utils.train import trainer

    started: dict[str, torch.Tensor] = {}
    build = trainer.build_trainer

    def noted(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        started.update(copy.deepcopy(get_peft_model_state_dict(built.model, save_embedding_layers=False)))
        return built

    flags = ('--dtype', 'bf16', '--max_steps', '3')
    run = run_sft(*flags, '--lora_modules_to_save', 'lm_head', 'model.norm')
    monkeypatch.setattr(trainer, 'build_trainer', noted)
    run_sft(*flags, '--adapter', str(run / 'checkpoint-3'))
    stored = weights(run, 3)
    assert started.keys() == stored.keys() and all(torch.equal(started[name], stored[name]) for name in stored)


@pytest.mark.slow
def test_other_layers_than_those_of_the_checkpoint_are_refused(run_sft: Run, problems: Problems) -> None:
    run = run_sft('--max_steps', '3', '--lora_modules_to_save', 'lm_head')
    resumed = ('--resume_from_checkpoint', str(run / 'checkpoint-3'))
    run_sft(*resumed, expect=2)
    assert problems()[-1] == (
        f'--lora_modules_to_save: {run / "checkpoint-3"} was trained with lm_head, and this run has no layer. Use the '
        'value of that run, or remove --resume_from_checkpoint to start a new run.'
    )
    run_sft('--adapter', str(run / 'checkpoint-3'), '--lora_modules_to_save', 'embed_tokens', expect=2)
    assert problems()[-1].startswith(
        '--lora_modules_to_save embed_tokens: the flag selects model.embed_tokens of LlamaForCausalLM, but the adapter '
        f'in {run / "checkpoint-3"} stores full weights of lm_head. Remove --lora_modules_to_save'
    )


@pytest.mark.parametrize(
    ('word', 'message'),
    [
        ('lm_hed', "'lm_hed' names no layer with weights: did you mean 'lm_head'?"),
        ('q_proj', "'q_proj' and --lora_target_modules both name model.layers.0.self_attn.q_proj. Remove it from one"),
        ('mlp', "'mlp' holds several layers. Name its layers instead, e.g. mlp.gate_proj."),
        ('self_attn', "'self_attn' and --lora_target_modules both name model.layers.0.self_attn. Remove it from one"),
    ],
)
def test_a_layer_that_cannot_be_trained_whole_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        prepared(make_model(), [word])
    assert raised.value.problems == (f'--lora_modules_to_save {message}',) or message in raised.value.problems[0]


@pytest.mark.optional
def test_quantised_and_frozen_layers_are_refused(model_dir: Path) -> None:
    pytest.importorskip('bitsandbytes')
    from tests.support.vision_models import QWEN25_VL, make_seeing_model, make_seeing_tokenizer
    from utils.loading.weights import locate
    from utils.run.open_model import open_model

    args = SftArguments(model_id_or_path=str(model_dir), quantization_bit=4, dtype='fp32')
    info = get_model_info(None, str(model_dir))
    model, _, _ = open_model(args, info, locate(info, revision='master'), trains=True)
    with pytest.raises(
        ConfigError, match=r"'o_proj' is a Linear4bit, whose weights cannot be trained whole. Remove it"
    ):
        prepared(model, ['o_proj'])
    tower = make_seeing_model(QWEN25_VL, make_seeing_tokenizer(QWEN25_VL))
    with pytest.raises(ConfigError, match='names no layer with weights.* belongs to the vision tower: add --freeze_vi'):
        prepared(tower, ['merger.ln_q'])


def test_sharded_weights_are_refused(run_sft: Run, problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('utils.cli.machine.has_package', lambda name: True)
    saving = ('--lora_modules_to_save', 'lm_head')
    run_sft(*saving, '--fsdp', 'true', expect=2)
    run_sft(*saving, '--deepspeed_config_path', str(ROOT / 'ds_config/zero3.json'), expect=2)
    for start in ('--fsdp true shards the weights, but --lora_modules_to_save needs', '--deepspeed_config_path '):
        assert any(line.startswith(start) and '--lora_modules_to_save' in line for line in problems())


@pytest.mark.slow
@pytest.mark.optional
def test_a_quantised_base_trains_its_head_whole(run_sft: Run) -> None:
    pytest.importorskip('bitsandbytes')
    flags = ('--quantization_bit', '4', '--lora_modules_to_save', 'lm_head')
    whole = run_sft(*flags)
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    assert llm_infer.main(['--ckpt_dir', str(whole / 'checkpoint-6'), '--merge_lora_and_save', 'true']) == 0

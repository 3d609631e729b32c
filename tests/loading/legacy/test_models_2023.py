"""The 47 models of 2023 in their original layouts at toy size: each family is tested, each key runs the programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.support.old_models import FACTS, KEYS, PROVEN, SOURCES, original_folder
from tests.support.runs import small_flags
from tests.support.tiny_models import make_tokenizer
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.encode.make import make_encoder
from utils.export.merge import merge_and_save
from utils.formats.conversation import Row
from utils.loading.info import LoadOptions
from utils.loading.layers import ALL_LINEAR, find_towers, linear_names
from utils.loading.opening import get_model_tokenizer
from utils.loading.packed import packed_classes
from utils.loading.weights import locate
from utils.model import MODEL_MAPPING, get_model_info, load_model, load_tokenizer
from utils.run.open_model import open_model
from utils.run.record import RunRecord
from utils.train.prepare import prepare_model

QKV = ('q_proj', 'k_proj', 'v_proj')

# Those of the 47 that are registered.
REGISTERED = 47
OUR_CLASSES = {'baichuan-13b', 'baichuan2-13b', 'baichuan2-13b-chat-int4', 'qwen-vl'}


def test_entries_are_those_of_the_facts() -> None:
    assert len(FACTS) == 47 and len(KEYS) == REGISTERED
    dtypes = {'float16': 'fp16', 'bfloat16': 'bf16'}
    # Native names of the fused layers of 2023; GPT-2 and Bloom still have fused layers.
    native = {'c_attn': QKV, 'W_pack': QKV, 'query_key_value': QKV}
    for key in KEYS:
        info, facts = MODEL_MAPPING[key], FACTS[key]
        assert (
            info.model_id_or_path == facts['model_id_modelscope'] and info.hf_model_id == facts['model_id_huggingface']
        )
        assert (info.template, info.revision) == (facts['template'], 'master')
        assert info.torch_dtype == dtypes.get(facts.get('torch_dtype'))
        assert list(info.ignore_file_pattern) == facts.get('ignore_file_pattern', [])
        old = facts['lora_target_modules_2023']
        kept = key in ('polylm-13b', 'seqgpt-560m') or old == list(QKV)
        assert info.lora_target_modules == (tuple(old) if kept else native[old[0]])
        assert info.family is None or info.family in SOURCES
        assert (info.quantization is not None) == ('-int' in key)
    assert set(SOURCES) <= {MODEL_MAPPING[key].family for key in KEYS}
    assert {MODEL_MAPPING[key].family for key in PROVEN} == {*SOURCES, None} and len(PROVEN) == 21


def test_template_of_each_entry_renders() -> None:
    tokenizer = make_tokenizer(chat_template=None)
    row = Row(messages=[{'role': 'user', 'content': 'name a colour'}, {'role': 'assistant', 'content': 'blue'}])
    rendered = 0
    for key in KEYS:
        template = MODEL_MAPPING[key].template
        encoder = make_encoder(tokenizer, template_type=template, system='x', system_typed=False, max_length=-1)
        encoded = encoder.encode([row])[0]
        start, end = encoded.trained
        assert 'name a colour' in tokenizer.decode(encoded.input_ids[:start]), key
        assert tokenizer.decode(encoded.input_ids[start:end]).startswith('blue'), key
        rendered += 1
    assert rendered == REGISTERED


def batch(model: Any) -> dict[str, Any]:
    """Return random tokens to memorise."""
    import torch

    size = min(model.config.vocab_size, 300)
    ids = torch.randint(5, size, (2, 20), generator=torch.Generator().manual_seed(0))
    return {'input_ids': ids, 'labels': ids}


def logits_of(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=batch(model)['input_ids'], use_cache=False).logits


def gradients(model: Any, weights: list[Any]) -> list[Any]:
    """Return the gradient of each weight for the batch, with the same dropout each time."""
    import torch

    torch.manual_seed(1)
    for weight in weights:
        weight.grad = None
    model.train()(**batch(model), use_cache=False).loss.backward()
    return [weight.grad.clone() for weight in weights]


def check_it_trains(tuned: Any) -> list[Any]:
    """Evaluate and train alternately, 5 steps: all gradients exist, the loss falls. Returns the trained weights."""
    import torch

    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.02)
    losses = []
    for step in range(6):
        with torch.no_grad():
            losses.append(float(tuned.eval()(**batch(tuned), use_cache=False).loss))
        if step < 5:
            gradients(tuned, weights)
            optimizer.step()
    assert losses[-1] < losses[0] - 0.05, losses
    base = tuned.get_base_model()
    assert len(weights) >= 2 * len(linear_names(base, find_towers(base))) > 0
    assert all(float(found.abs().max()) > 0 for found in gradients(tuned, weights))
    return weights


@pytest.mark.slow
@pytest.mark.parametrize('key', PROVEN)
def test_family_trains_reloads_and_merges(key: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = original_folder(key, tmp_path)
    tokenizer = load_tokenizer(folder, model_type=key)

    def base() -> Any:
        return load_model(folder, model_type=key, torch_dtype=torch.float32)

    torch.manual_seed(0)
    tuned = prepare_model(base(), SftArguments(lora_target_modules=[ALL_LINEAR]))
    weights = check_it_trains(tuned)
    plain = gradients(tuned, weights)
    tuned.get_base_model().gradient_checkpointing_enable({'use_reentrant': False})
    for with_checkpoints, without in zip(gradients(tuned, weights), plain, strict=True):
        torch.testing.assert_close(with_checkpoints, without, atol=1e-6, rtol=1e-4)
    wanted = logits_of(tuned)
    tuned.save_pretrained(tmp_path / 'adapter')
    again = PeftModel.from_pretrained(base(), str(tmp_path / 'adapter'))
    torch.testing.assert_close(logits_of(again), wanted, atol=1e-5, rtol=1e-5)
    if MODEL_MAPPING[key].quantization == 'gptq':  # see test_model_trains_and_answers: merging is refused
        return
    merged = tmp_path / 'merged'
    merge_and_save(tuned, tokenizer, merged, record=RunRecord())
    if key in OUR_CLASSES:
        with pytest.raises(ValueError, match='assay_'):
            AutoModelForCausalLM.from_pretrained(merged)
        opened = load_model(merged, torch_dtype=torch.float32)
        read = load_tokenizer(merged)
    else:
        opened = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        read = AutoTokenizer.from_pretrained(merged)
        assert type(opened).__module__.startswith('transformers.')
    torch.testing.assert_close(logits_of(opened), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    for text in ('name a colour', '今天天气很好 <|im_end|></s>', ' 3.14  \n\tx'):
        assert read(text)['input_ids'] == tokenizer(text)['input_ids']
    assert tokenizer.eos_token_id in [opened.generation_config.eos_token_id, *ends(opened.generation_config)]


def ends(settings: Any) -> list[int]:
    return settings.eos_token_id if isinstance(settings.eos_token_id, list) else []


@pytest.mark.slow
@pytest.mark.optional
@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('key', [key for key in PROVEN if MODEL_MAPPING[key].quantization != 'gptq'])
def test_family_is_packed_on_load_and_trains(key: str, bits: int, tmp_path: Path) -> None:
    import bitsandbytes
    import torch

    args = SftArguments(quantization_bit=bits, dtype='fp32', lora_target_modules=[ALL_LINEAR])
    info = get_model_info(key, str(original_folder(key, tmp_path)))
    model, _, _ = open_model(args, info, locate(info, revision='master'), trains=True)
    packed = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear
    count = sum(isinstance(module, packed) for module in model.modules())
    assert count == linear_names(model, find_towers(model)).total() > 0
    torch.manual_seed(0)
    check_it_trains(prepare_model(model, args))


@pytest.mark.slow
@pytest.mark.optional
def test_the_4_bits_of_2023_are_packed_anew_by_the_program(
    tmp_path: Path, data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = original_folder('baichuan2-13b-chat-int4', tmp_path)
    words = small_flags(folder, data_file, tmp_path / 'out')
    assert llm_sft.main([*words, '--quantization_bit', '4', '--max_steps', '2', '--max_length', '60']) == 0
    assert 'the 4-bit weights are unpacked while loading: they take' in caplog.text
    run = next((tmp_path / 'out').glob('baichuan2-13b-chat-int4/v0-*'))
    record = json.loads((run / 'sft_args.json').read_text())
    assert (record['quantization_bit'], record['template_type']) == (4, 'baichuan')


@pytest.mark.parametrize('key', ['baichuan-13b', 'seqgpt-560m', 'qwen-7b'])
def test_flash_attention_is_left_out_where_a_class_has_none(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise a GPU could open none of these. A class that supports it reports that it is not installed here."""
    import torch

    folder = original_folder(key, tmp_path)
    info = get_model_info(key, str(folder))
    options = LoadOptions(torch_dtype=torch.bfloat16, flash_attention=True)
    if key == 'qwen-7b':
        with pytest.raises(ConfigError, match=r'[Ff]lash'):
            get_model_tokenizer(info, locate(info, revision='master'), options)
        return
    model, _ = get_model_tokenizer(info, locate(info, revision='master'), options)
    assert model.config._attn_implementation in ('eager', 'sdpa')
    assert f'because {type(model).__name__} does not support flash attention' in caplog.text


def test_a_tensor_that_a_native_class_does_not_know_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = original_folder('ziya2-13b', tmp_path)
    state = load_file(folder / 'model.safetensors')
    assert any(name.endswith('rotary_emb.inv_freq') for name in state)
    load_model(folder)
    assert not caplog.text
    save_file({**state, 'model.layers.0.extra.weight': torch.ones(3)}, folder / 'model.safetensors')
    load_model(folder)
    named = 'LlamaForCausalLM does not use 1 tensors of the weight files, for example model.layers.0.extra.weight'
    assert f'{folder}: {named}. The model is used without them.' in caplog.text


@pytest.mark.slow
@pytest.mark.optional
@pytest.mark.parametrize('dtype', ['fp16', 'fp32'])
@pytest.mark.parametrize('key', ['qwen-7b-chat-int4', 'qwen-7b-chat-int8'])
def test_gptq_weights_stay_packed_and_train(key: str, dtype: str, tmp_path: Path) -> None:
    import torch

    args = SftArguments(dtype=dtype, lora_target_modules=[ALL_LINEAR])
    info = get_model_info(key, str(original_folder(key, tmp_path)))
    model, _, _ = open_model(args, info, locate(info, revision='master'), trains=True)
    layers = [module for module in model.modules() if isinstance(module, packed_classes())]
    assert len(layers) == linear_names(model).total() == 14
    # No test waits for a compiler.
    assert not any('dequantize_weight' in vars(layer) for layer in layers)
    assert not [name for name, layer in model.model.named_modules() if type(layer) is torch.nn.Linear]
    tuned = prepare_model(model, args)
    assert sum(type(module).__name__ == 'FusedGPTQLoraLinear' for module in tuned.modules()) == 14
    assert {type(layer).__name__ for layer in layers} == {'FusedTorchLinear'}
    if dtype == 'fp32':
        torch.manual_seed(0)
        check_it_trains(tuned)


@pytest.mark.slow
@pytest.mark.parametrize('key', KEYS)
def test_model_trains_and_answers(key: str, tmp_path: Path, data_file: Path) -> None:
    folder = original_folder(key, tmp_path)
    out = tmp_path / 'out'
    # One key of each family runs the first-step gate and 5 steps. The others use the same code with another entry.
    is_first = key in PROVEN
    steps = '5' if is_first else '2'
    # The toy PolyLM has 64 learned positions.
    flags = [
        '--max_length', '60', '--max_steps', steps, '--eval_steps', steps, '--learning_rate', '0.003',
        '--model_id_or_path', str(folder), '--preflight', str(is_first).lower(),
    ]  # fmt: skip
    info = MODEL_MAPPING[key]
    assert llm_sft.main([*small_flags(folder, data_file, out), *flags]) == 0
    # The folder has the hub's name; if several keys have this name, the first one is meant.
    run = next(out.glob('*/v0-*'))
    args = json.loads((run / 'sft_args.json').read_text())
    assert MODEL_MAPPING[args['model_type']].model_id_or_path == info.model_id_or_path
    assert args['template_type'] == info.template
    checkpoint = run / f'checkpoint-{steps}'
    targets = json.loads((checkpoint / 'adapter_config.json').read_text())['target_modules']
    assert sorted(targets) == sorted(info.lora_target_modules)
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--do_sample', 'false', '--max_new_tokens', '3']) == 0
    assert len((checkpoint / 'infer_result.jsonl').read_text().splitlines()) == 4
    merges = llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true'])
    assert merges == (2 if info.quantization else 0)

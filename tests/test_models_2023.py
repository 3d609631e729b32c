"""Each of the 47 models of 2023, in its original layout at toy size, through the programs themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.conftest import ROOT, make_model, make_tokenizer, small_flags
from utils.model import MODEL_MAPPING, ModelInfo
from utils.native.registry import FAMILIES
from utils.preprocess import TEMPLATE_MAPPING

GOLDENS = ROOT / 'tests' / 'goldens'
SENTENCEPIECE = {'tokenizer.model': 'internlm.model'}
BAICHUAN = {'tokenizer.model': 'baichuan.model'}
# Family -> the checkpoint it is tried with and the vocabulary files beside it, by the names the hub has.
SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    'qwen': ('qwen-a', {'qwen.tiktoken': 'qwen.tiktoken'}),
    'qwen_gptq': ('qwen_gptq-a', {'qwen.tiktoken': 'qwen.tiktoken'}),
    'baichuan_7b': ('baichuan7b-a', BAICHUAN),
    'baichuan2_7b': ('baichuan2_7b-a', BAICHUAN),
    'baichuan_13b': ('baichuan_13b-a', BAICHUAN),
    'baichuan2_13b': ('baichuan2_13b-a', BAICHUAN),
    'baichuan2_7b_4bits': ('baichuan2_13b_4bits-a', BAICHUAN),
    'baichuan2_13b_4bits': ('baichuan2_13b_4bits-a', BAICHUAN),
    'internlm': ('internlm-a', SENTENCEPIECE),
    'chatglm2': ('chatglm2-a', SENTENCEPIECE),
    'chatglm2_32k': ('chatglm2-a', SENTENCEPIECE),
    'polylm': ('polylm-a', BAICHUAN),
    'xverse': ('xverse-a', {}),
}

QWEN_VL = ('qwen-vl', 'qwen-vl-chat', 'qwen-vl-chat-int4')
FAMILY_KEYS = [key for key, info in MODEL_MAPPING.items() if info.family is not None]
NATIVE_KEYS = [
    'llama2-7b', 'llama2-13b', 'llama2-70b', 'llama2-7b-chat', 'llama2-13b-chat', 'llama2-70b-chat', 'seqgpt-560m',
    'openbuddy-llama2-13b-chat', 'openbuddy-llama-65b-chat', 'openbuddy-llama2-70b-chat', 'openbuddy-mistral-7b-chat',
    'mistral-7b', 'mistral-7b-chat', 'ziya2-13b', 'ziya2-13b-chat',
]  # fmt: skip


def original_folder(key: str, folder: Path) -> Path:
    """Write a toy checkpoint of a model's family in its original layout, with the hub's vocabulary files."""
    info = MODEL_MAPPING[key]
    folder = folder / info.model_id_or_path.split('/')[1]
    if info.family is None:
        return native_folder(info, folder)
    golden, vocabulary = SOURCES[info.family]
    shutil.copytree(GOLDENS / golden, folder)
    (folder / 'expected.safetensors').unlink()
    if info.family == 'baichuan2_7b_4bits':  # told from the 13B, whose positions are ALiBi, by this field
        config = json.loads((folder / 'config.json').read_text())
        config['max_position_embeddings'] = config.pop('model_max_length')
        (folder / 'config.json').write_text(json.dumps(config))
    for name, source in vocabulary.items():
        shutil.copy(GOLDENS / 'tokenizers' / source, folder / name)
    family = FAMILIES[info.family]
    if not vocabulary:
        make_tokenizer(chat_template=None).save_pretrained(folder)
    assert family.tokenizer is not None
    widen(folder, template_size(info, len(family.tokenizer(folder))))
    return folder


def native_folder(info: ModelInfo, folder: Path) -> Path:
    import transformers as t

    small = {'vocab_size': 400, 'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4}
    if 'mistral' in info.model_id_or_path.lower():
        model = t.MistralForCausalLM(t.MistralConfig(**small, intermediate_size=64, num_key_value_heads=2))
    elif 'seqgpt' in info.model_id_or_path:
        model = t.BloomForCausalLM(t.BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4))
    else:
        model = make_model()
    model.save_pretrained(folder)
    make_tokenizer(chat_template=None).save_pretrained(folder)
    return folder


def template_size(info: ModelInfo, tokens: int) -> int:
    """Return how many rows an embedding needs for the tokenizer and for the ids that the template names."""
    template = TEMPLATE_MAPPING[info.template]
    assert template is not None
    pieces = (*template.prefix, *template.prompt, *(template.chat_sep or ()), *template.suffix)
    named = [i for piece in pieces if isinstance(piece, tuple) for i in piece if isinstance(i, int)]
    return max([tokens, *(i + 1 for i in named)]) + 7


def widen(folder: Path, size: int) -> None:
    """Give the checkpoint's vocabulary `size` rows, the new ones random and small."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / 'config.json').read_text())
    old = config.get('padded_vocab_size') or config['vocab_size']
    is_bin = (folder / 'pytorch_model.bin').is_file()
    file = folder / ('pytorch_model.bin' if is_bin else 'model.safetensors')
    state: dict[str, Any] = torch.load(file, weights_only=True) if is_bin else load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[0] == old and size > old:
            new = 0.02 * torch.randn((size - old, tensor.shape[1]), generator=generator)
            state[name] = torch.cat([tensor, new.to(tensor.dtype)])
    for name in ('vocab_size', 'padded_vocab_size'):
        if name in config:
            config[name] = max(size, old)
    (folder / 'config.json').write_text(json.dumps(config))
    if is_bin:
        torch.save(state, file)
    else:
        save_file(state, file)


def test_entries_of_all_47_models() -> None:
    keys = [*FAMILY_KEYS, *NATIVE_KEYS]
    assert len(set(keys)) == len(keys)
    for key in keys:
        info = MODEL_MAPPING[key]
        assert info.template in TEMPLATE_MAPPING and info.lora_target_modules
        assert info.family is None or info.family in SOURCES
    assert len(keys) + len(QWEN_VL) == 47
    assert set(SOURCES) == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize('key', [*FAMILY_KEYS, *NATIVE_KEYS])
def test_model_trains_and_answers(key: str, tmp_path: Path, data_file: Path) -> None:
    folder = original_folder(key, tmp_path)
    out = tmp_path / 'out'
    # The toy PolyLM has 64 learned positions.
    flags = [
        '--max_length',
        '60',
        '--max_steps',
        '5',
        '--eval_steps',
        '5',
        '--learning_rate',
        '0.003',
        '--model_id_or_path',
        str(folder),
    ]
    info = MODEL_MAPPING[key]
    assert llm_sft.main([*small_flags(folder, data_file, out), *flags]) == 0
    # The folder has the hub's name; where several keys share a family the first of that name is meant.
    run = next(out.glob('*/v0-*'))
    args = json.loads((run / 'sft_args.json').read_text())
    assert MODEL_MAPPING[args['model_type']].model_id_or_path == info.model_id_or_path
    assert args['template_type'] == info.template
    targets = json.loads((run / 'checkpoint-5' / 'adapter_config.json').read_text())['target_modules']
    assert sorted(targets) == sorted(info.lora_target_modules)
    checkpoint = run / 'checkpoint-5'
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--do_sample', 'false', '--max_new_tokens', '3']) == 0
    assert len((checkpoint / 'infer_result.jsonl').read_text().splitlines()) == 4
    merges = llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true'])
    assert merges == (2 if info.quantization else 0)

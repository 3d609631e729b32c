"""Folders in the layouts of 2023."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.runs import ROOT
from tests.support.tiny_models import make_model, make_tokenizer
from utils.loading.info import ModelInfo
from utils.loading.legacy.family import State
from utils.loading.legacy.registry import FAMILIES
from utils.model import MODEL_MAPPING
from utils.preprocess import TEMPLATE_MAPPING

GOLDENS = ROOT / 'tests' / 'goldens'
SENTENCEPIECE = {'tokenizer.model': 'internlm.model'}
BAICHUAN = {'tokenizer.model': 'baichuan.model'}
# Family -> the checkpoint for its tests and the vocabulary files next to it, by the names on the hub.
SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    'qwen': ('qwen-a', {'qwen.tiktoken': 'qwen.tiktoken'}),
    'qwen_gptq': ('qwen_gptq-a', {'qwen.tiktoken': 'qwen.tiktoken'}),
    'qwen_vl': ('qwenvl-a', {'qwen.tiktoken': 'qwen.tiktoken'}),
    'qwen_vl_gptq': ('qwenvl-a', {'qwen.tiktoken': 'qwen.tiktoken'}),
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
FACTS = {entry['model_type']: entry for entry in json.loads((GOLDENS / 'models_2023.json').read_text())}
KEYS = [key for key in FACTS if key in MODEL_MAPPING]
# One key of each family that has several sizes.
PROVEN = (
    'qwen-7b', 'qwen-7b-chat-int4', 'qwen-7b-chat-int8', 'baichuan-7b', 'baichuan-13b', 'baichuan2-7b', 'baichuan2-13b',
    'baichuan2-7b-chat-int4', 'baichuan2-13b-chat-int4', 'chatglm2-6b', 'chatglm2-6b-32k', 'internlm-7b',
    'internlm-7b-chat-8k', 'xverse-7b', 'polylm-13b', 'seqgpt-560m', 'ziya2-13b', 'llama2-7b', 'mistral-7b',
    'qwen-vl', 'qwen-vl-chat-int4',
)  # fmt: skip


def original_folder(key: str, folder: Path) -> Path:
    """Write a toy checkpoint of a model's family in its original layout, with the hub's vocabulary files."""
    info = MODEL_MAPPING[key]
    folder = folder / info.model_id_or_path.split('/')[1]
    if info.family is None:
        return native_folder(info, folder)
    golden, vocabulary = SOURCES[info.family]
    copy_golden(golden, folder)
    if key.endswith('int8'):
        write_int8(folder)
    with change_config(folder) as config:
        if info.family == 'baichuan2_7b_4bits':  # this field distinguishes it from the 13B, which uses ALiBi
            config['max_position_embeddings'] = config.pop('model_max_length')
        if key == 'chatglm2-6b-32k':
            config['rope_ratio'] = 4
        if key == 'internlm-7b-chat-8k':
            config['rotary'] = {'base': 10000, 'type': 'dynamic'}
    for name, source in vocabulary.items():
        shutil.copy(GOLDENS / 'tokenizers' / source, folder / name)
    family = FAMILIES[info.family]
    if not vocabulary:
        make_tokenizer(chat_template=None).save_pretrained(folder)
    assert family.tokenizer is not None
    tokenizer = family.tokenizer(folder)
    if golden == 'qwenvl-a':
        move_image_tags(folder, tokenizer.convert_tokens_to_ids('<img>'), packed=info.quantization is not None)
    widen(folder, template_size(info, len(tokenizer)))
    return folder


def copy_golden(name: str, folder: Path) -> None:
    shutil.copytree(GOLDENS / name, folder)
    (folder / 'expected.safetensors').unlink()


@contextlib.contextmanager
def change_config(folder: Path) -> Iterator[dict[str, Any]]:
    config = json.loads((folder / 'config.json').read_text())
    yield config
    (folder / 'config.json').write_text(json.dumps(config))


def write_int8(folder: Path) -> None:
    """Replace the 4-bit layers of a checkpoint by 8-bit ones."""

    eight, _ = gptq_checkpoint(folder.with_name('int8'), bits=8, group=32, act_order=True)
    for name in ('config.json', 'model.safetensors'):
        shutil.move(eight / name, folder / name)


def native_folder(info: ModelInfo, folder: Path) -> Path:
    import transformers as t

    name = info.model_id_or_path.lower()
    if 'mistral' in name:
        small = {'vocab_size': 400, 'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4}
        t.MistralForCausalLM(t.MistralConfig(**small, intermediate_size=64, num_key_value_heads=2)).save_pretrained(
            folder
        )
    elif 'seqgpt' in name or 'ziya2' in name:
        copy_golden('seqgpt-a' if 'seqgpt' in name else 'ziya2-a', folder)
        widen(folder, 400)
    else:
        make_model().save_pretrained(folder)
    make_tokenizer(chat_template=None).save_pretrained(folder)
    return folder


def move_image_tags(folder: Path, start: int, *, packed: bool) -> None:
    """Give the toy Qwen-VL the image tag ids of its toy tokenizer and, with `packed`, 4-bit text layers."""
    from safetensors.torch import save_file

    config = json.loads((folder / 'config.json').read_text())
    config['visual']['image_start_id'] = start
    if packed:
        config, state, _ = pack_text(config, load_file(folder / 'model.safetensors'), group=16)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))


def template_size(info: ModelInfo, tokens: int) -> int:
    """Return how many rows an embedding needs for the tokenizer and for the ids that the template names."""
    template = TEMPLATE_MAPPING[info.template]
    assert template is not None
    pieces = (*template.prefix, *template.prompt, *(template.chat_sep or ()), *template.suffix)
    named = [i for piece in pieces if isinstance(piece, tuple) for i in piece if isinstance(i, int)]
    return max([tokens, *(i + 1 for i in named)]) + 7


def widen(folder: Path, size: int) -> None:
    """Give the checkpoint's vocabulary `size` rows; new rows are random and small."""
    import torch
    from safetensors.torch import save_file

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


GOLDENS = ROOT / 'tests' / 'goldens'
PLAIN, PACKED = GOLDENS / 'qwen-a', GOLDENS / 'qwen_gptq-a'


def read_json(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / 'config.json').read_text())
    return config


def write_checkpoint(folder: Path, config: Mapping[str, Any], state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(state, folder / 'model.safetensors')
    return folder


def random_state(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights in the original layout."""
    torch.manual_seed(seed)
    hidden, width, vocab = config['hidden_size'], config['intermediate_size'] // 2, config['vocab_size']
    shapes: dict[str, tuple[int, ...]] = {
        'transformer.wte.weight': (vocab, hidden), 'transformer.ln_f.weight': (hidden,),
        'lm_head.weight': (vocab, hidden),
    }  # fmt: skip
    for i in range(config['num_hidden_layers']):
        for name, shape in {
            'ln_1.weight': (hidden,), 'ln_2.weight': (hidden,), 'attn.c_attn.weight': (3 * hidden, hidden),
            'attn.c_attn.bias': (3 * hidden,), 'attn.c_proj.weight': (hidden, hidden), 'mlp.w1.weight': (width, hidden),
            'mlp.w2.weight': (width, hidden), 'mlp.c_proj.weight': (hidden, width),
        }.items():  # fmt: skip
            shapes[f'transformer.h.{i}.{name}'] = shape
    return {
        name: 1 + 0.1 * torch.randn(shape) if 'ln_' in name else torch.randn(shape) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


def pack(integers: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Return the integers packed along an axis into int32, lowest bits first."""
    moved = integers.movedim(axis, -1).to(torch.uint8)
    if bits == 4:
        moved = moved[..., 0::2] | (moved[..., 1::2] << 4)
    return moved.contiguous().view(torch.int32).movedim(-1, axis).contiguous()


def quantised(
    outputs: int,
    inputs: int,
    *,
    bits: int,
    group: int,
    symmetric: bool = True,
    act_order: bool = False,
    offset: int = 1,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return random GPTQ tensors of a layer and the weight that they encode, (outputs, inputs) in fp32."""
    groups, top = inputs // group, 2**bits
    integers = torch.randint(top, (inputs, outputs))
    zeros = torch.full((groups, outputs), top // 2) if symmetric else torch.randint(1, top, (groups, outputs))
    # Weights of about the same size for any number of bits.
    scales = ((torch.rand(groups, outputs) * 0.3 + 0.02) / top).half()
    index = torch.arange(inputs) // group
    if act_order:
        index = index[torch.randperm(inputs)]
    weight = torch.stack([(integers[i] - zeros[g]) * scales[g].float() for i, g in enumerate(index.tolist())], dim=1)
    tensors = {'qweight': pack(integers, bits, 0), 'qzeros': pack(zeros - offset, bits, 1), 'scales': scales}
    return {**tensors, 'g_idx': index.to(torch.int32)}, weight


def gptq_checkpoint(folder: Path, *, bits: int, group: int, act_order: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a quantised checkpoint with random weights. Returns it and the plain state that it encodes."""
    config = read_json(PACKED)
    settings = config['quantization_config'] | {'bits': bits, 'group_size': group, 'desc_act': act_order, 'sym': False}
    plain, stored = random_state(config, seed=3), {}
    for key, tensor in dict(plain).items():
        if tensor.dim() == 2 and '.h.' in key:
            layer = key.removesuffix('.weight')
            rows = tensor.shape[1] if group == -1 else group
            tensors, plain[key] = quantised(*tensor.shape, bits=bits, group=rows, symmetric=False, act_order=act_order)
            stored |= {f'{layer}.{name}': value for name, value in tensors.items()}
            stored.setdefault(f'{layer}.bias', torch.zeros(tensor.shape[0]).half())
        else:
            stored[key] = plain[key] = tensor.half() if key.endswith('.bias') else tensor
    return write_checkpoint(folder, config | {'quantization_config': settings}, stored), plain


def pack_text(config: dict[str, Any], state: State, group: int = 8) -> tuple[dict[str, Any], State, State]:
    """Return config.json and tensors of random 4-bit text layers, and the plain tensors that they encode."""
    torch.manual_seed(1)
    packed, plain = {}, dict(state)
    for key in state:
        if not key.startswith('transformer.h.') or '.ln_' in key or not key.endswith('.weight'):
            packed[key] = state[key]
            continue
        layer, (outputs, inputs) = key.removesuffix('.weight'), state[key].shape
        integers, zeros = torch.randint(16, (inputs, outputs)), torch.randint(15, (inputs // group, outputs))
        scales = (torch.rand(inputs // group, outputs) * 0.02).half()
        groups = torch.arange(inputs) // group
        plain[key] = ((integers - zeros[groups] - 1) * scales[groups].float()).t()
        words = sum(integers.view(-1, 8, outputs)[:, n] << (4 * n) for n in range(8))
        zero_words = sum(zeros.view(inputs // group, -1, 8)[:, :, n] << (4 * n) for n in range(8))
        packed |= {
            f'{layer}.qweight': torch.as_tensor(words).to(torch.int32), f'{layer}.scales': scales,
            f'{layer}.qzeros': torch.as_tensor(zero_words).to(torch.int32), f'{layer}.g_idx': groups.to(torch.int32),
        }  # fmt: skip
        if '.attn.c_attn' not in layer:
            packed[f'{layer}.bias'] = torch.zeros(outputs).half()
    settings = {'quant_method': 'gptq', 'bits': 4, 'group_size': group, 'desc_act': False, 'sym': True}
    return {**config, 'quantization_config': settings}, packed, plain


# SeqGPT is a Bloom and Ziya2 a Llama: transformers opens their files directly.
NATIVE = {'seqgpt-a': 'BloomForCausalLM', 'ziya2-a': 'LlamaForCausalLM'}

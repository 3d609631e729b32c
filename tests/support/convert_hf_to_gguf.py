"""Stands for the converter of llama.cpp in tests: writes a Llama model with a byte-level tokenizer as a GGUF file.

A file `fault` beside this script makes it fail or write a wrong file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
NAMES = {
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}
TYPES = {
    'f32': gguf.GGMLQuantizationType.F32,
    'f16': gguf.GGMLQuantizationType.F16,
    'bf16': gguf.GGMLQuantizationType.BF16,
    'q8_0': gguf.GGMLQuantizationType.Q8_0,
}


def name_of(name: str) -> str:
    """Return the name of a tensor in GGUF."""
    stem = name.removesuffix('.weight')
    if stem.startswith('model.layers.'):
        _, _, layer, inner = stem.split('.', 3)
        return f'blk.{layer}.{NAMES[inner]}.weight'
    return f'{NAMES[stem]}.weight'


def permuted(weight: Any, heads: int) -> Any:
    """Return a projection with the two halves of each head interleaved, as llama.cpp has them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(writer: Any, folder: Path, fault: str) -> None:
    content = json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))
    control = {token['content'] for token in content['added_tokens']}
    vocab = content['model']['vocab'] | {token['content']: token['id'] for token in content['added_tokens']}
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [' '.join(pair) for pair in content['model']['merges']]
    if fault == 'tokens':
        merges = merges[:-40]
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('gpt-2')
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges(merges)
    settings = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))
    for kind, add in (
        ('bos', writer.add_bos_token_id),
        ('eos', writer.add_eos_token_id),
        ('pad', writer.add_pad_token_id),
    ):
        add(vocab[settings[f'{kind}_token']])
    writer.add_add_bos_token(fault == 'bos')
    template = (folder / 'chat_template.jinja').read_text(encoding='utf-8')
    writer.add_chat_template(template.replace('<|im_end|>', ' <|im_end|>') if fault == 'template' else template)


def write_settings(writer: Any, config: dict[str, Any], fault: str) -> None:
    writer.add_context_length(config['max_position_embeddings'])
    writer.add_embedding_length(config['hidden_size'])
    writer.add_block_count(config['num_hidden_layers'])
    writer.add_feed_forward_length(config['intermediate_size'])
    writer.add_head_count(config['num_attention_heads'])
    writer.add_head_count_kv(config['num_key_value_heads'])
    writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
    writer.add_rope_freq_base(config['rope_parameters']['rope_theta'])
    writer.add_rope_dimension_count(config['head_dim'])
    writer.add_vocab_size(config['vocab_size'])
    if fault == 'setting':
        writer.add_logit_scale(2.0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument('model', type=Path)
    parser.add_argument('--outfile', type=Path, required=True)
    parser.add_argument('--outtype', choices=TYPES, required=True)
    args = parser.parse_args()
    fault = (HERE / 'fault').read_text() if (HERE / 'fault').is_file() else ''
    if fault == 'fails':
        print(f'token {os.environ.get("HF_TOKEN")} of {Path.home()}', file=sys.stderr)
        raise NotImplementedError('Architecture is not supported')
    if fault == 'writes nothing':
        return 0

    config = json.loads((args.model / 'config.json').read_text(encoding='utf-8'))
    writer = gguf.GGUFWriter(args.outfile, 'llama' if fault != 'architecture' else 'mamba')
    write_settings(writer, config, fault)
    write_tokenizer(writer, args.model, fault)
    heads = {'attn_q': config['num_attention_heads'], 'attn_k': config['num_key_value_heads']}
    for name, tensor in load_file(args.model / 'model.safetensors').items():
        stored = name_of(name)
        weight = tensor.astype(np.float32)
        count = next((count for part, count in heads.items() if f'.{part}.' in stored), None)
        if count is not None and fault != 'weights':
            weight = permuted(weight, count)
        kind = TYPES[args.outtype] if weight.ndim > 1 else TYPES['f32']
        writer.add_tensor(stored, np.ascontiguousarray(gguf.quants.quantize(weight, kind)), raw_dtype=kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


if __name__ == '__main__':
    sys.exit(main())

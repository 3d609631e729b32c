"""Baichuan-13B and Baichuan2-13B: Llamas with ALiBi in place of rotary embedding; the second with a normalised head."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.errors import ConfigError
from utils.native.baichuan import with_normalised_head
from utils.native.family import Config, Family, State, map_each, refuse, unknown_key
from utils.native.internlm import llama_config

if TYPE_CHECKING:
    import torch

_V1, _V2 = 'baichuan_13b', 'baichuan2_13b'
_SIZES = {
    'hidden_size': 5120, 'intermediate_size': 13696, 'num_hidden_layers': 40, 'num_attention_heads': 40,
    'pad_token_id': 0,
}  # fmt: skip
_VOCAB = {_V1: 64000, _V2: 125696}
_FUSED = re.compile(r'(model\.layers\.\d+\.self_attn\.)W_pack\.weight')
_SAME = re.compile(
    r'(model\.(embed_tokens|norm)|lm_head|model\.layers\.\d+\.'
    r'(input_layernorm|post_attention_layernorm|self_attn\.o_proj|mlp\.(gate|up|down)_proj))\.weight'
)


def native_config(original: Config, *, family: str) -> dict[str, Any]:
    """Return the arguments of AlibiLlamaConfig; raises ConfigError where config.json is of a 7B, which rotates."""
    refuse(
        'BaiChuanForCausalLM' in (original.get('architectures') or ()),
        family,
        'architectures',
        original.get('architectures'),
        'which is Baichuan-7B, without ALiBi: name the model_type that it is',
    )
    rotary = original.get('max_position_embeddings')
    refuse(
        rotary is not None,
        family,
        'max_position_embeddings',
        rotary,
        'which only the 7B models have, without ALiBi: name the model_type that it is',
    )
    config = llama_config(original, family, {**_SIZES, 'vocab_size': _VOCAB[family]})
    refuse(
        family == _V2 and config['tie_word_embeddings'],
        family,
        'tie_word_embeddings',
        True,
        'but its normalised head cannot be the embedding too',
    )
    return {**config, 'max_position_embeddings': original.get('model_max_length', 4096)}


def _matches(original: Config, *, family: str) -> bool:
    """Return whether a config.json is of the 13B models, full width, and of this one, which its vocabulary tells."""
    return (
        'BaichuanForCausalLM' in (original.get('architectures') or ())
        and 'max_position_embeddings' not in original
        and original.get('vocab_size') == _VOCAB[family]
        and not original.get('quantization_config')
    )


def native_tensors(state: State, original: Config) -> State:
    """Return W_pack cut into query, key and value; every other name is Llama's already."""
    return map_each(state, partial(_split, rows=3 * original.get('hidden_size', _SIZES['hidden_size'])))


def native_tensors_normalised(state: State, original: Config) -> State:
    """Return the tensors of `native_tensors` with the output head folded: its rows have length 1."""
    return with_normalised_head(native_tensors(state, original))


def _split(key: str, tensor: torch.Tensor, *, rows: int) -> dict[str, torch.Tensor]:
    fused = _FUSED.fullmatch(key)
    if fused is None and _SAME.fullmatch(key) is None:
        raise unknown_key(key, _V1)
    # A .bin may hold parameters, whose slices would carry a graph.
    tensor = tensor.detach()
    if fused is None:
        return {key: tensor}
    if tensor.shape[:1] != (rows,):
        raise ConfigError(
            f"tensor '{key}' is of shape {tuple(tensor.shape)}; query, key and value of config.json need {rows} rows: "
            'the file is damaged or of another model.'
        )
    return {f'{fused[1]}{n}_proj.weight': part for n, part in zip('qkv', tensor.chunk(3), strict=True)}


BAICHUAN_13B = Family(
    name=_V1,
    model_type='baichuan',
    matches=partial(_matches, family=_V1),
    config_class='alibi:AlibiLlamaConfig',
    model_class='alibi:AlibiLlamaForCausalLM',
    config=partial(native_config, family=_V1),
    tensors=native_tensors,
    saved_model_type='assay_baichuan_13b',
)
BAICHUAN2_13B = replace(
    BAICHUAN_13B,
    name=_V2,
    matches=partial(_matches, family=_V2),
    config=partial(native_config, family=_V2),
    tensors=native_tensors_normalised,
)

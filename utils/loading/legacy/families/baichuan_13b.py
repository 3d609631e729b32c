"""Baichuan-13B and Baichuan2-13B. They are Llama models with ALiBi instead of rotary embedding.

Baichuan2 also normalises the rows of its output head.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from utils.loading.legacy.families.baichuan import native_tensors, native_tensors_normalised, refuse_tied
from utils.loading.legacy.families.internlm import llama_config
from utils.loading.legacy.family import Config, Family, refuse

_V1 = 'baichuan_13b'
_V2 = 'baichuan2_13b'

_SIZES: dict[str, int] = {
    'hidden_size': 5120, 'intermediate_size': 13696, 'num_hidden_layers': 40, 'num_attention_heads': 40,
    'pad_token_id': 0,
}  # fmt: skip
_VOCAB = {_V1: 64000, _V2: 125696}


def native_config(original: Config, *, family: str) -> dict[str, Any]:
    """Return the arguments of AlibiLlamaConfig.

    Raises ConfigError if config.json belongs to a 7B model, because the 7B models have rotary embedding, or if
    config.json has a value that is not supported.
    """
    refuse(
        'BaiChuanForCausalLM' in (original.get('architectures') or ()),
        family,
        'architectures',
        original.get('architectures'),
        'which is Baichuan-7B, without ALiBi: pass the matching --model_type',
    )

    rotary = original.get('max_position_embeddings')
    refuse(
        rotary is not None,
        family,
        'max_position_embeddings',
        rotary,
        'which only the 7B models have, without ALiBi: pass the matching --model_type',
    )

    config = llama_config(original, family, {**_SIZES, 'vocab_size': _VOCAB[family]})
    if family == _V2:
        refuse_tied(config, family)

    return {**config, 'max_position_embeddings': original.get('model_max_length', 4096)}


def _matches(original: Config, *, family: str) -> bool:
    """Return whether a config.json describes the 13B model `family` with plain (not quantised) weights.

    The vocabulary size distinguishes Baichuan-13B and Baichuan2-13B.
    """
    return (
        'BaichuanForCausalLM' in (original.get('architectures') or ())
        and 'max_position_embeddings' not in original
        and original.get('vocab_size') == _VOCAB[family]
        and not original.get('quantization_config')
    )


BAICHUAN_13B = Family(
    name=_V1,
    model_type='baichuan',
    matches=partial(_matches, family=_V1),
    config_class='alibi:AlibiLlamaConfig',
    model_class='alibi:AlibiLlamaForCausalLM',
    config=partial(native_config, family=_V1),
    tensors=partial(native_tensors, width=_SIZES['hidden_size']),
    saved_model_type='assay_baichuan_13b',
)
BAICHUAN2_13B = replace(
    BAICHUAN_13B,
    name=_V2,
    matches=partial(_matches, family=_V2),
    config=partial(native_config, family=_V2),
    tensors=partial(native_tensors_normalised, width=_SIZES['hidden_size']),
)

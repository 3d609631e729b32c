"""InternLM 7B and 20B. They are Llama models with optional attention biases.

The rotary embedding is either static or scaled by dynamic NTK.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.loading.legacy.family import Config, Family, refuse, same_tensors

# These defaults are the same in the original classes of InternLM, XVERSE and Baichuan.
_DEFAULTS = {
    'hidden_act': 'silu', 'initializer_range': 0.02, 'rms_norm_eps': 1e-6, 'use_cache': True,
    'bos_token_id': 1, 'eos_token_id': 2, 'tie_word_embeddings': False,
}  # fmt: skip

_INTERNLM = {
    'vocab_size': 103168, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'max_position_embeddings': 2048, 'pad_token_id': 0,
}  # fmt: skip


def llama_config(original: Config, family: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the LlamaConfig arguments that config.json stores under the same names, without rotary settings.

    If config.json does not have a field, the value is taken from `defaults`, the defaults of the original class. Raises
    ConfigError if hidden_size is not divisible by the number of heads, or if the weights are quantised.
    """
    config = {name: original.get(name, default) for name, default in {**_DEFAULTS, **defaults}.items()}

    heads = config['num_attention_heads']
    refuse(
        config['hidden_size'] % heads != 0,
        family,
        'num_attention_heads',
        heads,
        f'which does not divide hidden_size = {config["hidden_size"]}: the file is damaged or belongs to another model',
    )

    for field in ('quantization_config', 'quantization_bit'):
        value = original.get(field)
        refuse(
            bool(value), family, field, value, 'but its quantised weights are not readable: use the full-width model'
        )

    return {**config, 'num_key_value_heads': original.get('num_key_value_heads') or heads}


def static_rope(original: Config, family: str) -> dict[str, Any]:
    """Return rope_parameters for LlamaConfig, for a family whose original class has no rope_scaling.

    Raises ConfigError if config.json has rope_scaling.
    """
    scaling = original.get('rope_scaling')
    refuse(bool(scaling), family, 'rope_scaling', scaling, 'which its original class does not have')
    return {'rope_type': 'default', 'rope_theta': float(original.get('rope_theta') or 10000.0)}


def native_config(original: Config) -> dict[str, Any]:
    """Return the arguments of LlamaConfig.

    attention_bias has the value of the original field `bias`. Both fields say whether q, k, v and the output projection
    have biases.
    """
    return {
        **llama_config(original, 'internlm', _INTERNLM),
        'attention_bias': original.get('bias', True),
        'mlp_bias': False,
        'rope_parameters': _rope(original),
    }


def _rope(original: Config) -> dict[str, Any]:
    """Return rope_parameters for LlamaConfig. Raises ConfigError if the type of scaling is unknown.

    A config.json of November 2023 has the field `rotary`. A config.json of December 2023 has rope_theta and
    rope_scaling.
    """
    rotary = original.get('rotary') or {}
    scaling = original.get('rope_scaling') or {}
    field = 'rotary' if rotary else 'rope_scaling'
    kind = rotary.get('type') or scaling.get('type') or scaling.get('rope_type') or 'origin'
    refuse(
        kind not in ('origin', 'default', 'dynamic'),
        'internlm',
        f'{field} type',
        kind,
        'which its original class does not have: supported are origin and dynamic',
    )

    theta = float(rotary.get('base') or original.get('rope_theta') or 10000.0)
    if kind != 'dynamic':
        return {'rope_type': 'default', 'rope_theta': theta}

    factor = rotary.get('scaling_factor') or scaling.get('factor') or 1.0
    return {'rope_type': 'dynamic', 'rope_theta': theta, 'factor': float(factor)}


INTERNLM = Family(
    name='internlm',
    model_type='internlm',
    config_class='LlamaConfig',
    model_class='LlamaForCausalLM',
    config=native_config,
    tensors=same_tensors,
)

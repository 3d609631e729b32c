"""ChatGLM2-6B and ChatGLM2-6B-32k. They are GLM models in which query, key and value are one fused tensor.

In the 32k model, positions are divided by a constant (linear interpolation).
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.loading.legacy.family import Config, Family, State, map_each, refuse, unknown_key

if TYPE_CHECKING:
    import torch

_BASE = 'chatglm2'
_LONG = 'chatglm2_32k'

# Field of GlmConfig -> (original field, default of the original class).
_FIELDS: dict[str, tuple[str, Any]] = {
    'vocab_size': ('padded_vocab_size', 65024),
    'hidden_size': ('hidden_size', 4096),
    'intermediate_size': ('ffn_hidden_size', 13696),
    'num_hidden_layers': ('num_layers', 28),
    'num_attention_heads': ('num_attention_heads', 32),
    'num_key_value_heads': ('multi_query_group_num', 1),
    'head_dim': ('kv_channels', 128),
    'attention_dropout': ('attention_dropout', 0.0),
    'max_position_embeddings': ('seq_length', 2048),
    'rms_norm_eps': ('layernorm_epsilon', 1e-5),
    'attention_bias': ('add_qkv_bias', False),
    'use_cache': ('use_cache', True),
    # The defaults of GlmConfig are ids of GLM-4. The vocabulary of ChatGLM2 does not have these ids.
    'pad_token_id': ('pad_token_id', 0),
    'eos_token_id': ('eos_token_id', 2),
}

# Original field -> (default of the original class, the only value that GlmForCausalLM supports, reason).
_FIXED: dict[str, tuple[Any, Any, str]] = {
    'rmsnorm': (True, True, 'but GLM has RMS norms only'),
    'post_layer_norm': (True, True, 'but GLM has a norm before its output head'),
    'multi_query_attention': (False, True, 'but without shared keys the fused tensor is ordered differently'),
    'add_bias_linear': (False, False, 'but GLM has biases only on query, key and value'),
    'apply_residual_connection_post_layernorm': (False, False, 'but GLM adds the input of the norm'),
    'fp32_residual_connection': (False, False, 'but GLM adds in the dtype it runs in'),
}

_NAMES = {
    'transformer.embedding.word_embeddings.weight': 'model.embed_tokens.weight',
    'transformer.encoder.final_layernorm.weight': 'model.norm.weight',
    'transformer.output_layer.weight': 'lm_head.weight',
}
_LAYER = re.compile(r'transformer\.encoder\.layers\.(\d+)\.(.+)')
_LAYER_NAMES = {
    'input_layernorm.weight': 'input_layernorm.weight',
    'post_attention_layernorm.weight': 'post_attention_layernorm.weight',
    'self_attention.dense.weight': 'self_attn.o_proj.weight',
    # In both layouts, the rows of the gate come before the rows of the up projection.
    'mlp.dense_h_to_4h.weight': 'mlp.gate_up_proj.weight',
    'mlp.dense_4h_to_h.weight': 'mlp.down_proj.weight',
}


def native_config(original: Config, *, family: str) -> dict[str, Any]:
    """Return the arguments of GlmConfig.

    Raises ConfigError if the checkpoint has a P-tuning prefix, if its weights are quantised, or if a field has a value
    that GlmForCausalLM does not support.
    """
    for field, (default, meant, why) in _FIXED.items():
        value = original.get(field, default)
        refuse(value != meant, family, field, value, why)

    for field, why in (
        ('pre_seq_len', 'so it holds a P-tuning prefix, which no native class has: use the model without it'),
        ('quantization_bit', 'but its int4 and int8 layouts are not readable: use the full-width model'),
        ('quantization_config', 'but its quantised weights are not readable: use the full-width model'),
    ):
        refuse(bool(original.get(field)), family, field, original.get(field), why)

    return {**_renamed(original), 'tie_word_embeddings': False, 'rope_parameters': _rope(original, family)}


def _renamed(original: Config) -> dict[str, Any]:
    """Return the fields of config.json under the names of GlmConfig. Missing fields get the original default."""
    return {native: original.get(name, default) for native, (name, default) in _FIELDS.items()}


def _rope(original: Config, family: str) -> dict[str, Any]:
    """Return rope_parameters for GlmConfig. Half of each head is rotated.

    If config.json has a rope_ratio, positions are divided by it. Only ChatGLM2-6B-32k has a rope_ratio. Raises
    ConfigError if ChatGLM2-6B has one.
    """
    rope = {'rope_type': 'default', 'rope_theta': 10000.0, 'partial_rotary_factor': 0.5}

    ratio = original.get('rope_ratio') or 1
    if ratio == 1:
        return rope

    refuse(
        family == _BASE,
        family,
        'rope_ratio',
        ratio,
        'and chatglm2-6b has no rope_ratio: if this is chatglm2-6b-32k, pass --model_type chatglm2-6b-32k; '
        'later ChatGLM models use rope_ratio differently',
    )

    return {**rope, 'rope_type': 'linear', 'factor': float(ratio)}


def native_tensors(state: State, original: Config) -> State:
    """Return the tensors under the names of GlmForCausalLM. The fused tensors are split into query, key and value."""
    config = _renamed(original)
    query_rows = config['num_attention_heads'] * config['head_dim']
    shared_rows = config['num_key_value_heads'] * config['head_dim']
    return map_each(state, partial(_rename, rows=(query_rows, shared_rows, shared_rows)))


def _rename(key: str, tensor: torch.Tensor, *, rows: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Return a dict with the tensors of GlmForCausalLM that replace one tensor of the checkpoint.

    The keys are the names in GlmForCausalLM. `rows` are the numbers of rows of query, key and value. Raises ConfigError
    if the name or the shape is wrong.
    """
    if key in _NAMES:
        return {_NAMES[key]: tensor.detach()}

    layer = _LAYER.fullmatch(key)
    if layer is None:
        raise unknown_key(key, _BASE)

    prefix = f'model.layers.{layer[1]}.'
    leaf = layer[2]
    if leaf in _LAYER_NAMES:
        return {prefix + _LAYER_NAMES[leaf]: tensor.detach()}

    module, _, kind = leaf.rpartition('.')
    if module != 'self_attention.query_key_value' or kind not in ('weight', 'bias'):
        raise unknown_key(key, _BASE)

    if tensor.shape[:1] != (sum(rows),):
        raise ConfigError(
            f"tensor '{key}' has the shape {tuple(tensor.shape)}, but config.json requires "
            f'{" + ".join(map(str, rows))} rows (query + key + value). The file is damaged or belongs to another '
            'model. Download or copy it again.'
        )

    # A .bin file may hold Parameters. A slice of a Parameter would keep an autograd graph.
    parts = tensor.detach().split(rows)
    return {f'{prefix}self_attn.{name}_proj.{kind}': part for name, part in zip('qkv', parts, strict=True)}


CHATGLM2 = Family(
    name=_BASE,
    model_type='chatglm',
    config_class='GlmConfig',
    model_class='GlmForCausalLM',
    config=partial(native_config, family=_BASE),
    tensors=native_tensors,
)

# `matches` is always False, so this family is used only if --model_type names it. ChatGLM3 and GLM-4 have a similar
# config.json but use rope_ratio differently.
CHATGLM2_32K = replace(CHATGLM2, name=_LONG, matches=lambda config: False, config=partial(native_config, family=_LONG))

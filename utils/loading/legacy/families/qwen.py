"""Qwen 7B and 14B of 2023, plain and GPTQ.

They are Qwen2 models with two differences in the layout. q, k and v are one fused layer. In the MLP, w1 is the up
projection and w2 is the gate.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from utils.base.errors import ConfigError
from utils.loading.legacy.family import Config, Family, State, map_each, refuse, unknown_key
from utils.loading.legacy.gptq import (
    TENSORS,
    dequantise,
    packed_available,
    packed_layers,
    packed_settings,
    read_format,
    split_fused,
)

# Native name -> (names in config.json, default of the original class). The first name that config.json has is used.
# Some of the names were used only in August 2023. If config.json has two vocabulary sizes, the padded size is the
# number of rows of the embedding.
_FIELDS: dict[str, tuple[tuple[str, ...], Any]] = {
    'vocab_size': (('padded_vocab_size', 'vocab_size'), 151936),
    'hidden_size': (('hidden_size', 'n_embd'), 4096),
    'num_hidden_layers': (('num_hidden_layers', 'n_layer'), 32),
    'num_attention_heads': (('num_attention_heads', 'n_head'), 32),
    'rms_norm_eps': (('layer_norm_epsilon',), 1e-6),
    # Up to this length, no extension for long contexts is used. In the original, max_position_embeddings is only the
    # size of the tables.
    'max_position_embeddings': (('seq_length', 'max_position_embeddings', 'n_positions'), 8192),
    'attention_dropout': (('attn_dropout_prob', 'attn_pdrop'), 0.0),
    'initializer_range': (('initializer_range',), 0.02),
    'tie_word_embeddings': (('tie_word_embeddings',), False),
    'use_cache': (('use_cache',), True),
    'bos_token_id': (('bos_token_id',), None),
    'use_dynamic_ntk': (('use_dynamic_ntk',), True),
    'use_logn_attn': (('use_logn_attn',), True),
}
_ENDOFTEXT = 151643

# Field -> (the only supported value, reason).
_REQUIRED = {
    'no_bias': (True, 'and the native class has no bias outside q, k and v'),
    'rotary_pct': (1.0, 'and the native class rotates whole heads'),
    'scale_attn_weights': (True, 'and the native class always scales attention weights'),
    'apply_residual_connection_post_layernorm': (False, 'and the native class adds the input of the norm'),
}

_OUTER = {'transformer.wte': 'model.embed_tokens', 'transformer.ln_f': 'model.norm', 'lm_head': 'lm_head'}

# w2 is the gate, because the original applies the activation to w2. Both output layers are named c_proj, so the name of
# the parent module is needed to distinguish them.
_INNER = {
    'ln_1': ('input_layernorm',),
    'ln_2': ('post_attention_layernorm',),
    'attn.c_attn': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'attn.c_proj': ('self_attn.o_proj',),
    'mlp.w1': ('mlp.up_proj',),
    'mlp.w2': ('mlp.gate_proj',),
    'mlp.c_proj': ('mlp.down_proj',),
}
_LAYER = re.compile(r'transformer\.h\.(\d+)\.(.+)')


def text_config(original: Config, family: str) -> dict[str, Any]:
    """Return the arguments of Qwen2Config for the language model.

    They include the fields that the classes in qwen_long.py read. Raises ConfigError if a field has a value that is not
    supported.
    """
    for name, (required, why) in _REQUIRED.items():
        found = original.get(name, required)
        refuse(found != required, family, name, found, why)

    config = {native: _first(original, names, default) for native, (names, default) in _FIELDS.items()}

    hidden = config['hidden_size']
    heads = config['num_attention_heads']
    channels = original.get('kv_channels', hidden // heads)
    refuse(channels * heads != hidden, family, 'kv_channels', channels, f'which is not {hidden} / {heads} heads')

    end_of_text = _ENDOFTEXT if config['vocab_size'] > _ENDOFTEXT else None

    return {
        **config,
        # The original intermediate_size is the sum of the widths of w1 and w2, so it is halved.
        'intermediate_size': _first(original, ('intermediate_size', 'ffn_hidden_size'), 22016) // 2,
        'num_key_value_heads': heads,
        'hidden_act': 'silu',
        'rope_parameters': {'rope_type': 'default', 'rope_theta': float(original.get('rotary_emb_base', 10000.0))},
        # In newer folders, only generation_config.json states eos_token_id.
        'eos_token_id': _first(original, ('eos_token_id',), end_of_text),
        # With a pad_token_id, nn.Embedding would not train the row of this id. The original embedding trains all rows.
        'pad_token_id': None,
        'use_sliding_window': False,
    }


def _first(original: Config, names: tuple[str, ...], default: Any) -> Any:
    """Return the value of the first of the fields `names` that config.json sets. If none is set, return `default`."""
    return next((original[name] for name in names if original.get(name) is not None), default)


def _refuse_other_models(original: Config, family: str) -> None:
    """Raise ConfigError if the model is a Qwen-VL or a Qwen-Audio. They have the same model_type as Qwen."""
    refuse('visual' in original, family, 'visual', '...', 'so it is a Qwen-VL: pass its --model_type')
    refuse('audio' in original, family, 'audio', '...', 'so it is a Qwen-Audio, which is not supported')


def native_config(original: Config) -> dict[str, Any]:
    """Return the arguments of Qwen2Config for plain weights.

    Raises ConfigError if the weights are quantised, if the model is a Qwen-VL or Qwen-Audio, or if config.json has a
    value that is not supported.
    """
    _refuse_other_models(original, 'qwen')

    quantised = original.get('quantization_config')
    why = 'so it is quantised: pass the --model_type of its int4 or int8'
    refuse(quantised is not None, 'qwen', 'quantization_config', quantised, why)

    return text_config(original, 'qwen')


def gptq_config(original: Config) -> dict[str, Any]:
    """Return the arguments of Qwen2Config for GPTQ weights.

    If optimum and gptqmodel are installed, the arguments say that the weights stay packed. Raises ConfigError if the
    weights are not GPTQ weights, if the model is a Qwen-VL or Qwen-Audio, or if config.json has a value that is not
    supported.
    """
    _refuse_other_models(original, 'qwen_gptq')
    read_format(original, 'qwen_gptq')  # This raises ConfigError if the weights are not GPTQ weights.

    config = text_config(original, 'qwen_gptq')
    return {**config, 'quantization_config': packed_settings(original)} if packed_available() else config


def rename_text(key: str, tensor: Any, family: str) -> dict[str, Any]:
    """Return a dict with the tensors of Qwen2 that replace one tensor of the language model in the checkpoint.

    The keys are the names in Qwen2. The tensor is plain or GPTQ. Raises ConfigError if the name `key` is unknown.
    """
    module, _, name = key.rpartition('.')
    if module in _OUTER and name == 'weight':
        return {f'{_OUTER[module]}.weight': tensor}

    layer = _LAYER.fullmatch(module)
    natives = _INNER.get(layer[2]) if layer else None
    if layer is None or natives is None:
        raise unknown_key(key, family)

    fused = len(natives) > 1
    is_known = name in ('weight', *TENSORS) or (name == 'bias' and fused)
    if not is_known:
        raise unknown_key(key, family)

    parts = split_fused(key, tensor, len(natives)) if fused else [tensor]
    return {f'model.layers.{layer[1]}.{new}.{name}': part for new, part in zip(natives, parts, strict=True)}


def native_tensors(state: State, original: Config) -> State:
    """Return the tensors under the names of Qwen2. Fused attention layers are split into q, k and v.

    The tensors stay memory-mapped.
    """
    return map_each(state, lambda key, tensor: rename_text(key, tensor, 'qwen'))


def gptq_tensors(state: State, original: Config) -> State:
    """Return the GPTQ tensors under the names of Qwen2.

    If optimum and gptqmodel are installed, the weights stay packed. Otherwise they are unpacked.
    """
    packing = read_format(original, 'qwen_gptq')
    mapped = map_each(state, _rename_gptq)

    if packed_available():
        packed_layers(mapped, packing)  # This raises ConfigError if a layer is damaged.
        return {key: tensor.contiguous() for key, tensor in mapped.items()}

    return dequantise(mapped, packing)


def _rename_gptq(key: str, tensor: Any) -> dict[str, Any]:
    """Return a dict with the tensors of Qwen2 that replace one GPTQ tensor of the checkpoint.

    The keys are the names in Qwen2. AutoGPTQ adds a bias of zeros to layers that have no bias in Qwen2. If `tensor` is
    an added bias, the dict is empty. Raises ConfigError if an added bias has a value other than zero.
    """
    layer = _LAYER.fullmatch(key.removesuffix('.bias'))

    if layer and key.endswith('.bias') and len(_INNER.get(layer[2], ())) == 1:
        if tensor.any():
            raise ConfigError(
                f"tensor '{key}' is not zero, and the native class has no bias there. Use the original checkpoint."
            )
        return {}

    return rename_text(key, tensor, 'qwen_gptq')


def _is_gptq(config: Config) -> bool:
    """Return whether the quantization_config of a config.json states GPTQ."""
    settings = config.get('quantization_config')
    return isinstance(settings, dict) and settings.get('quant_method') == 'gptq'


QWEN = Family(
    name='qwen',
    model_type='qwen',
    # This matches Qwen-Audio too. `config` then raises a ConfigError that names Qwen-Audio.
    matches=lambda config: 'visual' not in config and not _is_gptq(config),
    config_class='Qwen2Config',
    model_class='qwen_long:Qwen2ForCausalLM',
    config=native_config,
    tensors=native_tensors,
    # The classes of transformers can open a saved model too. They do not have the extensions for long contexts.
    saved_model_type='qwen2',
    saved_field='use_logn_attn',
)

QWEN_GPTQ = replace(
    QWEN,
    name='qwen_gptq',
    matches=lambda config: 'visual' not in config and _is_gptq(config),
    config=gptq_config,
    tensors=gptq_tensors,
    saved_model_type=None,
    saved_field=None,
)

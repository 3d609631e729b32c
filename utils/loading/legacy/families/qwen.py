"""Qwen 7B and 14B of 2023, and their GPTQ files: a Qwen2 whose attention is fused and whose MLP halves are swapped."""

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

# Native name -> names in config.json, those of August 2023 too, and the default of the original class. The embedding
# has the padded size where a file states both.
_FIELDS: dict[str, tuple[tuple[str, ...], Any]] = {
    'vocab_size': (('padded_vocab_size', 'vocab_size'), 151936),
    'hidden_size': (('hidden_size', 'n_embd'), 4096),
    'num_hidden_layers': (('num_hidden_layers', 'n_layer'), 32),
    'num_attention_heads': (('num_attention_heads', 'n_head'), 32),
    'rms_norm_eps': (('layer_norm_epsilon',), 1e-6),
    # The exact range of the plain class; the original's own max_position_embeddings is what its tables are made for.
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

# Fields that have to hold one value, and why.
_DEMANDED = {
    'no_bias': (True, 'and the native class has no bias outside q, k and v'),
    'rotary_pct': (1.0, 'and the native class rotates whole heads'),
    'scale_attn_weights': (True, 'and the native class always scales attention weights'),
    'apply_residual_connection_post_layernorm': (False, 'and the native class adds what came before the norm'),
}

_OUTER = {'transformer.wte': 'model.embed_tokens', 'transformer.ln_f': 'model.norm', 'lm_head': 'lm_head'}
# In the original the activation acts on w2. Both output layers are called c_proj: the parent tells them apart.
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
    """Return the arguments of Qwen2Config for the language model, with what the long-context classes read."""
    for name, (demanded, why) in _DEMANDED.items():
        found = original.get(name, demanded)
        refuse(found != demanded, family, name, found, why)
    config = {native: _first(original, names, default) for native, (names, default) in _FIELDS.items()}
    hidden, heads = config['hidden_size'], config['num_attention_heads']
    channels = original.get('kv_channels', hidden // heads)
    refuse(channels * heads != hidden, family, 'kv_channels', channels, f'which is not {hidden} / {heads} heads')
    ends_text = _ENDOFTEXT if config['vocab_size'] > _ENDOFTEXT else None
    return {
        **config,
        # The original states the width of both halves together.
        'intermediate_size': _first(original, ('intermediate_size', 'ffn_hidden_size'), 22016) // 2,
        'num_key_value_heads': heads,
        'hidden_act': 'silu',
        'rope_parameters': {'rope_type': 'default', 'rope_theta': float(original.get('rotary_emb_base', 10000.0))},
        # Newer files leave it to generation_config.json.
        'eos_token_id': _first(original, ('eos_token_id',), ends_text),
        # The original embedding has no padding row, which would never be trained.
        'pad_token_id': None,
        'use_sliding_window': False,
    }


def _first(original: Config, names: tuple[str, ...], default: Any) -> Any:
    return next((original[name] for name in names if original.get(name) is not None), default)


def _refuse_other_models(original: Config, family: str) -> None:
    refuse('visual' in original, family, 'visual', '...', 'so it is a Qwen-VL: use its model_type')
    refuse('audio' in original, family, 'audio', '...', 'so it is a Qwen-Audio, which is not supported')


def native_config(original: Config) -> dict[str, Any]:
    """Return the arguments of Qwen2Config for weights that are not quantised."""
    _refuse_other_models(original, 'qwen')
    quantised = original.get('quantization_config')
    refuse(quantised is not None, 'qwen', 'quantization_config', quantised, 'use the model_type of its int4 or int8')
    return text_config(original, 'qwen')


def gptq_config(original: Config) -> dict[str, Any]:
    """Return the arguments of Qwen2Config for GPTQ weights; they stay quantised where packed ones can be used."""
    _refuse_other_models(original, 'qwen_gptq')
    read_format(original, 'qwen_gptq')
    config = text_config(original, 'qwen_gptq')
    return {**config, 'quantization_config': packed_settings(original)} if packed_available() else config


def rename_text(key: str, tensor: Any, family: str) -> dict[str, Any]:
    """Return native names and tensors for one original tensor of the language model, plain or GPTQ."""
    module, _, name = key.rpartition('.')
    if module in _OUTER and name == 'weight':
        return {f'{_OUTER[module]}.weight': tensor}
    layer = _LAYER.fullmatch(module)
    natives = _INNER.get(layer[2]) if layer else None
    fused = natives is not None and len(natives) > 1
    if layer is None or natives is None or name not in ('weight', *TENSORS, *(('bias',) if fused else ())):
        raise unknown_key(key, family)
    parts = split_fused(key, tensor, len(natives)) if fused else [tensor]
    return {f'model.layers.{layer[1]}.{new}.{name}': part for new, part in zip(natives, parts, strict=True)}


def native_tensors(state: State, original: Config) -> State:
    """Return the tensors under Qwen2's names, attention cut into q, k and v; memory-mapped ones stay so."""
    return map_each(state, lambda key, tensor: rename_text(key, tensor, 'qwen'))


def gptq_tensors(state: State, original: Config) -> State:
    """Return the tensors under Qwen2's names: packed where the libraries for it are there, else as weights."""
    form = read_format(original, 'qwen_gptq')
    mapped = map_each(state, _rename_gptq)
    if packed_available():
        packed_layers(mapped, form)  # for what it finds damaged
        return {key: tensor.contiguous() for key, tensor in mapped.items()}
    return dequantise(mapped, form)


def _rename_gptq(key: str, tensor: Any) -> dict[str, Any]:
    """Return what `rename_text` does; the zero biases that AutoGPTQ gives every layer have no native place."""
    layer = _LAYER.fullmatch(key.removesuffix('.bias'))
    if layer and key.endswith('.bias') and len(_INNER.get(layer[2], ())) == 1:
        if tensor.any():
            raise ConfigError(f"tensor '{key}' is not zero, and the native class has no bias there.")
        return {}
    return rename_text(key, tensor, 'qwen_gptq')


def _is_gptq(config: Config) -> bool:
    settings = config.get('quantization_config')
    return isinstance(settings, dict) and settings.get('quant_method') == 'gptq'


QWEN = Family(
    name='qwen',
    model_type='qwen',
    # Qwen-Audio comes here to be refused by name.
    matches=lambda config: 'visual' not in config and not _is_gptq(config),
    config_class='Qwen2Config',
    model_class='qwen_long:Qwen2ForCausalLM',
    config=native_config,
    tensors=native_tensors,
    # Opened by plain classes too, which leave out what is beyond the training length.
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

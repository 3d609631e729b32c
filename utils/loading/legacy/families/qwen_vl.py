"""Qwen-VL of 2023, plain and GPTQ.

The language model is converted in the same way as Qwen. The tensors of the vision tower keep their names.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from utils.loading.legacy.families.qwen import gptq_tensors, rename_text, text_config
from utils.loading.legacy.family import Config, Family, State, is_computed, map_each, refuse
from utils.loading.legacy.gptq import packed_available, packed_settings, read_format

_PLAIN = 'qwen_vl'
_GPTQ = 'qwen_vl_gptq'
SAVED_MODEL_TYPE = 'assay_qwen_vl'
CONFIG_CLASS = 'qwen_vl:QwenVLConfig'
MODEL_CLASS = 'qwen_vl:QwenVLForCausalLM'
_TOWER = 'transformer.visual.'

# config.json must have these fields, because the original class has no defaults for them.
_NEEDED = ('image_size', 'patch_size', 'width', 'layers', 'heads', 'mlp_ratio', 'image_start_id')
_DEFAULTS = {'n_queries': 256, 'output_dim': 512}
_POOL_HEAD = 128


def native_config(original: Config) -> dict[str, Any]:
    """Return the arguments of QwenVLConfig for plain weights.

    Raises ConfigError if the weights are quantised, or if config.json has a value that is not supported.
    """
    quantised = original.get('quantization_config')
    why = 'so it is quantised: pass the --model_type of its int4'
    refuse(quantised is not None, _PLAIN, 'quantization_config', quantised, why)

    return _config(original, _PLAIN)


def gptq_config(original: Config) -> dict[str, Any]:
    """Return the arguments of QwenVLConfig for GPTQ weights.

    If optimum and gptqmodel are installed, the arguments say that the weights stay packed. Raises ConfigError if the
    weights are not GPTQ weights, or if config.json has a value that is not supported.
    """
    read_format(original, _GPTQ)  # This raises ConfigError if the weights are not GPTQ weights.

    config = _config(original, _GPTQ)
    return {**config, 'quantization_config': packed_settings(original)} if packed_available() else config


def _config(original: Config, family: str) -> dict[str, Any]:
    """Return the arguments of QwenVLConfig that are the same for plain and GPTQ weights."""
    refuse('audio' in original, family, 'audio', '...', 'so it is a Qwen-Audio, which is not supported')

    config = text_config(original, family)
    return {**config, 'visual': _visual(original, config, family)}


def _visual(original: Config, text: Config, family: str) -> dict[str, Any]:
    """Return the settings of the vision tower, with defaults for missing fields.

    Raises ConfigError if a required setting is missing, or if the settings do not fit each other or the language model.
    """
    found = original.get('visual')
    refuse(
        not isinstance(found, dict),
        family,
        'visual',
        found,
        'and a Qwen-VL has a vision tower: pass the --model_type of this checkpoint',
    )

    visual = {**_DEFAULTS, **dict(found or {})}
    for name in _NEEDED:
        refuse(visual.get(name) is None, family, f'visual.{name}', None, 'but the vision tower needs this setting')

    width = visual['width']
    heads = visual['heads']
    out = visual['output_dim']
    queries = visual['n_queries']
    size = visual['image_size']
    patch = visual['patch_size']
    start = visual['image_start_id']
    vocabulary = text['vocab_size']
    hidden = text['hidden_size']

    for condition, name, value, why in (
        (width % heads, 'heads', heads, f'which does not divide width = {width}'),
        (out != hidden, 'output_dim', out, f'but features replace embeddings of width {hidden}'),
        (out % _POOL_HEAD, 'output_dim', out, f'and the heads of the resampler are {_POOL_HEAD} wide'),
        (math.isqrt(queries) ** 2 != queries, 'n_queries', queries, 'which is not the area of a square'),
        (size < patch, 'image_size', size, f'which is smaller than a patch of {patch}'),
        (
            not 0 <= start < vocabulary - 2,
            'image_start_id',
            start,
            f'but it and the 2 ids after it must be below {vocabulary}',
        ),
    ):
        refuse(bool(condition), family, f'visual.{name}', value, why)

    return visual


def native_tensors(state: State, original: Config) -> State:
    """Return the tensors under the names of QwenVLForCausalLM.

    In the language model, the fused attention layers are split into q, k and v.
    """
    return map_each(state, _rename)


def _rename(key: str, tensor: Any) -> dict[str, Any]:
    """Return a dict with the tensors of QwenVLForCausalLM that replace one tensor of the checkpoint.

    The keys are the names in QwenVLForCausalLM.
    """
    if key.startswith(_TOWER):
        return {f'visual.{key.removeprefix(_TOWER)}': tensor}

    return rename_text(key, tensor, _PLAIN)


def gptq_tensors_of_both(state: State, original: Config) -> State:
    """Return all tensors of a Qwen-VL with GPTQ weights, under the names of QwenVLForCausalLM.

    If optimum and gptqmodel are installed, the GPTQ weights stay packed. Otherwise they are unpacked. The vision tower
    has no GPTQ weights.
    """
    tower = {key: tensor for key, tensor in state.items() if key.startswith(_TOWER) and not is_computed(key)}
    text = {key: tensor for key, tensor in state.items() if not key.startswith(_TOWER)}
    return {**gptq_tensors(text, original), **native_tensors(tower, original)}


def _is_gptq(config: Config) -> bool:
    """Return whether a config.json has a quantization_config. `gptq_config` later checks that it states GPTQ."""
    return config.get('quantization_config') is not None


QWEN_VL = Family(
    name=_PLAIN,
    model_type='qwen',
    matches=lambda config: 'visual' in config and not _is_gptq(config),
    config_class=CONFIG_CLASS,
    model_class=MODEL_CLASS,
    config=native_config,
    tensors=native_tensors,
    saved_model_type=SAVED_MODEL_TYPE,
)

QWEN_VL_GPTQ = replace(
    QWEN_VL,
    name=_GPTQ,
    matches=lambda config: 'visual' in config and _is_gptq(config),
    config=gptq_config,
    tensors=gptq_tensors_of_both,
)

"""Qwen-VL of 2023, and its GPTQ file: the language model of Qwen, and a visual tower that keeps its names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from utils.loading.legacy.families.qwen import gptq_tensors, rename_text, text_config
from utils.loading.legacy.family import Config, Family, State, is_computed, map_each, refuse
from utils.loading.legacy.gptq import packed_available, packed_settings, read_format

_PLAIN, _GPTQ = 'qwen_vl', 'qwen_vl_gptq'
SAVED_MODEL_TYPE = 'assay_qwen_vl'
CONFIG_CLASS, MODEL_CLASS = 'qwen_vl:QwenVLConfig', 'qwen_vl:QwenVLForCausalLM'
_TOWER = 'transformer.visual.'
# The original gives no default for these.
_NEEDED = ('image_size', 'patch_size', 'width', 'layers', 'heads', 'mlp_ratio', 'image_start_id')
_DEFAULTS = {'n_queries': 256, 'output_dim': 512}
_POOL_HEAD = 128


def native_config(original: Config) -> dict[str, Any]:
    """Return the arguments of QwenVLConfig for weights that are not quantised."""
    quantised = original.get('quantization_config')
    refuse(quantised is not None, _PLAIN, 'quantization_config', quantised, 'use the model_type of its int4')
    return _config(original, _PLAIN)


def gptq_config(original: Config) -> dict[str, Any]:
    """Return the arguments of QwenVLConfig for GPTQ weights; they stay quantised where packed ones can be used."""
    read_format(original, _GPTQ)
    config = _config(original, _GPTQ)
    return {**config, 'quantization_config': packed_settings(original)} if packed_available() else config


def _config(original: Config, family: str) -> dict[str, Any]:
    refuse('audio' in original, family, 'audio', '...', 'so it is a Qwen-Audio, which is not supported')
    config = text_config(original, family)
    return {**config, 'visual': _visual(original, config, family)}


def _visual(original: Config, text: Config, family: str) -> dict[str, Any]:
    """Return the tower's settings, complete; raises ConfigError where they contradict each other or the text's."""
    found = original.get('visual')
    refuse(not isinstance(found, dict), family, 'visual', found, 'and without a visual tower it is no Qwen-VL')
    visual = {**_DEFAULTS, **dict(found or {})}
    for name in _NEEDED:
        refuse(visual.get(name) is None, family, f'visual.{name}', None, 'which the tower cannot be built without')
    width, heads, out = visual['width'], visual['heads'], visual['output_dim']
    queries, size, patch = visual['n_queries'], visual['image_size'], visual['patch_size']
    start, vocabulary = visual['image_start_id'], text['vocab_size']
    hidden = text['hidden_size']
    for condition, name, value, why in (
        (width % heads, 'heads', heads, f'which does not divide width = {width}'),
        (out != hidden, 'output_dim', out, f'but features take the place of embeddings of {hidden}'),
        (out % _POOL_HEAD, 'output_dim', out, f'and the heads of the resampler are {_POOL_HEAD} wide'),
        (math.isqrt(queries) ** 2 != queries, 'n_queries', queries, 'which is not the area of a square'),
        (size < patch, 'image_size', size, f'which is smaller than a patch of {patch}'),
        (
            not 0 <= start < vocabulary - 2,
            'image_start_id',
            start,
            f'with room for 3 ids of {vocabulary}',
        ),
    ):
        refuse(bool(condition), family, f'visual.{name}', value, why)
    return visual


def native_tensors(state: State, original: Config) -> State:
    """Return the tensors under QwenVLForCausalLM's names, attention of the text cut into q, k and v."""
    return map_each(state, _rename)


def _rename(key: str, tensor: Any) -> dict[str, Any]:
    if key.startswith(_TOWER):
        return {f'visual.{key.removeprefix(_TOWER)}': tensor}
    return rename_text(key, tensor, _PLAIN)


def gptq_tensors_of_both(state: State, original: Config) -> State:
    """Return the tensors as `native_tensors` does; those of the text are packed, the tower never is."""
    tower = {key: tensor for key, tensor in state.items() if key.startswith(_TOWER) and not is_computed(key)}
    text = {key: tensor for key, tensor in state.items() if not key.startswith(_TOWER)}
    return {**gptq_tensors(text, original), **native_tensors(tower, original)}


def _is_gptq(config: Config) -> bool:
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

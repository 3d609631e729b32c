"""The table of all families, and functions that find the family to which a config.json belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.loading.legacy.families.baichuan import BAICHUAN2_7B, BAICHUAN_7B
from utils.loading.legacy.families.baichuan_4bits import BAICHUAN2_7B_4BITS, BAICHUAN2_13B_4BITS
from utils.loading.legacy.families.baichuan_13b import BAICHUAN2_13B, BAICHUAN_13B
from utils.loading.legacy.families.chatglm2 import CHATGLM2, CHATGLM2_32K
from utils.loading.legacy.families.internlm import INTERNLM
from utils.loading.legacy.families.polylm import POLYLM
from utils.loading.legacy.families.qwen import QWEN, QWEN_GPTQ
from utils.loading.legacy.families.qwen_vl import QWEN_VL, QWEN_VL_GPTQ
from utils.loading.legacy.families.xverse import XVERSE
from utils.loading.legacy.family import Family
from utils.loading.legacy.tokenizers.sentencepiece import (
    build_baichuan_tokenizer,
    build_chatglm2_tokenizer,
    build_internlm_tokenizer,
    build_polylm_tokenizer,
)
from utils.loading.legacy.tokenizers.tiktoken import build_qwen_tokenizer, build_qwen_vl_tokenizer
from utils.loading.legacy.tokenizers.xverse import build_xverse_tokenizer

_MODEL = 'tokenizer.model'
# Each entry: the file of the tokenizer, the function that builds the tokenizer, and the families that use both.
_TOKENIZERS: tuple[tuple[str, Callable[[Path], Any], tuple[Family, ...]], ...] = (
    ('qwen.tiktoken', build_qwen_tokenizer, (QWEN, QWEN_GPTQ)),
    ('qwen.tiktoken', build_qwen_vl_tokenizer, (QWEN_VL, QWEN_VL_GPTQ)),
    (_MODEL, build_internlm_tokenizer, (INTERNLM,)),
    (
        _MODEL,
        build_baichuan_tokenizer,
        (BAICHUAN_7B, BAICHUAN2_7B, BAICHUAN_13B, BAICHUAN2_13B, BAICHUAN2_7B_4BITS, BAICHUAN2_13B_4BITS),
    ),
    (_MODEL, build_chatglm2_tokenizer, (CHATGLM2, CHATGLM2_32K)),
    (_MODEL, build_polylm_tokenizer, (POLYLM,)),
    ('tokenizer.json', build_xverse_tokenizer, (XVERSE,)),
)

FAMILIES: dict[str, Family] = {
    family.name: replace(family, tokenizer=build, vocabulary=file)
    for file, build, group in _TOKENIZERS
    for family in group
}


def find_family(config: Mapping[str, Any], name: str | None = None) -> Family | None:
    """Return the family to which an original config.json belongs.

    With `name`, returns the family `name`, or None if config.json has a different model_type. Without `name`, returns
    the family that matches config.json, or None if no family or several families match.
    """
    if name is not None:
        family = FAMILIES[name]
        return family if config.get('model_type') == family.model_type else None

    found = [
        family
        for family in FAMILIES.values()
        if family.model_type == config.get('model_type') and family.matches(config)
    ]
    return found[0] if len(found) == 1 else None


def find_saved(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a config.json that one of this project's own model classes saved.

    Returns None if the config.json was saved by any other class.
    """
    for family in FAMILIES.values():
        same_type = family.saved_model_type is not None and family.saved_model_type == config.get('model_type')
        if same_type and (family.saved_field is None or family.saved_field in config):
            return family

    return None

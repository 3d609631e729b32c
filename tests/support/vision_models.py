"""Tiny vision models in the layouts of the hub, and rows about two pictures."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, write_jsonl
from tests.support.tiny_models import make_tokenizer

GOLDENS = ROOT / 'tests' / 'goldens'
QWEN_VL, QWEN25_VL, QWEN3_VL = 'qwen-vl-chat', 'qwen2.5-vl-3b-instruct', 'qwen3-vl-2b-instruct'
SPECIAL = ['<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>']
TEXT: dict[str, Any] = {
    'vocab_size': 420, 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'max_position_embeddings': 512, 'initializer_range': 0.2,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0, 'mrope_section': [1, 1, 2]},
    'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 5,
}  # fmt: skip
TOWER: dict[str, Any] = {
    'depth': 2, 'hidden_size': 32, 'intermediate_size': 64, 'num_heads': 4, 'out_hidden_size': 32, 'patch_size': 14,
    'initializer_range': 0.2,
}  # fmt: skip
TOWERS = {
    QWEN25_VL: {**TOWER, 'fullatt_block_indexes': [1], 'window_size': 56},
    QWEN3_VL: {**TOWER, 'deepstack_visual_indexes': [0], 'num_position_embeddings': 16},
}
TEMPLATES = {QWEN25_VL: 'qwen2_5_vl', QWEN3_VL: 'qwen3_vl'}


def chat_template(key: str) -> str:
    """Return the chat template of the hub, which the package trl ships."""
    spec = find_spec('trl')
    if spec is None or spec.origin is None:
        pytest.skip('the chat templates come with trl: pip install --no-deps trl==1.16.0')
    return (Path(spec.origin).parent / 'chat_templates' / f'{TEMPLATES[key]}.jinja').read_text(encoding='utf-8')


def make_seeing_tokenizer(key: str) -> Any:
    """Return the toy tokenizer with the control tokens and the chat template of a vision model."""
    tokenizer = make_tokenizer(chat_template=chat_template(key))
    tokenizer.add_special_tokens({'additional_special_tokens': SPECIAL})
    return tokenizer


def make_image_processor() -> Any:
    """Return the processor of these models for small pictures: 4 to 16 slots of 28 x 28 pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28)


def make_seeing_model(key: str, tokenizer: Any) -> Any:
    """Return a model of an entry's class with random weights and 2 layers each in text and tower."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    start, end, image, video = tokenizer.convert_tokens_to_ids(SPECIAL)
    return AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(
            TEMPLATES[key],
            text_config=TEXT,
            vision_config=TOWERS[key],
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )


def seeing_folder(key: str, folder: Path) -> Path:
    """Write a tiny checkpoint of a registered vision model, named as on the hub. Returns its folder."""
    if key == QWEN_VL:
        from tests.support.old_models import original_folder

        return original_folder(key, folder)
    from utils.model import MODEL_MAPPING

    folder = folder / MODEL_MAPPING[key].model_id_or_path.split('/')[1]
    tokenizer = make_seeing_tokenizer(key)
    make_seeing_model(key, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
    return folder


# The answers about the pictures, which only a model that uses the pixels can give.
NAMES = {'a.png': 'blue', 'b.png': 'yellow'}


def picture_rows(folder: Path) -> Path:
    """Write both pictures and a file of rows about them, in every layout, some without a picture. Returns the file."""
    (folder / 'pictures').mkdir(parents=True)
    for name in NAMES:
        shutil.copy(GOLDENS / 'qwenvl-a' / name, folder / 'pictures' / name)
    rows: list[dict[str, Any]] = []
    for first, second in (('a.png', 'b.png'), ('b.png', 'a.png')):
        one, two = f'pictures/{first}', f'pictures/{second}'
        rows += [
            {'query': f'<img>{one}</img>name a colour', 'response': NAMES[first]},
            {'query': 'name <img></img> a colour?', 'response': NAMES[first], 'images': one},
            {
                'query': f'<img>{one}</img><img></img>the two?',
                'response': f'{NAMES[first]} {NAMES[second]}',
                'images': [two],
            },
            {
                'query': 'and <img></img> now?',
                'history': [['<img></img> here?', NAMES[first]]],
                'response': NAMES[second],
                'images': [one, two],
            },
        ]
    rows += [{'query': f'what is {i}?', 'response': f'the answer is {i}'} for i in (1, 2)]
    return write_jsonl(folder / 'rows.jsonl', rows)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding='utf-8'))

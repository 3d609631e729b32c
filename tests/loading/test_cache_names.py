"""The key-value cache is found under the names of all supported versions of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from utils.loading.cache_names import cache_of, named_cache, without_cache

NAMES = ('cache', 'past_key_values')


@pytest.mark.parametrize('name', NAMES)
def test_the_cache_is_found_under_either_name(name: str) -> None:
    cache = DynamicCache()
    assert named_cache({'use_cache': True, name: cache}) == {name: cache}
    assert cache_of({'use_cache': True, name: cache}) is cache
    assert without_cache({'use_cache': True, name: cache}) == {'use_cache': True}


@pytest.mark.parametrize('values', [{}, {'use_cache': False}, {'cache': None}, {'past_key_values': None}])
def test_no_cache_is_none_under_no_name(values: dict[str, Any]) -> None:
    assert cache_of(values) is None
    assert named_cache(values) == {}


@pytest.mark.filterwarnings('error:.*is deprecated:FutureWarning')
def test_the_cache_of_an_output_is_an_argument_of_the_next_call(model_dir: Path) -> None:
    from utils.model import load_model

    model = load_model(model_dir, torch_dtype=torch.float32).eval()
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        begun = model(ids[:, :5], use_cache=True)
        continued = model(ids[:, 5:], **named_cache(begun)).logits
        torch.testing.assert_close(continued, model(ids).logits[:, 5:])
    assert cache_of(begun).get_seq_length() == ids.shape[1]


@pytest.mark.parametrize('name', NAMES)
def test_the_attention_of_qwen_stores_keys_under_either_name(name: str) -> None:
    from transformers import Qwen2Config

    from utils.loading.legacy.classes.qwen_long import QwenLogNAttention

    config = Qwen2Config(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=8)
    config._attn_implementation = 'sdpa'
    attention = QwenLogNAttention(config, 0).eval()
    cache = DynamicCache()
    positions = torch.arange(3)[None]
    turn = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    attention(torch.randn(1, 3, 16), turn, None, position_ids=positions, **{name: cache})
    assert cache.get_seq_length() == 3

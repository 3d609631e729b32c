"""JSON files: the types of their values are checked when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.loading.folder import read_adapter_config, read_config

KEYS = {
    'steps': int,
    'loss': float | None,
    'names': list[str] | None,
    'data': (None, {'*': {'rows': int, 'note': str | None}}),
    'log': (None, [{'step': float}]),
}
GOOD: list[dict[str, Any]] = [
    {'steps': 1},
    {'steps': 1, 'loss': 2, 'names': [], 'other': object},
    {'steps': 1, 'data': {'a': {'rows': 3}}, 'log': [{'step': 0.5}], 'loss': None},
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, 'steps'),
    ({'steps': True}, 'steps'),
    ({'steps': 1.5}, 'steps'),
    ({'steps': 1, 'loss': 'a'}, 'loss'),
    ({'steps': 1, 'names': ['a', 1]}, 'names'),
    ({'steps': 1, 'data': []}, 'data'),
    ({'steps': 1, 'data': {'a': {'rows': None}}}, 'data'),
    ({'steps': 1, 'log': [{}]}, 'log'),
]


@pytest.mark.parametrize('content', GOOD)
def test_values_of_the_stated_types_are_read(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / 'a.json'
    file.write_text(json.dumps(content, default=str))
    assert read_json(file, keys=KEYS)['steps'] == 1


@pytest.mark.parametrize(('content', 'named'), BAD)
def test_a_value_of_another_type_is_named_with_its_file(content: dict[str, Any], named: str, tmp_path: Path) -> None:
    file = tmp_path / 'a.json'
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf'a\.json: {named} is missing or has the wrong type\. Copy it\.'):
        read_json(file, keys=KEYS, remedy='Copy it.')


def test_each_entry_of_a_list_is_checked(tmp_path: Path) -> None:
    file = tmp_path / 'a.json'
    file.write_text('[{"step": 1}, 2]')
    with pytest.raises(ConfigError, match=r'a\.json, entry 2: it is a int, but a dict is expected\.'):
        read_json(file, list, keys={'step': int})


def test_an_adapter_of_lora_states_its_rank(tmp_path: Path) -> None:
    file = tmp_path / 'adapter_config.json'
    file.write_text('{"peft_type": "IA3"}')
    assert read_adapter_config(tmp_path) == {'peft_type': 'IA3'}
    file.write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    with pytest.raises(ConfigError, match=r'adapter_config\.json: r is missing'):
        read_adapter_config(tmp_path)


def test_a_part_of_config_json_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_text('{"model_type": "llama", "text_config": "a"}')
    with pytest.raises(ConfigError, match=r'config\.json: text_config is missing or has the wrong type'):
        read_config(tmp_path)

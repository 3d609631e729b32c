"""Data: column layouts on literal rows, locations of rows, sampling and splitting."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import get_dataset, write_jsonl
from utils import dataset
from utils.base.errors import ConfigError
from utils.dataset import DATASET_MAPPING
from utils.formats.columns import find_converter
from utils.formats.conversation import BadRow
from utils.formats.data_file import read_rows
from utils.formats.row_check import check_row

USER_A = {'role': 'user', 'content': 'a'}
REPLY_B = {'role': 'assistant', 'content': 'b'}
TOOL = {'name': 'f', 'parameters': {}}

SHAPES: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({'query': 'a', 'response': 'b'}, [USER_A, REPLY_B]),
    ({'query': 'a', 'response': 5}, [USER_A, {'role': 'assistant', 'content': '5'}]),
    ({'query': '', 'response': 'b'}, [{'role': 'user', 'content': ''}, REPLY_B]),
    (
        {'query': 'c', 'response': 'd', 'history': [['a', 'b']], 'system': 's'},
        [{'role': 'system', 'content': 's'}, USER_A, REPLY_B, {'role': 'user', 'content': 'c'},
         {'role': 'assistant', 'content': 'd'}],
    ),
    ({'query': 'a', 'response': 'b', 'history': '[]', 'system': ''}, [USER_A, REPLY_B]),
    ({'query': 'a', 'response': 'b', 'history': None, 'system': None}, [USER_A, REPLY_B]),
    ({'instruction': 'a', 'input': '', 'output': 'b'}, [USER_A, REPLY_B]),
    ({'instruction': 'a', 'input': 'x', 'output': 'b'}, [{'role': 'user', 'content': 'a\nx'}, REPLY_B]),
    ({'instruction': 'a', 'output': 'b'}, [USER_A, REPLY_B]),
    ({'messages': [USER_A, REPLY_B]}, [USER_A, REPLY_B]),
    ({'messages': json.dumps([USER_A, REPLY_B])}, [USER_A, REPLY_B]),
    ({'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]}, [USER_A, REPLY_B]),
    (
        {'conversations': [{'from': 'user', 'value': 'a'}, {'from': 'assistant', 'value': 'b'}], 'system': 's'},
        [{'role': 'system', 'content': 's'}, USER_A, REPLY_B],
    ),
]  # fmt: skip


def convert(row: dict[str, Any]) -> Any:
    converter = find_converter(row)
    assert converter is not None
    return check_row(converter(row))


def test_every_shape_becomes_the_conversation_it_means() -> None:
    for row, messages in SHAPES:
        untouched = json.dumps(row)
        assert convert(row).messages == messages
        assert json.dumps(row) == untouched, 'a converter never changes its row'
    assert len(SHAPES) == 13


def test_tool_calls_are_parsed() -> None:
    call = '{"name": "f", "arguments": {"x": 1}}'
    row = convert(
        {
            'conversations': [
                {'from': 'human', 'value': 'a'},
                {'from': 'function_call', 'value': call},
                {'from': 'observation', 'value': '2'},
                {'from': 'gpt', 'value': 'b'},
            ],
            'tools': json.dumps([TOOL]),
        }
    )
    assert row.tools == [{'type': 'function', 'function': TOOL}]
    parsed = [{'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}]
    assert row.messages[1] == {'role': 'assistant', 'content': '', 'tool_calls': parsed}
    assert row.messages[2] == {'role': 'tool', 'content': '2'}


BAD = [
    ({'query': 'a', 'response': None}, 'null response'),
    ({'query': 'a', 'response': ' \n'}, 'empty response'),
    ({'query': 'a', 'response': True}, 'response is a bool, not text'),
    ({'query': 'a', 'response': 'b', 'history': [['x']]}, 'history is not a list of'),
    ({'query': 'a', 'response': 'b', 'tools': '{'}, 'tools is text that is not JSON'),
    ({'query': 'a', 'response': 'b', 'tools': '[1]'}, 'tools is not a list of objects'),
    ({'messages': []}, 'messages is not a list of turns'),
    ({'messages': None}, 'messages is not a list of turns'),
    ({'messages': [USER_A]}, "the last turn is the user's"),
    ({'messages': [REPLY_B]}, 'a reply without a question'),
    ({'messages': [USER_A, {'role': 'system', 'content': 's'}, REPLY_B]}, 'a system turn that is not the first'),
    ({'messages': [{'role': 'narrator', 'content': 'x'}]}, "unknown role 'narrator'"),
    ({'messages': [{'content': 'x'}]}, 'a turn of messages has no role'),
    ({'messages': [USER_A, {'role': 'assistant', 'content': None}]}, 'null assistant turn'),
    ({'conversations': [{'from': 'function_call', 'value': 'f()'}]}, 'a function call is not JSON'),
    ({'conversations': [{'from': 'function_call', 'value': '{}'}]}, 'a function call has no name'),
]


def test_bad_rows_say_what_is_wrong() -> None:
    for row, reason in BAD:
        with pytest.raises(BadRow, match=reason.replace('[', r'\[')):
            convert(row)
    assert len(BAD) == 16


def test_rows_are_placed_by_file_and_line(tmp_path: Path) -> None:
    array = tmp_path / 'a.json'
    array.write_text('[\n\n  {"query": "x\\n",\n "response": "y"}, {"query": 1},\n{"query": 2}\n]\n')
    assert [place for place, _ in read_rows(array)] == [f'{array}:{n}' for n in (3, 4, 5)]
    lines = tmp_path / 'b.jsonl'
    lines.write_text('{"a": 1}\n\n{"a": 2}\r\n', newline='')
    assert [place for place, _ in read_rows(lines)] == [f'{lines}:1', f'{lines}:3']
    misnamed = tmp_path / 'c.json'
    misnamed.write_text('{"a": 1}\n{"a": 2}\n')
    assert [row for _, row in read_rows(misnamed)] == [{'a': 1}, {'a': 2}]
    table = tmp_path / 'd.csv'
    table.write_text('query,response\n"two\nlines",b\nc,d\n')
    assert list(read_rows(table)) == [
        (f'{table}:2', {'query': 'two\nlines', 'response': 'b'}),
        (f'{table}:4', {'query': 'c', 'response': 'd'}),
    ]


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / 'a.parquet'
    pyarrow.parquet.write_table(pyarrow.table({'query': ['a', 'b'], 'response': ['c', None]}), file)
    assert list(read_rows(file)) == [
        (f'{file}: row 1', {'query': 'a', 'response': 'c'}),
        (f'{file}: row 2', {'query': 'b', 'response': None}),
    ]


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / 'a.jsonl'
    file.write_bytes(b'\xef\xbb\xbf{"query": "a"}\n')
    assert [row for _, row in read_rows(file)] == [{'query': 'a'}]


def numbered(tmp_path: Path, name: str, count: int) -> Path:
    return write_jsonl(tmp_path / name, [{'query': f'{name}{i}', 'response': 'r'} for i in range(count)])


def queries(rows: Any) -> list[str]:
    return [row.messages[0]['content'] for row in rows]


def test_split_and_sample_draw_from_the_whole_set_and_leave_the_global_state_alone(tmp_path: Path) -> None:
    file = numbered(tmp_path, 'a.jsonl', 200)
    state = random.getstate()
    rows = get_dataset([str(file)], seed=1, test_ratio=0.1)
    assert random.getstate() == state
    assert (len(rows.train), len(rows.val)) == (180, 20)
    assert len(set(queries(rows.train + rows.val))) == 200
    again = get_dataset([str(file)], seed=1, test_ratio=0.1)
    assert queries(again.val) == queries(rows.val)
    assert queries(get_dataset([str(file)], seed=2, test_ratio=0.1).val) != queries(rows.val)
    sampled = get_dataset([str(file)], seed=1, test_ratio=0.1, train_sample=50)
    assert (len(sampled.train), len(sampled.val)) == (50, 5)
    assert int(queries(sampled.train)[-1].removeprefix('a.jsonl')) > 150


def test_each_data_set_is_split_by_itself_and_hash_draws_rows(tmp_path: Path) -> None:
    one, two = numbered(tmp_path, 'a.jsonl', 100), numbered(tmp_path, 'b.jsonl', 10)
    rows = get_dataset([str(one), f'{two}#5'], test_ratio=0.2)
    assert (len(rows.train), len(rows.val)) == (80 + 4, 20 + 1)
    assert sum(q.startswith('b') for q in queries(rows.val)) == 1
    assert get_dataset([str(one)], test_ratio=0.0).val == []
    assert len(get_dataset([str(two)], test_ratio=0.01).val) == 1


def test_a_registered_function_may_bring_its_own_validation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ([{'query': 'a', 'response': 'b'}] * 3, [{'query': 'c', 'response': 'd'}] * 2)
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'mine', lambda: pair)
    rows = get_dataset(['mine'], test_ratio=0.9)
    assert (len(rows.train), len(rows.val)) == (3, 2)
    assert rows.val[0].origin == 'mine (validation): row 1'


def test_registered_data_sets_load() -> None:
    assert len(DATASET_MAPPING) >= 36
    rows = get_dataset(['sql-demo'])
    assert len(rows.train) >= 1000 and len(rows.val) >= 200 and not rows.left_out


def test_unknown_names_get_the_closest() -> None:
    with pytest.raises(ConfigError, match="'blosom-math-zh' is not registered: did you mean 'blossom-math-zh'"):
        get_dataset(['blosom-math-zh'])
    with pytest.raises(ConfigError, match="--dataset 'sql-dem' is not registered: did you mean 'sql-demo'"):
        get_dataset(['sql-dem'])

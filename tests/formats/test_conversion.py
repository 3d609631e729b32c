"""Conversion keeps everything that a row says about its turns, and names what it does not use."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import get_dataset
from utils.data.parts import TRAIN
from utils.data.plan import plan_rows
from utils.data.stream_parts import open_streams, stream_decisions
from utils.formats import file_bytes
from utils.formats.columns import find_converter
from utils.formats.conversation import BadRow, Message, Row, message_text
from utils.formats.data_file import read_rows
from utils.formats.json_text import WrittenNumber, json_as_written
from utils.formats.row_check import check_row
from utils.formats.tool_calls import ARGUMENTS_NOT_OBJECT, PARAMETERS_NOT_OBJECT

ASKED = {'role': 'user', 'content': 'How deep?'}
TOLD = {'role': 'assistant', 'content': 'Four metres.'}
CALL = {'type': 'function', 'id': 'call_0001', 'function': {'name': 'measure', 'arguments': {'lake': 'Ohrid'}}}


def convert(row: dict[str, Any]) -> Row:
    converter = find_converter(row)
    assert converter is not None
    return check_row(converter(row))


def turns(*messages: dict[str, Any], **columns: Any) -> Row:
    return convert({'messages': list(messages), **columns})


def reply(**keys: Any) -> Message:
    """Return the converted form of an assistant turn with these keys, the last turn of its row."""
    return turns(ASKED, {'role': 'assistant', **keys}).messages[-1]


def test_text_beside_calls_stays_and_calls_alone_have_no_text() -> None:
    assert reply(content='I look.', tool_calls=[CALL]) == {
        'role': 'assistant',
        'content': 'I look.',
        'tool_calls': [CALL],
    }
    for nothing in (None, ''):
        assert reply(content=nothing, tool_calls=[CALL]) == {'role': 'assistant', 'content': '', 'tool_calls': [CALL]}
    assert reply(tool_calls=[CALL])['content'] == ''


def test_a_row_that_ends_in_a_call_has_a_reply() -> None:
    row = turns(ASKED, {'role': 'assistant', 'content': '', 'tool_calls': [CALL]})
    assert message_text(row.messages[-1]) == '[{"name": "measure", "arguments": {"lake": "Ohrid"}}]'
    with pytest.raises(BadRow, match='empty response'):
        turns(ASKED, {'role': 'assistant', 'content': '', 'tool_calls': []})


def test_a_legacy_function_call_is_a_call_with_and_without_text() -> None:
    legacy = {'name': 'measure', 'arguments': '{"lake": "Ohrid"}'}
    called = [{'type': 'function', 'function': {'name': 'measure', 'arguments': {'lake': 'Ohrid'}}}]
    assert reply(content=None, function_call=legacy) == {'role': 'assistant', 'content': '', 'tool_calls': called}
    assert reply(content='I look.', function_call=legacy)['content'] == 'I look.'
    assert reply(content='I look.', function_call=json.dumps(legacy))['tool_calls'] == called


def test_arguments_written_as_json_text_are_the_same_as_an_object() -> None:
    for arguments in ({'lake': 'Ohrid'}, '{"lake": "Ohrid"}'):
        call = {'id': 'call_0001', 'type': 'function', 'function': {'name': 'measure', 'arguments': arguments}}
        assert reply(content=None, tool_calls=[call])['tool_calls'] == [CALL]
    row = convert({
        'conversations': [
            {'from': 'human', 'value': 'a'},
            {'from': 'function_call', 'value': json.dumps({'name': 'measure', 'arguments': '{"lake": "Ohrid"}'})},
        ]
    })  # fmt: skip
    assert row.messages[-1]['tool_calls'][0]['function']['arguments'] == {'lake': 'Ohrid'}
    for nothing in ('', None):
        call = {'function': {'name': 'measure', 'arguments': nothing}}
        assert reply(tool_calls=[call])['tool_calls'][0]['function']['arguments'] == {}


def test_arguments_that_are_no_object_stay_and_are_noted() -> None:
    for arguments in ('the lake', '[1]', '"lake"', [1]):
        row = turns(
            ASKED, {'role': 'assistant', 'tool_calls': [{'function': {'name': 'measure', 'arguments': arguments}}]}
        )
        assert row.messages[-1]['tool_calls'][0]['function']['arguments'] == arguments
        assert row.notes == (ARGUMENTS_NOT_OBJECT,)


def test_parameters_of_a_tool_written_as_json_text_are_parsed() -> None:
    schema = {'type': 'object', 'properties': {'lake': {'type': 'string'}}}
    tool = {'name': 'measure', 'parameters': schema}
    for given in (
        {**tool, 'parameters': json.dumps(schema)},
        {'type': 'function', 'function': {**tool, 'parameters': json.dumps(schema)}},
    ):
        row = turns(ASKED, TOLD, tools=[given])
        assert row.tools == [{'type': 'function', 'function': tool}]
        assert row.notes == ()
    row = turns(ASKED, TOLD, tools=[{**tool, 'parameters': 'a lake'}])
    assert row.notes == (PARAMETERS_NOT_OBJECT,)


def test_name_and_ids_of_tool_turns_are_kept() -> None:
    row = turns(
        ASKED,
        {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
        {'role': 'tool', 'name': 'measure', 'tool_call_id': 'call_0001', 'content': '4'},
        TOLD,
    )
    assert row.messages[2] == {'role': 'tool', 'content': '4', 'name': 'measure', 'tool_call_id': 'call_0001'}
    assert row.unused == ()
    assert 'tool_call_id' not in turns(ASKED, TOLD).messages[0]


def test_reasoning_is_read_under_each_of_its_names() -> None:
    for key in ('reasoning_content', 'reasoning', 'thinking'):
        assert reply(content='4', **{key: 'Two and two.'})['reasoning'] == 'Two and two.'
        assert 'reasoning' not in reply(content='4', **{key: ''})
        assert 'reasoning' not in reply(content='4', **{key: None})
    row = turns(ASKED, {'role': 'assistant', 'content': '4', 'thinking': 'a', 'reasoning': 'b'})
    assert row.messages[-1]['reasoning'] == 'b'
    assert row.unused == ('message key `thinking`',)
    same = turns(ASKED, {'role': 'assistant', 'content': '4', 'thinking': 'a', 'reasoning': 'a'})
    assert same.unused == ()


def test_a_message_decides_its_own_loss() -> None:
    for key in ('weight', 'loss', 'train'):
        for value in (0, 0.0, False, '0', '0.0', 'false', 'False'):
            assert reply(content='4', **{key: value})['loss'] is False
        for value in (1, 1.0, True, '1', '1.0', 'true'):
            assert reply(content='4', **{key: value})['loss'] is True
        assert 'loss' not in reply(content='4', **{key: None})
        with pytest.raises(BadRow, match=f"`{key}` is '0.5'; known values are 0, 1, true and false"):
            reply(content='4', **{key: 0.5})
    with pytest.raises(BadRow, match='`weight` and `train` contradict'):
        reply(content='4', weight=1, train=False)


def test_loss_on_a_turn_that_is_no_reply_is_named() -> None:
    assert turns({**ASKED, 'train': False}, TOLD).unused == ()
    assert turns({**ASKED, 'train': True}, TOLD).unused == ('message key `train`',)


def test_a_system_column_is_the_system_turn_of_every_shape() -> None:
    system = {'role': 'system', 'content': 'Be brief.'}
    assert turns(ASKED, TOLD, system='Be brief.').messages == [system, ASKED, TOLD]
    assert turns(system, ASKED, TOLD, system='Be brief.').messages == [system, ASKED, TOLD]
    assert turns(ASKED, TOLD, system=None).messages == [ASKED, TOLD]
    with pytest.raises(BadRow, match='a system column and a system turn that differ'):
        turns(system, ASKED, TOLD, system='Be long.')


def test_what_is_not_used_is_named_once() -> None:
    row = turns(
        {**ASKED, 'foo': 'x', 'empty': ''},
        {**TOLD, 'foo': 'y', 'tool_calls': [{**CALL, 'index': 0}]},
        system_prompt='Be brief.',
        source='web',
        id=7,
        nothing=None,
        blank=' ',
        hollow={'a': None, 'b': []},
    )
    assert row.unused == (
        'message key `foo`', 'tool call key `index`', 'column `system_prompt`', 'column `source`', 'column `id`',
    )  # fmt: skip
    row = turns({'role': 'user', 'content': [{'type': 'text', 'text': 'a', 'cache': 'b'}]}, TOLD)
    assert row.unused == ('content item key `cache`',)
    assert convert({'query': 'a', 'response': 'b', 'input': 'c'}).unused == ('column `input`',)
    assert convert({'instruction': 'a', 'input': 'c', 'output': 'b', 'history': []}).unused == ()


def test_legacy_functions_are_tools() -> None:
    function = {'name': 'measure', 'parameters': {}}
    row = turns(ASKED, TOLD, functions=[function])
    assert row.tools == [{'type': 'function', 'function': function}]
    assert row.unused == ()
    row = turns(ASKED, TOLD, tools=[function], functions=[{'name': 'other', 'parameters': {}}])
    assert row.unused == ('column `functions`',)


def test_numbers_that_json_does_not_know_are_missing() -> None:
    for missing in (float('nan'), float('inf'), float('-inf')):
        row = convert({'instruction': 'a', 'input': missing, 'output': 'b', 'system': missing, 'history': missing})
        assert row.messages == [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
        assert row.unused == ()
        for bad in ({'query': 'a', 'response': missing}, {'query': missing, 'response': 'b'}):
            with pytest.raises(BadRow, match='null'):
                convert(bad)
        with pytest.raises(BadRow, match='null assistant turn'):
            reply(content=missing)
        assert 'name' not in turns({**ASKED, 'name': missing}, TOLD).messages[0]


@pytest.mark.parametrize(
    ('value', 'kind'),
    [(datetime.date(2026, 1, 2), 'date'), (decimal.Decimal('1.5'), 'Decimal'), (b'x', 'bytes')],
)
def test_values_that_json_cannot_say_are_a_reason(value: Any, kind: str) -> None:
    call = {'function': {'name': 'measure', 'arguments': {'day': [value]}}}
    with pytest.raises(BadRow, match=f'tool_calls holds a {kind}, which JSON cannot represent'):
        reply(content=None, tool_calls=[call])
    with pytest.raises(BadRow, match=f'tools holds a {kind}, which JSON cannot represent'):
        turns(ASKED, TOLD, tools=[{'name': 'f', 'parameters': {'default': value}}])
    with pytest.raises(BadRow, match='holds NaN or Infinity'):
        reply(content=None, tool_calls=[{'function': {'name': 'measure', 'arguments': {'depth': float('nan')}}}])


def test_each_spelling_of_roles_and_keys_is_read() -> None:
    expected = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    for user in ('user', 'User', 'human', 'Human'):
        for assistant in ('assistant', 'ASSISTANT', 'gpt', 'ai', 'AI', 'chatgpt', 'ChatGPT'):
            for column in ('messages', 'conversations'):
                for role, content in (('role', 'content'), ('from', 'value')):
                    row = convert({column: [{role: user, content: 'a'}, {role: assistant, content: 'b'}]})
                    assert row.messages == expected
                    assert row.unused == ()
    row = turns({'role': 'developer', 'content': 'Be brief.'}, ASKED, TOLD)
    assert row.messages[0] == {'role': 'system', 'content': 'Be brief.'}
    with pytest.raises(BadRow, match='a system turn that is not the first'):
        turns(ASKED, {'role': 'developer', 'content': 'Be brief.'}, TOLD)


def test_an_odd_order_is_noted() -> None:
    assert turns(ASKED, TOLD).notes == ()
    assert turns({'role': 'user', 'content': ' '}, TOLD).notes == ('an empty question',)
    assert turns(ASKED, ASKED, TOLD).notes == ('a user turn after a user turn',)
    assert turns(ASKED, TOLD, TOLD).notes == ('an assistant turn after an assistant turn',)
    assert turns({'role': 'system', 'content': 's'}, TOLD).notes == (
        'a reply directly after the system text, without a user turn',
    )


def test_an_empty_instruction_puts_no_line_end_before_the_input() -> None:
    assert convert({'instruction': '', 'input': 'x', 'output': 'b'}).messages[0]['content'] == 'x'


def test_the_row_is_kept_as_it_was_written() -> None:
    for written in ({'messages': [ASKED, TOLD], 'id': 1}, {'query': 'a', 'response': 'b'},
                    {'instruction': 'a', 'output': 'b'}, {'conversations': [ASKED, TOLD]}):  # fmt: skip
        row = convert(written)
        assert row.written is written


def write_lines(path: Path, *lines: str) -> str:
    path.write_text(''.join(f'{line}\n' for line in lines))
    return str(path)


def test_a_plan_counts_what_is_not_used_and_what_is_odd(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / 'a.jsonl',
        '{"query": "a", "response": "b", "id": 1}',
        '{"query": "", "response": "b", "id": 2, "note": {"by": "x", "by": "y"}}',
        '{"query": "c", "response": "d"}',
    )
    noted = plan_rows([file]).noted
    assert noted.counts == {
        'column `id` is not used': 2,
        'the JSON key `by` occurs twice in an object: the last value is used': 1,
        'column `note` is not used': 1,
        'an empty question': 1,
    }
    assert noted.places['column `id` is not used'] == [f'{file}:1', f'{file}:2']


def test_a_json_key_that_stands_twice_is_told_at_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ['{"query": "a", "response": "b", "query": "c"}', '{"query": "d", "response": "e"}']
    for size in (3, 1 << 20):
        monkeypatch.setattr(file_bytes, 'BLOCK_BYTES', size)
        for name, text in (('a.jsonl', '\n'.join(rows)), ('a.json', '[' + ',\n'.join(rows) + ']')):
            file = write_lines(tmp_path / name, text)
            read = list(read_rows(Path(file)))
            assert [row for _, row in read] == [{'query': 'c', 'response': 'b'}, {'query': 'd', 'response': 'e'}]
            assert plan_rows([file], test_ratio=0).noted.counts == {
                'the JSON key `query` occurs twice in an object: the last value is used': 1
            }


def test_rows_that_are_drawn_out_are_a_decision(tmp_path: Path) -> None:
    file = write_lines(tmp_path / 'a.jsonl', *(json.dumps({'query': str(i), 'response': 'b'}) for i in range(40)))
    plan = plan_rows([file], train_sample=20, test_ratio=0.1)
    assert plan.decisions('last_round') == [
        'rows = 20 of 36 for training because --train_dataset_sample is 20: 16 rows are not used',
        'rows = 2 of 4 for validation because --train_dataset_sample is 20: 2 rows are not used',
    ]
    assert plan_rows([f'{file}#10'], test_ratio=0).decisions('last_round') == [
        f"rows = 10 of 40 of --dataset '{file}#10' because --dataset {file}#10 asks for them: 30 rows are not used"
    ]
    assert plan_rows([file], train_sample=40, test_ratio=0.1).decisions('last_round') == []


def test_earlier_replies_without_loss_are_a_decision(tmp_path: Path) -> None:
    two = [ASKED, TOLD, ASKED, TOLD, ASKED, TOLD]
    told = [ASKED, {**TOLD, 'loss': True}, ASKED, TOLD]
    file = write_lines(
        tmp_path / 'a.jsonl', *(json.dumps({'messages': messages}) for messages in (two, told, [ASKED, TOLD]))
    )
    plan = plan_rows([file], test_ratio=0)
    assert plan.decisions('last_round') == [
        'loss is on the last reply of a row because --loss_scope is last_round: 2 earlier replies carry no loss in '
        '1 of 3 rows read'
    ]
    assert plan.decisions('all_rounds') == []


def test_the_columns_decide_which_replies_carry_loss_if_no_scope_is_typed(tmp_path: Path) -> None:
    chats = write_lines(
        tmp_path / 'chats.jsonl',
        json.dumps({'messages': [ASKED, TOLD, ASKED, TOLD]}),
        json.dumps({'messages': [ASKED, {**TOLD, 'loss': False}, ASKED, TOLD]}),
    )
    shared = write_lines(
        tmp_path / 'shared.jsonl',
        json.dumps({'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}] * 3}),
    )
    rounds = write_lines(
        tmp_path / 'rounds.jsonl', json.dumps({'query': 'a', 'response': 'b', 'history': [['c', 'd'], ['e', 'f']]})
    )
    on_all = (
        'loss is on every reply of rows with messages or conversations because --loss_scope is not typed: '
        '3 earlier replies carry loss too in 2 of 4 rows read'
    )
    on_last = (
        'loss is on the last reply of rows with a history because --loss_scope is not typed: '
        '2 earlier replies carry no loss in 1 of 4 rows read'
    )
    words = [chats, shared, rounds]
    plan = plan_rows(words, test_ratio=0)
    assert plan.decisions(None) == [on_all, on_last]
    assert [row.loss_scope for _, row in plan.rows(TRAIN)] == ['all_rounds'] * 3 + ['last_round']
    streams = open_streams(words, hub='modelscope')
    assert stream_decisions(None, streams) == [
        line.replace('4 rows read', 'the first 4 rows') for line in (on_all, on_last)
    ]
    assert stream_decisions('all_rounds', streams) == []


def test_rows_of_parquet_have_their_own_keys_alone(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def row(arguments: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
        calls = [{'type': 'function', 'function': {'name': 'f', 'arguments': arguments}}]
        tool = {'type': 'function', 'function': {'name': 'f', 'parameters': {'properties': schema}}}
        return {
            'messages': [ASKED, {'role': 'assistant', 'content': None, 'tool_calls': calls}],
            'tools': [tool],
        }

    given = [({'lake': 'Ohrid'}, {'lake': {'type': 'string'}}), ({'a': 2, 'b': 3}, {'a': {'type': 'number'}})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(*each) for each in given]), tmp_path / 'a.parquet')
    read = [row for _, row in plan_rows([str(tmp_path / 'a.parquet')], test_ratio=0).rows(TRAIN)]
    for made, (arguments, schema) in zip(read, given, strict=True):
        assert made.messages[-1]['tool_calls'][0]['function']['arguments'] == arguments
        assert made.tools is not None and made.tools[0]['function']['parameters'] == {'properties': schema}
        assert made.unused == ()


def test_a_date_in_the_arguments_of_parquet_is_a_reason_with_its_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    call = {'function': {'name': 'f', 'arguments': {'day': datetime.date(2026, 1, 2)}}}
    rows = [{'messages': [ASKED, TOLD]}, {'messages': [ASKED, {'role': 'assistant', 'tool_calls': [call]}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
    left_out = plan_rows([str(tmp_path / 'a.parquet')], test_ratio=0).left_out
    assert left_out.places == {
        'tool_calls holds a date, which JSON cannot represent': [f'{tmp_path / "a.parquet"}: row 2'],
    }


def test_a_row_of_another_shape_is_told_by_its_columns(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / 'a.jsonl',
        '{"query": "a", "response": "b"}',
        '{"query": "a", "response": "b", "messages": []}',
        '{"query": "a"}',
    )
    assert list(plan_rows([file], test_ratio=0).left_out.counts) == [
        'the row has a different format than the first row, because it has the columns messages',
        'columns are missing that the first row has: response',
    ]


def test_each_of_very_many_numbers_keeps_its_spelling() -> None:
    written = [f'{i}.10' for i in range(100_010)]
    assert json_as_written([WrittenNumber(number) for number in written]) == f'[{", ".join(written)}]'


def test_numbers_of_json_are_text_as_they_were_written(tmp_path: Path) -> None:
    said = ['1.10', '3.0', '1e22', '-0.50', '12345678901234567890', '1E-7']
    for name, text in (
        ('rows.jsonl', ''.join(f'{{"query": "a", "response": {number}}}\n' for number in said)),
        ('rows.json', '[' + ', '.join(f'{{"query": "a", "response": {number}}}' for number in said) + ']'),
    ):
        (tmp_path / name).write_text(text)
        rows = get_dataset([str(tmp_path / name)], test_ratio=0).train
        assert [row.messages[-1]['content'] for row in rows] == said


def test_an_empty_earlier_reply_is_noted() -> None:
    turns = [
        {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': ' '},
        {'role': 'user', 'content': 'b'}, {'role': 'assistant', 'content': 'c'},
    ]  # fmt: skip
    assert 'an empty earlier reply: it never carries loss' in check_row(convert({'messages': turns})).notes


def test_a_file_whose_name_holds_the_mark_of_a_count_is_read(tmp_path: Path) -> None:
    file = tmp_path / 'set#1.jsonl'
    file.write_text('{"query": "a", "response": "b"}\n' * 3)
    assert len(get_dataset([str(file)], test_ratio=0).train) == 3
    assert len(get_dataset([f'{file}#2'], test_ratio=0).train) == 2

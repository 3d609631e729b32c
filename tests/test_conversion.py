"""Conversion keeps all that a row says of its turns, and names what it does not use."""

from __future__ import annotations

import datetime
import decimal
import json
from typing import Any

import pytest

from utils.convert import ARGUMENTS_NOT_OBJECT, PARAMETERS_NOT_OBJECT, BadRow, check_row, find_converter
from utils.preprocess import Message, Row, said

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
    """Return what conversion makes of an assistant turn with these keys, the last of its row."""
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
    assert said(row.messages[-1]) == '[{"name": "measure", "arguments": {"lake": "Ohrid"}}]'
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
        with pytest.raises(BadRow, match=f"`{key}` is '0.5'; known are 0, 1, true and false"):
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
    with pytest.raises(BadRow, match='a system column and a system turn that says something else'):
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
    with pytest.raises(BadRow, match=f'tool_calls holds a {kind}, which JSON cannot say'):
        reply(content=None, tool_calls=[call])
    with pytest.raises(BadRow, match=f'tools holds a {kind}, which JSON cannot say'):
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
        'a reply to a system text alone, without a user turn',
    )


def test_an_empty_instruction_puts_no_line_end_before_the_input() -> None:
    assert convert({'instruction': '', 'input': 'x', 'output': 'b'}).messages[0]['content'] == 'x'


def test_the_row_is_kept_as_it_was_written() -> None:
    for written in ({'messages': [ASKED, TOLD], 'id': 1}, {'query': 'a', 'response': 'b'},
                    {'instruction': 'a', 'output': 'b'}, {'conversations': [ASKED, TOLD]}):  # fmt: skip
        row = convert(written)
        assert row.written is written

"""Rows of every known shape as conversations. Converters are pure and say what is wrong with a row."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from utils.formats.conversation import BadRow, Message, Row

# Names of roles in lower case.
_ROLES = {
    'system': 'system',
    'developer': 'system',
    'user': 'user',
    'human': 'user',
    'assistant': 'assistant',
    'gpt': 'assistant',
    'chatgpt': 'assistant',
    'ai': 'assistant',
    'model': 'assistant',
    'bot': 'assistant',
    'function_call': 'call',
    'tool_call': 'call',
    'tool': 'tool',
    'observation': 'tool',
    'function': 'tool',
    'function_response': 'tool',
    'tool_response': 'tool',
}
_REASONING_KEYS = ('reasoning_content', 'reasoning', 'thinking')
_LOSS_KEYS = ('weight', 'loss', 'train')
_LOSS_VALUES = {'0': False, '0.0': False, 'false': False, '1': True, '1.0': True, 'true': True}

# What may be said of a row that is used.
ARGUMENTS_NOT_OBJECT = 'the arguments of a tool call are no JSON object: kept as they are'
PARAMETERS_NOT_OBJECT = 'the parameters of a tool are text that is no JSON object: kept as they are'
EMPTY_REPLY = 'an empty earlier reply: it never carries loss'
EMPTY_QUESTION = 'an empty question'
SAME_ROLE_TWICE = {'user': 'a user turn after a user turn', 'assistant': 'an assistant turn after an assistant turn'}
NO_LOSS_TOLD = 'a reply carries no loss, as the row says (`weight`, `loss` or `train`)'
NOT_A_NUMBER = 'a cell is NaN or Infinity: read as missing'
NO_USER_TURN = 'a reply to a system text alone, without a user turn'


@dataclass(frozen=True)
class _Remarks:
    """What conversion does not use of a row, and what else it says of it, each once and in order."""

    unused: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def note_unused(self, values: Mapping[str, Any], used: Collection[str], what: str) -> None:
        """Remember the keys outside `used` that hold something."""
        for key, value in values.items():
            if key not in used and not _holds_nothing(value):
                self.unused[f'{what} `{key}`'] = None


def _is_missing(value: Any) -> bool:
    """Return whether a cell is missing: null, or a number that JSON does not know (NaN, Infinity)."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _holds_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_holds_nothing, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_holds_nothing, value))
    return _is_missing(value) or (isinstance(value, str) and not value.strip())


def _cell(row: Mapping[str, Any], column: str) -> Any:
    """Return a cell, None where it is missing."""
    value = row.get(column)
    return None if _is_missing(value) else value


def _text(value: Any, what: str, column: str = '') -> str:
    if _is_missing(value):
        raise BadRow(f'null {what}', column or what)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f'{what} is a {type(value).__name__}, not text', column or what)
    return str(value)


def _json(value: Any, column: str) -> Any:
    """Return a list or object that may have been written as JSON text (as CSV must)."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f'{column} is text that is not JSON', column) from None


def _object_of(value: Any) -> Any:
    """Return the JSON object that a text writes; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _check_json(value: Any, column: str) -> None:
    """Raise BadRow where a value holds what JSON cannot say, such as a date of a parquet file."""

    def refuse(item: Any) -> NoReturn:
        raise BadRow(f'{column} holds a {type(item).__name__}, which JSON cannot say', column)

    try:
        json.dumps(value, allow_nan=False, default=refuse)
    except TypeError:
        raise BadRow(f'{column} has a key that is not text', column) from None
    except RecursionError:
        raise BadRow(f'{column} is nested too deep', column) from None
    except BadRow:
        raise
    except ValueError:
        raise BadRow(f'{column} holds NaN or Infinity, which JSON cannot say', column) from None


def _images(row: Mapping[str, Any]) -> list[str]:
    """Return the paths of the images column: one, a list, or a list written as JSON text."""
    images = _cell(row, 'images')
    if isinstance(images, str) and not images.lstrip().startswith('['):
        images = [images] if images else []
    images = _json(images, 'images') or []
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise BadRow('images is neither a path nor a list of paths', 'images')
    return images


def _content(value: Any, what: str, column: str, remarks: _Remarks) -> str:
    """Return the text of a turn; of one that is a list of items, each image as its tag."""
    if not isinstance(value, list):
        return _text(value, what, column)
    parts = []
    for item in value:
        kind = item.get('type') if isinstance(item, dict) else None
        if kind == 'image':
            key = 'image' if item.get('image') else 'path'
            parts.append(f'<img>{_text(item.get(key) or "", "an image item", column)}</img>')
        elif kind == 'text':
            key = 'text'
            parts.append(_text(item.get(key), what, column))
        else:
            raise BadRow(f'{what} has an item of type {kind}, known are text and image', column)
        remarks.note_unused(item, ('type', key), 'content item key')
    return ''.join(parts)


def _tool(tool: dict[str, Any], remarks: _Remarks) -> dict[str, Any]:
    """Return a tool in its wrapper, its parameters as an object where JSON text writes one."""
    wrapped = tool if 'function' in tool else {'type': 'function', 'function': tool}
    function = wrapped['function']
    if not isinstance(function, dict) or not isinstance(function.get('parameters'), str):
        return wrapped
    parameters = _object_of(function['parameters'])
    if isinstance(parameters, str):
        remarks.notes[PARAMETERS_NOT_OBJECT] = None
    return {**wrapped, 'function': {**function, 'parameters': parameters}}


def _tools(row: Mapping[str, Any], remarks: _Remarks) -> list[Any] | None:
    """Return the tools of a row; of a legacy row, its functions."""
    given = {column: _json(_cell(row, column), column) for column in ('tools', 'functions')}
    column = 'tools' if given['tools'] else 'functions'
    tools = given[column]
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f'{column} is not a list of objects', column)
    _check_json(tools, column)
    if column == 'tools' and given['functions']:
        remarks.note_unused({'functions': given['functions']}, (), 'column')
    return [_tool(tool, remarks) for tool in tools]


def _call(call: Any, remarks: _Remarks) -> dict[str, Any]:
    """Return a call in its wrapper, its arguments as an object where JSON text writes one."""
    wrapper = call if isinstance(call, dict) and 'function' in call else {'function': call}
    kind, function = wrapper.get('type') or 'function', wrapper['function']
    if kind != 'function':
        raise BadRow(f"a tool call of type '{kind}', known is function")
    if not isinstance(function, dict) or not isinstance(function.get('name'), str) or not function['name']:
        raise BadRow('a function call has no name')
    own_id = {'id', 'type'} if function is call else set()
    remarks.note_unused(wrapper, ('type', 'id', 'function'), 'tool call key')
    remarks.note_unused(function, {'name', 'arguments', *own_id}, 'tool call key')
    arguments = function.get('arguments')
    if _is_missing(arguments) or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    arguments = _object_of(arguments)
    if not isinstance(arguments, dict):
        remarks.notes[ARGUMENTS_NOT_OBJECT] = None
    said = {'name': function['name'], 'arguments': arguments}
    made: dict[str, Any] = {'type': 'function'}
    identity = call.get('id')
    if not _holds_nothing(identity):
        made['id'] = _text(identity, 'the id of a tool call')
    made['function'] = _in_order_of(function, said)
    return _in_order_of(wrapper, made)


def _in_order_of(written: Mapping[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Return the object with its keys in the order in which they were written, for templates that print it whole."""
    places = {key: place for place, key in enumerate(written)}
    return dict(sorted(made.items(), key=lambda item: places.get(item[0], -1 if item[0] == 'type' else len(places))))


def _calls(calls: Any, column: str, remarks: _Remarks) -> list[dict[str, Any]]:
    """Return the calls of a list of them, or of one alone."""
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
        raise BadRow('tool_calls is not a list of objects', column)
    made = [_call(call, remarks) for call in calls]
    _check_json(made, 'tool_calls')
    return made


def _calls_in_text(content: str, column: str, remarks: _Remarks) -> list[dict[str, Any]]:
    """Return the calls of a turn whose role says that its whole content is calls."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        raise BadRow('a function call is not JSON') from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) for call in calls):
        raise BadRow('a function call has no name')
    return _calls(calls, column, remarks)


def _loss(turn: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Return whether a turn says that it carries loss, and the key that says it; None where it does not say."""
    found: dict[str, bool] = {}
    for key in _LOSS_KEYS:
        value = turn.get(key)
        if _holds_nothing(value):
            continue
        carries = _LOSS_VALUES.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None
        if carries is None:
            shown = value if isinstance(value, str | int | float) else type(value).__name__
            raise BadRow(f"the message key `{key}` is '{shown}'; known are 0, 1, true and false")
        found[key] = carries
    if len(set(found.values())) > 1:
        raise BadRow(f'the message keys {" and ".join(f"`{key}`" for key in found)} contradict each other')
    return next(iter(found.items()), None)


class _Turn:
    """A turn as it was written; what is read of it is remembered, so that the rest can be named."""

    def __init__(self, turn: Mapping[str, Any], column: str, remarks: _Remarks) -> None:
        self.turn, self.column, self.remarks = turn, column, remarks
        self.used: set[str] = set()

    def first(self, keys: Sequence[str]) -> Any:
        """Return the value of the first key that holds something, None where none does."""
        for key in keys:
            if not _holds_nothing(self.turn.get(key)):
                self.used.add(key)
                value = self.turn[key]
                # Another key that says the same loses nothing.
                self.used.update(other for other in keys if self.turn.get(other) == value)
                return value
        return None

    def calls(self) -> list[dict[str, Any]]:
        """Return the calls of an assistant turn, [] where it calls nothing."""
        calls = _json(self.first(['tool_calls']), 'tool_calls')
        if not calls:
            calls = _json(self.first(['function_call']), 'function_call')
        return _calls(calls, self.column, self.remarks) if calls else []

    def message(self, role: str, role_key: str, content_key: str) -> Message:
        """Return the turn as a message; names the keys that it does not use."""
        self.used |= {role_key, content_key}
        content = self.turn.get(content_key)
        speaker = 'assistant' if role == 'call' else role
        calls = self.calls() if role == 'assistant' else []
        if calls and _is_missing(content):
            content = ''
        text = _content(content, f'{role} turn', self.column, self.remarks)
        if role == 'call':
            calls, text = _calls_in_text(text, self.column, self.remarks), ''
        message: Message = {'role': speaker, 'content': text}
        if calls:
            message['tool_calls'] = calls
        if name := self.first(['name']):
            message['name'] = _text(name, 'the name of a turn', self.column)
        if speaker == 'tool' and (identity := self.first(['tool_call_id'])):
            message['tool_call_id'] = _text(identity, 'tool_call_id', self.column)
        if speaker == 'assistant' and (reasoning := self.first(_REASONING_KEYS)):
            message['reasoning'] = _text(reasoning, 'reasoning', self.column)
        self._say_loss(message)
        self.remarks.note_unused(self.turn, self.used, 'message key')
        return message

    def _say_loss(self, message: Message) -> None:
        """Set whether the turn carries loss; a turn that is no reply never does, so that only 'yes' is not used."""
        told = _loss(self.turn)
        if told is None:
            return
        if message['role'] == 'assistant':
            message['loss'] = told[1]
        if message['role'] == 'assistant' or not told[1]:
            self.used.update(_LOSS_KEYS)


def _key_in(turn: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first of the keys that the turn has, the first of all where it has none."""
    return next((key for key in keys if key in turn), keys[0])


def _turns(
    turns: Any, remarks: _Remarks, *, column: str, role_keys: Sequence[str], content_keys: Sequence[str]
) -> list[Message]:
    """Return the messages of a column; of keys for the same thing the first that a turn has counts."""
    turns = _json(turns, column)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f'{column} is not a list of turns', column)
    messages: list[Message] = []
    for turn in turns:
        role_key = _key_in(turn, role_keys) if isinstance(turn, dict) else ''
        if not isinstance(turn, dict) or role_key not in turn:
            raise BadRow(f'a turn of {column} has no {role_keys[0]}')
        role = _ROLES.get(str(turn[role_key]).strip().lower())
        if role is None:
            raise BadRow(f"unknown role '{turn[role_key]}'")
        messages.append(_Turn(turn, column, remarks).message(role, role_key, _key_in(turn, content_keys)))
    return messages


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return the messages with the system column, where there is one, as their first turn."""
    value = _cell(row, 'system')
    system = '' if _holds_nothing(value) else _text(value, 'system')
    if not system:
        return messages
    if messages and messages[0]['role'] == 'system':
        if messages[0]['content'] == system:
            return messages
        raise BadRow('a system column and a system turn that says something else', 'system')
    return [{'role': 'system', 'content': system}, *messages]


_EVERYWHERE = ('system', 'tools', 'functions', 'images')


def _row(row: Mapping[str, Any], messages: list[Message], remarks: _Remarks, *columns: str) -> Row:
    """Return the row of these messages; `columns` are those that they were read from."""
    tools, images = _tools(row, remarks), _images(row)
    remarks.note_unused(row, (*columns, *_EVERYWHERE), 'column')
    if any(value is not None and _is_missing(value) for value in row.values()):
        remarks.notes[NOT_A_NUMBER] = None
    return Row(
        messages=_with_system(row, messages),
        tools=tools,
        images=images,
        written=row,
        unused=tuple(remarks.unused),
        notes=tuple(remarks.notes),
    )


def _from_messages(row: Mapping[str, Any]) -> Row:
    remarks = _Remarks()
    keys: dict[str, Sequence[str]] = {'role_keys': ('role', 'from'), 'content_keys': ('content', 'value')}
    messages = _turns(row['messages'], remarks, column='messages', **keys)
    return _row(row, messages, remarks, 'messages')


def _from_conversations(row: Mapping[str, Any]) -> Row:
    remarks = _Remarks()
    keys: dict[str, Sequence[str]] = {'role_keys': ('from', 'role'), 'content_keys': ('value', 'content')}
    messages = _turns(row['conversations'], remarks, column='conversations', **keys)
    return _row(row, messages, remarks, 'conversations')


def _history(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = _json(_cell(row, 'history'), 'history') or []
    if not isinstance(history, list | tuple):
        raise BadRow('history is not a list of [query, response] pairs', 'history')
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow('history is not a list of [query, response] pairs', 'history')
        messages.append({'role': 'user', 'content': _text(pair[0], 'query in history', 'history')})
        messages.append({'role': 'assistant', 'content': _text(pair[1], 'response in history', 'history')})
    return messages


def _from_query(row: Mapping[str, Any]) -> Row:
    asked: Message = {'role': 'user', 'content': _text(row['query'], 'query')}
    answered: Message = {'role': 'assistant', 'content': _text(row['response'], 'response')}
    return _row(row, [*_history(row), asked, answered], _Remarks(), 'query', 'response', 'history')


def _from_instruction(row: Mapping[str, Any]) -> Row:
    query, extra = _text(row['instruction'], 'instruction'), _cell(row, 'input')
    added = '' if extra is None else _text(extra, 'input')
    asked: Message = {'role': 'user', 'content': '\n'.join(part for part in (query, added) if part)}
    answered: Message = {'role': 'assistant', 'content': _text(row['output'], 'output')}
    columns = ('instruction', 'input', 'output', 'history')
    return _row(row, [*_history(row), asked, answered], _Remarks(), *columns)


Converter = Callable[[Mapping[str, Any]], Row]

# Columns that must be there, and what reads them; the first match counts.
SHAPES: tuple[tuple[frozenset[str], Converter], ...] = (
    (frozenset({'messages'}), _from_messages),
    (frozenset({'conversations'}), _from_conversations),
    (frozenset({'query', 'response'}), _from_query),
    (frozenset({'instruction', 'output'}), _from_instruction),
)
KNOWN_SHAPES = (
    'query/response[/history][/system], instruction/input/output, messages with role/content, '
    'conversations with from/value; tools and images where there are any'
)


def find_converter(columns: Collection[str]) -> Converter | None:
    """Return what reads rows with these columns, or None."""
    return next((converter for needed, converter in SHAPES if needed <= set(columns)), None)


def needed_columns(converter: Converter) -> frozenset[str]:
    """Return the columns that a row must have for its converter."""
    return next(needed for needed, known in SHAPES if known is converter)


def _turn_notes(messages: Sequence[Message]) -> Iterable[str]:
    """Yield what is odd about the turns of a row that is used all the same."""
    said = [message for message in messages if message['role'] != 'system']
    if len(said) < len(messages) and said[0]['role'] == 'assistant':
        yield NO_USER_TURN
    if any(message.get('loss') is False for message in said):
        yield NO_LOSS_TOLD
    if any(message['role'] == 'user' and not message['content'].strip() for message in said):
        yield EMPTY_QUESTION
    earlier = (message for message in said[:-1] if message['role'] == 'assistant')
    if any(not message['content'].strip() and not message.keys() & {'tool_calls', 'reasoning'} for message in earlier):
        yield EMPTY_REPLY
    for before, turn in itertools.pairwise(said):
        if turn['role'] == before['role'] and turn['role'] in SAME_ROLE_TWICE:
            yield SAME_ROLE_TWICE[turn['role']]


def _texts(row: Row) -> Iterable[str]:
    for message in row.messages:
        yield from (message['content'], message.get('reasoning', ''))
        yield from (message.get('name', ''), message.get('tool_call_id', ''))
    yield from row.images
    if row.tools or any('tool_calls' in message for message in row.messages):
        calls = [message.get('tool_calls') for message in row.messages]
        yield json.dumps([calls, row.tools], ensure_ascii=False, default=str)


def check_row(row: Row) -> Row:
    """Return the row as it is; raises BadRow where there is no reply to learn, or where it is no text."""
    try:
        ''.join(_texts(row)).encode()
    except UnicodeEncodeError:  # JSON can write it: "\ud83d"
        raise BadRow('a text is not UTF-8, or holds half of a character (a lone surrogate)') from None
    last = row.messages[-1]
    if last['role'] != 'assistant':
        raise BadRow(f"the last turn is the {last['role']}'s, there is no reply to learn")
    if not last['content'].strip() and 'tool_calls' not in last:
        raise BadRow('empty response')
    if any(message['role'] == 'system' for message in row.messages[1:]):
        raise BadRow('a system turn that is not the first')
    if len(row.messages) < 2:
        raise BadRow('a reply without a question')
    row.notes = tuple(dict.fromkeys([*row.notes, *_turn_notes(row.messages)]))
    return row

"""Reads rows from their source data a second time, to check that the conversion of the data lost nothing.

This module shares no code with the conversion, so it cannot repeat an error of the conversion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from utils.formats.conversation import Row
from utils.formats.json_text import JsonParser

REASONING_KEYS = ('reasoning_content', 'reasoning', 'thinking')

# Role names in data sets (in lower case), each with the role name that chat templates use.
_ROLES = {
    'human': 'user',
    'gpt': 'assistant',
    'model': 'assistant',
    'bot': 'assistant',
    'chatgpt': 'assistant',
    'ai': 'assistant',
    'developer': 'system',
    'observation': 'tool',
    'function': 'tool',
    'function_response': 'tool',
    'tool_response': 'tool',
}
# Columns that always hold texts.
_TEXTS = ({'query', 'response'}, {'instruction', 'output'})
# Columns that may hold the turns of a prompt and of its completion.
_PAIRS = (
    ('prompt', 'completion'),
    ('prompt', 'response'),
    ('question', 'answer'),
    ('question', 'response'),
    ('input', 'output'),
)
_CALL_ROLES = ('function_call', 'tool_call')
# The keys of a turn that `_message` does not copy: it reads them by name, or they only set whether a turn is trained.
_READ_KEYS = {'role', 'from', 'content', 'value', 'weight', 'loss', 'train', 'tool_calls', 'function_call'}


def messages_as_written(row: Row) -> list[dict[str, Any]]:
    """Return the turns of a row from the source data, with all keys except those that the conversion reports as unused.

    If the source row has separate texts (e.g. query and response) instead of turns, the converted turns are returned.
    """
    turns = _turns_as_written(row.written)
    if turns is None:
        return [dict(message) for message in row.messages]

    messages = [_message(turn, row.unused) for turn in turns]
    system = row.written.get('system')
    if isinstance(system, str) and system.strip() and messages[0]['role'] != 'system':
        messages.insert(0, {'role': 'system', 'content': system})
    return messages


def _turns_as_written(written: Mapping[str, Any]) -> list[Any] | None:
    """Return the turns of a row, or None if the row has separate texts (e.g. query and response) instead of turns."""
    column = next((name for name in ('messages', 'conversations') if written.get(name)), None)
    if column is not None:
        turns = _parsed(written[column])
        return turns if isinstance(turns, list) else None
    if written.get('history') or any(names <= written.keys() for names in _TEXTS):
        return None

    for asked, answered in _PAIRS:
        sides = (written.get(asked), written.get(answered))
        if None not in sides and any(isinstance(side, list | dict) for side in sides):
            return [*_side(sides[0], 'user'), *_side(sides[1], 'assistant')]
    return None


def _side(value: Any, role: str) -> list[Any]:
    """Return a prompt or a completion as a list of turns. A text becomes one turn with this role."""
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, dict) else [{'role': role, 'content': value}]


def tools_as_written(row: Row) -> list[Any] | None:
    """Return the tools of a row as they are in the source data, each as {'type': 'function', 'function': ...}.

    If the source data has no list of tools, the converted tools are returned, or None if there are none.
    """
    found = [_parsed(row.written.get(column)) for column in ('tools', 'functions')]
    tools = next((value for value in found if isinstance(value, list) and value), None)
    if tools is None:
        return row.tools or None

    wrapped = [tool if 'function' in tool else {'type': 'function', 'function': tool} for tool in tools]
    return [{**tool, 'function': _with_object(tool['function'], 'parameters')} for tool in wrapped]


def _message(turn: Mapping[str, Any], unused: tuple[str, ...]) -> dict[str, Any]:
    name = str(turn.get('role', turn.get('from'))).strip().lower()
    content = turn.get('content', turn.get('value'))
    calls = turn.get('tool_calls') or turn.get('function_call')
    if name in _CALL_ROLES:
        calls = content
        content = None
        name = 'assistant'

    message: dict[str, Any] = {'role': _ROLES.get(name, name), 'content': _text(content)}
    for key, value in turn.items():
        if key not in _READ_KEYS and not _is_empty(value) and f'message key `{key}`' not in unused:
            message[key] = value
    found = _parsed(calls)
    if found:
        message['tool_calls'] = [_call(call) for call in (found if isinstance(found, list) else [found])]
    return message


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get('function', call)
    arguments = function.get('arguments')
    is_missing = _is_empty(arguments) or (isinstance(arguments, str) and not arguments.strip())
    read_arguments = {} if is_missing else _with_object(function, 'arguments')['arguments']

    # A template may print the keys in the order in which it gets them, so the order of the source data is kept.
    read_function: dict[str, Any] = {}
    for key in function:
        if key == 'name':
            read_function['name'] = function['name']
        elif key == 'arguments':
            read_function['arguments'] = read_arguments
    read_function.setdefault('arguments', read_arguments)

    keys = list(call) if 'function' in call else ['type', 'id', 'function']
    read_call: dict[str, Any] = {} if 'type' in keys else {'type': 'function'}
    for key in keys:
        if key == 'function':
            read_call['function'] = read_function
        elif key == 'id' and not _is_empty(call.get('id')):
            read_call['id'] = str(call['id'])
        elif key == 'type':
            read_call['type'] = 'function'
    return read_call


def _text(content: Any) -> str:
    """Return the content of a turn as one text. If the content is a list of parts, their texts are joined."""
    if isinstance(content, list):
        return ''.join(part if isinstance(part, str) else str(part.get('text') or '') for part in content)
    return '' if _is_empty(content) else str(content)


def _is_empty(value: Any) -> bool:
    return value is None or value in ('', [], {}) or (isinstance(value, float) and not math.isfinite(value))


def _parsed(value: Any) -> Any:
    """Return the object or list that a JSON text contains. Any other value is returned unchanged."""
    try:
        found = JsonParser().parse(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value


def _with_object(function: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of `function` in which the value of `key` is parsed if it is JSON text of an object."""
    found = _parsed(function.get(key))
    return {**function, key: found} if isinstance(found, dict) else dict(function)

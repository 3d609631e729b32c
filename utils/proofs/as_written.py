"""Rows read anew from what their data holds, for the proofs: this reading shares nothing with the conversion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from utils.formats.conversation import Row

REASONING_KEYS = ('reasoning_content', 'reasoning', 'thinking')

# Names of roles as rows write them, in lower case.
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
_CALL_ROLES = ('function_call', 'tool_call')
# Keys that are read by name below, or that say how a turn is trained.
_KNOWN = {'role', 'from', 'content', 'value', 'weight', 'loss', 'train', 'tool_calls', 'function_call'}


def messages_as_written(row: Row) -> list[dict[str, Any]]:
    """Return the turns of a row as its data has them, so that what conversion loses is not missing here.

    Keys that conversion names as not used are left out: they are counted. Rows of other shapes than turns hold texts
    alone, which the account of characters follows; of them the converted turns are returned.
    """
    column = next((name for name in ('messages', 'conversations') if row.written.get(name)), None)
    turns = _parsed(row.written[column]) if column else None
    if not isinstance(turns, list):
        return [dict(message) for message in row.messages]
    messages = [_message(turn, row.unused) for turn in turns]
    system = row.written.get('system')
    if isinstance(system, str) and system.strip() and messages[0]['role'] != 'system':
        messages.insert(0, {'role': 'system', 'content': system})
    return messages


def tools_as_written(row: Row) -> list[Any] | None:
    """Return the tools of a row as its data has them, each in its wrapper; None where it has none."""
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
        calls, content, name = content, None, 'assistant'
    message: dict[str, Any] = {'role': _ROLES.get(name, name), 'content': _text(content)}
    for key, value in turn.items():
        if key not in _KNOWN and not _is_empty(value) and f'message key `{key}`' not in unused:
            message[key] = value
    found = _parsed(calls)
    if found:
        message['tool_calls'] = [_call(call) for call in (found if isinstance(found, list) else [found])]
    return message


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get('function', call)
    arguments = function.get('arguments')
    is_missing = _is_empty(arguments) or (isinstance(arguments, str) and not arguments.strip())
    given = {} if is_missing else _with_object(function, 'arguments')['arguments']
    said = {key: given if key == 'arguments' else function[key] for key in function if key in ('name', 'arguments')}
    keys = list(call) if 'function' in call else ['type', 'id', 'function']
    made: dict[str, Any] = {} if 'type' in keys else {'type': 'function'}
    for key in keys:
        if key == 'function':
            made['function'] = {**said, 'arguments': given}
        elif key == 'id' and not _is_empty(call.get('id')):
            made['id'] = str(call['id'])
        elif key == 'type':
            made['type'] = 'function'
    return made


def _text(content: Any) -> str:
    """Return the text of a turn: of one that is a list of parts, all of them joined."""
    if isinstance(content, list):
        return ''.join(part if isinstance(part, str) else str(part.get('text') or '') for part in content)
    return '' if _is_empty(content) else str(content)


def _is_empty(value: Any) -> bool:
    return value is None or value in ('', [], {}) or (isinstance(value, float) and not math.isfinite(value))


def _parsed(value: Any) -> Any:
    """Return the object or list that a JSON text writes; anything else as it is."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value


def _with_object(function: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the function with the object that a JSON text writes under a key; a text that is none stays."""
    found = _parsed(function.get(key))
    return {**function, key: found} if isinstance(found, dict) else dict(function)

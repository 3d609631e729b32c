"""Rows of every known shape as conversations. Converters are pure and say what is wrong with a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from utils.preprocess import Message, Row

_ROLES = {
    'system': 'system',
    'user': 'user',
    'human': 'user',
    'assistant': 'assistant',
    'gpt': 'assistant',
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


class BadRow(ValueError):
    """A row that cannot be trained on; its text is the reason under which the row is counted."""

    def __init__(self, reason: str, column: str = '') -> None:
        super().__init__(reason)
        self.column = column


class Filtered(BadRow):
    """A row that the entry of its data set leaves out on purpose, which is no defect."""


def _text(value: Any, what: str, column: str = '') -> str:
    if value is None:
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


def _images(row: Mapping[str, Any]) -> list[str]:
    """Return the paths of the images column: one, a list, or a list written as JSON text."""
    images = row.get('images')
    if isinstance(images, str) and not images.lstrip().startswith('['):
        images = [images] if images else []
    images = _json(images, 'images') or []
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise BadRow('images is neither a path nor a list of paths', 'images')
    return images


def _content(value: Any, what: str, column: str) -> str:
    """Return the text of a turn; of one that is a list of items, each image as its tag."""
    if not isinstance(value, list):
        return _text(value, what, column)
    parts = []
    for item in value:
        kind = item.get('type') if isinstance(item, dict) else None
        if kind == 'image':
            path = item.get('image') or item.get('path') or ''
            parts.append(f'<img>{_text(path, "an image item", column)}</img>')
        elif kind == 'text':
            parts.append(_text(item.get('text'), what, column))
        else:
            raise BadRow(f'{what} has an item of type {kind}, known are text and image', column)
    return ''.join(parts)


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = _json(row.get('tools'), 'tools')
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow('tools is not a list of objects', 'tools')
    return [tool if 'function' in tool else {'type': 'function', 'function': tool} for tool in tools]


def _call(content: str) -> Message:
    """Return an assistant turn that calls functions, its text kept beside the parsed calls."""
    message: Message = {'role': 'assistant', 'content': content}
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        raise BadRow('a function call is not JSON') from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and isinstance(call.get('name'), str) for call in calls):
        raise BadRow('a function call has no name')
    message['tool_calls'] = [
        {'type': 'function', 'function': {'name': c['name'], 'arguments': c.get('arguments', {})}} for c in calls
    ]
    return message


def _turns(turns: Any, *, column: str, role_key: str, content_key: str) -> list[Message]:
    turns = _json(turns, column)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f'{column} is not a list of turns', column)
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict) or role_key not in turn:
            raise BadRow(f'a turn of {column} has no {role_key}')
        role = _ROLES.get(str(turn[role_key]))
        if role is None:
            raise BadRow(f"unknown role '{turn[role_key]}'")
        calls = turn.get('tool_calls')
        if role == 'assistant' and calls:
            if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
                raise BadRow('tool_calls is not a list of objects', column)
            said = turn.get(content_key) or json.dumps([c.get('function', c) for c in calls], ensure_ascii=False)
            content = _content(said, 'assistant turn', column)
            messages.append({'role': 'assistant', 'content': content, 'tool_calls': calls})
            continue
        content = _content(turn.get(content_key), f'{role} turn', column)
        messages.append(_call(content) if role == 'call' else {'role': role, 'content': content})
    return messages


def _from_messages(row: Mapping[str, Any]) -> Row:
    messages = _turns(row['messages'], column='messages', role_key='role', content_key='content')
    return Row(messages=messages, tools=_tools(row), images=_images(row))


def _from_conversations(row: Mapping[str, Any]) -> Row:
    messages = _turns(row['conversations'], column='conversations', role_key='from', content_key='value')
    if row.get('system'):
        messages.insert(0, {'role': 'system', 'content': _text(row['system'], 'system')})
    return Row(messages=messages, tools=_tools(row), images=_images(row))


def _from_query(row: Mapping[str, Any]) -> Row:
    messages: list[Message] = []
    if row.get('system'):
        messages.append({'role': 'system', 'content': _text(row['system'], 'system')})
    history = _json(row.get('history'), 'history') or []
    if not isinstance(history, list | tuple):
        raise BadRow('history is not a list of [query, response] pairs', 'history')
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow('history is not a list of [query, response] pairs', 'history')
        messages.append({'role': 'user', 'content': _text(pair[0], 'query in history', 'history')})
        messages.append({'role': 'assistant', 'content': _text(pair[1], 'response in history', 'history')})
    messages.append({'role': 'user', 'content': _text(row['query'], 'query')})
    messages.append({'role': 'assistant', 'content': _text(row['response'], 'response')})
    return Row(messages=messages, tools=_tools(row), images=_images(row))


def _from_instruction(row: Mapping[str, Any]) -> Row:
    query = _text(row['instruction'], 'instruction')
    extra = row.get('input')
    if extra not in (None, ''):
        query = f'{query}\n{_text(extra, "input")}'
    return _from_query({**row, 'query': query, 'response': row['output']})


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


def check_row(row: Row) -> Row:
    """Return the row as it is; raises BadRow where there is no reply to learn, or where it is no text."""
    texts = [*(message['content'] for message in row.messages), *row.images]
    if row.tools or any('tool_calls' in message for message in row.messages):
        texts.append(json.dumps([row.messages, row.tools], ensure_ascii=False, default=str))
    try:
        ''.join(texts).encode()
    except UnicodeEncodeError:  # JSON can write it: "\ud83d"
        raise BadRow('a text is not UTF-8, or holds half of a character (a lone surrogate)') from None
    last = row.messages[-1]
    if last['role'] != 'assistant':
        raise BadRow(f"the last turn is the {last['role']}'s, there is no reply to learn")
    if not last['content'].strip():
        raise BadRow('empty response')
    if any(message['role'] == 'system' for message in row.messages[1:]):
        raise BadRow('a system turn that is not the first')
    if len(row.messages) < 2:
        raise BadRow('a reply without a question')
    return row

"""Converts the turns in a column, such as `messages` or `conversations`, to messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.formats.cells import Remarks, as_text, is_empty, is_missing, parse_json
from utils.formats.conversation import BadRow, Message
from utils.formats.tool_calls import calls_in_text, converted_calls

# Names of roles in data files, in lower case, and the role that each name means. The content of a 'call' turn is a
# tool call.
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


def _content(value: Any, what: str, column: str, remarks: Remarks) -> str:
    """Return the content of a turn as text. If the content is a list of items, each image becomes an <img> tag.

    Raises BadRow if an item is neither text nor an image.
    """
    if not isinstance(value, list):
        return as_text(value, what, column)

    parts = []
    for item in value:
        kind = item.get('type') if isinstance(item, dict) else None
        if kind == 'image':
            key = 'image' if item.get('image') else 'path'
            parts.append(f'<img>{as_text(item.get(key) or "", "an image item", column)}</img>')
        elif kind == 'text':
            key = 'text'
            parts.append(as_text(item.get(key), what, column))
        else:
            raise BadRow(f'{what} has an item of type {kind}; known types are text and image', column)
        remarks.note_unused(item, ('type', key), 'content item key')
    return ''.join(parts)


def _loss(turn: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Return (key, value) of the key that says whether the turn carries loss, for example ('weight', False).

    Returns None if the turn has no such key. Raises BadRow if the value is unknown, or if two keys contradict each
    other.
    """
    found: dict[str, bool] = {}
    for key in _LOSS_KEYS:
        value = turn.get(key)
        if is_empty(value):
            continue

        carries = _LOSS_VALUES.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None
        if carries is None:
            shown = value if isinstance(value, str | int | float) else type(value).__name__
            raise BadRow(f"the message key `{key}` is '{shown}'; known values are 0, 1, true and false")
        found[key] = carries

    if len(set(found.values())) > 1:
        raise BadRow(f'the message keys {" and ".join(f"`{key}`" for key in found)} contradict each other')
    return next(iter(found.items()), None)


class _Turn:
    """A turn of the source row. It records which keys are read, so that the unused keys can be reported."""

    def __init__(self, turn: Mapping[str, Any], column: str, remarks: Remarks) -> None:
        self.turn = turn
        self.column = column
        self.remarks = remarks
        self.used: set[str] = set()

    def first(self, keys: Sequence[str]) -> Any:
        """Return the first value of these keys that is not empty. Returns None if all values are empty."""
        for key in keys:
            if not is_empty(self.turn.get(key)):
                self.used.add(key)
                value = self.turn[key]
                # A different key with the same value counts as used, because ignoring it loses no data.
                self.used.update(other for other in keys if self.turn.get(other) == value)
                return value
        return None

    def calls(self) -> list[dict[str, Any]]:
        """Return the tool calls of an assistant turn. Returns [] if the turn has no calls."""
        calls = parse_json(self.first(['tool_calls']), 'tool_calls', self.remarks)
        if not calls:
            calls = parse_json(self.first(['function_call']), 'function_call', self.remarks)
        return converted_calls(calls, self.column, self.remarks) if calls else []

    def message(self, role: str, role_key: str, content_key: str) -> Message:
        """Return the turn as a message. The keys of the turn that are not in the message are recorded as unused.

        Raises BadRow if the turn cannot be converted.
        """
        self.used |= {role_key, content_key}
        content = self.turn.get(content_key)
        calls = self.calls() if role == 'assistant' else []
        if calls and is_missing(content):
            content = ''
        text = _content(content, f'{role} turn', self.column, self.remarks)
        if role == 'call':
            role = 'assistant'
            calls = calls_in_text(text, self.column, self.remarks)
            text = ''

        message: Message = {'role': role, 'content': text}
        if calls:
            message['tool_calls'] = calls
        if name := self.first(['name']):
            message['name'] = as_text(name, 'the name of a turn', self.column)
        if role == 'tool' and (call_id := self.first(['tool_call_id'])):
            message['tool_call_id'] = as_text(call_id, 'tool_call_id', self.column)
        if role == 'assistant' and (reasoning := self.first(_REASONING_KEYS)):
            message['reasoning'] = as_text(reasoning, 'reasoning', self.column)
        self._set_loss(message)

        self.remarks.note_unused(self.turn, self.used, 'message key')
        return message

    def _set_loss(self, message: Message) -> None:
        """Set the key `loss` of a reply if the turn says whether it carries loss.

        A turn that is not a reply never carries loss. If such a turn has a key that requests loss, this key is reported
        as unused.
        """
        requested = _loss(self.turn)
        if requested is None:
            return

        _, carries_loss = requested
        if message['role'] == 'assistant':
            message['loss'] = carries_loss
        if message['role'] == 'assistant' or not carries_loss:
            self.used.update(_LOSS_KEYS)


def _key_in(turn: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first of `keys` that is present in the turn. If none is present, return keys[0]."""
    return next((key for key in keys if key in turn), keys[0])


def converted_turns(
    turns: Any, remarks: Remarks, *, column: str, role_keys: Sequence[str], content_keys: Sequence[str]
) -> list[Message]:
    """Return the turns of a column as messages.

    `role_keys` and `content_keys` are the possible names for the keys `role` and `content`, in the order of preference.
    Raises BadRow if a turn cannot be converted.
    """
    turns = parse_json(turns, column, remarks)
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

"""A row as a conversation, and what keeps a row of a file from being one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict


class Message(TypedDict, total=False):
    """One turn. Only `role` and `content` are always there; the others where the row says them.

    `content` is '' where a turn holds calls alone. An item of `tool_calls` is {'type': 'function', 'id' where given,
    'function': {'name', 'arguments'}}; arguments are an object, or text where the row gives text that is none.
    `loss` is whether the turn carries loss, where the row itself decides it.
    """

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    name: str
    tool_call_id: str
    reasoning: str
    loss: bool


def said(message: Message) -> str:
    """Return what a turn says as one text: its content, and its calls as JSON."""
    calls = [call['function'] for call in message.get('tool_calls', ())]
    parts = [message['content'], json.dumps(calls, ensure_ascii=False) if calls else '']
    return '\n'.join(part for part in parts if part)


@dataclass(kw_only=True, slots=True)
class Row:
    """A conversation whose last message is the assistant's, the one that is trained."""

    messages: list[Message]
    tools: list[Any] | None = None
    images: list[str] = field(default_factory=list)
    # Where relative paths of images start: the data file's folder; None for what was typed.
    folder: str | None = None
    origin: str = ''
    # The row as it was read, not copied: never change it.
    written: Mapping[str, Any] = field(default_factory=dict)
    # Columns and keys that hold something and are not used, e.g. 'column `id`', 'message key `foo`'.
    unused: tuple[str, ...] = ()
    # What else is worth counting about a row that is used.
    notes: tuple[str, ...] = ()


class BadRow(ValueError):
    """A row that cannot be trained on; its text is the reason under which the row is counted."""

    def __init__(self, reason: str, column: str = '') -> None:
        super().__init__(reason)
        self.column = column


class Filtered(BadRow):
    """A row that the entry of its data set leaves out on purpose, which is no defect."""

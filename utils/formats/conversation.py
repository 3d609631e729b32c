"""A row as a conversation, and the errors for rows that cannot be converted into one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict


class Message(TypedDict, total=False):
    """One turn. `role` and `content` are always present, the other keys only if the row has them.

    `content` is '' in a turn that holds only tool calls. An item of `tool_calls` is {'type': 'function', 'id' if given,
    'function': {'name', 'arguments'}}. Arguments are an object if the row holds one, or the JSON text of one; any other
    value is unchanged. `loss` is whether the turn carries loss; it is absent if the row does not decide it.
    """

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    name: str
    tool_call_id: str
    reasoning: str
    loss: bool


def message_text(message: Message) -> str:
    """Return the content of a turn, followed by its tool calls as JSON."""
    calls = [call['function'] for call in message.get('tool_calls', ())]
    parts = [message['content'], json.dumps(calls, ensure_ascii=False) if calls else '']
    return '\n'.join(part for part in parts if part)


@dataclass(kw_only=True, slots=True)
class Row:
    """A conversation. Its last message is the reply of the assistant, which is trained."""

    messages: list[Message]
    tools: list[Any] | None = None
    images: list[str] = field(default_factory=list)
    # The folder of the data file, from which relative paths of images start; None for typed text.
    folder: str | None = None
    origin: str = ''
    # The row as it was read. It is not a copy: never change it.
    written: Mapping[str, Any] = field(default_factory=dict)
    # Columns and keys that are not empty and not used, e.g. 'column `id`', 'message key `foo`'.
    unused: tuple[str, ...] = ()
    # Other facts about a used row that are counted and reported.
    notes: tuple[str, ...] = ()


class BadRow(ValueError):
    """A row that cannot be trained on. Its text is the reason under which the row is counted."""

    def __init__(self, reason: str, column: str = '') -> None:
        super().__init__(reason)
        self.column = column


class Filtered(BadRow):
    """A row that the entry of its data set skips on purpose; the row is not defective."""

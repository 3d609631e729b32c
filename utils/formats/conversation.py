"""A row as a conversation, and the errors for rows that cannot be converted into a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from utils.base.names import LossScope
from utils.formats.json_text import json_as_written


class Message(TypedDict, total=False):
    """One turn. `role` and `content` are always present. The other keys are present only if the row has them.

    `role` is system, user, assistant or tool. `content` is '' in a turn with only tool calls. An item of `tool_calls`
    is {'type': 'function', 'function': {'name', 'arguments'}}, with an 'id' if the row has an id. If `arguments` is the
    JSON text of an object, the text is parsed. If `arguments` is absent or empty in the row, it is {}. Any other value
    is unchanged. `loss` says whether a reply carries loss. If `loss` is absent, --loss_scope or the loss scope of the
    row decides.
    """

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    name: str
    tool_call_id: str
    reasoning: str
    loss: bool


def message_text(message: Message) -> str:
    """Return the content of a turn, and in a new line its tool calls as a JSON list of {name, arguments}."""
    calls = [call['function'] for call in message.get('tool_calls', ())]
    parts = [message['content'], json_as_written(calls) if calls else '']
    return '\n'.join(part for part in parts if part)


def asked_turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return (mark, text) of each turn that the last reply answers. The last item of `messages` is this reply.

    The first returned turn is the last user turn. Calls and results of tools follow. Without a user turn, only the turn
    before the reply is returned. The mark is QUERY for the user, TOOL for a result, and the role in capitals for any
    other turn.
    """
    before = messages[:-1]
    users = [index for index, message in enumerate(before) if message['role'] == 'user']
    start = users[-1] if users else max(len(before) - 1, 0)
    marks = {'user': 'QUERY', 'tool': 'TOOL'}
    return [(marks.get(turn['role'], turn['role'].upper()), message_text(turn)) for turn in before[start:]]


@dataclass(kw_only=True, slots=True)
class Row:
    """A conversation. The last message is a reply of the assistant, on which the model is trained.

    In chat, the last message is an empty reply, which stands for the reply to generate.

    If `is_text` is True, the row is plain text instead: its only message holds the text, no template is applied, and
    every token carries loss.
    """

    messages: list[Message]
    is_text: bool = False
    tools: list[Any] | None = None
    images: list[str] = field(default_factory=list)
    # The folder of the data file. Relative paths of images start in this folder. It is None if the user typed the text.
    folder: str | None = None
    # The location of the row, for messages.
    origin: str = ''
    # Which replies carry loss if --loss_scope is not typed. It depends on the columns of the source row.
    loss_scope: LossScope = 'last_round'
    # The source row, with renamed columns, and with paths in the place of image bytes. Never change it.
    written: Mapping[str, Any] = field(default_factory=dict)
    # Columns and keys that have a value but are not used, e.g. 'column `id`', 'message key `foo`'.
    unused: tuple[str, ...] = ()
    # Unusual properties of the row, which are counted and reported.
    notes: tuple[str, ...] = ()


class BadRow(ValueError):
    """The row cannot be used for training. The message is the reason. The report counts the rows by reason.

    `column` names the column with the problem, or several columns, separated by commas. It is '' if no column is named.
    """

    def __init__(self, reason: str, column: str = '') -> None:
        super().__init__(reason)
        self.column = column


class Filtered(BadRow):
    """The row is valid, but the registry entry of its data set skips the row on purpose."""

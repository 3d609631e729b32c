"""Makes the chat of a row: its messages, tools and settings as the chat template expects them."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

from utils.encode.chat_renderer import NO_SETTINGS, Chat
from utils.encode.encoded import (
    CONTROL_TOKENS,
    REASONING_AS_TEXT,
    THINKING_SWITCH,
    TOOL_CALL_AS_TEXT,
    TOOLS_IGNORED,
)
from utils.encode.guarded_tokenizer import map_strings
from utils.encode.template_properties import PRINTED_KEYS, REASONING_KEYS, TemplateProperties
from utils.encode.think_tags import OPENING_TAG, closing_tag, has_think_block
from utils.formats.conversation import Message, Row
from utils.formats.json_text import json_as_written


@dataclasses.dataclass(kw_only=True, slots=True)
class RowChat:
    """The chat of a row as it is rendered, and what is known about the last reply of the row."""

    chat: Chat
    # Whether stand-ins replace control tokens in the data of the row (see guarded_tokenizer.py).
    guarded: bool
    notes: list[str]
    # Whether the reply has reasoning that the template can print. If the reply is not known: whether it is to think.
    has_reasoning: bool
    # Only `RowChats.whole` sets the following fields.
    # The reasoning in its own key, or '', and the message key from which the template prints reasoning, or None.
    reasoning: str = ''
    key: str | None = None
    # The think block to insert before the tool calls of the reply, or ''.
    thought: str = ''


class RowChats:
    """Makes the chats of rows for one chat template."""

    def __init__(self, template: TemplateProperties) -> None:
        self.template = template
        self.text = template.text

    @property
    def switch(self) -> str | None:
        """Return the setting that turns thinking on, e.g. 'enable_thinking=True', or None if there is none."""
        return next((f'{name}={value}' for name, value in self.template.switch.items()), None)

    def spoken(
        self, message: Message, *, with_tools: bool = False, is_last: bool = False, key: str | None = None
    ) -> Message:
        """Return the message with the keys and values that the template expects.

        If the message has images, its content becomes a list of images and texts. If the template prints no tool calls,
        the calls become text in the content.

        The reasoning is stored under the message key `key`, or else under the key that the probes found. Without a key,
        the reasoning becomes a think block in the content, if the message is the last one (`is_last`), has no tool
        calls, and the template has think tags. Otherwise it is dropped.
        """
        if self.text.image in message['content']:
            texts = message['content'].split(self.text.image)
            items = [item for text in texts for item in ({'type': 'image'}, {'type': 'text', 'text': text})][1:]
            shown = [item for item in items if item.get('text') != '']
            return cast(Message, {**message, 'content': shown})
        if not message.keys() & {'tool_calls', 'reasoning', 'loss'}:
            return message
        said: dict[str, Any] = {key: value for key, value in message.items() if key not in ('reasoning', 'loss')}
        if 'tool_calls' in said and not self.template.says_calls[with_tools]:
            calls = json_as_written([call.get('function', call) for call in said.pop('tool_calls')])
            said['content'] = f'{said["content"]}\n{calls}' if said['content'] else calls
        if 'tool_calls' in said:
            said['content'] = said['content'] or self.template.no_text
            said['tool_calls'] = self._with_arguments(said['tool_calls'])
        if reasoning := message.get('reasoning'):
            tag = OPENING_TAG.search(self.template.source)
            key = key or self.template.reasoning_keys['tool_calls' in said, with_tools]
            if key:
                said[key] = reasoning
            elif tag and is_last and 'tool_calls' not in said:
                said['content'] = self._as_block(reasoning, tag[0]) + (said['content'] or '')
        return cast(Message, said)

    def settings_of(self, row: Row) -> Mapping[str, Any]:
        """Return the template settings with which a row is rendered, for example {'enable_thinking': True}.

        If the last reply of the row has no reasoning that the template can print, the result is {}. Otherwise, the
        result is the setting that turns thinking on, or {} if there is no such setting, it is not needed, or the user
        has set thinking with --template_settings.
        """
        return self.template.switch if self._has_reasoning(row) else NO_SETTINGS

    def in_its_form(self, messages: Sequence[Mapping[str, Any]], row: Row) -> list[Any]:
        """Return `messages` with the keys and values that the template expects.

        `messages` are the turns of `row` as they were written in the data file.
        """
        with_tools = self._lists_tools(row)
        key = self._reasoning_key_of_row(row)
        made: list[Any] = []
        for message in messages:
            is_last = message is messages[-1]
            reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
            said: dict[str, Any] = {k: v for k, v in message.items() if k not in REASONING_KEYS}
            if reasoning:
                said['reasoning'] = reasoning
            if isinstance(said['content'], str):
                own = key if is_last else None
                said = dict(self.spoken(cast(Message, said), with_tools=with_tools, is_last=is_last, key=own))
            made.append(said)
        return made

    def whole(self, row: Row) -> RowChat:
        """Return the chat of a row with its last reply."""
        reply = row.messages[-1]
        made = self._make(
            row, row.messages, has_reasoning=self._has_reasoning(row), key=self._reasoning_key_of_row(row)
        )
        made.reasoning = reply.get('reasoning', '')
        if made.reasoning and made.has_reasoning and not made.key:
            made.notes.append(REASONING_AS_TEXT)
        made.thought = self._block_before_calls(made)
        return made

    def prompt(self, row: Row, *, asks_to_think: bool) -> RowChat:
        """Return the chat of a row without its last reply.

        In inference, the reply is not known, and it is empty. Then `asks_to_think` says whether the prompt is rendered
        with the setting that turns thinking on. Otherwise the reply decides, as in training.
        """
        reply = row.messages[-1]
        is_unknown = not (reply['content'] or reply.keys() & {'tool_calls', 'reasoning'})
        has_reasoning = asks_to_think if is_unknown else self._has_reasoning(row)
        return self._make(row, row.messages[:-1], has_reasoning=has_reasoning)

    def _make(self, row: Row, context: Sequence[Message], *, has_reasoning: bool, key: str | None = None) -> RowChat:
        """Return the chat with the messages `context`: all messages of the row, or those before its last reply.

        If the texts contain control tokens such as <|im_end|>, stand-ins replace them, so that they are tokenised as
        plain text.
        """
        notes = []
        tools = row.tools
        if tools and not self.template.says_tools:
            tools = None
            notes.append(TOOLS_IGNORED)
        with_tools = bool(tools)

        last = row.messages[-1]
        messages = []
        for message in context:
            is_last = message is last
            own = key if is_last else None
            messages.append(self.spoken(message, with_tools=with_tools, is_last=is_last, key=own))
        if self.template.system is not None and (not messages or messages[0]['role'] != 'system'):
            messages.insert(0, {'role': 'system', 'content': self.template.system})
        if any('tool_calls' in message for message in row.messages) and not self.template.says_calls[with_tools]:
            notes.append(TOOL_CALL_AS_TEXT)

        settings = self.template.switch if has_reasoning else NO_SETTINGS
        if settings:
            notes.append(THINKING_SWITCH.format(switch=self.switch))
        chat = Chat(messages, tools, settings)
        guarded = self.text.spells_control(messages, tools)
        if guarded:
            chat = self._guard(chat)
            notes.append(CONTROL_TOKENS)
        return RowChat(chat=chat, guarded=guarded, notes=notes, has_reasoning=has_reasoning, key=key)

    def _block_before_calls(self, made: RowChat) -> str:
        """Return the think block to insert before the tool calls of the last reply, or '' if no block is needed.

        A block is needed if the reply has tool calls and reasoning, the template has think tags, and the template has
        no message key for the reasoning.
        """
        tag = OPENING_TAG.search(self.template.source)
        if 'tool_calls' not in made.chat.messages[-1] or made.key or tag is None or not made.reasoning:
            return ''
        block = self._as_block(made.reasoning, tag[0])
        return self.text.guard(block, reply=True) if made.guarded else block

    def _has_reasoning(self, row: Row) -> bool:
        """Return whether the last reply of the row has reasoning that the template can print.

        The reasoning is in a separate key of the message, or in a think block in its content.
        """
        reply = row.messages[-1]
        if reply.get('reasoning'):
            key = self._reasoning_key(reply, with_tools=self._lists_tools(row))
            return key is not None or OPENING_TAG.search(self.template.source) is not None
        return has_think_block(reply['content'], opened=self.template.opens)

    def _reasoning_key_of_row(self, row: Row) -> str | None:
        """Return the message key from which the template prints the reasoning of the row's last reply, or None.

        Some templates print reasoning only in some turns, so the probes (short chats) find no key. Then the row itself
        is rendered with each possible key.
        """
        reply, with_tools = row.messages[-1], self._lists_tools(row)
        known = self._reasoning_key(reply, with_tools=with_tools)
        if known or not reply.get('reasoning'):
            return known
        mark = secrets.token_hex(8)
        marked = cast(Message, {**reply, 'reasoning': mark})
        context = [self.spoken(message, with_tools=with_tools) for message in row.messages[:-1]]
        for key in PRINTED_KEYS:
            if key not in self.template.source:
                continue
            last = self.spoken(marked, with_tools=with_tools, is_last=True, key=key)
            tools = row.tools if with_tools else None
            if mark in self.template.renderer.try_render([*context, last], tools, settings=self.template.switch):
                return key
        return None

    def _reasoning_key(self, reply: Message, *, with_tools: bool) -> str | None:
        """Return the message key from which the template prints the reasoning of `reply`, or None.

        The probes found four keys: for replies with and without tool calls, in chats with and without tools.
        """
        # If the template prints no tool calls, they are text in the content of the reply.
        return self.template.reasoning_keys['tool_calls' in reply and self.template.says_calls[with_tools], with_tools]

    def _lists_tools(self, row: Row) -> bool:
        return bool(row.tools) and self.template.says_tools

    def _with_arguments(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the calls with arguments as the template expects them: as objects or as JSON text."""
        if not self.template.arguments_as_text:
            return calls
        made = []
        for call in calls:
            function = call.get('function', call)
            arguments = function.get('arguments')
            text = arguments if isinstance(arguments, str) else json_as_written(arguments)
            made.append({**call, 'function': {**function, 'arguments': text}})
        return made

    def _as_block(self, reasoning: str, tag: str) -> str:
        """Return the reasoning in a think block, e.g. '<think>reasoning</think>'. `tag` is the opening tag.

        If the template prints a line end after the opening tag, the block has line ends too.
        """
        line = '\n' if f'{tag}\\n' in self.template.source or f'{tag}\n' in self.template.source else ''
        return f'{tag}{line}{reasoning}{line}{closing_tag(tag)}{2 * line}'

    def _guard(self, chat: Chat) -> Chat:
        messages: list[Message] = []
        for message in chat.messages:
            guard = functools.partial(self.text.guard, reply=message['role'] == 'assistant')
            messages.append(cast(Message, {**map_strings(message, guard), 'role': message['role']}))
        return Chat(messages, map_strings(chat.tools, self.text.guard), chat.settings)

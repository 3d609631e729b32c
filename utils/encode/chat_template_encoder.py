"""Encodes conversations with the chat template of the tokenizer (template `auto`).

The ids of a row are the ids of its prompt and then the ids of its reply. The prompt is the text that the template
renders with `add_generation_prompt=True`. So inference, here and on any server, starts exactly where the reply starts
in training. The reply is the text that the template prints after the prompt: the lead (text before the content, such as
a space, the name of a channel or an empty think block), the content of the reply, and the end of turn. The whole reply
carries loss, including the end of turn.

To learn the properties of a template, the encoder renders probes: short chats with random texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from utils.base.errors import ConfigError, error_text
from utils.encode.encoded import (
    ADDED_END,
    CLOSED_BY_SETTING,
    CLOSED_THINKING,
    CONTROL_TOKENS,
    EARLIER_CHANGED,
    EARLIER_MERGED,
    FULL_DIFFERS,
    MERGED_BOUNDARY,
    REASONING_AS_TEXT,
    REASONING_LEFT_OUT,
    RENDERED_DIFFERENTLY,
    THINKING_SWITCH,
    TOOL_CALL_AS_TEXT,
    TOOLS_IGNORED,
    Encoded,
    RowRefused,
    mark_pieces,
    without_last,
)
from utils.encode.encoder import Encoder
from utils.encode.guarded_tokenizer import CLOSE_TAG, OPEN_TAG, map_strings
from utils.formats.conversation import Message, Row
from utils.formats.json_text import Spelling, json_as_written
from utils.loading.image_processors import Images
from utils.loading.template_settings import as_word, split_settings
from utils.preprocess import AUTO

_OPEN_THINK = re.compile(rf'({OPEN_TAG})\s*$')
_CLOSED_THINK = re.compile(rf'(?:{CLOSE_TAG})\s*$')
_BEGINS_CLOSING = re.compile(rf'\s*(?:{CLOSE_TAG})')
_BEGINS_THINKING = re.compile(rf'\s*({OPEN_TAG})\s*')
_EMPTY_BLOCK = re.compile(rf'\s*(?:{OPEN_TAG})\s*(?:{CLOSE_TAG})')
# If the prompt opens the think block of a reply, the closing tag is at the end or at the beginning of a line.
_CLOSES_LINE = re.compile(rf'(?:{CLOSE_TAG})[ \t]*(?:\n|$)|\n(?:{CLOSE_TAG})')
_ANY_THINK_TAG = re.compile(f'{OPEN_TAG}|{CLOSE_TAG}')
_THINK_SOURCE = re.compile(OPEN_TAG)
# Keys under which rows store the reasoning of a turn.
_REASONING_KEYS = ('reasoning_content', 'reasoning', 'thinking')
# Keys under which templates read the reasoning. Cohere's templates read `tool_plan` before calls.
_PRINTED_KEYS = (*_REASONING_KEYS, 'tool_plan')
# Variables that templates read, each with the value that switches thinking on.
_SWITCHES: tuple[tuple[str, Any], ...] = (
    ('enable_thinking', True),
    ('thinking', True),
    ('reasoning', True),
    ('think', True),
    ('thinking_mode', 'thinking'),
    ('thinking_mode', 'on'),
    ('reasoning_effort', 'high'),
)

# The variables among these that decide whether replies think. If one of them is set, no other variable is switched.
_DECIDES_THINKING = frozenset(name for name, _ in _SWITCHES if name != 'reasoning_effort')

# The maximum number of characters of an added token that a template prints.
_LONGEST_TAG = 64
# The maximum number of tails of prompts that are cached with their ids (see _learn_tails). Most templates have few
# different tails. But if the prompt of a template ends in the question, every question is a different tail.
_TAILS_KEPT = 4096
_NOTHING: Mapping[str, Any] = {}


class _Chat(NamedTuple):
    """The input of one rendering: messages as the template expects them, tools, and the settings of the template."""

    messages: list[Message]
    tools: Sequence[Any] | None
    settings: Mapping[str, Any]


@dataclasses.dataclass(kw_only=True, slots=True)
class _Parts:
    """A row as text. `reply` is the last reply with the end of turn. `rest` is the text after the end of turn."""

    chat: _Chat
    prompt: str
    reply: str
    rest: str
    # The id of the end of turn to add. It is None if the template prints an end of turn.
    end: int | None
    # Whether stand-ins replace control tokens in the data of the row (see guarded_tokenizer.py).
    guarded: bool
    notes: list[str]

    @property
    def text(self) -> str:
        """Return the text of the whole row."""
        return self.prompt + self.reply + self.rest


class _Frame(NamedTuple):
    """What a template prints around the reply of a one-turn chat.

    `lead` is printed between the prompt and the reply, and `end` after the reply. `alone` is the text at the end of the
    generation prompt that is not printed if a reply follows, such as the opening tag of a think block.
    """

    lead: str
    end: str
    alone: str
    # Whether the prompt ends in an open think block.
    opens: bool


class _Earlier(NamedTuple):
    """An earlier reply that carries loss. `row` is the index of its row in the batch.

    `start` and `end` are the span of the reply in the text of the prompt.
    """

    row: int
    start: int
    end: int


class AutoEncoder(Encoder):
    """Encodes rows with the tokenizer's chat template.

    Loss covers the last reply or all replies, with the end of turn.
    """

    name = AUTO

    def __init__(self, tokenizer: Any, *, system: str | None, max_length: int, images: Images | None = None) -> None:
        templates = tokenizer.chat_template
        self._source = ''.join(templates.values()) if isinstance(templates, dict) else str(templates)
        super().__init__(tokenizer, max_length=max_length, images=images, template_text=self._source)
        self.system = system
        self._tails: dict[str, list[int]] = {}
        # The key of the dict says whether the chat lists tools. A tokenizer may have a separate template for chats with
        # tools, or the template may print different text around the reply of such a chat.
        frame = self._find_frame()
        self._frames = {False: frame, True: frame}
        self.says_tools = self._prints_tools()
        if self.says_tools:
            with contextlib.suppress(ConfigError):  # if this chat fails, all rows with tools are refused
                self._frames[True] = self._find_frame(tools=[self._probe_tool()[1]])
        # The content of a turn that has only calls, and whether arguments are given as JSON text. DeepSeek's templates
        # print calls only if the content is null, and they need arguments as text.
        self._no_text: str | None = ''
        self._arguments_as_text = False
        self.says_calls = {False: False, True: False}
        for no_text, as_text in (('', False), (None, False), ('', True), (None, True)):
            self._no_text, self._arguments_as_text = no_text, as_text
            self.says_calls = {with_tools: self._prints_calls(with_tools=with_tools) for with_tools in (False, True)}
            if any(self.says_calls.values()):
                break
        # (whether the turn has calls, whether the chat lists tools) -> the message key from which the template prints
        # reasoning. The four keys may differ.
        self._reasoning_keys = {
            (is_call, with_tools): self._find_reasoning_key(is_call=is_call, with_tools=with_tools)
            for is_call in (False, True)
            for with_tools in (False, True)
        }
        self._openers = self._find_openers()
        self._eos_ends_turns = self._prints_eos_between_turns()
        self._why_closed = CLOSED_THINKING
        self._switch, self._opens = self._find_switch()
        # Whether the turn is a call -> the control token that begins the next turn. If the template prints no end of
        # turn, this token is used as the end of turn.
        self._next = {is_call: self._find_next_token(is_call=is_call) for is_call in (False, True)}
        self.stop_ids = self._find_stop_ids()

    # --- rendering

    def _apply(self, chats: list[Any], tools: Sequence[Any] | None, prompt: bool, settings: Mapping[str, Any]) -> Any:
        from jinja2.exceptions import TemplateError

        # Only tools and calls contain numbers. A template prints them with a JSON writer.
        spelling = Spelling()
        if tools or _have_calls(chats):
            chats, tools = spelling.hide(chats), spelling.hide(tools)
        try:
            render = self.tokenizer.apply_chat_template
            text = render(chats, tools=tools or None, add_generation_prompt=prompt, tokenize=False, **settings)
        except TemplateError as error:
            raise RowRefused(f'the chat template refuses it: {error}') from error
        except Exception as error:  # a template is a program and can fail with any error
            raise RowRefused(f'the chat template fails: {error_text(error)}') from error
        return spelling.show(str(text)) if not isinstance(text, list) else [spelling.show(one) for one in text]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False,
        settings: Mapping[str, Any] = _NOTHING,
    ) -> str:  # fmt: skip
        return str(self._apply(list(messages), tools, prompt, settings))

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **options: Any) -> str:
        """Return the rendering of a chat. Returns '' if the template refuses the chat."""
        try:
            return self._render(messages, tools, **options)
        except RowRefused:
            return ''

    def _render_all(self, chats: Sequence[_Chat], *, prompt: bool) -> list[str]:
        """Return the rendering of each chat. If `prompt` is True, each rendering ends with the generation prompt.

        Chats without tools and settings share one call, which is faster.
        """
        plain = [list(chat.messages) for chat in chats if not (chat.tools or chat.settings)]
        texts = iter(self._apply(plain, None, prompt, _NOTHING) if plain else [])
        return [
            self._render(chat.messages, chat.tools, prompt=prompt, settings=chat.settings)
            if chat.tools or chat.settings
            else next(texts)
            for chat in chats
        ]

    # --- properties of the template, found once by rendering probes (short chats with random texts)

    def _probe(self, *turns: Message, user: str = 'a') -> list[Message]:
        begin: list[Message] = [{'role': 'system', 'content': self.system}] if self.system else []
        return [*begin, {'role': 'user', 'content': user}, *turns]

    def _probe_tool(self) -> tuple[str, dict[str, Any]]:
        name = f'probe_{secrets.token_hex(4)}'
        parameters = {'type': 'object', 'properties': {'a': {'type': 'string', 'description': 'a'}}}
        return name, {'type': 'function', 'function': {'name': name, 'description': 'a', 'parameters': parameters}}

    def _probe_call(self, name: str) -> Message:
        # Mistral's templates accept only ids of nine letters and digits.
        arguments: Any = json.dumps({'a': '1'}) if self._arguments_as_text else {'a': '1'}
        call = {'type': 'function', 'id': 'probe0001', 'function': {'name': name, 'arguments': arguments}}
        return cast(Message, {'role': 'assistant', 'content': self._no_text, 'tool_calls': [call]})

    def _find_frame(self, tools: Sequence[Any] | None = None) -> _Frame:
        """Return the text that the template prints around a reply. Raises ConfigError if the template is unusable."""
        reply = secrets.token_hex(8)
        messages = self._probe({'role': 'assistant', 'content': reply})
        try:
            prompt = self._render(messages[:-1], tools, prompt=True)
            text = self._render(messages, tools)
        except RowRefused as error:
            hint = 'Run without --system, or choose' if self.system else 'Choose'
            raise ConfigError(
                f'the chat template of this tokenizer fails on a one-turn chat: {error}. {hint} a '
                '--template_type, e.g. default.'
            ) from error
        if reply not in text:
            raise ConfigError(
                "the chat template of this tokenizer does not print the assistant's reply, so nothing could be "
                'trained. Choose a --template_type, e.g. default.'
            )
        self.text.add_printed(prompt + text)
        start = text.rindex(reply)
        common = self._common_length(prompt, text[:start])
        lead = text[common:start]
        alone = prompt[common:]
        return _Frame(
            lead=lead[self._repeated(alone, lead) :],
            end=text[start + len(reply) :],
            alone=alone,
            opens=_OPEN_THINK.search(prompt) is not None,
        )

    def _prints_tools(self) -> bool:
        name, tool = self._probe_tool()
        text = self._try(self._probe(), [tool], prompt=True)
        self.text.add_printed(text)
        return name in text

    def _prints_calls(self, *, with_tools: bool) -> bool:
        """Return whether the template prints tool calls. `with_tools` says whether the probe chat lists tools."""
        name, tool = self._probe_tool()
        tools = [tool] if with_tools else None
        text = self._try(self._probe(self._probe_call(name)), tools)
        listed = self._try(self._probe(), tools, prompt=True)
        self.text.add_printed(text)
        return text.count(name) > listed.count(name)

    def _find_reasoning_key(self, *, is_call: bool, with_tools: bool) -> str | None:
        """Return the message key from which the template prints reasoning. Returns None if there is no such key."""
        mark = secrets.token_hex(8)
        name, tool = self._probe_tool()
        turn: Message = self._probe_call(name) if is_call else {'role': 'assistant', 'content': 'b'}
        for key in _PRINTED_KEYS:
            if mark in self._try(self._probe(cast(Message, {**turn, key: mark})), [tool] if with_tools else None):
                return key
        return None

    def _find_switch(self) -> tuple[Mapping[str, Any], bool]:
        """Return (setting, opens). The setting lets replies begin with reasoning.

        Some generation prompts end in a closed think block, after which no reasoning can follow. Many of these
        templates have a variable that removes the block or leaves it open. The setting is this variable with its value,
        for example {'enable_thinking': True}. It is empty if the template has no such variable, or if the user has
        already set such a variable. `opens` says whether a generation prompt with the setting ends in an open think
        block.
        """
        mark = secrets.token_hex(8)

        def generation_prompt(settings: Mapping[str, Any]) -> str:
            text = self._try(self._probe(user=mark), prompt=True, settings=settings)
            return text[text.rfind(mark) + len(mark) :] if mark in text else ''

        plain = generation_prompt(_NOTHING)
        set_by_user, template = split_settings(self.tokenizer.get_chat_template())
        for name, value in _SWITCHES:
            if name not in self._source:
                continue
            # What the user has set is not switched. It is only tried here, to name it if it closes the block.
            tried = {'chat_template': template, **set_by_user} if name in set_by_user else {}
            text = generation_prompt({**tried, name: value})
            if not text or text == plain or not (plain.startswith(text) or _OPEN_THINK.search(text)):
                continue
            if decided := [other for other in set_by_user if other in _DECIDES_THINKING or other == name]:
                setting = as_word(decided[0], set_by_user[decided[0]])
                self._why_closed = CLOSED_BY_SETTING.format(setting=setting)
                break
            return {name: value}, _OPEN_THINK.search(text) is not None
        return _NOTHING, self._frames[False].opens

    def _find_openers(self) -> frozenset[str]:
        """Return a set with one control token: the token that begins the first turn of a chat.

        If this token occurs again, a new turn begins. The set is empty if there is no such token, or if a turn of the
        assistant can also contain the token, as in Kimi-K3's template.
        """
        ends = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        begin = self._try(self._probe(), prompt=True)
        self.text.add_printed(begin)
        first = next((match[0] for match in self.text.find_controls(begin) if match[0] not in ends), None)
        if first is None:
            return frozenset()
        name, tool = self._probe_tool()
        asked, reply = secrets.token_hex(8), secrets.token_hex(8)
        turns: tuple[tuple[Message, str, list[Any] | None], ...] = (
            ({'role': 'assistant', 'content': reply}, reply, None),
            (self._probe_call(name), name, [tool]),
        )
        for turn, said, tools in turns:
            text = self._try(self._probe(turn, user=asked), tools)
            if text[text.rfind(asked) : text.rfind(said)].count(first) > 1:
                return frozenset()
        return frozenset([first])

    def _prints_eos_between_turns(self) -> bool:
        """Return whether the template prints the end-of-sequence token after a reply that is not the last turn."""
        asked, reply = secrets.token_hex(8), secrets.token_hex(8)
        text = self._try([*self._probe({'role': 'assistant', 'content': reply}), {'role': 'user', 'content': asked}])
        between = text[text.rfind(reply) : text.rfind(asked)]
        return any(match[0] == self.tokenizer.eos_token for match in self.text.find_controls(between))

    def _find_next_token(self, *, is_call: bool) -> str | None:
        """Return the control token that begins the turn after a reply. With `is_call`, the reply is a tool call.

        Returns None if this turn does not begin with a control token.
        """
        name, tool = self._probe_tool()
        reply: Message = self._probe_call(name) if is_call else {'role': 'assistant', 'content': secrets.token_hex(8)}
        after: Message = {'role': 'user', 'content': 'a'}
        if is_call:
            after = {'role': 'tool', 'content': 'a', 'name': name, 'tool_call_id': 'probe0001'}
        tools = [tool] if is_call else None
        before = self._try(self._probe(reply), tools).rstrip()
        text = self._try(self._probe(reply, after), tools)
        if not before or not text.startswith(before):
            return None
        follows = text[len(before) :]
        token = self.text.find_control(follows)
        if token is None or follows[: token.start()].strip() or token[0] == self.tokenizer.bos_token:
            return None
        return token[0]

    def _find_stop_ids(self) -> list[int]:
        """Return the ids of the tokens that end a turn. A text reply and a tool call may end in different tokens."""
        ends = [(frame.end, False) for frame in self._frames.values()]
        name, tool = self._probe_tool()
        if any(self.says_calls.values()):
            text = self._try(self._probe(self._probe_call(name)), [tool])
            ends += [(text[text.rfind(name) :], True)] if name in text else []
        found = []
        for end, is_call in ends:
            _, stop, added = self._split_end(end, self._frames[is_call], is_call=is_call)
            found.append(self.text.control_ids[stop] if added is None else added)
        return list(dict.fromkeys(found))

    # --- from a row to text

    def spoken(
        self, message: Message, *, with_tools: bool = False, is_last: bool = False, key: str | None = None
    ) -> Message:
        """Return the message with the keys and values that the template expects.

        If the message has images, its content becomes a list of items.

        Reasoning is stored under `key`. If `key` is None, it is stored under the key that a probe found. If no probe
        found a key, the reasoning is dropped, except in the last message (`is_last`). There it becomes a think block in
        the content, provided that the message has no calls and the template has a think tag.
        """
        if self.text.image in message['content']:
            texts = message['content'].split(self.text.image)
            items = [item for text in texts for item in ({'type': 'image'}, {'type': 'text', 'text': text})][1:]
            shown = [item for item in items if item.get('text') != '']
            return cast(Message, {**message, 'content': shown})
        if not message.keys() & {'tool_calls', 'reasoning', 'loss'}:
            return message
        said: dict[str, Any] = {key: value for key, value in message.items() if key not in ('reasoning', 'loss')}
        if 'tool_calls' in said and not self.says_calls[with_tools]:
            calls = json_as_written([call.get('function', call) for call in said.pop('tool_calls')])
            said['content'] = f'{said["content"]}\n{calls}' if said['content'] else calls
        if 'tool_calls' in said:
            said['content'] = said['content'] or self._no_text
            said['tool_calls'] = self._with_arguments(said['tool_calls'])
        if reasoning := message.get('reasoning'):
            tag = _THINK_SOURCE.search(self._source)
            key = key or self._reasoning_keys['tool_calls' in said, with_tools]
            if key:
                said[key] = reasoning
            elif tag and is_last and 'tool_calls' not in said:
                said['content'] = self._as_block(reasoning, tag[0]) + (said['content'] or '')
        return cast(Message, said)

    @property
    def switch(self) -> str | None:
        return next((f'{name}={value}' for name, value in self._switch.items()), None)

    @property
    def prompt_settings(self) -> Mapping[str, Any]:
        return self._switch if self.asks_to_think else _NOTHING

    def settings_of(self, row: Row) -> Mapping[str, Any]:
        """Return the template settings for a row. They are empty unless the last reply has reasoning."""
        return self._switch if self._reasons(row.messages[-1], with_tools=self._lists_tools(row)) else _NOTHING

    def in_its_form(self, messages: Sequence[Mapping[str, Any]], row: Row) -> list[Any]:
        """Return the messages of a source row with the keys and values that the template expects."""
        with_tools = self._lists_tools(row)
        key = self._key_in(row)
        made: list[Any] = []
        for message in messages:
            is_last = message is messages[-1]
            reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key)), None)
            said: dict[str, Any] = {k: v for k, v in message.items() if k not in _REASONING_KEYS}
            if reasoning:
                said['reasoning'] = reasoning
            if isinstance(said['content'], str):
                own = key if is_last else None
                said = dict(self.spoken(cast(Message, said), with_tools=with_tools, is_last=is_last, key=own))
            made.append(said)
        return made

    def _with_arguments(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the calls. If the template expects text, the arguments of each call become JSON text."""
        if not self._arguments_as_text:
            return calls
        made = []
        for call in calls:
            function = call.get('function', call)
            arguments = function.get('arguments')
            text = arguments if isinstance(arguments, str) else json_as_written(arguments)
            made.append({**call, 'function': {**function, 'arguments': text}})
        return made

    def _as_block(self, reasoning: str, tag: str) -> str:
        """Return the reasoning in a think block. `tag` is its opening tag.

        If the template has a line end after this tag, the block has line ends too.
        """
        line = '\n' if f'{tag}\\n' in self._source or f'{tag}\n' in self._source else ''
        return f'{tag}{line}{reasoning}{line}{_closing_tag(tag)}{2 * line}'

    def _lists_tools(self, row: Row) -> bool:
        return bool(row.tools) and self.says_tools

    def _key_of(self, reply: Message, *, with_tools: bool) -> str | None:
        """Return the message key for the reasoning of a reply. Returns None if no probe found a key.

        A template can have different keys for replies with and without tool calls. If the template prints no tool
        calls, the calls are written into the content of the reply. Then the reply counts as a reply without calls.
        """
        return self._reasoning_keys['tool_calls' in reply and self.says_calls[with_tools], with_tools]

    def _key_in(self, row: Row) -> str | None:
        """Return the message key from which the template prints the reasoning of the row's last reply.

        Usually, probes (short chats) have found the key. But some templates print reasoning only in some turns. For
        example, the template of Kimi-K2-Thinking never prints the reasoning of the first reply, so the probes find no
        key. Then the row itself is rendered with each possible key. Returns None if no key makes the template print the
        reasoning.
        """
        reply, with_tools = row.messages[-1], self._lists_tools(row)
        known = self._key_of(reply, with_tools=with_tools)
        if known or not reply.get('reasoning'):
            return known
        mark = secrets.token_hex(8)
        marked = cast(Message, {**reply, 'reasoning': mark})
        context = [self.spoken(message, with_tools=with_tools) for message in row.messages[:-1]]
        for key in _PRINTED_KEYS:
            if key not in self._source:
                continue
            last = self.spoken(marked, with_tools=with_tools, is_last=True, key=key)
            if mark in self._try([*context, last], row.tools if with_tools else None, settings=self._switch):
                return key
        return None

    def _reasons(self, reply: Message, *, with_tools: bool) -> bool:
        """Return whether the reply has reasoning that the template can print.

        The reasoning is in a separate key of the message, or in a think block in its content.
        """
        if reply.get('reasoning'):
            return bool(self._key_of(reply, with_tools=with_tools) or _THINK_SOURCE.search(self._source))
        return _thinks(reply['content'], opened=self._opens)

    def _chat(
        self, row: Row, context: Sequence[Message], *, reasons: bool, key: str | None = None
    ) -> tuple[_Chat, bool, list[str]]:
        """Return (chat to render, whether it is guarded, notes) for a row.

        `context` has the messages to render: all messages of the row, or those before its last reply. `reasons` says
        whether the last reply has reasoning. `key` is the message key for this reasoning.

        If any text of the chat contains a control token, the chat is guarded: a stand-in replaces each control token in
        the data.
        """
        notes = []
        tools = row.tools
        if tools and not self.says_tools:
            tools = None
            notes.append(TOOLS_IGNORED)
        with_tools = bool(tools)
        last = row.messages[-1]
        messages = []
        for message in context:
            is_last = message is last
            own = key if is_last else None
            messages.append(self.spoken(message, with_tools=with_tools, is_last=is_last, key=own))
        if self.system is not None and (not messages or messages[0]['role'] != 'system'):
            messages.insert(0, {'role': 'system', 'content': self.system})
        if any('tool_calls' in message for message in row.messages) and not self.says_calls[with_tools]:
            notes.append(TOOL_CALL_AS_TEXT)
        settings = self._switch if reasons else _NOTHING
        notes += [THINKING_SWITCH.format(switch=self.switch)] if settings else []
        chat = _Chat(messages, tools, settings)
        if not self._spells_control(messages, tools):
            return chat, False, notes
        return self._guard(chat), True, [*notes, CONTROL_TOKENS]

    def _guard(self, chat: _Chat) -> _Chat:
        messages: list[Message] = []
        for message in chat.messages:
            guard = functools.partial(self.text.guard, reply=message['role'] == 'assistant')
            messages.append(cast(Message, {**map_strings(message, guard), 'role': message['role']}))
        return _Chat(messages, map_strings(chat.tools, self.text.guard), chat.settings)

    def _parts(self, rows: Sequence[Row]) -> list[_Parts]:
        chats = []
        for row in rows:
            reply, with_tools = row.messages[-1], self._lists_tools(row)
            reasons = self._reasons(reply, with_tools=with_tools)
            key = self._key_in(row)
            chat, guarded, notes = self._chat(row, row.messages, reasons=reasons, key=key)
            if reply.get('reasoning') and reasons and not key:
                notes.append(REASONING_AS_TEXT)
            chats.append((chat, guarded, notes, reply.get('reasoning', ''), key, reasons))
        prompts = self._render_all([chat._replace(messages=chat.messages[:-1]) for chat, *_ in chats], prompt=True)
        fulls = self._render_all([chat for chat, *_ in chats], prompt=False)
        parts = []
        for (chat, guarded, notes, reasoning, key, reasons), prompt, full in zip(chats, prompts, fulls, strict=True):
            thought = self._thought(chat.messages[-1], reasoning, key, guarded=guarded)
            part = self._part(
                chat, prompt, full, guarded=guarded, notes=notes, thought=thought, key=key, reasons=reasons
            )
            if reasoning and _unspaced(reasoning) not in _unspaced(self.text.unguard(part.reply)):
                notes.append(REASONING_LEFT_OUT)
            parts.append(part)
        return parts

    def _thought(self, reply: Message, reasoning: str, key: str | None, *, guarded: bool) -> str:
        """Return the reasoning of a reply with tool calls as a think block. The caller puts the block before the calls.

        `key` is the message key from which the template itself prints the reasoning. Returns '' if there is such a key,
        if the reply has no calls or no reasoning, or if the template has no think tag.
        """
        tag = _THINK_SOURCE.search(self._source)
        if 'tool_calls' not in reply or key or tag is None or not reasoning:
            return ''
        block = self._as_block(reasoning, tag[0])
        return self.text.guard(block, reply=True) if guarded else block

    def _part(
        self, chat: _Chat, prompt: str, full: str, *, guarded: bool, notes: list[str], thought: str, key: str | None,
        reasons: bool,
    ) -> _Parts:  # fmt: skip
        last, frame = chat.messages[-1], self._frames[bool(chat.tools)]
        is_call = 'tool_calls' in last
        content = last['content'] if isinstance(last['content'], str) else ''
        reasoning = str(last.get(key or '') or '')
        opens = _OPEN_THINK.search(prompt)
        if reasons and _CLOSED_THINK.search(prompt):
            raise RowRefused(self._why_closed)
        follows = self._after_prompt(prompt, full, frame)
        if follows is not None and thought:
            empty = _EMPTY_BLOCK.match(follows)
            follows = thought + (follows[empty.end() :] if empty else follows)
        if follows is not None and opens and not _BEGINS_CLOSING.match(follows):
            follows = self._inside_block(prompt, follows, reasons=reasons)
        is_printed = follows is not None and _is_printed(content, reasoning, follows, is_call=is_call, reasons=reasons)
        if follows is None and is_call:
            raise RowRefused('the chat template does not print the tool call after the generation prompt')
        if follows is None or not (is_printed or is_call):
            follows = self._as_written(prompt, content, frame, reasons=reasons)
        if full != prompt + follows:
            notes.append(RENDERED_DIFFERENTLY if full.startswith(prompt) else FULL_DIFFERS)
        start = self._reply_end(follows, last, content, frame)
        before, stop, end = self._split_end(follows[start:], frame, is_call=is_call)
        if end is not None:
            notes.append(ADDED_END)
        cut = start + len(before) + len(stop)
        rest = follows[cut:]
        if end is not None and rest:
            # The end-of-turn token is added at the end. So text that the template prints after the turn is removed.
            rest = ''
            notes += [] if FULL_DIFFERS in notes else [FULL_DIFFERS]
        return _Parts(chat=chat, prompt=prompt, reply=follows[:cut], rest=rest, end=end, guarded=guarded, notes=notes)

    def _after_prompt(self, prompt: str, full: str, frame: _Frame) -> str | None:
        """Return the text that follows the prompt in the rendered chat `full`. Returns None if it cannot be found.

        Some templates print the prompt differently if a reply follows. For example, they leave out the think block of
        the generation prompt, or they no longer put the system text into the last user turn.
        """
        if full.startswith(prompt):
            return full[len(prompt) :]
        alone = frame.alone
        base = prompt[: len(prompt) - len(alone)]
        if prompt.endswith(alone) and full.startswith(base):
            follows = full[len(base) :]
            return follows[self._repeated(alone, follows) :]
        common = self._common_length(prompt, full)
        left = prompt[common:]
        if _ANY_THINK_TAG.search(left) or not self.text.without_control(left).strip():
            return full[common:]
        anchor = prompt[self.text.last_control(prompt)[1] :]
        at = full.rfind(anchor) if anchor.strip() else -1
        return full[at + len(anchor) :] if at >= 0 else None

    def _repeated(self, alone: str, follows: str) -> int:
        """Return the length of the turn header with which `alone` ends and `follows` begins, or 0 if there is none.

        Both texts follow the same text: `alone` in the prompt, and `follows` in the whole chat. Command R+ prints an
        instruction before the header of the generation prompt, but not before the header of a reply. So `alone` is an
        instruction and the header, and `follows` is the header and the reply.
        """
        headers = (match.start() for match in self.text.find_controls(alone))
        return next((len(alone) - at for at in headers if follows.startswith(alone[at:])), 0)

    def _common_length(self, prompt: str, full: str) -> int:
        """Return the length of the common prefix of two renderings.

        If the prefix would end inside a control token or think tag, it ends before this token or tag.
        """
        common = len(_shared(prompt, full))
        for text in (prompt, full):
            for match in self.text.find_all(text[max(common - _LONGEST_TAG, 0) : common + _LONGEST_TAG]):
                start = max(common - _LONGEST_TAG, 0) + match.start()
                if start < common < start + len(match[0]):
                    common = start
        return common

    def _inside_block(self, prompt: str, follows: str, *, reasons: bool) -> str:
        """Return `follows`, changed so that it continues a prompt that ends in an open think block.

        `follows` is the text that the template prints after the prompt. If it begins with an opening tag, this tag is
        removed. If it has no such tag, and the reply has no reasoning, the closing tag of the block is put before it.
        """
        own = _BEGINS_THINKING.match(follows)
        if own:
            return follows[own.end() :]
        return follows if reasons else self._closing(prompt) + follows

    def _closing(self, prompt: str) -> str:
        """Return the closing tag for the think block that the prompt opens, with the line ends around the tag."""
        opened = _OPEN_THINK.search(prompt)
        assert opened is not None, 'the prompt opens a think block'
        if not opened[1].startswith('<') or opened[1].startswith('<|'):
            return _closing_tag(opened[1])
        line = '' if prompt.endswith('\n') else '\n'
        return f'{line}{_closing_tag(opened[1])}\n\n'

    def _as_written(self, prompt: str, content: str, frame: _Frame, *, reasons: bool) -> str:
        """Return the text to train on after the prompt, for a reply that the template would alter.

        This text is the lead (what the template prints before a reply), the reply as it is in the row, and the end of
        turn.
        """
        lead = frame.lead
        opens = _OPEN_THINK.search(prompt)
        if reasons:
            own = _BEGINS_THINKING.match(content)
            lead = '' if _ANY_THINK_TAG.search(lead) else lead
            content = content[own.end() :] if opens and own else content
        elif opens and not _BEGINS_CLOSING.match(lead):
            lead = self._closing(prompt)
        return lead + content + frame.end

    def _reply_end(self, follows: str, last: Message, content: str, frame: _Frame) -> int:
        """Return the position in `follows` at which the content of the reply ends.

        If the reply has calls, return the position at which the name of its last call ends.
        """
        names = [str(call.get('function', call).get('name') or '') for call in last.get('tool_calls', ())]
        if names:
            return max(follows.rfind(name) + len(name) for name in names)
        if follows.endswith(frame.end):
            return len(follows) - len(frame.end)
        at = follows.rfind(content.strip()) if content.strip() else -1
        return at + len(content.strip()) if at >= 0 else 0

    def _split_end(self, end: str, frame: _Frame, *, is_call: bool) -> tuple[str, str, int | None]:
        """Split `end`, the text after a reply. Returns (text before the end-of-turn token, this token, id to add).

        The id is None if the template prints an end-of-turn token. Otherwise the second value is '', and the id is that
        of the end-of-turn token that must be added.
        """
        end_of_reply = self._end_of_reply(self.text.find_controls(frame.end))
        stops = {self.tokenizer.eos_token, *([] if end_of_reply is None else [end_of_reply[0]])}
        markers = self.text.find_controls(end)
        opener = next((match for match in markers if match[0] in self._openers - stops), None)
        if opener is not None:
            # Some templates print the header of a next turn, or an instruction, after the last turn.
            end = end[: opener.start()]
            markers = markers[: markers.index(opener)]
        found = self._end_of_call(end, markers, stops) if is_call else self._end_of_reply(markers)
        if found is not None:
            return end[: found.start()], found[0], None
        following = self._next[is_call]
        return end, '', self.tokenizer.eos_token_id if following is None else self.text.control_ids[following]

    def _end_of_call(self, end: str, markers: Sequence[re.Match[str]], stops: set[str]) -> re.Match[str] | None:
        """Return the match of the token that ends the turn after a tool call, or None if there is no such token.

        `end` is the text after the call, `markers` are the matches of control tokens in this text, and `stops` are the
        known end-of-turn tokens. The first marker that is one of `stops` ends the turn. If no marker is one of `stops`,
        the last marker ends the turn. But a last marker that closes only the call (`</...`) does not end the turn, and
        neither does a last marker with text after it.
        """
        named = next((match for match in markers if match[0] in stops), None)
        if named is not None or not markers:
            return named
        last = markers[-1]
        return None if last[0].startswith('</') or end[last.end() :].strip() else last

    def _end_of_reply(self, markers: Sequence[re.Match[str]]) -> re.Match[str] | None:
        """Return the match of the end-of-turn token after a reply. `markers` are the control tokens after the reply.

        This is the end-of-sequence token if the template prints it after each turn, otherwise the first of `markers`.
        Returns None if `markers` is empty.
        """
        eos = self.tokenizer.eos_token
        # Some templates, such as Cohere's, print another control token before the end-of-sequence token.
        end = next((match for match in markers if match[0] == eos), None) if self._eos_ends_turns else None
        return end or next(iter(markers), None)

    # --- from text to ids

    def _prompt_ids(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        plain = iter(self.text.ids([text for text, guarded in texts if not guarded]))
        return [self.text.guarded_ids(text) if guarded else next(plain) for text, guarded in texts]

    def _encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        chats = []
        for row in rows:
            context, reply = row.messages[:-1], row.messages[-1]
            known = self._reasons(reply, with_tools=self._lists_tools(row))
            reasons = self.asks_to_think if _is_unknown(reply) else known
            chats.append(self._chat(row, context, reasons=reasons))
        texts = self._render_all([chat for chat, _, _ in chats], prompt=True)
        return self._prompt_ids([(text, guarded) for text, (_, guarded, _) in zip(texts, chats, strict=True)])

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        parts = self._parts(rows)
        plain = [part for part in parts if not part.guarded]
        whole = iter(self.text.ids([part.text for part in plain]))
        tails = self._learn_tails([part.prompt for part in plain])
        encoded = []
        for part in parts:
            ids = self.text.guarded_ids(part.text) if part.guarded else next(whole)
            length = 0 if part.guarded else self._prompt_length(part.prompt, ids, tails)
            prompt = ids[:length] if length else self._prompt_ids([(part.prompt, part.guarded)])[0]
            encoded.append(self._assemble(part, prompt, ids))
        self._add_earlier(rows, parts, encoded)
        return encoded

    def _learn_tails(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        """Add the ids of the tails of these prompts to the cache, and return the cache.

        The tail of a prompt is its text from the last control token on. The cache is {tail: ids}.
        """
        if len(self._tails) > _TAILS_KEPT:
            self._tails = {}  # not cleared: a different thread may still read the old cache
        known = self._tails
        tails = list({prompt[self.text.last_control(prompt)[1] :] for prompt in prompts} - known.keys())
        known.update(zip(tails, self.text.ids(tails), strict=True))
        return known

    def _prompt_length(self, prompt: str, whole: list[int], tails: dict[str, list[int]]) -> int:
        """Return how many ids at the start of `whole` are the ids of the prompt. Returns 0 if this is not certain.

        `whole` has the ids of the prompt and its reply, tokenised as one text. The tail of a prompt is its text from
        the last control token on. Tokenizers first split text at control tokens, so a reply can change only the ids of
        the tail. `tails` is {tail: its ids without a reply}. The result is 0 if `whole` has other ids for the tail.
        """
        count, start = self.text.last_control(prompt)
        if count == 0:
            return 0
        control = self.text.control_set
        position = -1
        for _ in range(count):
            position = next((i for i in range(position + 1, len(whole)) if whole[i] in control), len(whole))
        tail = tails[prompt[start:]]
        end = position + len(tail)
        return end if whole[position:end] == tail else 0

    def _assemble(self, part: _Parts, prompt: list[int], whole: list[int]) -> Encoded:
        """Return the encoded row.

        `whole` has the ids of the row tokenised as one text. These ids are used if they begin with the ids of the
        prompt. Else the ids of the prompt and the ids of the reply, tokenised separately, are used.
        """
        ids, notes = whole, part.notes
        if whole[: len(prompt)] != prompt:
            ids = prompt + self.text.ids_after_control(part.reply + part.rest)
            notes = notes if ids == whole else [*notes, MERGED_BOUNDARY]
        if part.end is not None:
            ids = [*ids, part.end]
        return Encoded(
            input_ids=ids,
            trained=(len(prompt), self._trained_end(ids, part)),
            prompt_length=len(prompt),
            notes=notes,
            pieces=(self.text.unguard(part.prompt), self.text.unguard(part.reply), part.rest),
        )

    def _trained_end(self, ids: list[int], part: _Parts) -> int:
        """Return the position in `ids` just after the end-of-turn token.

        `part.rest` is the text after this token. The search starts at the end of `ids`, and skips as many control
        tokens as `part.rest` has.
        """
        if part.end is not None or not part.rest:
            return len(ids)
        after = len(self.text.find_all(part.rest))
        position = len(ids)
        for _ in range(after + 1):
            position = next(i for i in range(position - 1, -1, -1) if ids[i] in self.text.control_set)
        return position + 1

    # --- earlier replies that carry loss

    def _add_earlier(self, rows: Sequence[Row], parts: Sequence[_Parts], encoded: list[Encoded]) -> None:
        """Add to each encoded row the spans of its earlier replies that carry loss.

        If the row says that its last reply carries no loss, the span of the last reply is removed.
        """
        found: list[_Earlier] = []
        for index, (source, part) in enumerate(zip(rows, parts, strict=True)):
            wanted = [n for n, message in enumerate(source.messages[:-1]) if self.carries_loss(message, source)]
            begin = len(part.chat.messages) - len(source.messages)
            for number in wanted:
                spans = self._find_earlier(part, begin + number)
                found += [_Earlier(index, *span) for span in spans]
                if not spans and EARLIER_CHANGED not in encoded[index].notes:
                    encoded[index].notes.append(EARLIER_CHANGED)
        texts = [(parts[f.row].prompt[:at], parts[f.row].guarded) for f in found for at in (f.start, f.end)]
        borders = iter(self._prompt_ids(texts))
        for earlier in found:
            row = encoded[earlier.row]
            before, whole = next(borders), next(borders)
            start, end = _common(before, row.input_ids), _common(whole, row.input_ids)
            if start < len(before):
                start += 1
                row.notes += [] if EARLIER_MERGED in row.notes else [EARLIER_MERGED]
            if end < len(whole) and EARLIER_MERGED not in row.notes:
                row.notes.append(EARLIER_MERGED)
            if end > start:
                row.earlier.append((start, end))
        places: dict[int, list[tuple[int, int]]] = {}
        for earlier in found:
            span = self._unguarded_span(parts[earlier.row], (earlier.start, earlier.end))
            places.setdefault(earlier.row, []).append(span)
        for index, spans in places.items():
            encoded[index] = mark_pieces(encoded[index], spans)
        for index, source in enumerate(rows):
            if source.messages[-1].get('loss') is False:
                encoded[index] = without_last(encoded[index])

    def _unguarded_span(self, part: _Parts, span: tuple[int, int]) -> tuple[int, int]:
        if not part.guarded:
            return span
        start, end = (len(self.text.unguard(part.prompt[:at])) for at in span)
        return start, end

    def _find_earlier(self, part: _Parts, index: int) -> list[tuple[int, int]]:
        """Return the spans of an earlier reply in the text of the prompt. The reply is the message `index`.

        Usually this is one span, including the end of turn. The list is empty if the template does not print the reply.
        A reply with calls can also have text. Some templates print this text later, after the results of the calls.
        Then a second span covers this text.
        """
        chat, prompt = part.chat, part.prompt
        message = chat.messages[index]
        is_call = 'tool_calls' in message
        printed = self._find_printed(part, index, _replaced(message))
        if printed is None:
            return []
        first, last = printed
        start = min(self._turn_start(part, index, first), first)
        frame = self._frames[bool(chat.tools)]
        spans = [(start, self._turn_end(prompt, last, frame, is_call=is_call))]
        if is_call and message['content']:
            beside = self._find_printed(part, index, _replaced(message, text=True))
            if beside is not None and beside[0] >= spans[0][1]:
                spans.append((beside[0], self._turn_end(prompt, beside[1], frame, is_call=False)))
        return spans

    def _turn_start(self, part: _Parts, index: int, first: int) -> int:
        """Return the position in the prompt at which the loss of an earlier turn begins.

        Loss begins where the generation prompt of the turn ends. In an earlier turn, a template may print only the
        beginning of the generation prompt, for example without a think block. Then loss begins where this beginning
        ends.

        `first` is the position of the content of the turn. Returns the length of the prompt if the position cannot be
        found.
        """
        chat = part.chat
        starts = [self._start_under(part, index, first, chat.settings)]
        if chat.settings:
            # The setting is for the last reply. The prompt of an earlier reply may be printed without the setting.
            starts.append(self._start_under(part, index, first, _NOTHING))
        return min(starts)

    def _start_under(self, part: _Parts, index: int, first: int, settings: Mapping[str, Any]) -> int:
        chat, prompt = part.chat, part.prompt
        before = self._try(chat.messages[:index], chat.tools, prompt=True, settings=settings)
        history = self._try(chat.messages[:index], chat.tools, settings=settings)
        common = self._common_length(before, prompt)
        if before and common >= len(history.rstrip()):
            return common
        # The earlier turns are also printed differently. So use the nearest turn header before the content, if no turn
        # ends between the header and the content.
        markers = self.text.find_controls(before)
        header = _ANY_THINK_TAG.split(before[markers[-1].start() if markers else 0 :])[0]
        at = prompt.rfind(header, 0, first) if header.strip() else -1
        start = at + len(header)
        between = self.text.find_controls(prompt[start:first])
        is_own = at >= 0 and not any(match[0] in self._openers or self._stops(match[0]) for match in between)
        return start if is_own else len(prompt)

    def _stops(self, marker: str) -> bool:
        """Return whether generation stops at this control token."""
        return self.text.control_ids[marker] in (*self.stop_ids, self.tokenizer.eos_token_id)

    def _find_printed(self, part: _Parts, index: int, other: Message) -> tuple[int, int] | None:
        """Return the span of the prompt in which the template prints the turn `index`.

        The chat is rendered once more with the message `other` instead of this turn. The span is the text of the prompt
        that differs between the two renderings. Returns None if nothing differs, or if the second rendering fails.
        """
        chat, prompt = part.chat, part.prompt
        messages = list(chat.messages[:-1])
        messages[index] = other
        changed = self._try(messages, chat.tools, prompt=True, settings=chat.settings)
        if not changed or changed == prompt:
            return None
        first = len(_shared(prompt, changed))
        shared = len(_shared(prompt[first:][::-1], changed[first:][::-1]))
        return first, len(prompt) - shared

    def _turn_end(self, prompt: str, last: int, frame: _Frame, *, is_call: bool) -> int:
        """Return the position just after the end of a turn. `last` is the position after the content of the turn."""
        match = self.text.find_control(prompt, last)
        while is_call and match is not None and not self._stops(match[0]):
            if match[0] in self._openers:
                return match.start()
            match = self.text.find_control(prompt, match.end())
        if match is not None:
            between = prompt[last : match.start()]
            if is_call or not between.strip() or frame.end.startswith(between):
                return match.end()
        # The end of turn may be plain text without a control token.
        return last + len(frame.end) if prompt.startswith(frame.end, last) else last


def _have_calls(chats: Sequence[Any]) -> bool:
    """Return whether a message has tool calls. `chats` is a list of chats, or the messages of one chat."""
    messages = itertools.chain.from_iterable(chat if isinstance(chat, list) else (chat,) for chat in chats)
    return any('tool_calls' in message for message in messages)


def _is_unknown(reply: Message) -> bool:
    """Return whether the reply is still to be generated, as in inference. Such a reply is empty."""
    return not (reply['content'] or reply.keys() & {'tool_calls', 'reasoning'})


def _closing_tag(opening: str) -> str:
    if opening == '<|START_THINKING|>':
        return '<|END_THINKING|>'
    return f'{opening[0]}/{opening[1:]}'


def _thinks(content: str, *, opened: bool) -> bool:
    """Return whether a reply has a think block. If `opened` is True, the opening tag may be in the prompt."""
    own = _BEGINS_THINKING.match(content)
    if own:
        return _closing_tag(own[1]) in content[own.end() :]
    return opened and len(_ANY_THINK_TAG.findall(content)) == 1 and _CLOSES_LINE.search(content) is not None


def _is_printed(content: str, reasoning: str, follows: str, *, is_call: bool, reasons: bool) -> bool:
    """Return whether the template prints the content and the reasoning of the reply without changes.

    `follows` is the text that the template prints after the prompt. `is_call` says whether the reply has calls, and
    `reasons` whether it has reasoning. If the reply has calls or reasoning, think tags and the spaces around them are
    not compared. Returns False for a reply with reasoning if `follows` begins with a closed think block.
    """
    if not (reasons or is_call or reasoning):
        return content in follows
    pieces = [piece.strip() for piece in (*_ANY_THINK_TAG.split(content), reasoning)]
    places = [follows.find(piece) for piece in pieces if piece]
    # The reasoning would be trained after the closed think block, not inside it.
    begins_closed = _BEGINS_CLOSING.match(follows) or _EMPTY_BLOCK.match(follows)
    return -1 not in places and not (reasons and begins_closed)


def _replaced(message: Message, *, text: bool = False) -> Message:
    """Return a copy of a turn with a random text as its content. If the turn has calls, their arguments change instead.

    If `text` is True, the content changes even if the turn has calls. The names of calls never change, because
    templates print the names again with the results. The random text begins and ends with characters that occur in no
    data. So a comparison of two renderings finds exactly what changed.
    """
    mark = f'\ue000{secrets.token_hex(8)}\ue001'
    if text or 'tool_calls' not in message:
        return cast(Message, {**message, 'content': mark})
    calls = []
    for call in message['tool_calls']:
        function = call.get('function', call)
        arguments = function.get('arguments')
        other = {**function, 'arguments': {**arguments, mark: mark} if isinstance(arguments, dict) else mark}
        calls.append({**call, 'function': other} if 'function' in call else other)
    return cast(Message, {**message, 'tool_calls': calls})


def _unspaced(text: str) -> str:
    return ''.join(text.split())


def _common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return the length of the common prefix of two sequences."""
    if left == right[: len(left)]:
        return len(left)
    unlike = (index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(unlike, min(len(left), len(right)))


def _shared(left: str, right: str) -> str:
    return left[: _common(left, right)]

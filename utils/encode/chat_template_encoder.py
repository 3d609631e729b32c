"""Encodes conversations with the chat template of the tokenizer (template `auto`).

The ids of a row are the ids of its prompt, of its reply, and of what the template prints after the end of the turn.

The prompt is the text that the template renders with `add_generation_prompt=True`. So inference starts exactly where
the reply starts in training. The reply is all that the template prints after the prompt, up to the end-of-turn token.
The whole reply carries loss, including this token. Text after this token carries no loss.

To learn the properties of a template, the encoder renders probes: short chats with random texts.

If the data contains a control token such as <|im_end|>, a stand-in replaces it before the chat is rendered, so that it
becomes plain text. A chat with stand-ins is called guarded.
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
# The maximum number of tails of prompts that are cached with their ids (see _tokenise_tails). Most templates have few
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
    """A row as text. The whole text is prompt + reply + rest.

    `reply` is the last reply. If the template prints an end-of-turn token, `reply` includes this token, and `rest` is
    what the template prints after it.
    """

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

    `lead` is the text just before the reply, for example an empty think block. `end` is the text after the reply, for
    example the end-of-turn token.

    `prompt_only` is the end of the generation prompt, if the chat with the reply does not have it, and else ''. For
    example, some generation prompts end in '<think>', but the chat with the reply has no think tag.
    """

    lead: str
    end: str
    prompt_only: str
    # Whether the prompt ends in an open think block.
    opens: bool


class _Earlier(NamedTuple):
    """The position of an earlier reply that carries loss. `row` is the index of its row in the batch.

    `start` and `end` are positions in the text of the prompt.
    """

    row: int
    start: int
    end: int


class AutoEncoder(Encoder):
    """Encodes rows with the tokenizer's chat template.

    Loss covers the last reply, unless the row marks this reply to carry no loss. Loss also covers the earlier replies
    for which `carries_loss` returns True. For every reply, loss covers its end of turn too.
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
        self._switch, self._opens = self._find_thinking_setting()
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
        """Return the rendering of a chat, or '' if the template refuses the chat."""
        try:
            return self._render(messages, tools, **options)
        except RowRefused:
            return ''

    def _render_all(self, chats: Sequence[_Chat], *, prompt: bool) -> list[str]:
        """Return the rendering of each chat. If `prompt` is True, each rendering ends with the generation prompt.

        Chats without tools and settings share one call, which is faster. Raises RowRefused if the template refuses one
        of the chats.
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
        """Return what the template prints around a reply, in a chat that lists `tools`.

        Raises ConfigError if the template fails on this chat, or does not print the reply.
        """
        reply = secrets.token_hex(8)
        messages = self._probe({'role': 'assistant', 'content': reply})
        try:
            prompt = self._render(messages[:-1], tools, prompt=True)
            text = self._render(messages, tools)
        except RowRefused as error:
            choose = 'Run without --system, or choose' if self.system else 'Choose'
            remedy = f'{choose} a --template_type, e.g. default.'
            raise ConfigError(
                f'the chat template of this tokenizer fails on a one-turn chat: {error}. {remedy}'
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
        prompt_only = prompt[common:]
        return _Frame(
            lead=lead[self._repeated_header(prompt_only, lead) :],
            end=text[start + len(reply) :],
            prompt_only=prompt_only,
            opens=_OPEN_THINK.search(prompt) is not None,
        )

    def _prints_tools(self) -> bool:
        name, tool = self._probe_tool()
        text = self._try(self._probe(), [tool], prompt=True)
        self.text.add_printed(text)
        return name in text

    def _prints_calls(self, *, with_tools: bool) -> bool:
        """Return whether the template prints tool calls. If `with_tools` is True, the probed chat also lists a tool."""
        name, tool = self._probe_tool()
        tools = [tool] if with_tools else None
        text = self._try(self._probe(self._probe_call(name)), tools)
        listed = self._try(self._probe(), tools, prompt=True)
        self.text.add_printed(text)
        return text.count(name) > listed.count(name)

    def _find_reasoning_key(self, *, is_call: bool, with_tools: bool) -> str | None:
        """Return the message key from which the template prints reasoning, e.g. 'reasoning_content', or None.

        If `is_call` is True, the probed reply is a tool call. If `with_tools` is True, the probed chat lists a tool.
        """
        mark = secrets.token_hex(8)
        name, tool = self._probe_tool()
        turn: Message = self._probe_call(name) if is_call else {'role': 'assistant', 'content': 'b'}
        for key in _PRINTED_KEYS:
            if mark in self._try(self._probe(cast(Message, {**turn, key: mark})), [tool] if with_tools else None):
                return key
        return None

    def _find_thinking_setting(self) -> tuple[Mapping[str, Any], bool]:
        """Return (setting that turns thinking on, whether the prompt with this setting ends in an opening think tag).

        Example: ({'enable_thinking': True}, False)

        Some generation prompts end in a closed think block, such as <think></think>, so no reasoning can follow. With
        the returned setting, the prompt has no think block, or it ends in an opening think tag. Then reasoning can
        follow.

        The setting is {} if no variable of the template changes the generation prompt in this way, or if the user has
        already set a variable that decides on thinking.
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
        """Return a set with the first control token that the template prints in a chat, e.g. {'<|im_start|>'}.

        The begin-of-sequence and end-of-sequence tokens are skipped. The encoder takes each further occurrence of the
        returned token as the beginning of a turn.

        The set is empty if the template prints no control token. It is also empty if the template prints the token more
        than once between a question and its reply, because it then does not always begin a turn.
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
        """Return the control token that begins the turn after a reply, or None if no such token is found.

        If `is_call` is True, the reply is a tool call, and the turn after it is a tool result. The begin-of-sequence
        token is never returned.
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
        """Return the ids of the tokens that end a turn. Text replies and tool calls may end in different tokens."""
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
        """Return the template settings with which a row is rendered, for example {'enable_thinking': True}.

        If the last reply of the row has no reasoning that the template can print, the result is {}. Otherwise, the
        result is the setting that turns thinking on, or {} if there is no such setting, it is not needed, or the user
        has set thinking with --template_settings.
        """
        return self._switch if self._has_reasoning(row.messages[-1], with_tools=self._lists_tools(row)) else _NOTHING

    def in_its_form(self, messages: Sequence[Mapping[str, Any]], row: Row) -> list[Any]:
        """Return `messages` with the keys and values that the template expects.

        `messages` are the turns of `row` as they were written in the data file.
        """
        with_tools = self._lists_tools(row)
        key = self._reasoning_key_of_row(row)
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
        """Return the calls with arguments as the template expects them: as objects or as JSON text."""
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
        """Return the reasoning in a think block, e.g. '<think>reasoning</think>'. `tag` is the opening tag.

        If the template prints a line end after the opening tag, the block has line ends too.
        """
        line = '\n' if f'{tag}\\n' in self._source or f'{tag}\n' in self._source else ''
        return f'{tag}{line}{reasoning}{line}{_closing_tag(tag)}{2 * line}'

    def _lists_tools(self, row: Row) -> bool:
        return bool(row.tools) and self.says_tools

    def _reasoning_key(self, reply: Message, *, with_tools: bool) -> str | None:
        """Return the message key from which the template prints the reasoning of `reply`, or None.

        The probes found four keys: for replies with and without tool calls, in chats with and without tools.
        """
        # If the template prints no tool calls, they are text in the content of the reply.
        return self._reasoning_keys['tool_calls' in reply and self.says_calls[with_tools], with_tools]

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
        for key in _PRINTED_KEYS:
            if key not in self._source:
                continue
            last = self.spoken(marked, with_tools=with_tools, is_last=True, key=key)
            if mark in self._try([*context, last], row.tools if with_tools else None, settings=self._switch):
                return key
        return None

    def _has_reasoning(self, reply: Message, *, with_tools: bool) -> bool:
        """Return whether the reply has reasoning that the template can print.

        The reasoning is in a separate key of the message, or in a think block in its content.
        """
        if reply.get('reasoning'):
            return bool(self._reasoning_key(reply, with_tools=with_tools) or _THINK_SOURCE.search(self._source))
        return _has_think_block(reply['content'], opened=self._opens)

    def _chat(
        self, row: Row, context: Sequence[Message], *, has_reasoning: bool, key: str | None = None
    ) -> tuple[_Chat, bool, list[str]]:
        """Return (chat to render, whether control tokens in its texts were replaced, notes) for a row.

        If the texts contain control tokens such as <|im_end|>, stand-ins replace them, so that they are tokenised as
        plain text.

        `context` has the messages to render: all messages of the row, or those before its last reply. `has_reasoning`
        says whether the last reply has reasoning. `key` is the message key under which its reasoning is stored.
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
        settings = self._switch if has_reasoning else _NOTHING
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
            has_reasoning = self._has_reasoning(reply, with_tools=with_tools)
            key = self._reasoning_key_of_row(row)
            chat, guarded, notes = self._chat(row, row.messages, has_reasoning=has_reasoning, key=key)
            if reply.get('reasoning') and has_reasoning and not key:
                notes.append(REASONING_AS_TEXT)
            chats.append((chat, guarded, notes, reply.get('reasoning', ''), key, has_reasoning))
        prompts = self._render_all([chat._replace(messages=chat.messages[:-1]) for chat, *_ in chats], prompt=True)
        fulls = self._render_all([chat for chat, *_ in chats], prompt=False)
        parts = []
        for (chat, guarded, notes, reasoning, key, has_reasoning), prompt, full in zip(
            chats, prompts, fulls, strict=True
        ):
            thought = self._block_before_calls(chat.messages[-1], reasoning, key, guarded=guarded)
            part = self._part(
                chat, prompt, full, guarded=guarded, notes=notes, thought=thought, key=key, has_reasoning=has_reasoning
            )
            if reasoning and _unspaced(reasoning) not in _unspaced(self.text.unguard(part.reply)):
                notes.append(REASONING_LEFT_OUT)
            parts.append(part)
        return parts

    def _block_before_calls(self, reply: Message, reasoning: str, key: str | None, *, guarded: bool) -> str:
        """Return the think block to insert before the tool calls of a reply, or '' if no block is needed.

        A block is needed if the reply has tool calls and reasoning, the template has think tags, and the template has
        no message key for the reasoning (`key` is None).

        If `guarded` is True, stand-ins replace control tokens such as <|im_end|> in the block.
        """
        tag = _THINK_SOURCE.search(self._source)
        if 'tool_calls' not in reply or key or tag is None or not reasoning:
            return ''
        block = self._as_block(reasoning, tag[0])
        return self.text.guard(block, reply=True) if guarded else block

    def _part(
        self, chat: _Chat, prompt: str, full: str, *, guarded: bool, notes: list[str], thought: str, key: str | None,
        has_reasoning: bool,
    ) -> _Parts:  # fmt: skip
        last, frame = chat.messages[-1], self._frames[bool(chat.tools)]
        is_call = 'tool_calls' in last
        content = last['content'] if isinstance(last['content'], str) else ''
        reasoning = str(last.get(key or '') or '')
        opens = _OPEN_THINK.search(prompt)
        if has_reasoning and _CLOSED_THINK.search(prompt):
            raise RowRefused(self._why_closed)
        after_prompt = self._after_prompt(prompt, full, frame)
        if after_prompt is not None and thought:
            empty = _EMPTY_BLOCK.match(after_prompt)
            after_prompt = thought + (after_prompt[empty.end() :] if empty else after_prompt)
        if after_prompt is not None and opens and not _BEGINS_CLOSING.match(after_prompt):
            after_prompt = self._continue_block(prompt, after_prompt, has_reasoning=has_reasoning)
        is_printed = after_prompt is not None and _is_unchanged(
            content, reasoning, after_prompt, is_call=is_call, has_reasoning=has_reasoning
        )
        if after_prompt is None and is_call:
            raise RowRefused('the chat template does not print the tool call after the generation prompt')
        if after_prompt is None or not (is_printed or is_call):
            after_prompt = self._as_written(prompt, content, frame, has_reasoning=has_reasoning)
        if full != prompt + after_prompt:
            notes.append(RENDERED_DIFFERENTLY if full.startswith(prompt) else FULL_DIFFERS)
        start = self._find_reply_end(after_prompt, last, content, frame)
        before, stop, end = self._split_end(after_prompt[start:], frame, is_call=is_call)
        if end is not None:
            notes.append(ADDED_END)
        cut = start + len(before) + len(stop)
        rest = after_prompt[cut:]
        if end is not None and rest:
            # The end-of-turn token is added at the end. So text that the template prints after the turn is removed.
            rest = ''
            notes += [] if FULL_DIFFERS in notes else [FULL_DIFFERS]
        return _Parts(
            chat=chat, prompt=prompt, reply=after_prompt[:cut], rest=rest, end=end, guarded=guarded, notes=notes
        )

    def _after_prompt(self, prompt: str, full: str, frame: _Frame) -> str | None:
        """Return the part of the rendered chat `full` after the prompt. Returns None if it cannot be found.

        Some templates print the prompt differently if a reply follows. For example, they leave out the think block at
        the end of the prompt. So `full` may not begin with `prompt`.
        """
        if full.startswith(prompt):
            return full[len(prompt) :]
        prompt_only = frame.prompt_only
        base = prompt[: len(prompt) - len(prompt_only)]
        if prompt.endswith(prompt_only) and full.startswith(base):
            after_prompt = full[len(base) :]
            return after_prompt[self._repeated_header(prompt_only, after_prompt) :]
        common = self._common_length(prompt, full)
        left = prompt[common:]
        if _ANY_THINK_TAG.search(left) or not self.text.without_control(left).strip():
            return full[common:]
        anchor = prompt[self.text.last_control(prompt)[1] :]
        at = full.rfind(anchor) if anchor.strip() else -1
        return full[at + len(anchor) :] if at >= 0 else None

    def _repeated_header(self, prompt_end: str, reply_start: str) -> int:
        """Return the length of the turn header at the end of `prompt_end` that `reply_start` begins with, or 0.

        Example: _repeated_header('Answer briefly.<|bot|>', '<|bot|>Hello') -> 7, the length of '<|bot|>'
        """
        # Command R+ prints an instruction before the header of the generation prompt, but not before that of a reply.
        headers = (match.start() for match in self.text.find_controls(prompt_end))
        return next((len(prompt_end) - at for at in headers if reply_start.startswith(prompt_end[at:])), 0)

    def _common_length(self, prompt: str, full: str) -> int:
        """Return the length of the common prefix of two texts. It never ends inside a control token or think tag."""
        common = len(_shared(prompt, full))
        for text in (prompt, full):
            for match in self.text.find_all(text[max(common - _LONGEST_TAG, 0) : common + _LONGEST_TAG]):
                start = max(common - _LONGEST_TAG, 0) + match.start()
                if start < common < start + len(match[0]):
                    common = start
        return common

    def _continue_block(self, prompt: str, after_prompt: str, *, has_reasoning: bool) -> str:
        """Return `after_prompt`, changed so that it can follow a prompt that ends in an opening think tag.

        An opening tag at the start is removed: '<think>a</think>b' -> 'a</think>b'
        Without such a tag, if the reply has no reasoning, a closing tag is added: 'b' -> '</think>b' (with line ends)
        """
        own = _BEGINS_THINKING.match(after_prompt)
        if own:
            return after_prompt[own.end() :]
        return after_prompt if has_reasoning else self._closing(prompt) + after_prompt

    def _closing(self, prompt: str) -> str:
        """Return the closing tag of the think block that the prompt opens.

        A tag like </think> gets line ends around it. A tag like [/THINK] gets none.
        """
        opened = _OPEN_THINK.search(prompt)
        assert opened is not None, 'the prompt opens a think block'
        if not opened[1].startswith('<') or opened[1].startswith('<|'):
            return _closing_tag(opened[1])
        line = '' if prompt.endswith('\n') else '\n'
        return f'{line}{_closing_tag(opened[1])}\n\n'

    def _as_written(self, prompt: str, content: str, frame: _Frame, *, has_reasoning: bool) -> str:
        """Return the text to train on after the prompt, with the content of the reply as it is in the row.

        The caller uses this text if the template would change the reply. The text has three parts: what the template
        usually prints before a reply, the content, and the end of turn. No think tag is printed twice: the opening tag
        of the content is removed if the prompt ends in one.
        """
        lead = frame.lead
        opens = _OPEN_THINK.search(prompt)
        if has_reasoning:
            own = _BEGINS_THINKING.match(content)
            lead = '' if _ANY_THINK_TAG.search(lead) else lead
            content = content[own.end() :] if opens and own else content
        elif opens and not _BEGINS_CLOSING.match(lead):
            lead = self._closing(prompt)
        return lead + content + frame.end

    def _find_reply_end(self, after_prompt: str, last: Message, content: str, frame: _Frame) -> int:
        """Return the position in `after_prompt` just after the content of the reply, or 0 if the content is not found.

        `after_prompt` has the reply as the template prints it, and the end of turn. If the reply has tool calls, the
        result is the position just after the name of its last call.
        """
        names = [str(call.get('function', call).get('name') or '') for call in last.get('tool_calls', ())]
        if names:
            return max(after_prompt.rfind(name) + len(name) for name in names)
        if after_prompt.endswith(frame.end):
            return len(after_prompt) - len(frame.end)
        at = after_prompt.rfind(content.strip()) if content.strip() else -1
        return at + len(content.strip()) if at >= 0 else 0

    def _split_end(self, end: str, frame: _Frame, *, is_call: bool) -> tuple[str, str, int | None]:
        """Return (text before the end-of-turn token, this token, None). `end` is the text after a reply.

        If `end` has no end-of-turn token, return (`end`, '', id of an end-of-turn token that the caller must add). If
        the template prints the header of a next turn in `end`, only the text before this header counts as `end`.
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
        """Return the match of the token that ends the turn after a tool call, or None.

        `end` is the text after the call. `markers` are the control tokens in `end`. `stops` are the known end-of-turn
        tokens.

        The result is the first marker in `stops`. If there is none, the result is the control token with which `end`
        ends. A closing tag such as </tool_call> is never the result.
        """
        named = next((match for match in markers if match[0] in stops), None)
        if named is not None or not markers:
            return named
        last = markers[-1]
        return None if last[0].startswith('</') or end[last.end() :].strip() else last

    def _end_of_reply(self, markers: Sequence[re.Match[str]]) -> re.Match[str] | None:
        """Return the match of the token that ends the turn after a text reply, or None if `markers` is empty.

        `markers` are the control tokens after the reply. If the template prints the end-of-sequence token after each
        turn, and `markers` has this token, the result is its match. Otherwise it is the first marker.
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
            known = self._has_reasoning(reply, with_tools=self._lists_tools(row))
            has_reasoning = self.asks_to_think if _is_unknown(reply) else known
            chats.append(self._chat(row, context, has_reasoning=has_reasoning))
        texts = self._render_all([chat for chat, _, _ in chats], prompt=True)
        return self._prompt_ids([(text, guarded) for text, (_, guarded, _) in zip(texts, chats, strict=True)])

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        parts = self._parts(rows)
        plain = [part for part in parts if not part.guarded]
        whole = iter(self.text.ids([part.text for part in plain]))
        tails = self._tokenise_tails([part.prompt for part in plain])
        encoded = []
        for part in parts:
            ids = self.text.guarded_ids(part.text) if part.guarded else next(whole)
            length = 0 if part.guarded else self._count_prompt_ids(part.prompt, ids, tails)
            prompt = ids[:length] if length else self._prompt_ids([(part.prompt, part.guarded)])[0]
            encoded.append(self._assemble(part, prompt, ids))
        self._add_earlier(rows, parts, encoded)
        return encoded

    def _tokenise_tails(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        """Return a cached dict from prompt tails to their token ids, after adding the tails of `prompts`.

        The tail of a prompt is its text from the last control token on.
        """
        if len(self._tails) > _TAILS_KEPT:
            self._tails = {}  # not cleared: a different thread may still read the old cache
        known = self._tails
        tails = list({prompt[self.text.last_control(prompt)[1] :] for prompt in prompts} - known.keys())
        known.update(zip(tails, self.text.ids(tails), strict=True))
        return known

    def _count_prompt_ids(self, prompt: str, whole: list[int], tails: dict[str, list[int]]) -> int:
        """Return how many ids at the start of `whole` belong to the prompt. Returns 0 if this is not certain.

        `whole` has the ids of prompt and reply, tokenised as one text.

        The tail is the end of the prompt, from the last control token on. `tails` is a dict from tails to the ids of
        the tail without a reply. If a tokenizer merges the tail with the beginning of the reply, `whole` does not
        contain the ids of the tail, and the result is 0.
        """
        # Tokenizers first split text at control tokens. So a reply cannot change the ids before the last of them.
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
        """Return the encoded row. `whole` has the ids of prompt and reply, tokenised as one text.

        If `whole` does not begin with the ids of the prompt, the prompt and the reply are tokenised separately.
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
        """Return the position in `ids` just after the end-of-turn token of the last reply."""
        if part.end is not None or not part.rest:
            return len(ids)
        # The search starts at the end of `ids`, and skips the control tokens of the text after the end-of-turn token.
        after = len(self.text.find_all(part.rest))
        position = len(ids)
        for _ in range(after + 1):
            position = next(i for i in range(position - 1, -1, -1) if ids[i] in self.text.control_set)
        return position + 1

    # --- earlier replies that carry loss

    def _add_earlier(self, rows: Sequence[Row], parts: Sequence[_Parts], encoded: list[Encoded]) -> None:
        """Add the spans of earlier replies to the encoded rows.

        An earlier reply is a reply before the last reply of its row. If an earlier reply carries no loss, its span is
        not added. If the last reply of a row carries no loss, the span of the last reply is removed. Raises RowRefused
        if no reply of the row is then left with loss.
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
        """Return the spans of the prompt in which an earlier reply is printed. `index` is the index of its message.

        Each span includes the end of turn. The list is empty if the template does not print the reply.

        A reply with tool calls has two spans if the template prints its text only after the results of the calls.
        """
        chat, prompt = part.chat, part.prompt
        message = chat.messages[index]
        is_call = 'tool_calls' in message
        printed = self._find_printed(part, index, _with_random_word(message, in_content=not is_call))
        if printed is None:
            return []
        first, last = printed
        start = min(self._turn_start(part, index, first), first)
        frame = self._frames[bool(chat.tools)]
        spans = [(start, self._turn_end(prompt, last, frame, is_call=is_call))]
        if is_call and message['content']:
            beside = self._find_printed(part, index, _with_random_word(message, in_content=True))
            if beside is not None and beside[0] >= spans[0][1]:
                spans.append((beside[0], self._turn_end(prompt, beside[1], frame, is_call=False)))
        return spans

    def _turn_start(self, part: _Parts, index: int, first: int) -> int:
        """Return the position in the prompt at which the loss of an earlier reply begins.

        Loss begins just after the header of the turn, for example after '<|assistant|>'. `index` is the index of the
        message, and `first` is the position of its content. Returns the length of the prompt if the header is not
        found.
        """
        chat = part.chat
        # Templates may print less of the generation prompt in an earlier turn, for example no think block.
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
        """Return the span of the prompt in which the template prints message `index`.

        The chat is rendered again with the message `other` in its place. The span is the text that then differs.
        Returns None if nothing differs, or if the template refuses the changed chat.
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
        """Return the position in the prompt just after the end-of-turn token of an earlier reply.

        `last` is the position just after the content of the reply. `is_call` says whether the reply is a tool call. If
        no end of turn is found, the result is `last`, or for a tool call the beginning of the next turn.
        """
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
    """Return whether the reply is empty. In inference, an empty reply stands for the reply to generate."""
    return not (reply['content'] or reply.keys() & {'tool_calls', 'reasoning'})


def _closing_tag(opening: str) -> str:
    if opening == '<|START_THINKING|>':
        return '<|END_THINKING|>'
    return f'{opening[0]}/{opening[1:]}'


def _has_think_block(content: str, *, opened: bool) -> bool:
    """Return whether a reply begins with a think block, e.g. '<think>reasoning</think>answer'.

    If the prompt already ends in the opening tag (`opened`), a reply with only the closing tag has a block too, if this
    tag is at the beginning or at the end of a line.
    """
    own = _BEGINS_THINKING.match(content)
    if own:
        return _closing_tag(own[1]) in content[own.end() :]
    return opened and len(_ANY_THINK_TAG.findall(content)) == 1 and _CLOSES_LINE.search(content) is not None


def _is_unchanged(content: str, reasoning: str, after_prompt: str, *, is_call: bool, has_reasoning: bool) -> bool:
    """Return whether `after_prompt`, the text that the template prints after the prompt, has the reply unchanged.

    If the reply has tool calls or reasoning, think tags and the spaces around them may differ.

    Reasoning that is printed after a closed think block, not inside it, counts as changed.
    """
    if not (has_reasoning or is_call or reasoning):
        return content in after_prompt
    pieces = [piece.strip() for piece in (*_ANY_THINK_TAG.split(content), reasoning)]
    places = [after_prompt.find(piece) for piece in pieces if piece]
    # The reasoning would be trained after the closed think block, not inside it.
    begins_closed = _BEGINS_CLOSING.match(after_prompt) or _EMPTY_BLOCK.match(after_prompt)
    return -1 not in places and not (has_reasoning and begins_closed)


def _with_random_word(message: Message, *, in_content: bool) -> Message:
    """Return a copy of the message with a random word in it.

    A comparison of two renderings then shows where the template prints the message. If `in_content` is True, the word
    replaces the content. Otherwise it is added to the arguments of the tool calls.
    """
    # No data contains the first and last character. So a comparison of two renderings finds exactly what changed.
    mark = f'\ue000{secrets.token_hex(8)}\ue001'
    if in_content:
        return cast(Message, {**message, 'content': mark})
    # The names of the calls stay: templates print them again with the results of the calls.
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

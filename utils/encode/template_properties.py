"""Finds out what a chat template prints, by rendering probes: short chats with random texts."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from utils.base.errors import ConfigError
from utils.encode.chat_renderer import NO_SETTINGS, ChatRenderer
from utils.encode.common_text import common_length_of_renderings, repeated_header
from utils.encode.encoded import CLOSED_BY_SETTING, CLOSED_THINKING, RowRefused
from utils.encode.guarded_tokenizer import TextTokenizer
from utils.encode.think_tags import OPEN_THINK
from utils.formats.conversation import Message
from utils.loading.template_settings import as_word, split_settings

# Keys under which rows store the reasoning of a turn.
REASONING_KEYS = ('reasoning_content', 'reasoning', 'thinking')
# Keys under which templates read the reasoning. Cohere's templates read `tool_plan` before calls.
PRINTED_KEYS = (*REASONING_KEYS, 'tool_plan')
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


class Frame(NamedTuple):
    """What a template prints around the reply of a one-turn chat.

    `lead` is the text just before the reply, for example an empty think block. `end` is the text after the reply, for
    example the end-of-turn token.

    Some templates leave out or change the end of the generation prompt if a reply follows. `prompt_only` is this end,
    for example '<think>'. For other templates, it is ''.
    """

    lead: str
    end: str
    prompt_only: str
    # Whether the prompt ends in an open think block.
    opens: bool


class TemplateProperties:
    """What the chat template of a tokenizer prints. It is found once, when an object is made.

    Raises ConfigError if the template fails on a chat of one turn, or does not print the reply.
    """

    # Whether the template prints the tools of a chat.
    says_tools: bool
    # Whether the chat lists tools -> whether the template prints tool calls.
    says_calls: dict[bool, bool]
    # Whether the chat lists tools -> what the template prints around a reply. A tokenizer may have a separate template
    # for chats with tools, or the template may print different text around the reply of such a chat.
    frames: dict[bool, Frame]
    # The content of a turn that has only calls, and whether arguments are given as JSON text. DeepSeek's templates
    # print calls only if the content is null, and they need arguments as text.
    no_text: str | None
    arguments_as_text: bool
    # (whether the turn has calls, whether the chat lists tools) -> the message key from which the template prints
    # reasoning. The four keys may differ.
    reasoning_keys: dict[tuple[bool, bool], str | None]
    # The setting that turns thinking on, whether the prompt with this setting ends in an opening think tag, and the
    # reason to refuse a reply with reasoning if the prompt ends in a closed think block.
    switch: Mapping[str, Any]
    opens: bool
    why_closed: str
    # The control tokens that begin a turn.
    openers: frozenset[str]
    # Whether the template prints the end-of-sequence token after each reply.
    eos_ends_turns: bool
    # Whether the turn is a call -> the control token that begins the next turn. If the template prints no end of
    # turn, this token is used as the end of turn.
    next_token: dict[bool, str | None]

    def __init__(self, tokenizer: Any, text: TextTokenizer, *, source: str, system: str | None) -> None:
        """Render the probes. `source` is the source of the template, `system` the system text of the run, if any.

        The control tokens that the template prints become control tokens of `text`.
        """
        self.tokenizer = tokenizer
        self.text = text
        self.source = source
        self.system = system
        self.renderer = ChatRenderer(tokenizer)

        frame = self._find_frame()
        self.frames = {False: frame, True: frame}
        self.no_text = ''
        self.arguments_as_text = False
        self.says_tools = self._prints_tools()
        if self.says_tools:
            with contextlib.suppress(ConfigError):  # if this chat fails, all rows with tools are refused
                self.frames[True] = self._find_frame(tools=[self._probe_tool()[1]])

        self.says_calls = self._find_form_of_calls()
        self.reasoning_keys = {
            (is_call, with_tools): self._find_reasoning_key(is_call=is_call, with_tools=with_tools)
            for is_call in (False, True)
            for with_tools in (False, True)
        }
        self.openers = self._find_openers()
        self.eos_ends_turns = self._prints_eos_between_turns()
        self.why_closed = CLOSED_THINKING
        self.switch, self.opens = self._find_thinking_setting()
        self.next_token = {is_call: self._find_next_token(is_call=is_call) for is_call in (False, True)}

    def after_call(self) -> str | None:
        """Return the name of a tool call and what the template prints after it, or None if no call is printed."""
        name, tool = self._probe_tool()
        if not any(self.says_calls.values()):
            return None
        text = self.renderer.try_render(self._probe(self._probe_call(name)), [tool])
        return text[text.rfind(name) :] if name in text else None

    def _find_form_of_calls(self) -> dict[bool, bool]:
        """Set `no_text` and `arguments_as_text` to the first values with which the template prints tool calls.

        Returns {False: ..., True: ...}. The key is whether the chat lists tools. The value is whether the template
        prints tool calls in such a chat.
        """
        says_calls = {False: False, True: False}
        for no_text, as_text in (('', False), (None, False), ('', True), (None, True)):
            self.no_text, self.arguments_as_text = no_text, as_text
            says_calls = {with_tools: self._prints_calls(with_tools=with_tools) for with_tools in (False, True)}
            if any(says_calls.values()):
                break
        return says_calls

    def _probe(self, *turns: Message, user: str = 'a') -> list[Message]:
        begin: list[Message] = [{'role': 'system', 'content': self.system}] if self.system else []
        return [*begin, {'role': 'user', 'content': user}, *turns]

    def _probe_tool(self) -> tuple[str, dict[str, Any]]:
        name = f'probe_{secrets.token_hex(4)}'
        parameters = {'type': 'object', 'properties': {'a': {'type': 'string', 'description': 'a'}}}
        return name, {'type': 'function', 'function': {'name': name, 'description': 'a', 'parameters': parameters}}

    def _probe_call(self, name: str) -> Message:
        # Mistral's templates accept only ids of nine letters and digits.
        arguments: Any = json.dumps({'a': '1'}) if self.arguments_as_text else {'a': '1'}
        call = {'type': 'function', 'id': 'probe0001', 'function': {'name': name, 'arguments': arguments}}
        return cast(Message, {'role': 'assistant', 'content': self.no_text, 'tool_calls': [call]})

    def _find_frame(self, tools: Sequence[Any] | None = None) -> Frame:
        """Return what the template prints around a reply, in a chat that lists `tools`.

        Raises ConfigError if the template fails on this chat, or does not print the reply.
        """
        reply = secrets.token_hex(8)
        messages = self._probe({'role': 'assistant', 'content': reply})
        try:
            prompt = self.renderer.render(messages[:-1], tools, prompt=True)
            text = self.renderer.render(messages, tools)
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
        common = common_length_of_renderings(self.text, prompt, text[:start])
        lead = text[common:start]
        prompt_only = prompt[common:]
        return Frame(
            lead=lead[repeated_header(self.text, prompt_only, lead) :],
            end=text[start + len(reply) :],
            prompt_only=prompt_only,
            opens=OPEN_THINK.search(prompt) is not None,
        )

    def _prints_tools(self) -> bool:
        name, tool = self._probe_tool()
        text = self.renderer.try_render(self._probe(), [tool], prompt=True)
        self.text.add_printed(text)
        return name in text

    def _prints_calls(self, *, with_tools: bool) -> bool:
        """Return whether the template prints tool calls. If `with_tools` is True, the probed chat also lists a tool."""
        name, tool = self._probe_tool()
        tools = [tool] if with_tools else None
        text = self.renderer.try_render(self._probe(self._probe_call(name)), tools)
        listed = self.renderer.try_render(self._probe(), tools, prompt=True)
        self.text.add_printed(text)
        return text.count(name) > listed.count(name)

    def _find_reasoning_key(self, *, is_call: bool, with_tools: bool) -> str | None:
        """Return the message key from which the template prints reasoning, e.g. 'reasoning_content', or None.

        If `is_call` is True, the probed reply is a tool call. If `with_tools` is True, the probed chat lists a tool.
        """
        mark = secrets.token_hex(8)
        name, tool = self._probe_tool()
        turn: Message = self._probe_call(name) if is_call else {'role': 'assistant', 'content': 'b'}
        tools = [tool] if with_tools else None
        for key in PRINTED_KEYS:
            if mark in self.renderer.try_render(self._probe(cast(Message, {**turn, key: mark})), tools):
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
            text = self.renderer.try_render(self._probe(user=mark), prompt=True, settings=settings)
            return text[text.rfind(mark) + len(mark) :] if mark in text else ''

        plain = generation_prompt(NO_SETTINGS)
        set_by_user, template = split_settings(self.tokenizer.get_chat_template())
        for name, value in _SWITCHES:
            if name not in self.source:
                continue
            # What the user has set is not switched. It is only tried here, to name it if it closes the block.
            tried = {'chat_template': template, **set_by_user} if name in set_by_user else {}
            text = generation_prompt({**tried, name: value})
            if not text or text == plain or not (plain.startswith(text) or OPEN_THINK.search(text)):
                continue
            if decided := [other for other in set_by_user if other in _DECIDES_THINKING or other == name]:
                setting = as_word(decided[0], set_by_user[decided[0]])
                self.why_closed = CLOSED_BY_SETTING.format(setting=setting)
                break
            return {name: value}, OPEN_THINK.search(text) is not None
        return NO_SETTINGS, self.frames[False].opens

    def _find_openers(self) -> frozenset[str]:
        """Return a set with the first control token that the template prints in a chat, e.g. {'<|im_start|>'}.

        The begin-of-sequence and end-of-sequence tokens are skipped. The encoder takes each further occurrence of the
        returned token as the beginning of a turn.

        The set is empty if the template prints no control token. It is also empty if the template prints the token more
        than once between a question and its reply, because it then does not always begin a turn.
        """
        ends = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        begin = self.renderer.try_render(self._probe(), prompt=True)
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
            text = self.renderer.try_render(self._probe(turn, user=asked), tools)
            if text[text.rfind(asked) : text.rfind(said)].count(first) > 1:
                return frozenset()
        return frozenset([first])

    def _prints_eos_between_turns(self) -> bool:
        """Return whether the template prints the end-of-sequence token after a reply that is not the last turn."""
        asked, reply = secrets.token_hex(8), secrets.token_hex(8)
        turns: list[Message] = [{'role': 'assistant', 'content': reply}, {'role': 'user', 'content': asked}]
        text = self.renderer.try_render(self._probe(*turns))
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
        before = self.renderer.try_render(self._probe(reply), tools).rstrip()
        text = self.renderer.try_render(self._probe(reply, after), tools)
        if not before or not text.startswith(before):
            return None
        follows = text[len(before) :]
        token = self.text.find_control(follows)
        if token is None or follows[: token.start()].strip() or token[0] == self.tokenizer.bos_token:
            return None
        return token[0]

"""Finds earlier replies in the rendered prompt of a row.

An earlier reply is a reply before the last reply. The prompt is the rendered text before the last reply.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from typing import Any, cast

from utils.encode.chat_renderer import NO_SETTINGS
from utils.encode.common_text import common_length, common_length_of_renderings
from utils.encode.rendered_rows import RenderedRow
from utils.encode.template_properties import Frame, TemplateProperties
from utils.encode.think_tags import ANY_THINK_TAG
from utils.formats.conversation import Message


class EarlierReplies:
    """Finds earlier replies in the prompts that one chat template renders."""

    def __init__(self, template: TemplateProperties, ends: Collection[int]) -> None:
        """Set up the search. `ends` are the ids of the tokens that end a turn."""
        self.template = template
        self.text = template.text
        self.ends = frozenset(ends)

    def find(self, rendered: RenderedRow, index: int) -> list[tuple[int, int]]:
        """Return the spans of the prompt in which an earlier reply is printed.

        `index` is the index of its message in `rendered.chat`. Each span includes the end of turn, if one is found. The
        list is empty if the template does not print the reply, or refuses the chat with a changed reply.

        A reply with tool calls has two spans if the template prints its text only after the results of the calls.
        """
        chat, prompt = rendered.chat, rendered.prompt
        message = chat.messages[index]
        is_call = 'tool_calls' in message
        printed = self._find_printed(rendered, index, _with_random_word(message, in_content=not is_call))
        if printed is None:
            return []
        first, last = printed
        start = min(self._turn_start(rendered, index, first), first)
        frame = self.template.frames[bool(chat.tools)]
        spans = [(start, self._turn_end(prompt, last, frame, is_call=is_call))]
        if is_call and message['content']:
            beside = self._find_printed(rendered, index, _with_random_word(message, in_content=True))
            if beside is not None and beside[0] >= spans[0][1]:
                spans.append((beside[0], self._turn_end(prompt, beside[1], frame, is_call=False)))
        return spans

    def _turn_start(self, rendered: RenderedRow, index: int, first: int) -> int:
        """Return the position in the prompt at which the loss of an earlier reply begins.

        Loss begins just after the header of the turn, for example after '<|assistant|>'. `index` is the index of the
        message, and `first` is the position of its content. Returns the length of the prompt if the header is not
        found.
        """
        chat = rendered.chat
        # Templates may print less of the generation prompt in an earlier turn, for example no think block.
        starts = [self._start_under(rendered, index, first, chat.settings)]
        if chat.settings:
            # The setting is for the last reply. The prompt of an earlier reply may be printed without the setting.
            starts.append(self._start_under(rendered, index, first, NO_SETTINGS))
        return min(starts)

    def _start_under(self, rendered: RenderedRow, index: int, first: int, settings: Mapping[str, Any]) -> int:
        chat, prompt = rendered.chat, rendered.prompt
        before = self.template.renderer.try_render(chat.messages[:index], chat.tools, prompt=True, settings=settings)
        history = self.template.renderer.try_render(chat.messages[:index], chat.tools, settings=settings)
        common = common_length_of_renderings(self.text, before, prompt)
        if before and common >= len(history.rstrip()):
            return common
        # The earlier turns are also printed differently. So use the nearest turn header before the content, if no turn
        # ends between the header and the content.
        markers = self.text.find_controls(before)
        header = ANY_THINK_TAG.split(before[markers[-1].start() if markers else 0 :])[0]
        at = prompt.rfind(header, 0, first) if header.strip() else -1
        start = at + len(header)
        between = self.text.find_controls(prompt[start:first])
        is_own = at >= 0 and not any(match[0] in self.template.openers or self._stops(match[0]) for match in between)
        return start if is_own else len(prompt)

    def _stops(self, marker: str) -> bool:
        """Return whether this control token ends a turn."""
        return self.text.control_ids[marker] in self.ends

    def _find_printed(self, rendered: RenderedRow, index: int, other: Message) -> tuple[int, int] | None:
        """Return the span of the prompt in which the template prints message `index`.

        The chat is rendered again with the message `other` in its place. The span is the text that then differs.
        Returns None if nothing differs, or if the template refuses the changed chat.
        """
        chat, prompt = rendered.chat, rendered.prompt
        messages = list(chat.messages[:-1])
        messages[index] = other
        changed = self.template.renderer.try_render(messages, chat.tools, prompt=True, settings=chat.settings)
        if not changed or changed == prompt:
            return None
        first = common_length(prompt, changed)
        shared = common_length(prompt[first:][::-1], changed[first:][::-1])
        return first, len(prompt) - shared

    def _turn_end(self, prompt: str, last: int, frame: Frame, *, is_call: bool) -> int:
        """Return the position in the prompt just after the end-of-turn token of an earlier reply.

        `last` is the position just after the content of the reply. `is_call` says whether the reply is a tool call. If
        no end of turn is found, the result is `last`, or for a tool call the beginning of the next turn.
        """
        match = self.text.find_control(prompt, last)
        while is_call and match is not None and not self._stops(match[0]):
            if match[0] in self.template.openers:
                return match.start()
            match = self.text.find_control(prompt, match.end())
        if match is not None:
            between = prompt[last : match.start()]
            if is_call or not between.strip() or frame.end.startswith(between):
                return match.end()
        # The end of turn may be plain text without a control token.
        return last + len(frame.end) if prompt.startswith(frame.end, last) else last


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

"""Splits the text that a chat template renders into prompt, reply (up to its end of turn) and rest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from utils.encode.chat_renderer import Chat
from utils.encode.common_text import common_length_of_renderings, repeated_header
from utils.encode.encoded import ADDED_END, FULL_DIFFERS, REASONING_LEFT_OUT, RENDERED_DIFFERENTLY, RowRefused
from utils.encode.row_chats import RowChat
from utils.encode.template_properties import Frame, TemplateProperties
from utils.encode.think_tags import (
    ANY_THINK_TAG,
    BEGINS_CLOSING,
    BEGINS_THINKING,
    CLOSED_THINK,
    EMPTY_BLOCK,
    OPEN_THINK,
    closing_tag,
)
from utils.formats.conversation import Message


@dataclasses.dataclass(kw_only=True, slots=True)
class RenderedRow:
    """A row as text, made with the renderings of the template. The whole text is prompt + reply + rest.

    `reply` is the last reply. If the template would change a text reply, it is as written in the row. If the template
    prints an end-of-turn token, `reply` includes this token, and `rest` is what the template prints after it.
    """

    chat: Chat
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


class RowSplitter:
    """Splits the renderings of one chat template into prompt, reply and rest."""

    def __init__(self, template: TemplateProperties) -> None:
        self.template = template
        self.text = template.text

    def stop_ids(self) -> list[int]:
        """Return the ids of the tokens that end a turn. Text replies and tool calls may end in different tokens."""
        ends = [(frame.end, False) for frame in self.template.frames.values()]
        after_call = self.template.after_call()
        if after_call is not None:
            ends.append((after_call, True))
        found = []
        for end, is_call in ends:
            _, stop, added = self._split_end(end, self.template.frames[is_call], is_call=is_call)
            found.append(self.text.control_ids[stop] if added is None else added)
        return list(dict.fromkeys(found))

    def split(self, made: RowChat, prompt: str, full: str) -> RenderedRow:
        """Return the rendered row. `prompt` and `full` are the renderings of its chat without and with the last reply.

        Raises RowRefused if the reply cannot follow the prompt.
        """
        chat, notes = made.chat, made.notes
        last, frame = chat.messages[-1], self.template.frames[bool(chat.tools)]
        after_prompt = self._reply_and_end(made, prompt, full)
        if full != prompt + after_prompt:
            notes.append(RENDERED_DIFFERENTLY if full.startswith(prompt) else FULL_DIFFERS)

        start = self._find_reply_end(after_prompt, last, frame)
        before, stop, end = self._split_end(after_prompt[start:], frame, is_call='tool_calls' in last)
        if end is not None:
            notes.append(ADDED_END)
        cut = start + len(before) + len(stop)
        reply, rest = after_prompt[:cut], after_prompt[cut:]
        if end is not None and rest:
            # The end-of-turn token is added at the end. So text that the template prints after the turn is removed.
            rest = ''
            if FULL_DIFFERS not in notes:
                notes.append(FULL_DIFFERS)
        if made.reasoning and _unspaced(made.reasoning) not in _unspaced(self.text.unguard(reply)):
            notes.append(REASONING_LEFT_OUT)
        return RenderedRow(chat=chat, prompt=prompt, reply=reply, rest=rest, end=end, guarded=made.guarded, notes=notes)

    def _reply_and_end(self, made: RowChat, prompt: str, full: str) -> str:
        """Return the text after the prompt: the last reply and what follows it.

        If the template would change the content of a reply, the reply is as written in the row. But a reply with tool
        calls is always as the template prints it, apart from its think block.

        Raises RowRefused if the reply cannot follow the prompt.
        """
        chat, has_reasoning = made.chat, made.has_reasoning
        last, frame = chat.messages[-1], self.template.frames[bool(chat.tools)]
        is_call = 'tool_calls' in last
        if has_reasoning and CLOSED_THINK.search(prompt):
            raise RowRefused(self.template.why_closed)

        after_prompt = self._after_prompt(prompt, full, frame)
        if after_prompt is None and is_call:
            raise RowRefused('the chat template does not print the tool call after the generation prompt')
        if after_prompt is None:
            return self._as_written(prompt, _content(last), frame, has_reasoning=has_reasoning)

        if made.thought:
            empty = EMPTY_BLOCK.match(after_prompt)
            after_prompt = made.thought + (after_prompt[empty.end() :] if empty else after_prompt)
        if OPEN_THINK.search(prompt) and not BEGINS_CLOSING.match(after_prompt):
            after_prompt = self._continue_block(prompt, after_prompt, has_reasoning=has_reasoning)
        if is_call or _is_unchanged(made, after_prompt):
            return after_prompt
        return self._as_written(prompt, _content(last), frame, has_reasoning=has_reasoning)

    def _after_prompt(self, prompt: str, full: str, frame: Frame) -> str | None:
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
            return after_prompt[repeated_header(self.text, prompt_only, after_prompt) :]
        common = common_length_of_renderings(self.text, prompt, full)
        left = prompt[common:]
        if ANY_THINK_TAG.search(left) or not self.text.without_control(left).strip():
            return full[common:]
        anchor = prompt[self.text.last_control(prompt)[1] :]
        at = full.rfind(anchor) if anchor.strip() else -1
        return full[at + len(anchor) :] if at >= 0 else None

    def _continue_block(self, prompt: str, after_prompt: str, *, has_reasoning: bool) -> str:
        """Return `after_prompt`, changed so that it can follow a prompt that ends in an opening think tag.

        An opening tag at the start is removed: '<think>a</think>b' -> 'a</think>b'
        Without such a tag, if the reply has no reasoning, a closing tag is added: 'b' -> '</think>b' (with line ends)
        """
        own = BEGINS_THINKING.match(after_prompt)
        if own:
            return after_prompt[own.end() :]
        return after_prompt if has_reasoning else self._closing(prompt) + after_prompt

    def _closing(self, prompt: str) -> str:
        """Return the closing tag of the think block that the prompt opens.

        A tag like </think> gets line ends around it. A tag like [/THINK] gets none.
        """
        opened = OPEN_THINK.search(prompt)
        assert opened is not None, 'the prompt opens a think block'
        if not opened[1].startswith('<') or opened[1].startswith('<|'):
            return closing_tag(opened[1])
        line = '' if prompt.endswith('\n') else '\n'
        return f'{line}{closing_tag(opened[1])}\n\n'

    def _as_written(self, prompt: str, content: str, frame: Frame, *, has_reasoning: bool) -> str:
        """Return the text to train on after the prompt, with the content of the reply as it is in the row.

        The caller uses this text if the template would change the reply. The text has three parts: what the template
        usually prints before a reply, the content, and the end of turn. No think tag is printed twice: the opening tag
        of the content is removed if the prompt ends in one.
        """
        lead = frame.lead
        opens = OPEN_THINK.search(prompt)
        if has_reasoning:
            own = BEGINS_THINKING.match(content)
            lead = '' if ANY_THINK_TAG.search(lead) else lead
            content = content[own.end() :] if opens and own else content
        elif opens and not BEGINS_CLOSING.match(lead):
            lead = self._closing(prompt)
        return lead + content + frame.end

    def _find_reply_end(self, after_prompt: str, last: Message, frame: Frame) -> int:
        """Return the position in `after_prompt` just after the content of the reply, or 0 if the content is not found.

        `after_prompt` has the reply as the template prints it, and the end of turn. If the reply has tool calls, the
        result is the position just after the name of its last call.
        """
        names = [str(call.get('function', call).get('name') or '') for call in last.get('tool_calls', ())]
        if names:
            return max(after_prompt.rfind(name) + len(name) for name in names)
        if after_prompt.endswith(frame.end):
            return len(after_prompt) - len(frame.end)
        content = _content(last).strip()
        at = after_prompt.rfind(content) if content else -1
        return at + len(content) if at >= 0 else 0

    def _split_end(self, end: str, frame: Frame, *, is_call: bool) -> tuple[str, str, int | None]:
        """Return (text before the end-of-turn token, this token, None). `end` is the text after a reply.

        If `end` has no end-of-turn token, return (`end`, '', id of an end-of-turn token that the caller must add). If
        the template prints the header of a next turn in `end`, only the text before this header counts as `end`.
        """
        end_of_reply = self._end_of_reply(self.text.find_controls(frame.end))
        stops = {self.template.tokenizer.eos_token, *([] if end_of_reply is None else [end_of_reply[0]])}
        markers = self.text.find_controls(end)
        opener = next((match for match in markers if match[0] in self.template.openers - stops), None)
        if opener is not None:
            # Some templates print the header of a next turn, or an instruction, after the last turn.
            end = end[: opener.start()]
            markers = markers[: markers.index(opener)]
        found = self._end_of_call(end, markers, stops) if is_call else self._end_of_reply(markers)
        if found is not None:
            return end[: found.start()], found[0], None
        following = self.template.next_token[is_call]
        return end, '', self.template.tokenizer.eos_token_id if following is None else self.text.control_ids[following]

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
        reply, and `markers` has this token, the result is its match. Otherwise it is the first marker.
        """
        eos = self.template.tokenizer.eos_token
        # Some templates, such as Cohere's, print another control token before the end-of-sequence token.
        end = next((match for match in markers if match[0] == eos), None) if self.template.eos_ends_turns else None
        return end or next(iter(markers), None)


def _content(message: Message) -> str:
    """Return the content of a message, or '' if it is a list of images and texts, or null."""
    return message['content'] if isinstance(message['content'], str) else ''


def _unspaced(text: str) -> str:
    return ''.join(text.split())


def _is_unchanged(made: RowChat, after_prompt: str) -> bool:
    """Return whether `after_prompt`, the text that the template prints after the prompt, has the reply unchanged.

    If the reply has reasoning, think tags and the spaces around them may differ. Reasoning that is printed after a
    closed think block, not inside it, counts as changed. The reply has no tool calls.
    """
    reply = made.chat.messages[-1]
    content = _content(reply)
    reasoning = str(reply.get(made.key or '') or '')
    if not (made.has_reasoning or reasoning):
        return content in after_prompt
    pieces = [piece.strip() for piece in (*ANY_THINK_TAG.split(content), reasoning)]
    places = [after_prompt.find(piece) for piece in pieces if piece]
    # The reasoning would be trained after the closed think block, not inside it.
    begins_closed = BEGINS_CLOSING.match(after_prompt) or EMPTY_BLOCK.match(after_prompt)
    return -1 not in places and not (made.has_reasoning and begins_closed)

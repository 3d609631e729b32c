"""Token ids of conversations under the tokenizer's own chat template (template `auto`).

Everything is found by rendering: the prompt is the rendering up to the reply with the generation prompt, the end of
a turn is what the template prints after a reply. What it prints between the two, a channel's name or an empty think
block, is part of the prompt, so that it carries no loss. Where no token merges across the reply's borders and the data
spells no control token, the ids equal `tokenizer.apply_chat_template` exactly; every other row is noted.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Sequence
from typing import Any, cast

from utils.encoder import Encoder, TemplateEncoder
from utils.errors import ConfigError, told
from utils.native.image_readers import Images
from utils.preprocess import (
    ADDED_END,
    AUTO,
    CONTROL_TOKENS,
    MERGED_BOUNDARY,
    RENDERED_DIFFERENTLY,
    TEMPLATE_MAPPING,
    TOOL_CALL_AS_TEXT,
    TOOLS_IGNORED,
    Encoded,
    LossScope,
    Message,
    Row,
    RowRefused,
)
from utils.rounds import EndOfTurn, add_earlier
from utils.text_tokenizer import map_strings

_OPENS_THINKING = re.compile(r'<(?:\w+:)?think>')
_CLOSES_THINKING = re.compile(r'</(?:\w+:)?think>')
_PROMPT_THINKS = re.compile(r'<((?:\w+:)?think)>\s*$')
_REPLY_THINKS = re.compile(r'\s*<(?:\w+:)?think>\s*')

# Ends of prompts whose ids are remembered; templates have few, but one may end in the question itself.
_TAILS_KEPT = 4096


@dataclasses.dataclass(kw_only=True, slots=True)
class _Parts:
    """A row as text: its prompt and reply, and which of them hold guarded data."""

    prompt: str
    reply: str
    prompt_guarded: bool
    reply_guarded: bool
    notes: list[str]


class AutoEncoder(Encoder):
    """Encodes with the tokenizer's chat template. Loss covers the last reply, or each, and its end-of-turn token."""

    name = AUTO

    def __init__(self, tokenizer: Any, *, system: str | None, max_length: int, images: Images | None = None) -> None:
        super().__init__(tokenizer, max_length=max_length, images=images)
        if not tokenizer.chat_template:
            raise ConfigError(
                'template auto needs a chat template, and this tokenizer has none. '
                f'Name one with --template_type: {", ".join(name for name in TEMPLATE_MAPPING if name != AUTO)}.'
            )
        self.system = system
        self._lead, self._end = self._find_frame()
        # What of the lead comes before its think block: a reply that reasons follows it.
        self._opening = self._lead[: match.start()] if (match := _OPENS_THINKING.search(self._lead)) else ''
        self._control = frozenset(self.text.special_ids.values())
        self._end_ids, self._end_trained = self._end_of_turn(self._end)
        self.stop_ids = [i for i in self._end_ids[: self._end_trained] if i in self._control]
        self._tails: dict[str, list[int]] = {}
        self.says_tools = self._prints(tools=True)
        self.says_tool_calls = self._prints(tools=False)

    def _apply(self, chats: list[Any], tools: Sequence[Any] | None, prompt: bool) -> Any:
        from jinja2.exceptions import TemplateError

        try:
            render = self.tokenizer.apply_chat_template
            return render(chats, tools=tools or None, add_generation_prompt=prompt, tokenize=False)
        except TemplateError as error:
            raise RowRefused(f'the chat template refuses it: {error}') from error
        except Exception as error:  # a template is someone's program, and fails as programs do
            raise RowRefused(f'the chat template fails: {told(error)}') from error

    def _render(self, messages: Sequence[Message], *, tools: Sequence[Any] | None, prompt: bool) -> str:
        return str(self._apply(list(messages), tools, prompt))

    def _render_all(
        self, chats: Sequence[tuple[Sequence[Message], Sequence[Any] | None]], *, prompt: bool
    ) -> list[str]:
        """Return the rendering of each (messages, tools); those without tools in one call, which is quicker."""
        plain = [list(messages) for messages, tools in chats if not tools]
        texts = iter(self._apply(plain, None, prompt) if plain else [])
        return [self._render(m, tools=tools, prompt=prompt) if tools else next(texts) for m, tools in chats]

    def _find_frame(self) -> tuple[str, str]:
        """Return what the template prints before a reply, the generation prompt left off, and after it.

        A generation prompt that opens a think block which no reply closes is closed here. Raises ConfigError where
        the template cannot serve at all.
        """
        reply = secrets.token_hex(8)
        messages: list[Message] = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': reply}]
        if self.system:
            messages.insert(0, {'role': 'system', 'content': self.system})
        try:
            prompt = self._render(messages[:-1], tools=None, prompt=True)
            text = self._render(messages, tools=None, prompt=False)
        except RowRefused as error:
            hint = 'Leave --system out, or choose' if self.system else 'Choose'
            raise ConfigError(
                f'the chat template of this tokenizer fails on a one-turn chat: {error}. {hint} a --template_type.'
            ) from error
        if reply not in text:
            raise ConfigError(
                "the chat template of this tokenizer does not print the assistant's reply, so nothing could be "
                'learnt. Choose a --template_type.'
            )
        start = text.rindex(reply)
        lead = text[len(prompt) : start] if text.startswith(prompt) else ''
        if (opened := _PROMPT_THINKS.search(prompt)) and not _CLOSES_THINKING.search(lead):
            lead = f'\n</{opened[1]}>\n\n'
        return lead, text[start + len(reply) :]

    def _end_of_turn(self, end: str) -> tuple[list[int], int]:
        """Return the ids after a reply and how many of them are trained: up to the first control token."""
        ids = self.text.ids([end])[0] if end else []
        for index, token in enumerate(ids):
            if token in self._control:
                return ids, index + 1
        if end.strip():
            return ids, len(ids)
        # A template that prints no end at all (GLM-4): without one the model would never learn to stop.
        return [self.tokenizer.eos_token_id], 1

    def _prints(self, *, tools: bool) -> bool:
        """Return whether the template prints tools, or tool calls: a made-up name must come out."""
        name = f'probe_{secrets.token_hex(4)}'
        call = {'type': 'function', 'function': {'name': name, 'arguments': {'a': '1'}}}
        messages: list[Message] = [{'role': 'user', 'content': 'a'}]
        if not tools:
            messages.append({'role': 'assistant', 'content': '', 'tool_calls': [call]})
        parameters = {'type': 'object', 'properties': {'a': {'type': 'string', 'description': 'a'}}}
        tool = {'type': 'function', 'function': {'name': name, 'description': 'a', 'parameters': parameters}}
        try:
            return name in self._render(messages, tools=[tool] if tools else None, prompt=tools)
        except (RowRefused, TypeError, ValueError):
            return False

    def spoken(self, message: Message) -> Message:
        """Return the message in the form that the template can say; images among text as a list of items."""
        if self.text.image in message['content']:
            texts = message['content'].split(self.text.image)
            items = [item for text in texts for item in ({'type': 'image'}, {'type': 'text', 'text': text})][1:]
            shown = [item for item in items if item.get('text') != '']
            return cast(Message, {**message, 'content': shown})
        if 'tool_calls' not in message:
            return message
        if self.says_tool_calls:
            return {**message, 'content': ''}
        return {'role': message['role'], 'content': message['content']}

    def _prepare(self, row: Row, context: Sequence[Message]) -> tuple[list[Message], list[Any] | None, bool, list[str]]:
        """Return what is rendered for the prompt, whether its data is guarded, and notes."""
        messages = [self.spoken(message) for message in context]
        if self.system is not None and (not messages or messages[0]['role'] != 'system'):
            messages.insert(0, {'role': 'system', 'content': self.system})
        tools, notes = row.tools, []
        if tools and not self.says_tools:
            tools, notes = None, [TOOLS_IGNORED]
        if not self.says_tool_calls and any('tool_calls' in message for message in row.messages):
            notes.append(TOOL_CALL_AS_TEXT)
        guarded = self._spells_control(messages, tools)
        if guarded:
            messages, tools = map_strings(messages, self.text.guard), map_strings(tools, self.text.guard)
        return messages, tools, guarded, notes

    def _parts(self, rows: Sequence[Row]) -> list[_Parts]:
        prepared = [self._prepare(row, row.messages[:-1]) for row in rows]
        lasts = [self.spoken(row.messages[-1]) for row in rows]
        guarded = [self._spells_control([last]) for last in lasts]
        lasts = [map_strings(last, self.text.guard) if g else last for last, g in zip(lasts, guarded, strict=True)]
        prompts = self._render_all([(messages, tools) for messages, tools, _, _ in prepared], prompt=True)
        wholes = [([*messages, last], tools) for (messages, tools, _, _), last in zip(prepared, lasts, strict=True)]
        rendered = self._render_all(wholes, prompt=False)
        return [
            self._part(prompt, full, last, prompt_guarded=p[2], reply_guarded=g, notes=p[3])
            for prompt, full, last, p, g in zip(prompts, rendered, lasts, prepared, guarded, strict=True)
        ]

    def _part(
        self, prompt: str, full: str, last: Message, *, prompt_guarded: bool, reply_guarded: bool, notes: list[str]
    ) -> _Parts:
        end = self._end
        if 'tool_calls' in last:
            if not (full.startswith(prompt) and full.endswith(end)):
                raise RowRefused('the chat template prints the tool call apart from the generation prompt')
            if full.startswith(prompt + self._lead):
                prompt += self._lead
            else:  # a header that names whom the turn is for: which one is the model's choice
                self.keeps_lead = False
            reply = full[len(prompt) : len(full) - len(end)]
        else:
            prompt, reply = self._joined(prompt, last['content'])
        if prompt_guarded or reply_guarded:
            notes.append(CONTROL_TOKENS)
        if full != prompt + reply + end:
            notes.append(RENDERED_DIFFERENTLY)
        return _Parts(
            prompt=prompt, reply=reply, prompt_guarded=prompt_guarded, reply_guarded=reply_guarded, notes=notes
        )

    def _joined(self, prompt: str, reply: str) -> tuple[str, str]:
        """Return prompt and reply as they meet; the reply's think block replaces the lead's or goes on in it."""
        if not (_CLOSES_THINKING.search(self._lead) and _CLOSES_THINKING.search(self.text.unguard(reply))):
            return prompt + self._lead, reply
        self.keeps_lead = False
        own = _REPLY_THINKS.match(reply) if _PROMPT_THINKS.search(prompt) else None
        return prompt + self._opening, reply[own.end() :] if own else reply

    def _prompt_ids(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        plain = iter(self.text.ids([text for text, guarded in texts if not guarded]))
        return [self.text.guarded_ids(text) if guarded else next(plain) for text, guarded in texts]

    def _encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        prepared = [self._prepare(row, row.messages) for row in rows]
        texts = self._render_all([(messages, tools) for messages, tools, _, _ in prepared], prompt=True)
        lead = self._lead if self.keeps_lead else self._opening
        return self._prompt_ids([(text + lead, p[2]) for text, p in zip(texts, prepared, strict=True)])

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        parts = self._parts(rows)
        plain = [part for part in parts if not (part.prompt_guarded or part.reply_guarded)]
        whole = iter(self.text.ids([part.prompt + part.reply + self._end for part in plain]))
        tails = self._learn_tails([part.prompt for part in plain])
        encoded = []
        for part in parts:
            ids = None if part.prompt_guarded or part.reply_guarded else next(whole)
            length = self._prompt_length(part.prompt, ids, tails) if ids is not None else 0
            prompt = ids[:length] if ids and length else self._prompt_ids([(part.prompt, part.prompt_guarded)])[0]
            encoded.append(self._assemble(part, prompt, ids))
        if self.loss_scope == 'all_rounds':
            end = EndOfTurn(self._end, self._end_ids, self._end_trained)
            add_earlier(rows, encoded, self._prepare, self._render_all, self._prompt_ids, lead=self._lead, end=end)
        return encoded

    def _learn_tails(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        """Return the ids of the ends of prompts, from their last special token on; those not met before are new."""
        if len(self._tails) > _TAILS_KEPT:
            self._tails = {}  # another thread may go on with the old one
        known = self._tails
        tails = list({prompt[self.text.last_special(prompt)[1] :] for prompt in prompts} - known.keys())
        known.update(zip(tails, self.text.ids(tails), strict=True))
        return known

    def _prompt_length(self, prompt: str, whole: list[int], tails: dict[str, list[int]]) -> int:
        """Return how many ids of `whole` are those of the prompt alone; 0 where that is not certain.

        Tokenizers cut text at special tokens before anything else, so ids up to the last one in the prompt cannot
        depend on what follows. What stands after it, mostly a short `assistant`, is compared with its own ids.
        """
        count, start = self.text.last_special(prompt)
        if count == 0:
            return 0
        position = -1
        for _ in range(count):
            position = next((i for i in range(position + 1, len(whole)) if whole[i] in self._control), len(whole))
        tail = tails[prompt[start:]]
        end = position + len(tail)
        return end if whole[position:end] == tail else 0

    def _assemble(self, part: _Parts, prompt: list[int], whole: list[int] | None) -> Encoded:
        """Return the row from its text tokenised whole where that keeps prompt and end apart, else piece by piece."""
        end, notes = self._end_ids, part.notes
        if not self._end:
            whole, notes = whole and whole + end, [*notes, ADDED_END]
        if whole is not None and whole[: len(prompt)] == prompt and whole[-len(end) :] == end:
            ids = whole
        else:
            reply = self.text.guarded_ids(part.reply) if part.reply_guarded else self.text.ids([part.reply])[0]
            ids = prompt + reply + end
            notes = [*notes, MERGED_BOUNDARY] if whole is not None and ids != whole else notes
        return Encoded(
            input_ids=ids,
            trained=(len(prompt), len(ids) - len(end) + self._end_trained),
            prompt_length=len(prompt),
            notes=notes,
        )


def make_encoder(
    tokenizer: Any,
    *,
    template_type: str,
    system: str,
    system_typed: bool,
    max_length: int,
    loss_scope: LossScope = 'last_round',
    images: Images | None = None,
) -> Encoder:
    """Return the encoder of a template. With auto, `system` counts only if the user typed it."""
    template = TEMPLATE_MAPPING[template_type]
    options: dict[str, Any] = {'max_length': max_length, 'images': images}
    encoder: Encoder = (
        AutoEncoder(tokenizer, system=system if system_typed else None, **options) if template is None
        else TemplateEncoder(tokenizer, template, name=template_type, system=system, **options)
    )  # fmt: skip
    encoder.loss_scope = loss_scope
    return encoder

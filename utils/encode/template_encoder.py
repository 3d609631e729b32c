"""The encoder for registered templates."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from utils.base.errors import ConfigError
from utils.encode.encoded import (
    CONTROL_TOKENS,
    SYSTEM_IGNORED,
    TOOLS_IGNORED,
    Encoded,
    without_last,
)
from utils.encode.encoder import Encoder
from utils.formats.conversation import Message, Row
from utils.loading.image_processors import Images
from utils.preprocess import Piece, Template


class _Reply(str):
    """The text of a reply that carries loss and is not the last reply of its row. It is tokenised separately."""


class TemplateEncoder(Encoder):
    """Encodes rows with an entry of TEMPLATE_MAPPING.

    Loss covers the last reply and the suffix of the template, unless the row marks this reply to carry no loss. Loss
    also covers the earlier replies for which `carries_loss` returns True. The template prints its `chat_sep` after an
    earlier reply. If generation stops at a token of `chat_sep`, loss also covers `chat_sep` up to this token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        *,
        name: str,
        system: str,
        max_length: int,
        images: Images | None = None,
    ) -> None:
        texts = (*template.prefix, *template.prompt, *(template.chat_sep or ()), *template.suffix)
        template_text = '\n'.join(text for text in texts if isinstance(text, str))
        super().__init__(tokenizer, max_length=max_length, images=images, template_text=template_text)
        self.template = template
        self.name = name
        self.system = system
        self._suffix = self._ids(self._fill(template.suffix), guarded=False)
        control = self.text.control_set
        self.stop_ids = [i for i in self._suffix if i in control]
        separator = self._ids(self._fill(template.chat_sep or ()), guarded=False)
        stops = (n for n, i in enumerate(separator, start=1) if i in (*self.stop_ids, tokenizer.eos_token_id))
        self._round_end = next(stops, 0)

    def _fill(self, pieces: Iterable[Piece], **data: str) -> list[str | list[int]]:
        """Return the pieces of a template with {{SYSTEM}}, {{QUERY}} and {{ROUND}} replaced by `data`.

        Token names, such as eos_token_id, become ids.
        """

        def fill(text: str) -> str:
            return re.sub(r'\{\{(SYSTEM|QUERY|ROUND)\}\}', lambda m: data[m[1]], text)

        return [fill(p) if isinstance(p, str) else [self.token_id(part) for part in p] for p in pieces]

    def token_id(self, part: int | str) -> int:
        """Return the token id for a part of a template piece. The part is an id, or the name of a tokenizer attribute.

        Raises ConfigError if the tokenizer has no value for this attribute.
        """
        if isinstance(part, int):
            return part
        value = getattr(self.tokenizer, part, None)
        if not isinstance(value, int):
            raise ConfigError(
                f"template '{self.name}' needs {part}, which the tokenizer does not have. "
                "Choose another --template_type, or set the token in the model's tokenizer_config.json."
            )
        return value

    def _context(self, row: Row) -> tuple[list[str | list[int]], bool, list[str]]:
        """Return (pieces, is_guarded, notes) for a prompt. `row` has the messages of the prompt, not the last reply.

        A piece is a text or a list of token ids. `notes` says what is unusual about the row.

        `is_guarded` is True if a message contains the text of a control token, such as <|im_end|>. It is also True if
        `self.system` contains such a text and the template prints `self.system`. If `is_guarded` is True,
        TextTokenizer.guard has replaced the control tokens of messages and system text by random texts. Think tags in
        replies do not count, and are not replaced.

        Raises ConfigError if the template has no form for the turns of the row.
        """
        system = self.system
        turns = row.messages
        guarded = self.text.spells_control(turns) or self._system_spells_control(turns)
        notes = [CONTROL_TOKENS] if guarded else []

        def guard(text: str, *, reply: bool = False) -> str:
            return self.text.guard(text, reply=reply) if guarded else text

        if turns and turns[0]['role'] == 'system':
            system = turns[0]['content']
            turns = turns[1:]
            notes += [] if self.template.has_system else [SYSTEM_IGNORED]
        if row.tools:
            notes.append(TOOLS_IGNORED)
        self._check_roles(row, turns)
        if len(turns) > 1 and self.template.chat_sep is None:
            raise ConfigError(
                f"{row.origin}: the row has history, and template '{self.name}' is single-turn (it has no chat_sep). "
                'Choose a chat template, e.g. --template_type chatml or default.'
            )
        pieces = self._fill(self.template.prefix, SYSTEM=guard(system or ''))
        for index, turn in enumerate(turns):
            if turn['role'] == 'user':
                query = guard(turn['content']).replace(self.text.image, self.images.mark if self.images else '')
                pieces += self._fill(self.template.prompt, QUERY=query, ROUND=str(index // 2 + 1))
            else:
                reply = guard(turn['content'], reply=True)
                pieces += [_Reply(reply) if self.carries_loss(turn, row) else reply]
                pieces += self._fill(self.template.chat_sep or ())
        joined: list[str | list[int]] = []
        for piece in pieces:
            if joined and type(piece) is str and type(joined[-1]) is str:
                joined[-1] += piece
            else:
                joined.append(piece)
        return joined, guarded, notes

    def _system_spells_control(self, turns: Sequence[Message]) -> bool:
        """Return True if the template prints `self.system` before `turns`, and `self.system` has a control token."""
        is_used = self.template.has_system and not (turns and turns[0]['role'] == 'system')
        return is_used and self.text.has_control(self.system or '')

    def _check_roles(self, row: Row, turns: Sequence[Message]) -> None:
        for index, turn in enumerate(turns):
            expected = 'user' if index % 2 == 0 else 'assistant'
            role = 'tool call' if 'tool_calls' in turn else turn['role']
            if role != expected:
                raise ConfigError(
                    f'{row.origin}: turn {index + 1} (system text not counted) is a {role} turn, and template '
                    f"'{self.name}' has only {expected} turns there. Choose --template_type auto if the model's own "
                    'template has such turns.'
                )

    def _ids(self, pieces: Sequence[str | list[int]], *, guarded: bool) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, list):
                ids += piece
            elif piece:
                ids += self.text.guarded_ids(piece) if guarded else self.text.ids([piece])[0]
        return ids

    def _encode_contexts(
        self, contexts: Sequence[tuple[list[str | list[int]], bool, list[str]]]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return (ids, spans) for each prompt. `contexts` has the return value of `_context` for each prompt.

        A prompt has all turns before the last reply, so it can contain earlier replies. `spans` has one (start, end) in
        `ids` for each earlier reply that carries loss.
        """
        plain = [p for pieces, guarded, _ in contexts if not guarded for p in pieces if isinstance(p, str) and p]
        plain_ids = iter(self.text.ids(plain))
        encoded = []
        for pieces, guarded, _ in contexts:
            ids: list[int] = []
            spans = []
            for piece in pieces:
                start = len(ids)
                if guarded or isinstance(piece, list):
                    ids += self._ids([piece], guarded=True)
                elif piece:
                    ids += next(plain_ids)
                if isinstance(piece, _Reply):
                    spans.append((start, len(ids) + self._round_end))
            encoded.append((ids, spans))
        return encoded

    def _encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        contexts = [self._context(dataclasses.replace(row, messages=row.messages[:-1])) for row in rows]
        return [ids for ids, _ in self._encode_contexts(contexts)]

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        for row in rows:
            self._check_roles(row, [turn for turn in row.messages if turn['role'] != 'system'])
        contexts = [self._context(dataclasses.replace(row, messages=row.messages[:-1])) for row in rows]
        prompts = self._encode_contexts(contexts)
        replies = self.text.ids([row.messages[-1]['content'] for row in rows], inert=True)
        encoded = [
            Encoded(
                input_ids=prompt + reply + self._suffix,
                trained=(len(prompt), len(prompt) + len(reply) + len(self._suffix)),
                prompt_length=len(prompt),
                notes=self._notes(context[2], row),
                earlier=earlier,
                pieces=(*self._texts(context[0]), row.messages[-1]['content'], ''),
            )
            for row, context, (prompt, earlier), reply in zip(rows, contexts, prompts, replies, strict=True)
        ]
        return [
            without_last(ids) if row.messages[-1].get('loss') is False else ids
            for row, ids in zip(rows, encoded, strict=True)
        ]

    def _texts(self, pieces: Sequence[str | list[int]]) -> list[str]:
        """Return the pieces of a prompt as texts. Each reply that carries loss is an item of its own.

        All other neighbouring pieces are joined to one item: 'a', 'b', _Reply('c'), 'd' become 'ab', 'c', 'd'.
        """
        texts = ['']
        for piece in pieces:
            if isinstance(piece, _Reply):
                texts += [self.text.unguard(piece), '']
            elif isinstance(piece, str):
                texts[-1] += self.text.unguard(piece)
            else:
                texts[-1] += self.tokenizer.decode(piece)
        return texts

    def _notes(self, notes: list[str], row: Row) -> list[str]:
        if CONTROL_TOKENS not in notes and self.text.has_control(row.messages[-1]['content'], reply=True):
            return [*notes, CONTROL_TOKENS]
        return notes

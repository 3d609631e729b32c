"""Token ids of conversations under a registered template, and the tokenizer work that every template shares."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.encode.guarded_tokenizer import TextTokenizer
from utils.encode.image_slots import FoundImages, fill_slots, new_places, open_images_of
from utils.loading.image_processors import Images
from utils.preprocess import (
    CONTROL_TOKENS,
    SYSTEM_IGNORED,
    TAGS_AS_TEXT,
    TEMPLATE_MAPPING,
    TOOLS_IGNORED,
    Encoded,
    LossScope,
    Message,
    Piece,
    Row,
    Template,
    cut_front,
    without_last,
)


def cut_row(row: Encoded, max_length: int, tokenizer: Any) -> Encoded:
    """Return the row with its last `max_length` ids, and how much of its text that cost."""
    cut = cut_front(row, max_length)
    lost = len(row.input_ids) - len(cut.input_ids)
    if lost:
        text = tokenizer.decode(row.input_ids[:lost], clean_up_tokenization_spaces=False)
        cut.cut = min(len(text), sum(map(len, row.pieces)))
    return cut


class Encoder:
    """What both kinds of template share: rows in, ids out, one tokenizer call per batch."""

    name: str
    # The system text of rows that bring none; None: the template's own.
    system: str | None
    loss_scope: LossScope = 'last_round'
    # Ids at which generation stops, beside the tokenizer's own end of sequence.
    stop_ids: list[int]
    # Whether a reply that is not known is asked for with the template's thinking switch; a known one decides itself.
    asks_to_think = False
    # How many ids the model embeds, where its tokenizer has more: rows that hold another are refused.
    embedding: int | None = None

    def __init__(self, tokenizer: Any, *, max_length: int, images: Images | None = None, printed: str = '') -> None:
        """`printed` is the text of the template."""
        self.tokenizer = tokenizer
        self.text = TextTokenizer(tokenizer, printed=printed)
        self.max_length = max_length
        self.images = images

    @property
    def switch(self) -> str | None:
        """Return the setting with which the template renders replies that reason, as name=value; None where none is."""
        return None

    def identity(self) -> dict[str, Any]:
        """Return what, beside the tokenizer, decides which ids a row becomes."""
        # A chat template that can ask for the date may print another prompt tomorrow.
        today = time.strftime('%Y-%m-%d') if 'strftime_now' in str(self.tokenizer.chat_template) else None
        template = repr(TEMPLATE_MAPPING[self.name])
        return {'template': template, 'system': self.system, 'scope': self.loss_scope, 'max_length': self.max_length,
                'today': today, 'embedding': self.embedding}  # fmt: skip

    def embed(self, embedding: int | None) -> None:
        """Take it that the model embeds so many ids alone; raises ConfigError where no end of turn is among them."""
        self.embedding = embedding
        beyond = [end for end in self.stop_ids if embedding is not None and end >= embedding]
        if not beyond:
            return
        named = ', '.join(f'{self.tokenizer.decode([end])!r} (id {end})' for end in beyond)
        self.stop_ids = [end for end in self.stop_ids if end not in beyond]
        if not self.stop_ids:
            raise ConfigError(
                f"template '{self.name}': a reply ends in {named}, and the model embeds {embedding} tokens, this one "
                'not among them. Choose another --template_type, or take model and tokenizer from the same place.'
            )
        logger.warning(
            f"template '{self.name}': {named} can end a turn and is beyond the {embedding} tokens that the model "
            'embeds: answers never stop there, and rows that hold it are refused'
        )

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Return each row's ids and trained span, cut to max_length from the front."""
        opened = [self.open_images(row) for row in rows]
        encoded = self._encode([row for row, _ in opened])
        return [self._finish(row, *filled) for row, filled in zip(encoded, opened, strict=True)]

    def encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return what inference feeds the model: each row's ids without its last reply, cut to max_length."""
        opened = [self.open_images(dataclasses.replace(row, messages=row.messages[:-1])) for row in rows]
        shown = [
            dataclasses.replace(context, messages=[*context.messages, row.messages[-1]])
            for (context, _), row in zip(opened, rows, strict=True)
        ]
        prompts = self._encode_prompts(shown)
        prompts = [self._fill_slots(ids, found) for ids, (_, found) in zip(prompts, opened, strict=True)]
        return [ids[-self.max_length :] if self.max_length > 0 else ids for ids in prompts]

    def image_paths(self, row: Row) -> tuple[str, ...]:
        """Return the files of a row's images, in the order of their places in its ids."""
        return tuple(path for path, _ in self.open_images(row)[1])

    def open_images(self, row: Row) -> tuple[Row, FoundImages]:
        """Return a row with a stand-in for each image in its text, and the files with the slots of each."""
        return open_images_of(row, self.images, stand_in=self.text.image)

    def _fill_slots(self, ids: list[int], found: FoundImages) -> list[int]:
        return fill_slots(ids, found, self.images.slot, self.max_length) if self.images and found else ids

    def _finish(self, row: Encoded, source: Row, found: FoundImages) -> Encoded:
        """Return the row with its images' slots, cut to max_length from the front."""
        if self.images is None and any('</img>' in turn['content'] for turn in source.messages):
            row.notes.append(TAGS_AS_TEXT)
        if found:
            filled = self._fill_slots(row.input_ids, found)
            assert self.images is not None, 'it found them'
            places = new_places(row.input_ids, found, self.images.slot)
            row = dataclasses.replace(
                row,
                input_ids=filled,
                trained=(places[row.trained[0]], places[row.trained[1]]),
                prompt_length=places[row.prompt_length],
                earlier=[(places[start], places[end]) for start, end in row.earlier],
                images=tuple(path for path, _ in found),
            )
        return cut_row(row, self.max_length, self.tokenizer)

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        raise NotImplementedError

    def _encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return the ids of each row's prompt; the last message is the reply, which may be empty."""
        raise NotImplementedError

    def carries_loss(self, reply: Message) -> bool:
        """Return whether an earlier turn carries loss: as the row marks it, else by the scope; never an empty one."""
        says_something = reply['content'].strip() or reply.keys() & {'tool_calls', 'reasoning'}
        is_reply = reply['role'] == 'assistant' and bool(says_something)
        return is_reply and reply.get('loss', self.loss_scope == 'all_rounds')

    def _spells_control(self, messages: Iterable[Message], tools: Sequence[Any] | None = None) -> bool:
        """Return whether any text of these messages or tools spells a control token, think tags of replies aside."""
        for message in messages:
            is_reply = message['role'] == 'assistant'
            for key, value in message.items():
                if key != 'role' and self.text.has_control(str(value or ''), reply=is_reply):
                    return True
        return bool(tools) and self.text.has_control(str(tools))


class _Reply(str):
    """An earlier reply that carries loss: tokenised by itself, as the last one is, never joined to its neighbours."""


class TemplateEncoder(Encoder):
    """Encodes with an entry of TEMPLATE_MAPPING. Loss covers the last reply and the suffix.

    With all rounds, also each earlier reply, with what follows it in chat_sep up to a token at which generation stops.
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
        printed = '\n'.join(text for text in texts if isinstance(text, str))
        super().__init__(tokenizer, max_length=max_length, images=images, printed=printed)
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
        """Return the pieces with placeholders filled in one pass and attribute names read from the tokenizer."""

        def fill(text: str) -> str:
            return re.sub(r'\{\{(SYSTEM|QUERY|ROUND)\}\}', lambda m: data[m[1]], text)

        return [fill(p) if isinstance(p, str) else [self.token_id(part) for part in p] for p in pieces]

    def token_id(self, part: int | str) -> int:
        if isinstance(part, int):
            return part
        value = getattr(self.tokenizer, part)
        if value is None:
            raise ConfigError(
                f"template '{self.name}' needs {part}, which the tokenizer does not have. "
                "Choose another template, or set the token in the model's tokenizer_config.json."
            )
        return int(value)

    def _context(self, row: Row) -> tuple[list[str | list[int]], bool, list[str]]:
        """Return the prompt's pieces, neighbouring texts joined, whether data is guarded in them, and notes."""
        guarded = self._spells_control(row.messages)
        system, turns = self.system, row.messages
        notes = [CONTROL_TOKENS] if guarded else []

        def say(text: str, *, reply: bool = False) -> str:
            return self.text.guard(text, reply=reply) if guarded else text

        if turns and turns[0]['role'] == 'system':
            system, turns = turns[0]['content'], turns[1:]
            notes += [] if self.template.has_system else [SYSTEM_IGNORED]
        if row.tools:
            notes.append(TOOLS_IGNORED)
        self._check_roles(row, turns)
        if len(turns) > 1 and self.template.chat_sep is None:
            raise ConfigError(
                f"{row.origin} has history, template '{self.name}' is single-turn (no chat_sep). "
                'Choose a chat template, e.g. --template_type chatml or default.'
            )
        pieces = self._fill(self.template.prefix, SYSTEM=say(system or ''))
        for index, turn in enumerate(turns):
            if turn['role'] == 'user':
                query = say(turn['content']).replace(self.text.image, self.images.mark if self.images else '')
                pieces += self._fill(self.template.prompt, QUERY=query, ROUND=str(index // 2 + 1))
            else:
                reply = say(turn['content'], reply=True)
                pieces += [_Reply(reply) if self.carries_loss(turn) else reply]
                pieces += self._fill(self.template.chat_sep or ())
        joined: list[str | list[int]] = []
        for piece in pieces:
            if joined and type(piece) is str and type(joined[-1]) is str:
                joined[-1] += piece
            else:
                joined.append(piece)
        return joined, guarded, notes

    def _check_roles(self, row: Row, turns: Sequence[Message]) -> None:
        for index, turn in enumerate(turns):
            expected = 'user' if index % 2 == 0 else 'assistant'
            role = 'tool call' if 'tool_calls' in turn else turn['role']
            if role != expected:
                raise ConfigError(
                    f"{row.origin}: turn {index + 1} is a {role} turn where template '{self.name}' can only say "
                    f"{expected}. Choose --template_type auto if the model's own template can say it."
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
        """Return the ids of each prompt and the spans of earlier replies that carry loss."""
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
        """Return the text of a prompt, cut where earlier replies carry loss."""
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

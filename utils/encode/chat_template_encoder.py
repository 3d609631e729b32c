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

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from utils.encode.chat_renderer import NO_SETTINGS
from utils.encode.common_text import common_length
from utils.encode.earlier_replies import EarlierReplies
from utils.encode.encoded import (
    EARLIER_CHANGED,
    EARLIER_MERGED,
    MERGED_BOUNDARY,
    Encoded,
    mark_pieces,
    without_last,
)
from utils.encode.encoder import Encoder
from utils.encode.rendered_rows import RenderedRow, RowSplitter
from utils.encode.row_chats import RowChats
from utils.encode.template_properties import TemplateProperties
from utils.formats.conversation import Row
from utils.loading.image_processors import Images
from utils.preprocess import AUTO

# The maximum number of tails of prompts that are cached with their ids (see _tokenise_tails). Most templates have few
# different tails. But if the prompt of a template ends in the question, every question is a different tail.
_TAILS_KEPT = 4096


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
        source = ''.join(templates.values()) if isinstance(templates, dict) else str(templates)
        super().__init__(tokenizer, max_length=max_length, images=images, template_text=source)
        self.system = system
        self.template = TemplateProperties(tokenizer, self.text, source=source, system=system)
        self.chats = RowChats(self.template)
        self.splitter = RowSplitter(self.template)
        self.stop_ids = self.splitter.stop_ids()
        self._tails: dict[str, list[int]] = {}

    @property
    def switch(self) -> str | None:
        return self.chats.switch

    @property
    def prompt_settings(self) -> Mapping[str, Any]:
        return self.template.switch if self.asks_to_think else NO_SETTINGS

    # --- from a row to text

    def _render(self, rows: Sequence[Row]) -> list[RenderedRow]:
        made = [self.chats.whole(row) for row in rows]
        wholes = [one.chat for one in made]
        contexts = [chat._replace(messages=chat.messages[:-1]) for chat in wholes]
        prompts = self.template.renderer.render_all(contexts, prompt=True)
        fulls = self.template.renderer.render_all(wholes, prompt=False)
        return list(map(self.splitter.split, made, prompts, fulls))

    # --- from text to ids

    def _prompt_ids(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        plain = iter(self.text.ids([text for text, guarded in texts if not guarded]))
        return [self.text.guarded_ids(text) if guarded else next(plain) for text, guarded in texts]

    def _encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        made = [self.chats.prompt(row, asks_to_think=self.asks_to_think) for row in rows]
        texts = self.template.renderer.render_all([one.chat for one in made], prompt=True)
        return self._prompt_ids([(text, one.guarded) for text, one in zip(texts, made, strict=True)])

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        rendered = self._render(rows)
        plain = [row for row in rendered if not row.guarded]
        whole = iter(self.text.ids([row.text for row in plain]))
        tails = self._tokenise_tails([row.prompt for row in plain])
        encoded = []
        for row in rendered:
            ids = self.text.guarded_ids(row.text) if row.guarded else next(whole)
            length = 0 if row.guarded else self._count_prompt_ids(row.prompt, ids, tails)
            prompt = ids[:length] if length else self._prompt_ids([(row.prompt, row.guarded)])[0]
            encoded.append(self._assemble(row, prompt, ids))
        self._add_earlier(rows, rendered, encoded)
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

        The tail is the end of the prompt, from the last control token on. `tails` is a dict from the text of a tail
        to its ids, tokenised alone. If a token spans the border between prompt and reply, `whole` does not contain the
        ids of the tail, and the result is 0.
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

    def _assemble(self, row: RenderedRow, prompt: list[int], whole: list[int]) -> Encoded:
        """Return the encoded row. `whole` has the ids of prompt and reply, tokenised as one text.

        If `whole` does not begin with the ids of the prompt, the prompt and the reply are tokenised separately.
        """
        ids, notes = whole, row.notes
        if whole[: len(prompt)] != prompt:
            ids = prompt + self.text.ids_after_control(row.reply + row.rest)
            notes = notes if ids == whole else [*notes, MERGED_BOUNDARY]
        if row.end is not None:
            ids = [*ids, row.end]
        return Encoded(
            input_ids=ids,
            trained=(len(prompt), self._trained_end(ids, row)),
            prompt_length=len(prompt),
            notes=notes,
            pieces=(self.text.unguard(row.prompt), self.text.unguard(row.reply), row.rest),
        )

    def _trained_end(self, ids: list[int], row: RenderedRow) -> int:
        """Return the position in `ids` just after the end-of-turn token of the last reply."""
        if row.end is not None or not row.rest:
            return len(ids)
        # The search starts at the end of `ids`, and skips the control tokens of the text after the end-of-turn token.
        after = len(self.text.find_all(row.rest))
        position = len(ids)
        for _ in range(after + 1):
            position = next(i for i in range(position - 1, -1, -1) if ids[i] in self.text.control_set)
        return position + 1

    # --- earlier replies that carry loss

    def _add_earlier(self, rows: Sequence[Row], rendered: Sequence[RenderedRow], encoded: list[Encoded]) -> None:
        """Add the spans of earlier replies to the encoded rows.

        An earlier reply is a reply before the last reply of its row. If an earlier reply carries no loss, its span is
        not added. If the last reply of a row carries no loss, the span of the last reply is removed. Raises RowRefused
        if no reply of the row is then left with loss.
        """
        # `embed` may have removed ids from `stop_ids` since the encoder was made.
        search = EarlierReplies(self.template, [*self.stop_ids, self.tokenizer.eos_token_id])
        found: list[_Earlier] = []
        for index, row in enumerate(rows):
            spans, are_all_printed = self._find_earlier(search, row, rendered[index])
            found += [_Earlier(index, start, end) for start, end in spans]
            if not are_all_printed:
                encoded[index].notes.append(EARLIER_CHANGED)

        texts = [(rendered[one.row].prompt[:at], rendered[one.row].guarded) for one in found for at in one[1:]]
        borders = iter(self._prompt_ids(texts))
        places: dict[int, list[tuple[int, int]]] = {}
        for one in found:
            _add_span(encoded[one.row], until_start=next(borders), until_end=next(borders))
            places.setdefault(one.row, []).append(self._unguarded_span(rendered[one.row], one))

        for index, row_places in places.items():
            encoded[index] = mark_pieces(encoded[index], row_places)
        for index, row in enumerate(rows):
            if row.messages[-1].get('loss') is False:
                encoded[index] = without_last(encoded[index])

    def _find_earlier(
        self, search: EarlierReplies, row: Row, rendered: RenderedRow
    ) -> tuple[list[tuple[int, int]], bool]:
        """Return (spans of the earlier replies that carry loss, whether each of these replies has a span).

        A span is (start, end) in the text of the prompt. A reply that the template leaves out of the prompt has no
        span. A reply with tool calls can have two spans.
        """
        # The rendered chat may have a system text that the row does not have.
        shift = len(rendered.chat.messages) - len(row.messages)
        found: list[tuple[int, int]] = []
        are_all_printed = True
        for index, message in enumerate(row.messages[:-1]):
            if self.carries_loss(message, row):
                spans = search.find(rendered, index + shift)
                found += spans
                are_all_printed &= bool(spans)
        return found, are_all_printed

    def _unguarded_span(self, row: RenderedRow, earlier: _Earlier) -> tuple[int, int]:
        """Return the span of an earlier reply in the prompt without stand-ins (see guarded_tokenizer.py)."""
        if not row.guarded:
            return earlier.start, earlier.end
        return len(self.text.unguard(row.prompt[: earlier.start])), len(self.text.unguard(row.prompt[: earlier.end]))


def _add_span(row: Encoded, *, until_start: list[int], until_end: list[int]) -> None:
    """Add the span of an earlier reply to an encoded row, and a note if a token spans its start or its end.

    `until_start` has the ids of the prompt up to the start of the reply, `until_end` those up to its end, each
    tokenised alone. A token that spans the start or the end carries no loss. If no token is left, no span is added.
    """
    start = common_length(until_start, row.input_ids)
    end = common_length(until_end, row.input_ids)
    if (start < len(until_start) or end < len(until_end)) and EARLIER_MERGED not in row.notes:
        row.notes.append(EARLIER_MERGED)
    if start < len(until_start):
        start += 1
    if end > start:
        row.earlier.append((start, end))

"""Rows as token ids, with the positions of the tokens that carry loss. Also the error for a row that is refused.

A token carries loss if the model is trained to predict it. A span is a pair (start, end) of positions in the ids of a
row. The position `end` is not part of the span.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

IGNORE_INDEX = -100


class RowRefused(ValueError):
    """Says that a row cannot be encoded, or that none of its replies carries loss.

    `reason` is the problem. `detail` is the wrong part of the row, e.g. the path of an image, or ''. A report counts
    the refused rows by `reason`.
    """

    def __init__(self, reason: str, detail: str = '') -> None:
        super().__init__(f'{reason} [{detail}]' if detail else reason)
        self.reason, self.detail = reason, detail


# Notes and reasons. A note says what happened to a row while it was encoded. The report counts the rows of each note,
# and names the first of these rows.
MERGED_BOUNDARY = 'a token would merge across the start of the reply: the reply is tokenised separately'
CONTROL_TOKENS = 'control tokens typed inside the text: kept as plain text'
RENDERED_DIFFERENTLY = 'the chat template alters the reply (whitespace, a think block): trained as written'
FULL_DIFFERS = (
    'the chat template prints text around the reply differently in the whole chat: trained after the generation prompt'
)
THINKING_SWITCH = 'the reply has reasoning, and the generation prompt closes the think block: rendered with {switch}'
CLOSED_THINKING = 'the reply has reasoning, but the generation prompt closes the think block and no setting opens it'
CLOSED_BY_SETTING = 'the reply has reasoning, but the template setting {setting} closes the think block'
REASONING_AS_TEXT = 'the chat template has no key for reasoning: written as a think block before the reply'
REASONING_LEFT_OUT = 'the chat template prints no reasoning before the reply: the reasoning is left out'
ADDED_END = 'the chat template prints no end of turn: an end-of-turn token is added'
TOOLS_IGNORED = 'the template has no place for tools: they are left out of the prompt'
TOOL_CALL_AS_TEXT = 'the template has no form for tool calls: written as plain text'
SYSTEM_IGNORED = 'the template has no place for a system text: the system text of the row is left out'
TAGS_AS_TEXT = 'image tags in the text, but images are not supported for this model: kept as plain text'
EARLIER_CHANGED = 'the chat template does not print an earlier reply: no loss on that reply'
EARLIER_MERGED = 'a token merges across the start or end of an earlier reply: no loss on that token'
NO_LOSS_MARKED = 'the last reply is marked to carry no loss (weight, loss or train), and no earlier reply carries loss'
CUT_PROMPT = 'longer than max_length: lost the beginning of its prompt'
CUT_REPLY = 'longer than max_length: lost the beginning of its reply'
CUT_TEXT = 'longer than max_length: lost the beginning of its text'
SPLIT = 'longer than max_length: split into several rows'
DROPPED = 'longer than max_length: dropped (--overlong drop)'
REFUSED = 'longer than max_length: refused (--overlong {})'
CUTS = (CUT_PROMPT, CUT_REPLY, CUT_TEXT)
# A row of plain text has no question. In its place, a model gets the beginning of the text: half of its tokens, but at
# most this number.
_BEGINNING = 64


@dataclass(kw_only=True, slots=True)
class Encoded:
    """A row as token ids, with the spans of ids that carry loss.

    A span (start, end) does not include `end`. `trained` is the last span that carries loss. `earlier` has the spans
    before it, in order. A reply usually has one span. An earlier reply with tool calls can have two spans.

    The first `prompt_length` ids are the prompt, which inference continues. If the row is plain text, its prompt is the
    first half of its ids, but at most 64 ids. In training, every id of plain text carries loss.
    """

    input_ids: list[int]
    trained: tuple[int, int]
    prompt_length: int
    notes: list[str] = field(default_factory=list)
    images: tuple[str, ...] = ()
    earlier: list[tuple[int, int]] = field(default_factory=list)
    # The text of the row, split at the start and end of each span that carries loss: context, trained, context, ...
    pieces: tuple[str, ...] = ()
    # The number of characters that were cut from the start of the text in `pieces`.
    cut: int = 0
    # Whether the row is plain text. Then every token carries loss.
    is_text: bool = False

    def as_item(self) -> dict[str, Any]:
        """Return the row as an item of a data set. The keys `earlier` and `images` are left out if they are empty."""
        item = {'input_ids': self.input_ids, 'trained': self.trained, 'prompt_length': self.prompt_length}
        extra = {'earlier': self.earlier, 'images': self.images}
        return {**item, **{name: value for name, value in extra.items() if value}}


def whole_text(ids: list[int]) -> Encoded:
    """Return a row of plain text with these ids. Every token carries loss."""
    length = min(len(ids) // 2, _BEGINNING)
    return Encoded(input_ids=ids, trained=(0, len(ids)), prompt_length=length, is_text=True)


def cut_front(row: Encoded, max_length: int) -> Encoded:
    """Return the row with only its last `max_length` ids, or unchanged if it is not longer or `max_length` is negative.

    The spans are moved to their new positions, and the cut is added to the notes. Spans in `earlier` that are cut off
    completely are removed.
    """
    surplus = len(row.input_ids) - max_length
    if max_length < 0 or surplus <= 0:
        return row
    if row.is_text:
        ids = row.input_ids[surplus:]
        return dataclasses.replace(whole_text(ids), pieces=row.pieces, notes=[*row.notes, CUT_TEXT])
    start, end = row.trained
    return Encoded(
        input_ids=row.input_ids[surplus:],
        trained=(max(start - surplus, 0), end - surplus),
        prompt_length=max(row.prompt_length - surplus, 0),
        notes=[*row.notes, CUT_REPLY if surplus > row.prompt_length else CUT_PROMPT],
        images=row.images,
        pieces=row.pieces,
        earlier=[(max(start - surplus, 0), end - surplus) for start, end in row.earlier if end > surplus],
    )


def mark_pieces(row: Encoded, spans: Sequence[tuple[int, int]]) -> Encoded:
    """Return the row with `pieces[0]`, the text of the prompt, split before and after each span.

    For example, the prompt 'abcde' with spans [(1, 3)] becomes the pieces 'a', 'bc' and 'de'.

    The prompt consists of all turns before the last reply, so it can contain replies. The spans are the positions
    (start, end) of those replies that carry loss, in characters.
    """
    prompt, *others = row.pieces
    pieces: list[str] = []
    position = 0
    for start, end in spans:
        pieces += [prompt[position:start], prompt[start:end]]
        position = end
    return dataclasses.replace(row, pieces=(*pieces, prompt[position:], *others))


def without_last(row: Encoded) -> Encoded:
    """Return the row with no loss on its last reply. Raises RowRefused if no earlier reply carries loss."""
    if not row.earlier:
        raise RowRefused(NO_LOSS_MARKED)
    *pieces, prompt, reply, rest = row.pieces
    return dataclasses.replace(
        row, trained=row.earlier[-1], earlier=row.earlier[:-1], pieces=(*pieces, prompt + reply + rest)
    )


def row_labels(row: dict[str, Any]) -> list[int]:
    """Return the labels of the row: its ids where they carry loss, and IGNORE_INDEX elsewhere.

    Position 0 is always IGNORE_INDEX, because the model never predicts the first token.
    """
    ids = row['input_ids']
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in (*row.get('earlier', ()), row['trained']):
        labels[max(start, 1) : end] = ids[max(start, 1) : end]
    return labels


NOTHING_TRAINED = 'no token of the row carries loss, so nothing would be learnt from it'
Spans = Sequence[tuple[int, int]]


def spans_of(row: dict[str, Any]) -> Spans:
    """Return the spans (start, end) of a row that carry loss, in order. The position `end` is not part of a span."""
    return [*row.get('earlier', ()), row['trained']]


def trains_nothing(spans: Spans) -> bool:
    """Return True if the model predicts no token in the spans. It never predicts the first token of a row."""
    return not any(end > max(start, 1) for start, end in spans)

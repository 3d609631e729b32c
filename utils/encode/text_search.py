"""Finds the texts of a row in its rendered row, and counts their characters by outcome.

The outcome says what happened to a character:
* `trained`: it carries loss.
* `context`: it is in the rendered row, but carries no loss. The path of an image that the model sees counts too.
* `cut`: it was removed by the cut to max_length.
* `trimmed`: it is whitespace around a text or a line, and has no other outcome.
* `structure`: it belongs to a role, type or similar text, which is not searched, or to a tag that is not found.
* `not used`: it is not found in the rendered row, or conversion drops its column or key.

The search may find a wrong position, for example if the text is `a`, or is a name that is also a role
(see marker_search.py).
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from utils.encode.encoded import TOOLS_IGNORED, Encoded
from utils.encode.guarded_tokenizer import CLOSE_TAG, OPEN_TAG
from utils.encode.row_texts import STRUCTURE, RowText, row_texts
from utils.formats.conversation import Row

TRAINED, CONTEXT, CUT, TRIMMED, NOT_USED = 'trained', 'context', 'cut', 'trimmed', 'not used'
_SEPARATE = re.compile(rf'({OPEN_TAG}|{CLOSE_TAG}|<img>.*?</img>|\n)')

Span = tuple[int, int]


class SearchedText:
    """The text that the template makes of a row. All positions count characters of `text`.

    The text consists of pieces: without loss, with loss, without loss, and so on. `ends` has the end of each piece, and
    `trained` has the start of each piece with loss.

    `found_spans` has the spans in which the search has already found texts of the row.
    """

    def __init__(self, encoded: Encoded) -> None:
        self.text = ''.join(encoded.pieces)
        self.ends = list(accumulate(map(len, encoded.pieces)))
        self.cut = encoded.cut
        self.found_spans: list[tuple[int, int]] = []
        self.trained = [self.ends[i - 1] for i in range(1, len(encoded.pieces), 2)]

    def find(self, text: str, start: int) -> tuple[int, int] | None:
        """Return the span of the first match of `text` at or after `start`, or None.

        If there is no match, the search is repeated for `text` with JSON escapes.
        """
        at = self.text.find(text, start)
        if at >= 0:
            return at, at + len(text)
        if text.isalnum() and text.isascii():
            return None
        for ascii_only in (False, True):
            shown = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
            at = self.text.find(shown, start) if shown != text else -1
            if at >= 0:
                return at, at + len(shown)
        return None

    def mask_found(self) -> str:
        """Return the rendered text with NUL characters in place of all texts that were already found."""
        parts, position = [], 0
        for start, end in sorted(self.found_spans):
            parts += [self.text[position:start], '\0' * (end - max(start, position))]
            position = max(position, end)
        return ''.join([*parts, self.text[position:]])

    def count_span(self, start: int, end: int, length: int) -> dict[str, int]:
        """Count the characters at start:end by outcome (see the head of the module).

        Example of the returned dict: {'cut': 3, 'context': 5, 'trained': 9}

        The counts are scaled so that their sum is `length`, the length of the same text in the row. The rendered text
        may be longer than the text in the row, for example because of JSON escapes.
        """
        found: dict[str, int] = {}
        position = start
        if position < self.cut:
            position = min(end, self.cut)
            found[CUT] = position - start
        while position < end:
            piece = bisect_right(self.ends, position)
            stop = min(end, self.ends[piece])
            outcome = TRAINED if piece % 2 else CONTEXT
            found[outcome] = found.get(outcome, 0) + stop - position
            position = stop
        if end - start != length:
            found = {outcome: count * length // (end - start) for outcome, count in found.items()}
            largest = max(found, key=lambda outcome: found[outcome])
            found[largest] += length - sum(found.values())
        return found

    def count_text(self, written: str, shown: str, at: Span) -> dict[str, int]:
        """Count the characters of `written`, a text of the row, by outcome (see the head of the module).

        Example of the returned dict: {'context': 9, 'trimmed': 2}

        `shown` is `written`, or `written` without the whitespace around it. `at` is the span in which `shown` is
        printed. Whitespace that is not printed counts as trimmed.
        """
        found = self.count_span(*at, len(shown))
        if len(shown) < len(written):
            found[TRIMMED] = len(written) - len(shown)
        return found


class SearchResult(NamedTuple):
    """Says where one text of a row was found in the rendered row.

    The rendered row is what the template prints for the row. `counts` has the number of characters for each outcome
    (see the head of the module), for example {'context': 9, 'trimmed': 2}. `at` is the (start, end) of the text in the
    rendered row. If the whole text was not found or not searched, `at` is None. `start` is the position at which the
    search began.
    """

    row_text: RowText
    counts: dict[str, int]
    at: Span | None = None
    start: int = 0
    # Whether the text was found only before `start`, or only in a span in which a different text was already found. If
    # `at` is None, this value has no meaning.
    is_elsewhere: bool = False


def search_texts(row: Row, encoded: Encoded, rendered: SearchedText) -> Iterator[SearchResult]:
    """Look for each text of a row in `rendered`, and yield one result for each text.

    `rendered` is what the template prints for the row. Texts outside of turns come first, such as tools. The other
    texts come in the order of the turns. But names and ids, such as `tool_call_id`, come last.
    """
    found = list(row_texts(row.written))
    replies = sorted(
        {row_text.turn for row_text in found if row_text.label in ('reply text', 'reasoning', 'tool calls')}
    )
    starts = dict(zip(replies, rendered.trained, strict=False)) if len(replies) == len(rendered.trained) else {}
    if replies and rendered.trained:
        starts[replies[-1]] = rendered.trained[-1]
    later: list[RowText] = []
    cursor = begin = 0
    turn = -1
    for row_text in sorted(found, key=lambda row_text: row_text.turn):
        if row_text.turn != turn:
            turn = row_text.turn
            begin = max(cursor, starts.get(turn, 0))
        if row_text.kind == 'identity':
            later.append(row_text)
            continue
        if row_text.label == 'tools' and row_text.kind != STRUCTURE and TOOLS_IGNORED in encoded.notes:
            # The tools are not printed. A search could find the name of a tool in a call, which would be wrong.
            yield SearchResult(row_text, {NOT_USED: len(row_text.text)} if row_text.text else {})
            continue
        result, end = _search(row_text, rendered, 0 if row_text.turn < 0 else begin, has_images=bool(encoded.images))
        cursor = max(cursor, end) if row_text.turn >= 0 else cursor
        yield result
    for row_text in later:
        # The span of a found name is not searched again. So a name printed once does not count for two.
        shown = row_text.text.strip()
        own = rendered.mask_found().find(shown) if shown else -1
        at = own if own >= 0 or not shown else rendered.text.find(shown)
        span = (at, at + len(shown)) if at >= 0 else None
        if span:
            rendered.found_spans.append(span)
        counts = rendered.count_span(*span, len(row_text.text)) if span and own >= 0 else {NOT_USED: len(row_text.text)}
        yield SearchResult(row_text, counts, span, is_elsewhere=own < 0)


def _search(row_text: RowText, rendered: SearchedText, start: int, *, has_images: bool) -> tuple[SearchResult, int]:
    """Look for one text of the row from `start` on. Returns (result, end).

    `end` is the position at which the text, or its last part that is found, ends. It is 0 if nothing is found from
    `start` on, or if the text is not searched, such as a role.
    """
    size = len(row_text.text)
    if row_text.kind == STRUCTURE:
        return SearchResult(row_text, {STRUCTURE: size}), 0
    if row_text.kind == 'never':
        return SearchResult(row_text, {NOT_USED: size}), 0
    if row_text.kind == 'image' and has_images:
        return SearchResult(row_text, {CONTEXT: size}), 0
    stripped = row_text.text.strip()
    if not stripped:
        return SearchResult(row_text, {TRIMMED: size} if size else {}), 0
    for shown in (row_text.text, stripped):
        at = rendered.find(shown, start)
        if at is not None:
            rendered.found_spans.append(at)
            return SearchResult(row_text, rendered.count_text(row_text.text, shown, at), at, start), at[1]
    counts, end = _search_parts(row_text.text, rendered, start, has_images=has_images)
    # The search for the previous text may have found a later, wrong match. Then this search began too late. So
    # search again from the beginning of the row.
    early = rendered.find(stripped, 0)
    if early is not None:
        rendered.found_spans.append(early)
    return SearchResult(row_text, counts, early, start, is_elsewhere=early is not None), end


def _search_parts(whole: str, rendered: SearchedText, start: int, *, has_images: bool) -> tuple[dict[str, int], int]:
    """Split the text `whole` at line ends and tags, and look for each part in `rendered`.

    The search begins at the position `start` of `rendered`. Returns (counts, end). `counts` has the number of
    characters for each outcome (see the head of the module). `end` is the position in `rendered` at which the last
    found part ends, or 0 if no part is found.
    """
    counts: dict[str, int] = {}
    end = 0
    for part in _SEPARATE.split(whole):
        stripped = part.strip()
        at = rendered.find(stripped, max(start, end)) if stripped else None
        found = {TRIMMED: len(part) - len(stripped)}
        if at is not None:
            rendered.found_spans.append(at)
            end = at[1]
            found |= rendered.count_span(*at, len(stripped))
        elif stripped.startswith('<img>') and has_images:
            found[CONTEXT] = len(stripped)
        elif stripped and _SEPARATE.fullmatch(stripped):
            found[STRUCTURE] = len(stripped)
        else:
            found[NOT_USED] = len(stripped)
        for outcome, count in found.items():
            counts[outcome] = counts.get(outcome, 0) + count
    return {outcome: count for outcome, count in counts.items() if count}, end

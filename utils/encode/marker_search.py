"""Finds the right positions of texts whose position in the rendered row is not certain.

The row is rendered again, with a marker (a made-up word) in place of each of these texts. The position of a marker is
the position of its text.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from utils.encode.encoded import Encoded
from utils.encode.row_texts import STRUCTURE, TextPath, other_words, replaced
from utils.encode.text_search import NOT_USED, TRIMMED, SearchedText, SearchResult, Span
from utils.formats.conversation import Row

# Templates print these words for any row.
_ROLES = ('system', 'user', 'assistant', 'tool')
# The maximum number of texts of a row that are searched one by one, because they cannot be searched together.
_MOST_ALONE = 16

# A function that replaces the texts at the given paths of a row, encodes the row, and returns the pieces of its
# tokenised text. It returns None if the changed row is refused.
_Rendering = Callable[[Sequence[tuple[TextPath, str]]], tuple[str, ...] | None]


class Again(Protocol):
    """Encodes a row again, with other texts in its columns."""

    @property
    def printed(self) -> str:
        """Return text that the template may print in any row. It contains no data of a row."""

    def encode(self, row: Row, written: Mapping[str, Any]) -> Encoded | None:
        """Encode the row with its columns replaced by `written`. Returns None if the new row cannot be encoded."""


def correct_positions(results: list[SearchResult], rendered: SearchedText, row: Row, again: Again) -> None:
    """Correct the results whose position in the rendered row may be wrong. The list `results` is changed.

    `again` encodes `row` with a marker in place of the text of each of these results, several times if needed. The
    position of a marker is the position of its text. If this fails, a result is left unchanged.
    """
    # A text that equals one of these words may be found where the template prints the word.
    printed = '\n'.join([again.printed, *_ROLES, *other_words(row.written)])
    doubtful = _doubtful(results, rendered, printed)
    if doubtful:
        _search_with_markers(results, doubtful, rendered, functools.partial(_render, row, again))


def _doubtful(results: Sequence[SearchResult], rendered: SearchedText, printed: str) -> list[int]:
    """Return the indices of the results whose position may be wrong, in ascending order.

    A position may be wrong if the text occurs several times in the rendered row, overlaps another text, was found only
    in parts or where it is not expected (`is_elsewhere`), or occurs in `printed`. Roles, types, images, empty texts and
    texts that are never printed are left out.

    `printed` has texts that the template may print in addition to the texts of the row.
    """
    spans = sorted((*result.at, number) for number, result in enumerate(results) if result.at)
    overlapping: set[int] = set()
    reach, owner = 0, -1
    for start, end, number in spans:
        if start < reach:
            overlapping |= {owner, number}
        if end > reach:
            reach, owner = end, number
    found = []
    for number, result in enumerate(results):
        row_text, counts, at, start = result.row_text, result.counts, result.at, result.start
        if row_text.kind not in ('text', 'identity') or not row_text.text.strip():
            continue
        if at is None:
            # The text was found only in parts. The parts may belong to a different text.
            if set(counts) - {NOT_USED, TRIMMED, STRUCTURE}:
                found.append(number)
            continue
        shown = rendered.text[at[0] : at[1]]
        if (
            result.is_elsewhere
            or number in overlapping
            or shown in printed
            or rendered.text.find(shown, start) != rendered.text.rfind(shown)
        ):
            found.append(number)
    return found


def _render(row: Row, again: Again, changes: Sequence[tuple[TextPath, str]]) -> tuple[str, ...] | None:
    """Return the rendered text of a row, as pieces, after some texts of the row are replaced.

    Each change is a pair (path of a text in the row, new text). Returns None if the changed row is refused.
    """
    written: Any = row.written
    for path, text in changes:
        written = replaced(written, path, text)
    encoded = again.encode(row, written)
    return None if encoded is None else encoded.pieces


def _search_with_markers(
    results: list[SearchResult], doubtful: Sequence[int], rendered: SearchedText, render: _Rendering
) -> None:
    """Correct the positions of the texts in `results` whose indices are in `doubtful`.

    The row is rendered again, with a marker (a made-up word) in place of each of these texts that was found as a whole.
    The position of a marker is the position of its text. If a marker is not printed, its text counts as not used.

    This fails if the template refuses the changed row, or if the two renderings of the row differ anywhere except at
    the markers. Then these texts are tried one by one. Texts that were found only in parts are always tried one by one.
    At most _MOST_ALONE texts are tried so. If this fails too for a text, its old position is kept.
    """
    whole = [number for number in doubtful if results[number].at is not None]
    marks = {number: _marker(number) for number in whole}
    # Templates compare the id of a call with the id of its result. So equal ids get equal markers at first.
    first: dict[str, int] = {}
    shared = {
        number: _marker(
            first.setdefault(results[number].row_text.text, number)
            if results[number].row_text.kind == 'identity'
            else number
        )
        for number in whole
    }
    spans = _find_markers(results, shared, rendered, render) if whole else {}
    carried = Counter(shared.values())
    if spans is not None and any(0 < len(found) < carried[mark] for mark, found in spans.items()):
        spans, shared = _find_markers(results, marks, rendered, render), marks
    if spans is not None:
        for number in whole:
            _store_position(results, number, spans[shared[number]], rendered)
    # Texts that could not be searched together, or that were found only in parts, are searched one by one.
    alone = doubtful if spans is None else [number for number in doubtful if number not in marks]
    for number in alone[:_MOST_ALONE]:
        found = _find_markers(results, {number: _marker(number)}, rendered, render)
        if found is not None:
            _store_position(results, number, found[_marker(number)], rendered)


def _marker(number: int) -> str:
    """Return a made-up word for the text with index `number`, for example 'zq00012qz'."""
    # Some templates accept only call ids of this length.
    return f'zq{number:05d}qz'


def _store_position(results: list[SearchResult], number: int, spans: list[Span], rendered: SearchedText) -> None:
    """Store spans[0] as the position of the text in results[number].

    If `spans` is empty, the text counts as not used.

    If the kind of the text is 'identity' (a name or an id), and `spans` has several items, spans[0] is then removed
    from `spans`. The caller may pass the same list for equal names, so that the next name gets the next span. The last
    span always stays in the list.
    """
    row_text = results[number].row_text
    if not spans:
        results[number] = SearchResult(row_text, {NOT_USED: len(row_text.text)})
        return
    at = spans.pop(0) if len(spans) > 1 and row_text.kind == 'identity' else spans[0]
    stripped = row_text.text.strip()
    shown = stripped if rendered.text[at[0] : at[1]] == stripped else row_text.text
    results[number] = SearchResult(row_text, rendered.count_text(row_text.text, shown, at), at)


def _forms(text: str) -> list[str]:
    """Return the forms in which a template may print a text.

    The forms are: unchanged, without the spaces around it, and with JSON escapes.
    """
    stripped = text.strip()
    json_forms = [json.dumps(one, ensure_ascii=only)[1:-1] for one in (text, stripped) for only in (False, True)]
    return list(dict.fromkeys([text, stripped, *json_forms]))


def _find_markers(
    results: Sequence[SearchResult], marks: Mapping[int, str], rendered: SearchedText, render: _Rendering
) -> dict[str, list[Span]] | None:
    """Find the spans of texts in `rendered`. Returns a dict from the marker of a text to the spans of this text.

    A marker is a made-up word. `marks[number]` is the marker of the text in `results[number]`. The row is rendered
    again, with each marker in place of its text. The new rendering is compared with `rendered`. A text has no spans if
    its marker is not printed.

    Returns None if the changed row is refused, if the two renderings differ anywhere except at the markers, or if
    `rendered` already contains one of the markers.
    """
    pieces = render([(results[number].row_text.path, mark) for number, mark in marks.items()])
    if pieces is None or any(mark in rendered.text for mark in marks.values()):
        return None
    forms = {mark: _forms(results[number].row_text.text) for number, mark in marks.items()}
    spans: dict[str, list[Span]] = {mark: [] for mark in forms}
    before, *others = re.split(f'({"|".join(forms)})', ''.join(pieces))
    if not rendered.text.startswith(before):
        return None
    position = len(before)
    for mark, after in zip(others[::2], others[1::2], strict=True):
        form = next((form for form in forms[mark] if rendered.text.startswith(form + after, position)), None)
        if form is None:
            return None
        spans[mark].append((position, position + len(form)))
        position += len(form) + len(after)
    return spans if position == len(rendered.text) else None

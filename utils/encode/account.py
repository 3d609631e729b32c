"""Counts the characters of the data by their outcome, which is what happened to them.

The main outcomes are `trained` (carries loss), `context` (in the rendered row, without loss), `cut` (removed by the cut
to max_length), `left out` (the whole row is not trained on) and `not used` (not in the rendered row).

A row has texts, such as the content of a message or the name of a tool. The rendered row is the one text that the
template makes of them. The account searches the texts of the row in the rendered row. A text, or a part of a text, that
is not found counts as not used. The text of a column that conversion drops counts as not used without a search. Roles
and types are not searched either: they count as `structure`.

The search may find a wrong position, for example if the text is `a`, or is a name that is also a role. To find the
right position of the text, the row is rendered again, with a marker (a made-up word) instead of the text.
"""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from utils.encode.encoded import TOOLS_IGNORED, Encoded
from utils.encode.guarded_tokenizer import CLOSE_TAG, OPEN_TAG
from utils.formats.conversation import Row
from utils.formats.json_text import JsonParser, json_as_written

TRAINED, CONTEXT, CUT, TRIMMED, STRUCTURE = 'trained', 'context', 'cut', 'trimmed', 'structure'
LEFT_OUT, NOT_DRAWN, NOT_USED = 'left out', 'not drawn', 'not used'

_TEXTS = {
    'system': 'system text', 'developer': 'system text', 'user': 'user text', 'human': 'user text',
    'tool': 'tool results', 'observation': 'tool results', 'function': 'tool results',
    'function_response': 'tool results', 'tool_response': 'tool results',
    'function_call': 'tool calls', 'tool_call': 'tool calls',
}  # fmt: skip
_REASONING = ('reasoning_content', 'reasoning', 'thinking')
_CALLS = ('tool_calls', 'function_call')
# Templates print these words for any row.
_ROLES = ('system', 'user', 'assistant', 'tool')
_IDENTITIES = ('name', 'id', 'tool_call_id')
_MARKS = ('weight', 'loss', 'train')
_EVERYWHERE = ('system', 'tools', 'functions', 'images')
# Keys of a tool whose values decide how the tool is printed. Few templates print these values.
_OF_SCHEMAS = ('type', 'required')
# The columns of each row format. The first format whose columns the row has is used.
_SHAPES: tuple[tuple[str, ...], ...] = (
    ('messages',),
    ('conversations',),
    ('query', 'response', 'history'),
    ('instruction', 'output', 'input', 'history'),
    ('prompt', 'completion', 'history'),
    ('prompt', 'response', 'history'),
    ('question', 'answer', 'history'),
    ('question', 'response', 'history'),
    ('input', 'output', 'history'),
    ('text',),
)
# The columns with what is asked. Any other column of such a shape has the reply.
_ASKED = ('query', 'instruction', 'input', 'prompt', 'question')
_SEPARATE = re.compile(rf'({OPEN_TAG}|{CLOSE_TAG}|<img>.*?</img>|\n)')


_Path = tuple[str | int, ...]
_Span = tuple[int, int]


# A function that replaces the texts at the given paths of a row, encodes the row, and returns the pieces of its
# tokenised text. It returns None if the changed row is refused.
_Rendering = Callable[[Sequence[tuple[_Path, str]]], tuple[str, ...] | None]

# Names of columns and keys are data. Beyond this number of names, the account must not grow with the data.
_MOST_FIELDS = 500
OTHER_FIELDS = f'another column or key than the first {_MOST_FIELDS}'

# If the texts of a row cannot be searched together, at most this number of texts is searched one by one.
_MOST_ALONE = 16


class _RowText(NamedTuple):
    """One text (string) of a row, before a template is applied.

    `label` is the kind of text under which its characters are counted, e.g. 'user text'. `name` is the column or key
    that is reported if the text is not used, e.g. 'column `source`'. `turn` is the index of the turn that contains the
    text. It is -1 if no turn contains the text.
    """

    label: str
    name: str
    text: str
    turn: int
    # One of 'text', 'identity' (a name or id), 'structure' (e.g. a role), 'image' and 'never' (never printed).
    kind: str = 'text'
    # The keys and indices that lead to the text in the row. If a value on this path is JSON text, the path continues in
    # the parsed value.
    path: _Path = ()


class Again(Protocol):
    """Encodes a row once more with changed data."""

    @property
    def printed(self) -> str:
        """Return text that the template may print in any row. It contains no data of a row."""

    def encode(self, row: Row, written: Mapping[str, Any]) -> Encoded | None:
        """Encode the row with its columns replaced by `written`. Returns None if the new row cannot be encoded."""


def _parsed(value: Any) -> Any:
    """If the value is JSON text of a list or object, return the list or object. Else return the value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ('[', '{'):
        return value
    try:
        found = JsonParser().parse(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list | dict) else value


def _replaced(value: Any, path: _Path, text: str) -> Any:
    """Return a copy of a nested value in which `text` replaces the text at `path`.

    If a value on this path is JSON text, it is parsed, changed and written as JSON text again.
    """
    if not path:
        return text
    whole = _parsed(value)
    key, rest = path[0], path[1:]
    if isinstance(whole, Mapping):
        made: Any = {**whole, key: _replaced(whole[key], rest, text)}
    else:
        made = list(whole)
        made[key] = _replaced(made[key], rest, text)
    return json_as_written(made, default=str) if isinstance(value, str) else made


def _strings(value: Any, path: _Path) -> Iterator[tuple[_Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, (*path, name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _strings(item, (*path, number))


def _other_words(value: Any) -> Iterator[str]:
    """Yield all keys, numbers, booleans and nulls of a nested value, as texts.

    The strings under the keys `type` and `required` are yielded too. All other strings are left out. If a string is
    JSON text of a list or object, its parsed value is used instead.

    Example: {'type': 'string', 'size': 1, 'title': 'a'} -> 'type', 'string', 'size', '1', 'title'
    """
    value = _parsed(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            if key in _OF_SCHEMAS:
                yield from (text for _, text in _strings(item, ()))
            yield from _other_words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _other_words(item)
    elif not isinstance(value, str):
        yield str(value)


def _texts(value: Any, path: _Path, label: str, name: str, turn: int = -1, kind: str = 'text') -> Iterator[_RowText]:
    """Yield a _RowText with this label, name, turn and kind for every string in a nested value."""
    for place, text in _strings(value, path):
        yield _RowText(label, name, text, turn, kind, place)


def _unused(value: Any, path: _Path, name: str, turn: int = -1) -> Iterator[_RowText]:
    return _texts(value, path, name, name, turn, 'never')


def _key_of(path: _Path) -> str:
    """Return the last key on a path. Returns '' if the path has only indices."""
    return next((step for step in reversed(path) if isinstance(step, str)), '')


def _of_tools(value: Any, path: _Path) -> Iterator[_RowText]:
    for place, text in _strings(_parsed(value), path):
        key = _key_of(place)
        nested = _parsed(text) if key == 'parameters' else text
        if nested is text:
            yield _RowText('tools', 'tools', text, -1, STRUCTURE if key in _OF_SCHEMAS else 'text', place)
        else:
            yield from _of_tools(nested, place)


def _of_calls(value: Any, path: _Path, turn: int) -> Iterator[_RowText]:
    calls = _parsed(value)
    if isinstance(calls, list):
        for number, call in enumerate(calls):
            yield from _of_call(call, (*path, number), turn)
    else:
        yield from _of_call(calls, path, turn)


def _of_call(call: Any, path: _Path, turn: int) -> Iterator[_RowText]:
    if not isinstance(call, Mapping):
        yield from _texts(call, path, 'tool calls', 'tool calls', turn)
        return
    for key, item in call.items():
        at = (*path, key)
        name = f'tool call key `{key}`'
        if key == 'function' and isinstance(item, Mapping):
            yield from _of_call(item, at, turn)
        elif key in ('name', 'arguments'):
            yield from _texts(_parsed(item), at, 'tool calls', 'tool calls', turn)
        elif key in ('id', 'type'):
            yield from _texts(item, at, 'tool calls', name, turn, 'identity' if key == 'id' else STRUCTURE)
        else:
            yield from _unused(item, at, name, turn)


def _of_content(value: Any, path: _Path, label: str, turn: int) -> Iterator[_RowText]:
    if label == 'tool calls':
        yield from _of_calls(value, path, turn)
    elif not isinstance(value, list):
        yield from _texts(value, path, label, label, turn)
    else:
        for number, item in enumerate(value):
            if isinstance(item, Mapping):
                yield from _of_item(item, (*path, number), label, turn)
            else:
                yield from _unused(item, (*path, number), label, turn)


def _of_item(item: Mapping[str, Any], path: _Path, label: str, turn: int) -> Iterator[_RowText]:
    """Yield a _RowText for every text in one item of a content list, such as {'type': 'text', 'text': ...}."""
    image = 'image' if item.get('image') else 'path'
    for key, part in item.items():
        at = (*path, key)
        if key == 'type':
            yield from _texts(part, at, 'roles and types', key, turn, STRUCTURE)
        elif key == 'text' and item.get('type') == 'text':
            yield from _texts(part, at, label, label, turn)
        elif key == image and item.get('type') == 'image':
            yield from _texts(part, at, 'images', 'images', turn, 'image')
        else:
            yield from _unused(part, at, f'content item key `{key}`', turn)


def _of_turn(
    turn: Mapping[str, Any], path: _Path, number: int, keys: tuple[str, str], contents: tuple[str, str]
) -> Iterator[_RowText]:
    role_key = next((key for key in keys if key in turn), keys[0])
    content_key = next((key for key in contents if key in turn), contents[0])
    label = _TEXTS.get(str(turn.get(role_key)).strip().lower(), 'reply text')
    # If several keys have reasoning, conversion uses the first.
    reasoning = next((key for key in _REASONING if isinstance(turn.get(key), str) and turn[key].strip()), '')
    for key, value in turn.items():
        if value is None:
            continue
        name = f'message key `{key}`'
        at = (*path, key)
        if key == role_key:
            yield _RowText('roles and types', key, str(value), number, STRUCTURE, at)
        elif key == content_key:
            yield from _of_content(value, at, label, number)
        elif key == reasoning:
            yield _RowText('reasoning', name, value, number, 'text', at)
        elif key in _CALLS:
            yield from _of_calls(value, at, number)
        elif key in _IDENTITIES:
            yield from _texts(value, at, name, name, number, 'identity')
        elif key in _MARKS:
            yield from _texts(value, at, 'roles and types', key, number, STRUCTURE)
        else:
            yield from _unused(value, at, name, number)


def _of_history(history: Any) -> Iterator[_RowText]:
    if not isinstance(history, list | tuple):
        yield from _unused(history, ('history',), 'column `history`')
        return
    for number, pair in enumerate(history):
        said = pair if isinstance(pair, list | tuple) else [pair]
        for half, (label, text) in enumerate(zip(('user text', 'reply text'), said, strict=False)):
            yield from _texts(text, ('history', number, half), label, label, 2 * number + half)


def _of_turns(value: Any, column: str, number: int = 0) -> Iterator[_RowText]:
    """Yield a _RowText for every string in a column of turns, such as `messages`.

    `number` is the index of the column's first turn in the conversation.
    """
    keys, contents = ('role', 'from'), ('content', 'value')
    if column == 'conversations':
        keys, contents = ('from', 'role'), ('value', 'content')
    if isinstance(value, Mapping):
        yield from _of_turn(value, (column,), number, keys, contents)
        return
    for index, turn in enumerate(value if isinstance(value, list | tuple) else [value]):
        if isinstance(turn, Mapping):
            yield from _of_turn(turn, (column, index), number + index, keys, contents)
        else:
            yield from _unused(turn, (column, index), f'column `{column}`')


def _texts_of_column(raw: Mapping[str, Any], column: str, columns: Sequence[str], rounds: int) -> Iterator[_RowText]:
    """Yield a _RowText for every string in a column with a question, an additional input or the reply of a row.

    `columns` are the columns of the row's format, for example ('query', 'response', 'history'). The first of them is
    the prompt column. `rounds` is the number of question-answer pairs in the history.
    """
    value = raw[column]
    is_asked = column in _ASKED
    first = 2 * rounds + (not is_asked)
    prompt = raw[columns[0]]
    if not is_asked and isinstance(prompt, list):
        first = len(prompt)
    if isinstance(value, list | Mapping):
        yield from _of_turns(value, column, first)
    else:
        label = 'user text' if is_asked else 'reply text'
        yield from _texts(value, (column,), label, label, first)


def row_texts(raw: Mapping[str, Any]) -> Iterator[_RowText]:
    """Yield a _RowText for every string in a row. `raw` is the row before conversion to a chat."""
    shape = next((columns for columns in _SHAPES if all(c in raw for c in columns[:2])), ())
    if 'history' in shape and isinstance(raw[shape[0]], list | Mapping):
        shape = shape[:2]  # a prompt of messages has its own history
    history = _parsed(raw.get('history')) if 'history' in shape else None
    last = len(history) if isinstance(history, list | tuple) else 0
    if history is not None:
        yield from _of_history(history)
    has_tools = bool(_parsed(raw.get('tools')))
    for column, value in raw.items():
        at = (column,)
        if column in shape and column in ('messages', 'conversations'):
            yield from _of_turns(_parsed(value), column)
        elif column in shape and column == 'text':
            yield from _texts(value, at, 'plain text', 'plain text', 0)
        elif shape == ('text',):
            yield from _unused(value, at, f'column `{column}`')  # no template is applied
        elif column in shape and column != 'history':
            yield from _texts_of_column(raw, column, shape, last)
        elif column == 'system':
            yield from _texts(value, at, 'system text', 'system text')
        elif column == 'tools' or (column == 'functions' and not has_tools):
            yield from _of_tools(value, at)
        elif column == 'images':
            yield from _texts(_parsed(value), at, 'images', 'images', -1, 'image')
        elif column not in shape:
            yield from _unused(value, at, f'column `{column}`')


class _Rendered:
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
        """Return a dict from outcomes to numbers of characters at start:end.

        Example: {'cut': 3, 'context': 5, 'trained': 9}

        A `cut` character was removed by the cut to max_length. A `context` character carries no loss. A `trained`
        character carries loss.

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

    def count_text(self, written: str, shown: str, at: _Span) -> dict[str, int]:
        """Return a dict from outcomes to numbers of characters for `written`, a text of the row.

        Example: {'context': 9, 'trimmed': 2}

        `shown` is `written`, or `written` without the whitespace around it. `at` is the span in which `shown` is
        printed. Whitespace that is not printed counts as trimmed.
        """
        found = self.count_span(*at, len(shown))
        if len(shown) < len(written):
            found[TRIMMED] = len(written) - len(shown)
        return found


class _SearchResult(NamedTuple):
    """Says where one text of a row was found in the rendered row.

    The rendered row is what the template prints for the row. `counts` is a dict from outcomes to numbers of characters,
    for example {'context': 9}. `at` is the (start, end) of the text in the rendered row. If the whole text was not
    found, `at` is None. `start` is the position at which the search began.
    """

    row_text: _RowText
    counts: dict[str, int]
    at: _Span | None = None
    start: int = 0
    # Whether the text was found only before `start`, or only in a span in which a different text was already found.
    is_elsewhere: bool = False


def _doubtful(results: Sequence[_SearchResult], rendered: _Rendered, printed: str) -> list[int]:
    """Return the indices of the results whose position may be wrong, in ascending order.

    A position may be wrong if the text occurs several times in the rendered row, overlaps another text, was found only
    in parts or where it is not expected (`is_elsewhere`), or occurs in `printed`. Roles, types and images are left out.

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


def _render(row: Row, again: Again, changes: Sequence[tuple[_Path, str]]) -> tuple[str, ...] | None:
    """Return the rendered text of a row, as pieces, after some texts of the row are replaced.

    Each change is a pair (path of a text in the row, new text). Returns None if the changed row is refused.
    """
    written: Any = row.written
    for path, text in changes:
        written = _replaced(written, path, text)
    encoded = again.encode(row, written)
    return None if encoded is None else encoded.pieces


def _search_with_markers(
    results: list[_SearchResult], doubtful: Sequence[int], rendered: _Rendered, render: _Rendering
) -> None:
    """Correct the positions of the texts in `results` whose indices are in `doubtful`.

    The row is rendered again, with a marker (a made-up word) in place of each of these texts. The position of a marker
    is the position of its text. If a marker is not printed, its text counts as not used.

    This fails if the template refuses the changed row, or if the two renderings of the row differ anywhere except at
    the markers. Then the first _MOST_ALONE of these texts are tried one by one. If this fails too for a text, its old
    position is kept.
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
    # If all texts could not be searched together, they are searched one by one.
    alone = doubtful if spans is None else [number for number in doubtful if number not in marks]
    for number in alone[:_MOST_ALONE]:
        found = _find_markers(results, {number: _marker(number)}, rendered, render)
        if found is not None:
            _store_position(results, number, found[_marker(number)], rendered)


def _marker(number: int) -> str:
    """Return a made-up word for the text with index `number`, for example 'zq00012qz'."""
    # Some templates accept only call ids of this length.
    return f'zq{number:05d}qz'


def _store_position(results: list[_SearchResult], number: int, spans: list[_Span], rendered: _Rendered) -> None:
    """Store spans[0] as the position of the text in results[number].

    If `spans` is empty, the text counts as not used.

    If the kind of the text is 'identity' (a name or an id), and `spans` has several items, spans[0] is then removed
    from `spans`. The caller may pass the same list for equal names, so that the next name gets the next span. The last
    span always stays in the list.
    """
    row_text = results[number].row_text
    if not spans:
        results[number] = _SearchResult(row_text, {NOT_USED: len(row_text.text)})
        return
    at = spans.pop(0) if len(spans) > 1 and row_text.kind == 'identity' else spans[0]
    stripped = row_text.text.strip()
    shown = stripped if rendered.text[at[0] : at[1]] == stripped else row_text.text
    results[number] = _SearchResult(row_text, rendered.count_text(row_text.text, shown, at), at)


def _forms(text: str) -> list[str]:
    """Return the forms in which a template may print a text.

    The forms are: unchanged, without the spaces around it, and with JSON escapes.
    """
    stripped = text.strip()
    json_forms = [json.dumps(one, ensure_ascii=only)[1:-1] for one in (text, stripped) for only in (False, True)]
    return list(dict.fromkeys([text, stripped, *json_forms]))


def _find_markers(
    results: Sequence[_SearchResult], marks: Mapping[int, str], rendered: _Rendered, render: _Rendering
) -> dict[str, list[_Span]] | None:
    """Return a dict from markers (made-up words) to the spans of the rendered row that they replace.

    `marks` is a dict from indices in `results` to markers. The row is rendered again with the markers in place of the
    texts at these indices, and is compared with `rendered`.

    Returns None if the changed row is refused, if anything but the texts is printed differently, or if the rendered row
    already contains one of the markers.
    """
    pieces = render([(results[number].row_text.path, mark) for number, mark in marks.items()])
    if pieces is None or any(mark in rendered.text for mark in marks.values()):
        return None
    forms = {mark: _forms(results[number].row_text.text) for number, mark in marks.items()}
    spans: dict[str, list[_Span]] = {mark: [] for mark in forms}
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


def _counted_name(name: str, counted: Mapping[str, Any]) -> str:
    """If `counted` contains `name`, or has fewer than _MOST_FIELDS names, return `name`. Else return OTHER_FIELDS."""
    return name if name in counted or len(counted) < _MOST_FIELDS else OTHER_FIELDS


@dataclass(kw_only=True)
class Account:
    """Counts the characters of many rows.

    `fields` is a dict from kinds of text to numbers of characters per outcome. `unused` is a dict from columns, keys or
    kinds of text to the number of encoded rows in which at least a part of their text is not used.

    Example of `fields`: {'user text': {'context': 9}}
    Example of `unused`: {'column `source`': 3}
    """

    fields: dict[str, dict[str, int]] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)

    def _count(self, label: str, outcome: str, characters: int) -> None:
        if characters:
            counts = self.fields.setdefault(_counted_name(label, self.fields), {})
            counts[outcome] = counts.get(outcome, 0) + characters

    def _count_unused(self, name: str, rows: int) -> None:
        name = _counted_name(name, self.unused)
        self.unused[name] = self.unused.get(name, 0) + rows

    def skip(self, raw: Mapping[str, Any], reason: str) -> None:
        """Count all characters of a row that is not trained on. Their outcome is `reason`, for example 'left out'.

        `raw` is the row before conversion to a chat. The row is not counted in `unused`.
        """
        for row_text in row_texts(raw):
            self._count(row_text.label, reason, len(row_text.text))

    def add(self, row: Row, encoded: Encoded, again: Again) -> None:
        """Count all characters of an encoded row.

        If the position of a text in the rendered row is not certain, `again` encodes the row with a marker in place of
        the text.
        """
        rendered = _Rendered(encoded)
        results = list(self._search_all(row, encoded, rendered))
        # A text that equals one of these words may be found where the template prints the word.
        printed = '\n'.join([again.printed, *_ROLES, *_other_words(row.written)])
        doubtful = _doubtful(results, rendered, printed)
        if doubtful:
            _search_with_markers(results, doubtful, rendered, functools.partial(_render, row, again))
        missed: dict[str, None] = {}
        for result in results:
            self._settle(result.row_text, result.counts, missed)
        # Several names of one row may be counted together.
        for name in dict.fromkeys(_counted_name(name, self.unused) for name in missed):
            self._count_unused(name, 1)

    def _search_all(self, row: Row, encoded: Encoded, rendered: _Rendered) -> Iterator[_SearchResult]:
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
        later: list[_RowText] = []
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
                yield _SearchResult(row_text, {NOT_USED: len(row_text.text)} if row_text.text else {})
                continue
            result, end = self._search(
                row_text, rendered, 0 if row_text.turn < 0 else begin, has_images=bool(encoded.images)
            )
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
            counts = (
                rendered.count_span(*span, len(row_text.text)) if span and own >= 0 else {NOT_USED: len(row_text.text)}
            )
            yield _SearchResult(row_text, counts, span, is_elsewhere=own < 0)

    def _settle(self, row_text: _RowText, counts: dict[str, int], missed: dict[str, None]) -> None:
        assert sum(counts.values()) == len(row_text.text), 'the parts sum to the whole'
        for outcome, count in counts.items():
            self._count(row_text.label, outcome, count)
        if counts.get(NOT_USED) and row_text.text.strip():
            missed[row_text.name] = None

    def _search(
        self, row_text: _RowText, rendered: _Rendered, start: int, *, has_images: bool
    ) -> tuple[_SearchResult, int]:
        """Search one text of the row from `start` on. Returns (result, end).

        `end` is the position at which the text, or its last part that is found, ends. It is 0 if nothing is found from
        `start` on, or if the text is not searched, such as a role.
        """
        size = len(row_text.text)
        if row_text.kind == STRUCTURE:
            return _SearchResult(row_text, {STRUCTURE: size}), 0
        if row_text.kind == 'never':
            return _SearchResult(row_text, {NOT_USED: size}), 0
        if row_text.kind == 'image' and has_images:
            return _SearchResult(row_text, {CONTEXT: size}), 0
        stripped = row_text.text.strip()
        if not stripped:
            return _SearchResult(row_text, {TRIMMED: size} if size else {}), 0
        for shown in (row_text.text, stripped):
            at = rendered.find(shown, start)
            if at is not None:
                rendered.found_spans.append(at)
                return _SearchResult(row_text, rendered.count_text(row_text.text, shown, at), at, start), at[1]
        counts, end = self._search_parts(row_text.text, rendered, start, has_images=has_images)
        # The search for the previous text may have found a later, wrong match. Then this search began too late. So
        # search again from the beginning of the row.
        early = rendered.find(stripped, 0)
        if early is not None:
            rendered.found_spans.append(early)
        return _SearchResult(row_text, counts, early, start, is_elsewhere=early is not None), end

    def _search_parts(
        self, whole: str, rendered: _Rendered, start: int, *, has_images: bool
    ) -> tuple[dict[str, int], int]:
        """Split the text `whole` at line ends and tags, and look for each part in `rendered`.

        The search begins at the position `start` of `rendered`. Returns (dict from outcomes to numbers of characters,
        end of the last found part in `rendered`). The end is 0 if no part is found.
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

    def merge(self, other: Account) -> None:
        """Add the counts of `other` to this account."""
        for label, counts in other.fields.items():
            for outcome, count in counts.items():
                self._count(label, outcome, count)
        for name, rows in other.unused.items():
            self._count_unused(name, rows)

    def lines(self, *, without: Collection[str] = ()) -> list[str]:
        """Return the counts as at most two lines. A line without content is left out.

        The columns and keys in `without` are left out of the second line, for example 'column `source`'.

        Example:
        ['text: user text: context 100 %; reply text: trained 90 %, cut 10 %', 'not used: column `source` in 3 rows']
        """
        shares = []
        for label, counts in self.fields.items():
            total = sum(counts.values())
            parts = ', '.join(f'{outcome} {100 * count / total:.4g} %' for outcome, count in counts.items())
            shares.append(f'{label}: {parts}')
        unused = {name: rows for name, rows in self.unused.items() if name not in without}
        names = ', '.join(f'{name} in {rows} row{"s" * (rows > 1)}' for name, rows in unused.items())
        return [*(['text: ' + '; '.join(shares)] if shares else []), *([f'not used: {names}'] if names else [])]

    def record(self) -> dict[str, Any]:
        """Return the counts as the JSON object that run.json and dataset_report.json store."""
        return {'fields': self.fields, 'unused': self.unused}

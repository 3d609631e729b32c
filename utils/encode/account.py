"""Counts the characters of the data by what happened to them, for example `trained` or `cut`.

Each possible outcome is a bucket. The main buckets are `trained` (carries loss), `context` (in the tokenised row,
without loss), `cut` (removed by the cut to max_length), `left out` (the whole row is not trained on) and `not used`
(not in the tokenised text of the row).

The account looks for each text of the source row in the tokenised text of the row. A text that is not found counts as
not used, for example the text of a column that conversion drops.

The search may find a wrong position, for example if the text is `a`, or is a name that is also a role. To find the
right position of such a text, the row is encoded once more, with a marker (a made-up word) instead of the text.
"""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class _Leaf(NamedTuple):
    """One text (string) of a row.

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
        """Return the text of the template itself, without the data of a row."""

    def encode(self, row: Row, written: Mapping[str, Any]) -> Encoded | None:
        """Encode the row with its columns replaced by `written`. Returns None if this row cannot be trained on."""


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
    """Yield the keys of a nested value, its numbers as strings, and the values of `type` and `required`.

    A template can print these words. If a text of the row equals such a word, the search for the text may stop at the
    printed word, which is a wrong position.
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


def _texts(value: Any, path: _Path, label: str, name: str, turn: int = -1, kind: str = 'text') -> Iterator[_Leaf]:
    """Yield a _Leaf with this label, name, turn and kind for every string in a nested value."""
    for place, text in _strings(value, path):
        yield _Leaf(label, name, text, turn, kind, place)


def _unused(value: Any, path: _Path, name: str, turn: int = -1) -> Iterator[_Leaf]:
    return _texts(value, path, name, name, turn, 'never')


def _key_of(path: _Path) -> str:
    """Return the last key on a path. Returns '' if the path has only indices."""
    return next((step for step in reversed(path) if isinstance(step, str)), '')


def _of_tools(value: Any, path: _Path) -> Iterator[_Leaf]:
    for place, text in _strings(_parsed(value), path):
        key = _key_of(place)
        nested = _parsed(text) if key == 'parameters' else text
        if nested is text:
            yield _Leaf('tools', 'tools', text, -1, STRUCTURE if key in _OF_SCHEMAS else 'text', place)
        else:
            yield from _of_tools(nested, place)


def _of_calls(value: Any, path: _Path, turn: int) -> Iterator[_Leaf]:
    calls = _parsed(value)
    if isinstance(calls, list):
        for number, call in enumerate(calls):
            yield from _of_call(call, (*path, number), turn)
    else:
        yield from _of_call(calls, path, turn)


def _of_call(call: Any, path: _Path, turn: int) -> Iterator[_Leaf]:
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


def _of_content(value: Any, path: _Path, label: str, turn: int) -> Iterator[_Leaf]:
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


def _of_item(item: Mapping[str, Any], path: _Path, label: str, turn: int) -> Iterator[_Leaf]:
    """Yield a _Leaf for every text in one item of a content list, such as {'type': 'text', 'text': ...}."""
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
) -> Iterator[_Leaf]:
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
            yield _Leaf('roles and types', key, str(value), number, STRUCTURE, at)
        elif key == content_key:
            yield from _of_content(value, at, label, number)
        elif key == reasoning:
            yield _Leaf('reasoning', name, value, number, 'text', at)
        elif key in _CALLS:
            yield from _of_calls(value, at, number)
        elif key in _IDENTITIES:
            yield from _texts(value, at, name, name, number, 'identity')
        elif key in _MARKS:
            yield from _texts(value, at, 'roles and types', key, number, STRUCTURE)
        else:
            yield from _unused(value, at, name, number)


def _of_history(history: Any) -> Iterator[_Leaf]:
    if not isinstance(history, list | tuple):
        yield from _unused(history, ('history',), 'column `history`')
        return
    for number, pair in enumerate(history):
        said = pair if isinstance(pair, list | tuple) else [pair]
        for half, (label, text) in enumerate(zip(('user text', 'reply text'), said, strict=False)):
            yield from _texts(text, ('history', number, half), label, label, 2 * number + half)


def _of_turns(value: Any, column: str, number: int = 0) -> Iterator[_Leaf]:
    """Yield the leaves of a column with a list of turns, or with one turn.

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


def _of_side(raw: Mapping[str, Any], column: str, shape: Sequence[str], rounds: int) -> Iterator[_Leaf]:
    """Yield the leaves of `column`, which has the prompt or the reply of the row.

    `shape` lists the columns of the row's format. The first of them has the prompt. `rounds` is the number of rounds in
    the history. It decides the turn of a leaf: the history has the first 2 * rounds turns of the conversation, and the
    prompt and then the reply follow.
    """
    value = raw[column]
    is_asked = column in _ASKED
    first = 2 * rounds + (not is_asked)
    prompt = raw[shape[0]]
    if not is_asked and isinstance(prompt, list):
        first = len(prompt)
    if isinstance(value, list | Mapping):
        yield from _of_turns(value, column, first)
    else:
        label = 'user text' if is_asked else 'reply text'
        yield from _texts(value, (column,), label, label, first)


def leaves(raw: Mapping[str, Any]) -> Iterator[_Leaf]:
    """Yield a _Leaf for every text of a row. `raw` is the row as it was written in the file."""
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
            yield from _of_side(raw, column, shape, last)
        elif column == 'system':
            yield from _texts(value, at, 'system text', 'system text')
        elif column == 'tools' or (column == 'functions' and not has_tools):
            yield from _of_tools(value, at)
        elif column == 'images':
            yield from _texts(_parsed(value), at, 'images', 'images', -1, 'image')
        elif column not in shape:
            yield from _unused(value, at, f'column `{column}`')


class _Text:
    """The tokenised text of a row, split into pieces: without loss, with loss, without loss, ...

    `ends` has the end of each piece, and `trained` the start of each piece with loss. `claimed` has the spans in which
    leaves (texts of the row) were found. All positions count characters of `text`.
    """

    def __init__(self, encoded: Encoded) -> None:
        self.text = ''.join(encoded.pieces)
        self.ends = list(accumulate(map(len, encoded.pieces)))
        self.cut = encoded.cut
        self.claimed: list[tuple[int, int]] = []
        self.trained = [self.ends[i - 1] for i in range(1, len(encoded.pieces), 2)]

    def find(self, text: str, start: int) -> tuple[int, int] | None:
        """Return the span (start, end) of the first match of this text at or after `start`.

        If the text does not occur, the search is repeated for the text with JSON escapes. Returns None if neither is
        found.
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

    def masked(self) -> str:
        """Return the text in which NUL characters replace the spans of `claimed`."""
        parts, position = [], 0
        for start, end in sorted(self.claimed):
            parts += [self.text[position:start], '\0' * (end - max(start, position))]
            position = max(position, end)
        return ''.join([*parts, self.text[position:]])

    def buckets(self, start: int, end: int, length: int) -> dict[str, int]:
        """Return {bucket: number of characters} for a leaf (a text of the row) that is printed at start:end.

        The possible buckets are 'cut', 'context' and 'trained'. `length` is the length of the leaf. If the printed
        text is longer or shorter, for example because of JSON escapes, the counts are scaled so that their sum is
        `length`.
        """
        found: dict[str, int] = {}
        position = start
        if position < self.cut:
            position = min(end, self.cut)
            found[CUT] = position - start
        while position < end:
            piece = bisect_right(self.ends, position)
            stop = min(end, self.ends[piece])
            bucket = TRAINED if piece % 2 else CONTEXT
            found[bucket] = found.get(bucket, 0) + stop - position
            position = stop
        if end - start != length:
            found = {bucket: count * length // (end - start) for bucket, count in found.items()}
            largest = max(found, key=lambda bucket: found[bucket])
            found[largest] += length - sum(found.values())
        return found

    def buckets_of(self, written: str, shown: str, at: _Span) -> dict[str, int]:
        """Return {bucket: number of characters} for `written`, a text of the row that is printed at the span `at`.

        `shown` is the part of `written` that is printed: all of it, or all except the whitespace around it. Whitespace
        that is not printed counts as trimmed.
        """
        found = self.buckets(*at, len(shown))
        if len(shown) < len(written):
            found[TRIMMED] = len(written) - len(shown)
        return found


class _Place(NamedTuple):
    """The result of the search for one leaf. `buckets` is {bucket: number of characters of the leaf}.

    `at` is the span in which the whole text of the leaf was found, and `start` is where the search began.
    """

    leaf: _Leaf
    buckets: dict[str, int]
    at: _Span | None = None
    start: int = 0
    # Whether the leaf was found only before `start`, or only in a span that a different leaf has claimed.
    is_elsewhere: bool = False


def _doubtful(places: Sequence[_Place], text: _Text, printed: str) -> list[int]:
    """Return the indices of the places at which the search may have found a wrong position.

    `printed` has all words that the template can print besides the texts of the row: the words of the template itself,
    the roles, and the keys and numbers of the row. A place is doubtful if its text occurs several times, overlaps
    another text, was found only in parts, or also occurs in `printed`.
    """
    spans = sorted((*place.at, number) for number, place in enumerate(places) if place.at)
    overlapping: set[int] = set()
    reach, owner = 0, -1
    for start, end, number in spans:
        if start < reach:
            overlapping |= {owner, number}
        if end > reach:
            reach, owner = end, number
    found = []
    for number, place in enumerate(places):
        leaf, buckets, at, start = place.leaf, place.buckets, place.at, place.start
        if leaf.kind not in ('text', 'identity') or not leaf.text.strip():
            continue
        if at is None:
            # The text was found only in parts. The parts may belong to a different text.
            if set(buckets) - {NOT_USED, TRIMMED, STRUCTURE}:
                found.append(number)
            continue
        shown = text.text[at[0] : at[1]]
        if (
            place.is_elsewhere
            or number in overlapping
            or shown in printed
            or text.text.find(shown, start) != text.text.rfind(shown)
        ):
            found.append(number)
    return found


def _render(row: Row, again: Again, changes: Sequence[tuple[_Path, str]]) -> tuple[str, ...] | None:
    """Encode the row with some texts replaced, and return its tokenised text as pieces.

    A change is (path of a text in the row, new text). Returns None if the changed row is refused.
    """
    written: Any = row.written
    for path, text in changes:
        written = _replaced(written, path, text)
    encoded = again.encode(row, written)
    return None if encoded is None else encoded.pieces


def _resolve(places: list[_Place], doubtful: Sequence[int], text: _Text, render: _Rendering) -> None:
    """Find the right positions of the doubtful texts, and store them in `places`.

    The row is rendered with a marker (a made-up word) in place of each of these texts. The position of a marker is the
    position of its text. A rendering is not used if it fails, or if it also differs from `text` outside the markers.
    A text without a rendering that can be used keeps its position.
    """
    whole = [number for number in doubtful if places[number].at is not None]
    marks = {number: _marker(number) for number in whole}
    # Templates compare the id of a call with the id of its result. So equal ids get equal markers at first.
    first: dict[str, int] = {}
    shared = {
        number: _marker(
            first.setdefault(places[number].leaf.text, number) if places[number].leaf.kind == 'identity' else number
        )
        for number in whole
    }
    spans = _marked(places, shared, text, render) if whole else {}
    carried = Counter(shared.values())
    if spans is not None and any(0 < len(found) < carried[mark] for mark, found in spans.items()):
        spans, shared = _marked(places, marks, text, render), marks
    if spans is not None:
        for number in whole:
            _move(places, number, spans[shared[number]], text)
    alone = doubtful if spans is None else [number for number in doubtful if number not in marks]
    for number in alone[:_MOST_ALONE]:
        found = _marked(places, {number: _marker(number)}, text, render)
        if found is not None:
            _move(places, number, found[_marker(number)], text)


def _marker(number: int) -> str:
    """Return the marker for the text with this index. It has 9 letters and digits.

    Some templates accept only call ids of this form.
    """
    return f'zq{number:05d}qz'


def _move(places: list[_Place], number: int, spans: list[_Span], text: _Text) -> None:
    """Store the first of `spans` in places[number]. Without spans, the text of places[number] counts as not used.

    `spans` are the positions at which the text is printed. Equal names or ids share one list of spans. Each call
    removes the span that it stores from this list, so that the next call stores the next span. The last span stays in
    the list, and all remaining calls store it.
    """
    leaf = places[number].leaf
    if not spans:
        places[number] = _Place(leaf, {NOT_USED: len(leaf.text)})
        return
    at = spans.pop(0) if len(spans) > 1 and leaf.kind == 'identity' else spans[0]
    stripped = leaf.text.strip()
    shown = stripped if text.text[at[0] : at[1]] == stripped else leaf.text
    places[number] = _Place(leaf, text.buckets_of(leaf.text, shown, at), at)


def _forms(text: str) -> list[str]:
    """Return the forms in which a text may be printed: unchanged, without spaces around it, or with JSON escapes."""
    stripped = text.strip()
    json_forms = [json.dumps(one, ensure_ascii=only)[1:-1] for one in (text, stripped) for only in (False, True)]
    return list(dict.fromkeys([text, stripped, *json_forms]))


def _marked(
    places: Sequence[_Place], marks: Mapping[int, str], text: _Text, render: _Rendering
) -> dict[str, list[_Span]] | None:
    """Find where the rendered row `text` prints the row's texts at some places. Returns {marker: spans of `text`}.

    `marks` is {index in `places`: marker}. The row is rendered again with the text at each of these places replaced by
    its marker, and the result is compared with `text`. Returns None if the row cannot be rendered again, or if the two
    renderings also differ outside the markers.
    """
    pieces = render([(places[number].leaf.path, mark) for number, mark in marks.items()])
    if pieces is None or any(mark in text.text for mark in marks.values()):
        return None
    forms = {mark: _forms(places[number].leaf.text) for number, mark in marks.items()}
    spans: dict[str, list[_Span]] = {mark: [] for mark in forms}
    before, *others = re.split(f'({"|".join(forms)})', ''.join(pieces))
    if not text.text.startswith(before):
        return None
    position = len(before)
    for mark, after in zip(others[::2], others[1::2], strict=True):
        form = next((form for form in forms[mark] if text.text.startswith(form + after, position)), None)
        if form is None:
            return None
        spans[mark].append((position, position + len(form)))
        position += len(form) + len(after)
    return spans if position == len(text.text) else None


def _known(name: str, counted: Mapping[str, Any]) -> str:
    """Return the name under which the field `name` is counted. `counted` has the names that are already counted.

    If `name` is new and `counted` has _MOST_FIELDS names, the result is OTHER_FIELDS. Otherwise it is `name`.
    """
    return name if name in counted or len(counted) < _MOST_FIELDS else OTHER_FIELDS


@dataclass(kw_only=True)
class Account:
    """Character counts. `fields` is {label: {bucket: number of characters}}, for example {'user text': {'context': 9}}.

    `unused` is {name of a field: number of rows in which text of this field is not used}.
    """

    fields: dict[str, dict[str, int]] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)

    def _count(self, label: str, bucket: str, characters: int) -> None:
        if characters:
            counts = self.fields.setdefault(_known(label, self.fields), {})
            counts[bucket] = counts.get(bucket, 0) + characters

    def _count_unused(self, name: str, rows: int) -> None:
        name = _known(name, self.unused)
        self.unused[name] = self.unused.get(name, 0) + rows

    def skip(self, raw: Mapping[str, Any], reason: str) -> None:
        """Count all characters of the row in the bucket `reason`, because the row is not encoded."""
        for leaf in leaves(raw):
            self._count(leaf.label, reason, len(leaf.text))

    def add(self, row: Row, encoded: Encoded, again: Again) -> None:
        """Add all characters of an encoded row to the counts."""
        text = _Text(encoded)
        places = list(self._places(row, encoded, text))
        printed = '\n'.join([again.printed, *_ROLES, *_other_words(row.written)])
        doubtful = _doubtful(places, text, printed)
        if doubtful:
            _resolve(places, doubtful, text, functools.partial(_render, row, again))
        missed: dict[str, None] = {}
        for place in places:
            self._settle(place.leaf, place.buckets, missed)
        # Several names of one row may be counted together.
        for name in dict.fromkeys(_known(name, self.unused) for name in missed):
            self._count_unused(name, 1)

    def _places(self, row: Row, encoded: Encoded, text: _Text) -> Iterator[_Place]:
        """Find each string of the row in the rendered text, in the order of the turns, and yield a _Place for it.

        Names and ids are looked for last.
        """
        found = list(leaves(row.written))
        replies = sorted({leaf.turn for leaf in found if leaf.label in ('reply text', 'reasoning', 'tool calls')})
        starts = dict(zip(replies, text.trained, strict=False)) if len(replies) == len(text.trained) else {}
        if replies and text.trained:
            starts[replies[-1]] = text.trained[-1]
        later: list[_Leaf] = []
        cursor = begin = 0
        turn = -1
        for leaf in sorted(found, key=lambda leaf: leaf.turn):
            if leaf.turn != turn:
                turn = leaf.turn
                begin = max(cursor, starts.get(turn, 0))
            if leaf.kind == 'identity':
                later.append(leaf)
                continue
            if leaf.label == 'tools' and leaf.kind != STRUCTURE and TOOLS_IGNORED in encoded.notes:
                # The tools are not printed. A search could find the name of a tool in a call, which would be wrong.
                yield _Place(leaf, {NOT_USED: len(leaf.text)} if leaf.text else {})
                continue
            place, end = self._place(leaf, text, 0 if leaf.turn < 0 else begin, has_images=bool(encoded.images))
            cursor = max(cursor, end) if leaf.turn >= 0 else cursor
            yield place
        for leaf in later:
            # A found identity claims its span. So a name that is printed once is not counted for two equal names.
            shown = leaf.text.strip()
            own = text.masked().find(shown) if shown else -1
            at = own if own >= 0 or not shown else text.text.find(shown)
            span = (at, at + len(shown)) if at >= 0 else None
            if span:
                text.claimed.append(span)
            buckets = text.buckets(*span, len(leaf.text)) if span and own >= 0 else {NOT_USED: len(leaf.text)}
            yield _Place(leaf, buckets, span, is_elsewhere=own < 0)

    def _settle(self, leaf: _Leaf, buckets: dict[str, int], missed: dict[str, None]) -> None:
        assert sum(buckets.values()) == len(leaf.text), 'the parts sum to the whole'
        for bucket, count in buckets.items():
            self._count(leaf.label, bucket, count)
        if buckets.get(NOT_USED) and leaf.text.strip():
            missed[leaf.name] = None

    def _place(self, leaf: _Leaf, text: _Text, start: int, *, has_images: bool) -> tuple[_Place, int]:
        """Return (_Place of a leaf, position in the text at which the leaf ends).

        The position is 0 if the leaf is not found.
        """
        size = len(leaf.text)
        if leaf.kind == STRUCTURE:
            return _Place(leaf, {STRUCTURE: size}), 0
        if leaf.kind == 'never':
            return _Place(leaf, {NOT_USED: size}), 0
        if leaf.kind == 'image' and has_images:
            return _Place(leaf, {CONTEXT: size}), 0
        stripped = leaf.text.strip()
        if not stripped:
            return _Place(leaf, {TRIMMED: size} if size else {}), 0
        for shown in (leaf.text, stripped):
            at = text.find(shown, start)
            if at is not None:
                text.claimed.append(at)
                return _Place(leaf, text.buckets_of(leaf.text, shown, at), at, start), at[1]
        buckets, end = self._place_parts(leaf.text, text, start, has_images=has_images)
        # The search for the previous text may have found a later, wrong match. Then this search began too late. So
        # search again from the beginning of the row.
        early = text.find(stripped, 0)
        if early is not None:
            text.claimed.append(early)
        return _Place(leaf, buckets, early, start, is_elsewhere=early is not None), end

    def _place_parts(self, whole: str, text: _Text, start: int, *, has_images: bool) -> tuple[dict[str, int], int]:
        """Split `whole` at line ends and at tags, and look for each part in `text`.

        Returns ({bucket: number of characters} of all parts, position at which the last found part ends).
        """
        buckets: dict[str, int] = {}
        end = 0
        for part in _SEPARATE.split(whole):
            stripped = part.strip()
            at = text.find(stripped, max(start, end)) if stripped else None
            found = {TRIMMED: len(part) - len(stripped)}
            if at is not None:
                text.claimed.append(at)
                end = at[1]
                found |= text.buckets(*at, len(stripped))
            elif stripped.startswith('<img>') and has_images:
                found[CONTEXT] = len(stripped)
            elif stripped and _SEPARATE.fullmatch(stripped):
                found[STRUCTURE] = len(stripped)
            else:
                found[NOT_USED] = len(stripped)
            for bucket, count in found.items():
                buckets[bucket] = buckets.get(bucket, 0) + count
        return {bucket: count for bucket, count in buckets.items() if count}, end

    def merge(self, other: Account) -> None:
        """Add the counts of `other` to this account."""
        for label, counts in other.fields.items():
            for bucket, count in counts.items():
                self._count(label, bucket, count)
        for name, rows in other.unused.items():
            self._count_unused(name, rows)

    def lines(self) -> list[str]:
        """Return at most two lines of text.

        The first line says for each label which percentage of its characters is in each bucket. The second line names
        the unused fields. A line that would be empty is left out.
        """
        shares = []
        for label, counts in self.fields.items():
            total = sum(counts.values())
            parts = ', '.join(f'{bucket} {100 * count / total:.4g} %' for bucket, count in counts.items())
            shares.append(f'{label}: {parts}')
        names = ', '.join(f'{name} in {rows} row{"s" * (rows > 1)}' for name, rows in self.unused.items())
        return [*(['text: ' + '; '.join(shares)] if shares else []), *([f'not used: {names}'] if names else [])]

    def record(self) -> dict[str, Any]:
        """Return the counts as the JSON object that run.json and dataset_report.json store."""
        return {'fields': self.fields, 'unused': self.unused}

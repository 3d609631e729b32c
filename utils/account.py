"""The account of every character of the data: trained, context, cut, left out, or not used, by name.

It reads rows as they were written, by itself: a field that conversion drops is still seen here, and not found in the
text that was tokenised.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from utils.preprocess import TOOLS_IGNORED, Encoded, Row
from utils.text_tokenizer import CLOSE_TAG, OPEN_TAG

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
_IDENTITIES = ('name', 'id', 'tool_call_id')
_MARKS = ('weight', 'loss', 'train')
_EVERYWHERE = ('system', 'tools', 'functions', 'images')
# The columns of each shape of a row; the first that fits counts.
_SHAPES = (
    ('messages',),
    ('conversations',),
    ('query', 'response', 'history'),
    ('instruction', 'output', 'input', 'history'),
)
_SEPARATE = re.compile(rf'({OPEN_TAG}|{CLOSE_TAG}|<img>.*?</img>|\n)')


class _Leaf(NamedTuple):
    """One text of a row: what it is, under which name it is missed, and its turn (-1: none)."""

    label: str
    name: str
    text: str
    turn: int
    # 'text', 'identity', 'structure', 'image' or 'never'.
    kind: str = 'text'


def _parsed(value: Any) -> Any:
    """Return the list or object that a text writes as JSON; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ('[', '{'):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list | dict) else value


def _strings(value: Any, key: str = '') -> Iterator[tuple[str, str]]:
    """Yield every text of a nested value with its nearest key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, key)


def _unused(value: Any, name: str, turn: int = -1) -> Iterator[_Leaf]:
    for _, text in _strings(value):
        yield _Leaf(name, name, text, turn, 'never')


def _of_tools(value: Any) -> Iterator[_Leaf]:
    for key, text in _strings(_parsed(value)):
        nested = _parsed(text) if key == 'parameters' else text
        if nested is text:
            yield _Leaf('tools', 'tools', text, -1, STRUCTURE if key == 'type' else 'text')
        else:
            yield from _of_tools(nested)


def _of_calls(value: Any, turn: int) -> Iterator[_Leaf]:
    calls = _parsed(value)
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, Mapping):
            yield from (_Leaf('tool calls', 'tool calls', text, turn) for _, text in _strings(call))
            continue
        for key, item in call.items():
            if key == 'function' and isinstance(item, Mapping):
                yield from _of_calls(item, turn)
            elif key in ('name', 'arguments'):
                yield from (_Leaf('tool calls', 'tool calls', text, turn) for _, text in _strings(_parsed(item)))
            elif key in ('id', 'type'):
                kind = 'identity' if key == 'id' else STRUCTURE
                yield from (
                    _Leaf('tool calls', f'tool call key `{key}`', text, turn, kind) for _, text in _strings(item)
                )
            else:
                yield from _unused(item, f'tool call key `{key}`', turn)


def _of_content(value: Any, label: str, turn: int) -> Iterator[_Leaf]:
    if label == 'tool calls':
        yield from _of_calls(value, turn)
    elif not isinstance(value, list):
        yield from (_Leaf(label, label, text, turn) for _, text in _strings(value))
    else:
        for item in value:
            if not isinstance(item, Mapping):
                yield from _unused(item, label, turn)
                continue
            image = 'image' if item.get('image') else 'path'
            for key, part in item.items():
                if key == 'type':
                    yield from (_Leaf('roles and types', key, text, turn, STRUCTURE) for _, text in _strings(part))
                elif key == 'text' and item.get('type') == 'text':
                    yield from (_Leaf(label, label, text, turn) for _, text in _strings(part))
                elif key == image and item.get('type') == 'image':
                    yield from (_Leaf('images', 'images', text, turn, 'image') for _, text in _strings(part))
                else:
                    yield from _unused(part, f'content item key `{key}`', turn)


def _of_turn(turn: Mapping[str, Any], number: int, keys: tuple[str, str], contents: tuple[str, str]) -> Iterator[_Leaf]:
    role_key = next((key for key in keys if key in turn), keys[0])
    content_key = next((key for key in contents if key in turn), contents[0])
    label = _TEXTS.get(str(turn.get(role_key)).strip().lower(), 'reply text')
    # The first key that holds anything counts.
    reasoning = next((key for key in _REASONING if isinstance(turn.get(key), str) and turn[key].strip()), '')
    for key, value in turn.items():
        if value is None:
            continue
        name = f'message key `{key}`'
        if key == role_key:
            yield _Leaf('roles and types', key, str(value), number, STRUCTURE)
        elif key == content_key:
            yield from _of_content(value, label, number)
        elif key == reasoning:
            yield _Leaf('reasoning', name, value, number)
        elif key in _CALLS:
            yield from _of_calls(value, number)
        elif key in _IDENTITIES:
            yield from (_Leaf(name, name, text, number, 'identity') for _, text in _strings(value))
        elif key in _MARKS:
            yield from (_Leaf('roles and types', key, text, number, STRUCTURE) for _, text in _strings(value))
        else:
            yield from _unused(value, name, number)


def leaves(raw: Mapping[str, Any]) -> Iterator[_Leaf]:
    """Yield every text of a row as it was written."""
    shape = next((columns for columns in _SHAPES if all(c in raw for c in columns[:2])), ())
    after = {'query': 'user text', 'instruction': 'user text', 'input': 'user text', 'response': 'reply text',
             'output': 'reply text'}  # fmt: skip
    history = _parsed(raw.get('history')) if 'history' in shape else None
    last = len(history) if isinstance(history, list | tuple) else 0
    if isinstance(history, list | tuple):
        for number, pair in enumerate(history):
            said = pair if isinstance(pair, list | tuple) else [pair]
            for label, text in zip(('user text', 'reply text'), said, strict=False):
                yield from (
                    _Leaf(label, label, part, 2 * number + (label == 'reply text')) for _, part in _strings(text)
                )
    elif history is not None:
        yield from _unused(history, 'column `history`')
    has_tools = bool(_parsed(raw.get('tools')))
    for column, value in raw.items():
        if column in shape and column in ('messages', 'conversations'):
            keys, contents = ('role', 'from'), ('content', 'value')
            if column == 'conversations':
                keys, contents = ('from', 'role'), ('value', 'content')
            turns = _parsed(value)
            for number, turn in enumerate(turns if isinstance(turns, list | tuple) else [turns]):
                if isinstance(turn, Mapping):
                    yield from _of_turn(turn, number, keys, contents)
                else:
                    yield from _unused(turn, f'column `{column}`')
        elif column in shape and column in after:
            label = after[column]
            turn = 2 * last + (label == 'reply text')
            yield from (_Leaf(label, label, text, turn) for _, text in _strings(value))
        elif column == 'system':
            yield from (_Leaf('system text', 'system text', text, -1) for _, text in _strings(value))
        elif column == 'tools' or (column == 'functions' and not has_tools):
            yield from _of_tools(value)
        elif column == 'images':
            yield from (_Leaf('images', 'images', text, -1, 'image') for _, text in _strings(_parsed(value)))
        elif column not in shape:
            yield from _unused(value, f'column `{column}`')


class _Text:
    """The text that was tokenised, and where its parts begin."""

    def __init__(self, encoded: Encoded) -> None:
        self.text = ''.join(encoded.pieces)
        self.ends = list(accumulate(map(len, encoded.pieces)))
        self.cut = encoded.cut
        self.claimed: list[tuple[int, int]] = []
        self.trained = [self.ends[i - 1] for i in range(1, len(encoded.pieces), 2)]

    def find(self, text: str, start: int) -> tuple[int, int] | None:
        """Return where a text stands, as it is or as JSON writes it."""
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
        """Return the text without what leaves have claimed."""
        parts, position = [], 0
        for start, end in sorted(self.claimed):
            parts += [self.text[position:start], '\0' * (end - max(start, position))]
            position = max(position, end)
        return ''.join([*parts, self.text[position:]])

    def buckets(self, start: int, end: int, characters: int) -> dict[str, int]:
        """Return how many of a leaf's characters, found here, are cut, context and trained."""
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
        if end - start != characters:
            found = {bucket: count * characters // (end - start) for bucket, count in found.items()}
            largest = max(found, key=lambda bucket: found[bucket])
            found[largest] += characters - sum(found.values())
        return found


@dataclass(kw_only=True)
class Account:
    """Characters by label and bucket, and how many rows have what is not used."""

    fields: dict[str, dict[str, int]] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)

    def _count(self, label: str, bucket: str, characters: int) -> None:
        if characters:
            counts = self.fields.setdefault(label, {})
            counts[bucket] = counts.get(bucket, 0) + characters

    def skip(self, raw: Mapping[str, Any], reason: str) -> None:
        """Count a row that is not encoded."""
        for leaf in leaves(raw):
            self._count(leaf.label, reason, len(leaf.text))

    def add(self, row: Row, encoded: Encoded) -> None:
        """Count every character of a row as it was written by what became of it."""
        text = _Text(encoded)
        found = list(leaves(row.written))
        replies = sorted({leaf.turn for leaf in found if leaf.label in ('reply text', 'reasoning', 'tool calls')})
        starts = dict(zip(replies, text.trained, strict=False)) if len(replies) == len(text.trained) else {}
        if replies and text.trained:
            starts[replies[-1]] = text.trained[-1]
        missed: dict[str, None] = {}
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
                # Their words may stand in the row all the same, in a call: that is not the tool.
                self._settle(leaf, {NOT_USED: len(leaf.text)} if leaf.text else {}, missed)
                continue
            start = 0 if leaf.turn < 0 else begin
            buckets, end = self._place(leaf, text, start, has_images=bool(encoded.images))
            cursor = max(cursor, end) if leaf.turn >= 0 else cursor
            self._settle(leaf, buckets, missed)
        for leaf in later:
            # Each takes a place of its own, so that one that is printed does not stand for one that is not.
            shown = leaf.text.strip()
            at = text.masked().find(shown) if shown else -1
            buckets = {NOT_USED: len(leaf.text)}
            if at >= 0:
                text.claimed.append((at, at + len(shown)))
                buckets = text.buckets(at, at + len(shown), len(leaf.text))
            self._settle(leaf, buckets, missed)
        for name in missed:
            self.unused[name] = self.unused.get(name, 0) + 1

    def _settle(self, leaf: _Leaf, buckets: dict[str, int], missed: dict[str, None]) -> None:
        assert sum(buckets.values()) == len(leaf.text), 'the parts sum to the whole'
        for bucket, count in buckets.items():
            self._count(leaf.label, bucket, count)
        if buckets.get(NOT_USED) and leaf.text.strip():
            missed[leaf.name] = None

    def _place(self, leaf: _Leaf, text: _Text, start: int, *, has_images: bool) -> tuple[dict[str, int], int]:
        """Return a leaf's characters by bucket, and where it ends in the text."""
        size = len(leaf.text)
        if leaf.kind == STRUCTURE:
            return {STRUCTURE: size}, 0
        if leaf.kind == 'never':
            return {NOT_USED: size}, 0
        if leaf.kind == 'image' and has_images:
            return {CONTEXT: size}, 0
        stripped = leaf.text.strip()
        if not stripped:
            return ({TRIMMED: size} if size else {}), 0
        for shown in (leaf.text, stripped):
            at = text.find(shown, start)
            if at is not None:
                text.claimed.append(at)
                buckets = text.buckets(*at, len(shown))
                if len(shown) < size:
                    buckets[TRIMMED] = size - len(shown)
                return buckets, at[1]
        return self._place_parts(leaf.text, text, start, has_images=has_images)

    def _place_parts(self, whole: str, text: _Text, start: int, *, has_images: bool) -> tuple[dict[str, int], int]:
        """Return the same of a text that does not stand there whole: by lines, and around think tags and images."""
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
        """Add what another account counted."""
        for label, counts in other.fields.items():
            for bucket, count in counts.items():
                self._count(label, bucket, count)
        for name, rows in other.unused.items():
            self.unused[name] = self.unused.get(name, 0) + rows

    def lines(self) -> list[str]:
        """Return one line with the shares of each label, and one that names what is not used."""
        shares = []
        for label, counts in self.fields.items():
            total = sum(counts.values())
            parts = ', '.join(f'{bucket} {100 * count / total:.4g} %' for bucket, count in counts.items())
            shares.append(f'{label}: {parts}')
        names = ', '.join(f'{name} in {rows} row{"s" * (rows > 1)}' for name, rows in self.unused.items())
        return [*(['text: ' + '; '.join(shares)] if shares else []), *([f'not used: {names}'] if names else [])]

    def record(self) -> dict[str, Any]:
        """Return the numbers for files."""
        return {'fields': self.fields, 'unused': self.unused}

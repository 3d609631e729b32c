"""Lists the texts (strings) of a row as it was written, each with what it is and where it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from utils.formats.json_text import JsonParser, json_as_written

# The kind of a text that says how the row is printed or trained, such as a role. It is not searched.
STRUCTURE = 'structure'

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
# Keys of a tool whose values decide how the tool is printed. Some templates print these values in other words.
_OF_SCHEMAS = ('type', 'required')
# The columns of each row format. The first two columns are required. The first format that fits the row is used.
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

# The keys and indices that lead to a text in a row.
TextPath = tuple[str | int, ...]


class RowText(NamedTuple):
    """One text (string) of a row, before a template is applied.

    `label` is the kind of text under which its characters are counted, e.g. 'user text'. `name` is the column or key
    that is reported if the text is not used, e.g. 'column `source`'. `turn` is the index of the turn that contains the
    text. It is -1 if no turn contains the text.
    """

    label: str
    name: str
    text: str
    turn: int
    # One of 'text', 'identity' (the name or an id of a message, or the id of a tool call), 'structure' (e.g. a role),
    # 'image' and 'never' (never printed).
    kind: str = 'text'
    # The keys and indices that lead to the text in the row. If a value on this path is JSON text, the path continues in
    # the parsed value.
    path: TextPath = ()


def _parsed(value: Any) -> Any:
    """If the value is JSON text of a list or object, return the list or object. Else return the value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ('[', '{'):
        return value
    try:
        found = JsonParser().parse(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list | dict) else value


def replaced(value: Any, path: TextPath, text: str) -> Any:
    """Return a copy of a nested value in which `text` replaces the text at `path`.

    If a value on this path is JSON text, it is parsed, changed and written as JSON text again.
    """
    if not path:
        return text
    whole = _parsed(value)
    key, rest = path[0], path[1:]
    if isinstance(whole, Mapping):
        made: Any = {**whole, key: replaced(whole[key], rest, text)}
    else:
        made = list(whole)
        made[key] = replaced(made[key], rest, text)
    return json_as_written(made, default=str) if isinstance(value, str) else made


def _strings(value: Any, path: TextPath) -> Iterator[tuple[TextPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, (*path, name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _strings(item, (*path, number))


def other_words(value: Any) -> Iterator[str]:
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
            yield from other_words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from other_words(item)
    elif not isinstance(value, str):
        yield str(value)


def _texts(value: Any, path: TextPath, label: str, name: str, turn: int = -1, kind: str = 'text') -> Iterator[RowText]:
    """Yield a RowText with this label, name, turn and kind for every string in a nested value."""
    for place, text in _strings(value, path):
        yield RowText(label, name, text, turn, kind, place)


def _unused(value: Any, path: TextPath, name: str, turn: int = -1) -> Iterator[RowText]:
    return _texts(value, path, name, name, turn, 'never')


def _key_of(path: TextPath) -> str:
    """Return the last key on a path. Returns '' if the path has only indices."""
    return next((step for step in reversed(path) if isinstance(step, str)), '')


def _of_tools(value: Any, path: TextPath) -> Iterator[RowText]:
    for place, text in _strings(_parsed(value), path):
        key = _key_of(place)
        nested = _parsed(text) if key == 'parameters' else text
        if nested is text:
            yield RowText('tools', 'tools', text, -1, STRUCTURE if key in _OF_SCHEMAS else 'text', place)
        else:
            yield from _of_tools(nested, place)


def _of_calls(value: Any, path: TextPath, turn: int) -> Iterator[RowText]:
    calls = _parsed(value)
    if isinstance(calls, list):
        for number, call in enumerate(calls):
            yield from _of_call(call, (*path, number), turn)
    else:
        yield from _of_call(calls, path, turn)


def _of_call(call: Any, path: TextPath, turn: int) -> Iterator[RowText]:
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


def _of_content(value: Any, path: TextPath, label: str, turn: int) -> Iterator[RowText]:
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


def _of_item(item: Mapping[str, Any], path: TextPath, label: str, turn: int) -> Iterator[RowText]:
    """Yield a RowText for every text in one item of a content list, such as {'type': 'text', 'text': ...}."""
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
    turn: Mapping[str, Any], path: TextPath, number: int, keys: tuple[str, str], contents: tuple[str, str]
) -> Iterator[RowText]:
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
            yield RowText('roles and types', key, str(value), number, STRUCTURE, at)
        elif key == content_key:
            yield from _of_content(value, at, label, number)
        elif key == reasoning:
            yield RowText('reasoning', name, value, number, 'text', at)
        elif key in _CALLS:
            yield from _of_calls(value, at, number)
        elif key in _IDENTITIES:
            yield from _texts(value, at, name, name, number, 'identity')
        elif key in _MARKS:
            yield from _texts(value, at, 'roles and types', key, number, STRUCTURE)
        else:
            yield from _unused(value, at, name, number)


def _of_history(history: Any) -> Iterator[RowText]:
    if not isinstance(history, list | tuple):
        yield from _unused(history, ('history',), 'column `history`')
        return
    for number, pair in enumerate(history):
        said = pair if isinstance(pair, list | tuple) else [pair]
        for half, (label, text) in enumerate(zip(('user text', 'reply text'), said, strict=False)):
            yield from _texts(text, ('history', number, half), label, label, 2 * number + half)


def _of_turns(value: Any, column: str, number: int = 0) -> Iterator[RowText]:
    """Yield a RowText for every string in a column of turns, such as `messages`.

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


def _texts_of_column(raw: Mapping[str, Any], column: str, columns: Sequence[str], rounds: int) -> Iterator[RowText]:
    """Yield a RowText for every string in a question or reply column, for example `query` or `response`.

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


def row_texts(raw: Mapping[str, Any]) -> Iterator[RowText]:
    """Yield a RowText for every string in a row. `raw` is the row before conversion to a chat."""
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

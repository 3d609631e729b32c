"""Converters from rows in the known formats to conversations.

A converter is a pure function. It returns a Row, or raises BadRow if the row cannot be converted. `check_row` then
checks whether the Row can be used for training.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from utils.formats.conversation import BadRow, Message, Row
from utils.formats.json_text import JsonParser, repeated_key

# Names of roles in data files, in lower case, and the role that each name means. The content of a 'call' turn is a
# tool call.
_ROLES = {
    'system': 'system',
    'developer': 'system',
    'user': 'user',
    'human': 'user',
    'assistant': 'assistant',
    'gpt': 'assistant',
    'chatgpt': 'assistant',
    'ai': 'assistant',
    'model': 'assistant',
    'bot': 'assistant',
    'function_call': 'call',
    'tool_call': 'call',
    'tool': 'tool',
    'observation': 'tool',
    'function': 'tool',
    'function_response': 'tool',
    'tool_response': 'tool',
}
_REASONING_KEYS = ('reasoning_content', 'reasoning', 'thinking')
_LOSS_KEYS = ('weight', 'loss', 'train')
_LOSS_VALUES = {'0': False, '0.0': False, 'false': False, '1': True, '1.0': True, 'true': True}

# Notes about rows that are used in training.
ARGUMENTS_NOT_OBJECT = 'the arguments of a tool call are not a JSON object: used unchanged'
PARAMETERS_NOT_OBJECT = 'the parameters of a tool are text that is not a JSON object: used unchanged'
EMPTY_REPLY = 'an empty earlier reply: it never carries loss'
EMPTY_QUESTION = 'an empty question'
SAME_ROLE_TWICE = {'user': 'a user turn after a user turn', 'assistant': 'an assistant turn after an assistant turn'}
NO_LOSS_REQUESTED = 'a reply carries no loss because the row says so (`weight`, `loss` or `train`)'
NOT_A_NUMBER = 'a cell is NaN or Infinity: read as missing'
RATED_BAD = 'the column `label` is false, so the reply is rated as bad; --columns label= trains it all the same'
NO_USER_TURN = 'a reply directly after the system text, without a user turn'


@dataclass(frozen=True)
class _Remarks:
    """The unused columns and keys of a row, and the notes about the row.

    Both are stored as the keys of a dict, which keeps the order and drops repetitions.
    """

    unused: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def note_unused(self, values: Mapping[str, Any], used: Collection[str], what: str) -> None:
        """Record each key that is not in `used` and whose value is not empty.

        A record is the word `what` and the key, for example 'column `id`'.
        """
        for key, value in values.items():
            if key not in used and not _is_empty(value):
                self.unused[f'{what} `{key}`'] = None


def _is_missing(value: Any) -> bool:
    """Return whether a cell is missing: null, NaN or infinite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _is_empty(value: Any) -> bool:
    """Return whether a value is missing, whitespace, or a list or object that contains only empty values."""
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_empty, value))
    return _is_missing(value) or (isinstance(value, str) and not value.strip())


def _cell(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a cell. Returns None if the cell is missing."""
    value = row.get(column)
    return None if _is_missing(value) else value


def _text(value: Any, what: str, column: str = '') -> str:
    """Return a text unchanged, or a number as text. Raises BadRow for any other value.

    `what` names the value in the error message.
    """
    if _is_missing(value):
        raise BadRow(f'null {what}', column or what)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f'{what} is a {type(value).__name__}, not text', column or what)
    return str(value)


def _parsed(text: str, remarks: _Remarks) -> Any:
    """Return the value of a JSON text, and note keys that occur twice.

    Raises ValueError if the text is not JSON, or RecursionError if it is nested too deeply.
    """
    parser = JsonParser()
    value = parser.parse(text)
    remarks.notes.update(dict.fromkeys(map(repeated_key, parser.repeated)))
    return value


def _parse_json(value: Any, column: str, remarks: _Remarks) -> Any:
    """Return the value of a cell that should have a list or an object. Returns None if the cell has only whitespace.

    Text is parsed as JSON, because a cell of a CSV file is always text. Raises BadRow if the text is not JSON. Any
    other value is returned unchanged.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None

    try:
        return _parsed(value, remarks)
    except (ValueError, RecursionError):
        raise BadRow(f'{column} is text that is not JSON', column) from None


def _parse_object(value: Any, remarks: _Remarks) -> Any:
    """Return the object if the value is the JSON text of an object. Any other value is returned unchanged."""
    if not isinstance(value, str):
        return value

    try:
        parsed = _parsed(value, remarks)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _check_json(value: Any, column: str) -> None:
    """Raise BadRow if JSON cannot represent the value, for example NaN, or a date from a parquet file."""

    def refuse(item: Any) -> NoReturn:
        raise BadRow(f'{column} holds a {type(item).__name__}, which JSON cannot represent', column)

    try:
        json.dumps(value, allow_nan=False, default=refuse)
    except TypeError:
        raise BadRow(f'{column} has a key that is not text', column) from None
    except RecursionError:
        raise BadRow(f'{column} is nested too deeply', column) from None
    except BadRow:
        raise
    except ValueError:
        raise BadRow(f'{column} holds NaN or Infinity, which JSON cannot represent', column) from None


def _images(row: Mapping[str, Any], remarks: _Remarks) -> list[str]:
    """Return the paths in the column `images`. A cell is one path, a list of paths, or a list of paths as JSON text.

    Raises BadRow for any other value. Returns [] if the cell is missing or empty.
    """
    images = _cell(row, 'images')
    if isinstance(images, str) and not images.lstrip().startswith('['):
        images = [images] if images else []
    images = _parse_json(images, 'images', remarks) or []
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise BadRow('images is neither a path nor a list of paths', 'images')
    return images


def _content(value: Any, what: str, column: str, remarks: _Remarks) -> str:
    """Return the content of a turn as text. If the content is a list of items, each image becomes an <img> tag.

    Raises BadRow if an item is neither text nor an image.
    """
    if not isinstance(value, list):
        return _text(value, what, column)

    parts = []
    for item in value:
        kind = item.get('type') if isinstance(item, dict) else None
        if kind == 'image':
            key = 'image' if item.get('image') else 'path'
            parts.append(f'<img>{_text(item.get(key) or "", "an image item", column)}</img>')
        elif kind == 'text':
            key = 'text'
            parts.append(_text(item.get(key), what, column))
        else:
            raise BadRow(f'{what} has an item of type {kind}; known types are text and image', column)
        remarks.note_unused(item, ('type', key), 'content item key')
    return ''.join(parts)


def _tool(tool: dict[str, Any], remarks: _Remarks) -> dict[str, Any]:
    """Return a tool as {'type': 'function', 'function': {...}}.

    Parameters that are the JSON text of an object are parsed. Other parameters are returned unchanged.
    """
    wrapped = tool if 'function' in tool else {'type': 'function', 'function': tool}
    function = wrapped['function']
    if not isinstance(function, dict) or not isinstance(function.get('parameters'), str):
        return wrapped

    parameters = _parse_object(function['parameters'], remarks)
    if isinstance(parameters, str):
        remarks.notes[PARAMETERS_NOT_OBJECT] = None
    return {**wrapped, 'function': {**function, 'parameters': parameters}}


def _tools(row: Mapping[str, Any], remarks: _Remarks) -> list[Any] | None:
    """Return the tools of a row from the column `tools`, or, if it is empty, from `functions` (the older name).

    Returns None if the row has no tools. Raises BadRow if the tools are not a list of objects.
    """
    given = {column: _parse_json(_cell(row, column), column, remarks) for column in ('tools', 'functions')}
    column = 'tools' if given['tools'] else 'functions'
    tools = given[column]
    if not tools:
        return None

    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f'{column} is not a list of objects', column)
    _check_json(tools, column)
    if column == 'tools' and given['functions']:
        remarks.note_unused({'functions': given['functions']}, (), 'column')
    return [_tool(tool, remarks) for tool in tools]


def _call(call: Any, remarks: _Remarks) -> dict[str, Any]:
    """Return a call as {'type': 'function', 'function': {...}}. Arguments that are JSON text of an object are parsed.

    Raises BadRow if the call has no name or a type other than function.
    """
    wrapper = call if isinstance(call, dict) and 'function' in call else {'function': call}
    kind = wrapper.get('type') or 'function'
    function = wrapper['function']
    if kind != 'function':
        raise BadRow(f"a tool call of type '{kind}'; the only known type is function")
    if not isinstance(function, dict) or not isinstance(function.get('name'), str) or not function['name']:
        raise BadRow('a function call has no name')

    own_id = {'id', 'type'} if function is call else set()
    remarks.note_unused(wrapper, ('type', 'id', 'function'), 'tool call key')
    remarks.note_unused(function, {'name', 'arguments', *own_id}, 'tool call key')

    arguments = function.get('arguments')
    if _is_missing(arguments) or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    arguments = _parse_object(arguments, remarks)
    if not isinstance(arguments, dict):
        remarks.notes[ARGUMENTS_NOT_OBJECT] = None

    made: dict[str, Any] = {'type': 'function'}
    call_id = call.get('id')
    if not _is_empty(call_id):
        made['id'] = _text(call_id, 'the id of a tool call')
    made['function'] = _in_order_of(function, {'name': function['name'], 'arguments': arguments})
    return _in_order_of(wrapper, made)


def _in_order_of(written: Mapping[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Return `made` with its keys in the order of `written`, because some templates print the whole object.

    If `written` has no `type`, `type` comes first. All other keys that are not in `written` come last.
    """
    positions = {key: position for position, key in enumerate(written)}
    positions.setdefault('type', -1)
    return dict(sorted(made.items(), key=lambda item: positions.get(item[0], len(written))))


def _calls(calls: Any, column: str, remarks: _Remarks) -> list[dict[str, Any]]:
    """Return a list of converted calls. `calls` is a list of calls, or one call.

    Raises BadRow for any other value, and for a call that cannot be converted.
    """
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
        raise BadRow('tool_calls is not a list of objects', column)
    made = [_call(call, remarks) for call in calls]
    _check_json(made, 'tool_calls')
    return made


def _calls_in_text(content: str, column: str, remarks: _Remarks) -> list[dict[str, Any]]:
    """Return the tool calls of a turn with the role 'call'. `content` is one call or a list of calls as JSON text.

    Raises BadRow if `content` is anything else.
    """
    try:
        parsed = _parsed(content, remarks)
    except (ValueError, RecursionError):
        raise BadRow('a function call is not JSON') from None

    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) for call in calls):
        raise BadRow('a function call has no name')
    return _calls(calls, column, remarks)


def _loss(turn: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Return (key, value) of the key that says whether the turn carries loss, for example ('weight', False).

    Returns None if the turn has no such key. Raises BadRow if the value is unknown, or if two keys contradict each
    other.
    """
    found: dict[str, bool] = {}
    for key in _LOSS_KEYS:
        value = turn.get(key)
        if _is_empty(value):
            continue

        carries = _LOSS_VALUES.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None
        if carries is None:
            shown = value if isinstance(value, str | int | float) else type(value).__name__
            raise BadRow(f"the message key `{key}` is '{shown}'; known values are 0, 1, true and false")
        found[key] = carries

    if len(set(found.values())) > 1:
        raise BadRow(f'the message keys {" and ".join(f"`{key}`" for key in found)} contradict each other')
    return next(iter(found.items()), None)


class _Turn:
    """A turn of the source row. It records which keys are read, so that the unused keys can be reported."""

    def __init__(self, turn: Mapping[str, Any], column: str, remarks: _Remarks) -> None:
        self.turn = turn
        self.column = column
        self.remarks = remarks
        self.used: set[str] = set()

    def first(self, keys: Sequence[str]) -> Any:
        """Return the first value of these keys that is not empty. Returns None if all values are empty."""
        for key in keys:
            if not _is_empty(self.turn.get(key)):
                self.used.add(key)
                value = self.turn[key]
                # A different key with the same value counts as used, because ignoring it loses no data.
                self.used.update(other for other in keys if self.turn.get(other) == value)
                return value
        return None

    def calls(self) -> list[dict[str, Any]]:
        """Return the tool calls of an assistant turn. Returns [] if the turn has no calls."""
        calls = _parse_json(self.first(['tool_calls']), 'tool_calls', self.remarks)
        if not calls:
            calls = _parse_json(self.first(['function_call']), 'function_call', self.remarks)
        return _calls(calls, self.column, self.remarks) if calls else []

    def message(self, role: str, role_key: str, content_key: str) -> Message:
        """Return the turn as a message. The keys of the turn that are not in the message are recorded as unused.

        Raises BadRow if the turn cannot be converted.
        """
        self.used |= {role_key, content_key}
        content = self.turn.get(content_key)
        calls = self.calls() if role == 'assistant' else []
        if calls and _is_missing(content):
            content = ''
        text = _content(content, f'{role} turn', self.column, self.remarks)
        if role == 'call':
            role = 'assistant'
            calls = _calls_in_text(text, self.column, self.remarks)
            text = ''

        message: Message = {'role': role, 'content': text}
        if calls:
            message['tool_calls'] = calls
        if name := self.first(['name']):
            message['name'] = _text(name, 'the name of a turn', self.column)
        if role == 'tool' and (call_id := self.first(['tool_call_id'])):
            message['tool_call_id'] = _text(call_id, 'tool_call_id', self.column)
        if role == 'assistant' and (reasoning := self.first(_REASONING_KEYS)):
            message['reasoning'] = _text(reasoning, 'reasoning', self.column)
        self._set_loss(message)

        self.remarks.note_unused(self.turn, self.used, 'message key')
        return message

    def _set_loss(self, message: Message) -> None:
        """Set the key `loss` of a reply if the turn says whether it carries loss.

        A turn that is not a reply never carries loss. If such a turn has a key that requests loss, this key is reported
        as unused.
        """
        requested = _loss(self.turn)
        if requested is None:
            return

        _, carries_loss = requested
        if message['role'] == 'assistant':
            message['loss'] = carries_loss
        if message['role'] == 'assistant' or not carries_loss:
            self.used.update(_LOSS_KEYS)


def _key_in(turn: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first of `keys` that is present in the turn. If none is present, return keys[0]."""
    return next((key for key in keys if key in turn), keys[0])


def _turns(
    turns: Any, remarks: _Remarks, *, column: str, role_keys: Sequence[str], content_keys: Sequence[str]
) -> list[Message]:
    """Return the turns of a column as messages.

    `role_keys` and `content_keys` are the possible names for the keys `role` and `content`, in the order of preference.
    Raises BadRow if a turn cannot be converted.
    """
    turns = _parse_json(turns, column, remarks)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f'{column} is not a list of turns', column)

    messages: list[Message] = []
    for turn in turns:
        role_key = _key_in(turn, role_keys) if isinstance(turn, dict) else ''
        if not isinstance(turn, dict) or role_key not in turn:
            raise BadRow(f'a turn of {column} has no {role_keys[0]}')
        role = _ROLES.get(str(turn[role_key]).strip().lower())
        if role is None:
            raise BadRow(f"unknown role '{turn[role_key]}'")
        messages.append(_Turn(turn, column, remarks).message(role, role_key, _key_in(turn, content_keys)))
    return messages


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return the messages. If the row has text in the column `system`, a system message with this text comes first.

    Raises BadRow if the messages begin with a different system message.
    """
    value = _cell(row, 'system')
    system = '' if _is_empty(value) else _text(value, 'system')
    if not system:
        return messages

    if messages and messages[0]['role'] == 'system':
        if messages[0]['content'] == system:
            return messages
        raise BadRow('a system column and a system turn that differ', 'system')
    return [{'role': 'system', 'content': system}, *messages]


# Columns that are read in some formats, and columns that are read in every format.
_OPTIONAL = ('history', 'input')
_EVERYWHERE = ('system', 'tools', 'functions', 'images')


def _row(row: Mapping[str, Any], messages: list[Message], remarks: _Remarks, *columns: str) -> Row:
    """Return the Row with these messages. `columns` are the columns from which the messages were read.

    Raises BadRow if the system text, the tools or the images of the row cannot be used.
    """
    tools = _tools(row, remarks)
    images = _images(row, remarks)
    remarks.note_unused(row, (*columns, *_EVERYWHERE), 'column')
    if any(value is not None and _is_missing(value) for value in row.values()):
        remarks.notes[NOT_A_NUMBER] = None

    return Row(
        messages=_with_system(row, messages),
        tools=tools,
        images=images,
        written=row,
        unused=tuple(remarks.unused),
        notes=tuple(remarks.notes),
    )


def _chat(row: Mapping[str, Any], messages: list[Message], remarks: _Remarks, *columns: str) -> Row:
    """Return the Row of a chat. Every reply carries loss, unless --loss_scope or the reply itself says otherwise."""
    made = _row(row, messages, remarks, *columns)
    made.loss_scope = 'all_rounds'
    return made


def _rating(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the column `label` of a KTO row, which rates the reply with true or false. Returns () without a rating.

    Raises BadRow if the reply is rated as bad, because training on it would teach it.
    """
    label = row.get('label')
    if isinstance(label, str):
        label = {'true': True, 'false': False}.get(label.strip().lower())
    if label is False:
        raise BadRow(RATED_BAD, 'label')
    return ('label',) if row.get('label') is True else ()


def _from_messages(row: Mapping[str, Any]) -> Row:
    rating = _rating(row)
    remarks = _Remarks()
    keys: dict[str, Sequence[str]] = {'role_keys': ('role', 'from'), 'content_keys': ('content', 'value')}
    messages = _turns(row['messages'], remarks, column='messages', **keys)
    return _chat(row, messages, remarks, 'messages', *rating)


def _from_conversations(row: Mapping[str, Any]) -> Row:
    remarks = _Remarks()
    keys: dict[str, Sequence[str]] = {'role_keys': ('from', 'role'), 'content_keys': ('value', 'content')}
    messages = _turns(row['conversations'], remarks, column='conversations', **keys)
    return _chat(row, messages, remarks, 'conversations')


def _history(row: Mapping[str, Any], remarks: _Remarks) -> list[Message]:
    history = _parse_json(_cell(row, 'history'), 'history', remarks) or []
    if not isinstance(history, list | tuple):
        raise BadRow('history is not a list of [query, response] pairs', 'history')

    messages: list[Message] = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow('history is not a list of [query, response] pairs', 'history')
        messages.append({'role': 'user', 'content': _text(pair[0], 'query in history', 'history')})
        messages.append({'role': 'assistant', 'content': _text(pair[1], 'response in history', 'history')})
    return messages


def _from_query(row: Mapping[str, Any]) -> Row:
    asked: Message = {'role': 'user', 'content': _text(row['query'], 'query')}
    answered: Message = {'role': 'assistant', 'content': _text(row['response'], 'response')}
    remarks = _Remarks()
    return _row(row, [*_history(row, remarks), asked, answered], remarks, 'query', 'response', 'history')


def _from_instruction(row: Mapping[str, Any]) -> Row:
    instruction = _text(row['instruction'], 'instruction')
    extra = _cell(row, 'input')
    added = '' if extra is None else _text(extra, 'input')
    query = '\n'.join(part for part in (instruction, added) if part)
    asked: Message = {'role': 'user', 'content': query}
    answered: Message = {'role': 'assistant', 'content': _text(row['output'], 'output')}
    columns = ('instruction', 'input', 'output', 'history')
    remarks = _Remarks()
    return _row(row, [*_history(row, remarks), asked, answered], remarks, *columns)


def _from_text(row: Mapping[str, Any]) -> Row:
    """Return the Row with the plain text of the column `text`. All other columns that are not empty are unused."""
    remarks = _Remarks()
    text = _text(row['text'], 'text')
    remarks.note_unused(row, ('text',), 'column')
    message: Message = {'role': 'assistant', 'content': text}
    return Row(messages=[message], is_text=True, written=row, unused=tuple(remarks.unused))


def _said(row: Mapping[str, Any], column: str, role: str, remarks: _Remarks) -> list[Message]:
    """Return the messages of a cell that holds a text, one message or a list of messages.

    A text or a number becomes a message with the role `role`. A message keeps its own role. Raises BadRow for any other
    value.
    """
    value = row[column]
    if not isinstance(value, list | dict):
        return [{'role': role, 'content': _text(value, column)}]
    turns = [value] if isinstance(value, dict) else value
    return _turns(turns, remarks, column=column, role_keys=('role', 'from'), content_keys=('content', 'value'))


def _from_pair(row: Mapping[str, Any], *, asked: str, answered: str) -> Row:
    """Return the Row of a prompt in the column `asked` and its completion in the column `answered`.

    Every assistant message of the completion carries loss, unless the message itself says otherwise.
    """
    rating = _rating(row) if (asked, answered) == ('prompt', 'completion') else ()
    remarks = _Remarks()
    prompt = _said(row, asked, 'user', remarks)
    completion = _said(row, answered, 'assistant', remarks)
    for message in completion[:-1]:
        if message['role'] == 'assistant':
            message.setdefault('loss', True)

    if isinstance(row[asked], list | dict):  # such a prompt has its own history
        return _row(row, [*prompt, *completion], remarks, asked, answered, *rating)
    return _row(row, [*_history(row, remarks), *prompt, *completion], remarks, asked, answered, 'history', *rating)


Converter = Callable[[Mapping[str, Any]], Row]

# (required columns, converter) of each format. The last of the columns has the reply. A row is read in the first format
# whose required columns it has.
SHAPES: tuple[tuple[tuple[str, ...], Converter], ...] = (
    (('messages',), _from_messages),
    (('conversations',), _from_conversations),
    (('query', 'response'), _from_query),
    (('instruction', 'output'), _from_instruction),
)
# Columns of a question and of its answer, for rows that fit none of the formats above.
PAIRS = (
    ('prompt', 'completion'),
    ('prompt', 'response'),
    ('question', 'answer'),
    ('question', 'response'),
    ('input', 'output'),
)
# The formats for rows that fit none of SHAPES. A row whose columns fit two of these formats is refused, because
# nothing in the row says which format is meant.
OTHER_SHAPES: tuple[tuple[tuple[str, ...], Converter], ...] = (
    *((pair, functools.partial(_from_pair, asked=pair[0], answered=pair[1])) for pair in PAIRS),
    (('text',), _from_text),
)
KNOWN_SHAPES = (
    'query/response[/history][/system], instruction/input/output, messages with role/content, '
    'conversations with from/value, '
    + ', '.join('/'.join(pair) for pair in PAIRS)
    + ', text; tools and images are optional'
)
_NEEDED = [column for needed, _ in (*SHAPES, *OTHER_SHAPES) for column in needed]
# Every column name that some format reads.
KNOWN_COLUMNS = tuple(dict.fromkeys([*_NEEDED, *_OPTIONAL, *_EVERYWHERE]))
# The columns that have the reply in some format.
REPLY_COLUMNS = tuple(dict.fromkeys(needed[-1] for needed, _ in (*SHAPES, *OTHER_SHAPES)))


def find_converter(columns: Iterable[str]) -> Converter | None:
    """Return the converter for rows with these columns, or None if no format fits or if there is no clear choice.

    The first format of SHAPES that fits is used. If no format of SHAPES fits, a format of OTHER_SHAPES is used, but
    only if exactly one format of OTHER_SHAPES fits.
    """
    given = frozenset(columns)
    first = next((converter for needed, converter in SHAPES if given.issuperset(needed)), None)
    if first is not None:
        return first
    fitting = [converter for needed, converter in OTHER_SHAPES if given.issuperset(needed)]
    return fitting[0] if len(fitting) == 1 else None


def ambiguous_shapes(columns: Collection[str]) -> list[frozenset[str]]:
    """Return the formats that match `columns`, if it is not clear which of them the rows have.

    Each format is given as the set of its required columns. For example, rows with the columns prompt, completion,
    question and answer match {prompt, completion} and {question, answer}. If the format is clear, or if no format
    matches, the list is empty.
    """
    given = frozenset(columns)
    if any(given.issuperset(needed) for needed, _ in SHAPES):
        return []
    fitting = [frozenset(needed) for needed, _ in OTHER_SHAPES if given.issuperset(needed)]
    return fitting if len(fitting) > 1 else []


def tidy_columns(columns: Sequence[str]) -> dict[str, str]:
    """Return a dict from name in the file to new name, for the columns to rename. For example {' Query': 'query'}.

    A new name has no capital letters and no spaces around it. A column is renamed only if its new name is a column that
    a format reads. Returns {} if the names in the file already fit a format, if the new names fit no format, or if two
    columns would get the same name.
    """
    tidy = {column: column.strip().lower() for column in columns}
    names = {column: name if name in KNOWN_COLUMNS else column for column, name in tidy.items()}
    if find_converter(columns) or len(set(names.values())) < len(names) or not find_converter(names.values()):
        return {}
    return {column: name for column, name in names.items() if name != column}


def needed_columns(converter: Converter) -> frozenset[str]:
    """Return the columns that a converter requires."""
    return next(frozenset(needed) for needed, known in (*SHAPES, *OTHER_SHAPES) if known is converter)


def _turn_notes(messages: Sequence[Message]) -> Iterable[str]:
    """Yield a note for each unusual property of the turns. A row with such notes is still used."""
    turns = [message for message in messages if message['role'] != 'system']
    if len(turns) < len(messages) and turns[0]['role'] == 'assistant':
        yield NO_USER_TURN
    if any(turn.get('loss') is False for turn in turns):
        yield NO_LOSS_REQUESTED
    if any(turn['role'] == 'user' and not turn['content'].strip() for turn in turns):
        yield EMPTY_QUESTION

    earlier = (turn for turn in turns[:-1] if turn['role'] == 'assistant')
    if any(not turn['content'].strip() and not turn.keys() & {'tool_calls', 'reasoning'} for turn in earlier):
        yield EMPTY_REPLY

    for before, turn in itertools.pairwise(turns):
        if turn['role'] == before['role'] and turn['role'] in SAME_ROLE_TWICE:
            yield SAME_ROLE_TWICE[turn['role']]


def _texts(row: Row) -> Iterable[str]:
    for message in row.messages:
        yield from (message['content'], message.get('reasoning', ''))
        yield from (message.get('name', ''), message.get('tool_call_id', ''))
    yield from row.images
    if row.tools or any('tool_calls' in message for message in row.messages):
        calls = [message.get('tool_calls') for message in row.messages]
        yield json.dumps([calls, row.tools], ensure_ascii=False, default=str)


def check_row(row: Row) -> Row:
    """Return the row. For each unusual property of its turns, such as an empty question, `row.notes` gets a note.

    Raises BadRow if the row cannot be used for training, for example if its last turn is not a reply.
    """
    try:
        ''.join(_texts(row)).encode()
    except UnicodeEncodeError:  # JSON text can contain half of a character: "\ud83d"
        raise BadRow('a text is not UTF-8, or holds half of a character (a lone surrogate)') from None

    if row.is_text:
        if not row.messages[0]['content'].strip():
            raise BadRow('empty text', 'text')
        return row

    last = row.messages[-1]
    if last['role'] != 'assistant':
        raise BadRow(f"the last turn is the {last['role']}'s, so there is no reply to train on")
    if not last['content'].strip() and 'tool_calls' not in last:
        raise BadRow('empty response')
    if any(message['role'] == 'system' for message in row.messages[1:]):
        raise BadRow('a system turn that is not the first')
    if len(row.messages) < 2:
        raise BadRow('a reply without a question')

    row.notes = tuple(dict.fromkeys([*row.notes, *_turn_notes(row.messages)]))
    return row

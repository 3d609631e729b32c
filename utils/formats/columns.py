"""Converters from rows in the known formats to conversations.

A converter is a pure function. It returns a Row, or raises BadRow if the row cannot be converted. `check_row` in
row_check.py then checks whether the Row can be used for training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from utils.formats.cells import Remarks, as_text, cell_of, images_of, is_empty, is_missing, parse_json
from utils.formats.conversation import BadRow, Message, Row
from utils.formats.tool_calls import tools_of
from utils.formats.turns import converted_turns

NOT_A_NUMBER = 'a cell is NaN or Infinity: read as missing'
RATED_BAD = 'the column `label` is false, so the reply is rated as bad; --columns label= trains it all the same'


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return the messages. If the row has text in the column `system`, a system message with this text comes first.

    Raises BadRow if the messages begin with a different system message.
    """
    value = cell_of(row, 'system')
    system = '' if is_empty(value) else as_text(value, 'system')
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


def _row(row: Mapping[str, Any], messages: list[Message], remarks: Remarks, *columns: str) -> Row:
    """Return the Row with these messages. `columns` are the columns from which the messages were read.

    Raises BadRow if the system text, the tools or the images of the row cannot be used.
    """
    tools = tools_of(row, remarks)
    images = images_of(row, remarks)
    remarks.note_unused(row, (*columns, *_EVERYWHERE), 'column')
    if any(value is not None and is_missing(value) for value in row.values()):
        remarks.notes[NOT_A_NUMBER] = None

    return Row(
        messages=_with_system(row, messages),
        tools=tools,
        images=images,
        written=row,
        unused=tuple(remarks.unused),
        notes=tuple(remarks.notes),
    )


def _chat(row: Mapping[str, Any], messages: list[Message], remarks: Remarks, *columns: str) -> Row:
    """Return the Row of a chat. Every reply carries loss, unless --loss_scope or the reply itself says otherwise."""
    made = _row(row, messages, remarks, *columns)
    made.loss_scope = 'all_rounds'
    return made


def _rating(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return ('label',) if the cell in the column `label` is True or the text 'true'. Otherwise, return ().

    In KTO data, this column rates the reply with true or false. Raises BadRow if the rating is false, because training
    on the row would teach a bad reply.
    """
    label = row.get('label')
    if isinstance(label, str):
        label = {'true': True, 'false': False}.get(label.strip().lower())
    if label is False:
        raise BadRow(RATED_BAD, 'label')
    return ('label',) if label is True else ()


def _from_messages(row: Mapping[str, Any]) -> Row:
    rating = _rating(row)
    remarks = Remarks()
    keys: dict[str, Sequence[str]] = {'role_keys': ('role', 'from'), 'content_keys': ('content', 'value')}
    messages = converted_turns(row['messages'], remarks, column='messages', **keys)
    return _chat(row, messages, remarks, 'messages', *rating)


def _from_conversations(row: Mapping[str, Any]) -> Row:
    remarks = Remarks()
    keys: dict[str, Sequence[str]] = {'role_keys': ('from', 'role'), 'content_keys': ('value', 'content')}
    messages = converted_turns(row['conversations'], remarks, column='conversations', **keys)
    return _chat(row, messages, remarks, 'conversations')


def _history(row: Mapping[str, Any], remarks: Remarks) -> list[Message]:
    history = parse_json(cell_of(row, 'history'), 'history', remarks) or []
    if not isinstance(history, list | tuple):
        raise BadRow('history is not a list of [query, response] pairs', 'history')

    messages: list[Message] = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow('history is not a list of [query, response] pairs', 'history')
        messages.append({'role': 'user', 'content': as_text(pair[0], 'query in history', 'history')})
        messages.append({'role': 'assistant', 'content': as_text(pair[1], 'response in history', 'history')})
    return messages


def _from_query(row: Mapping[str, Any]) -> Row:
    asked: Message = {'role': 'user', 'content': as_text(row['query'], 'query')}
    answered: Message = {'role': 'assistant', 'content': as_text(row['response'], 'response')}
    remarks = Remarks()
    return _row(row, [*_history(row, remarks), asked, answered], remarks, 'query', 'response', 'history')


def _from_instruction(row: Mapping[str, Any]) -> Row:
    instruction = as_text(row['instruction'], 'instruction')
    extra = cell_of(row, 'input')
    added = '' if extra is None else as_text(extra, 'input')
    query = '\n'.join(part for part in (instruction, added) if part)
    asked: Message = {'role': 'user', 'content': query}
    answered: Message = {'role': 'assistant', 'content': as_text(row['output'], 'output')}
    columns = ('instruction', 'input', 'output', 'history')
    remarks = Remarks()
    return _row(row, [*_history(row, remarks), asked, answered], remarks, *columns)


def _from_text(row: Mapping[str, Any]) -> Row:
    """Return the Row with the plain text of the column `text`. All other columns that are not empty are unused."""
    remarks = Remarks()
    text = as_text(row['text'], 'text')
    remarks.note_unused(row, ('text',), 'column')
    message: Message = {'role': 'assistant', 'content': text}
    return Row(messages=[message], is_text=True, written=row, unused=tuple(remarks.unused))


def _said(row: Mapping[str, Any], column: str, role: str, remarks: Remarks) -> list[Message]:
    """Return the messages of a cell that holds a text, one message or a list of messages.

    A text or a number becomes a message with the role `role`. A message keeps its own role. Raises BadRow for any other
    value.
    """
    value = row[column]
    if not isinstance(value, list | dict):
        return [{'role': role, 'content': as_text(value, column)}]
    turns = [value] if isinstance(value, dict) else value
    return converted_turns(turns, remarks, column=column, role_keys=('role', 'from'), content_keys=('content', 'value'))


def _from_pair(row: Mapping[str, Any], *, asked: str, answered: str) -> Row:
    """Return the Row of a prompt in the column `asked` and its completion in the column `answered`.

    Every assistant message of the completion carries loss, unless the message itself says otherwise.
    """
    rating = _rating(row) if (asked, answered) == ('prompt', 'completion') else ()
    remarks = Remarks()
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
# Every column name from which some format reads a part of the conversation.
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

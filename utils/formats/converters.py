"""Converters from the rows of registered data sets to query/response rows.

A converter drops a broken row by returning None. It skips a valid row that is not wanted by raising Unwanted. Neither
row is trained on. Converters are pure functions. They never execute anything in a row.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

SourceRow = Mapping[str, Any]
PlainRow = dict[str, Any]
# A converter returns None to drop a broken row, and raises Unwanted to skip a row on purpose.
ToRow = Callable[[SourceRow], PlainRow | None]


class Unwanted(Exception):
    """The row is valid, but the registry entry of its data set skips the row on purpose."""


def _text(row: SourceRow, column: str) -> str:
    """Return a cell as text. Returns '' if the cell is null or NaN, or if the column is absent."""
    value = row.get(column)
    is_missing = value is None or value != value  # only NaN differs from itself
    return '' if is_missing else str(value)


def _literal(value: Any) -> list[Any] | None:
    """Return the list in a cell. Text is parsed as a Python literal. Returns None if the cell contains no list."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, list | tuple) else None


def pair(query: str, response: str, *, query_may_be_empty: bool = False) -> ToRow:
    """Return a converter that copies the query and the response from two columns.

    A row with an empty response is dropped. A row with an empty query is dropped unless `query_may_be_empty` is True.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        asked = _text(row, query)
        answered = _text(row, response)
        if not answered or not (asked or query_may_be_empty):
            return None
        return {'query': asked, 'response': answered}

    return to_row


def alpaca(
    instruction: str = 'instruction', extra: str = 'input', output: str = 'output', *, drop_prefix: str = ''
) -> ToRow:
    """Return a converter for columns with instruction, input and output. The query is instruction, newline, input.

    The newline is there even if the input is empty. Without an instruction, the query is only the input. `drop_prefix`
    is removed from the beginning of the input. A row without a query or an output is dropped.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        task = _text(row, instruction)
        added = _text(row, extra).removeprefix(drop_prefix)
        query = f'{task}\n{added}' if task else added
        response = _text(row, output)
        return {'query': query, 'response': response} if response and query else None

    return to_row


def of_kinds(column: str, kinds: Iterable[str], to_row: ToRow) -> ToRow:
    """Return a converter that uses `to_row` for the rows whose cell in `column` is one of `kinds`.

    If the cell is empty, the row is broken, and the converter returns None. If the cell has any other value, the
    converter raises Unwanted.
    """
    wanted = frozenset(kinds)

    def of_kind(row: SourceRow) -> PlainRow | None:
        if row.get(column) in wanted:
            return to_row(row)
        if not _text(row, column):
            return None
        raise Unwanted

    return of_kind


def without_history(column: str, to_row: ToRow) -> ToRow:
    """Return a converter that uses `to_row` for the rows whose cell in `column` (the history) is empty.

    If a row has a history, the converter raises Unwanted. If the cell cannot be read as a list, the converter returns
    None.
    """

    def without(row: SourceRow) -> PlainRow | None:
        history = [] if row.get(column) in (None, '') else _literal(row[column])
        if history is None:
            return None
        if history:
            raise Unwanted
        return to_row(row)

    return without


def with_answer(query: str, response: str, answer: str) -> ToRow:
    """Return a converter that copies the query and the response, and appends the answer to the response.

    If the row has no answer, nothing is appended. A row without a query or a response is dropped.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        asked = _text(row, query)
        solution = _text(row, response)
        result = _text(row, answer)
        if not asked or not solution:
            return None
        return {'query': asked, 'response': f'{solution}\n\nAnswer: {result}' if result else solution}

    return to_row


def human_assistant(column: str) -> ToRow:
    """Return a converter for a list of {human, assistant} rounds.

    The last round becomes query and response. The earlier rounds become the history. If the cell cannot be read as a
    list of rounds, or if the last response is empty, the row is dropped.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get(column))
        if not turns or not all(isinstance(t, dict) and {'human', 'assistant'} <= t.keys() for t in turns):
            return None

        *history, (query, response) = [[_text(turn, 'human'), _text(turn, 'assistant')] for turn in turns]
        return {'query': query, 'response': response, 'history': history} if response else None

    return to_row


def agent(plugin: str) -> ToRow:
    """Return a converter for the column `conversations`, a list of {from, value} turns.

    The first turn is a system text that lists plugins. `plugin` is a regular expression that finds the names of the
    plugins in the system text.

    If the cell cannot be read as a list of turns, if no turn follows the system text, or if the last turn is empty, the
    converter returns None. If the system text names fewer than two different plugins, the converter raises Unwanted. It
    also raises Unwanted if the other turns are not pairs of a user turn and an assistant turn.
    """
    pattern = re.compile(plugin)

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get('conversations'))
        if not turns or not all(isinstance(t, dict) and {'from', 'value'} <= t.keys() for t in turns):
            return None

        system, *dialogue = turns
        texts = [_text(turn, 'value') for turn in dialogue]
        if not texts or not texts[-1]:
            return None

        if len(set(pattern.findall(_text(system, 'value')))) < 2:
            raise Unwanted
        if [turn['from'] for turn in dialogue] != ['user', 'assistant'] * (len(dialogue) // 2):
            raise Unwanted

        history = [list(texts[i : i + 2]) for i in range(0, len(texts) - 2, 2)]
        return {'system': _text(system, 'value'), 'query': texts[-2], 'response': texts[-1], 'history': history}

    return to_row


def two_turns(column: str) -> ToRow:
    """Return a converter for a list of exactly two {content} turns, the query and the response.

    If the list has more or fewer turns, the converter raises Unwanted. If the cell cannot be read as a list of turns,
    or if one of the two turns is empty, the converter returns None.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get(column))
        if turns is None or not all(isinstance(turn, dict) for turn in turns):
            return None
        if len(turns) != 2:
            raise Unwanted

        query = _text(turns[0], 'content')
        response = _text(turns[1], 'content')
        return {'query': query, 'response': response} if query and response else None

    return to_row


def leetcode(row: SourceRow) -> PlainRow | None:
    """Return a row whose query is the programming problem and whose response is the code with its explanation.

    The column `code_with_problem` has the problem and the code. If it is empty, None is returned. If it does not
    contain exactly one block of Python code, Unwanted is raised. The column `explanation_only` may be empty.
    """
    problem, mark, code = _text(row, 'code_with_problem').partition('```python')
    if not mark or '```python' in code:
        if not _text(row, 'code_with_problem'):
            return None
        raise Unwanted
    response = f'{mark}{code.rstrip()}\n\n{_text(row, "explanation_only")}'.rstrip()
    return {'query': problem.strip().removeprefix('# '), 'response': response}


def law_text(row: SourceRow) -> PlainRow | None:
    """Return a row with an empty query, as in pre-training. The response is an article of a law with its headings.

    A row without an article is dropped.
    """
    if not _text(row, 'content'):
        return None

    lines = [f'Type: {_text(row, "type")}', f'Title: {_text(row, "title")}']
    for number in (1, 2, 3):
        chapter = _text(row, f'chapter{number}')
        if chapter:
            lines.append(f'Chapter{number}: {chapter}')
    lines.append(f'Content: {_text(row, "content")}')
    return {'query': '', 'response': '\n'.join(lines)}


def advertise(row: SourceRow) -> PlainRow | None:
    """Return a row whose query asks for an advertisement with some keywords. The response is the advertisement.

    A row without keywords or an advertisement is dropped.
    """
    keywords = _text(row, 'content')
    text = _text(row, 'summary')
    if not keywords or not text:
        return None
    return {'query': f'任务：根据关键词生成广告\n关键词：{keywords}\n广告：', 'response': text}


def ask_question(row: SourceRow) -> PlainRow | None:
    """Return a row for this task: read a text and an answer, and write the question.

    The column `text1` has '<answer>[SEP]<text>', and the column `text2` has the question. The query is made from
    `text1`. The response is the question. A row without [SEP] or a question is dropped.
    """
    answer, mark, context = _text(row, 'text1').partition('[SEP]')
    question = _text(row, 'text2')
    if not mark or not question:
        return None
    return {'query': f'任务：问题生成\n上下文：{context}\n答案：{answer}\n问题：', 'response': question}


def classify(task: str, columns: Mapping[str, str], names: Sequence[str]) -> ToRow:
    """Return a converter whose query asks for the category of a text, and whose response is the category.

    `columns` maps each column to its heading in the query. `names` are the names of the categories. The column `label`
    has the name of the category, or its index in `names`. If the label is -1 (not published), the converter raises
    Unwanted. If the label is absent or is no category, the converter returns None.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        label = row.get('label')
        try:
            index = names.index(label) if label in names else int(float(_text(row, 'label')))
        except (ValueError, OverflowError):
            return None

        if index == -1:  # the label is not published
            raise Unwanted
        if not 0 <= index < len(names):
            return None

        inputs = ''.join(f'{heading}：{_text(row, column)}\n' for column, heading in columns.items())
        return {'query': f'任务：{task}\n{inputs}类别：{"，".join(names)}\n输出：', 'response': names[index]}

    return to_row


def always_ask(query: str, response: str) -> ToRow:
    """Return a converter that gives every row the text `query` as its query.

    The response is the text in the column `response`. A row with an empty response is dropped.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        text = _text(row, response)
        return {'query': query, 'response': text} if text else None

    return to_row


def caption(row: SourceRow) -> PlainRow | None:
    """Return a row whose query asks for a description of an image.

    The image is given by its path. If there are several captions, the response is the first caption. A row without an
    image or a caption is dropped.
    """
    image = row.get('image')
    path = image.get('path') if isinstance(image, Mapping) else image
    text = _text(row, 'caption').partition('&&')[0].strip()
    if not path or not text:
        return None
    return {'query': f'<img>{path}</img>Please describe the image.', 'response': text}

"""Converters from the rows of registered data sets to query/response rows.

Converters are pure functions. They never execute anything in a row.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

SourceRow = Mapping[str, Any]
PlainRow = dict[str, Any]
# A converter returns None for a broken row, and raises Unwanted for a row that it skips on purpose.
ToRow = Callable[[SourceRow], PlainRow | None]


class Unwanted(Exception):
    """A valid row that the entry of its data set skips on purpose."""


def _text(row: SourceRow, column: str) -> str:
    """Return a cell as text, '' if it is missing (null, NaN, no such column)."""
    value = row.get(column)
    is_missing = value is None or value != value  # only NaN differs from itself
    return '' if is_missing else str(value)


def _literal(value: Any) -> list[Any] | None:
    """Return the list in a cell; text is parsed as a Python literal. None if there is no list."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, list | tuple) else None


def pair(query: str, response: str, *, query_may_be_empty: bool = False) -> ToRow:
    """Return a converter that copies two columns. A row without one of them is dropped."""

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
    """Return a converter whose query is instruction, newline, input; only the input if there is no instruction.

    `drop_prefix` is removed from the beginning of the input.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        task = _text(row, instruction)
        added = _text(row, extra).removeprefix(drop_prefix)
        query = f'{task}\n{added}' if task else added
        response = _text(row, output)
        return {'query': query, 'response': response} if response and query else None

    return to_row


def of_kinds(column: str, kinds: Iterable[str], to_row: ToRow) -> ToRow:
    """Return a converter that skips rows of other kinds and drops rows without a kind."""
    wanted = frozenset(kinds)

    def of_kind(row: SourceRow) -> PlainRow | None:
        if row.get(column) in wanted:
            return to_row(row)
        if not _text(row, column):
            return None
        raise Unwanted

    return of_kind


def without_history(column: str, to_row: ToRow) -> ToRow:
    """Return a converter that skips rows with a history and drops rows whose history cannot be read."""

    def without(row: SourceRow) -> PlainRow | None:
        history = [] if row.get(column) in (None, '') else _literal(row[column])
        if history is None:
            return None
        if history:
            raise Unwanted
        return to_row(row)

    return without


def with_answer(query: str, response: str, answer: str) -> ToRow:
    """Return a converter whose response ends with a blank line and the answer, if there is one."""

    def to_row(row: SourceRow) -> PlainRow | None:
        asked = _text(row, query)
        solution = _text(row, response)
        result = _text(row, answer)
        if not asked or not solution:
            return None
        return {'query': asked, 'response': f'{solution}\n\nAnswer: {result}' if result else solution}

    return to_row


def human_assistant(column: str) -> ToRow:
    """Return a converter for a list of {human, assistant} turns. The last is query and response, the rest history."""

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get(column))
        if not turns or not all(isinstance(t, dict) and {'human', 'assistant'} <= t.keys() for t in turns):
            return None

        *history, (query, response) = [[_text(turn, 'human'), _text(turn, 'assistant')] for turn in turns]
        return {'query': query, 'response': response, 'history': history} if response else None

    return to_row


def agent(plugin: str) -> ToRow:
    """Return a converter for {from, value} turns after a system turn that lists at least two plugins.

    `plugin` is a pattern that finds the names of plugins in the system text. Rows with fewer plugins are skipped, and
    rows whose turns do not alternate between user and assistant.
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


def two_rounds(column: str) -> ToRow:
    """Return a converter for exactly two turns with `content`: the query and the response. Other rows are skipped."""

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
    """Return the problem as query, and its only code block with the explanation as response."""
    problem, mark, code = _text(row, 'code_with_problem').partition('```python')
    if not mark or '```python' in code:
        if not _text(row, 'code_with_problem'):
            return None
        raise Unwanted
    response = f'{mark}{code.rstrip()}\n\n{_text(row, "explanation_only")}'.rstrip()
    return {'query': problem.strip().removeprefix('# '), 'response': response}


def law_text(row: SourceRow) -> PlainRow | None:
    """Return an article with its headings as the response to an empty query, as in pre-training."""
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
    """Return the task of writing an advertisement from keywords."""
    keywords = _text(row, 'content')
    text = _text(row, 'summary')
    if not keywords or not text:
        return None
    return {'query': f'任务：根据关键词生成广告\n关键词：{keywords}\n广告：', 'response': text}


def ask_question(row: SourceRow) -> PlainRow | None:
    """Return the task of writing the question to an answer in a context; `text1` is '<answer>[SEP]<context>'."""
    answer, mark, context = _text(row, 'text1').partition('[SEP]')
    question = _text(row, 'text2')
    if not mark or not question:
        return None
    return {'query': f'任务：问题生成\n上下文：{context}\n答案：{answer}\n问题：', 'response': question}


def classify(task: str, columns: Mapping[str, str], names: Sequence[str]) -> ToRow:
    """Return a converter to the task of naming the category. `columns` maps a column to its heading in the prompt."""

    def to_row(row: SourceRow) -> PlainRow | None:
        label = row.get('label')
        try:
            index = names.index(label) if label in names else int(float(_text(row, 'label')))
        except (ValueError, OverflowError):
            return None

        if index == -1:  # the label is hidden
            raise Unwanted
        if not 0 <= index < len(names):
            return None

        inputs = ''.join(f'{heading}：{_text(row, column)}\n' for column, heading in columns.items())
        return {'query': f'任务：{task}\n{inputs}类别：{"，".join(names)}\n输出：', 'response': names[index]}

    return to_row


def always_ask(query: str, response: str) -> ToRow:
    """Return a converter that uses the same query for every row."""

    def to_row(row: SourceRow) -> PlainRow | None:
        text = _text(row, response)
        return {'query': query, 'response': text} if text else None

    return to_row


def caption(row: SourceRow) -> PlainRow | None:
    """Return the task of describing an image, given by its path. Of several captions, the first is the response."""
    image = row.get('image')
    path = image.get('path') if isinstance(image, Mapping) else image
    text = _text(row, 'caption').partition('&&')[0].strip()
    if not path or not text:
        return None
    return {'query': f'<img>{path}</img>Please describe the image.', 'response': text}

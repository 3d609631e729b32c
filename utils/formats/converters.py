"""What a registered data set is: where it lies, which files of it are read, and how a row of it becomes ours.

Converters are pure: a row of the source in, a row of ours or None (dropped) out; nothing of a row is ever executed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

SourceRow = Mapping[str, Any]
PlainRow = dict[str, Any]
# A converter returns None for a row that is broken, and raises Unwanted for one that it leaves out by choice.
ToRow = Callable[[SourceRow], PlainRow | None]


class Unwanted(Exception):
    """A row that is whole, and that the entry of its data set leaves out by choice."""


def _text(row: SourceRow, column: str) -> str:
    """Return a cell as text, '' where it is missing (null, NaN, no such column)."""
    value = row.get(column)
    return '' if value is None or value != value else str(value)


def _literal(value: Any) -> list[Any] | None:
    """Return the list that a cell holds, as such or written as a Python literal; None where it is none."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, list | tuple) else None


def pair(query: str, response: str, *, query_may_be_empty: bool = False) -> ToRow:
    """Return a converter: two columns as they are; a row that misses either is dropped."""

    def to_row(row: SourceRow) -> PlainRow | None:
        asked, answered = _text(row, query), _text(row, response)
        return {'query': asked, 'response': answered} if answered and (asked or query_may_be_empty) else None

    return to_row


def alpaca(
    instruction: str = 'instruction', extra: str = 'input', output: str = 'output', *, drop_prefix: str = ''
) -> ToRow:
    """Return a converter: query = instruction, newline, input; the input alone where there is no instruction.

    `drop_prefix` is what some inputs begin with.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        query, response = _text(row, instruction), _text(row, output)
        added = _text(row, extra).removeprefix(drop_prefix)
        asked = f'{query}\n{added}' if query else added
        return {'query': asked, 'response': response} if response and asked else None

    return to_row


def of_kinds(column: str, kinds: Iterable[str], to_row: ToRow) -> ToRow:
    """Return a converter that drops rows of any other kind."""
    kept = frozenset(kinds)

    def of_kind(row: SourceRow) -> PlainRow | None:
        if row.get(column) in kept:
            return to_row(row)
        if not _text(row, column):
            return None
        raise Unwanted

    return of_kind


def without_history(column: str, to_row: ToRow) -> ToRow:
    """Return a converter that leaves out rows with a history; one that cannot be read is broken."""

    def without(row: SourceRow) -> PlainRow | None:
        history = [] if row.get(column) in (None, '') else _literal(row[column])
        if history is None:
            return None
        if history:
            raise Unwanted
        return to_row(row)

    return without


def with_answer(query: str, response: str, answer: str) -> ToRow:
    """Return a converter whose response ends with a blank line and the answer."""

    def to_row(row: SourceRow) -> PlainRow | None:
        asked, solved, result = _text(row, query), _text(row, response), _text(row, answer)
        if not asked or not solved:
            return None
        return {'query': asked, 'response': f'{solved}\n\nAnswer: {result}' if result else solved}

    return to_row


def human_assistant(column: str) -> ToRow:
    """Return a converter of a list of {human, assistant} turns: the last is asked and answered, the others history."""

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get(column))
        if not turns or not all(isinstance(t, dict) and {'human', 'assistant'} <= t.keys() for t in turns):
            return None
        pairs = [[_text(turn, 'human'), _text(turn, 'assistant')] for turn in turns]
        (query, response), history = pairs[-1], pairs[:-1]
        return {'query': query, 'response': response, 'history': history} if response else None

    return to_row


def agent(plugin: str) -> ToRow:
    """Return a converter of {from, value} turns after a system turn that lists at least two plugins.

    `plugin` finds a plugin's name in the system text. Rows whose turns do not alternate user, assistant are left out.
    """
    pattern = re.compile(plugin)

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get('conversations'))
        if not turns or not all(isinstance(t, dict) and {'from', 'value'} <= t.keys() for t in turns):
            return None
        system, *said = turns
        texts = [_text(turn, 'value') for turn in said]
        if not texts or not texts[-1]:
            return None
        if len(set(pattern.findall(_text(system, 'value')))) < 2:
            raise Unwanted
        if [turn['from'] for turn in said] != ['user', 'assistant'] * (len(said) // 2):
            raise Unwanted
        history = [list(texts[i : i + 2]) for i in range(0, len(texts) - 2, 2)]
        return {'system': _text(system, 'value'), 'query': texts[-2], 'response': texts[-1], 'history': history}

    return to_row


def two_rounds(column: str) -> ToRow:
    """Return a converter of exactly two turns with `content`: what is asked, what is answered."""

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get(column))
        if turns is None or not all(isinstance(turn, dict) for turn in turns):
            return None
        if len(turns) != 2:
            raise Unwanted
        query, response = (_text(turn, 'content') for turn in turns)
        return {'query': query, 'response': response} if query and response else None

    return to_row


def leetcode(row: SourceRow) -> PlainRow | None:
    """Return the problem, and its one code block with the explanation."""
    problem, mark, code = _text(row, 'code_with_problem').partition('```python')
    if not mark or '```python' in code:
        if not _text(row, 'code_with_problem'):
            return None
        raise Unwanted
    response = f'{mark}{code.rstrip()}\n\n{_text(row, "explanation_only")}'.rstrip()
    return {'query': problem.strip().removeprefix('# '), 'response': response}


def law_text(row: SourceRow) -> PlainRow | None:
    """Return a text to continue, as in pre-training: no query, the article with its headings as the response."""
    if not _text(row, 'content'):
        return None
    heads = {'Type': 'type', 'Title': 'title', **{f'Chapter{n}': f'chapter{n}' for n in (1, 2, 3)}}
    lines = [
        f'{head}: {_text(row, column)}'
        for head, column in heads.items()
        if not head.startswith('Chapter') or _text(row, column)
    ]
    return {'query': '', 'response': '\n'.join([*lines, f'Content: {_text(row, "content")}'])}


def advertise(row: SourceRow) -> PlainRow | None:
    """Return the task of writing an advertisement from keywords."""
    keywords, text = _text(row, 'content'), _text(row, 'summary')
    if not keywords or not text:
        return None
    return {'query': f'任务：根据关键词生成广告\n关键词：{keywords}\n广告：', 'response': text}


def ask_question(row: SourceRow) -> PlainRow | None:
    """Return the task of asking the question that a text answers; text1 is '<answer>[SEP]<context>'."""
    answer, mark, context = _text(row, 'text1').partition('[SEP]')
    question = _text(row, 'text2')
    if not mark or not question:
        return None
    return {'query': f'任务：问题生成\n上下文：{context}\n答案：{answer}\n问题：', 'response': question}


def classify(task: str, columns: Mapping[str, str], names: Sequence[str]) -> ToRow:
    """Return a converter to a task of naming the category; `columns` maps column to its heading in the prompt."""

    def to_row(row: SourceRow) -> PlainRow | None:
        label = row.get('label')
        try:
            index = names.index(label) if label in names else int(float(_text(row, 'label')))
        except (ValueError, OverflowError):
            return None
        if index == -1:  # stands for a hidden label
            raise Unwanted
        if not 0 <= index < len(names):
            return None
        said = ''.join(f'{heading}：{_text(row, column)}\n' for column, heading in columns.items())
        return {'query': f'任务：{task}\n{said}类别：{"，".join(names)}\n输出：', 'response': names[index]}

    return to_row


def always_ask(query: str, response: str) -> ToRow:
    """Return a converter that asks the same of every row."""
    return lambda row: {'query': query, 'response': _text(row, response)} if _text(row, response) else None


def caption(row: SourceRow) -> PlainRow | None:
    """Return the task of describing an image, named by its path; of several captions the first."""
    image = row.get('image')
    path = image.get('path') if isinstance(image, Mapping) else image
    text = _text(row, 'caption').partition('&&')[0].strip()
    return {'query': f'<img>{path}</img>Please describe the image.', 'response': text} if path and text else None

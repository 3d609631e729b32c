"""Functions of the user in DATASET_MAPPING: every kind of rows that they may return, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import get_dataset
from utils import dataset
from utils.base.errors import ConfigError
from utils.data.plan import plan_rows
from utils.data.stream_parts import open_streams

ROWS = [{'query': f'q{i}', 'response': f'r{i}'} for i in range(20)]
HELD = [{'query': f'held{i}', 'response': f'r{i}'} for i in range(3)]
CALLS = [{'function': {'name': 'add', 'arguments': '{"a": 1}'}}]
SAID = [
    {'role': 'user', 'content': 'add', 'tool_calls': None},
    {'role': 'assistant', 'content': '', 'tool_calls': CALLS},
]

Register = Callable[[Any], None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Return a function that registers a function as the data set `mine`."""
    return lambda function: monkeypatch.setitem(dataset.DATASET_MAPPING, 'mine', function)


def made(rows: list[Any]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def generator() -> Iterator[dict[str, str]]:
    yield from ROWS


def with_splits(**splits: Any) -> Any:
    import datasets

    return datasets.DatasetDict(splits)


def streamed() -> Any:
    import datasets

    return datasets.IterableDataset.from_generator(generator)


class Sequence:
    """A torch data set: only its length and its items."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, str]:
        return ROWS[index]

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (self[index] for index in range(len(self)))


KINDS: dict[str, tuple[Callable[[], Any], list[dict[str, str]]]] = {
    'a list': (lambda: ROWS, []),
    'a tuple of a list and None': (lambda: (ROWS, None), []),
    'a pair of lists': (lambda: (ROWS, HELD), HELD),
    'a generator': (generator, []),
    'a generator expression': (lambda: (row for row in ROWS), []),
    'a pair of generators': (lambda: (generator(), (row for row in HELD)), HELD),
    'a map object': (lambda: map(dict, ROWS), []),
    'a Dataset': (lambda: made(ROWS), []),
    'a pair of Datasets': (lambda: (made(ROWS), made(HELD)), HELD),
    'a Dataset and a list': (lambda: (made(ROWS), HELD), HELD),
    'a DatasetDict': (lambda: with_splits(train=made(ROWS), validation=made(HELD), test=made(HELD)), HELD),
    'a DatasetDict without validation': (lambda: with_splits(train=made(ROWS)), []),
    'a dict of lists': (lambda: {'train': ROWS, 'dev': HELD}, HELD),
    'a dict of generators': (lambda: {'train': generator(), 'val': iter(HELD)}, HELD),
    'an IterableDataset': (streamed, []),
    'a class': (Sequence, []),
}


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_rows_is_read_and_read_again(kind: str, register: Register) -> None:
    function, held = KINDS[kind]
    register(function)
    found = get_dataset(['mine'], test_ratio=0.0)  # reads the rows once to plan, and once for each use
    assert [row.messages[0]['content'] for row in found.train] == [row['query'] for row in ROWS]
    assert [row.messages[0]['content'] for row in found.val] == [row['query'] for row in held]
    assert found.train[0].origin == 'mine: row 1'
    assert plan_rows(['mine']).digest == plan_rows(['mine']).digest
    for part in open_streams(['mine'], hub='modelscope').sources[0]:
        import hashlib

        first, second = ([location for location, _, _ in part.read(hashlib.sha256())] for _ in range(2))
        assert first == second and len(first) in (len(ROWS), len(held))


def test_a_function_that_returns_rows_which_can_be_read_again_is_called_once(register: Register) -> None:
    calls: list[int] = []

    def function() -> list[dict[str, str]]:
        calls.append(1)
        return ROWS

    register(function)
    get_dataset(['mine'])
    assert calls == [1]


def test_splits_that_are_not_used_are_said(register: Register, caplog: pytest.LogCaptureFixture) -> None:
    register(lambda: {'train': ROWS, 'validation': HELD, 'test': HELD})
    with caplog.at_level(logging.INFO):
        plan_rows(['mine'])
    assert caplog.messages.count('mine: splits not used: test') == 1


def test_values_of_a_dataset_become_those_of_the_row_as_it_was_written(register: Register) -> None:
    plain = [
        {'messages': SAID},
        {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]},
    ]
    rows = [
        {'messages': [{k: v for k, v in turn.items() if v is not None} for turn in row['messages']]} for row in plain
    ]
    register(lambda: rows)
    by_hand = get_dataset(['mine'], test_ratio=0.0).train
    register(lambda: made(plain))
    read = get_dataset(['mine'], test_ratio=0.0).train
    assert [row.messages for row in read] == [row.messages for row in by_hand]
    assert read[1].written == rows[1], 'no keys that only the first row has'


def test_values_of_numpy_are_read_as_those_of_python(register: Register) -> None:
    import numpy

    turns = numpy.array(
        [{'role': 'user', 'content': numpy.str_('a')}, {'role': 'assistant', 'content': numpy.int64(3)}]
    )
    register(lambda: [{'messages': turns}, {'messages': list(turns), 'id': numpy.float32(0.5)}])
    found = get_dataset(['mine'], test_ratio=0.0).train
    assert [row.messages for row in found] == [
        [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': '3'}],
    ] * 2
    assert json.dumps(found[1].written) and type(found[1].written['id']) is float
    register(lambda: made([{'query': 1, 'response': 2}]).with_format('numpy'))
    assert [m['content'] for m in get_dataset(['mine'], test_ratio=0.0).train[0].messages] == ['1', '2']


def test_rows_that_are_none_are_skipped_and_counted(register: Register) -> None:
    register(lambda: [None, *ROWS[:3], None])
    found = get_dataset(['mine'], test_ratio=0.0)
    assert len(found.train) == 3
    assert found.left_out.counts == {'dropped by mine: the row is None': 2}
    assert found.left_out.places == {'dropped by mine: the row is None': ['mine: row 1', 'mine: row 5']}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    'None': (
        lambda: None,
        "data set 'mine': its function returned None, which is not rows. Return a list",
    ),
    'a path': (lambda: 'rows.jsonl', "data set 'mine': its function returned a value of type str, which is not rows."),
    'a number': (lambda: 3, 'returned a value of type int, which is not rows.'),
    'a pair with a number': (lambda: (ROWS, 3), 'returned a value of type int, which is not rows.'),
    'three': (lambda: (ROWS, HELD, HELD), 'its function returned 3 items, not two. Return a list'),
    'columns': (
        lambda: {'query': ['a'], 'response': ['b']},
        'without the split train; its keys are query, response.',
    ),
    'nothing': (dict, 'a dictionary without the split train; its keys are none. Return'),
    'a list of pairs': (
        lambda: [('a', 'b')],
        'mine: row 1: a row must be a dict with named columns, got',
    ),
    'a list of Datasets': (
        lambda: [made(ROWS), made(HELD)],
        'must be a dict with named columns, got a value of type Data',
    ),
}


@pytest.mark.parametrize(
    ('row', 'said'),
    [
        ({'title': 'a', 'body': 'b'}, 'mine: row 1: unknown columns title, body. Supported: query/response'),
        (
            {'question': 'a', 'answer': 'b', 'response': 'c'},
            'mine: row 1: the columns fit more than one shape of rows: question/answer, question/response. Return only',
        ),
        (
            {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'},
            'mine: row 1: unknown columns prompt, chosen, rejected. These are preference rows, and this toolkit has no',
        ),
        (
            {'data': [{'query': 'a', 'response': 'b'}]},
            'mine: row 1: unknown columns data. The rows are in the key data of this object. Return them from the ',
        ),
    ],
)
def test_columns_of_a_function_are_not_renamed_by_a_flag(row: Any, said: str, register: Register) -> None:
    register(lambda: [row])
    with pytest.raises(ConfigError) as caught:
        plan_rows(['mine'])
    assert str(caught.value).startswith(said) and '--columns' not in str(caught.value)
    assert str(caught.value).endswith('from the function in utils/dataset.py.')


@pytest.mark.parametrize('kind', REFUSED)
def test_what_is_not_rows_is_one_message(kind: str, register: Register) -> None:
    function, said = REFUSED[kind]
    register(function)
    with pytest.raises(ConfigError) as caught:
        plan_rows(['mine'])
    assert len(caught.value.problems) == 1 and said in str(caught.value)
    assert 'utils/dataset.py.' in str(caught.value)


@pytest.mark.slow
def test_a_dataset_of_a_function_is_trained_on_and_repeated(register: Register, run_sft: Callable[..., Path]) -> None:
    import llm_sft

    register(lambda: (made(ROWS), made(HELD)))
    run = run_sft('--dataset', 'mine', '--max_steps', '2')
    record = json.loads((run / 'run.json').read_text())
    assert (record['data']['train']['rows'], record['data']['validation']['rows']) == (20, 3)
    assert llm_sft.main(['--from_run', str(run)]) == 0
    register(lambda: (row for row in ROWS))
    assert llm_sft.main(['--from_run', str(run)]) == 2

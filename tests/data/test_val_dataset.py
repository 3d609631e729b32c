"""Validation sets of their own (--val_dataset): which rows they give, their names, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import write_jsonl
from utils import dataset
from utils.base.errors import ConfigError
from utils.data.held_out import held_out, read_held_out
from utils.data.parts import TRAIN, VAL
from utils.data.plan import Plan, plan_rows, plan_validation
from utils.data.sources import check_sources, val_set_names
from utils.data.stream_parts import open_streams, some_rows

Run = Callable[..., Path]
Problems = Callable[[], list[str]]


def numbered(folder: Path, name: str, count: int) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    rows = [{'query': f'{name}{i}', 'response': f'the answer is {i}.'} for i in range(count)]
    return str(write_jsonl(folder / f'{name}.jsonl', rows))


def questions(plan: Plan, use: int) -> list[str]:
    return [row.messages[-2]['content'] for _, row in plan.rows(use)]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a registered data set with a validation part; `single` has none."""
    halves = (
        [{'query': f'p{i}', 'response': 'x'} for i in range(6)],
        [{'query': f'v{i}', 'response': 'x'} for i in '01'],
    )
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'pair', lambda: halves)
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'single', lambda: halves[0])
    return 'pair'


def test_validation_sets_are_used_whole_and_no_training_row_is_held_out(tmp_path: Path, pair: str) -> None:
    a, b, c = (numbered(tmp_path, name, 30) for name in 'abc')
    plan = plan_rows([a, pair], val_words=[b, f'{c}#4'], test_ratio=0.5, train_sample=20)
    assert len(questions(plan, TRAIN)) == 20, '--train_dataset_sample limits the training rows'
    found = questions(plan, VAL)
    assert found[:30] == [f'b{i}' for i in range(30)] and len(found) == 34 and {q[0] for q in found[30:]} == {'c'}
    assert plan.drawn == [
        'pair (validation) is not used because --val_dataset names the validation rows',
        'rows = 20 of 36 for training because --train_dataset_sample is 20: 16 rows are not used',
        f"rows = 4 of 30 of --val_dataset '{c}#4' because --val_dataset {c}#4 asks for them: 26 rows are not used",
    ]
    assert plan.val_sets() == {2: 'b', 3: 'c'}
    assert [entry.get('flag') for entry in plan.lock().values()] == [None, None, 'val_dataset', 'val_dataset']


def test_a_registered_set_gives_its_validation_part_or_else_all_its_rows(tmp_path: Path, pair: str) -> None:
    train = numbered(tmp_path, 'a', 5)
    assert questions(plan_rows([train], val_words=[pair]), VAL) == ['v0', 'v1']
    assert len(questions(plan_rows([train], val_words=['single#4']), VAL)) == 4
    both = plan_rows([pair], val_words=[pair])
    assert questions(both, TRAIN) == [f'p{i}' for i in range(6)] and questions(both, VAL) == ['v0', 'v1']
    assert list(both.lock()) == ['pair', 'pair (validation)']
    with pytest.raises(ConfigError, match="--val_dataset 'single': --dataset trains on the rows of this data set"):
        plan_rows(['single'], val_words=['single'])


def test_a_validation_set_without_rows_is_refused(tmp_path: Path) -> None:
    empty = str(write_jsonl(tmp_path / 'empty.jsonl', [{'query': 'x', 'response': None}]))
    with pytest.raises(ConfigError, match=r'no row is left\. 1 row was skipped \(null response\)'):
        plan_rows([numbered(tmp_path, 'a', 5)], val_words=[empty])


def test_the_key_and_the_plan_of_the_sets_alone(tmp_path: Path) -> None:
    a, b, c = (numbered(tmp_path, name, 5) for name in 'abc')
    whole = plan_rows([a], val_words=[b, c])
    alone = plan_validation([b, c])
    assert questions(alone, VAL) == questions(whole, VAL)
    assert alone.lock() == {name: entry for name, entry in whole.lock().items() if name != a}
    digests = {plan_rows([a], val_words=words).digest for words in ([b], [c], [b, c], [c, b])}
    assert len({*digests, plan_rows([a, b, c], test_ratio=0).digest}) == 5


def test_names_of_sets_are_safe_and_unique(tmp_path: Path) -> None:
    words = {
        'val/math.jsonl': 'math',
        'other/Math.jsonl.gz#5': 'Math_2',
        'val/code and sql.csv': 'code_and_sql',
        'rows/**/*.parquet': 'rows',
        'held/out/': 'out',
        'sql-demo': 'sql-demo',
        'val/数学.json': '数学',
        'val/math.json': 'math_3',
        'val/notes.txt': 'notes',
        'val/guide.MD': 'guide',
    }
    assert dict(zip(words, val_set_names(list(words)), strict=True)) == words
    assert val_set_names(['*.jsonl']) == ['set']


def test_a_file_of_both_flags_is_refused_and_problems_name_the_flag(tmp_path: Path) -> None:
    a = numbered(tmp_path, 'a', 5)
    assert check_sources([a], val_words=[numbered(tmp_path, 'b', 5)]) == []
    problems = check_sources(
        [a], val_words=[f'{tmp_path}/a.jsonl#3', f'{tmp_path}/*.csv', './nope/x.doc', 'gone.jsonl']
    )
    assert problems[0] == (
        f"--val_dataset '{tmp_path}/a.jsonl#3': --dataset '{a}' already names {tmp_path}/a.jsonl, so its rows would be "
        'used twice. Remove one of the two.'
    )
    assert problems[1].startswith(f"--val_dataset '{tmp_path}/*.csv': the pattern matches no file")
    assert problems[2].startswith("--val_dataset './nope/x.doc': this is neither a registered data set nor a")
    assert problems[3].startswith('data file gone.jsonl is not there')


def test_all_problems_of_both_flags_come_together(run_sft: Run, data_file: Path, problems: Problems) -> None:
    run_sft('--dataset', 'sql-dmeo', '--val_dataset', 'sql-deom', 'x.jsonl', 'x.jsonl', expect=2)
    assert len(problems()) == 4
    assert problems()[0].startswith("--dataset 'sql-dmeo' is not registered: did you mean 'sql-demo'?")
    assert problems()[1].startswith("--val_dataset 'sql-deom' is not registered: did you mean 'sql-demo'?")
    assert problems()[2] == "--val_dataset: 'x.jsonl' is named twice, so its rows would be used twice. Name it once."


def test_their_rows_are_read_again_without_the_training_set(tmp_path: Path) -> None:
    a, b, c = (numbered(tmp_path, name, 9) for name in 'abc')
    plan = plan_rows([a], val_words=[b, f'{c}#4'])
    kept = held_out(plan)
    assert list(kept) == [b, c] and kept[b]['rows'] == list(range(9))
    expected = [row for _, row in plan.rows(VAL)]
    Path(a).unlink()
    assert read_held_out(kept, [b, f'{c}#4']) == expected and len(expected) == 13
    write_jsonl(Path(b), [{'query': 'b', 'response': 'x'}])
    assert read_held_out(kept, [b, f'{c}#4']) is None


def test_streams_hold_nothing_out(tmp_path: Path, pair: str) -> None:
    a, b = (numbered(tmp_path, name, 9) for name in 'ab')
    streams = open_streams([a, pair], hub='modelscope', val_words=[f'{b}#5'], seed=3)
    assert streams.val is not None and len(questions(streams.val, VAL)) == 5
    assert [*streams.decisions][:1] == ['pair (validation) is not used because --val_dataset names the validation rows']
    assert [row.messages[-2]['content'] for row in some_rows(streams, TRAIN, 4)] == ['a0', 'a1', 'p0', 'p1']
    assert [row.messages[-2]['content'][0] for row in some_rows(streams, VAL, 2)] == ['b', 'b']
    with pytest.raises(ConfigError, match='--dataset trains on the rows of this data set, which has no validation'):
        open_streams(['single'], hub='modelscope', val_words=['single'])

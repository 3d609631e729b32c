"""--score: exact match, equal JSON, and functions of the user's file, in both programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
from tests.support.runs import ROOT, history
from utils.base.errors import ConfigError
from utils.formats.conversation import Row
from utils.formats.demo_sql import held_out_rows, is_right
from utils.infer.scores import Scores, means

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
GREEDY = ('--do_sample', 'false', '--max_new_tokens', '4')
GENERATING = ('--predict_with_generate', 'true', *GREEDY, '--max_steps', '2', '--eval_steps', '1')

OWN = """
import collections


def length(answer, label, row):
    return len(row['query']) + len(label) / 1000


def parts(answer, label, row):
    return {'first': 2, 'empty': answer == ''}


def fails(answer, label, row):
    return 1 / len(row['no such column'])


def words(answer, label, row):
    return 'good'


def uneven(answer, label, row):
    return {'a': 1} if row['query'].startswith('what is 1') else {'b': 1}


def two(answer, label):
    return 1


loss = two
constant = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / 'own.py'
    file.write_text(OWN)
    return file


def row(query: str, origin: str = 'a.jsonl:1') -> Row:
    return Row(messages=[], origin=origin, written={'query': query})


def test_exact_ignores_the_white_space_around_a_text() -> None:
    found = Scores(['exact']).by_row([' a b\n', 'a  b', 'A b'], ['a b', 'a b', 'a b'])
    assert found == [{'exact': 100.0}, {'exact': 0.0}, {'exact': 0.0}]
    assert means(found) == {'exact': 33.3333}


@pytest.mark.parametrize(
    ('answer', 'label', 'expected'),
    [
        ('{"a": 1, "b": [1, 2]}', '{"b": [1.0, 2e0], "a": 1}', (100, 0, 0)),
        ('[1, 2]', '[2, 1]', (0, 0, 0)),
        ('1', 'true', (0, 0, 0)),
        ('[0]', '[false]', (0, 0, 0)),
        ('null', 'null', (100, 0, 0)),
        ('"1"', '1', (0, 0, 0)),
        ('9007199254740993', '9007199254740992', (0, 0, 0)),
        ('"é"', '"\\u00e9"', (100, 0, 0)),
        ('{"a": NaN}', '{"a": NaN}', (0, 100, 100)),
        ('```json\n{}\n```', '{}', (0, 100, 0)),
        ('{}', 'no json', (0, 0, 100)),
        ('', '{}', (0, 100, 0)),
        ('[' * 100_000, '[]', (0, 100, 0)),
    ],
)
def test_json_is_compared_by_value(answer: str, label: str, expected: tuple[int, int, int]) -> None:
    found = Scores(['json']).by_row([answer], [label])[0]
    assert (found['json'], found['json-broken'], found['json-label-broken']) == expected


def test_own_functions_get_the_row_as_it_was_read(own: Path) -> None:
    scores = Scores(['exact', f'{own}:length', f'{own}:parts'])
    found = scores.by_row(['x', ' '], ['x', 'abc'], [row('four'), row('sixsix')])
    assert found == [
        {'exact': 100.0, 'length': 4.001, 'parts': 2.0, 'parts-first': 2.0, 'parts-empty': 0.0},
        {'exact': 0.0, 'length': 6.003, 'parts': 2.0, 'parts-first': 2.0, 'parts-empty': 1.0},
    ]
    assert not [*own.parent.glob('__pycache__')]


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        ('fails', "the function failed for a.jsonl:1: KeyError: 'no such column' ({own}:14). Correct the function."),
        (
            'words',
            "the function returned 'good' for a.jsonl:1. Return a finite number, or a dict from names to finite "
            'numbers.',
        ),
        (
            'uneven',
            'the function returned b for a.jsonl:2, and a for a.jsonl:1. Return the same names in the same order for '
            'every row.',
        ),
    ],
)
def test_a_function_that_fails_names_the_row(own: Path, function: str, message: str) -> None:
    scores = Scores([f'{own}:{function}'])
    with pytest.raises(ConfigError) as error:
        scores.by_row(['', ''], ['', ''], [row('what is 1'), row('what is 2', 'a.jsonl:2')])
    assert str(error.value) == f'--score {own}:{function}: ' + message.format(own=own)


@pytest.mark.parametrize(('function', 'why'), [('two', 'too many'), ('constant', 'not a callable')])
def test_a_function_that_takes_other_arguments_is_one_error(own: Path, function: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{function}' cannot be called with \(answer, label, row\): .*{why}"):
        Scores([f'{own}:{function}'])


def test_a_file_that_fails_when_it_is_loaded_is_one_error(tmp_path: Path) -> None:
    file = tmp_path / 'broken.py'
    file.write_text('import no_such_module_of_anyone\n\ndef f(answer, label, row):\n    return 1\n')
    with pytest.raises(ConfigError, match=r'broken\.py:1 failed when it was loaded: ModuleNotFoundError: No module'):
        Scores([f'{file}:f'])


def test_wrong_scores_are_reported_together(
    own: Path, tmp_path: Path, model_dir: Path, data_file: Path, problems: Problems
) -> None:
    (tmp_path / 'cut.py').write_text('def f(:\n')
    words = [
        'rogue', 'exact', 'exact', f'{own}:1x', f'{own}:loss', f'{own}:lenght', f'{tmp_path}/none.py:f',
        f'{tmp_path}/cut.py:g',
    ]  # fmt: skip
    command = ['--model_id_or_path', str(model_dir), '--dataset', str(data_file), '--score', *words]
    assert llm_infer.main(command) == 2
    assert len(problems()) == 7
    for wanted in (
        "--score 'rogue' is not known: did you mean 'rouge'? Give rouge, exact, json or FILE.py:name",
        "--score 'exact': the score 'exact' is named twice. Name it once.",
        f"--score '{own}:1x': '1x' is not the name of a function. Give FILE.py:name.",
        f"--score '{own}:loss': 'loss' is the name of a different logged value. Rename the function.",
        f"--score {own}:lenght: {own} defines no function 'lenght': did you mean 'length'?",
        f'--score {tmp_path}/none.py:f: {tmp_path}/none.py is not a file (looked in {tmp_path}). Correct the path.',
        f'--score {tmp_path}/cut.py:g: {tmp_path}/cut.py:1 cannot be read: invalid syntax',
    ):
        assert any(problem.startswith(wanted) for problem in problems())


@pytest.mark.slow
def test_the_first_score_decides_which_checkpoint_is_best(run_sft: Run, own: Path) -> None:
    run = run_sft(*GENERATING, '--score', f'{own}:parts', 'exact', 'rouge')
    for entry in history(run, 2):
        if 'eval_exact' in entry:
            assert (entry['eval_parts'], entry['eval_parts-first']) == (2.0, 2.0)
            assert {'eval_parts-empty', 'eval_rouge-l', 'eval_bleu-4'} <= set(entry)
    state = json.loads((run / 'checkpoint-2' / 'trainer_state.json').read_text())
    # The score is 2 at both steps, so the first one stays the best.
    assert (state['best_metric'], state['best_global_step']) == (2.0, 1)
    assert {'eval_parts.png', 'eval_exact.png', 'eval_rouge-l.png'} <= {p.name for p in (run / 'images').iterdir()}
    assert 'validation exact' in (run / 'report.html').read_text(encoding='utf-8')
    recorded = json.loads((run / 'lock.json').read_text())['scores']
    assert list(recorded) == [f'{own}:parts'] and len(recorded[f'{own}:parts']) == 64


@pytest.mark.slow
def test_each_validation_row_is_scored_with_its_own_columns(run_sft: Run, own: Path, data_file: Path) -> None:
    """The rows differ in length and are evaluated longest first; the function reads the query of its row."""
    run = run_sft(*GENERATING, '--score', f'{own}:length', '--eval_batch_size', '2', '--dataset_test_ratio', '0.3')
    held_out = json.loads((run / 'held_out.json').read_text())[str(data_file)]['rows']
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    lengths = [len(rows[i]['query']) + len(rows[i]['response'].strip()) / 1000 for i in held_out]
    entry = next(e for e in history(run, 2) if 'eval_length' in e)
    assert entry['eval_length'] == pytest.approx(sum(lengths) / len(lengths), abs=1e-4)
    checkpoint = str(run / 'checkpoint-2')
    target = run / 'answers.jsonl'
    words = ['--ckpt_dir', checkpoint, *GREEDY, '--score', f'{own}:length', '--result_path', str(target)]
    assert llm_infer.main(words) == 0
    answered = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(a['scores']['length'] for a in answered) == pytest.approx(sorted(lengths), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('preflight', ['true', 'false'])
def test_a_failing_function_ends_the_run_with_the_row(
    run_sft: Run, own: Path, data_file: Path, problems: Problems, preflight: str
) -> None:
    run_sft(*GENERATING, '--score', f'{own}:fails', '--preflight', preflight, expect=2)
    assert len(problems()) == 1
    assert problems()[0].startswith(f'--score {own}:fails: the function failed for {data_file}:')
    assert problems()[0].endswith(f"KeyError: 'no such column' ({own}:14). Correct the function.")


@pytest.mark.slow
def test_no_checkpoint_and_no_run_makes_a_file_run(
    run_sft: Run, own: Path, problems: Problems, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = run_sft(*GENERATING, '--score', f'{own}:length', 'exact')
    checkpoint = run / 'checkpoint-2'
    own.write_text('raise SystemExit("executed")\ndef length(answer, label, row): return 1\n')

    assert llm_infer.main(['--ckpt_dir', str(checkpoint), *GREEDY]) == 0
    assert f'the run was also scored by {own}:length. A function of a file is only executed if it is' in caplog.text
    answered = [json.loads(line) for line in (checkpoint / 'infer_result.jsonl').read_text().splitlines()]
    assert {tuple(a['scores']) for a in answered} == {('exact',)}

    run_sft('--from_run', str(run), expect=2)
    assert problems() == [
        f'--from_run {run}: the run used a score function from a file of the user. Such a function is only executed if '
        f'this command names it. Add --score {own}:length exact.'
    ]

    own.write_text(OWN + '\n# changed\n')
    typed = ('--score', f'{own}:length', 'exact')
    for again in (('--from_run', str(run)), (*GENERATING, '--resume_from_checkpoint', str(run / 'checkpoint-1'))):
        caplog.clear()
        run_sft(*again, *typed)
        assert f'--score {own}:length: the file has changed since the earlier run (sha256' in caplog.text


@pytest.mark.slow
def test_another_first_score_is_refused_on_resuming(run_sft: Run, problems: Problems) -> None:
    run = run_sft(*GENERATING)
    resumed = ('--resume_from_checkpoint', str(run / 'checkpoint-1'))
    run_sft(*GENERATING, '--score', 'exact', 'rouge', *resumed, expect=2)
    assert problems() == [
        '--score: this run would choose its best checkpoint by exact, but the resumed run chose it by rouge-l. Type '
        '--predict_with_generate and --score as in the resumed run, or leave --resume_from_checkpoint out to start a '
        'new run.'
    ]
    run_sft(*GENERATING, '--score', 'rouge', 'exact', *resumed)


def test_a_score_without_effect_is_said(run_sft: Run, caplog: pytest.LogCaptureFixture, own: Path) -> None:
    run_sft('--max_steps', '1', '--score', f'{own}:length')
    assert '--score has no effect: evaluation is by loss' in caplog.text


def test_the_sql_score_of_the_quick_start_counts_right_sql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = held_out_rows()[:12]
    answers = [r['response'] if i % 3 else 'SELECT 1;' for i, r in enumerate(rows)]
    labels = [r['response'] for r in rows]
    made: list[Any] = [Row(messages=[], written=r) for r in rows]
    found = Scores(['tools/sql_score.py:right']).by_row(answers, labels, made)
    expected = [float(is_right(r, a)) for r, a in zip(rows, answers, strict=True)]
    assert [scores['right'] for scores in found] == expected
    assert set(expected) == {0.0, 1.0}


def test_chat_and_merge_need_no_score(model_dir: Path, data_file: Path, problems: Problems) -> None:
    words = ['--model_id_or_path', str(model_dir), '--dataset', str(data_file), '--merge_lora_and_save', 'true']
    assert llm_infer.main([*words, '--score', 'exact']) == 2
    assert not any('--score' in problem for problem in problems())

"""The shapes of rows besides query/response, instruction/output and messages; and the names that --columns gives."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
from tests.support.runs import get_dataset, write_jsonl
from tests.support.tiny_models import make_tokenizer
from utils.base.errors import ConfigError
from utils.data.encode_plan import EncodedAgain
from utils.data.held_out import held_out, read_held_out
from utils.data.parts import TRAIN, VAL
from utils.data.plan import plan_rows
from utils.data.stream_parts import first_rows, open_streams
from utils.encode.account import Account
from utils.encode.make import make_encoder
from utils.formats.columns import KNOWN_COLUMNS, RATED_BAD, find_converter
from utils.formats.conversation import BadRow, Row
from utils.formats.data_file import read_rows
from utils.formats.reading import Reading, read_columns
from utils.formats.row_check import check_row
from utils.proofs.as_written import messages_as_written
from utils.proofs.template import prove_template

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
ASKED = {'role': 'user', 'content': 'what is 7?'}
TOLD = {'role': 'assistant', 'content': 'seven'}
PAIRS = ('prompt/completion', 'prompt/response', 'question/answer', 'question/response', 'input/output')
ENCODER = make_encoder(make_tokenizer(), template_type='auto', system='', system_typed=False, max_length=-1)


def strings(value: Any) -> list[str]:
    """Return every text in a nested value, without the keys."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items for text in strings(item)]


def convert(row: dict[str, Any]) -> Row:
    converter = find_converter(row)
    assert converter is not None
    return check_row(converter(row))


@pytest.mark.parametrize('pair', PAIRS)
def test_a_pair_of_texts_is_one_round_and_other_columns_are_named(pair: str) -> None:
    asked, answered = pair.split('/')
    row = convert({'id': 3, asked: 'what is 7?', answered: 'seven', 'system': 'be brief', 'history': [['a', 'b']]})
    assert row.messages == [
        {'role': 'system', 'content': 'be brief'},
        {'role': 'user', 'content': 'a'},
        {'role': 'assistant', 'content': 'b'},
        ASKED,
        TOLD,
    ]
    assert row.unused == ('column `id`',)
    with pytest.raises(BadRow, match=f'null {answered}'):
        convert({asked: 'a', answered: None})
    with pytest.raises(BadRow, match='empty response'):
        convert({asked: 'a', answered: ' '})


@pytest.mark.parametrize('pair', PAIRS)
def test_a_prompt_and_a_completion_may_be_messages(pair: str) -> None:
    asked, answered = pair.split('/')
    for prompt in ('what is 7?', ASKED, [ASKED]):
        for completion in ('seven', TOLD, [TOLD]):
            assert convert({asked: prompt, answered: completion}).messages == [ASKED, TOLD]
    row = convert({asked: [{'from': 'human', 'value': 'what is 7?'}], answered: 'seven', 'history': [['a', 'b']]})
    assert row.messages == [ASKED, TOLD]
    assert row.unused == ('column `history`',)
    with pytest.raises(BadRow, match=f'{answered} is not a list of turns'):
        convert({asked: 'a', answered: []})


def test_each_reply_of_a_completion_carries_loss_unless_it_says_otherwise() -> None:
    first = {'role': 'assistant', 'content': 'six'}
    row = convert({'prompt': [ASKED, TOLD, ASKED], 'completion': [first, ASKED, TOLD]})
    assert [message.get('loss') for message in row.messages] == [None, None, None, True, None, None]
    row = convert({'prompt': [ASKED], 'completion': [{**first, 'weight': 0}, ASKED, TOLD]})
    assert row.messages[1]['loss'] is False
    with pytest.raises(BadRow, match="the last turn is the user's"):
        convert({'prompt': 'a', 'completion': [TOLD, ASKED]})
    with pytest.raises(BadRow, match="unknown role 'narrator'"):
        convert({'prompt': 'a', 'completion': {'role': 'narrator', 'content': 'b'}})


def test_rows_of_public_data_sets_are_read_as_before() -> None:
    """Columns as in these data sets: an older shape wins over a newer one."""
    messages = [ASKED, TOLD]
    known: dict[str, dict[str, Any]] = {
        'HuggingFaceH4/ultrachat_200k': {'prompt': 'x', 'prompt_id': 'x', 'messages': messages},
        'HuggingFaceH4/no_robots': {'prompt': 'x', 'prompt_id': 'x', 'messages': messages, 'category': 'x'},
        'AI-MO/NuminaMath-CoT': {'source': 'x', 'problem': 'x', 'solution': 'x', 'messages': messages},
        'tatsu-lab/alpaca': {'instruction': 'what is 7?', 'input': '', 'output': 'seven', 'text': 'x'},
        'iamtarun/python_code_instructions_18k_alpaca': {
            'instruction': 'what is 7?', 'input': '', 'output': 'seven', 'prompt': 'x',
        },
        'Magpie-Align': {
            'conversations': [{'from': 'human', 'value': 'what is 7?'}, {'from': 'gpt', 'value': 'seven'}],
            'instruction': 'x', 'response': 'x',
        },
        'meta-math/MetaMathQA': {'type': 'x', 'query': 'what is 7?', 'original_question': 'x', 'response': 'seven'},
        'a table of everything': {
            'query': 'what is 7?', 'response': 'seven', 'question': 'x', 'answer': 'x', 'prompt': 'x',
            'completion': 'x',
        },
    }  # fmt: skip
    for name, row in known.items():
        assert convert(row).messages == messages, name


def test_columns_that_fit_two_shapes_are_refused_with_a_remedy(tmp_path: Path) -> None:
    row = {'question': 'what is 7?', 'answer': 'seven', 'response': 'eight', 'id': 1}
    file = str(write_jsonl(tmp_path / 'a.jsonl', [row] * 3))
    with pytest.raises(ConfigError) as raised:
        plan_rows([file])
    assert str(raised.value) == (
        f'{file}:1: the columns fit more than one shape of rows: question/answer, question/response. Choose: to read '
        'question/answer, add --columns response=; to read question/response, add --columns answer=.'
    )
    for words, reply in ((['response='], 'seven'), (['answer='], 'eight'), (['answer=response', 'response='], 'seven')):
        found = get_dataset([file], test_ratio=0, reading=Reading(columns=read_columns(words)[0]))
        assert {row.messages[-1]['content'] for row in found.train} == {reply}
    left_out = found.train[0].unused
    assert left_out == ('column `response (left out)`', 'column `id`')


def test_every_character_of_such_rows_is_accounted_for(tmp_path: Path) -> None:
    call = {'role': 'assistant', 'content': '', 'tool_calls': [{'function': {'name': 'f', 'arguments': {'x': 'deep'}}}]}
    result = {'role': 'tool', 'name': 'f', 'content': 'four metres'}
    rows: list[dict[str, Any]] = [
        {'prompt': 'alpha', 'completion': 'beta', 'history': [['gamma', 'delta']], 'extra': 'epsilon'},
        {'prompt': [ASKED], 'completion': [call, result, TOLD], 'history': [['gamma', 'delta']]},
        {'question': ASKED, 'answer': TOLD},
        {'input': 'alpha', 'output': [TOLD], 'messageless': None},
    ]
    names: dict[str, int] = {}
    for row in rows:
        made = convert(row)
        made.origin = 'row'
        account = Account()
        account.add(made, ENCODER.encode([made])[0], EncodedAgain(ENCODER))
        assert sum(sum(counts.values()) for counts in account.fields.values()) == len(''.join(strings(row)))
        trained = [message for message in made.messages if message.get('loss')] + made.messages[-1:]
        assert account.fields['reply text'] == {
            'trained': len(''.join(message['content'] for message in trained)),
            **({'context': len('delta')} if len(made.messages) == 4 and row.get('extra') else {}),
        }
        names |= account.unused
    assert names == {'column `extra`': 1, 'column `history`': 1, 'message key `name`': 1}


def test_the_template_proof_reads_such_rows_as_written(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {'prompt': [ASKED], 'completion': [{**TOLD, 'name': 'a'}]},
        {'question': 'what is 7?', 'answer': TOLD},
        {'input': 'what is 7?', 'output': 'seven'},
        {'prompt': 'what is 7?', 'completion': [TOLD], 'history': [['a', 'b']]},
    ]
    made = [convert(row) for row in rows]
    assert messages_as_written(made[0]) == [ASKED, {**TOLD, 'name': 'a'}]
    assert [messages_as_written(row) for row in made[1:3]] == [[ASKED, TOLD]] * 2
    assert len(messages_as_written(made[3])) == 4
    prove_template(ENCODER, made, tmp_path)
    assert json.loads((tmp_path / 'proofs.json').read_text())['template']['equal'] == 14


# ---- --columns


def test_words_of_columns_are_checked() -> None:
    assert read_columns(['question text=query', 'a=b=response', 'text=']) == (
        {'question text': 'query', 'a=b': 'response', 'text': ''},
        [],
    )
    words = ['question', '=query', 'a=qeury', 'b=query', 'c=query', 'b=system']
    columns, problems = read_columns(words)
    assert columns == {'b': 'query'}
    assert [problem.partition(': ')[2].partition('. ')[0] for problem in problems] == [
        'this does not give a column a name',
        'this does not give a column a name',
        "no format reads a column qeury: did you mean 'query'? Choose among " + ', '.join(KNOWN_COLUMNS) + '.',
        'the column b is renamed to query too',
        'the column b is given twice',
    ]


def test_wrong_words_are_reported_with_the_other_problems(run_sft: Run, problems: Problems) -> None:
    run_sft('--columns', 'a=qeury', 'b', '--batch_size', '0', expect=2)
    starts = ("--columns 'a=qeury': no format reads a column qeury", "--columns 'b': this does", '--batch_size takes 1')
    assert all(any(problem.startswith(start) for problem in problems()) for start in starts)


def test_renamed_columns_are_the_columns_of_the_row(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / 'a.jsonl', [{'query': 'what is 7?', 'response': 'seven'}])
    text = '{"Q": "what is 7?", "Q": "what is 7?", "A": "seven", "S": "be brief"}\n{"Q": "b", "A": "c"}\n'
    other = tmp_path / 'b.jsonl'
    other.write_text(text, encoding='utf-8')
    names = {'Q': 'query', 'A': 'response', 'S': 'system'}
    found = get_dataset([str(plain), str(other)], test_ratio=0, reading=Reading(columns=names))
    assert [row.messages[-2:] for row in found.train[:2]] == [[ASKED, TOLD]] * 2
    assert found.train[1].messages[0] == {'role': 'system', 'content': 'be brief'}
    assert found.train[1].notes == ('the JSON key `Q` occurs twice in an object: the last value is used',)
    assert len(found.train) == 3 and not found.left_out


def test_a_column_that_no_file_has_is_named_with_near_names(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / 'a.jsonl', [{'ask': 'a', 'reply': 'b'}]))
    both = Reading(columns={'aks': 'query', 'reply': 'response'})
    with pytest.raises(ConfigError) as raised:
        plan_rows([file], reading=both)
    missing = (
        f"--columns 'aks=query': {file}:1 has no column aks. Its columns are ask, reply. Write the name in the file "
        'first: NAME=query.'
    )
    assert raised.value.problems[0] == missing
    assert raised.value.problems[1].startswith(f'{file}:1: unknown columns ask, response. Supported: query/')
    extra = Reading(columns={'ask': 'query', 'reply': 'response', 'repyl': ''})
    with pytest.raises(ConfigError) as raised:
        plan_rows([file], reading=extra)
    assert raised.value.problems == (
        f"--columns 'repyl=': {file} has no column repyl: did you mean 'reply'? Its columns are ask, reply. Write the "
        'name in the file first: NAME=(nothing).',
    )


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / 'a.jsonl', [{'question': 'a', 'answer': 'b', 'query': 'c'}]))
    with pytest.raises(ConfigError) as raised:
        plan_rows([file], reading=Reading(columns={'question': 'query', 'answer': 'response'}))
    assert str(raised.value) == (
        f"{file}:1: --columns renames the column question to 'query', but the file already has a column 'query'. To "
        "drop the file's own 'query', add 'query=' to --columns. To keep it, remove 'question=query' from --columns."
    )


@pytest.mark.slow
@pytest.mark.parametrize('streams', [False, True])
def test_a_run_renames_records_repeats_and_answers(
    streams: bool, run_sft: Run, tmp_path: Path, problems: Problems, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{'frage': f'what is {i}?', 'antwort': f'the answer is {i}'} for i in range(30)]
    file = str(write_jsonl(tmp_path / 'rows.jsonl', rows))
    flags = ['--dataset', file, '--max_steps', '1', '--preflight', 'false']
    flags += ['--streaming', 'true', '--stream_val_rows', '2'] if streams else ['--dataset_test_ratio', '0.1']
    run = run_sft(*flags, '--columns', 'frage=query', '--columns', 'antwort=response')
    lock = json.loads((run / 'lock.json').read_text())
    assert lock['command'][lock['command'].index('--columns') :][:3] == ['--columns', 'frage=query', 'antwort=response']

    import llm_sft

    assert llm_sft.main(['--from_run', str(run)]) == 0, 'the same names'
    checkpoint = str(run / 'checkpoint-1')
    answering = ['--ckpt_dir', checkpoint, '--max_new_tokens', '2', '--do_sample', 'false']
    assert llm_infer.main(answering) == 0
    assert capsys.readouterr().out.count('[QUERY] what is') == (2 if streams else 3)
    other = str(write_jsonl(tmp_path / 'other.jsonl', [{'query': 'a', 'response': 'b'}]))
    assert llm_infer.main([*answering, '--dataset', other]) == 0, 'the names of the run belong to its data'
    assert llm_infer.main([*answering, '--dataset', other, '--columns', 'x=query']) == 2
    assert "--columns 'x=query'" in problems()[-1]
    resumed = run_sft(*flags, '--columns', 'frage=query,antwort=output', '--max_steps', '2', expect=2)
    assert 'unknown columns query, output' in problems()[-1] and resumed.name == 'output'


def test_names_for_registered_data_alone_have_no_effect(run_sft: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run_sft('--dataset', 'sql-demo#20', '--columns', 'a=query', '--dry_run', 'true')
    reason = 'the columns of a registered data set are those of its entry'
    assert f'warning: --columns has no effect: {reason}.' in capsys.readouterr().out


SAID = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'good'}]
WORSE = [SAID[0], {'role': 'assistant', 'content': 'bad'}]
PREFERENCES: list[tuple[dict[str, Any], str]] = [
    ({'prompt': 'q', 'chosen': 'good', 'rejected': 'bad'}, 'prompt=query,chosen=response'),
    ({'question': 'q', 'chosen': 'good', 'rejected': 'bad', 'score': 1}, 'question=query,chosen=response'),
    ({'instruction': 'q', 'input': '', 'chosen': 'good', 'rejected': 'bad'}, 'chosen=output'),
    ({'prompt': 'q', 'chosen': SAID, 'rejected': WORSE}, 'chosen=messages'),
    ({'chosen': SAID, 'rejected': WORSE}, 'chosen=messages'),
    ({'prompt': SAID[:1], 'chosen': SAID[1:], 'rejected': WORSE[1:]}, 'chosen=completion'),
    ({'question': 'q', 'chosen': SAID[1], 'rejected': WORSE[1]}, 'question=prompt,chosen=completion'),
]


@pytest.mark.parametrize(('row', 'words'), PREFERENCES)
def test_the_chosen_replies_of_preference_rows_are_trained_with_the_named_flag(
    row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = str(write_jsonl(tmp_path / 'a.jsonl', [row]))
    with pytest.raises(ConfigError) as raised:
        plan_rows([file])
    assert str(raised.value) == (
        f'{file}:1: unknown columns {", ".join(row)}. These are preference rows, and this toolkit has no preference '
        f'training. To train the chosen replies, add --columns {words}.'
    )
    columns, problems = read_columns(words.split(','))
    (made,) = get_dataset([file], test_ratio=0, reading=Reading(columns=columns)).train
    assert not problems and [message['content'] for message in made.messages] == ['q', 'good']


def test_plain_chosen_texts_are_plain_text(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / 'a.jsonl', [{'chosen': 'Human: q', 'rejected': 'Human: p'}]))
    with pytest.raises(ConfigError, match=r'To train the chosen replies, add --columns chosen=text\.'):
        plan_rows([file])


@pytest.mark.parametrize('label', [False, 'False'])
def test_replies_that_are_rated_as_bad_are_not_trained(label: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {'prompt': 'a', 'completion': 'good', 'label': True},
        {'prompt': 'b', 'completion': 'bad', 'label': label},
    ]
    file = str(write_jsonl(tmp_path / 'a.jsonl', rows))
    found = plan_rows([file], test_ratio=0)
    assert found.left_out.counts == {RATED_BAD: 1} and found.noted.counts == {}
    columns = read_columns(['label='])[0]
    both = plan_rows([file], test_ratio=0, reading=Reading(columns=columns))
    assert not both.left_out and [row.messages[-1]['content'] for _, row in both.rows(TRAIN)] == ['good', 'bad']

    rows[0]['label'] = 'True' if isinstance(label, str) else True  # a CSV file has only text
    good = plan_rows([str(write_jsonl(tmp_path / 'd.jsonl', [rows[0], rows[0]]))], test_ratio=0)
    assert not good.left_out and good.noted.counts == {}

    chats = write_jsonl(tmp_path / 'b.jsonl', [{'messages': SAID, 'label': True}, {'messages': WORSE, 'label': label}])
    assert plan_rows([str(chats)], test_ratio=0).left_out.counts == {RATED_BAD: 1}
    other = write_jsonl(tmp_path / 'c.jsonl', [{'query': 'is it spam?', 'response': 'no', 'label': False}])
    assert not plan_rows([str(other)], test_ratio=0).left_out


@pytest.mark.parametrize('name', ["it's.json", 'rows.json.gz', 'rows.jsonl'])
def test_rows_inside_an_object_are_found_with_the_named_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{'query': 'für', 'response': 'b'}, {'query': 'c', 'response': 'd'}]
    whole = json.dumps({'version': 1, 'data': rows}, indent=None if name == 'rows.jsonl' else 1, ensure_ascii=False)
    Path(name).write_bytes(gzip.compress(whole.encode()) if name.endswith('.gz') else whole.encode())
    with pytest.raises(ConfigError) as raised:
        plan_rows([name])
    said, _, command = str(raised.value).partition('python -c ')
    assert said == (
        f'{name}:1: unknown columns version, data. The rows are in the key data of this object. Write them to a file '
        'of their own: '
    )
    subprocess.run([sys.executable, '-c', *shlex.split(command)], check=True)
    assert [row for _, row in read_rows(Path('rows.json'))] == rows


MIXED: list[dict[str, Any]] = [
    {'instruction': 'a', 'output': 'b'},
    {'messages': [*SAID, *SAID]},
    {'instruction': 'c', 'output': 'd', 'id': 7},
    {'conversations': [{'from': 'human', 'value': 'e'}, {'from': 'gpt', 'value': 'f'}]},
    {'prompt': 'g', 'completion': 'h'},
    {'instruction': 'i', 'messages': SAID},
    {'text': 'plain'},
]


def test_each_row_of_a_file_is_read_by_its_own_columns(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / 'a.jsonl', MIXED))
    plan = plan_rows([file], test_ratio=0.4)
    assert plan.left_out.counts == {
        'columns are missing that the first row has: output': 1,
        'columns are missing that the first row has: instruction, output': 1,
    }
    rows = [row for _, row in plan.rows(TRAIN, VAL)]
    assert [row.messages[-1]['content'] for row in rows] == ['b', 'good', 'd', 'f', 'h']
    assert [row.loss_scope for row in rows] == ['last_round', 'all_rounds', 'last_round', 'all_rounds', 'last_round']
    assert [line for line in plan.decisions(None) if 'read too' in line] == [
        f'{file}: rows with messages are read too, from {file}:2: each row by its own columns',
        f'{file}: rows with conversations are read too, from {file}:4: each row by its own columns',
        f'{file}: rows with prompt/completion are read too, from {file}:5: each row by its own columns',
    ]
    kept = read_held_out(held_out(plan), [file])
    assert kept is not None and [row.origin for row in kept] == [row.origin for _, row in plan.rows(VAL)]
    streams = open_streams([file], hub='modelscope')
    assert [row.origin for row in first_rows(streams.sources, 9)] == [row.origin for row in rows]


def test_rows_of_several_formats_are_accounted_for_and_judged_one_by_one(tmp_path: Path) -> None:
    rows = get_dataset([str(write_jsonl(tmp_path / 'a.jsonl', MIXED))], test_ratio=0).train
    account = Account()
    for row, encoded in zip(rows, ENCODER.encode(rows), strict=True):
        account.add(row, encoded, EncodedAgain(ENCODER))
    assert account.unused == {} and account.fields['reply text'] == {'trained': 12}
    prove_template(ENCODER, rows, tmp_path)

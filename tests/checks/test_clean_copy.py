"""The cleaned copy (--write_clean): reading it again gives the same rows, and what is not in it is counted."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_sft
from tests.support.runs import ROOT, get_dataset, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from tests.support.vision_models import GOLDENS, QWEN25_VL, QWEN_VL, picture_rows, seeing_folder
from utils import dataset
from utils.base.names import LossScope
from utils.cli.arguments import SftArguments
from utils.cli.parser import parse
from utils.cli.resolve import resolve_sft
from utils.encode.make import make_encoder
from utils.formats.conversation import Row
from utils.formats.json_text import json_as_written

Raw = dict[str, Any]
Problems = Callable[[], list[str]]
# Prints reasoning, tools, calls, names and ids, so that each of them decides the ids of a row.
TEMPLATE = (
    '{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}'
    "{{ '<|im_start|>' + m.role + (m.name or '') + (m.tool_call_id or '') + '\n' + (m.reasoning_content or '') }}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model directory without weights: the data check needs none."""
    made = tmp_path_factory.mktemp('models') / 'no-weights'
    make_model().config.save_pretrained(made)
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(made)
    return made


def check(model: Path, data: str | Path, out: Path, *flags: str) -> tuple[int, Raw]:
    """Run the data check. Returns its exit code and its report."""
    words = [
        '--model_id_or_path',
        str(model),
        '--output_dir',
        str(out),
        '--dataset',
        *str(data).split(),
        '--max_length',
    ]
    code = llm_sft.main([*words, '-1', '--check_dataset', 'true', *flags])
    return code, json.loads(next(out.glob('*/dataset_report.json')).read_text('utf-8'))


class Maker:
    """Makes rows of random shapes that can be trained on. `number` makes the texts different from other rows."""

    def __init__(self, rng: random.Random, number: int) -> None:
        self.rng = rng
        self.number = number

    def is_drawn(self, share: float) -> bool:
        return self.rng.random() < share

    def text(self) -> str:
        words = ['red', 'naïve', '你好', 'Ünder', ' \n', '🙂', '"x"', '\\', '1.10', '<b>']
        return f'{" ".join(self.rng.choices(words, k=self.rng.randrange(1, 6)))} {self.number}'

    def call(self) -> Raw:
        values = ['1.10', '1e22', '-0.0', '[0.50, {"deep": -0}]', '123456789012345678901', '"x"']
        arguments = f'{{"b": {self.rng.choice(values)}, "a": null, "n": "{self.number}"}}'
        given = self.rng.choice([json.loads(arguments), arguments, f'not json {self.number}'])
        made: Raw = {'arguments': given, 'name': f'f{self.number}'}
        made = {'function': made} if self.is_drawn(0.5) else made
        return made | ({'id': f'id{self.number}'} if self.is_drawn(0.5) else {})

    def reply(self, *, is_last: bool = False) -> Raw:
        made: Raw = {'role': self.rng.choice(['assistant', 'gpt', 'model']), 'content': self.text()}
        if self.is_drawn(0.3):
            made[self.rng.choice(['reasoning', 'thinking', 'reasoning_content'])] = self.text()
        if self.is_drawn(0.3) and not is_last:
            made[self.rng.choice(['weight', 'loss', 'train'])] = self.rng.choice([0, 1, True, False])
        return made | ({'score': 2.5} if self.is_drawn(0.2) else {})

    def called(self) -> list[Raw]:
        result: Raw = {'role': self.rng.choice(['tool', 'observation']), 'content': self.text()}
        result |= {'tool_call_id': f'id{self.number}'} if self.is_drawn(0.5) else {}
        return [{**self.reply(), 'tool_calls': [self.call() for _ in range(self.rng.randint(1, 2))]}, result]

    def turns(self) -> list[Raw]:
        found: list[Raw] = []
        for _ in range(self.rng.randrange(3)):
            found += [{'role': self.rng.choice(['user', 'human']), 'content': self.text(), 'lang': 'de'}]
            found += [*(self.called() if self.is_drawn(0.5) else ()), self.reply()]
        asked: Raw = {
            'role': 'user',
            'content': self.rng.choice([self.text(), [{'type': 'text', 'text': self.text()}]]),
        }
        return [*found, asked | ({'name': 'Ann'} if self.is_drawn(0.3) else {}), self.reply(is_last=True)]

    def chat(self, shape: str) -> Raw:
        turns = self.turns()
        row: Raw = {}
        if self.is_drawn(0.3):
            turns.insert(0, {'role': self.rng.choice(['system', 'developer']), 'content': self.text()})
        elif self.is_drawn(0.5):
            row['system'] = self.text()
        if shape == 'conversations':
            keys = {'role': 'from', 'content': 'value'}
            turns = [{keys.get(key, key): value for key, value in turn.items()} for turn in turns]
        return {**row, shape: json.dumps(turns) if self.is_drawn(0.3) else turns}

    def pair(self, shape: str) -> Raw:
        names = ('query', 'response') if shape == 'query' else ('instruction', 'output')
        row: Raw = {names[0]: self.text(), names[1]: self.text()}
        if shape == 'instruction' and self.is_drawn(0.5):
            row['input'] = self.text()
        if self.is_drawn(0.7):
            row['history'] = [[self.text(), self.text()] for _ in range(self.rng.randrange(3))]
        return row | ({'system': self.text()} if self.is_drawn(0.3) else {})

    def prompted(self) -> Raw:
        asked, answered = self.rng.choice([('prompt', 'completion'), ('question', 'answer'), ('input', 'output')])
        *before, last = self.turns()
        row: Raw = {asked: before, answered: [last]} if self.is_drawn(0.6) else {asked: self.text(), answered: last}
        if isinstance(row[asked], str) and self.is_drawn(0.5):
            row |= {answered: self.text(), 'history': [[self.text(), self.text()]]}
        return row

    def row(self) -> Raw:
        shape = self.rng.choice(['query', 'instruction', 'messages', 'conversations', 'prompt'])
        if shape == 'prompt':
            row = self.prompted()
        else:
            row = self.pair(shape) if shape in ('query', 'instruction') else self.chat(shape)
        if self.is_drawn(0.4):
            tool = {'name': f'f{self.number}', 'parameters': {'type': 'object', 'default': 2.5}}
            tools = self.rng.choice([[tool], json.dumps([{'type': 'function', 'function': tool}])])
            row[self.rng.choice(['tools', 'functions'])] = tools
        return row | ({'id': self.number, 'meta': {'at': [None, 1.5]}} if self.is_drawn(0.5) else {})


def written(row: Raw) -> str:
    """Return a row as JSON with spellings of numbers that a JSON writer changes."""
    text = json.dumps(row, ensure_ascii=random.Random(json.dumps(row)).random() < 0.5)
    return text.replace(': 2.5', ': 2.50').replace('1.5]', '1.50]').replace('1e+22', '1E22').replace('1.1,', '1.10,')


def files_of(rows: list[Raw], tmp_path: Path) -> list[Path]:
    """Write each row to a file of its shape. Returns the files."""
    files: dict[str, list[str]] = {}
    for row in rows:
        names = ('query', 'instruction', 'messages', 'conversations', 'prompt', 'question', 'input')
        shape = next(name for name in names if name in row)
        files.setdefault(shape, []).append(written(row))
    for shape, texts in files.items():
        (tmp_path / f'{shape}.jsonl').write_text('\n'.join(texts) + '\n')
    return [tmp_path / f'{shape}.jsonl' for shape in files]


def same(row: Row) -> str:
    """Return what a row gives the template, without the marks on replies."""
    messages = [{key: value for key, value in message.items() if key != 'loss'} for message in row.messages]
    return json_as_written([messages, row.tools, row.images, sorted(row.unused)])


@pytest.mark.parametrize('scope', [None, 'all_rounds', 'last_round'])
@pytest.mark.parametrize('seed', [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_a_copy_of_random_rows_is_read_as_the_same_rows(
    seed: int, scope: LossScope | None, folder: Path, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    rows = [Maker(rng, number).row() for number in range(120)]
    files = files_of(rows, tmp_path)
    copy = tmp_path / ('copy.jsonl.gz' if seed % 2 else 'copy.jsonl')
    flags = ['--loss_scope', scope] if scope else []
    data = ' '.join(map(str, files))
    code, report = check(folder, data, tmp_path / 'out', '--write_clean', str(copy), *flags)
    assert (code, report['left_out'], report['defects']) == (0, {}, {})
    assert report['clean_copy'] == {'file': str(copy), 'rows': 120, 'not_written': {}, 'not_copied': {}}

    old, new = (get_dataset(list(map(str, words)), test_ratio=0).train for words in (files, [copy]))
    assert list(map(same, new)) == list(map(same, old)) and len(new) == 120
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    encoder = make_encoder(
        tokenizer, template_type='auto', system='', system_typed=False, max_length=-1, loss_scope=scope
    )
    first, second = encoder.encode(old), encoder.encode(new)
    for one, other in zip(first, second, strict=True):
        assert (other.input_ids, other.trained, other.earlier) == (one.input_ids, one.trained, one.earlier)
        assert other.pieces == one.pieces and other.notes == one.notes
    assert sum(bool(one.earlier) for one in first) > 10 or scope == 'last_round'

    again, checked = check(folder, copy, tmp_path / 'out', *flags)
    assert (again, checked['left_out'], checked['defects']) == (0, {}, {})
    structure = ('roles and types', 'tools', 'tool calls')
    fields = [{k: v for k, v in told['account']['fields'].items() if k not in structure} for told in (report, checked)]
    fields[0]['user text']['context'] += sum(
        'instruction' in row and 'input' in row for row in rows
    )  # the line end between two columns
    assert fields[0] == fields[1] and report['account']['unused'] == checked['account']['unused']
    for key in ('tokens', 'trained_share'):
        assert report['lengths'][key] == checked['lengths'][key]


DEFECTS: list[Raw] = [
    {'query': 'a', 'response': 'b', 'id': 1},
    {'query': 'a', 'response': 'b', 'id': 2},
    {'query': 'a', 'response': 'other'},
    {'query': 'c', 'response': ''},
    {'query': 'd', 'response': 'e', 'history': [['x', ' ']]},
    {'query': 'mojibake Ã¤', 'response': 'f <|im_end|>'},
    {'query': 'a', 'response': 'b', 'id': 3},
    {'query': 'g', 'response': 'h' * 300},
]


def test_left_out_and_repeated_rows_are_not_written_and_suspicious_rows_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', DEFECTS)
    with file.open('a') as stream:
        stream.write('{"query": \n')
    copy = tmp_path / 'new' / 'copy.jsonl'
    flags = ['--write_clean', str(copy), '--max_length', '100', '--dataset_test_ratio', '0']
    code, report = check(folder, file, tmp_path / 'out', *flags)
    assert code == 1
    not_json = next(reason for reason in report['clean_copy']['not_written'] if 'the file ends before' in reason)
    assert not_json.startswith('this line is not JSON (Expecting value at column 11): ')
    assert report['clean_copy']['not_written'] == {'duplicate row': 2, not_json: 1, 'empty response': 1}
    said = f'wrote 5 of 9 rows to {copy}; not written: 2 duplicate row, 1 {not_json}, 1 empty response\n'
    assert said in capsys.readouterr().out
    rows = [json.loads(line) for line in copy.read_text().splitlines()]
    assert [row['messages'][-1]['content'] for row in rows] == ['b', 'other', 'e', 'f <|im_end|>', 'h' * 300]
    assert rows[0]['id'] == 1 and rows[2]['messages'][1] == {'role': 'assistant', 'content': ' ', 'loss': False}
    assert list(copy.parent.iterdir()) == [copy]
    _, again = check(folder, copy, tmp_path / 'out', '--max_length', '100', '--dataset_test_ratio', '0')
    assert again['left_out'] == {} and again['defects'].keys() == report['defects'].keys() - {'duplicate row'}


def test_a_row_that_the_template_refuses_is_not_written(folder: Path, tmp_path: Path) -> None:
    call = {'role': 'assistant', 'content': '', 'tool_calls': [{'name': 'f', 'arguments': {}}]}
    rows = [
        {'messages': [{'role': 'user', 'content': f'{i}'}, {'role': 'assistant', 'content': 'x'}]} for i in range(3)
    ]
    rows[1]['messages'][1] = call
    copy = tmp_path / 'copy.jsonl'
    file = write_jsonl(tmp_path / 'a.jsonl', rows)
    _, report = check(folder, file, tmp_path / 'out', '--write_clean', str(copy), '--template_type', 'chatml')
    assert (report['clean_copy']['rows'], sum(report['clean_copy']['not_written'].values())) == (2, 1)
    assert len(copy.read_text().splitlines()) == 2


def test_rows_of_a_wrong_order_are_accounted_for_as_in_a_run_and_written(folder: Path, tmp_path: Path) -> None:
    odd = [{'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'}, {'role': 'assistant', 'content': 'c'}]
    file = write_jsonl(tmp_path / 'a.jsonl', [{'messages': odd}, {'messages': odd[1:]}])
    copy = tmp_path / 'copy.jsonl'
    code, report = check(folder, file, tmp_path / 'out', '--write_clean', str(copy))
    assert code == 1 and report['clean_copy']['rows'] == 2
    assert report['account']['fields']['reply text'] == {'trained': 2}


def test_rows_of_validation_splits_are_counted_and_a_repeated_training_row_is_kept_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = (
        [{'query': f'{i}', 'response': 'x'} for i in range(4)],
        [{'query': f'{i}', 'response': 'x'} for i in (3, 9)],
    )
    later = [{'query': '9', 'response': 'x'}, {'query': '9', 'response': 'x'}, {'query': 'new', 'response': 'x'}]
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'pair', lambda: halves)
    file = write_jsonl(tmp_path / 'a.jsonl', later)
    copy = tmp_path / 'copy.jsonl'
    _, report = check(folder, f'pair {file}', tmp_path / 'out', '--write_clean', str(copy), '--dataset_test_ratio', '0')
    assert report['clean_copy']['not_written'] == {'row of a validation set': 2, 'duplicate row': 1}
    assert report['defects'].keys() == {'validation row that is in the training set', 'duplicate row'}
    questions = [json.loads(line)['messages'][0]['content'] for line in copy.read_text().splitlines()]
    assert questions == ['0', '1', '2', '3', '9', 'new']

    flags = ['--write_clean', str(tmp_path / 'two.jsonl'), '--val_dataset', 'pair']
    _, report = check(folder, file, tmp_path / 'out', *flags)
    assert report['clean_copy']['not_written'] == {'row of a validation set': 2, 'duplicate row': 1}
    assert report['clean_copy']['rows'] == 2


def test_all_rows_are_copied_unless_a_number_is_typed(folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', [{'query': f'{i}', 'response': 'x'} for i in range(50)])
    code, report = check(folder, file, tmp_path / 'out', '--write_clean', str(tmp_path / 'all.jsonl'))
    assert code == 0 and report['clean_copy']['rows'] == 50
    assert report['decisions'] == ['train_dataset_sample = -1 because --write_clean copies all rows']
    flags = ['--write_clean', str(tmp_path / 'some.jsonl'), '--train_dataset_sample', '10']
    _, report = check(folder, f'{file}#40', tmp_path / 'out', *flags)
    drawn = 'row that is not drawn (--train_dataset_sample, or # or % after a data set)'
    assert report['clean_copy'] == {
        'file': str(tmp_path / 'some.jsonl'), 'rows': 11, 'not_written': {drawn: 39}, 'not_copied': {},
    }  # fmt: skip


def test_nothing_is_written_if_no_row_is_left(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', [{'query': 'a', 'response': ''}])
    copy = tmp_path / 'new' / 'copy.jsonl'
    code, _ = check(folder, file, tmp_path / 'out', '--write_clean', str(copy))
    assert code == 1 and not list(copy.parent.iterdir())
    said = f'wrote no file {copy}: none of 1 rows can be written; not written: 1 empty response\n'
    assert said in capsys.readouterr().out


def test_what_cannot_be_copied_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    turns = [
        {'from': 'human', 'value': 'a', 'content': 'other', 'lang': 'de'},
        {'from': 'gpt', 'value': 'b', 'tool_calls': [{'name': 'f', 'arguments': '{}', 'index': 3}]},
    ]
    rows = [{'conversations': json.dumps(turns), 'photo': b'\x00', 'at': datetime.date(2026, 1, 2), 'number': 7}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
    copy = tmp_path / 'copy.jsonl'
    check(folder, tmp_path / 'a.parquet', tmp_path / 'out', '--write_clean', str(copy))
    names = ['message key `content`', 'tool call key `index`', 'column `photo`']
    said = capsys.readouterr().out.splitlines()[-2]
    assert said.startswith('not copied: ') and sorted(said.removeprefix('not copied: ').split(', ')) == sorted(
        f'{name} in 1 row' for name in names
    )
    assert json.loads(copy.read_text()) == {
        'messages': [
            {'role': 'user', 'content': 'a', 'lang': 'de'},
            {'role': 'assistant', 'content': 'b', 'tool_calls': [
                {'type': 'function', 'function': {'name': 'f', 'arguments': {}}}]},
        ],
        'at': '2026-01-02',
        'number': 7,
    }  # fmt: skip


def test_plain_text_is_copied_as_text(folder: Path, tmp_path: Path) -> None:
    texts = ['one\n\ntwo', ' three ', 'one\n\ntwo']
    file = write_jsonl(tmp_path / 'a.jsonl', [{'text': text, 'url': f'u{n}'} for n, text in enumerate(texts)])
    copy = tmp_path / 'copy.jsonl'
    code, report = check(folder, file, tmp_path / 'out', '--write_clean', str(copy), '--dataset_test_ratio', '0')
    assert code == 1 and report['clean_copy']['not_written'] == {'duplicate row': 1}
    rows = [json.loads(line) for line in copy.read_text().splitlines()]
    assert rows == [{'text': 'one\n\ntwo', 'url': 'u0'}, {'text': ' three ', 'url': 'u1'}]
    again, checked = check(folder, copy, tmp_path / 'out', '--dataset_test_ratio', '0')
    assert (again, checked['lengths']['trained_share'], checked['rows']['train']) == (0, 1.0, 2)

    (tmp_path / 'b.txt').write_bytes('\ufefffour\n\nfünf'.encode('utf-16-le'))
    flags = ['--write_clean', str(tmp_path / 'other.jsonl'), '--text_rows', 'paragraph']
    check(folder, tmp_path / 'b.txt', tmp_path / 'out', *flags)
    assert (tmp_path / 'other.jsonl').read_text('utf-8') == '{"text": "four"}\n{"text": "fünf"}\n'


def test_conversations_and_plain_text_do_not_share_a_copy(folder: Path, tmp_path: Path, problems: Problems) -> None:
    chat = write_jsonl(tmp_path / 'chat.jsonl', [{'query': 'a', 'response': 'b'}])
    text = write_jsonl(tmp_path / 'text.jsonl', [{'text': 'a'}])
    copy = tmp_path / 'copy.jsonl'
    words = ['--model_id_or_path', str(folder), '--output_dir', str(tmp_path / 'out'), '--check_dataset', 'true']
    assert llm_sft.main([*words, '--dataset', str(chat), str(text), '--write_clean', str(copy)]) == 2
    assert problems() == [
        f'--write_clean {copy}: {text}:1 and the rows before it are of two kinds, conversations and plain text, and a '
        'file can hold only one kind. Run the command once for each kind of data, each time with a new file for '
        '--write_clean.'
    ]
    assert not copy.exists()


def test_rows_that_overlong_drops_or_refuses_are_not_written(folder: Path, tmp_path: Path) -> None:
    rows = [{'query': 'a', 'response': 'b'}, {'query': 'c', 'response': 'd' * 200}]
    file = write_jsonl(tmp_path / 'a.jsonl', rows)
    for overlong in ('drop', 'refuse', 'cut'):
        copy = tmp_path / f'{overlong}.jsonl'
        flags = ['--write_clean', str(copy), '--overlong', overlong, '--max_length', '60']
        _, report = check(folder, file, tmp_path / 'out', *flags)
        written = report['clean_copy']
        assert (written['rows'], sum(written['not_written'].values())) == ((2, 0) if overlong == 'cut' else (1, 1))


def test_bytes_of_images_are_copied_as_paths_only_for_a_model_that_sees_them(folder: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    picture = (GOLDENS / 'qwenvl-a' / 'a.png').read_bytes()
    row = {'query': 'what?', 'response': 'blue', 'image': {'bytes': picture, 'path': 'a.png'}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / 'a.parquet')
    for number, model in enumerate((folder, seeing_folder(QWEN25_VL, tmp_path / 'model'))):
        copy = tmp_path / f'{number}.jsonl'
        out = tmp_path / f'out{number}'
        code, report = check(model, tmp_path / 'a.parquet', out, '--write_clean', str(copy))
        images = json.loads(copy.read_text()).get('images')
        assert code == 0 and (images is None) == (number == 0)
        assert report['clean_copy']['not_copied'] == ({'column `image`': 1} if number == 0 else {})
        if images:
            assert Path(images[0]).read_bytes() == picture
        again, checked = check(model, copy, out)
        assert again == 0 and checked['lengths'] == report['lengths']


def test_half_of_a_character_in_an_unused_column_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').write_text('{"query": "ä", "response": "b", "note": "\\ud83d ä"}\n')
    copy = tmp_path / 'copy.jsonl'
    check(folder, tmp_path / 'a.jsonl', tmp_path / 'out', '--write_clean', str(copy))
    assert json.loads(copy.read_text('utf-8'))['note'] == '\ud83d ä'


@pytest.mark.slow
@pytest.mark.parametrize('key', [QWEN25_VL, QWEN_VL])
@pytest.mark.parametrize(
    'target', ['rows/copy.jsonl', 'rows/pictures/copy.jsonl', 'elsewhere/copy.jsonl', 'copy.jsonl']
)
def test_images_are_checked_and_their_paths_are_right_from_the_copy(key: str, target: str, tmp_path: Path) -> None:
    model = seeing_folder(key, tmp_path / 'model')
    file = picture_rows(tmp_path / 'rows')
    copy = tmp_path / target
    code, report = check(model, file, tmp_path / 'out', '--write_clean', str(copy), '--dataset_test_ratio', '0')
    assert (code, report['clean_copy']['rows']) == (0, 10)
    assert report['account']['fields']['images']['context'] > 0
    shutil.rmtree(tmp_path / 'out')
    again, checked = check(model, copy, tmp_path / 'out', '--dataset_test_ratio', '0')
    assert again == 0 and checked['lengths'] == report['lengths']
    paths = [path for line in copy.read_text().splitlines() for path in json.loads(line).get('images', ())]
    start = {'rows/copy.jsonl': 'pictures/', 'rows/pictures/copy.jsonl': '', 'copy.jsonl': 'rows/pictures/'}
    wanted = start.get(target, f'{tmp_path}/rows/pictures/')
    assert len(paths) == 8 and {path.removesuffix('a.png').removesuffix('b.png') for path in paths} == {wanted}


def test_equal_rows_about_images_of_different_folders_are_different_rows(tmp_path: Path, folder: Path) -> None:
    for name in 'xy':
        (tmp_path / name).mkdir()
        shutil.copy(GOLDENS / 'qwenvl-a' / f'{"ab"["xy".index(name)]}.png', tmp_path / name / 'p.png')
        write_jsonl(tmp_path / name / 'rows.jsonl', [{'query': '<img>p.png</img>what?', 'response': 'a thing'}] * 2)
    copy = tmp_path / 'copy.jsonl'
    _, report = check(folder, f'{tmp_path}/*/rows.jsonl', tmp_path / 'out', '--write_clean', str(copy))
    assert sum(report['clean_copy']['not_written'].values()) == 2
    told = [json.loads(line)['messages'][0]['content'] for line in copy.read_text().splitlines()]
    assert told == ['<img>x/p.png</img>what?', '<img>y/p.png</img>what?']


def test_a_killed_check_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', [{'query': f'{i}', 'response': 'x'} for i in range(3000)])
    copy = tmp_path / 'new' / 'copy.jsonl'
    code = (
        'import os, signal, sys, llm_sft\n'
        'from utils.checks.clean_copy import CleanCopy\n'
        'CleanCopy.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n'
        'llm_sft.main(sys.argv[1:])\n'
    )
    words = ['--model_id_or_path', str(folder), '--output_dir', str(tmp_path / 'out'), '--dataset', str(file)]
    words += ['--check_dataset', 'true', '--write_clean', str(copy)]
    done = subprocess.run([sys.executable, '-c', code, *words], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL and not copy.exists()
    assert llm_sft.main(words) == 0
    assert list(copy.parent.iterdir()) == [copy] and len(copy.read_text().splitlines()) == 3000


def test_an_unusable_file_is_refused_before_anything_is_read(
    folder: Path, tmp_path: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'rows').mkdir()
    file = write_jsonl(tmp_path / 'rows' / 'a.jsonl', [{'query': 'a', 'response': 'b'}])
    other = write_jsonl(tmp_path / 'there.jsonl', [])
    words = ['--model_id_or_path', str(folder), '--output_dir', str(tmp_path / 'out')]

    def refused(dataset: str | Path, target: str | Path, *flags: str) -> list[str]:
        given = [
            *words,
            '--dataset',
            str(dataset),
            '--write_clean',
            str(target),
            *(flags or ('--check_dataset', 'true')),
        ]
        before = len(problems())
        assert llm_sft.main(given) == 2
        return problems()[before:]

    new = tmp_path / 'new.txt'
    assert refused(file, new, '--check_dataset', 'false') == [
        f'--write_clean {new}: only the data check writes the clean copy. Add --check_dataset true to run the check.',
        f'--write_clean {new}: the clean copy consists of JSON lines. Give a name that ends in .jsonl or .jsonl.gz.',
    ]
    assert refused(file, file) == [
        f'--write_clean {file} is one of the data files, which are never changed. Name a new file.'
    ]
    assert refused(file, other) == [f'--write_clean {other} exists already and is not replaced. Name a new file.']
    lies = (
        '--dataset or --val_dataset names a folder or a pattern that includes this new file, so the next run would '
        'read the rows twice, from the old files and from the new file. '
    )
    inside = tmp_path / 'rows' / 'b.jsonl'
    for word in (tmp_path / 'rows', f'{tmp_path}/ro*/*.jsonl'):
        assert refused(word, inside) == [f'--write_clean {inside}: {lies}Name a file in another folder.']
    below = file / 'b.jsonl'
    assert refused(file, below) == [f'--write_clean {below} cannot be created: {file} is a file. Give another path.']
    monkeypatch.setenv('WORLD_SIZE', '2')
    given = [*words, '--dataset', str(file), '--write_clean', 'x.jsonl', '--check_dataset', 'true']
    assert resolve_sft(parse(SftArguments, given, program='llm_sft.py', about='')).problems.found == [
        '--write_clean x.jsonl: only one process can write the clean copy. Start the command with python, not torchrun.'
    ]
    assert not (tmp_path / 'out').exists()


def test_a_file_that_appears_or_a_disk_that_is_full_is_one_message(
    folder: Path, tmp_path: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.checks import clean_copy

    file = write_jsonl(tmp_path / 'a.jsonl', [{'query': 'a', 'response': 'b'}])
    copy = tmp_path / 'copy.jsonl'
    words = ['--model_id_or_path', str(folder), '--output_dir', str(tmp_path / 'out'), '--dataset', str(file)]
    words += ['--check_dataset', 'true', '--write_clean', str(copy)]

    def full(row: Any) -> bytes:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as changed:
        changed.setattr(clean_copy, 'json_line', full)
        assert llm_sft.main(words) == 2
    said = 'No space left on device. Give a file in another folder.'
    assert problems() == [f'--write_clean {copy} cannot be written: {said}']
    finish = clean_copy.CleanCopy.finish

    def late(self: clean_copy.CleanCopy) -> None:
        copy.touch()
        finish(self)

    monkeypatch.setattr(clean_copy.CleanCopy, 'finish', late)
    assert llm_sft.main(words) == 2
    assert problems()[1:] == [f'--write_clean {copy} was made by another program meanwhile. Name a new file.']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.jsonl', 'copy.jsonl', 'out']


def test_a_compressed_copy_is_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', [{'query': f'{i}', 'response': 'x'} for i in range(9)])
    for name in ('one.jsonl.gz', 'two.jsonl.gz'):
        check(folder, file, tmp_path / 'out', '--write_clean', str(tmp_path / name))
    assert (tmp_path / 'one.jsonl.gz').read_bytes() == (tmp_path / 'two.jsonl.gz').read_bytes()
    assert len(gzip.decompress((tmp_path / 'one.jsonl.gz').read_bytes()).splitlines()) == 9


def test_rows_of_several_formats_in_one_file_are_copied_as_messages(folder: Path, tmp_path: Path) -> None:
    said = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'one'}]
    rows: list[Raw] = [
        {'instruction': 'a', 'output': 'b'},
        {'messages': [*said, {'role': 'user', 'content': 'r'}, {'role': 'assistant', 'content': 'two'}]},
        {'prompt': 'c', 'completion': 'd', 'label': True},
    ]
    file = write_jsonl(tmp_path / 'a.jsonl', rows)
    copy = tmp_path / 'copy.jsonl'
    code, report = check(folder, file, tmp_path / 'out', '--write_clean', str(copy))
    again, checked = check(folder, copy, tmp_path / 'again')
    assert (code, again, report['clean_copy']['rows']) == (0, 0, 3)
    assert report['lengths'] == checked['lengths']

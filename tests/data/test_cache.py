"""The cache of encoded data: reused only if nothing relevant changed; entries are complete or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.runs import ROOT, get_dataset, write_jsonl
from tests.support.tiny_models import CHATML, make_tokenizer
from utils import dataset
from utils.base import cache
from utils.base.cache import cache_dir, cached_folder
from utils.base.errors import ConfigError
from utils.data.encode_plan import EncodedRows, PreparedData, encode_rows, prepare_data
from utils.data.encoding_report import EncodingReport
from utils.data.plan import plan_rows
from utils.encode.encoded import Encoded
from utils.encode.make import make_encoder

ROWS = [{'query': f'what is {i}?', 'response': f'the answer is {i}.'} for i in range(40)]


def prepare(file: Path, folder: Path, *, tokenizer: Any = None, **flags: Any) -> PreparedData:
    """Prepare a file's rows as a run does."""
    plan_flags = {name: flags.pop(name) for name in ('seed', 'test_ratio', 'train_sample') if name in flags}
    settings = {'template_type': 'auto', 'system': 's', 'system_typed': True, 'max_length': -1, **flags}
    encoder = make_encoder(tokenizer or make_tokenizer(), **settings)
    return prepare_data(encoder, plan_rows([str(file)], **plan_flags), folder)


def entries() -> list[str]:
    return sorted(folder.name for folder in cache_dir().glob('data-*'))


def rows_of(data: PreparedData) -> list[Any]:
    return [part[i] for part in (data.train, data.val) for i in range(len(part))]


def test_mapped_rows_are_the_rows_encoded_in_memory(tmp_path: Path) -> None:
    rows = [{**row, 'history': [['a', f'b{i}']] * (i % 3)} for i, row in enumerate(ROWS)]
    file = write_jsonl(tmp_path / 'a.jsonl', rows)
    data = prepare(file, tmp_path, loss_scope='all_rounds', test_ratio=0.2)
    encoder = make_encoder(
        make_tokenizer(), template_type='auto', system='s', system_typed=True, max_length=-1, loss_scope='all_rounds'
    )
    held = get_dataset([str(file)], test_ratio=0.2)
    for mapped, rows_held in ((data.train, held.train), (data.val, held.val)):
        expected, _ = encode_rows(encoder, rows_held, EncodingReport())
        assert isinstance(mapped.ids, np.memmap) and mapped.ids.dtype == np.int32
        assert [mapped[i] for i in range(len(mapped))] == [expected[i] for i in range(len(expected))]
        assert mapped.lengths() == expected.lengths() and mapped.trained_tokens() == expected.trained_tokens()
        by_length = mapped.longest_first()
        assert by_length.lengths() == sorted(mapped.lengths(), reverse=True)
        assert [len(row['input_ids']) for row in (by_length[0], by_length[-1])] == [
            max(mapped.lengths()), min(mapped.lengths()),
        ]  # fmt: skip
    assert len(data.train) == 32 and 'earlier' in data.train[1]


def test_a_second_run_reuses_what_the_first_encoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(
        tmp_path / 'a.jsonl', [*ROWS, {'query': 'x', 'response': None}, {'query': '</s>', 'response': 'y'}]
    )
    first = prepare(file, tmp_path)
    assert 'reused' not in caplog.text and len(entries()) == 1
    monkeypatch.setattr('utils.data.encode_plan.encode_batch', lambda *_: pytest.fail('encoded again'))
    second = prepare(file, tmp_path)
    assert f'reused: {cache_dir()}/{entries()[0]}' in caplog.text
    assert rows_of(second) == rows_of(first)
    assert second.summary == first.summary
    assert second.summary['left_out'] == {'null response': 1} and sum(second.summary['noted'].values()) == 1
    assert caplog.text.count(f'null response ({file}:41)') == 2


def test_whatever_decides_the_ids_decides_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', ROWS)
    other_words = make_tokenizer(vocab_size=380)
    other_template = make_tokenizer(chat_template=CHATML.replace('assistant', 'ASSISTANT'))
    added = make_tokenizer()
    added.add_tokens(['answer'])
    changes: list[dict[str, Any]] = [
        {}, {'max_length': 20}, {'system': 't'}, {'system_typed': False}, {'template_type': 'chatml'},
        {'template_type': 'default'}, {'loss_scope': 'all_rounds'}, {'seed': 7}, {'test_ratio': 0.5},
        {'train_sample': 10}, {'tokenizer': other_words}, {'tokenizer': other_template}, {'tokenizer': added},
    ]  # fmt: skip
    for count, change in enumerate(changes, start=1):
        prepare(file, tmp_path, **change)
        assert len(entries()) == count, change
    write_jsonl(file, [*ROWS[:-1], {'query': 'what is 39?', 'response': 'the answer is 40.'}])
    prepare(file, tmp_path)
    assert len(entries()) == 14, 'one letter of one row'
    monkeypatch.setattr('utils.data.encode_plan.version', lambda name: '0')
    prepare(file, tmp_path)
    assert len(entries()) == 15, 'another library'


# Source files, and whether a change makes new entries: only files that decide token ids do.
CODE = {
    'encode/encoder.py': 1, 'formats/columns.py': 1, 'data/plan.py': 1, 'preprocess.py': 1,
    'loading/image_processors.py': 1, 'report/html.py': 0, 'train/trainer.py': 0,
}  # fmt: skip


def test_the_code_that_encodes_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', ROWS)
    shutil.copytree(ROOT / 'utils', tmp_path / 'utils')
    monkeypatch.setattr('utils.data.encode_plan.__file__', str(tmp_path / 'utils' / 'data' / 'encode_plan.py'))
    prepare(file, tmp_path)
    for name, changes in CODE.items():
        with (tmp_path / 'utils' / name).open('a') as stream:
            stream.write('# changed\n')
        before = len(entries())
        prepare(file, tmp_path)
        assert len(entries()) - before == changes, name


def test_a_template_that_asks_for_the_date_is_encoded_anew_the_next_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', ROWS)
    dated = make_tokenizer(chat_template="{{ strftime_now('%d %b') }}" + CHATML)
    for today in ('2026-01-01', '2026-01-02'):
        monkeypatch.setattr('time.strftime', lambda _, now=today: now)
        prepare(file, tmp_path, tokenizer=dated)
    assert len(entries()) == 2


def test_rows_of_a_registered_function_are_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(make_tokenizer(), template_type='auto', system='', system_typed=False, max_length=-1)
    for rows in (ROWS, ROWS, ROWS[:-1], [{**row, 'extra': object()} for row in ROWS]):
        monkeypatch.setitem(dataset.DATASET_MAPPING, 'mine', lambda rows=rows: rows)
        prepare_data(encoder, plan_rows(['mine']), tmp_path)
    assert len(entries()) == 3


@pytest.mark.parametrize('damage', ['cut', 'flip', 'remove', 'sums'])
def test_a_damaged_entry_is_made_anew(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', ROWS)
    expected = rows_of(prepare(file, tmp_path))
    ids = cache_dir() / entries()[0] / 'train.ids'
    if damage == 'remove':
        ids.unlink()
    elif damage == 'sums':
        (ids.parent / 'sha256.json').write_text('{"train.ids"')
    else:
        data = bytearray(ids.read_bytes())
        data[9] ^= 1
        ids.write_bytes(data if damage == 'flip' else data[:-4])
    assert rows_of(prepare(file, tmp_path)) == expected
    assert 'this cache folder is damaged and is made again.' in caplog.text and len(entries()) == 1
    caplog.clear()
    prepare(file, tmp_path)
    assert 'reused' in caplog.text


def test_what_fails_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / 'half').write_text('x')
        raise ConfigError('no row')

    with pytest.raises(ConfigError, match='no row'):
        cached_folder('data-x', fail)
    assert list(cache_dir().iterdir()) == []


@pytest.mark.slow
def test_a_process_killed_while_writing_leaves_no_entry_and_is_cleared_away(tmp_path: Path) -> None:
    code = (
        'import os, signal\nfrom utils.base.cache import cached_folder\n'
        "cached_folder('data-x', lambda f: ((f / 'half').write_text('x'), os.kill(os.getpid(), signal.SIGKILL)))"
    )
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False)
    asides = [f for f in cache_dir().iterdir() if f.name.startswith('.aside-')]
    assert len(asides) == 1 and not (cache_dir() / 'data-x').exists()
    os.utime(asides[0], (0, 0))
    cached_folder('data-x', lambda folder: None)
    assert [f.name for f in cache_dir().iterdir()] == ['data-x']


def test_the_least_used_entries_go_when_the_cache_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('ASSAY_CACHE_GIB', str(3.5 * 1000 / 2**30))

    def make(folder: Path) -> None:
        (folder / 'file').write_bytes(bytes(800))

    for number, name in enumerate(('data-a', 'data-b', 'data-c')):
        os.utime(cached_folder(name, make), (number, number))
    assert entries() == ['data-a', 'data-b', 'data-c']
    cached_folder('data-a', lambda folder: pytest.fail('made again'))
    cached_folder('data-d', make)
    assert entries() == ['data-a', 'data-c', 'data-d']


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('ASSAY_CACHE', str(tmp_path / 'file'))
    with pytest.raises(
        ConfigError, match='cannot be written: .*Set the environment variable ASSAY_CACHE to another folder'
    ):
        cached_folder('data-x', lambda folder: None)


def test_a_source_that_cannot_be_read_is_no_fault_of_the_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='gone'):
        cached_folder('data-x', lambda folder: (tmp_path / 'gone').read_text() and None)

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    with pytest.raises(ConfigError, match='the cache folder cannot be written: No space left on device'):
        cached_folder('data-x', full)


def test_two_writers_of_one_entry_leave_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(folder: Path) -> None:
        (folder / 'who').write_text('first')
        cached_folder('data-x', lambda other: (other / 'who').write_text('second') and None)

    assert (cached_folder('data-x', slow) / 'who').read_text() == 'second'
    assert [f.name for f in cache_dir().iterdir()] == ['data-x']


def test_a_run_without_validation_rows_is_mapped_too(tmp_path: Path) -> None:
    data = prepare(write_jsonl(tmp_path / 'a.jsonl', ROWS), tmp_path, test_ratio=0)
    assert len(data.train) == 40 and len(data.val) == 0 and data.val.lengths() == []
    assert data.summary['validation'] == {'rows': 0}


def test_no_array_is_pickled(tmp_path: Path) -> None:
    prepare(write_jsonl(tmp_path / 'a.jsonl', ROWS), tmp_path)
    files = {f.name: f for f in (cache_dir() / entries()[0]).iterdir()}
    assert len(files) == 24
    arrays = [f for name, f in files.items() if not name.endswith('.json')]
    assert not any(f.read_bytes()[:1] == b'\x80' for f in arrays)
    assert json.loads(files['sha256.json'].read_text()).keys() == files.keys() - {'sha256.json'}
    assert len(EncodedRows.map(cache_dir() / entries()[0], 'train')) == 40 - 1


@pytest.mark.slow
def test_the_run_itself_reuses_it(run_sft: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    records = [json.loads((run_sft('--max_steps', '1') / 'run.json').read_text())['data'] for _ in range(2)]
    assert records[0] == records[1] and caplog.text.count('reused: ') == 1
    assert cache.cache_dir().joinpath(entries()[0], 'report.json').is_file()


def test_images_and_origins_are_mapped_as_they_were_held(tmp_path: Path) -> None:
    held, spilled = EncodedRows(), EncodedRows()
    for number in range(7):
        row = Encoded(
            input_ids=list(range(number + 3)), trained=(1, 2 + number % 3), prompt_length=1,
            images=('bild ü.png', 'b.png')[: number % 3], earlier=[(0, 1)] * (number % 2),
        )  # fmt: skip
        for rows in (held, spilled):
            rows.append(row, f'daten ü.jsonl:{number}')
        if number in (2, 3, 6):
            spilled.spill(tmp_path, 'x')
    mapped = EncodedRows.map(tmp_path, 'x')
    for one, other in ((held, mapped), (held.longest_first(), mapped.longest_first())):
        assert [one[i] for i in range(7)] == [other[i] for i in range(7)]
        assert [one.origin(i) for i in range(7)] == [other.origin(i) for i in range(7)]
        assert one.heaviest(2) == other.heaviest(2)
    assert mapped[5]['images'] == ('bild ü.png', 'b.png') and 'images' not in mapped[0]
    assert mapped.origin(5) == 'daten ü.jsonl:5' and mapped.longest_first().origin(0) == 'daten ü.jsonl:6'
    longest, most_trained = mapped.heaviest(1)
    # Nothing predicts the first token of a row, so the earlier reply of row 5 counts for nothing.
    assert (longest[0]['row'], most_trained[0]['row']) == (6, 2)


def test_the_state_of_image_files_is_part_of_the_key(tmp_path: Path) -> None:
    picture = tmp_path / 'a.png'
    picture.write_bytes(b'x')
    rows = [
        {'query': '<img></img>?', 'response': 'y', 'images': 'a.png'},
        {'query': '<img>a.png</img>', 'response': 'z'},
    ]
    file = str(write_jsonl(tmp_path / 'a.jsonl', rows))
    digests = [plan_rows([file]).digest, plan_rows([file]).digest]
    picture.write_bytes(b'another')
    digests.append(plan_rows([file]).digest)
    assert digests[0] == digests[1] != digests[2]

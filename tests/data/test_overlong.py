"""--overlong: what happens to a row longer than --max_length; in runs, streams, the data check and at inference."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
from tests.support.runs import write_jsonl
from tests.support.tiny_models import make_tokenizer
from utils.base.errors import ConfigError
from utils.base.names import Overlong
from utils.data.encode_plan import encode_plan, encode_rows
from utils.data.encoding_report import EncodingReport
from utils.data.plan import plan_rows
from utils.data.stream import prepare_stream
from utils.data.stream_parts import open_streams
from utils.encode.encoded import CUT_PROMPT, DROPPED, SPLIT, row_labels
from utils.encode.encoder import Encoder
from utils.encode.make import make_encoder

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
LIMIT = 60
LONG = 'what is the answer and a name for blue and green? ' * 6


def encoder(overlong: Overlong, tokenizer: Any = None, max_length: int = LIMIT) -> Encoder:
    return make_encoder(
        tokenizer or make_tokenizer(), template_type='auto', system='', system_typed=False, max_length=max_length,
        overlong=overlong,
    )  # fmt: skip


def chat(number: int, *, long: bool) -> dict[str, Any]:
    return {'query': LONG + str(number) if long else f'what is {number}?', 'response': f'the answer is {number}'}


def chats(path: Path, *long: int, count: int = 12) -> str:
    """Return a file of rows, of which these numbers are too long."""
    return str(write_jsonl(path, [chat(number, long=number in long) for number in range(count)]))


def texts(path: Path) -> str:
    return str(write_jsonl(path, [{'text': f'{LONG * number}{number}'} for number in range(5)]))


def test_cut_is_the_default_and_drop_counts_by_name(tmp_path: Path) -> None:
    plan = plan_rows([chats(tmp_path / 'a.jsonl', 3, 7)], test_ratio=0)
    train, _, report = encode_plan(encoder('cut'), plan)
    assert len(train) == 12 and report.noted.counts[CUT_PROMPT] == 2 and max(train.lengths()) == LIMIT
    train, _, report = encode_plan(encoder('drop'), plan)
    assert len(train) == 10 and max(train.lengths()) < LIMIT
    assert report.left_out.places == {DROPPED: [f'{tmp_path}/a.jsonl:4', f'{tmp_path}/a.jsonl:8']}
    assert report.account.fields['user text']['left out'] == 2 * len(LONG) + 2
    with pytest.raises(ConfigError, match='every training row was skipped: 2 rows skipped: longer than max_length: dr'):
        encode_plan(encoder('drop'), plan_rows([chats(tmp_path / 'b.jsonl', 0, 1, count=2)], test_ratio=0))


def test_refuse_lists_all_rows_up_to_twenty(tmp_path: Path) -> None:
    file = chats(tmp_path / 'a.jsonl', 3, 7)
    length = len(encoder('cut', max_length=-1).encode(read(file))[3].input_ids)
    with pytest.raises(ConfigError) as raised:
        encode_plan(encoder('refuse'), plan_rows([file], test_ratio=0.2))
    assert str(raised.value) == (
        f'--overlong refuse: 2 rows are longer than --max_length {LIMIT}: {file}:4 ({length} tokens), {file}:8 '
        f'({length} tokens). Give a larger --max_length, or add --overlong cut or --overlong drop. --check_dataset '
        'true writes the list of all these rows.'
    )
    many = chats(tmp_path / 'b.jsonl', *range(23), count=30)
    with pytest.raises(ConfigError) as raised:
        encode_plan(encoder('refuse'), plan_rows([many], test_ratio=0))
    said = str(raised.value)
    assert re.search(rf'{many}:20 \(\d+ tokens\), and 3 more\. Give', said) and 'b.jsonl:21' not in said
    short = chats(tmp_path / 'c.jsonl')
    assert len(encode_plan(encoder('refuse'), plan_rows([short], test_ratio=0))[0]) == 12


def read(file: str) -> list[Any]:
    return [row for _, row in plan_rows([file], test_ratio=0).rows(1)]


@pytest.mark.parametrize('begins', [False, True])
@pytest.mark.parametrize('limit', [2, 3, 17, LIMIT])
def test_split_loses_no_token_and_predicts_each_once(begins: bool, limit: int, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    if begins:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    ours = encoder('split', tokenizer, limit)
    rows = read(texts(tmp_path / 'a.jsonl'))
    for row in rows:
        whole = ours.encode([row])[0]
        pieces = ours.pieces_of(whole, limit)
        assert all(len(piece.input_ids) <= limit for piece in pieces)
        labels = [label for piece in pieces for label in row_labels(piece.as_item()) if label != -100]
        assert labels == whole.input_ids[1:], 'nothing is lost, nothing is trained twice'
        assert {piece.input_ids[0] for piece in pieces} == {1} or not begins

    report = EncodingReport()
    encoded, kept = encode_rows(ours, rows, report)
    assert kept == rows and max(encoded.lengths()) == limit and len(encoded) > len(rows)
    assert report.noted.counts == {SPLIT: sum(len(row.input_ids) > limit for row in ours.encode(rows))}
    assert report.account.fields == {'plain text': {'trained': sum(len(row.messages[0]['content']) for row in rows)}}
    assert encoded.origin(len(encoded) - 1) == f'{tmp_path}/a.jsonl:5'


def test_split_refuses_conversations_by_name(tmp_path: Path) -> None:
    plan = plan_rows([texts(tmp_path / 'a.jsonl'), chats(tmp_path / 'b.jsonl')], test_ratio=0)
    train, _, report = encode_plan(encoder('split'), plan)
    assert max(train.lengths()) == LIMIT and set(report.noted.counts) == {SPLIT}
    where = r'.*/c.jsonl:3 \(\d+ tokens\)\. Give a larger'
    what = f'--overlong split: 1 conversation is longer than --max_length 60, and only plain text is split: {where}'
    with pytest.raises(ConfigError, match=what):
        encode_plan(encoder('split'), plan_rows([chats(tmp_path / 'c.jsonl', 2)], test_ratio=0))


def test_the_cache_tells_the_choices_apart(tmp_path: Path) -> None:
    plan = plan_rows([texts(tmp_path / 'a.jsonl')], test_ratio=0)
    choices: tuple[Overlong, ...] = ('cut', 'drop', 'split')
    counts = [len(encode_plan(encoder(choice), plan)[0]) for choice in choices]
    assert counts == [len(encode_plan(encoder(choice), plan)[0]) for choice in choices]
    assert counts[0] == 5 and counts[1] < 5 < counts[2]


def test_a_stream_drops_splits_and_refuses(tmp_path: Path) -> None:
    def stream(choice: Overlong, file: str, val_rows: int = 0) -> Any:
        sources = open_streams([file], hub='modelscope')
        return prepare_stream(encoder(choice), sources, tmp_path, val_rows=val_rows, seed=1, samples=0)

    file = texts(tmp_path / 'a.jsonl')
    whole = len(encode_plan(encoder('split'), plan_rows([file], test_ratio=0))[0])
    data = stream('split', file)
    rows = [row for row, _ in zip(data.train, range(whole), strict=False)]
    assert max(len(row['input_ids']) for row in rows) == LIMIT
    assert sorted(map(len, (row['input_ids'] for row in rows))) == sorted(
        encode_plan(encoder('split'), plan_rows([file], test_ratio=0))[0].lengths()
    )
    assert data.train.origin(rows[0]['row']).startswith(f'{tmp_path}/a.jsonl:')

    file = chats(tmp_path / 'b.jsonl', 3, 7)
    data = stream('drop', file)
    rows = [row for row, _ in zip(data.train, range(10), strict=False)]
    assert all(len(row['input_ids']) < LIMIT for row in rows)
    assert data.train.report.left_out.counts == {DROPPED: 2}
    with pytest.raises(ConfigError, match=r'--overlong refuse: 2 rows are longer than --max_length 60: .*b.jsonl:4'):
        stream('refuse', file)
    late = chats(tmp_path / 'c.jsonl', 300, count=301)
    data = stream('refuse', late)
    with pytest.raises(ConfigError, match=r'--overlong refuse: 1 row is longer than --max_length 60: .*c.jsonl:301'):
        for _ in zip(data.train, range(301), strict=False):
            pass
    with pytest.raises(ConfigError, match=r'refuse: 1 row is longer than --max_length 60: .*d.jsonl:1'):
        stream('refuse', chats(tmp_path / 'd.jsonl', 0, count=300), val_rows=1)


@pytest.mark.slow
def test_runs_checks_and_answers(run_sft: Run, tmp_path: Path, problems: Problems, caplog: Any) -> None:
    file = chats(tmp_path / 'a.jsonl', 3, 7, count=40)
    flags = ['--dataset', file, '--max_length', str(LIMIT), '--max_steps', '1', '--preflight', 'false']
    run = run_sft(*flags, '--overlong', 'drop')
    assert json.loads((run / 'run.json').read_text())['data']['left_out'] == {DROPPED: 2}
    assert f'2 rows skipped: {DROPPED} ({file}:4, {file}:8)' in caplog.text
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-1'), '--max_new_tokens', '2', '--dataset', file]) == 0
    assert '38 rows: ' in caplog.text, 'the run dropped the others'
    run_sft(*flags, '--overlong', 'refuse', expect=2)
    output = tmp_path / 'output'
    assert problems()[-1].startswith(f'--overlong refuse: 2 rows are longer than --max_length {LIMIT}: {file}:4 (')

    for choice, kind in (('refuse', 'stops'), ('drop', 'left_out'), ('cut', 'defects'), ('split', 'stops')):
        run_sft(*flags, '--overlong', choice, '--check_dataset', 'true', expect=1)
        report = json.loads(next(output.rglob('dataset_report.json')).read_text())
        assert [found['rows'] for found in report[kind].values()] == [2], choice
        lines = next(output.rglob('dataset_report.jsonl')).read_text().splitlines()
        assert [json.loads(line)['line'] for line in lines] == [4, 8]
        total = sum(sum(counts.values()) for counts in report['account']['fields'].values())
        assert total == sum(len(row.messages[0]['content'] + row.messages[1]['content']) for row in read(file))
    documents = texts(tmp_path / 'b.jsonl')
    words = ('--dataset', documents, '--max_length', str(LIMIT), '--dataset_test_ratio', '0')
    run_sft(*words, '--overlong', 'split', '--check_dataset', 'true')
    report = json.loads(next(output.rglob('dataset_report.json')).read_text())
    assert report['clean'] and report['noted'][SPLIT]['rows'] == 4 and report['lengths']['tokens_lost'] == 0


def test_without_a_limit_the_flag_has_no_effect(run_sft: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run_sft('--max_length', '-1', '--overlong', 'drop', '--dry_run', 'true')
    assert '--overlong has no effect: --max_length -1 is no limit.' in capsys.readouterr().out

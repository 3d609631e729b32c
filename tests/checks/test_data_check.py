"""The data check names every planted defect by line and nothing else, and reports clean data as clean."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_sft
from tests.support.loopback_hub import LoopbackHub
from tests.support.runs import ROOT, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils import dataset
from utils.checks.data_check import CONFLICT, DUPLICATE, LEAKED
from utils.checks.findings import Findings
from utils.checks.suspect import EMPTY_EARLIER, MOJIBAKE, is_mojibake, wrong_order
from utils.data.tally import Tally
from utils.encode.encoded import CONTROL_TOKENS, CUT_PROMPT, CUT_REPLY, REASONING_LEFT_OUT, TOOLS_IGNORED
from utils.encode.row_texts import row_texts

Plain = dict[str, Any]
MAX_LENGTH = 400
WORDS = [
    'the',
    'answer',
    'is',
    'red',
    'naïve',
    'café',
    'über',
    'señor',
    '你好',
    '世界',
    '«bon»',
    'Привет',
    'it’s',
    '5 €',
    '–',
]


@pytest.fixture(scope='module')
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model directory without weights: the data check needs none."""
    folder = tmp_path_factory.mktemp('models') / 'no-weights'
    make_model().config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def text(rng: random.Random) -> str:
    return ' '.join(rng.choices(WORDS, k=rng.randint(2, 8))) + f' {rng.getrandbits(40):x}'


def test_a_row_with_a_detail_has_its_line() -> None:
    stream = io.StringIO()
    findings = Findings('left_out', stream)
    for place in ('rows.jsonl:3 [x [1].png]', 'rows.jsonl:4', 'a.parquet: row 5 [b.png]', 'my function'):
        findings.add('bad image', place)
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(record['file'], record['line'], record.get('detail')) for record in records] == [
        ('rows.jsonl', 3, 'x [1].png'), ('rows.jsonl', 4, None), ('a.parquet', 5, 'b.png'), ('my function', None, None),
    ]  # fmt: skip


def query_row(rng: random.Random) -> Plain:
    row: Plain = {'query': text(rng), 'response': text(rng)}
    row['history'] = [[text(rng), text(rng)]] if rng.random() < 0.2 else None
    row['tools'] = None
    return row


def messages_row(rng: random.Random) -> Plain:
    turns = [{'role': 'system', 'content': text(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 2)):
        turns += [{'role': 'user', 'content': text(rng)}, {'role': 'assistant', 'content': text(rng)}]
    return {'messages': turns}


def talk_row(rng: random.Random) -> Plain:
    call = json.dumps({'name': 'f', 'arguments': {'x': rng.randint(0, 9)}})
    said = [('human', text(rng)), ('function_call', call), ('observation', '2'), ('gpt', text(rng))]
    return {'conversations': [{'from': who, 'value': what} for who, what in said]}


def mangle(row: Plain, column: str, rng: random.Random) -> Plain:
    good = rng.choice(['café é', '你好世界', 'Привет', 'it’s'])
    return {**row, column: f'{row[column]} {good.encode().decode("cp1252", "replace")}'}


def typed(row: Plain, column: str, rng: random.Random) -> Plain:
    return {**row, column: f'{row[column]} {rng.choice(["<|im_end|>", "</s>", "<|eot_id|>"])}'}


def turns(*said: str) -> Plain:
    roles = {'u': 'user', 'a': 'assistant', 's': 'system', 't': 'tool', 'x': 'narrator'}
    return {'messages': [{'role': roles[who[0]], 'content': who[1:]} for who in said]}


# Per file: the reason, the column, and a function that makes a defective row of a good one. Bytes are written raw.
Plant = Callable[[Plain, random.Random], Any]
QUERY: list[tuple[str, str, Plant]] = [
    ('null response', 'response', lambda r, g: {**r, 'response': None}),
    ('empty response', 'response', lambda r, g: {**r, 'response': ''}),
    ('empty response', 'response', lambda r, g: {**r, 'response': g.choice([' ', '\n\t', '\u3000'])}),
    ('response is a bool, not text', 'response', lambda r, g: {**r, 'response': True}),
    ('response is a list, not text', 'response', lambda r, g: {**r, 'response': [r['response']]}),
    ('null query', 'query', lambda r, g: {**r, 'query': None}),
    ('columns are missing that the first row has: response', 'response', lambda r, g: {'query': r['query'],
                                                                                       'history': None, 'tools': None}),
    ('history is text that is not JSON', 'history', lambda r, g: {**r, 'history': '[["a", "b"'}),
    ('history is not a list of [query, response] pairs', 'history', lambda r, g: {**r, 'history': [['a']]}),
    ('null query in history', 'history', lambda r, g: {**r, 'history': [[None, 'a']]}),
    ('tools is text that is not JSON', 'tools', lambda r, g: {**r, 'tools': '{'}),
    ('tools is not a list of objects', 'tools', lambda r, g: {**r, 'tools': ['f']}),
    ('this line is not JSON', '', lambda r, g: json.dumps(r).encode()[: g.randint(2, 20)]),
    ('byte 0xff is not UTF-8', '', lambda r, g: b'{"query": "\xff", "response": "a"}'),
    ('a row must be an object', '', lambda r, g: b'["a", "b"]'),
    (MOJIBAKE, 'query', lambda r, g: mangle(r, 'query', g)),
    (MOJIBAKE, 'response', lambda r, g: mangle(r, 'response', g)),
    (CONTROL_TOKENS, 'query', lambda r, g: typed(r, 'query', g)),
    (CONTROL_TOKENS, 'response', lambda r, g: typed(r, 'response', g)),
    (CUT_PROMPT, 'response', lambda r, g: {**r, 'query': r['query'] * 40}),
    (CUT_REPLY, 'response', lambda r, g: {**r, 'response': r['response'] * 40}),
    (EMPTY_EARLIER, 'history', lambda r, g: {**r, 'history': [['why?', g.choice(['', '  '])]]}),
]  # fmt: skip
MESSAGES: list[tuple[str, str, Plant]] = [
    ('wrong role order: user after user', 'messages', lambda r, g: turns(f'u{text(g)}', f'u{text(g)}', 'ab')),
    ('wrong role order: assistant at the start', 'messages', lambda r, g: turns(f'a{text(g)}', 'ux', 'ab')),
    ('wrong role order: assistant after assistant', 'messages', lambda r, g: turns(f'u{text(g)}', 'ab', 'ac')),
    ('wrong role order: tool without a call', 'messages', lambda r, g: turns(f'u{text(g)}', 'ab', 'tc', 'ad')),
    ('wrong role order: tool after user', 'messages', lambda r, g: turns(f'u{text(g)}', 'tb', 'ac')),
    ('a system turn that is not the first', 'messages', lambda r, g: turns('ua', 'ab', 'sc', 'ud', 'ae')),
    ("the last turn is the user's", 'messages', lambda r, g: turns('ua', 'ab', 'uc')),
    ("unknown role 'narrator'", 'messages', lambda r, g: turns('xa', 'ub', 'ac')),
    ('a reply without a question', 'messages', lambda r, g: turns('aa')),
    ('a turn of messages has no role', 'messages', lambda r, g: {'messages': [{'content': 'a'}]}),
    ('null user turn', 'messages', lambda r, g: {'messages': [{'role': 'user', 'content': None}]}),
    ('messages is not a list of turns', 'messages', lambda r, g: {'messages': 'null'}),
    (EMPTY_EARLIER, 'messages', lambda r, g: turns(f'u{text(g)}', 'a \n', f'u{text(g)}', 'ab')),
]
TALK: list[tuple[str, str, Plant]] = [
    ('a function call is not JSON', 'conversations', lambda r, g: {
        'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'function_call', 'value': 'f('}]}),
    ('a function call has no name', 'conversations', lambda r, g: {
        'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'function_call', 'value': '{}'}]}),
]  # fmt: skip
Found = set[tuple[str, int, str, str]]


def plant(file: Path, make: Callable[[random.Random], Plain], kinds: list[Any], rng: random.Random) -> Found:
    """Write a file of good rows with one or two defects of each kind at random lines, never at the first line."""
    count = 6 * len(kinds) + 10
    rows: list[Any] = [make(rng) for _ in range(count)]
    kinds = [kind for kind in kinds for _ in range(rng.randint(1, 2))]
    expected: Found = set()
    free = rng.sample(range(1, count), len(kinds) + 4)
    for (reason, column, spoil), index in zip(kinds, free, strict=False):
        rows[index] = spoil(rows[index], rng)
        expected.add((str(file), index + 1, reason, column))
    reply = 'response' if 'response' in rows[0] else next(iter(rows[0]))
    # The last lines have no other defect, so they repeat a good row.
    for index in free[len(kinds) : len(kinds) + 2]:
        rows[index] = json.loads(json.dumps(rows[0]))
        expected.add((str(file), index + 1, DUPLICATE, reply))
    if reply == 'response':
        rows[free[-1]] = {**rows[0], 'response': 'something else'}
        expected.add((str(file), free[-1] + 1, CONFLICT, reply))
    lines = (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows)
    file.write_bytes(b'\n'.join(lines) + b'\n')
    return expected


def plant_csv(file: Path, rng: random.Random) -> Found:
    rows = [f'"{text(rng)}","two\nlines {text(rng)}"' for _ in range(9)]
    rows.insert(spoilt := rng.randint(1, 9), '"only one"')
    file.write_text('\n'.join(['query,response', *rows]) + '\n', encoding='utf-8')
    return {(str(file), 2 + 2 * spoilt, 'the number of cells in this row is 1, but the header has 2', '')}


def plant_leak(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> Found:
    halves = ([query_row(rng) for _ in range(20)], [query_row(rng) for _ in range(8)])
    places = rng.sample(range(8), 2)
    for place in places:
        halves[1][place] = rng.choice(halves[0])
    if halves[1][places[0]] == halves[1][places[1]]:
        halves[1][places[1]] = query_row(rng)
        places = places[:1]
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'pair', lambda: halves)
    return {('pair (validation)', place + 1, LEAKED, 'response') for place in places}


def examine(model: Path, output: Path, *words: str) -> tuple[int, list[Plain], Plain]:
    """Run the data check. Returns its exit code, its findings and its report."""
    code = llm_sft.main(
        ['--check_dataset', 'true', '--model_id_or_path', str(model), '--output_dir', str(output), '--max_length',
         str(MAX_LENGTH), '--dataset_test_ratio', '0', '--train_dataset_sample', '-1', '--dataset', *words]
    )  # fmt: skip
    folder = output / model.name
    findings = [json.loads(line) for line in (folder / 'dataset_report.jsonl').read_text('utf-8').splitlines()]
    return code, findings, json.loads((folder / 'dataset_report.json').read_text('utf-8'))


def short(reason: str, wanted: Found) -> str:
    """Return the planted reason that this one is or begins with."""
    return max((r for _, _, r, _ in wanted if reason.startswith(r)), key=len, default=reason)


# The others are slow.
SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))]


@pytest.mark.parametrize('seed', SEEDS)
def test_every_planted_defect_is_named_by_line_and_nothing_else(
    seed: int, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    files = [tmp_path / name for name in ('query.jsonl', 'messages.jsonl', 'talk.jsonl', 'table.csv')]
    expected = (
        plant(files[0], query_row, QUERY, rng) | plant(files[1], messages_row, MESSAGES, rng)
        | plant(files[2], talk_row, TALK, rng) | plant_csv(files[3], rng) | plant_leak(monkeypatch, rng)
    )  # fmt: skip
    assert len({reason for _, _, reason, _ in expected}) >= 37
    code, findings, report = examine(tokenizer_dir, tmp_path / 'out', *map(str, files), 'pair')
    found = [
        (f['file'], f['line'], short(f['reason'], expected), f['column']) for f in findings if f['kind'] != 'noted'
    ]
    assert set(found) == expected
    assert len(found) == len(expected)
    assert code == 1 and report['clean'] is False
    counts = {reason: n['rows'] for kind in ('stops', 'left_out', 'defects') for reason, n in report[kind].items()}
    assert sum(counts.values()) == len(expected)
    printed = capsys.readouterr().out
    assert all(f'{count} row' in printed and reason in printed for reason, count in counts.items())
    rows = report['rows']
    assert rows['read'] == rows['kept'] + rows['left_out'] + rows['stops']
    verdict = printed.rstrip().rpartition('\n')[2]
    wrong = {(f['file'], f['line']) for f in findings if f['kind'] in ('stops', 'left_out', 'lost', 'defect')}
    assert verdict.startswith(f'{report["problems"]} problems in {len(wrong)} of {rows["read"]} rows: exit code 1')
    assert report['rows_with_problems'] == len(wrong) and report['problems'] == len(counts)
    assert rows['kept'] == rows['train'] + rows['validation'] + rows['not_drawn']


@pytest.mark.parametrize('seed', range(5))
def test_clean_files_are_found_clean(
    seed: int, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    files = []
    for name, make in (('q.jsonl', query_row), ('m.jsonl', messages_row), ('t.jsonl', talk_row)):
        files.append(str(write_jsonl(tmp_path / name, [make(rng) for _ in range(200)])))
    halves = ([query_row(rng) for _ in range(20)], [query_row(rng) for _ in range(8)])
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'pair', lambda: halves)
    code, findings, report = examine(tokenizer_dir, tmp_path / 'out', *files, 'pair')
    assert [f for f in findings if f['kind'] != 'noted'] == []
    assert code == 0 and report['clean'] is True and report['rows']['kept'] == 628


def test_lengths_and_the_cost_of_max_length_are_exact(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = [{'query': 'q' * n, 'response': f'r{n} ' + 'z' * n} for n in (1, 50, 150, 600)]
    file = write_jsonl(tmp_path / 'a.jsonl', rows)
    whole = [
        tokenizer.apply_chat_template(
            [{'role': 'user', 'content': r['query']}, {'role': 'assistant', 'content': r['response']}], tokenize=False
        )
        for r in rows
    ]
    sizes = [len(ids) for ids in tokenizer(whole, add_special_tokens=False)['input_ids']]
    _, _, report = examine(tokenizer_dir, tmp_path / 'out', str(file))
    lengths = report['lengths']
    assert (lengths['tokens'], lengths['max']) == (sum(sizes), max(sizes))
    lost = [max(size - MAX_LENGTH, 0) for size in sizes]
    assert (lengths['rows_cut'], lengths['tokens_lost']) == (sum(n > 0 for n in lost), sum(lost)) and sum(lost) > 0
    assert sum(lengths['rows_up_to'].values()) == 4
    for size in sizes:
        assert any(int(bar) // 2 < size <= int(bar) for bar in lengths['rows_up_to'])
    assert 0.4 < lengths['trained_share'] < 0.9


def test_a_file_that_cannot_be_read_on_is_named_and_the_next_is_read(tokenizer_dir: Path, tmp_path: Path) -> None:
    cut = tmp_path / 'cut.json'
    cut.write_text('[{"query": "a", "response": "b"},\n{"query": "c", "resp', encoding='utf-8')
    good = write_jsonl(tmp_path / 'good.jsonl', [{'query': 'x', 'response': 'y'}])
    code, findings, report = examine(tokenizer_dir, tmp_path / 'out', str(cut), str(good))
    assert code == 1 and report['rows']['kept'] == 2
    assert [(f['file'], f['line'], f['kind']) for f in findings] == [(str(cut), 2, 'stops')]


def test_turns_that_a_template_cannot_say_are_left_out_by_name(tokenizer_dir: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    file = write_jsonl(tmp_path / 't.jsonl', [talk_row(rng), {'conversations': [
        {'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]}])  # fmt: skip
    code, findings, report = examine(tokenizer_dir, tmp_path / 'out', str(file), '--template_type', 'chatml')
    assert code == 1 and [(f['line'], f['kind']) for f in findings] == [(1, 'stops')]
    told = "turn 2 (system text not counted) is a tool call turn, and template 'chatml' has only assistant turns there"
    assert told in findings[0]['reason']
    assert report['lengths']['tokens'] > 0


def test_names_and_reasons_of_the_data_do_not_fill_the_memory(tokenizer_dir: Path, tmp_path: Path) -> None:
    def row(index: int) -> Plain:
        reply = {'role': 'assistant' if index % 2 else f'narrator {index}', 'content': 'a', f'key {index}': 'x'}
        return {'messages': [{'role': 'user', 'content': f'{index}'}, reply], f'column {index}': 'y' * 2000}

    file = write_jsonl(tmp_path / 'a.jsonl', [row(index) for index in range(1, 1801)])
    _, findings, report = examine(tokenizer_dir, tmp_path / 'out', str(file))
    for kind, rows, other in (('left_out', 900, 400), ('noted', 1800, 1300)):
        counts = {reason: found['rows'] for reason, found in report[kind].items()}
        assert len(counts) == 501 and sum(counts.values()) == rows
        assert counts['another reason than the first 500'] == other
    account = report['account']
    assert len(account['unused']) == len(account['fields']) == 501
    assert account['unused']['another column or key than the first 500'] == 650
    assert sum(sum(counts.values()) for counts in account['fields'].values()) == sum(
        len(row_text.text) for index in range(1, 1801) for row_text in row_texts(row(index))
    )
    reasons = {finding['reason'] for finding in findings}
    assert len(reasons) == len(findings) == 900 + 1800 and 'column `column 1799` is not used' in reasons


def test_a_long_reason_is_shortened_in_the_counts() -> None:
    tally, other = Tally(), Tally()
    for part in (tally, other):
        part.add('unknown role ' + 'x' * 5000, 'a:1')
    tally.merge(other)
    assert tally.counts == {f'unknown role {"x" * 987} ...': 2} and tally.places.popitem()[1] == ['a:1', 'a:1']


def test_rows_that_are_not_drawn_are_looked_at_but_not_measured(tokenizer_dir: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    file = write_jsonl(tmp_path / 'q.jsonl', [query_row(rng) for _ in range(50)] + [{'query': 'a', 'response': None}])
    code, _, report = examine(tokenizer_dir, tmp_path / 'out', f'{file}#10')
    rows = report['rows']
    assert code == 1 and (rows['read'], rows['kept'], rows['train'], rows['not_drawn']) == (51, 50, 10, 40)
    assert sum(report['lengths']['rows_up_to'].values()) == 10


@pytest.mark.parametrize(('broken', 'code'), [([], 0), ([{'kind': 'NER', 'input': 'c', 'target': ''}], 1)])
def test_what_a_data_set_filters_is_counted_and_named_but_no_defect(
    broken: list[Plain], code: int, tokenizer_dir: Path, tmp_path: Path, loopback: LoopbackHub
) -> None:
    good = [{'kind': 'NER', 'input': f'say {i}', 'target': f'it is {i}'} for i in range(5)]
    rows = [*good, {**good[0], 'kind': 'Chat'}, {**good[1], 'kind': 'Chat'}, *broken]
    loopback.add('dataset', 'wyj123456/firefly', {'a.jsonl': '\n'.join(map(json.dumps, rows)).encode()})
    found, findings, report = examine(tokenizer_dir, tmp_path / 'out', 'firefly-all-zh')
    assert (found, report['clean']) == (code, not code)
    reason = 'dropped by firefly-all-zh: a kind that is not used, or no input or target'
    assert report['filtered'][reason]['rows'] == 2 and len(report['filtered'][reason]['first']) == 2
    assert report['left_out'].keys() == ({reason} if broken else set())
    assert report['rows'] == {
        'read': len(rows), 'kept': 5, 'train': 5, 'validation': 0, 'not_drawn': 0, 'filtered': 2,
        'left_out': len(broken), 'stops': 0,
    }  # fmt: skip
    assert [f['line'] for f in findings if f['kind'] == 'filtered'] == [6, 7]


def test_the_order_of_roles() -> None:
    call = {'role': 'assistant', 'content': '', 'tool_calls': [{}]}
    user, reply, tool = ({'role': role, 'content': 'x'} for role in ('user', 'assistant', 'tool'))
    for good in ([user, reply], [user, call, tool, tool, reply], [user, call, tool, call, tool, reply, user, reply]):
        assert wrong_order(good) is None  # type: ignore[arg-type]
    for bad in ([user, tool, reply], [reply, user, reply], [user, reply, reply], [user, user, reply]):
        assert wrong_order(bad) is not None  # type: ignore[arg-type]


def test_mojibake_is_told_from_words_of_other_languages() -> None:
    good = [
        'naïve café',
        'Ärger in Ö–Ü',
        'NIÑO, AÑO',
        'À bientôt!',
        '«été»',
        'Привет, мир',
        '你好，世界',
        '10 °C ± 5 £',
    ]
    assert not [t for t in good if is_mojibake(t)]
    bad = [t.encode().decode('latin-1') for t in good if not t.isascii()]
    assert len(bad) == 8 and all(is_mojibake(t) for t in bad)


def test_the_doctor_imports_no_torch_of_its_own(tokenizer_dir: Path, tmp_path: Path) -> None:
    code = "import sys, utils.checks.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0


def test_rows_beside_a_row_that_ends_the_run_are_counted_once(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [
        {'query': 'a', 'response': 'b'},
        {'query': 'c', 'response': 'd', 'images': ['x.png']},
        {'query': 'e', 'response': 'f'},
        {'query': 'g', 'response': 'h', 'history': [['i', 'j']]},
    ]
    file = write_jsonl(tmp_path / 'a.jsonl', rows)
    flags = ['--dataset_test_ratio', '0', '--train_dataset_sample', '-1', '--template_type', 'default-generation']
    asked = ['--check_dataset', 'true', '--model_id_or_path', str(tokenizer_dir), '--output_dir', str(tmp_path)]
    assert llm_sft.main([*asked, *flags, '--dataset', str(file)]) == 1
    report = json.loads((tmp_path / tokenizer_dir.name / 'dataset_report.json').read_text('utf-8'))
    assert (report['rows']['stops'], report['rows']['left_out']) == (1, 1)
    assert sum(report['lengths']['rows_up_to'].values()) == 2


def test_lines_that_end_a_run_are_told_apart_from_rows_that_are_skipped(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    file = write_jsonl(tmp_path / 'half.jsonl', [*(messages_row(rng) for _ in range(4)), turns('xa', 'ub', 'ac')])
    with file.open('a') as stream:
        stream.write('{"messages": [{"role": "us')
    table = tmp_path / 'cp1252.csv'
    table.write_bytes('query,response\nfür,schön\nÖl,Äpfel\n'.encode('cp1252'))
    code, findings, report = examine(tokenizer_dir, tmp_path / 'out', str(file), str(table))
    assert code == 1 and [(f['line'], f['kind']) for f in findings] == [(6, 'stops'), (2, 'stops'), (5, 'left_out')]
    assert report['rows']['stops'] == 2 and report['rows']['left_out'] == 1 and report['rows']['read'] == 7
    printed = capsys.readouterr().out
    assert '1 row at which a run stops: this line is not JSON (' in printed
    assert "1 row skipped: unknown role 'narrator'" in printed
    assert 'e.g. iconv -f WINDOWS-1252 -t UTF-8 cp1252.csv. The rest of the file is not read. (' in printed
    assert printed.endswith('\n3 problems in 3 of 7 rows: exit code 1\n')


def test_a_file_without_a_readable_row_does_not_hide_the_other_problems(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / 'cp1252.jsonl'
    file.write_bytes('\n'.join(f'{{"Frage": "für {i}", "Antwort": "schön"}}' for i in range(3)).encode('cp1252'))
    columns = ('--columns', 'Frage=query', 'Antwort=response')
    code, findings, report = examine(tokenizer_dir, tmp_path / 'out', str(file), *columns)
    assert code == 1 and [(f['line'], f['kind']) for f in findings] == [(1, 'stops'), (2, 'stops'), (3, 'stops')]
    assert capsys.readouterr().out.endswith('\n1 problem in 3 of 3 rows: exit code 1\n') and not report['clean']


@pytest.mark.parametrize('field', ['tools', 'reasoning'])
def test_a_field_that_the_template_never_prints_is_a_problem(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / 'model'
    make_model().config.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
    )
    tokenizer.save_pretrained(folder)
    rows = [turns(f'uask {i}', f'asay {i}') for i in range(4)]
    for row in rows[:3]:
        if field == 'tools':
            row['tools'] = [{'type': 'function', 'function': {'name': 'f', 'parameters': {}}}]
        else:
            row['messages'][-1]['reasoning_content'] = 'because'
    code, findings, report = examine(folder, tmp_path / 'out', str(write_jsonl(tmp_path / 'a.jsonl', rows)))
    printed = capsys.readouterr().out
    assert code == 1 and [(f['line'], f['kind']) for f in findings] == [(n, 'lost') for n in (1, 2, 3)]
    lost = {'tools': TOOLS_IGNORED, 'reasoning': REASONING_LEFT_OUT}[field]
    assert report['lost'][lost]['rows'] == 3 and report['clean'] is False
    assert f'3 rows with a lost field: {lost} (' in printed
    assert printed.endswith('\n1 problem in 3 of 4 rows: exit code 1\n')


def test_notes_do_not_decide_the_exit_code_and_unused_columns_are_in_the_verdict_once(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{'query': f'q{i}', 'response': f'r{i}', 'score': i + 1, 'source': 'web'} for i in range(3)]
    rows.append({'query': '', 'response': 'r'})
    code, _, _ = examine(tokenizer_dir, tmp_path / 'out', str(write_jsonl(tmp_path / 'a.jsonl', rows)))
    printed = capsys.readouterr().out
    assert code == 0 and '1 row noted: an empty question (' in printed
    assert '3 rows noted: column `source` is not used (' in printed and '\nnot used:' not in printed
    assert printed.endswith('\nnothing wrong: exit code 0; 1 note; not used: column `score`, column `source`\n')


def test_a_fact_is_told_once(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [
        turns('ua', 'ub', 'ac'),
        turns('ua', 'ab', 'ac'),
        turns('sa', 'ab', 'uc', 'ad'),
        {'query': 'a', 'response': 'b', 'history': [['c', '']]},
    ]
    words = [str(write_jsonl(tmp_path / f'{i}.jsonl', [row])) for i, row in enumerate(rows)]
    _, findings, _ = examine(tokenizer_dir, tmp_path / 'out', *words)
    assert [f['kind'] for f in findings] == ['defect'] * 4


def test_warnings_about_flags_are_shown(tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', [{'query': 'a', 'response': 'b'}])
    examine(tokenizer_dir, tmp_path / 'out', str(file), '--dry_run', 'true')
    assert '--dry_run has no effect: --check_dataset true only reads the data' in caplog.text

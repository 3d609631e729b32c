"""Tables as spreadsheet programs write them: separators, header names, empty cells, and the lines of all problems."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.support.runs import small_flags
from utils import dataset
from utils.base.errors import ConfigError
from utils.data.plan import plan_rows
from utils.data.stream import TrainingStream
from utils.data.stream_parts import open_streams
from utils.formats.data_file import read_rows

Problems = Callable[[], list[str]]
ROW = {'query': 'a', 'response': 'b'}
TWO = {'query': 'c, d; e\tf', 'response': 'two\nlines "x"'}
QUOTED = '"c, d; e\tf"{0}"two\nlines ""x"""\n'


def read(path: Path) -> tuple[list[tuple[int, Any]], list[str]]:
    """Return (line, row) of each row of a file, and the remarks on the file without its path."""
    remarks: list[str] = []
    rows = [(int(place.rpartition(':')[2]), row) for place, row in read_rows(path, remark=remarks.append)]
    assert all(remark.startswith(f'{path}: ') for remark in remarks)
    return rows, [remark.removeprefix(f'{path}: ') for remark in remarks]


@pytest.mark.parametrize('name', ['t.csv', 't.tsv', 't.csv.gz', 't.TSV.gz'])
@pytest.mark.parametrize(('mark', 'word'), [(',', 'commas'), (';', 'semicolons'), ('\t', 'tabs')])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-be', 'utf-32'])
def test_the_separator_is_found_and_said_once_if_it_is_not_the_usual_one(
    mark: str, word: str, name: str, encoding: str, tmp_path: Path
) -> None:
    text = f'query{mark}response\r\n' + QUOTED.format(mark) + f'a{mark}b\n'
    data = ('\ufeff' * (encoding == 'utf-16-be') + text).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith('gz') else data)
    rows, remarks = read(tmp_path / name)
    assert rows == [(2, TWO), (4, ROW)]
    usual = ',' if '.csv' in name else '\t'
    said = [f'the cells are separated by {word} because its header has several cells with them']
    assert remarks == ([] if mark == usual else said)


def test_a_stated_separator_is_used_and_lines_are_counted_with_it(tmp_path: Path) -> None:
    for number, mark in enumerate(',;\t|'):
        file = tmp_path / f'{number}.csv'
        file.write_text(f'sep={mark}\r\nquery{mark}response\r\n{QUOTED.format(mark)}a{mark}b\r\na\r\n', newline='')
        rows: list[Any] = []
        with pytest.raises(ConfigError, match=rf'{number}.csv:6: the number of cells in this row is 1, but the header'):
            rows += [(place, row) for place, row in iter_until_error(file, rows)]
        assert rows == [(f'{file}:3', TWO), (f'{file}:5', ROW)]


def iter_until_error(file: Path, rows: list[Any]) -> Any:
    for place, row in read_rows(file):
        rows.append((place, row))
    return ()


def test_rows_decide_between_two_possible_separators(tmp_path: Path) -> None:
    file = tmp_path / 'a.csv'
    file.write_text('query;response, long\na;b, c, d\ne;f\n')
    assert read(file)[0] == [
        (2, {'query': 'a', 'response, long': 'b, c, d'}),
        (3, {'query': 'e', 'response, long': 'f'}),
    ]
    file.write_text('"query, long";response\na;b\n')
    assert read(file) == (
        [(2, {'query, long': 'a', 'response': 'b'})],
        ['the cells are separated by semicolons because its header has several cells with them'],
    )
    file.write_text('text\nHello; you\n')
    assert read(file) == ([(2, {'text': 'Hello; you'})], [])


REFUSED = {
    'both.csv': (
        'query,a;response\nx,y;z\n',
        'both.csv:1: the separator cannot be told: the header has 2 cells with commas and 2 cells with semicolons. '
        'Write the separator into a line before the header: sep=; or sep=, or sep= and a tab.',
    ),
    'other.csv': (
        'query,response\na;b\nc;d\n',
        'other.csv:1: the separator cannot be told: the header has 2 cells with commas, and the rows have 2 cells with '
        'semicolons. Write the same separator in the header and in the rows.',
    ),
    'empty.csv': ('query,,,response\na,b,c,d\n', 'empty.csv:1: several cells of the header are empty. Name these'),
    'twice.csv': ('a;a\nb;c\n', "twice.csv:1: the header names 'a' twice."),
    'unnamed.csv': (
        'query,response,,\n"a\nb",c,,\na,b,,note\n',
        'unnamed.csv:4: cell 4 of this row holds text, and its column has no name in the header. Name the column, or',
    ),
    'many.csv': (
        'query;response;\na;b;\na;b;c;d\n',
        'many.csv:3: the number of cells in this row is 4, but the header has 2. Quote cells that contain semicolons',
    ),
    'few.tsv': ('query\tresponse\na\n', 'few.tsv:2: the number of cells in this row is 1, but the header has 2. Quote'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_read_is_refused_with_the_line_and_a_remedy(
    name: str, model_dir: Path, tmp_path: Path, problems: Problems
) -> None:
    text, problem = REFUSED[name]
    (tmp_path / name).write_text(text)
    assert llm_sft.main(small_flags(model_dir, tmp_path / name, tmp_path / 'out')) == 2
    assert len(problems()) == 1 and problem in problems()[0]


def test_a_stated_separator_settles_what_cannot_be_told(tmp_path: Path) -> None:
    file = tmp_path / 'a.csv'
    file.write_text('sep=,\n' + REFUSED['both.csv'][0])
    assert read(file)[0] == [(3, {'query': 'x', 'a;response': 'y;z'})]


def test_trailing_commas_and_empty_lines_of_spreadsheets_are_dropped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / 'a.csv'
    file.write_text(',query,response,,\n0,a,"b\nc",,\n1,d,e\n, ,,,\n2,f,g,,,,\n,,,,\n,,,,\n')
    rows, remarks = read(file)
    assert rows == [
        (2, {'': '0', 'query': 'a', 'response': 'b\nc'}),
        (4, {'': '1', 'query': 'd', 'response': 'e'}),
        (5, {'': '', 'query': '', 'response': ''}),
        (6, {'': '2', 'query': 'f', 'response': 'g'}),
    ]
    assert remarks == ['lines with only separators after the last row are skipped: 2, from line 7']


HEADS = ' Query ;Response;HISTORY;Note;Source'
CELLS = 'what?;"yes; it is";"[[""a"", ""b""]]";n;s\n'


def test_header_names_with_capitals_and_blanks_are_read_and_said_once(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / 'a.csv'
    file.write_text(f'{HEADS}\n' + ''.join(f'{i} {CELLS}' for i in range(12)))
    assert llm_sft.main(small_flags(model_dir, file, tmp_path / 'out')) == 0
    said = [
        f'{file}: the cells are separated by semicolons because its header has several cells with them',
        f"{file}: columns are read by other names than they are written: ' Query ' as query, 'Response' as response, "
        "'HISTORY' as history",
    ]
    (run,) = (tmp_path / 'out' / 'tiny-llama').glob('v*')
    told = json.loads((run / 'run.json').read_text())
    assert [line for line in told['decisions'] if line.startswith(str(file))] == said
    assert [caplog.text.count(line) for line in said] == [1, 1]
    assert told['data']['account']['unused'] == {'column `Note`': 12, 'column `Source`': 12}
    assert told['data']['account']['fields']['reply text']['context'] == 12, 'the replies of the history'

    caplog.clear()
    assert llm_sft.main([*small_flags(model_dir, file, tmp_path / 'out'), '--check_dataset', 'true']) == 0
    report = json.loads((tmp_path / 'out' / 'tiny-llama' / 'dataset_report.json').read_text())
    assert report['decisions'][:2] == said and report['rows']['kept'] == 12

    caplog.clear()
    flags = ['--max_new_tokens', '2', '--show_dataset_sample', '2', '--dataset', str(file)]
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-6'), *flags]) == 0
    assert [caplog.text.count(line) for line in said] == [1, 1]


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl', 'a.parquet'])
def test_json_and_parquet_columns_are_read_by_the_same_names(name: str, tmp_path: Path) -> None:
    rows = [{'Instruction': f'i{n}', 'Input': 'x', 'Output': 'o', 'Id': n} for n in range(4)]
    file = tmp_path / name
    if name == 'a.parquet':
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if name == 'a.json' else '\n'.join(map(json.dumps, rows)))
    plan = plan_rows([str(file)], test_ratio=0)
    assert [row.messages[0]['content'] for _, row in plan.rows(1)] == ['i0\nx', 'i1\nx', 'i2\nx', 'i3\nx']
    assert plan.noted.counts == {'column `Id` is not used': 4}
    assert plan.decisions(None) == [
        f"{file}: columns are read by other names than they are written: 'Instruction' as instruction, 'Input' as "
        "input, 'Output' as output"
    ]


def test_columns_of_a_registered_function_are_read_by_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'mine', lambda: [{'Query': 'a', 'Response': 'b'}])
    plan = plan_rows(['mine'], test_ratio=0)
    said = "mine: columns are read by other names than they are written: 'Query' as query, 'Response' as response"
    assert plan.decisions(None) == [said] and plan.parts[0].uses.count(1) == 1


def test_exact_names_are_preferred_and_equal_names_are_refused(tmp_path: Path) -> None:
    file = tmp_path / 'a.jsonl'
    file.write_text('{"query": "a", "response": "b", "System": "s"}\n')
    plan = plan_rows([str(file)], test_ratio=0)
    assert plan.noted.counts == {'column `System` is not used': 1} and plan.decisions(None) == []
    file.write_text('{"Query": "a", "query ": "c", "response": "b"}\n')
    with pytest.raises(ConfigError) as raised:
        plan_rows([str(file)])
    assert str(raised.value).endswith(
        'Their names are equal without capital letters and spaces: Query, query . Rename one.'
    )


def test_a_stream_says_how_it_reads_a_file_and_what_it_skips(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from utils.encode.make import make_encoder

    file = tmp_path / 'a.tsv'
    file.write_text('Query;Response\na;b\nc;d\n;\n')
    streams = open_streams([str(file)], hub='modelscope')
    encoder = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=64)
    stream = iter(TrainingStream(encoder, streams, val_rows=0, seed=1))
    for _ in range(5):
        next(stream)
    skipped = f'{file}: lines with only separators after the last row are skipped: 1, from line 4'
    assert list(streams.sources[0][0].remarks) == [
        f'{file}: the cells are separated by semicolons because its header has several cells with them',
        f"{file}: columns are read by other names than they are written: 'Query' as query, 'Response' as response",
        skipped,
    ]
    assert caplog.text.count(skipped) == 1 and caplog.text.count('semicolons') == 0, 'the program says it when it opens'


def test_the_shape_of_a_streamed_table_is_in_the_record_of_the_run(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / 'a.csv'
    file.write_text('Query;Response\n' + ''.join(f'what {i};yes {i}\n' for i in range(20)))
    words = [*small_flags(model_dir, file, tmp_path / 'out'), '--streaming', 'true', '--max_steps', '3']
    assert llm_sft.main([*words, '--stream_val_rows', '4']) == 0
    (run,) = (tmp_path / 'out' / 'tiny-llama').glob('v*')
    told = json.loads((run / 'run.json').read_text())['decisions']
    assert f'{file}: the cells are separated by semicolons because its header has several cells with them' in told


def test_a_table_with_an_unreadable_line_gives_no_row_after_it(tmp_path: Path) -> None:
    file = tmp_path / 'a.csv'
    for content, line in ((b'query,response\na,"one\n\xe9\nthree"\n', 3), (b'\xe9,response\na,b\nc,d\n', 1)):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=f'a.csv:{line}: byte 0xe9 is not UTF-8'):
            list(read_rows(file, bad=lambda place, _: None))

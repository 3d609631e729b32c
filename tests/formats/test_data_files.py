"""Data files of every kind: read in constant memory, refused if their content is not what their name says."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import get_dataset, write_jsonl
from utils.base.errors import ConfigError
from utils.data.plan import plan_rows
from utils.data.sources import check_sources, parse_source
from utils.formats import file_bytes
from utils.formats.data_file import read_rows, signature
from utils.formats.file_bytes import UnreadableRow

ROWS = [{'query': f'q{i} 你好', 'response': f'r{i}\n"x"'} for i in range(50)]


def texts(rows: Any) -> list[str]:
    return [row.messages[0]['content'] for row in rows]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write rows in the format of the file's name."""
    plain = path.name.lower().removesuffix('.gz')
    if plain.endswith('.json'):
        text = json.dumps(rows, ensure_ascii=False, indent=1)
    elif plain.endswith('.csv'):
        quoted = (','.join('"' + str(v).replace('"', '""') + '"' for v in row.values()) for row in rows)
        text = '\n'.join([','.join(rows[0]), *quoted]) + '\n'
    else:
        text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == '.gz' else data)
    return path


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl', 'a.csv', 'a.json.gz', 'a.jsonl.gz', 'a.csv.gz', 'A.JSONL.GZ'])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    assert [row for _, row in read_rows(write(tmp_path / name))] == ROWS


def test_rows_that_lie_across_blocks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path / name) for name in ('a.json', 'a.json.gz')]
    expected = list(read_rows(files[0]))
    assert [place for place, _ in expected] == [f'{files[0]}:{2 + 4 * i}' for i in range(50)]
    for size in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr(file_bytes, 'BLOCK_BYTES', size)
        assert list(read_rows(files[0])) == expected
        assert [row for _, row in read_rows(files[1])] == ROWS


@pytest.mark.parametrize('name', ['big.json', 'big.jsonl', 'big.csv', 'big.json.gz'])
def test_a_large_file_is_read_in_constant_memory(name: str, tmp_path: Path) -> None:
    row = {'query': 'x' * 1000, 'response': 'y' * 1000}
    peaks = []
    for count in (2000, 12000):
        file = write(tmp_path / name, [row] * count)
        tracemalloc.start()
        assert sum(1 for _ in read_rows(file)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.1 < 8_000_000


def test_a_gzip_that_swells_beyond_reason_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_bytes, '_GZIP_FREE_BYTES', 1 << 20)
    line = json.dumps({'query': ' ' * 100_000, 'response': 'x'}) + '\n'
    for name, text in (('lines.jsonl.gz', line * 200), ('one.json.gz', '[' + ' ' * 20_000_000)):
        bomb = tmp_path / name
        bomb.write_bytes(gzip.compress(text.encode(), 9))
        with pytest.raises(ConfigError, match=f'{name}: the file expands to more than 100 times its size'):
            list(read_rows(bomb))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_bytes, 'MAX_ROW_BYTES', 1 << 20)
    endless = tmp_path / 'endless.jsonl'
    endless.write_bytes(b'{"query": "a"}\n{"query": "' + b'x' * (1 << 21))
    with pytest.raises(ConfigError, match='endless.jsonl:2: this line exceeds 1 MiB'):
        list(read_rows(endless))


def test_a_row_of_an_array_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('utils.formats.data_file.MAX_ROW_BYTES', 1 << 20)
    endless = tmp_path / 'endless.json'
    endless.write_bytes(b'[{"query": "a"},\n{"query": "' + b'x' * (1 << 22) + b'"}]')
    with pytest.raises(ConfigError, match='endless.json:2: the row that starts here exceeds 1 MiB, the limit'):
        list(read_rows(endless))


def test_an_array_as_a_row_of_a_json_file_is_not_told_to_rename_it(tmp_path: Path) -> None:
    file = tmp_path / 'a.json'
    file.write_bytes(b'[[1, 2]]')
    with pytest.raises(ConfigError, match='got list.$'):
        list(read_rows(file))
    file.write_bytes(b'[{"query": "a"},\n')
    with pytest.raises(ConfigError, match='a.json:2: the JSON array is broken here: expected a row or ], found the'):
        list(read_rows(file))


def test_a_file_that_is_gone_before_the_second_reading_is_one_message(tmp_path: Path) -> None:
    file = write(tmp_path / 'a.jsonl')
    known = signature(file)
    file.unlink()
    with pytest.raises(ConfigError, match='a.jsonl: the data file cannot be read: No such file'):
        list(read_rows(file, known=known))


def test_a_document_with_an_unreadable_line_gives_no_row(tmp_path: Path) -> None:
    file = tmp_path / 'a.txt'
    file.write_bytes(b'one\n\n\xe9\n\nthree\n')
    for text_rows in ('document', 'paragraph'):
        with pytest.raises(ConfigError, match='a.txt:3: byte 0xe9 is not UTF-8'):
            list(read_rows(file, bad=lambda place, _: None, text_rows=text_rows))


CHINESE = '{"query": "你好，世界", "response": "好"}\n'
FRENCH = '{"query": "déjà été", "response": "né"}\n'
BROKEN = {
    'chinese.jsonl': (CHINESE.encode('gb18030'), 'chinese.jsonl:1: byte 0xc4 is not UTF-8. It looks like GB18030. '
                      'Convert the file, e.g. iconv -f GB18030 -t UTF-8 chinese.jsonl.'),
    'french.jsonl': (FRENCH.encode('cp1252'), 'e.g. iconv -f WINDOWS-1252 -t UTF-8 french.jsonl.'),
    'bare.jsonl': (FRENCH.encode('utf-16-le'), 'bare.jsonl:1: the text has NUL bytes, so it is probably not UTF-8. '
                   'It looks like UTF-16LE. Convert the file, e.g. iconv -f UTF-16LE -t UTF-8 bare.jsonl.'),
    'bare.csv.gz': (gzip.compress('query,response\na,b\n'.encode('utf-16-be')),
                    'e.g. gzip -dc bare.csv.gz | iconv -f UTF-16BE -t UTF-8.'),
    'half.jsonl': ('\ufeff{"a": "b"}\n'.encode('utf-16-le') + b'\xd8\x3d\xd8\n\0', 'half.jsonl:2: an incomplete '
                   'or invalid character: the file is marked as UTF-16. Download'),
    'odd.json': (codecs.BOM_UTF16_BE + '[{"a": 1},\n{"a": 2}]'.encode('utf-16-be') + b'x',
                 'odd.json:2: an incomplete or invalid character'),
    'table.csv': (b'PK\x03\x04' + b'\0' * 9, 'table.csv:1: the file is not text. This is an Excel workbook or a zip'),
    'rows.jsonl': (b'PAR1' + b'\0' * 9, 'the file is not text. This is a parquet file: rename it to rows.parquet.'),
    'packed.jsonl': (gzip.compress(b'{"query": "a"}\n' * 9), 'is compressed with gzip: rename it to packed.jsonl.gz.'),
    'packed.json': (gzip.compress(b'[{"query": "a"}]' * 9), 'is compressed with gzip: rename it to packed.json.gz.'),
    'beyond.jsonl': (codecs.BOM_UTF32_LE + '{"a": "b"}\n'.encode('utf-32-le') + b'\xff' * 4, 'beyond.jsonl:2: an '
                     'incomplete or invalid character: the file is marked as UTF-32. Download'),
    'pretty.jsonl': (b'[\n{"query": "a"}\n]\n', 'pretty.jsonl:1: the JSON value spans several lines'),
    'object.jsonl': (b'{\n"query": "a"\n}\n', 'object.jsonl:1: the JSON value spans several lines'),
    'wide.jsonl': (b'{"query": "a",\n "response": "b"}\n', 'wide.jsonl:1: the JSON value spans several lines'),
    'nested.jsonl': (b'{"messages": [\n{"role": "user"}]}\n', 'nested.jsonl:1: the JSON value spans several lines'),
    'cut_first.jsonl': (b'{"query": "a",\n{"query": "b"}\n', 'cut_first.jsonl:1: this line is not JSON (Expecting'),
    'half_last.jsonl': (b'{"query": "a"}\n{"query": "b", "resp\r\n\n', 'half_last.jsonl:2: this line is not JSON ('
                        'Unterminated string starting at at column 16): the file ends before the row does, so it was '
                        'not written or copied completely. Remove this line, or write the other rows to a new file '
                        'with --check_dataset true --write_clean NEW.jsonl.'),
    'array.jsonl': (b'[{"query": "a"}]\n', 'got list. Rename the file to .json if it holds an array of rows.'),
    'cut.jsonl.gz': (gzip.compress(b'{"query": "a"}\n' * 9)[:-9], 'the gzip file is broken after'),
    'none.jsonl.gz': (b'{"query": "a"}\n', 'the gzip file is broken after 0 bytes'),
    'after.json': (b'[{"query": "a"}]\n{"query": "b"}', 'after.json:2: something follows the end of the JSON array'),
    'comma.json': (b'[{"a": 1},\n, {"a": 2}]', 'comma.json:2: the JSON is broken in the row that starts at line 2'),
    'string.json': (b'[{"a": 1},\n{"a":\n "x]', 'string.json:3: the JSON is broken in the row that starts at line 2'),
    'latin.json': (b'[{"a": 1},\n\n{"a": "\xe9"}]', 'latin.json:3: byte 0xe9 is not UTF-8'),
    'quote.csv': (b'a,b\n1,2\n"x"y,2\n', 'quote.csv:3: the CSV is broken here'),
    'two.parquet': (b'PAR1' + b'\0' * 50 + b'PAR1', 'the parquet file cannot be read after row 0'),
}  # fmt: skip


@pytest.mark.parametrize('name', BROKEN)
def test_broken_files_are_named_with_the_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BROKEN[name][0])
    with pytest.raises(ConfigError) as caught:
        list(read_rows(tmp_path / name))
    assert BROKEN[name][1] in str(caught.value)


@pytest.mark.parametrize(
    ('encoding', 'invalid'),
    [('utf-32', b'\xff\xff\xff\x7f'), ('utf-32-be', b'\x00\x11\x00\x00'), ('utf-16', b'\x3d\xd8')],
)
def test_an_invalid_character_of_a_wide_encoding_costs_its_line_alone(
    encoding: str, invalid: bytes, tmp_path: Path
) -> None:
    """The lines are longer than a block together, so that the character is not in the first one."""
    lines = [json.dumps({'query': f'{number} é', 'response': 'x' * 3000}) + '\n' for number in range(200)]
    bom = codecs.BOM_UTF32_BE if encoding == 'utf-32-be' else b''
    mark = codecs.BOM_UTF16_LE if encoding == 'utf-16' else codecs.BOM_UTF32_LE
    encoded = [line.encode(encoding).removeprefix(mark) for line in lines]
    encoded[150] = encoded[150][: 4 * 20] + invalid + encoded[150][4 * 20 :]
    file = tmp_path / 'wide.jsonl'
    file.write_bytes((bom or mark) + b''.join(encoded))
    told: list[str] = []
    rows = list(read_rows(file, bad=lambda place, problem: told.append(f'{place}: {problem}')))
    assert [row['query'] for _, row in rows] == [f'{number} é' for number in range(200) if number != 150]
    (only,) = told
    assert only.startswith(f'{file}:151: an incomplete or invalid character')


def test_a_json_file_may_hold_objects_of_several_lines_one_after_the_other(tmp_path: Path) -> None:
    file = tmp_path / 'pretty.json'
    rows = [{'query': f'q{i}', 'response': ['r', {'n': i}]} for i in range(3)]
    file.write_text('\n'.join(json.dumps(row, indent=2) for row in rows), encoding='utf-8')
    assert list(read_rows(file)) == [(f'{file}:{line}', row) for line, row in zip((1, 10, 19), rows, strict=True)]


@pytest.mark.parametrize('name', ['a.csv', 'semicolons.csv', 'header.csv', 'a.jsonl', 'a.txt'])
def test_rows_in_another_encoding_are_reported_and_not_called_absent(name: str, tmp_path: Path) -> None:
    mark = ';' if name == 'semicolons.csv' else ','
    header = 'query,fran\xe7ais' if name == 'header.csv' else f'query{mark}response'
    lines = [header, *(f'f\xfcr {i}{mark}sch\xf6n' for i in range(3))]
    if name == 'a.jsonl':
        lines = [json.dumps({'query': f'f\xfcr {i}'}, ensure_ascii=False) for i in range(3)]
    (tmp_path / name).write_bytes('\r\n'.join(lines).encode('cp1252'))
    found: list[tuple[str, str]] = []
    try:
        rows = list(read_rows(tmp_path / name, bad=lambda *problem: found.append(problem)))
    except UnreadableRow as error:
        rows = []
        found.append((error.location, error.problem))
    assert rows == [] and len(found) == (3 if name == 'a.jsonl' else 1)
    assert found[0][0] == f'{tmp_path / name}:{1 if name in ("header.csv", "a.jsonl") else 2}'
    assert all('is not UTF-8. It looks like WINDOWS-1252.' in problem for _, problem in found)


def test_a_parquet_file_with_a_corrupt_page_is_named_with_the_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / 'a.parquet'
    table = pyarrow.table({'query': [f'q{i}' for i in range(3000)], 'response': ['r'] * 3000})
    pyarrow.parquet.write_table(table, file, row_group_size=1000, compression='gzip')
    place = pyarrow.parquet.ParquetFile(file).metadata.row_group(2).column(0).data_page_offset
    data = bytearray(file.read_bytes())
    data[place : place + 60] = bytes(60)
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r'a.parquet: the parquet file cannot be read after row 1024:'):
        list(read_rows(file))


@pytest.mark.parametrize('change', ['grow', 'touch', 'replace', 'remove'])
def test_a_file_that_changes_while_it_is_read_is_refused(change: str, tmp_path: Path) -> None:
    file = write(tmp_path / 'a.jsonl', ROWS * 40)
    rows = read_rows(file)
    next(rows)
    if change == 'grow':
        with file.open('a') as stream:
            stream.write('{"query": "new", "response": "x"}\n')
    elif change == 'touch':
        os.utime(file, ns=(0, 12345))
    else:
        file.unlink()
        if change == 'replace':
            write(file, ROWS * 40)
    with pytest.raises(ConfigError, match='changed since it was opened' if change != 'remove' else 'cannot be read'):
        list(rows)


def test_a_file_that_changes_between_the_two_readings_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / 'a.jsonl')
    plan = plan_rows([str(file)])
    write(file, [{'query': 'other', 'response': 'row'}] * 50)
    with pytest.raises(ConfigError, match='changed since it was opened'):
        list(plan.rows(1, 2))


def test_a_folder_a_glob_and_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / 'rows'
    (folder / 'deeper').mkdir(parents=True)
    write(folder / 'b.jsonl.gz', [{'query': 'b', 'response': 'x'}])
    write(folder / 'a.csv', [{'instruction': 'a', 'output': 'x'}])
    write(folder / '.hidden.jsonl', [{'query': 'hidden', 'response': 'x'}])
    write(folder / 'deeper' / 'c.json', [{'query': 'c', 'response': 'x'}])
    (folder / 'README.md').write_text('no data')

    def read(*words: str) -> list[str]:
        assert check_sources(words) == []
        return texts(get_dataset(words, test_ratio=0).train)

    assert read(str(folder)) == read(f'{folder}/') == ['a', 'b']
    assert read(f'{folder}/**/*.json*') == ['b', 'c']
    assert read(f'{folder}/*.gz', f'{folder}/a.csv') == ['b', 'a']
    assert len(read(f'{folder}#1')) == 1


def test_a_glob_is_one_data_set_split_and_drawn_from_as_one(tmp_path: Path) -> None:
    for name in 'ab':
        write_jsonl(tmp_path / f'{name}.jsonl', [{'query': f'{name}{i}', 'response': 'r'} for i in range(50)])
    rows = get_dataset([f'{tmp_path}/?.jsonl#80'], test_ratio=0.1)
    assert (len(rows.train), len(rows.val)) == (72, 8)
    together = write_jsonl(
        tmp_path / 'all.jsonl', [{'query': f'{name}{i}', 'response': 'r'} for name in 'ab' for i in range(50)]
    )
    assert texts(get_dataset([f'{together}#80'], test_ratio=0.1).train) == texts(rows.train)


def test_what_names_no_data_is_answered_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'mixed').mkdir()
    (tmp_path / 'mixed' / 'notes.pdf').write_text('x')
    file = write(tmp_path / 'a.jsonl')
    words = {
        f'{tmp_path}/*.csv': 'the pattern matches no file (looked from ',
        f'{tmp_path}/bare': 'bare holds no .json, .jsonl, .csv, .tsv, .txt, .md (each also .gz) or .parquet file',
        f'{tmp_path}/mixed/*': f'the pattern matches {tmp_path}/mixed/notes.pdf, which is not a .json',
        f'{tmp_path}/gone/': f'data folder {tmp_path}/gone is not there (looked in {tmp_path}). Correct the path.',
        f'{tmp_path}/*.jsonl': f' already names {file}, so its rows would be used twice.',
        f'{tmp_path}/./a.jsonl': f' already names {tmp_path}/a.jsonl, so its rows would be used twice.',
    }
    write(tmp_path / 'my_rows.jsonl')
    words[f'{tmp_path}/my_row.jsonl'] = f"(looked in {tmp_path}): did you mean 'my_rows.jsonl'? Correct the path."
    words[f'{tmp_path}/mixd/'] = f"(looked in {tmp_path}): did you mean 'mixed'? Correct the path."
    problems = check_sources([str(file), *words])
    assert len(problems) == len(words) == 8
    for problem, part in zip(problems, words.values(), strict=True):
        assert part in problem
    with pytest.raises(ConfigError, match='neither a registered data set nor a .json'):
        parse_source('data.xlsx')


def test_what_is_not_offered_is_said_with_what_to_do(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe.jsonl')
    write(tmp_path / 'rows')
    words = {
        str(
            tmp_path / 'rows'
        ): 'rows is not a .json, .jsonl, .csv, .tsv, .txt, .md (each also .gz) or .parquet file. Give',
        str(tmp_path / 'pipe.jsonl'): 'pipe.jsonl is a pipe or a device, which can be read only once. Write its',
        'https://example.org/a.jsonl?x=1': 'this is a URL, and rows are not fetched from the web. Download the file',
    }
    problems = check_sources(list(words))
    for problem, part in zip(problems, words.values(), strict=True):
        assert part in problem


@pytest.mark.parametrize(
    ('row', 'remedy'),
    [
        ({'x': 'a'}, 'Say which columns hold question and reply: --columns NAME=query,OTHER=response, or register a'),
        ({'question': 'a', 'choices': ['b']}, 'Supported: query/response[/history][/system], instruction/input/output'),
    ],
)
def test_columns_that_no_format_reads_are_told_with_a_flag_for_them(
    row: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    file = tmp_path / 'a.jsonl'
    file.write_text(json.dumps(row) + '\n')
    with pytest.raises(ConfigError) as raised:
        plan_rows([str(file)])
    assert f'{file}:1: unknown columns {", ".join(row)}. ' in str(raised.value)
    assert remedy in str(raised.value)


def test_asking_for_more_rows_than_there_are_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / 'a.jsonl')
    rows = get_dataset([f'{file}#500'], test_ratio=0.1)
    assert (len(rows.train), len(rows.val)) == (45, 5)
    assert f"--dataset '{file}#500' asks for 500 rows, but there are only 50. All of them are used." in caplog.text


def test_rows_of_a_generator_are_read_once_and_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils import dataset

    monkeypatch.setitem(dataset.DATASET_MAPPING, 'mine', lambda: (row for row in ROWS))
    rows = get_dataset(['mine'], test_ratio=0.1)
    assert len(rows.train) + len(rows.val) == 50


def test_a_registered_function_whose_rows_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils import dataset

    class Shrinking:
        def __init__(self) -> None:
            self.count = 4

        def __iter__(self) -> Any:
            self.count -= 1
            return iter(ROWS[: self.count])

    monkeypatch.setitem(dataset.DATASET_MAPPING, 'mine', Shrinking)
    with pytest.raises(ConfigError, match="data set 'mine': the second read returned different rows"):
        get_dataset(['mine'])

"""The 35 data sets of the hubs: literal rows of each in its source's layout, and each from a hub to converted rows."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.loopback_hub import Fault, LoopbackHub
from tests.support.runs import get_dataset
from utils.base.errors import ConfigError
from utils.dataset import DATASET_MAPPING
from utils.formats.conversation import BadRow, Filtered
from utils.formats.converters import Unwanted
from utils.formats.data_file import read_objects
from utils.formats.hub_dataset import HubDataset

Row = dict[str, Any]

# In the lists below: a row that is skipped on purpose.
OTHER: Any = object()
NAMES = [name for name, entry in DATASET_MAPPING.items() if isinstance(entry, HubDataset)]


def pair(query: str, response: str, **more: Any) -> Row:
    return {'query': query, 'response': response, **more}


ALPACA = [
    ({'instruction': 'Add.', 'input': '1 2', 'output': '3'}, pair('Add.\n1 2', '3')),
    ({'instruction': 'Say hi.', 'input': None, 'output': 'hi'}, pair('Say hi.\n', 'hi')),
    ({'instruction': 'Say hi.', 'output': 'hi', 'text': 'x'}, pair('Say hi.\n', 'hi')),
    ({'instruction': 'Say hi.', 'input': '', 'output': None}, None),
    ({'instruction': 'Say hi.', 'input': '', 'output': ''}, None),
    ({'instruction': 'Say hi.', 'input': '', 'output': float('nan')}, None),
]
PAIRS = [
    ({'prompt': 'a', 'answer': 'b'}, pair('a', 'b')),
    ({'prompt': 'a', 'answer': None}, None),
]
TURNS = [{'human': 'a', 'assistant': 'b'}, {'human': "it's", 'assistant': 'd\n'}]
SHAREGPT = [
    ({'conversation': str(TURNS)}, pair("it's", 'd\n', history=[['a', 'b']])),
    ({'conversation': str(TURNS[:1]), 'num_turns': 1}, pair('a', 'b', history=[])),
    ({'conversation': TURNS}, pair("it's", 'd\n', history=[['a', 'b']])),
    ({'conversation': '__import__("os").getcwd()'}, None),
    ({'conversation': '[{"human": "a"}]'}, None),
    ({'conversation': '[]'}, None),
]
TWO = 'Plugins:\n1. {"plugin_name": "weather", "x": 1}\n2. {"plugin_name": "maps"}'
NEWER = '1. {"name": "weather"}\n2. {"name": "maps"}'
SAID = [('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', 'd')]


def agent_row(system: str, said: list[tuple[str, str]]) -> Row:
    turns = [{'from': who, 'value': text} for who, text in [('system', system), *said]]
    return {'conversations': str(turns)}


AGENT = [
    (agent_row(TWO, SAID), pair('c', 'd', system=TWO, history=[['a', 'b']])),
    (agent_row(TWO, SAID[:2]), pair('a', 'b', system=TWO, history=[])),
    (agent_row(TWO.replace('maps', 'weather'), SAID), OTHER),
    (agent_row('no plugin', SAID), OTHER),
    (agent_row(TWO, []), None),
    (agent_row(TWO, [('assistant', 'b')]), OTHER),
    (agent_row(TWO, SAID[:3]), OTHER),
    ({'conversations': '[{"from": "system"'}, None),
]
MEDICAL = {'instruction': 'ask', 'input': 'in', 'output': 'out'}
MEDICAL_ZH = [
    (MEDICAL, pair('ask', 'out')),
    ({**MEDICAL, 'input': None}, pair('ask', 'out')),
    ({**MEDICAL, 'output': None}, None),
]
BLOCK = '```python\nprint(1)\n```'
LAW: Row = {'type': '法规', 'title': '民法', 'chapter1': '总则', 'chapter2': None, 'chapter3': '', 'content': '第一条'}
LABEL = '任务：情感分类\n句子：好\n类别：negative，positive\n输出：'
PAIR_LABEL = '任务：自然语言推理\n句子一：a\n句子二：b\n类别：neutral，entailment，contradiction\n输出：'

# Rows in the layout of the source, and the converted rows.
LITERAL: dict[str, list[tuple[Mapping[str, Any], Row | bool | None]]] = {
    **dict.fromkeys(
        ('alpaca-en', 'multi-alpaca-all', 'instinwild-en', 'instinwild-zh', 'cot-en', 'cot-zh', 'gpt4all-en', 'code-en',
         'school-math-zh', 'text2sql-en', 'finance-en'), ALPACA
    ),
    'alpaca-zh': [
        *ALPACA,
        ({'instruction': '翻译', 'input': '输入：你好', 'output': 'hello'}, pair('翻译\n你好', 'hello')),
        ({'instruction': '翻译', 'input': '文中输入：x', 'output': 'y'}, pair('翻译\n文中输入：x', 'y')),
    ],
    'firefly-all-zh': [
        ({'kind': 'Couplet', 'input': '上联', 'target': '下联'}, pair('上联', '下联')),
        ({'kind': 'NER', 'input': 'a', 'target': 'b'}, pair('a', 'b')),
        ({'kind': 'Unheard', 'input': 'a', 'target': 'b'}, OTHER),
        ({'kind': 'NER', 'input': 'a', 'target': None}, None),
    ],
    'instruct-en': [
        ({'prompt': 'a', 'completion': 'b'}, pair('a', 'b')),
        ({'prompt': None, 'completion': 'b'}, None),
        ({'prompt': '', 'completion': 'b'}, None),
    ],
    'sharegpt-en': SHAREGPT,
    'sharegpt-zh': SHAREGPT,
    'damo-agent-zh': [*AGENT, (agent_row(NEWER, SAID[:2]), pair('a', 'b', system=NEWER, history=[]))],
    'damo-agent-mini-zh': [*AGENT, (agent_row(NEWER, SAID[:2]), OTHER)],
    'code-python-zh': [
        ({'chat_rounds': "[{'role': 'human', 'content': 'q'}, {'role': 'bot', 'content': 'a'}]"}, pair('q', 'a')),
        ({'chat_rounds': [{'content': 'q'}, {'content': 'a'}]}, pair('q', 'a')),
        ({'chat_rounds': "[{'content': 'q'}]"}, OTHER),
        ({'chat_rounds': str([{'content': 'x'}] * 3)}, OTHER),
        ({'chat_rounds': None}, None),
    ],
    'leetcode-python-en': [
        (
            {'code_with_problem': f'# Two Sum\n\nFind them.\n\n{BLOCK}\n', 'explanation_only': 'It adds.'},
            pair('Two Sum\n\nFind them.', f'{BLOCK}\n\nIt adds.'),
        ),
        ({'code_with_problem': 'no code', 'explanation_only': 'x'}, OTHER),
        ({'code_with_problem': f'# a\n{BLOCK}\n{BLOCK}', 'explanation_only': 'x'}, OTHER),
    ],
    'medical-en': [
        (MEDICAL, pair('in', 'out')), ({**MEDICAL, 'input': None}, None), ({**MEDICAL, 'output': None}, None),
    ],
    'medical-zh': MEDICAL_ZH,
    'medical-mini-zh': MEDICAL_ZH,
    'lawyer-llama-zh': [
        ({'history': '[]', 'instruction': 'q', 'output': 'a'}, pair('q', 'a')),
        ({'history': [], 'instruction': 'q', 'output': 'a'}, pair('q', 'a')),
        ({'history': "[['x', 'y']]", 'instruction': 'q', 'output': 'a'}, OTHER),
        ({'history': '[', 'instruction': 'q', 'output': 'a'}, None),
        ({'history': '[]', 'instruction': 'q', 'output': None}, None),
    ],
    'tigerbot-law-zh': [
        (LAW, pair('', 'Type: 法规\nTitle: 民法\nChapter1: 总则\nContent: 第一条')),
        ({**LAW, 'chapter1': None}, pair('', 'Type: 法规\nTitle: 民法\nContent: 第一条')),
        ({**LAW, 'content': None}, None),
    ],
    'blossom-math-zh': [
        ({'id': '1', 'input': '1+1', 'output': '得2', 'answer': '2'}, pair('1+1', '得2\n\nAnswer: 2')),
        ({'input': '1+1', 'output': None, 'answer': '2'}, None),
    ],
    'sql-create-context-en': [
        (
            {'question': 'How many?', 'context': 'CREATE TABLE t (a INT)', 'answer': 'SELECT 1'},
            pair('How many?\nCREATE TABLE t (a INT)', 'SELECT 1'),
        ),
        ({'question': 'How many?', 'context': 'x', 'answer': None}, None),
    ],
    'advertise-gen-zh': [
        (
            {'content': '类型#裤', 'summary': '好裤子'},
            pair('任务：根据关键词生成广告\n关键词：类型#裤\n广告：', '好裤子'),
        ),
        ({'content': '类型#裤', 'summary': None}, None),
    ],
    'dureader-robust-zh': [
        (
            {'text1': '北京[SEP]首都是北京。', 'text2': '首都是哪？'},
            pair('任务：问题生成\n上下文：首都是北京。\n答案：北京\n问题：', '首都是哪？'),
        ),
        ({'text1': '没有', 'text2': 'x'}, None),
        ({'text1': 'a[SEP]b', 'text2': None}, None),
    ],
    'cmnli-zh': [
        ({'sentence1': 'a', 'sentence2': 'b', 'label': 0}, pair(PAIR_LABEL, 'neutral')),
        ({'sentence1': 'a', 'sentence2': 'b', 'label': '2'}, pair(PAIR_LABEL, 'contradiction')),
        ({'sentence1': 'a', 'sentence2': 'b', 'label': 'entailment'}, pair(PAIR_LABEL, 'entailment')),
        ({'sentence1': 'a', 'sentence2': 'b', 'label': -1}, OTHER),
        ({'sentence1': 'a', 'sentence2': 'b', 'label': None}, None),
        ({'sentence1': 'a', 'sentence2': 'b', 'label': ''}, None),
    ],
    'jd-zh': [
        ({'sentence': '好', 'label': 1}, pair(LABEL, 'positive')),
        ({'sentence': '好', 'label': '0.0'}, pair(LABEL, 'negative')),
        ({'sentence': '好', 'label': None}, None),
    ],
    'poetry-zh': [({'text1': '床前明月光'}, pair('写诗', '床前明月光')), ({'text1': None}, None)],
    'cls-fudan-news-zh': PAIRS,
    'ner-jave-zh': PAIRS,
    'coco-en': [
        (
            {'image': '/data/1.jpg', 'caption': 'a cat&&a dog'},
            pair('<img>/data/1.jpg</img>Please describe the image.', 'a cat'),
        ),
        (
            {'image': {'path': '/data/1.jpg', 'bytes': None}, 'caption': 'a cat'},
            pair('<img>/data/1.jpg</img>Please describe the image.', 'a cat'),
        ),
        ({'image': None, 'caption': 'a cat'}, None),
        ({'image': '/data/1.jpg', 'caption': None}, None),
    ],
}  # fmt: skip


def test_literal_rows_of_each_of_the_35_entries() -> None:
    assert len(NAMES) == 35 and set(LITERAL) == set(NAMES)
    checked = 0
    for name in NAMES:
        entry = DATASET_MAPPING[name]
        assert isinstance(entry, HubDataset)
        kept = 0
        for row, wanted in LITERAL[name]:
            untouched = json.dumps(row)
            if wanted is OTHER:
                with pytest.raises(Unwanted):
                    entry.to_row(row)
            else:
                assert entry.to_row(row) == wanted, (name, row)
            assert json.dumps(row) == untouched, 'a converter never changes its row'
            kept += isinstance(wanted, dict)
            checked += 1
        assert 0 < kept < len(LITERAL[name]), f'{name} has a row that is kept and one that is dropped'
    assert checked == 164


# The file layout of a source: from rows to the files of a repository.
Layout = Callable[[str, HubDataset, list[Row]], dict[str, bytes]]


def wanted_row(entry: HubDataset, row: Row) -> Any:
    """Return what an entry makes of a row, None if it drops it."""
    try:
        return entry.to_row(row)
    except Unwanted:
        return None


def splits(entry: HubDataset) -> list[str]:
    return [*entry.train, *entry.val]


def as_csv(rows: list[Row]) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, sorted({column for row in rows for column in row}))
    writer.writeheader()
    writer.writerows({k: '' if v != v else v for k, v in row.items()} for row in rows)
    return stream.getvalue().encode()


def as_lines(rows: list[Row]) -> bytes:
    return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode()


def as_parquet(rows: list[Row]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def csv_by_split(name: str, entry: HubDataset, rows: list[Row]) -> dict[str, bytes]:
    return {f'{split}.csv': as_csv(rows) for split in splits(entry)} | {'load_it.py': b'raise SystemExit'}


def lines_of_one_file(name: str, entry: HubDataset, rows: list[Row]) -> dict[str, bytes]:
    return {f'{name}.jsonl': as_lines(rows), 'README.md': b'# of rows\n', 'dataset_infos.json': b'{}'}


def lines_by_subset(name: str, entry: HubDataset, rows: list[Row]) -> dict[str, bytes]:
    files = {f'{sub}/{split}.jsonl': as_lines(rows) for sub in entry.subsets for split in splits(entry)}
    return {**files, 'other/train.jsonl': b'{"of": "another subset"}\n', 'other/test.jsonl': b'{}\n'}


def array_of_one_file(name: str, entry: HubDataset, rows: list[Row]) -> dict[str, bytes]:
    return {f'{name}.json': json.dumps(rows, ensure_ascii=False).encode()}


def concatenated(name: str, entry: HubDataset, rows: list[Row]) -> dict[str, bytes]:
    return {'firefly-train-1.1M.jsonl': ''.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()}


def parquet_by_readme(name: str, entry: HubDataset, rows: list[Row]) -> dict[str, bytes]:
    head = ['---', 'configs:']
    for subset in entry.subsets:
        head += [f'- config_name: {subset}', '  data_files:']
        for split in splits(entry):
            head += [f'  - split: {split}', f'    path: {subset}/{split}-*']
    files = {f'{s}/{split}-00000-of-00001.parquet': as_parquet(rows) for s in entry.subsets for split in splits(entry)}
    return {'README.md': '\n'.join([*head, '---', '# data']).encode(), **files}


def told_by_modelscope(name: str, entry: HubDataset, rows: list[Row]) -> dict[str, bytes]:
    told: dict[str, dict[str, dict[str, str]]] = {}
    files: dict[str, bytes] = {}
    for subset in {*entry.subsets, 'default', 'subset'} if 'instinwild' in name else entry.subsets:
        for split in splits(entry):
            told.setdefault(subset, {})[split] = {'meta': f'{subset}_{split}.csv', 'file': ''}
            files[f'{subset}_{split}.csv'] = as_csv(rows if subset in entry.subsets else [{'wrong': '1'}])
    return {f'{entry.id.split("/")[1]}.json': json.dumps(told).encode(), **files}


def pictures_in_an_archive(name: str, entry: HubDataset, rows: list[Row]) -> dict[str, bytes]:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        archive.writestr('pictures/1.jpg', b'picture')
        archive.writestr('../../outside.jpg', b'picture')
    named = [{'image:FILE': 'pictures/1.jpg' if row['image'] else None, 'caption': row['caption']} for row in rows]
    told = {'default': {s: {'meta': f'{s}.csv', 'file': f'{s}.zip'} for s in splits(entry)}}
    files = {f'{s}.csv': as_csv(named) for s in splits(entry)} | {f'{s}.zip': stream.getvalue() for s in splits(entry)}
    return {f'{entry.id.split("/")[1]}.json': json.dumps(told).encode(), **files}


LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(NAMES, csv_by_split),
    **dict.fromkeys(('alpaca-en', 'code-en', 'lawyer-llama-zh', 'sql-create-context-en'), parquet_by_readme),
    **dict.fromkeys(('multi-alpaca-all', 'sharegpt-en', 'sharegpt-zh', 'medical-en', 'medical-zh'), lines_by_subset),
    **dict.fromkeys(('instinwild-en', 'instinwild-zh', 'cmnli-zh', 'medical-mini-zh'), told_by_modelscope),
    **dict.fromkeys(('code-python-zh', 'school-math-zh', 'tigerbot-law-zh', 'finance-en'), lines_of_one_file),
    **dict.fromkeys(('blossom-math-zh', 'leetcode-python-en', 'cot-en'), array_of_one_file),
    'firefly-all-zh': concatenated,
    'coco-en': pictures_in_an_archive,
}


def source_rows(name: str) -> list[Row]:
    """Return the literal rows of an entry with the columns of the first and values that its file layout can hold."""
    rows = [dict(row) for row, _ in LITERAL[name]]
    return [{column: row.get(column) for column in rows[0]} for row in rows]


@pytest.mark.parametrize('name', NAMES)
def test_every_entry_loads_from_the_hub_in_its_source_shape(name: str, loopback: LoopbackHub, tmp_path: Path) -> None:
    entry = DATASET_MAPPING[name]
    assert isinstance(entry, HubDataset)
    rows = source_rows(name)
    if LAYOUTS[name] is parquet_by_readme:  # one type per column
        rows = [r for r in rows if all(v is None or isinstance(v, str | int) for v in r.values())]
    served = entry.moved[0] if entry.moved else entry.id
    loopback.add('dataset', served, LAYOUTS[name](name, entry, rows))
    # What a file of this layout keeps of a row; CSV holds only text.
    kept = [wanted_row(entry, row) for row in rows]
    parts = len(entry.subsets) * len(entry.train)
    found = get_dataset([name], test_ratio=0.0)
    assert found.served == {name: f'modelscope:{served}@master'}
    wanted = [row['response'] for row in kept if row] * parts
    got = [row.messages[-1]['content'] for row in found.train]
    assert sorted(got) == sorted(wanted) and len(got) >= 1
    assert len(found.val) == (len(kept) - kept.count(None)) * len(entry.val) * len(entry.subsets)
    dropped = kept.count(None) * (parts + len(entry.val) * len(entry.subsets))
    assert len(found.left_out) == dropped
    assert all(reason.startswith(f'dropped by {name}') for reason in found.left_out.counts)
    assert not any('.py' in request or 'other/' in request for request in loopback.fetched())


def test_an_id_that_is_gone_is_followed_by_the_next_and_by_the_mirror(
    loopback: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    loopback.add(
        'dataset', 'YeungNLP/firefly-train-1.1M', {'a.jsonl': as_lines([{'kind': 'NER', 'input': 'a', 'target': 'b'}])}
    )
    found = get_dataset(['firefly-all-zh'], test_ratio=0.0)
    assert found.served == {'firefly-all-zh': 'huggingface:YeungNLP/firefly-train-1.1M@master'}
    for gone, tried in (
        ('modelscope:wyj123456/firefly@master', 'modelscope:AI-ModelScope/firefly-train-1.1M@master'),
        ('modelscope:AI-ModelScope/firefly-train-1.1M@master', 'huggingface:YeungNLP/firefly-train-1.1M@master'),
    ):
        assert f'dataset {gone} is not found (404): trying {tried}' in caplog.text


def test_the_chosen_hub_comes_first(loopback: LoopbackHub) -> None:
    for repo in ('vicgalle/alpaca-gpt4', 'AI-ModelScope/alpaca-gpt4-data-en'):
        loopback.add('dataset', repo, {'train.csv': as_csv([{'instruction': repo, 'output': 'b'}])})
    for hub, repo in (('huggingface', 'vicgalle/alpaca-gpt4'), ('modelscope', 'AI-ModelScope/alpaca-gpt4-data-en')):
        found = get_dataset(['alpaca-en'], test_ratio=0.0, hub=hub)
        assert found.served == {'alpaca-en': f'{hub}:{repo}@master'}
        assert found.train[0].messages[0]['content'] == f'{repo}\n'


def test_an_entry_is_a_function_without_arguments_whose_rows_can_be_read_again(loopback: LoopbackHub) -> None:
    rows = [{'input': str(i), 'output': 'x', 'answer': 'y'} for i in range(3)]
    loopback.add('dataset', 'AI-ModelScope/blossom-math-v2', {'train.jsonl': as_lines(rows)})
    train, val = DATASET_MAPPING['blossom-math-zh']()
    assert val is None
    first, second = list(train), list(train)
    assert first == second == [pair(str(i), 'x\n\nAnswer: y') for i in range(3)]


def test_the_mini_set_draws_the_same_rows_each_time(loopback: LoopbackHub) -> None:
    from dataclasses import replace

    entry = DATASET_MAPPING['medical-mini-zh']
    assert isinstance(entry, HubDataset) and entry.take == 100_000
    rows = [{'instruction': str(i), 'input': '', 'output': 'x' if i % 2 else None} for i in range(50)]
    files = {f'zh/{split}.jsonl': as_lines(rows) for split in ('train', 'val', 'test')}
    loopback.add('dataset', 'swift/medical_zh', files)
    train, val, _ = replace(entry, take=7).load('modelscope')
    drawn = [row['query'] for row in train]
    assert len(drawn) == 7 and drawn == [row['query'] for row in train] and val is not None
    assert sum(isinstance(row, BadRow) for _, row in train.with_locations()) == 50 and len(list(val)) == 25


def test_bytes_of_a_parquet_cell_become_a_file(loopback: LoopbackHub) -> None:
    rows = [{'image': {'bytes': b'picture', 'path': '7.png'}, 'caption': 'a cat'}]
    files = {f'{split}-00000-of-00001.parquet': as_parquet(rows) for split in ('train', 'validation')}
    loopback.add('dataset', 'modelscope/coco_2014_caption', files)
    query = get_dataset(['coco-en']).train[0].messages[0]['content']
    path = Path(query.removeprefix('<img>').split('</img>')[0])
    assert path.read_bytes() == b'picture' and path.suffix == '.png'


def test_an_image_outside_the_folder_of_its_data_is_refused_by_name(loopback: LoopbackHub) -> None:
    outside = {
        '../1.jpg': 'an image leaves the folder of its data file',
        'pictures/../../1.jpg': 'an image leaves the folder of its data file',
        '/etc/1.jpg': 'the path of an image is absolute',
        'https://a.b/1.jpg': 'an image is a URL',
        'a</img><img>/etc/1.jpg': 'the path of an image is absolute or contains an image tag (<img>)',
    }
    rows = [{'image': path, 'caption': 'a cat'} for path in ('pictures/1.jpg', *outside, 'a/../2.jpg')]
    files = {f'{split}.jsonl': as_lines(rows) for split in ('train', 'validation')}
    loopback.add('dataset', 'modelscope/coco_2014_caption', files)
    found = get_dataset(['coco-en'], test_ratio=0.0)
    seen = [row.messages[0]['content'].removeprefix('<img>').split('</img>')[0] for row in found.train]
    assert len(seen) == 2 and seen[0].endswith('/pictures/1.jpg') and seen[1].endswith('/2.jpg')
    assert '..' not in ''.join(seen) and sum(found.left_out.counts.values()) == 2 * len(outside)
    for line, (path, reason) in enumerate(outside.items(), start=2):
        places = next(p for r, p in found.left_out.places.items() if r.startswith(f'dropped by coco-en: {reason}'))
        assert any(place.endswith(f'train.jsonl:{line}') for place in places), path


def test_rows_that_a_filter_leaves_out_are_told_from_broken_ones(loopback: LoopbackHub) -> None:
    good = {'kind': 'NER', 'input': 'a', 'target': 'b'}
    rows = [good, {**good, 'kind': 'Chat'}, {**good, 'target': None}, {**good, 'kind': None}]
    loopback.add('dataset', 'wyj123456/firefly', {'a.jsonl': as_lines(rows)})
    entry = DATASET_MAPPING['firefly-all-zh']
    assert isinstance(entry, HubDataset)
    kinds = [type(row) for _, row in entry.load('modelscope')[0].with_locations()]
    assert kinds == [dict, Filtered, BadRow, BadRow]


def test_objects_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / 'a.jsonl'
    file.write_text('{"a": "}{"}{"a": 2}\n\n[{"a": 3},\n{"a": 4}]', encoding='utf-8')
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr('utils.formats.file_bytes.BLOCK_BYTES', block)
        found = list(read_objects(file))
        assert [row['a'] for _, row in found] == ['}{', 2, 3, 4]
        assert found[2][0] == f'{file}: object 3'
    file.write_text('{"a": 1}{"a": ')
    with pytest.raises(ConfigError, match='the JSON is broken in the row that starts at line 1'):
        list(read_objects(file))
    file.write_text('{"a": 1} 2')
    with pytest.raises(ConfigError, match='object 2: expected an object with named columns, got int'):
        list(read_objects(file))


GONE = {
    (
        'sharegpt-en',
        'swift/sharegpt',
        'common-en/train.jsonl',
    ): "split 'train' of subset 'computer-en' or one of its files is not found",
    ('jd-zh', 'DAMO_NLP/jd', 'train.csv'): "split 'validation' of subset 'default' or one of its files is not found",
}


@pytest.mark.parametrize('case', GONE, ids=lambda case: case[0])
def test_a_subset_or_split_that_is_gone(case: tuple[str, str, str], loopback: LoopbackHub) -> None:
    name, repo, file = case
    loopback.add('dataset', repo, {file: b'a,b\n1,2\n'})
    with pytest.raises(ConfigError, match=GONE[case]) as caught:
        get_dataset([name])
    assert f'Found: {file}' in str(caught.value)


@pytest.mark.parametrize('head', ['configs: 3', 'configs: [3]', 'a: 2023-99-99', '{'])
def test_a_readme_that_says_nothing_useful_leaves_the_names_of_the_files(head: str, loopback: LoopbackHub) -> None:
    rows = b'input,output,answer\n1,2,3\n'
    files = {'train.csv': rows, 'README.md': f'---\n{head}\n---\n'.encode()}
    loopback.add('dataset', 'AI-ModelScope/blossom-math-v2', files)
    assert len(get_dataset(['blossom-math-zh'], test_ratio=0).train) == 1


def test_columns_that_changed_are_named(loopback: LoopbackHub) -> None:
    loopback.add('dataset', 'AI-ModelScope/blossom-math-v2', {'train.csv': b'question,output\n1,2\n'})
    with pytest.raises(ConfigError) as caught:
        get_dataset(['blossom-math-zh'])
    said = str(caught.value)
    assert 'missing columns: input, answer. The file has question, output, but the entry' in said
    assert 'DATASET_MAPPING expects input, output, answer.' in said
    assert '/train.csv:2: ' in said


def test_a_corrupt_parquet_file(loopback: LoopbackHub) -> None:
    loopback.add('dataset', 'vicgalle/alpaca-gpt4', {'train.parquet': as_parquet([{'a': 1}])[:-9] + b'broken...'})
    with pytest.raises(ConfigError, match=r'train\.parquet: the parquet file cannot be read after row 0'):
        get_dataset(['alpaca-en'], hub='huggingface')


def test_a_broken_archive_of_pictures(loopback: LoopbackHub) -> None:
    told = {'default': {s: {'meta': f'{s}.csv', 'file': f'{s}.zip'} for s in ('train', 'validation')}}
    files = {'coco_2014_caption.json': json.dumps(told).encode()}
    for split in ('train', 'validation'):
        files |= {f'{split}.csv': b'image:FILE,caption\n1.jpg,a cat\n', f'{split}.zip': b'PK\x03\x04 no more'}
    loopback.add('dataset', 'modelscope/coco_2014_caption', files)
    with pytest.raises(ConfigError, match=r'train\.zip: the zip file is damaged or encrypted'):
        get_dataset(['coco-en'])


def test_a_hub_that_fails_is_one_error(loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('utils.hub.snapshot._WAITS', (0.0, 0.0))
    loopback.faults = [Fault('/api/datasets/', 500, 99)]
    with pytest.raises(ConfigError, match='could not be fetched in 3 attempts'):
        get_dataset(['alpaca-en'], hub='huggingface')


def test_columns_of_a_registered_entry_are_not_renamed_by_a_flag(
    loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.add('dataset', 'a/b', {'train.jsonl': b'{"title": "x", "body": "y"}'})
    entry = HubDataset(id='a/b', columns=('title',), to_row=dict, drops='none')
    monkeypatch.setitem(DATASET_MAPPING, 'mine', entry)
    with pytest.raises(ConfigError) as raised:
        get_dataset(['mine'])
    assert 'unknown columns title, body. Supported: ' in str(raised.value) and '--columns' not in str(raised.value)
    assert str(raised.value).endswith('Return rows with such columns from the function in utils/dataset.py.')

"""The encoding of text that is not UTF-8 is named with the command that converts the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import get_dataset
from utils.base.errors import ConfigError

TEXTS = {
    'WINDOWS-1252': [
        'It’s a test',
        '“Quoted” – and more…',
        'only 5 €',
        'Il a déjà été créé où ça',
        'Müller fährt nach Köln, größer und schöner',
        '¿Qué tal, señor?',
        '«été»',
        'né',
        'créée',
    ],
    'WINDOWS-1251': ['Привет, мир! Как дела?', '«Да», — сказал он.', 'Ёлка и ёж', 'Это КОШКА'],
    'GB18030': ['你好，世界', '天气很好，我们去公园吧。', '人工智能是计算机科学的一个分支', '好'],
    'BIG5': ['你好，世界', '天氣很好，我們去公園吧。', '人工智慧是計算機科學的一個分支'],
    'SHIFT_JIS': ['こんにちは、世界。', '次の文章を要約してください。', 'コンピュータの使い方を教えて'],
    'EUC-JP': ['日本の首都は東京です。', '次の文章を要約してください。'],
    'CP949': ['안녕하세요, 세계!', '다음 글을 요약하세요'],
}
CASES = [(encoding, text) for encoding, texts in TEXTS.items() for text in texts]


@pytest.mark.parametrize(('encoding', 'text'), CASES)
@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a.csv'])
def test_the_encoding_is_named_with_the_command(encoding: str, text: str, name: str, tmp_path: Path) -> None:
    row = json.dumps({'query': text, 'response': 'ok'}, ensure_ascii=False)
    content = {'a.jsonl': f'{row}\n', 'a.json': f'[\n{row}]\n', 'a.csv': f'query,response\n"{text}",ok\n'}[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    line = 1 if name == 'a.jsonl' else 2
    with pytest.raises(ConfigError) as raised:
        get_dataset([str(tmp_path / name)])
    said = f' is not UTF-8. It looks like {encoding}. Convert the file, e.g. iconv -f {encoding} -t UTF-8 {name}.'
    assert str(raised.value).startswith(f'{tmp_path / name}:{line}: byte 0x') and str(raised.value).endswith(said)


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-32'])
@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a.csv', 'a.tsv'])
def test_text_with_a_byte_order_mark_is_read_with_the_right_lines(encoding: str, name: str, tmp_path: Path) -> None:
    texts = [
        'ein Wort',
        '你好 \U0001f642',
        'Ċ und \u2028 und \x85 sind keine Zeilen',
    ]  # U+010A has the byte of a line end
    mark = '\t' if name == 'a.tsv' else ','
    rows = [json.dumps({'query': text, 'response': 'ok'}, ensure_ascii=False) for text in texts]
    content = {
        'a.jsonl': '\n'.join(rows),
        'a.json': '[\n' + ',\n'.join(rows) + '\n]',
        'a.csv': f'query{mark}response\n' + ''.join(f'"{text}"{mark}ok\r\n' for text in texts),
    }['a.csv' if mark == '\t' else name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    found = get_dataset([str(tmp_path / name)], test_ratio=0).train
    assert [row.messages[0]['content'] for row in found] == texts
    first = 1 if name == 'a.jsonl' else 2
    assert [row.origin for row in found] == [f'{tmp_path / name}:{first + i}' for i in range(3)]

"""Generates the tables of flags in docs/flags.md and docs/cn/flags.md.

flags_cn.json holds the Chinese help text of each flag ("cn"), and the English help text that it translates ("en").
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from utils.cli.arguments import CommonArguments, InferArguments, SftArguments, flag_types
from utils.cli.parser import describe_default, describe_type

TEXTS = Path(__file__).with_name('flags_cn.json')
# The class of the flags of each table. `common` has the flags that both programs share, the other tables all others.
_CLASSES: dict[str, type[CommonArguments]] = {'common': SftArguments, 'sft': SftArguments, 'infer': InferArguments}
_COMMON = {f.name for f in dataclasses.fields(CommonArguments)}
_HEADER = '| flag | takes | default | meaning |'
_HEADER_CN = '| 参数 | 取值 | 默认值 | 含义 |'
# Chinese words for the results of describe_type, except closed choices such as lora|full.
_TYPES_CN = {'text': '文本', 'name ...': '名字 ...', 'int': '整数', 'float': '浮点数', 'number': '数字'}
_CHINESE = re.compile('[\u4e00-\u9fff]')


def _flags(table: str) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(_CLASSES[table]) if (f.name in _COMMON) == (table == 'common')]


def read_texts() -> dict[str, dict[str, dict[str, str]]]:
    """Return the content of flags_cn.json: for each table and flag, the texts `en` and `cn`.

    Raises json.JSONDecodeError if the file is not JSON.
    """
    texts: dict[str, dict[str, dict[str, str]]] = json.loads(TEXTS.read_text(encoding='utf-8'))
    return texts


def _cell(text: str) -> str:
    return text.replace('|', '\\|').replace('<', '&lt;')


def flag_table(table: str, *, chinese: bool = False) -> str:
    """Return a Markdown table of flags, in English or in Chinese. `table` is common, sft or infer.

    Raises KeyError if `chinese` is True and a flag has no Chinese help text.
    """
    types = flag_types(_CLASSES[table])
    texts = read_texts()[table] if chinese else {}
    lines = [_HEADER_CN if chinese else _HEADER, '|---|---|---|---|']
    for f in _flags(table):
        takes = describe_type(types[f.name])
        meaning = f.metadata['help']
        if chinese:
            takes = _TYPES_CN.get(takes, takes)
            meaning = texts[f.name]['cn']
        lines.append(f'| `--{f.name}` | ' + ' | '.join(map(_cell, (takes, describe_default(f), meaning))) + ' |')
    return '\n'.join(lines)


def _problem(table: str, name: str, text: str | None, entry: dict[str, str]) -> str | None:
    """Return what is wrong with the entry of a flag, or None. `text` is its English help, None if it does not exist."""
    if text is None:
        return f'--{name} is not a flag of this table. Remove its entry from "{table}".'
    if not _CHINESE.search(entry.get('cn', '')):
        line = json.dumps({'en': text, 'cn': ''}, ensure_ascii=False)
        return f'--{name} has no Chinese text. Add it to "{table}", with the text as "cn": "{name}": {line}'
    if entry.get('en') != text:
        new = json.dumps(text, ensure_ascii=False)
        return f'the help of --{name} has changed. Correct its "cn" in "{table}", and replace its "en" by {new}'
    return None


def translation_problems() -> list[str]:
    """Return a message for each flag whose Chinese help text is missing, out of date, or of a flag that is gone.

    If flags_cn.json is not JSON, the only message says so.
    """
    try:
        texts = read_texts()
    except json.JSONDecodeError as error:
        return [f'tools/{TEXTS.name}: not valid JSON: {error}. Correct the JSON there.']

    found = []
    for table in {**_CLASSES, **texts}:
        helps = {f.name: f.metadata['help'] for f in _flags(table)} if table in _CLASSES else {}
        entries = texts.get(table, {})
        for name in {**helps, **entries}:
            problem = _problem(table, name, helps.get(name), entries.get(name, {}))
            if problem is not None:
                found.append(f'tools/{TEXTS.name}: {problem}')
    return found

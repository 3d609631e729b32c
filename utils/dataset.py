"""Data sets: the registry, and rows drawn, split and counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils import demo_sql
from utils.convert import KNOWN_SHAPES, BadRow, Converter, check_row, find_converter
from utils.data_file import SUFFIXES, PlacedRow, read_rows
from utils.dataset_rows import (
    HubDataset,
    RowStream,
    ToRow,
    advertise,
    agent,
    alpaca,
    always_ask,
    ask_question,
    caption,
    classify,
    human_assistant,
    law_text,
    leetcode,
    of_kinds,
    pair,
    two_rounds,
    with_answer,
    without_history,
)
from utils.errors import ConfigError, did_you_mean
from utils.hub_clients import HubName
from utils.logger import logger
from utils.preprocess import Row

RawRows = Iterable[Mapping[str, Any]]
# A function without arguments that returns one data set, or a pair (train, validation).
# Data sets of the hubs are entries of HubDataset, which can be called the same way.
DatasetFunction = Callable[[], 'RawRows | tuple[RawRows, RawRows | None]']

ALPACA = ('instruction', 'output')
_NO_OUTPUT = 'no output'
_PLAIN = alpaca()
_FIREFLY_KINDS = (
    'ProseGeneration', 'MRC', 'JinYongGeneration', 'TextCorrection', 'ClassicalChinese', 'BELLE', 'StoryGeneration',
    'Couplet', 'Cot', 'Dictionary', 'Translation', 'Program', 'SentimentAnalyze', 'OpenQA', 'AncientPoem',
    'TextMatching', 'NLI', 'Summary', 'KeywordRecognition', 'ProductDesc', 'LyricGeneration', 'Composition',
    'MusicComment', 'NER',
)  # fmt: skip
_AGENT_DROPS = 'fewer than two plugins in the system text, or turns that do not alternate user, assistant'
_MEDICAL = HubDataset(
    id='huangjintao/medical_zh',
    moved=('swift/medical_zh',),
    subsets=('zh',),
    columns=ALPACA,
    train=('train', 'val'),
    val=('test',),
    to_row=pair('instruction', 'output'),
    drops=_NO_OUTPUT,
)


def _alpaca(
    modelscope_id: str,
    hf_id: str | None = None,
    *,
    to_row: ToRow = _PLAIN,
    columns: tuple[str, ...] = ALPACA,
    subsets: tuple[str, ...] = ('default',),
    not_named: tuple[str, ...] = (),
) -> HubDataset:
    """Return the entry of a data set of instruction, input and output."""
    return HubDataset(
        id=modelscope_id,
        hf_id=hf_id,
        columns=columns,
        subsets=subsets,
        not_named=not_named,
        to_row=to_row,
        drops=_NO_OUTPUT,
    )


def _pairs(modelscope_id: str, query: str, response: str) -> HubDataset:
    """Return the entry of a data set whose two columns are taken as they are."""
    drops = f'no {query} or no {response}'
    return HubDataset(id=modelscope_id, columns=(query, response), to_row=pair(query, response), drops=drops)


def _sharegpt(*subsets: str) -> HubDataset:
    return HubDataset(
        id='huangjintao/sharegpt',
        moved=('swift/sharegpt',),
        subsets=subsets,
        columns=('conversation',),
        to_row=human_assistant('conversation'),
        drops='no list of human and assistant turns with a last answer',
    )


def _agent(names: str) -> HubDataset:
    return HubDataset(
        id='damo/MSAgent-Bench',
        columns=('conversations',),
        val=('validation',),
        # A numbered list of plugins: 1. {"plugin_name": "..."
        to_row=agent(r'\d\.\s*\{\s*"(?:' + names + r')"\s*:\s*"([^"]+)"'),
        drops=_AGENT_DROPS,
    )


DATASET_MAPPING: dict[str, DatasetFunction] = {
    # Question and table definition -> SQL; made by this project, scored by running the SQL.
    'sql-demo': lambda: (demo_sql.train_rows(), demo_sql.held_out_rows()),
    'alpaca-en': _alpaca('AI-ModelScope/alpaca-gpt4-data-en', 'vicgalle/alpaca-gpt4'),
    'alpaca-zh': _alpaca(
        'AI-ModelScope/alpaca-gpt4-data-zh', 'llm-wizard/alpaca-gpt4-data-zh', to_row=alpaca(drop_prefix='输入：')
    ),
    'multi-alpaca-all': _alpaca(
        'damo/nlp_polylm_multialpaca_sft',
        subsets=('ar', 'de', 'es', 'fr', 'id', 'ja', 'ko', 'pt', 'ru', 'th', 'vi'),
    ),
    'instinwild-en': _alpaca('wyj123456/instinwild', subsets=('subset',)),
    'instinwild-zh': _alpaca('wyj123456/instinwild', not_named=('subset',)),
    'cot-en': _alpaca('YorickHe/CoT'),
    'cot-zh': _alpaca('YorickHe/CoT_zh'),
    'firefly-all-zh': HubDataset(
        id='wyj123456/firefly',
        moved=('AI-ModelScope/firefly-train-1.1M',),
        hf_id='YeungNLP/firefly-train-1.1M',
        columns=('kind', 'input', 'target'),
        to_row=of_kinds('kind', _FIREFLY_KINDS, pair('input', 'target')),
        drops='another kind, or no input or target',
        concatenated=True,
    ),
    'instruct-en': _pairs('wyj123456/instruct', 'prompt', 'completion'),
    'gpt4all-en': _alpaca('wyj123456/GPT4all'),
    'sharegpt-en': _sharegpt('common-en', 'computer-en'),
    'sharegpt-zh': _sharegpt('common-zh', 'computer-zh', 'unknow-zh'),
    'damo-agent-zh': _agent('plugin_name|name'),
    'damo-agent-mini-zh': _agent('plugin_name'),
    'code-en': _alpaca('wyj123456/code_alpaca_en', 'sahil2801/CodeAlpaca-20k'),
    'code-python-zh': HubDataset(
        id='codefuse-ai/CodeExercise-Python-27k',
        columns=('chat_rounds',),
        to_row=two_rounds('chat_rounds'),
        drops='not exactly two turns',
    ),
    'leetcode-python-en': HubDataset(
        id='AI-ModelScope/leetcode-solutions-python',
        columns=('code_with_problem', 'explanation_only'),
        to_row=leetcode,
        drops='not exactly one block of Python',
    ),
    'medical-en': replace(
        _MEDICAL,
        subsets=('en',),
        columns=('input', 'output'),
        to_row=pair('input', 'output'),
        drops='no input or no output',
    ),
    'medical-zh': _MEDICAL,
    'medical-mini-zh': replace(_MEDICAL, take=100_000),
    'lawyer-llama-zh': HubDataset(
        id='AI-ModelScope/lawyer_llama_data',
        hf_id='Skepsun/lawyer_llama_data',
        columns=('history', *ALPACA),
        to_row=without_history('history', pair('instruction', 'output')),
        drops='a history, or no output',
    ),
    'tigerbot-law-zh': HubDataset(
        id='AI-ModelScope/tigerbot-law-plugin',
        hf_id='TigerResearch/tigerbot-law-plugin',
        columns=('type', 'title', 'content'),
        to_row=law_text,
        drops='no content',
    ),
    'blossom-math-zh': HubDataset(
        id='AI-ModelScope/blossom-math-v2',
        hf_id='Azure99/blossom-math-v2',
        columns=('input', 'output', 'answer'),
        to_row=with_answer('input', 'output', 'answer'),
        drops='no input or no output',
    ),
    'school-math-zh': _alpaca('AI-ModelScope/school_math_0.25M', 'BelleGroup/school_math_0.25M'),
    'text2sql-en': _alpaca('AI-ModelScope/texttosqlv2_25000_v2', 'Clinton/texttosqlv2_25000_v2'),
    'sql-create-context-en': _alpaca(
        'AI-ModelScope/sql-create-context',
        'b-mc2/sql-create-context',
        columns=('question', 'context', 'answer'),
        to_row=alpaca('question', 'context', 'answer'),
    ),
    'advertise-gen-zh': HubDataset(
        id='lvjianjin/AdvertiseGen',
        hf_id='shibing624/AdvertiseGen',
        columns=('content', 'summary'),
        val=('validation',),
        to_row=advertise,
        drops='no content or no summary',
    ),
    'dureader-robust-zh': HubDataset(
        id='modelscope/DuReader_robust-QG',
        columns=('text1', 'text2'),
        train=('train', 'validation'),
        val=('test',),
        to_row=ask_question,
        drops='no [SEP] between answer and context, or no question',
    ),
    'cmnli-zh': HubDataset(
        id='modelscope/clue',
        hf_id='clue',
        subsets=('cmnli',),
        columns=('sentence1', 'sentence2', 'label'),
        train=('train', 'validation'),
        val=('test',),
        to_row=classify(
            '自然语言推理', {'sentence1': '句子一', 'sentence2': '句子二'}, ('neutral', 'entailment', 'contradiction')
        ),
        drops='no label',
    ),
    'jd-zh': HubDataset(
        id='DAMO_NLP/jd',
        columns=('sentence', 'label'),
        val=('validation',),
        to_row=classify('情感分类', {'sentence': '句子'}, ('negative', 'positive')),
        drops='no label',
    ),
    'finance-en': _alpaca('wyj123456/finance_en', 'ssbuild/alpaca_finance_en'),
    'poetry-zh': HubDataset(
        id='modelscope/chinese-poetry-collection',
        columns=('text1',),
        val=('test',),
        to_row=always_ask('写诗', 'text1'),
        drops='no poem',
    ),
    # Made for seqgpt-560m, as the next.
    'cls-fudan-news-zh': _pairs('damo/zh_cls_fudan-news', 'prompt', 'answer'),
    'ner-jave-zh': _pairs('damo/zh_ner-JAVE', 'prompt', 'answer'),
    'coco-en': HubDataset(
        id='modelscope/coco_2014_caption',
        columns=('image', 'caption'),
        val=('validation',),
        to_row=caption,
        drops='no image or no caption',
        image='image',
    ),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One word of --dataset: a registered name or the path of a data file, and how many rows to draw from it."""

    name: str
    sample: int | None
    path: Path | None


@dataclass(kw_only=True)
class Rows:
    """What was read: the rows of both parts, and every row left out with its place and reason."""

    train: list[Row] = field(default_factory=list)
    val: list[Row] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    # Of each data set of a hub: which hub, id and revision served.
    served: dict[str, str] = field(default_factory=dict)


def parse_source(word: str) -> Source:
    """Return what a word of --dataset names; raises ConfigError with the closest names. Reads no file."""
    name, mark, count = word.rpartition('#')
    if not mark:
        name, count = word, ''
    if mark and not (count.isdigit() and int(count) > 0):
        raise ConfigError(f"--dataset '{word}': after # comes how many rows to draw, 1 or more, got '{count}'.")
    sample = int(count) if mark else None
    if name in DATASET_MAPPING:
        return Source(name=name, sample=sample, path=None)
    if name.lower().endswith(SUFFIXES):
        return Source(name=name, sample=sample, path=Path(name))
    if '/' in name or '.' in name:
        raise ConfigError(f"--dataset '{name}' is neither registered nor a {', '.join(SUFFIXES)} file.")
    raise ConfigError(
        f"dataset '{name}' is not registered{did_you_mean(name, DATASET_MAPPING)} "
        f'Give a {", ".join(SUFFIXES)} file, or add an entry to DATASET_MAPPING in utils/dataset.py.'
    )


def check_source(source: Source) -> str | None:
    """Return what keeps a data file from being opened, or None."""
    if source.path is None:
        return None
    if not source.path.is_file():
        kind = 'a folder' if source.path.is_dir() else 'not there'
        return f'data file {source.path} is {kind} (looked in {source.path.absolute().parent}).'
    return None


def _placed(name: str, rows: RawRows, left_out: list[tuple[str, str]]) -> Iterator[PlacedRow]:
    if isinstance(rows, RowStream):
        for place, plain in rows.placed():
            if plain is None:
                left_out.append((place, f'dropped by {name}: {rows.entry.drops}'))
            else:
                yield place, plain
        return
    for number, row in enumerate(rows, start=1):
        yield f'{name}: row {number}', dict(row)


def _convert(
    placed: Iterable[PlacedRow], *, name: str, left_out: list[tuple[str, str]], folder: str | None = None
) -> list[Row]:
    """Return the rows as conversations; the shape is found from the first row's columns."""
    converter: Converter | None = None
    needed: frozenset[str] = frozenset()
    rows: list[Row] = []
    for place, raw in placed:
        if converter is None:
            converter = find_converter(raw)
            if converter is None:
                raise ConfigError(
                    f'{place}: columns {", ".join(map(str, raw))} are no known shape. Known: {KNOWN_SHAPES}. '
                    f"Rename the columns of '{name}', or register a function in DATASET_MAPPING in utils/dataset.py."
                )
            needed = frozenset(raw)
        try:
            if find_converter(raw) is not converter:
                raise BadRow(f'columns are missing that the first row has: {", ".join(sorted(needed - set(raw)))}')
            row = check_row(converter(raw))
        except BadRow as problem:
            left_out.append((place, str(problem)))
            continue
        row.origin, row.folder = place, folder
        rows.append(row)
    return rows


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return `count` rows drawn from all of them, in their order; all where there are not more."""
    if count < 0 or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def _split(rows: list[Row], test_ratio: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (train, validation); at least one row on each side where the ratio is above 0 and there are two."""
    count = min(max(1, round(len(rows) * test_ratio)), len(rows) - 1) if test_ratio > 0 else 0
    chosen = set(random.Random(seed).sample(range(len(rows)), max(count, 0)))
    return [r for i, r in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _read(source: Source, result: Rows, hub: HubName) -> tuple[list[Row], list[Row] | None]:
    if source.path is not None:
        folder = str(source.path.absolute().parent)
        return _convert(read_rows(source.path), name=source.name, left_out=result.left_out, folder=folder), None
    entry = DATASET_MAPPING[source.name]
    train: RawRows
    val: RawRows | None = None
    if isinstance(entry, HubDataset):
        train, val, result.served[source.name] = entry.load(hub)
        logger.info(f'{source.name}: {result.served[source.name]}')
    else:
        loaded = entry()
        train, val = loaded if isinstance(loaded, tuple) else (loaded, None)

    def convert(name: str, rows: RawRows) -> list[Row]:
        return _convert(_placed(name, rows, result.left_out), name=source.name, left_out=result.left_out)

    return convert(source.name, train), convert(f'{source.name} (validation)', val) if val is not None else None


def get_dataset(
    words: Sequence[str],
    *,
    seed: int = 42,
    test_ratio: float = 0.01,
    train_sample: int = -1,
    hub: HubName = 'modelscope',
) -> Rows:
    """Return the rows of all data sets: each sampled (#n) and split by itself, then joined, then drawn from.

    The validation part is capped to max(1, train_sample * test_ratio). Raises ConfigError for what cannot be read and
    where no row is left.
    """
    result = Rows()
    for word in words:
        source = parse_source(word)
        train, val = _read(source, result, hub)
        if source.sample is not None:
            train = draw(train, source.sample, seed)
        if val is None:
            train, val = _split(train, test_ratio, seed)
        result.train += train
        result.val += val
    if not result.train:
        reasons = sorted({reason for _, reason in result.left_out})
        raise ConfigError(
            f'no training row is left of {", ".join(words)}: '
            f'{len(result.left_out)} rows left out ({"; ".join(reasons)}).'
        )
    if train_sample >= 0:
        result.train = draw(result.train, train_sample, seed)
        result.val = draw(result.val, max(1, int(train_sample * test_ratio)), seed)
    return result

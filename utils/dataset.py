"""Data sets: the registry. How they are read stands in utils/data/parts.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from utils.formats import demo_sql
from utils.formats.converters import (
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
from utils.formats.hub_dataset import HubDataset

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

"""Scores answers against labels (--score): ROUGE and BLEU, exact match, equal JSON, or a function of the user."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from statistics import fmean
from typing import Any, NoReturn

from utils.base.errors import ConfigError, error_text
from utils.cli.scores import OwnScore, own_score
from utils.formats.conversation import Row

_CHINESE = re.compile(r'[\u3400-\u9fff]')
_WORD = re.compile(r'\w+|[^\w\s]')

ByRow = list[dict[str, float]]


class WordTokenizer:
    """Splits text into lower-case words, for ROUGE and BLEU. Text with Chinese characters is split by jieba.

    The default tokenizer of rouge_score is not used, because it drops Chinese characters.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words and punctuation marks of a text."""
        if not _CHINESE.search(text):
            return _WORD.findall(text.lower())
        import logging

        import jieba

        jieba.setLogLevel(logging.WARNING)
        return [word for word in jieba.cut(text.lower()) if word.strip()]


def _bleu_4(answer: list[str], label: list[str]) -> float:
    """Return the sentence BLEU score over n-grams of up to 4 words, from 0 to 1.

    If the answer or the label has fewer than 4 words, n-grams longer than the shorter text are not used.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    order = min(4, len(answer), len(label))
    if order == 0:
        return 0.0
    weights = [1 / order] * order
    return float(sentence_bleu([label], answer, weights=weights, smoothing_function=SmoothingFunction().method3))


def rouge(answers: Sequence[str], labels: Sequence[str]) -> ByRow:
    """Return a list with a dict for each pair of answer and label: its ROUGE and BLEU scores, from 0 to 100.

    The keys of a dict are rouge-1, rouge-2, rouge-l (F1) and bleu-4. If both texts of a pair have fewer than two
    words, rouge-2 has the value of rouge-1, because ROUGE-2 needs two words.
    """
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = WordTokenizer()
    scorer = RougeScorer(['rouge1', 'rouge2', 'rougeL'], tokenizer=tokenizer)
    found = []
    for answer, label in zip(answers, labels, strict=True):
        score = scorer.score(label, answer)
        words = tokenizer.tokenize(answer), tokenizer.tokenize(label)
        rouge_2 = 'rouge1' if max(map(len, words)) < 2 else 'rouge2'
        found.append(
            {
                'rouge-1': 100 * score['rouge1'].fmeasure,
                'rouge-2': 100 * score[rouge_2].fmeasure,
                'rouge-l': 100 * score['rougeL'].fmeasure,
                'bleu-4': 100 * _bleu_4(*words),
            }
        )
    return found


def exact(answers: Sequence[str], labels: Sequence[str]) -> ByRow:
    """Return a list with {'exact': score} for each pair of answer and label.

    The score is 100 if both texts are equal without the white space around them, else 0.
    """
    return [{'exact': 100.0 * (a.strip() == b.strip())} for a, b in zip(answers, labels, strict=True)]


def equal_json(answers: Sequence[str], labels: Sequence[str]) -> ByRow:
    """Return a list with a dict for each pair of answer and label: three scores, each 100 or 0.

    `json` is 100 if both texts are JSON and have the same value. The order of keys and the spelling of numbers do not
    matter (1 equals 1.0). The order of list items matters. `json-broken` is 100 if the answer is not JSON, and
    `json-label-broken` is 100 if the label is not JSON.
    """
    found = []
    for answer, label in zip(answers, labels, strict=True):
        got = _parsed(answer)
        wanted = _parsed(label)
        found.append(
            {
                'json': 100.0 * (got is not None and got == wanted),
                'json-broken': 100.0 * (got is None),
                'json-label-broken': 100.0 * (wanted is None),
            }
        )
    return found


def _parsed(text: str) -> tuple[Any, ...] | None:
    """Return the value of a JSON text, converted by `_comparable`. Returns None if the text is not JSON."""
    try:
        return _comparable(json.loads(text, parse_constant=_refuse_constant))
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is not JSON')


def _comparable(value: Any) -> tuple[Any, ...]:
    """Return the JSON value with each value inside it replaced by a pair (kind, value).

    Without the kind, the JSON values true and 1 would be equal, because True == 1 in Python.
    """
    if isinstance(value, dict):
        return 'object', {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return 'list', [_comparable(item) for item in value]
    if isinstance(value, bool) or value is None:
        return 'constant', value
    return ('text', value) if isinstance(value, str) else ('number', value)


class Function:
    """A scoring function in a Python file of the user. The file is executed when this object is made."""

    def __init__(self, word: str, own: OwnScore) -> None:
        self.word = word
        self.file = own.file.resolve()
        self.name = own.function
        self._call = self._load()
        # The keys of the first row, and where this row came from. All rows must have the same keys.
        self._keys: tuple[str, ...] | None = None
        self._first = ''

    def _load(self) -> Callable[..., Any]:
        """Execute the file, and return the function.

        Raises ConfigError if the file fails, or if it has no function of this name with three parameters.
        """
        spec = importlib.util.spec_from_file_location(f'assay_score_{self.file.stem}', self.file)
        assert spec is not None and spec.loader is not None, 'the name of the file ends with .py'
        module = importlib.util.module_from_spec(spec)
        if str(self.file.parent) not in sys.path:
            sys.path.append(str(self.file.parent))  # the file may import its neighbours, as a script may
        writes_bytecode = sys.dont_write_bytecode
        sys.dont_write_bytecode = True
        sys.modules[module.__name__] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(
                f'--score {self.word}: {self._location(error)} failed when it was loaded: {error_text(error)}. '
                'Correct the file.'
            ) from error
        finally:
            sys.dont_write_bytecode = writes_bytecode

        function = getattr(module, self.name, None)
        try:
            inspect.signature(function).bind('', '', {})  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"--score {self.word}: '{self.name}' cannot be called with (answer, label, row): {error}. "
                'Define it as a function with these three parameters.'
            ) from error
        return function  # type: ignore[return-value]

    def _location(self, error: Exception) -> str:
        """Return the location of an error: 'file:line' if its traceback has a line in the user's file, else 'file'."""
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self.file)]
        return f'{self.file}:{lines[-1]}' if lines else str(self.file)

    def __call__(self, answer: str, label: str, row: Row) -> dict[str, float]:
        """Return the scores of a row by name.

        Raises ConfigError if the function fails, if it returns anything but finite numbers, or if it returns other
        names than for the first row.

        If the function returns a number, the score has the name of the function. If the function returns a dict, each
        value gets the name <function>-<key>. The first value is also returned under the name of the function.

        The function gets three arguments: `answer`, `label`, and a copy of the row in the data as {column: value}.
        """
        try:
            result = self._call(answer, label, copy.deepcopy(dict(row.written)))
        except Exception as error:
            raise ConfigError(
                f'--score {self.word}: the function failed for {row.origin}: {error_text(error)} '
                f'({self._location(error)}). Correct the function.'
            ) from error

        values = dict(result) if isinstance(result, Mapping) else {'': result}
        if not values or not all(isinstance(key, str) and _is_number(value) for key, value in values.items()):
            raise ConfigError(
                f'--score {self.word}: the function returned {_shortened(result)} for {row.origin}. Return a finite '
                'number, or a dict from names to finite numbers.'
            )
        self._check_keys(tuple(values), row)
        first = {self.name: float(next(iter(values.values())))}
        return first | {f'{self.name}-{key}': float(value) for key, value in values.items() if key}

    def _check_keys(self, keys: tuple[str, ...], row: Row) -> None:
        if self._keys is None:
            self._keys = keys
            self._first = row.origin
        if keys != self._keys:
            raise ConfigError(
                f'--score {self.word}: the function returned {_listed(keys)} for {row.origin}, and '
                f'{_listed(self._keys)} for {self._first}. Return the same names in the same order for every row.'
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _shortened(value: Any) -> str:
    text = ' '.join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + '...'


def _listed(keys: Sequence[str]) -> str:
    return ', '.join(keys) if any(keys) else 'a number'


class Scores:
    """The scores in the order of --score. Creating the object loads the files of the user's functions."""

    def __init__(self, words: Sequence[str]) -> None:
        self.built_in = {'rouge': rouge, 'exact': exact, 'json': equal_json}
        self.words = list(words)
        self.functions = {word: Function(word, own) for word in words if (own := own_score(word)) is not None}

    def by_row(self, answers: Sequence[str], labels: Sequence[str], rows: Sequence[Row] = ()) -> ByRow:
        """Return a list with a dict for each answer. The dict maps the name of each score to its value.

        `rows` are needed only if a score is a function in a file of the user.
        """
        answers = [answer.strip() for answer in answers]
        labels = [label.strip() for label in labels]
        found: ByRow = [{} for _ in answers]
        for word in self.words:
            if word in self.functions:
                function = self.functions[word]
                scored = [function(*texts) for texts in zip(answers, labels, rows, strict=True)]
            else:
                scored = self.built_in[word](answers, labels)
            for scores, new in zip(found, scored, strict=True):
                scores.update(new)
        return found


def means(by_row: ByRow) -> dict[str, float]:
    """Return the mean of each score over all rows, rounded to 4 decimals. `by_row` has at least one row."""
    return {name: round(fmean(scores[name] for scores in by_row), 4) for name in by_row[0]}

"""Computes ROUGE and BLEU scores of answers against labels, from 0 to 100."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

_CHINESE = re.compile(r'[\u3400-\u9fff]')
_WORD = re.compile(r'\w+|[^\w\s]')


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


def score_texts(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Return the mean scores over all pairs of answer and label, from 0 to 100.

    The keys are rouge-1, rouge-2, rouge-l (F1) and bleu-4. If both texts of a pair have fewer than two words, ROUGE-1
    is used for ROUGE-2, because ROUGE-2 needs two words.
    """
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = WordTokenizer()
    scorer = RougeScorer(['rouge1', 'rouge2', 'rougeL'], tokenizer=tokenizer)
    pairs = list(zip(answers, labels, strict=True))
    scores = [scorer.score(label, answer) for answer, label in pairs]
    words = [(tokenizer.tokenize(answer), tokenizer.tokenize(label)) for answer, label in pairs]
    rouge_2 = ['rouge1' if max(map(len, pair)) < 2 else 'rouge2' for pair in words]

    means = {
        'rouge-1': fmean(score['rouge1'].fmeasure for score in scores),
        'rouge-2': fmean(score[key].fmeasure for score, key in zip(scores, rouge_2, strict=True)),
        'rouge-l': fmean(score['rougeL'].fmeasure for score in scores),
        'bleu-4': fmean(_bleu_4(answer, label) for answer, label in words),
    }
    return {name: round(100 * value, 4) for name, value in means.items()}

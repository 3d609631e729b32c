"""Scores and curves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pictures import REAL_DRAW
from utils.infer.scores import Scores, WordTokenizer, means
from utils.run import curves


def score_texts(answers: list[str], labels: list[str]) -> dict[str, float]:
    return means(Scores(['rouge']).by_row(answers, labels))


@pytest.mark.parametrize(
    'text', ['今天天气很好，我们去公园散步吧。', 'the cat sat on the mat', '好', 'Paris', '答案是 42。']
)
def test_a_perfect_answer_scores_100(text: str) -> None:
    assert score_texts([text], [text]) == {
        'rouge-1': 100.0,
        'rouge-2': 100.0,
        'rouge-l': 100.0,
        'bleu-4': 100.0,
    }


def test_scores_are_what_is_computed_by_hand() -> None:
    scores = score_texts(['the cat sat', 'x'], ['the cat ran', 'y'])
    # ROUGE-1 2/3, ROUGE-2 1/2, ROUGE-L 2/3 for the first pair, 0 for the second.
    assert scores['rouge-1'] == pytest.approx(100 / 3, abs=1e-3)
    assert scores['rouge-2'] == pytest.approx(25.0)
    assert scores['rouge-l'] == pytest.approx(100 / 3, abs=1e-3)
    assert 0 < scores['bleu-4'] < 50


@pytest.mark.parametrize(
    ('answer', 'label', 'expected'),
    [('Paris', 'Paris', 100.0), ('Paris', 'Rome', 0.0), ('Paris', 'Paris now', 0.0), ('', 'Paris', 0.0), ('', '', 0.0)],
)
def test_rouge_2_of_a_word_is_that_of_words(answer: str, label: str, expected: float) -> None:
    assert score_texts([answer], [label])['rouge-2'] == expected


def test_chinese_is_cut_into_words() -> None:
    assert WordTokenizer().tokenize('我爱北京天安门') == ['我', '爱', '北京', '天安门']
    scores = score_texts(['我爱北京'], ['我爱上海'])
    assert 0 < scores['rouge-1'] < 100


def test_empty_answers_score_nothing() -> None:
    assert set(score_texts([''], ['a b c']).values()) == {0.0}


def test_curves_are_drawn_for_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, 'draw', REAL_DRAW)
    history = [{'step': i, 'loss': 2.0 / i, 'learning_rate': 0.1} for i in range(1, 30)]
    history += [{'step': 29, 'eval_loss': float('nan')}]
    drawn = curves.plot_curves(history, tmp_path / 'images')
    assert [path.name for path in drawn] == ['loss.png', 'learning_rate.png']
    assert all(path.read_bytes().startswith(b'\x89PNG') and path.stat().st_size > 5000 for path in drawn)

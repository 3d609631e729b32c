"""Guesses the encoding of text that is not UTF-8, for error messages."""

from __future__ import annotations

import re
from collections.abc import Callable

# The number of bytes from which an encoding is guessed.
_SAMPLE_BYTES = 1 << 16
_HIGH = re.compile(rb'[\x80-\xff]+')
# Letters of Western languages in Windows-1252, and Russian words in Windows-1251.
_LETTERS = re.compile(rb'[\xc0-\xff]+')
_WORDS = re.compile(rb'[\xa8\xb8\xc0-\xff]{2,}')
# Russian texts have words of at least this many letters. Western words do not have so many accented letters in a row.
_LONG_WORD = 4
# With a lower score, no encoding fits, and the most frequent one is guessed.
_LEAST_SCORE = 0.3
# Quotes, dashes, the euro sign and other common marks in Windows-1252.
_MARKS = re.compile(rb'[\x80\x82\x84\x85\x91-\x97\x99\xa0\xa1\xa3\xa7\xa9\xab\xae\xb0\xb4\xb7\xbb\xbf]')
# A shorter text is not enough to tell Korean from Chinese: both use the same bytes.
_LEAST_KOREAN = 4


def _share(data: bytes, encoding: str, is_usual: Callable[[str, bytes], bool]) -> float:
    """Return the fraction of the characters beyond ASCII that are usual in texts with this encoding.

    `is_usual` is called with each such character and its bytes. Returns 0 if all characters are ASCII.
    """
    text = data.decode(encoding, 'replace')
    others = [character for character in text if not character.isascii()]
    usual = sum(character != '\ufffd' and is_usual(character, character.encode(encoding)) for character in others)
    return usual / max(len(others), 1)


def _western(data: bytes) -> float:
    """Return the share of bytes above 0x7F that are punctuation marks or single accented letters in Windows-1252.

    A letter is single if the letters on both sides of it have no accent. Western texts have a high share, because few
    Western words have two accented letters side by side.
    """
    single = sum(len(run) == 1 for run in _LETTERS.findall(data))
    return (single + len(_MARKS.findall(data))) / max(sum(map(len, _HIGH.findall(data))), 1)


def _cyrillic(data: bytes) -> float:
    """Return the share of bytes above 0x7F that belong to words of mostly lower-case Russian letters.

    Returns 0 if no word has at least _LONG_WORD letters.
    """
    words = _WORDS.findall(data)
    if max(map(len, words), default=0) < _LONG_WORD:
        return 0.0
    small = [word for word in words if 2 * sum(map(0xDF.__lt__, word)) >= len(word)]
    return sum(map(len, small)) / max(sum(map(len, _HIGH.findall(data))), 1)


def _korean(data: bytes) -> float:
    """Return the share of the characters beyond ASCII that are Korean syllables in CP949.

    Returns 0 if `data` has too few bytes above 0x7F.
    """
    if sum(map(len, _HIGH.findall(data))) < 2 * _LEAST_KOREAN:
        return 0.0
    return _share(data, 'cp949', lambda character, _: '\uac00' <= character <= '\ud7a3')


def _is_kana(character: str, _: bytes) -> bool:
    return '\u3040' <= character <= '\u30ff'


# (name for iconv, score). The score is a share: how much of the data is usual text of that encoding. The first
# encoding with the highest score is the guess.
_SCORES: tuple[tuple[str, Callable[[bytes], float]], ...] = (
    ('WINDOWS-1252', _western),
    ('WINDOWS-1251', _cyrillic),
    # A third of a Japanese text is kana. Chinese texts have none.
    ('SHIFT_JIS', lambda data: 3 * _share(data, 'cp932', _is_kana)),
    ('EUC-JP', lambda data: 3 * _share(data, 'euc_jp', _is_kana)),
    ('CP949', _korean),
    # The common Chinese characters have these first bytes.
    ('GB18030', lambda data: _share(data, 'gb18030', lambda _, two: 0xB0 <= two[0] <= 0xD7 and two[1] >= 0xA1)),
    ('BIG5', lambda data: _share(data, 'big5', lambda _, two: 0xA4 <= two[0] <= 0xC6)),
)


def guess_encoding(data: bytes) -> str:
    """Return the likely encoding of `data`, by its name in iconv. `data` starts with the byte that is not UTF-8."""
    sample = data[:_SAMPLE_BYTES]
    scores = {name: min(score(sample), 1.0) for name, score in _SCORES}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] > _LEAST_SCORE else 'WINDOWS-1252'

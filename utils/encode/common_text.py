"""Compares two renderings of a chat: how far they are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.encode.guarded_tokenizer import TextTokenizer

# The maximum number of characters of an added token that a template prints.
_LONGEST_TAG = 64


def common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return the length of the common prefix of two sequences."""
    if left == right[: len(left)]:
        return len(left)
    unlike = (index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(unlike, min(len(left), len(right)))


def common_length_of_renderings(tokenizer: TextTokenizer, prompt: str, full: str) -> int:
    """Return the length of the common prefix of two texts. It never ends inside a control token or think tag."""
    common = common_length(prompt, full)
    for text in (prompt, full):
        for match in tokenizer.find_all(text[max(common - _LONGEST_TAG, 0) : common + _LONGEST_TAG]):
            start = max(common - _LONGEST_TAG, 0) + match.start()
            if start < common < start + len(match[0]):
                common = start
    return common


def repeated_header(tokenizer: TextTokenizer, prompt_end: str, reply_start: str) -> int:
    """Return the length of the turn header at the end of `prompt_end` that `reply_start` begins with, or 0.

    Example: repeated_header('Answer briefly.<|bot|>', '<|bot|>Hello') -> 7, the length of '<|bot|>'
    """
    # Command R+ prints an instruction before the header of the generation prompt, but not before that of a reply.
    headers = (match.start() for match in tokenizer.find_controls(prompt_end))
    return next((len(prompt_end) - at for at in headers if reply_start.startswith(prompt_end[at:])), 0)

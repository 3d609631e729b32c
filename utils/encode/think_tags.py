"""Patterns for the tags around reasoning, and the functions that read think blocks."""

from __future__ import annotations

import re

from utils.encode.guarded_tokenizer import CLOSE_TAG, OPEN_TAG

OPEN_THINK = re.compile(rf'({OPEN_TAG})\s*$')
CLOSED_THINK = re.compile(rf'(?:{CLOSE_TAG})\s*$')
BEGINS_CLOSING = re.compile(rf'\s*(?:{CLOSE_TAG})')
BEGINS_THINKING = re.compile(rf'\s*({OPEN_TAG})\s*')
EMPTY_BLOCK = re.compile(rf'\s*(?:{OPEN_TAG})\s*(?:{CLOSE_TAG})')
# If the prompt opens the think block of a reply, the closing tag is at the end or at the beginning of a line.
_CLOSES_LINE = re.compile(rf'(?:{CLOSE_TAG})[ \t]*(?:\n|$)|\n(?:{CLOSE_TAG})')
ANY_THINK_TAG = re.compile(f'{OPEN_TAG}|{CLOSE_TAG}')
OPENING_TAG = re.compile(OPEN_TAG)


def closing_tag(opening: str) -> str:
    """Return the closing tag that belongs to an opening tag, e.g. '</think>' for '<think>'."""
    if opening == '<|START_THINKING|>':
        return '<|END_THINKING|>'
    return f'{opening[0]}/{opening[1:]}'


def has_think_block(content: str, *, opened: bool) -> bool:
    """Return whether a reply begins with a think block, e.g. '<think>reasoning</think>answer'.

    If the prompt already ends in the opening tag (`opened`), a reply with only the closing tag has a block too, if this
    tag is at the beginning or at the end of a line.
    """
    own = BEGINS_THINKING.match(content)
    if own:
        return closing_tag(own[1]) in content[own.end() :]
    return opened and len(ANY_THINK_TAG.findall(content)) == 1 and _CLOSES_LINE.search(content) is not None

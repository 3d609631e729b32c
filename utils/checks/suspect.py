"""Signs of a defect that a row shows by itself: damaged text, control tokens, empty replies, a wrong order of roles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.formats.columns import KNOWN_COLUMNS
from utils.formats.conversation import Message, Row

EMPTY_EARLIER = 'empty earlier reply'
MOJIBAKE = 'mojibake: UTF-8 that was read as another encoding'

_TEXT_COLUMNS = tuple(column for column in KNOWN_COLUMNS if column != 'images')
_CONTROL = re.compile(r'<\|[A-Za-z_]{2,}\|>')
# The second and later bytes of a UTF-8 character are 80 to BF. _LATER matches the characters that these bytes are in
# Latin-1 and in Windows-1252.
_LATER = '[\x80-\xbf' + bytes(i for i in range(0x80, 0xA0) if i not in b'\x81\x8d\x8f\x90\x9d').decode('cp1252') + ']'
_MOJIBAKE = re.compile(f'[ÂÃ]{_LATER}|(?:[ÐÑ]{_LATER}){{2}}|[à-ï]{_LATER}{{2}}|ð{_LATER}{{3}}|\ufffd|锟斤拷|烫烫烫')
# The role of the previous turn ('' at the start), and the roles that may follow it.
_MAY_FOLLOW = {'': ('user',), 'user': ('assistant',), 'assistant': ('user', 'tool'), 'tool': ('assistant', 'tool')}


def text_columns(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (column, text) for each column of a row that a conversation can be read from, without the images.

    A list or an object is yielded as JSON text. Empty columns are left out.
    """
    for column in _TEXT_COLUMNS:
        value = raw.get(column)
        if value:
            yield column, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def is_mojibake(text: str) -> bool:
    """Return whether a text seems to have UTF-8 characters that were read as another encoding, such as `Ã©` for `é`."""
    return _MOJIBAKE.search(text) is not None


def has_control_word(text: str) -> bool:
    """Return whether a text has a word that looks like a control token, for example `<|im_end|>`."""
    return _CONTROL.search(text) is not None


def wrong_order(messages: Sequence[Message]) -> str | None:
    """Return a text that says what is wrong with the order of the roles. Returns None if the order is correct."""
    turns = messages[1:] if messages[0]['role'] == 'system' else messages
    before = ''
    called = False
    for turn in turns:
        role = turn['role']
        if role not in _MAY_FOLLOW[before]:
            return f'wrong role order: {role} ' + (f'after {before}' if before else 'at the start')
        if role == 'tool' and before == 'assistant' and not called:
            return 'wrong role order: tool without a call before it'
        before = role
        called = 'tool_calls' in turn
    return None


def has_empty_earlier_reply(row: Row) -> bool:
    """Return whether a reply before the last message has no content and calls no tool."""
    earlier = (m for m in row.messages[:-1] if m['role'] == 'assistant' and 'tool_calls' not in m)
    return any(not message['content'].strip() for message in earlier)

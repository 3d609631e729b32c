"""Finds rows and prompts that occur more than once in the data of a run."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.data.parts import TRAIN, UNUSED, VAL
from utils.formats.conversation import Message, Row
from utils.formats.json_text import json_as_written


class SeenRow(NamedTuple):
    """The facts about a row that `Seen` stores.

    `place` is the location of the row, and `use` is TRAIN, VAL or UNUSED. `can_copy` says whether a row with this
    content can be written to the file of --write_clean.
    """

    place: str
    use: int
    can_copy: bool


class Seen:
    """Finds rows and prompts that occurred earlier. A file stores their hashes and locations, to save memory.

    Of several equal rows only one is stored: the first training row, else the first validation row, else the first
    unused row. So a validation row that equals a training row is always found, in whatever order the rows come.
    """

    def __init__(self, file: Path) -> None:
        self._database = sqlite3.connect(file, isolation_level=None)
        for statement in ('pragma journal_mode=off', 'pragma synchronous=off', 'begin', 'create table seen '
                          '(hash integer primary key, place text, use integer, can_copy integer)'):  # fmt: skip
            self._database.execute(statement)

    def find_earlier(self, content: str, row: SeenRow) -> SeenRow | None:
        """Return the stored row that has the same content as `row`. If there is none, store `row` and return None.

        `content` is the content of `row`, or of its prompt alone, as text.

        The call may change the stored row, but returns its old values. The stored `place` and `use` become those of
        `row` if `row` has the higher priority: TRAIN before VAL before UNUSED. The stored `can_copy` becomes True if
        `row.can_copy` is True.
        """
        digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, 'big', signed=True)
        is_new = self._database.execute('insert or ignore into seen values (?, ?, ?, ?)', (key, *row)).rowcount
        if is_new:
            return None

        find = 'select place, use, can_copy from seen where hash = ?'
        earlier = SeenRow(*self._database.execute(find, (key,)).fetchone())
        by_priority = (UNUSED, VAL, TRAIN)
        if by_priority.index(row.use) > by_priority.index(earlier.use):
            self._database.execute('update seen set place = ?, use = ? where hash = ?', (row.place, row.use, key))
        if row.can_copy and not earlier.can_copy:
            self._database.execute('update seen set can_copy = 1 where hash = ?', (key,))
        return earlier


def content_of(messages: Sequence[Message], row: Row) -> str:
    """Return the content of a row as text: `messages`, tools and images. Rows with the same content have the same text.

    `messages` are all messages of the row, or all except the reply.
    """
    has_images = bool(row.images) or any('</img>' in message['content'] for message in messages)
    content = [messages, row.tools, row.images, row.folder if has_images else None]
    has_numbers = bool(row.tools) or any('tool_calls' in message for message in messages)
    return (json_as_written if has_numbers else json.dumps)(content, sort_keys=True)

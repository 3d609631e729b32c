"""Checks whether a conversation can be used for training, and notes what is unusual about it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

from utils.formats.conversation import BadRow, Message, Row

EMPTY_REPLY = 'an empty earlier reply: it never carries loss'
EMPTY_QUESTION = 'an empty question'
SAME_ROLE_TWICE = {'user': 'a user turn after a user turn', 'assistant': 'an assistant turn after an assistant turn'}
NO_LOSS_REQUESTED = 'a reply carries no loss because the row says so (`weight`, `loss` or `train`)'
NO_USER_TURN = 'a reply directly after the system text, without a user turn'


def _turn_notes(messages: Sequence[Message]) -> Iterable[str]:
    """Yield a note for each unusual property of the turns. A row with such notes is still used."""
    turns = [message for message in messages if message['role'] != 'system']
    if len(turns) < len(messages) and turns[0]['role'] == 'assistant':
        yield NO_USER_TURN
    if any(turn.get('loss') is False for turn in turns):
        yield NO_LOSS_REQUESTED
    if any(turn['role'] == 'user' and not turn['content'].strip() for turn in turns):
        yield EMPTY_QUESTION

    earlier = (turn for turn in turns[:-1] if turn['role'] == 'assistant')
    if any(not turn['content'].strip() and not turn.keys() & {'tool_calls', 'reasoning'} for turn in earlier):
        yield EMPTY_REPLY

    for before, turn in itertools.pairwise(turns):
        if turn['role'] == before['role'] and turn['role'] in SAME_ROLE_TWICE:
            yield SAME_ROLE_TWICE[turn['role']]


def _texts(row: Row) -> Iterable[str]:
    for message in row.messages:
        yield from (message['content'], message.get('reasoning', ''))
        yield from (message.get('name', ''), message.get('tool_call_id', ''))
    yield from row.images
    if row.tools or any('tool_calls' in message for message in row.messages):
        calls = [message.get('tool_calls') for message in row.messages]
        yield json.dumps([calls, row.tools], ensure_ascii=False, default=str)


def check_row(row: Row) -> Row:
    """Return the row. For each unusual property of its turns, such as an empty question, `row.notes` gets a note.

    Raises BadRow if the row cannot be used for training, for example if its last turn is not a reply.
    """
    try:
        ''.join(_texts(row)).encode()
    except UnicodeEncodeError:  # JSON text can contain half of a character: "\ud83d"
        raise BadRow('a text is not UTF-8, or holds half of a character (a lone surrogate)') from None

    if row.is_text:
        if not row.messages[0]['content'].strip():
            raise BadRow('empty text', 'text')
        return row

    last = row.messages[-1]
    if last['role'] != 'assistant':
        raise BadRow(f"the last turn is the {last['role']}'s, so there is no reply to train on")
    if not last['content'].strip() and 'tool_calls' not in last:
        raise BadRow('empty response')
    if any(message['role'] == 'system' for message in row.messages[1:]):
        raise BadRow('a system turn that is not the first')
    if len(row.messages) < 2:
        raise BadRow('a reply without a question')

    row.notes = tuple(dict.fromkeys([*row.notes, *_turn_notes(row.messages)]))
    return row

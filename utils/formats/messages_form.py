"""Makes rows with the column `messages` (or `text`) from conversations, and writes a row as a line of JSON.

When such a line is read, it gives the same conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.formats.columns import PAIRS, find_converter
from utils.formats.conversation import Message, Row
from utils.formats.images import BadImage, ImageFiles, is_untagged, map_tags, place_image
from utils.formats.json_text import JsonParser, json_as_written

_COLUMN = 'column `'
_KEY = 'message key `'


@dataclass(kw_only=True)
class MessagesForm:
    """A row that is ready to be written to a new data file, and the names of columns and keys that it lacks.

    `row` has the conversation in the column `messages`, or plain text in the column `text`. `not_copied` names the
    columns of the source row, and the keys of its messages, that are not in `row`.
    """

    row: dict[str, Any]
    not_copied: list[str] = field(default_factory=list)


def messages_form(row: Row, folder: Path, *, marks_loss: bool, sees_images: bool) -> MessagesForm:
    """Return `row` as it is written to a new data file in `folder`, with its conversation in the column `messages`.

    If `row` is plain text, the new row has the column `text` instead of `messages`. Unused columns and keys of the
    source row are copied, if JSON can represent them and the format of the row stays the same. The paths of images are
    changed so that they are right in `folder`.

    The key `loss` of each message is copied. If `marks_loss` is True and `row.loss_scope` is 'last_round', each
    reply before the last message gets `"loss": false`, unless the reply has the key `loss`. If `sees_images` is False,
    the model uses no images, and a column with {bytes, path} cells is not copied.
    """
    made = MessagesForm(row={})
    made.not_copied += [name for name in row.unused if not name.startswith((_COLUMN, _KEY))]
    if row.is_text:
        made.row['text'] = row.messages[0]['content']
        _copy_columns(row, made)
        return made

    # Without a mark, every reply in the column `messages` carries loss.
    is_marked = marks_loss and row.loss_scope == 'last_round'
    messages = [_message(message, row, folder) for message in row.messages]
    for message in messages[:-1]:
        if is_marked and message['role'] == 'assistant':
            message.setdefault('loss', False)
    _copy_keys(row, messages, made)
    made.row['messages'] = messages
    if row.tools:
        made.row['tools'] = row.tools
    if isinstance(row.images, ImageFiles) and not sees_images:
        made.not_copied.append(f'{_COLUMN}{row.images.column}`')
    elif row.images:
        made.row['images'] = [_moved(path, row.folder, folder) for path in row.images]
        if is_untagged(row):  # only images of an image column need no tags
            first = next(message for message in messages if message['role'] == 'user')
            first['content'] = '<img></img>' * len(row.images) + first['content']
    _copy_columns(row, made)
    return made


def _message(message: Message, row: Row, folder: Path) -> dict[str, Any]:
    """Return a message as a dictionary with the keys that the reader of data files expects."""
    made: dict[str, Any] = {'role': message['role'], 'content': message['content']}
    if message['role'] == 'user':
        made['content'] = map_tags(message['content'], lambda path: _moved(path, row.folder, folder))
    if 'reasoning' in message:
        made['reasoning_content'] = message['reasoning']
    if 'tool_calls' in message:
        made['tool_calls'] = message['tool_calls']
    if 'name' in message:
        made['name'] = message['name']
    if 'tool_call_id' in message:
        made['tool_call_id'] = message['tool_call_id']
    if 'loss' in message:
        made['loss'] = message['loss']
    return made


def _moved(path: str, source: str | None, target: Path) -> str:
    """Return the path of an image for a new data file in the folder `target`.

    `path` is the path of the image in the original data file, which is in the folder `source`. If `source` and `target`
    are the same, `path` is returned unchanged. Otherwise, if the image is inside `target`, the result is a relative
    path, else an absolute path. A path that cannot be used, such as a URL, is returned unchanged.
    """
    if not path or source == str(target):
        return path
    try:
        place = Path(place_image(path, source)).absolute()
    except BadImage:
        return path
    return str(place.relative_to(target)) if place.is_relative_to(target) else str(place)


def _copy_keys(row: Row, messages: list[dict[str, Any]], made: MessagesForm) -> None:
    """Copy unused keys from each turn of the source row to the message that was made from this turn.

    A key that cannot be copied is added to `made.not_copied`.
    """
    names = _names(row.unused, _KEY)
    for turn, message in _written_turns(row, messages) if names else ():
        for key in names:
            if key not in turn:
                continue
            if key not in message and _is_json(turn[key]):
                message[key] = turn[key]
            else:
                made.not_copied.append(f'{_KEY}{key}`')


def _written_turns(row: Row, messages: list[dict[str, Any]]) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Yield each turn of the source row, with the message that was made from this turn.

    Turns that are plain text, and so have no keys, are skipped.
    """
    column = next((name for name in ('messages', 'conversations') if name in row.written), None)
    pair = next((names for names in PAIRS if row.written.keys() >= set(names)), ())
    turns: list[Any] = []
    for cell in (row.written[name] for name in ((column,) if column else pair)):
        value = JsonParser().parse(cell) if isinstance(cell, str) and column else cell
        turns += value if isinstance(value, list) else [value]
    # A system column or a history has made messages that no turn has.
    for turn, message in zip(turns, messages[len(messages) - len(turns) :], strict=True):
        if isinstance(turn, Mapping):
            yield turn, message


def _copy_columns(row: Row, made: MessagesForm) -> None:
    """Copy the unused columns of a row to `made.row`.

    A column is not copied if `made.row` would then be read as another format, if `made.row` already has a column of
    this name, or if JSON cannot represent its value. The name of such a column is added to `made.not_copied`.
    """
    for name in _names(row.unused, _COLUMN):
        value = row.written[name]
        is_read_the_same = find_converter([*made.row, name]) is find_converter(made.row)
        if is_read_the_same and name not in made.row and _is_json(value):
            made.row[name] = value
        else:
            made.not_copied.append(f'{_COLUMN}{name}`')


def _names(unused: tuple[str, ...], start: str) -> list[str]:
    return [entry.removeprefix(start).removesuffix('`') for entry in unused if entry.startswith(start)]


def _text_of(value: Any) -> str:
    """Return a value that JSON cannot represent, such as a date, as text. Raises TypeError for bytes."""
    if isinstance(value, bytes | bytearray):
        raise TypeError('bytes are not text')
    return str(value)


def _is_json(value: Any) -> bool:
    try:
        json_as_written(value, default=_text_of, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as one line of JSON in UTF-8. Numbers have the spelling of the source. A date becomes text.

    Raises TypeError if the row contains bytes, and ValueError if it contains NaN or Infinity.
    """
    # Half of a character (a lone surrogate) is written as an escape, which JSON allows.
    return json_as_written(row, default=_text_of, allow_nan=False).encode('utf-8', 'backslashreplace') + b'\n'

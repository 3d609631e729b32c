"""Writes the prompt of a row as the request that a client of the OpenAI API sends."""

from __future__ import annotations

import base64
import copy
import json
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.encode.encoded import RowRefused
from utils.formats.conversation import Message, Row
from utils.formats.json_text import json_as_written
from utils.loading.template_settings import parse_settings
from utils.preprocess import AUTO

if TYPE_CHECKING:
    from utils.encode.encoder import Encoder

_ROLES = ('system', 'developer', 'user', 'assistant', 'tool')

IS_TEXT = 'plain text, which has no form in the chat API'
NO_QUESTION = 'no turn before the reply'
CUT = 'the prompt is longer than --max_length'
OTHER_ROLE = 'a role that the chat API does not have'
OTHER_TOOL = 'a tool that is not a function of the chat API'
LOST = 'the chat API has no place for a part of the prompt (reasoning, spelling of numbers, missing ids of calls)'


class NotSayable(Exception):
    """The prompt of a row cannot be written as a request. The text of the error is the reason in the report."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row, the token ids of its prompt, and the request for it.

    `paths` has the paths of the images in the prompt.
    """

    row: Row
    ids: list[int]
    request: Mapping[str, Any]
    paths: tuple[str, ...] = ()


def question_of(row: Row, encoder: Encoder) -> Question:
    """Return the row, the ids of its prompt, and the request for the prompt.

    Raises NotSayable if the row is plain text, if its prompt is longer than --max_length, or if no request makes a
    server arrive at exactly these ids.
    """
    if row.is_text:
        raise NotSayable(IS_TEXT)
    uncut = copy.copy(encoder)
    uncut.max_length = -1
    ids = uncut.encode_prompts([row])[0]
    if 0 < encoder.max_length < len(ids):
        raise NotSayable(CUT)

    messages = [dict(message) for message in row.messages[:-1]]
    if not messages:
        raise NotSayable(NO_QUESTION)
    if encoder.name == AUTO and encoder.system is not None and messages[0]['role'] != 'system':
        messages.insert(0, {'role': 'system', 'content': encoder.system})
    request: dict[str, Any] = {'messages': _in_api(messages)}
    if row.tools:
        request['tools'] = [_tool(tool) for tool in row.tools]
    request |= _thinking_keys(row, request, uncut, ids)

    shown, found = encoder.open_images(row)
    paths = tuple(path for path, _ in found)
    if paths:
        _add_images(request['messages'], shown, encoder.text.image, paths)
    return Question(row=row, ids=ids, request=request, paths=paths)


def _in_api(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the keys of the API. A call without an id gets an id, and its result gets the same id.

    Raises NotSayable if the API does not have the role of a message.
    """
    made = []
    unanswered: list[str] = []
    for number, message in enumerate(messages):
        if message['role'] not in _ROLES:
            raise NotSayable(OTHER_ROLE)
        said = {'role': message['role'], 'content': message['content']}
        if 'name' in message:
            said['name'] = message['name']
        if 'tool_calls' in message:
            said['tool_calls'] = [_call(call, f'call_{number}_{n}') for n, call in enumerate(message['tool_calls'])]
            unanswered = [call['id'] for call in said['tool_calls']]
        if message['role'] == 'tool':
            answered = unanswered.pop(0) if unanswered else f'call_{number}'
            said['tool_call_id'] = message.get('tool_call_id', answered)
        made.append(said)
    return made


def _call(call: Mapping[str, Any], made_id: str) -> dict[str, Any]:
    function = call['function']
    arguments = function['arguments']
    text = arguments if isinstance(arguments, str) else json_as_written(arguments)
    return {'id': call.get('id') or made_id, 'type': 'function', 'function': {**function, 'arguments': text}}


def _tool(tool: Any) -> Any:
    """Return a copy of the tool in which all numbers are int or float, as in JSON that a server has parsed.

    The number 1.10 in a row keeps its last digit 0, and a server drops this digit. Raises NotSayable if the tool has no
    object with the key `function`.
    """
    if not isinstance(tool, Mapping) or not isinstance(tool.get('function'), Mapping):
        raise NotSayable(OTHER_TOOL)
    return json.loads(json_as_written(tool))


def _thinking_keys(row: Row, request: Mapping[str, Any], encoder: Encoder, ids: list[int]) -> dict[str, Any]:
    """Return the keys that `request` needs to turn on thinking, or {} if it needs none.

    With the right keys, a server turns the request into `ids`, the token ids of the prompt. The encoder shows what a
    server would do: it encodes the request without keys first, and then with keys. Raises NotSayable if neither gives
    `ids`.
    """
    asked = replace(row, messages=[*_read_back(request['messages']), _unknown()], tools=request.get('tools'))
    for thinks in (False, True):
        asking = copy.copy(encoder)
        asking.asks_to_think = thinks
        try:
            is_same = asking.encode_prompts([asked])[0] == ids
        except RowRefused:
            is_same = False
        if is_same:
            return {'chat_template_kwargs': parse_settings([asking.switch])} if thinks and asking.switch else {}
    raise NotSayable(LOST)


def _unknown() -> Message:
    return Message(role='assistant', content='')


def _read_back(messages: Sequence[Mapping[str, Any]]) -> Iterator[Message]:
    """Yield the messages of a request as a server reads them, with the arguments of calls parsed."""
    for message in messages:
        read = Message(**message)  # type: ignore[typeddict-item]
        if 'tool_calls' in read:
            read['tool_calls'] = [{**call, 'function': _parsed(call['function'])} for call in read['tool_calls']]
        yield read


def _parsed(function: Mapping[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function['arguments'])
    except ValueError:
        arguments = None
    return {**function, 'arguments': arguments if isinstance(arguments, dict) else function['arguments']}


def _add_images(messages: list[dict[str, Any]], row: Row, mark: str, paths: Sequence[str]) -> None:
    """Add the images to the user turns in `messages`.

    The content of a user turn with images becomes a list of parts. A part is a text or an image (a data URL). The texts
    of `row` contain `mark` in the place of each image. `paths` has the paths of these images in the same order.
    """
    left = iter(paths)
    turns = iter(turn['content'] for turn in row.messages if turn['role'] == 'user')
    for message in messages:
        if message['role'] != 'user':
            continue
        first, *others = next(turns).split(mark)
        parts: list[dict[str, Any]] = [_text_part(first)] if first else []
        for text in others:
            parts.append({'type': 'image_url', 'image_url': {'url': _data_url(Path(next(left)))}})
            parts += [_text_part(text)] if text else []
        if others:
            message['content'] = parts


def _text_part(text: str) -> dict[str, Any]:
    return {'type': 'text', 'text': text}


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or 'image/png'
    return f'data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}'

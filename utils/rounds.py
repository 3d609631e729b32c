"""Where earlier replies stand in the ids of a chat template's rows, for loss on all rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from utils.preprocess import EARLIER_CHANGED, Encoded, Message, Row

Chats = list[tuple[list[Message], list[Any] | None]]


class EndOfTurn(NamedTuple):
    """What a template prints after a reply, the ids that end a row, and how many of those carry loss."""

    text: str
    ids: list[int]
    trained: int


def add_earlier(
    rows: Sequence[Row],
    encoded: Sequence[Encoded],
    prepare: Callable[[Row, Sequence[Message]], tuple[list[Message], list[Any] | None, bool, list[str]]],
    render: Callable[..., list[str]],
    tokenize: Callable[[Sequence[tuple[str, bool]]], list[list[int]]],
    *,
    lead: str,
    end: EndOfTurn,
) -> None:
    """Add the spans of earlier replies to encoded rows.

    The chat up to a reply, with the `lead` that the template prints before one, and the chat that ends with it are
    rendered and tokenised as inference would. Both must be how the row's ids begin: a reply for which they are not
    carries no loss, and its row is noted.
    """
    printed = tokenize([(end.text, False)])[0] if end.text else []
    untrained = len(end.ids) - end.trained if printed == end.ids else len(printed)
    chats: Chats = []
    found: list[tuple[Encoded, bool]] = []
    for row, row_ids in zip(rows, encoded, strict=True):
        messages, tools, guarded, _ = prepare(row, row.messages[:-1])
        for index, message in enumerate(messages):
            if message['role'] == 'assistant':
                chats.append((messages[: index + 1], tools))
                found.append((row_ids, guarded))
    prompts = [text + lead for text in render([(messages[:-1], tools) for messages, tools in chats], prompt=True)]
    wholes = render(chats, prompt=False)
    prompt_ids, whole_ids = (
        tokenize([(text, guarded) for text, (_, guarded) in zip(texts, found, strict=True)])
        for texts in (prompts, wholes)
    )
    for (row_ids, _), (messages, _), prompt, whole, before, ids in zip(
        found, chats, prompts, wholes, prompt_ids, whole_ids, strict=True
    ):
        span = (len(before), len(ids) - untrained)
        if (
            _says(whole, prompt, messages[-1], end.text)
            and ids[: span[0]] == before
            and ids[len(ids) - len(printed) :] == printed
            and row_ids.input_ids[: span[1]] == ids[: span[1]]
        ):
            row_ids.earlier.append(span)
        elif EARLIER_CHANGED not in row_ids.notes:
            row_ids.notes = [*row_ids.notes, EARLIER_CHANGED]


def _says(whole: str, prompt: str, reply: Message, end: str) -> bool:
    """Return whether a rendering is the prompt, the reply as it was said, blanks around it aside, and the end."""
    text = whole[len(prompt) : len(whole) - len(end)]
    return whole == prompt + text + end and ('tool_calls' in reply or text.strip() == reply['content'].strip())

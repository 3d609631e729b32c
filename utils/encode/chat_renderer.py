"""Renders chats with the chat template of a tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from utils.base.errors import error_text
from utils.encode.encoded import RowRefused
from utils.formats.conversation import Message
from utils.formats.json_text import Spelling

NO_SETTINGS: Mapping[str, Any] = {}


class Chat(NamedTuple):
    """The input of one rendering: messages as the template expects them, tools, and the settings of the template."""

    messages: list[Message]
    tools: Sequence[Any] | None
    settings: Mapping[str, Any]


class ChatRenderer:
    """Renders chats with the chat template of a tokenizer. The numbers in tools and calls keep their spelling."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def apply(self, chats: list[Any], tools: Sequence[Any] | None, prompt: bool, settings: Mapping[str, Any]) -> Any:
        """Return the rendering of a chat (a list of messages), or a list of renderings for a list of chats.

        Raises RowRefused if the template refuses a chat, or fails.
        """
        from jinja2.exceptions import TemplateError

        # Only tools and calls contain numbers. A template prints them with a JSON writer.
        spelling = Spelling()
        if tools or _have_calls(chats):
            chats, tools = spelling.hide(chats), spelling.hide(tools)
        try:
            render = self.tokenizer.apply_chat_template
            text = render(chats, tools=tools or None, add_generation_prompt=prompt, tokenize=False, **settings)
        except TemplateError as error:
            raise RowRefused(f'the chat template refuses it: {error}') from error
        except Exception as error:  # a template is a program and can fail with any error
            raise RowRefused(f'the chat template fails: {error_text(error)}') from error
        return spelling.show(str(text)) if not isinstance(text, list) else [spelling.show(one) for one in text]

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False,
        settings: Mapping[str, Any] = NO_SETTINGS,
    ) -> str:  # fmt: skip
        """Return the rendering of one chat. Raises RowRefused as `apply` does."""
        return str(self.apply(list(messages), tools, prompt, settings))

    def try_render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **options: Any) -> str:
        """Return the rendering of a chat, or '' if the template refuses the chat or fails."""
        try:
            return self.render(messages, tools, **options)
        except RowRefused:
            return ''

    def render_all(self, chats: Sequence[Chat], *, prompt: bool) -> list[str]:
        """Return the rendering of each chat. If `prompt` is True, each rendering ends with the generation prompt.

        Chats without tools and settings share one call, which is faster. Raises RowRefused if the template refuses one
        of the chats, or fails.
        """
        plain = [list(chat.messages) for chat in chats if not (chat.tools or chat.settings)]
        texts = iter(self.apply(plain, None, prompt, NO_SETTINGS) if plain else [])
        return [
            self.render(chat.messages, chat.tools, prompt=prompt, settings=chat.settings)
            if chat.tools or chat.settings
            else next(texts)
            for chat in chats
        ]


def _have_calls(chats: Sequence[Any]) -> bool:
    """Return whether a message has tool calls. `chats` is a list of chats, or the messages of one chat."""
    messages = itertools.chain.from_iterable(chat if isinstance(chat, list) else (chat,) for chat in chats)
    return any('tool_calls' in message for message in messages)

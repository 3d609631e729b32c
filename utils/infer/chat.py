"""Runs a chat in the terminal."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.encode.encoded import RowRefused
from utils.encode.encoder import Encoder
from utils.formats.conversation import Message, Row
from utils.infer.generation import generate_stream
from utils.preprocess import TEMPLATE_MAPPING

if TYPE_CHECKING:
    from transformers import GenerationConfig

HELP = (
    '/clear starts a new conversation, /system TEXT sets the system prompt, /exit or Ctrl-D leaves, '
    'Ctrl-C stops a reply'
)

# A function that takes the ids of a prompt and the paths of its images, shows the reply, and returns the reply's text.
Answer = Callable[[list[int], Sequence[str]], str]


class Chat:
    """A conversation with a model: keeps the messages so far, and handles each new line that the user types."""

    def __init__(self, encoder: Encoder, answer: Answer, say: Callable[[str], None]) -> None:
        template = TEMPLATE_MAPPING[encoder.name]
        self.keeps_history = template is None or template.chat_sep is not None
        self.encoder = encoder
        self.answer = answer
        self.say = say
        self.limit = encoder.max_length
        # An encoder without a length limit, because the chat shortens a long prompt itself: it drops the oldest turns.
        self._uncut = copy.copy(encoder)
        self._uncut.max_length = -1
        self.system: str | None = None
        self.turns: list[Message] = []

    def handle(self, line: str) -> bool:
        """Carry out a command, or answer a question. Return False if the line ends the chat, else True."""
        command, _, rest = line.strip().partition(' ')
        if command == '/exit':
            return False
        if command == '/clear':
            self.turns = []
            self.say('(conversation cleared)\n')
        elif command == '/system':
            self.system = rest.strip() or None
            self.turns = []
            done = 'set' if self.system is not None else 'removed'
            self.say(f'(system prompt {done}, conversation cleared)\n')
        elif command.startswith('/') and ' ' not in line.strip() and command[1:].isalpha():
            self.say(f'({command}: unknown command. {HELP})\n')
        elif line.strip():
            self._reply(line)
        return True

    def _row(self, query: str) -> Row:
        system = [Message(role='system', content=self.system)] if self.system is not None else []
        question = Message(role='user', content=query)
        # The empty reply is needed because encode_prompts drops the last message of a row.
        return Row(messages=[*system, *self.turns, question, Message(role='assistant', content='')], origin='chat')

    def _prompt(self, query: str) -> list[int]:
        """Return the token ids of the prompt: the conversation so far and the query.

        If the prompt is longer than --max_length, the oldest turns are dropped. Raises RowRefused if the query is too
        long even without earlier turns.
        """
        prompt = self._uncut.encode_prompts([self._row(query)])[0]
        turns = self.turns
        dropped = 0
        try:
            while 0 < self.limit < len(prompt) and self.turns:
                self.turns = self.turns[2:]
                dropped += 1
                prompt = self._uncut.encode_prompts([self._row(query)])[0]
            if 0 < self.limit < len(prompt):
                raise RowRefused(
                    f'--max_length {self.limit}: this line has {len(prompt)} tokens with the template and the system '
                    'prompt. Shorten it, or give a larger --max_length'
                )
        except RowRefused:
            self.turns = turns
            raise

        if dropped:
            self.say(
                f'(--max_length {self.limit} is reached: the oldest {dropped} of {len(turns) // 2} questions were '
                'dropped with their replies)\n'
            )
        return prompt

    def _reply(self, query: str) -> None:
        try:
            prompt = self._prompt(query)
            text = self.answer(prompt, self.encoder.image_paths(self._row(query)))
        except (ConfigError, RowRefused) as error:
            self.say(f'({error})\n')
            return
        self.say('\n')
        if self.keeps_history:
            turns = [Message(role='user', content=query), Message(role='assistant', content=text)]
            self.turns = [*self.turns, *turns]


def chat_in_terminal(chat: Chat) -> None:
    """Read lines from the terminal and handle them, until /exit or Ctrl-D."""
    chat.say(f'{HELP}\n')
    if chat.encoder.images is not None:
        chat.say('(<img>path</img> in a line shows an image)\n')
    if not chat.keeps_history:
        chat.say(f"(template '{chat.encoder.name}' is single-turn: each line starts a new conversation)\n")
    while True:
        try:
            line = input('you> ')
            line.encode()  # raises UnicodeError under a C locale, where bytes that are not ASCII become lone surrogates
        except EOFError:
            chat.say('\n')
            return
        except KeyboardInterrupt:
            chat.say('\n(Ctrl-D or /exit leaves)\n')
            continue
        except UnicodeError:
            chat.say('(this line is not UTF-8. Set the terminal to UTF-8)\n')
            continue
        if not chat.handle(line):
            return


def chat(model: Any, tokenizer: Any, encoder: Encoder, config: GenerationConfig, *, streams: bool) -> None:
    """Chat in the terminal until the user leaves. Raises ConfigError if the encoder has no template.

    With `streams`, an answer is printed while it is generated. Otherwise an answer is printed when it is complete.
    """
    encoder.check_chat()

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def answer(prompt: list[int], paths: Sequence[str]) -> str:
        show = say if streams else lambda part: None
        text = generate_stream(model, tokenizer, prompt, config, show, images=encoder.images, paths=paths)
        if not streams:
            say(text)
        return text

    chat_in_terminal(Chat(encoder, answer, say))

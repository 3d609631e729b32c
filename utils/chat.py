"""A chat in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from utils.encoder import Encoder
from utils.errors import ConfigError
from utils.preprocess import TEMPLATE_MAPPING, Message, Row, RowRefused

HELP = (
    '/clear forgets the conversation, /system TEXT sets the system prompt, /exit or Ctrl-D leaves, Ctrl-C stops a reply'
)

# Answers a prompt's ids and the files of its images, and shows the text as it comes, or at once.
Answer = Callable[[list[int], Sequence[str]], str]


class Chat:
    """A conversation: what was said, and what to do with the next line."""

    def __init__(self, encoder: Encoder, answer: Answer, say: Callable[[str], None]) -> None:
        template = TEMPLATE_MAPPING[encoder.name]
        self.keeps_history = template is None or template.chat_sep is not None
        self.encoder, self.answer, self.say = encoder, answer, say
        self.system: str | None = None
        self.turns: list[Message] = []

    def handle(self, line: str) -> bool:
        """Act on one line; returns False when it leaves the chat."""
        command, _, rest = line.strip().partition(' ')
        if command == '/exit':
            return False
        if command == '/clear':
            self.turns = []
            self.say('(conversation cleared)\n')
        elif command == '/system':
            self.system, self.turns = rest.strip() or None, []
            self.say('(system prompt set, conversation cleared)\n')
        elif command.startswith('/') and ' ' not in line.strip() and command[1:].isalpha():
            self.say(f'({command} is not known: {HELP})\n')
        elif line.strip():
            self._reply(line)
        return True

    def _reply(self, query: str) -> None:
        turns = [*self.turns, Message(role='user', content=query)]
        system = [Message(role='system', content=self.system)] if self.system is not None else []
        # The encoder drops the last message, which in a training row is the reply.
        row = Row(messages=[*system, *turns, Message(role='assistant', content='')], origin='chat')
        try:
            text = self.answer(self.encoder.encode_prompts([row])[0], self.encoder.image_paths(row))
        except (ConfigError, RowRefused) as error:
            self.say(f'({error})\n')
            return
        self.say('\n')
        if self.keeps_history:
            self.turns = [*turns, Message(role='assistant', content=text)]


def chat_in_terminal(chat: Chat) -> None:
    """Read lines until /exit or Ctrl-D."""
    chat.say(f'{HELP}\n')
    if chat.encoder.images is not None:
        chat.say('(<img>path</img> in a line shows an image)\n')
    if not chat.keeps_history:
        chat.say(f"(template '{chat.encoder.name}' is single-turn: each line is a conversation of its own)\n")
    while True:
        try:
            line = input('you> ')
            line.encode()  # a C locale lets other bytes through, as halves of characters
        except EOFError:
            chat.say('\n')
            return
        except KeyboardInterrupt:
            chat.say('\n(Ctrl-D or /exit leaves)\n')
            continue
        except UnicodeError:
            chat.say('(this line is not UTF-8: have the terminal write that)\n')
            continue
        if not chat.handle(line):
            return

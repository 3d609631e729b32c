"""Writes a chat template as a template of Ollama, and the Modelfile of a model.

Ollama does not run the chat template in a GGUF file. Its own templates are in the language of Go's text/template.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError

from utils.formats.conversation import Row

# A function that returns the prompt for messages, as the chat template renders it.
Render = Callable[[Sequence[Mapping[str, str]]], str]
# Without a PARAMETER line, Ollama cuts a conversation to this number of tokens.
_OLLAMA_CONTEXT = 4096
_QUOTES = '"""'


class NotExpressible(ValueError):
    """The chat template cannot be written as a template of Ollama. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The fixed texts that a chat template prints around the messages of a conversation.

    A prompt without a system message begins with `opening`. A prompt with a system message begins with `before_system`,
    the message and `after_system`. Each earlier reply is between `before_reply` and `after_reply`. The prompt ends with
    `before_answer`. `before_system` is None if the template has no place for a system message.
    """

    opening: str
    before_reply: str
    after_reply: str
    before_answer: str
    before_system: str | None = None
    after_system: str = ''

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt for messages, as Ollama renders it with `go_template`."""
        texts = [self.opening]
        if messages[0]['role'] == 'system' and self.before_system is not None:
            texts = [self.before_system, messages[0]['content'], self.after_system]

        turns = [message for message in messages if message['role'] != 'system']
        for number, turn in enumerate(turns):
            if turn['role'] == 'assistant':
                texts += [self.before_reply, turn['content']]
            else:
                texts += [self.after_reply if number else '', turn['content']]
        return ''.join([*texts, self.before_answer])

    def without_bos(self, bos: str) -> Turns:
        """Return these texts without a leading bos token, because llama.cpp adds the bos token."""
        return replace(
            self,
            opening=self.opening.removeprefix(bos),
            before_system=None if self.before_system is None else self.before_system.removeprefix(bos),
        )

    def go_template(self) -> str:
        """Return the template in the language of Ollama."""
        # `{{-` removes the line break before it, so the template can have lines. Quoted strings keep their line breaks.
        start = _print(self.opening)
        if self.before_system is not None:
            system = f'{_print(self.before_system)}{{{{ $.System }}}}{_print(self.after_system)}'
            start = f'{{{{ if $.System }}}}{system}{{{{ else }}}}{start}{{{{ end }}}}'
        return '\n'.join(
            (
                '{{- $asked := false }}{{ $role := "" }}',
                '{{- range .Messages }}',
                '{{- if eq .Role "user" }}',
                f'{{{{- if $asked }}}}{_print(self.after_reply)}{{{{ else }}}}{start}{{{{ end }}}}',
                '{{- .Content }}{{ $asked = true }}',
                f'{{{{- else if eq .Role "assistant" }}}}{_print(self.before_reply)}{{{{ .Content }}}}',
                '{{- end }}{{ $role = .Role }}',
                '{{- end }}',
                f'{{{{- if ne $role "assistant" }}}}{_print(self.before_answer)}{{{{ end }}}}',
            )
        )


def _print(text: str) -> str:
    """Return the Go template action that prints `text`, e.g. {{ "Hello" }}, or an empty text if `text` is empty.

    The text is written as a JSON string, which is also a valid Go string.
    """
    return f'{{{{ {json.dumps(text, ensure_ascii=False)} }}}}' if text else ''


def learn_turns(render: Render) -> Turns:
    """Return the fixed texts around the messages, found by rendering chats of random words with the chat template.

    Raises NotExpressible if the template refuses a chat of three rounds, if it does not print the words in the order of
    the chat, or if the texts around a message depend on its position.
    """
    words = [secrets.token_hex(8) for _ in range(6)]
    roles = ('system', 'user', 'assistant', 'user', 'assistant', 'user')
    chat = [{'role': role, 'content': word} for role, word in zip(roles, words, strict=True)]

    try:
        opening, before_reply, after_reply, *_, before_answer = _between(render, chat[1:])
    except TemplateError as error:
        raise NotExpressible(f'it refuses a chat of three rounds: {error}') from error
    turns = Turns(opening=opening, before_reply=before_reply, after_reply=after_reply, before_answer=before_answer)
    try:
        before_system, after_system, *_ = _between(render, chat)
        turns = replace(turns, before_system=before_system, after_system=after_system)
    except (NotExpressible, TemplateError):
        pass  # the template has no place for a system text in front of the first question

    first = 1 if turns.before_system is None else 0
    for start, end in itertools.product({1, first}, (2, 4, 6)):
        if render(chat[start:end]) != turns.prompt(chat[start:end]):
            raise NotExpressible('the text around a turn depends on its position')
    return turns


def _between(render: Render, chat: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the texts before, between and after the contents of a chat, as the template prints them.

    Raises NotExpressible if the template does not print each content exactly once and in order.
    """
    rest = render(chat)
    texts = []
    for message in chat:
        before, found, rest = rest.partition(message['content'])
        if not found or message['content'] in rest:
            raise NotExpressible(f'the text of the {message["role"]} is not printed exactly once and in order')
        texts.append(before)
    return [*texts, rest]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Numbers of conversations, by the result of comparing the prompt of Ollama with that of the chat template."""

    # Both templates give the same text.
    equal: int
    # Both give the same text, except that the chat template removes blanks at the ends of messages.
    stripped: int
    # Not compared: Ollama cannot print the tools, the reasoning or the order of messages, or the template refuses them.
    unlike: int

    def sentence(self) -> str:
        """Return a sentence with the counts, for the log and for proofs.json."""
        says = f'its TEMPLATE gives the text of the chat template on {self.equal} conversations'
        if self.stripped:
            says += f', on {self.stripped} more except blanks at the ends of texts, which Ollama keeps'
        if self.unlike:
            says += f'; {self.unlike} with tools, reasoning or other turns need a server that runs the chat template'
        return says


def compare_turns(turns: Turns, render: Render, rows: Sequence[Row]) -> Compared:
    """Compare two prompts for each row: from `turns`, and from the chat template (`render`). Returns the counts.

    Rows that Ollama cannot express, such as rows with tools, are counted but not compared. Raises NotExpressible if the
    two prompts of a compared row differ.
    """
    counts = {'equal': 0, 'stripped': 0, 'unlike': 0}
    for row in rows:
        messages = [{'role': turn['role'], 'content': turn['content']} for turn in row.messages[:-1]]
        counts[_judge(turns, render, row, messages)] += 1
    return Compared(**counts)


def _judge(turns: Turns, render: Render, row: Row, messages: Sequence[Mapping[str, str]]) -> str:
    """Compare two prompts for `messages`: from `turns`, and from the chat template (`render`).

    Returns 'equal' if both are the same text. Returns 'stripped' if they are the same except that the chat template
    removes blanks at the ends of messages. Returns 'unlike', without a comparison, if Ollama cannot express the row, or
    if the chat template refuses it. Raises NotExpressible if the prompts differ in another way.
    """
    if not _is_plain(row, has_system=turns.before_system is not None):
        return 'unlike'
    try:
        wanted = render(messages)
    except TemplateError:
        return 'unlike'
    if turns.prompt(messages) == wanted:
        return 'equal'

    stripped = [{**message, 'content': message['content'].strip()} for message in messages]
    if stripped != messages and turns.prompt(stripped) == wanted:
        return 'stripped'
    raise NotExpressible(f'the prompt of {row.origin} would be a different text')


def _is_plain(row: Row, *, has_system: bool) -> bool:
    """Return whether a template of Ollama can express the conversation in a row.

    Questions and replies must alternate, without tools, images, reasoning or other keys. If `has_system` is True, the
    first message can be a system message.
    """
    messages = row.messages[:-1]
    roles = [message['role'] for message in messages]
    if has_system and roles[:1] == ['system']:
        roles = roles[1:]
    alternates = all(role == ('user', 'assistant')[n % 2] for n, role in enumerate(roles)) and len(roles) % 2 == 1
    plain = all(message.keys() <= {'role', 'content', 'loss'} for message in messages)
    thinks = any('<think>' in message['content'] for message in messages)
    return alternates and plain and not thinks and not row.tools and not row.images and not row.is_text


def modelfile(
    gguf_name: str,
    *,
    template: str | None,
    system: str | None,
    stops: Sequence[str],
    config: Any,
    max_length: int,
    note: str = '',
) -> str:
    """Return the text of a Modelfile for the GGUF file `gguf_name` in the same folder.

    Without `template`, the file has no TEMPLATE, and `note` says why. `system` is the default system message. It is
    left out if a Modelfile cannot contain it (see `fits_modelfile`). `stops` are the texts at which an answer ends,
    `config` has the generation settings, and `max_length` is --max_length.
    """
    name = gguf_name.removesuffix('.gguf').lower()
    lines = [f'# ollama create {name} -f {gguf_name.removesuffix(".gguf")}.Modelfile', f'FROM ./{gguf_name}']
    lines += [f'# {line}' for line in note.splitlines()]
    if template is not None:
        lines.append(f'TEMPLATE {_QUOTES}{template}{_QUOTES}')
    if system and fits_modelfile(system):
        lines.append(f'SYSTEM {_QUOTES}{system}{_QUOTES}')
    lines += [f'PARAMETER stop {_quoted(stop)}' for stop in stops]
    lines += [f'PARAMETER {name} {value}' for name, value in _parameters(config, max_length).items()]
    return '\n'.join(lines) + '\n'


def fits_modelfile(text: str) -> bool:
    """Return whether a Modelfile can contain the text as a string in triple double quotes.

    A Modelfile has no escape for quotes. So the text must not contain triple quotes, and must not end with a quote.
    """
    return _QUOTES not in text and not text.endswith('"')


def _quoted(text: str) -> str:
    quotes = _QUOTES if '"' in text or '\n' in text else '"'
    return f'{quotes}{text}{quotes}'


def _parameters(config: Any, max_length: int) -> dict[str, Any]:
    """Return {name of a parameter of Ollama: value} for the generation settings `config` and for --max_length.

    The temperature and the repetition penalty are always included, because the defaults of Ollama differ from those of
    transformers. Without sampling, the temperature is 0.
    """
    found: dict[str, Any] = {'temperature': 0}
    if config.do_sample:
        found = {
            'temperature': 1.0 if config.temperature is None else config.temperature,
            'top_k': 50 if config.top_k is None else config.top_k,
            'top_p': 1.0 if config.top_p is None else config.top_p,
        }
    found['repeat_penalty'] = config.repetition_penalty or 1.0
    if config.max_new_tokens:
        found['num_predict'] = config.max_new_tokens
    if max_length > _OLLAMA_CONTEXT:
        found['num_ctx'] = max_length
    return found

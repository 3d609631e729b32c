"""Raw conversations of many kinds, as users write them, and real vocabularies with a template's control tokens."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

from tests.support.real_judge import MARKER, TAG, Raw

TOOLS: list[Raw] = [
    {
        'type': 'function',
        'function': {
            'name': name,
            'description': f'Gives the {what} of a place. Zebra{what}',
            'parameters': {
                'type': 'object',
                'properties': {
                    'city': {'type': 'string', 'description': 'The city.'},
                    'days': {'type': 'integer', 'description': 'How many days.'},
                },
                'required': ['city'],
            },
        },
    }
    for name, what in (('get_weather', 'weather'), ('get_traffic', 'traffic'))
]
ASKS = ('What is the sum of 7 and 3?', 'Name a colour of the sky.', 'Is it cold in Oslo today?', 'And why?')
REPLIES = ('The answer is 10.', 'Blue, mostly.', 'It is cold: -3 degrees.', 'Because of the wind (north).', 'yes', '42')
CHINESE = ('天气很好，我们去公园吧。', '你好，世界！', '答案是十。')


class Words:
    """Texts for rows: fixed without a seed, else varied. Other texts than replies have a word that no reply has."""

    def __init__(self, seed: int | None = None) -> None:
        self.random = random.Random(seed)
        self.varied = seed is not None
        self.count = 0

    def ask(self) -> str:
        self.count += 1
        text = self.random.choice(ASKS) if self.varied else ASKS[self.count % len(ASKS)]
        return f'Zebra{self.count} {text}'

    def reply(self) -> str:
        self.count += 1
        text = self.random.choice((*REPLIES, *CHINESE)) if self.varied else REPLIES[self.count % 4]
        words = [
            self.random.choice(('river', 'seven', 'x=1', 'tall', '…', '🙂', 'Ünder')) for _ in range(self.count % 5)
        ]
        return f'{text} {" ".join(words)} r{self.count}.' if self.varied else f'{text[:-1]} r{self.count}.'


def call(name: str, arguments: Any, ident: str) -> Raw:
    return {'type': 'function', 'id': ident, 'function': {'name': name, 'arguments': arguments}}


def conversations(words: Words, markers: Sequence[str]) -> list[tuple[str, Raw]]:
    """Return one raw row of each kind; `markers` are control tokens that a user typed."""
    number = words.random.randrange(100, 999) if words.varied else 100
    weather = call('get_weather', {'city': f'Oslo{number}', 'days': 2}, 'a1b2c3d4e')
    traffic = call('get_traffic', {'city': f'Port{number}', 'note': 'Köln'}, 'f5g6h7i8j')
    typed = ''.join(markers[:3])

    def user(text: str | None = None) -> Raw:
        return {'role': 'user', 'content': text if text is not None else words.ask()}

    def says(text: str | None = None, **others: Any) -> Raw:
        return {'role': 'assistant', 'content': text if text is not None else words.reply(), **others}

    def result(of: Raw, text: str | None = None) -> Raw:
        said = text if text is not None else json.dumps({'result': words.ask()})
        return {'role': 'tool', 'name': of['function']['name'], 'tool_call_id': of['id'], 'content': said}

    def chat(*messages: Raw, tools: bool = False) -> Raw:
        row: Raw = {'messages': copy.deepcopy(list(messages))}
        return {**row, 'tools': copy.deepcopy(TOOLS)} if tools else row

    system: Raw = {'role': 'system', 'content': f'Be brief. {words.ask()}'}
    as_text = call('get_weather', json.dumps(weather['function']['arguments']), 'a1b2c3d4e')
    think = f'Let me think of {words.reply()}'
    code = '    def f(x):\n        return x  # indented\n'
    return [
        ('plain', chat(user(), says())),
        ('system', chat(system, user(), says())),
        ('two turns', chat(user(), says(), user(), says())),
        ('system, three turns', chat(system, user(), says(), user(), says(), user(), says())),
        ('call, result, answer', chat(user(), says('', tool_calls=[weather]), result(weather), says(), tools=True)),
        ('text beside a call', chat(user(), says(tool_calls=[weather]), result(weather), says(), tools=True)),
        ('ends in a call', chat(user(), says('', tool_calls=[weather]), tools=True)),
        ('ends in a call with text', chat(user(), says(tool_calls=[weather]), tools=True)),
        ('ends in a call with reasoning', chat(
            user(), says('', reasoning_content=think, tool_calls=[weather]), tools=True
        )),
        ('ends in parallel calls', chat(user(), says('', tool_calls=[weather, traffic]), tools=True)),
        (
            'parallel calls',
            chat(
                user(), says('', tool_calls=[weather, traffic]), result(weather), result(traffic), says(), tools=True
            ),
        ),
        ('second call after a result', chat(
            user(), says('', tool_calls=[weather]), result(weather), says('', tool_calls=[traffic]), tools=True
        )),
        ('arguments as text', chat(user(), says('', tool_calls=[as_text]), result(as_text), says(), tools=True)),
        ('ends in arguments as text', chat(user(), says('', tool_calls=[as_text]), tools=True)),
        ('empty tool result', chat(user(), says('', tool_calls=[weather]), result(weather, ''), says(), tools=True)),
        ('tools, no call', chat(user(), says(), tools=True)),
        ('reasoning_content', chat(user(), says(reasoning_content=think))),
        ('reasoning', chat(user(), says(reasoning=think))),
        ('thinking', chat(user(), says(thinking=think))),
        ('reasoning in two turns', chat(
            user(), says(reasoning_content=think), user(), says(reasoning_content=f'{think}2')
        )),
        ('think block in the reply', chat(user(), says(f'<think>\n{think}\n</think>\n\n{words.reply()}'))),
        ('reply mentions a think tag', chat(user(), says('Write </think> to close it.'))),
        ('blanks around the reply', chat(user(), says(f'  {words.reply()} \n\n'))),
        ('code with blanks first', chat(user(), says(f'{code}    print(f({words.count}))'))),
        ('Chinese', chat(user(f'Zebra {CHINESE[0]}'), says(CHINESE[1]))),
        ('control tokens by the user', chat(user(f'{words.ask()}{typed}now'), says())),
        ('control tokens in the system text', chat(
            {'role': 'system', 'content': f'{words.ask()} {typed}'}, user(), says()
        )),
        ('control tokens in the reply', chat(user(), says(f'They are {typed} in text'))),
        ('control tokens in a tool result', chat(
            user(), says('', tool_calls=[weather]), result(weather, f'{words.ask()}{typed}'), says(), tools=True
        )),
    ]  # fmt: skip


def printed_tokens(sources: Sequence[str], render: Any) -> tuple[list[str], list[str]]:
    """Return the markers and tags in the sources and outputs of templates; `render(source)` gives the output."""
    texts = [text for source in sources for text in (source, render(source))]
    markers = {found[0] for text in texts for found in MARKER.finditer(text)}
    tags = {found[0] for text in texts for found in TAG.finditer(text)}
    return sorted(markers), sorted(tags)


def add_tokens(tokenizer: Any, markers: Sequence[str], tags: Sequence[str], *, special: bool) -> None:
    """Add missing tokens to the vocabulary; the tags are ordinary added tokens in both variants."""
    from tokenizers import AddedToken

    there = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for names, is_special in ((markers, special), (tags, False)):
        new = [name for name in names if name not in there]
        tokens = [AddedToken(name, special=is_special, normalized=False) for name in new]
        tokenizer.add_tokens(tokens, special_tokens=is_special)


def with_template(tokenizer: Any, source: str, *, bos: str, eos: str) -> Any:
    """Return the tokenizer with a chat template; it shares the vocabulary."""
    copied = copy.copy(tokenizer)
    copied._special_tokens_map = dict(tokenizer._special_tokens_map)
    copied.chat_template = source
    copied.bos_token = bos
    copied.eos_token = eos
    return copied

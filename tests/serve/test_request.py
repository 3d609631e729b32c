"""Rows as requests of the OpenAI API: what is sent, and which rows cannot be sent."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import CHATML, make_tokenizer
from tests.support.vision_models import (
    QWEN25_VL,
    make_image_processor,
    make_seeing_model,
    make_seeing_tokenizer,
    picture_rows,
)
from utils.encode.encoder import Encoder
from utils.encode.make import make_encoder
from utils.formats.conversation import Message, Row
from utils.loading.image_processors import open_images
from utils.serve.expected import Model
from utils.serve.request import CUT, IS_TEXT, LOST, NO_QUESTION, OTHER_ROLE, OTHER_TOOL, NotSayable, question_of

TOOL = {'type': 'function', 'function': {'name': 'add', 'parameters': {'type': 'object', 'properties': {'a': {}}}}}
CALLS = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}'
    '[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}<|im_end|>\n{% endfor %}'
    '{% if tools %}{{ tools | tojson }}{% endif %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def encoder_of(template: str = CALLS, **options: Any) -> Encoder:
    return make_encoder(
        make_tokenizer(chat_template=template),
        template_type='auto',
        **{'system': '', 'system_typed': False, 'max_length': -1, **options},
    )


def row_of(*messages: Message, **options: Any) -> Row:
    return Row(messages=[*messages, {'role': 'assistant', 'content': 'yes'}], origin='a.jsonl:1', **options)


def test_turns_tools_and_calls_are_sent_as_a_client_writes_them() -> None:
    row = row_of(
        {'role': 'system', 'content': 'be kind'},
        {'role': 'user', 'content': 'add 1'},
        {'role': 'assistant', 'content': '', 'loss': False,
         'tool_calls': [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}] * 2},
        {'role': 'tool', 'content': '2'},
        {'role': 'tool', 'content': '3', 'tool_call_id': 'own'},
        tools=[TOOL],
    )  # fmt: skip
    question = question_of(row, encoder_of())
    calls = [
        {'id': f'call_2_{n}', 'type': 'function', 'function': {'name': 'add', 'arguments': '{"a": 1}'}} for n in (0, 1)
    ]
    assert question.request == {
        'messages': [
            {'role': 'system', 'content': 'be kind'},
            {'role': 'user', 'content': 'add 1'},
            {'role': 'assistant', 'content': '', 'tool_calls': calls},
            {'role': 'tool', 'content': '2', 'tool_call_id': 'call_2_0'},
            {'role': 'tool', 'content': '3', 'tool_call_id': 'own'},
        ],
        'tools': [TOOL],
    }
    assert question.ids == encoder_of().encode_prompts([row])[0]


def test_a_typed_system_is_sent_and_the_default_of_a_template_is_not() -> None:
    asked: Message = {'role': 'user', 'content': 'a'}
    typed = encoder_of(system='be kind', system_typed=True)
    assert question_of(row_of(asked), typed).request['messages'] == [{'role': 'system', 'content': 'be kind'}, asked]
    own: Message = {'role': 'system', 'content': 'own'}
    assert question_of(row_of(own, asked), typed).request['messages'] == [own, asked]
    registered = make_encoder(
        make_tokenizer(), template_type='chatml', system='be kind', system_typed=False, max_length=-1
    )
    assert question_of(row_of(asked), registered).request == {'messages': [asked]}


def test_the_thinking_switch_of_a_row_is_sent() -> None:
    template = CHATML.replace("assistant\n' }}", "assistant\n' }}{{ '' if enable_thinking else '<think></think>' }}")
    asked: Message = {'role': 'user', 'content': 'a'}
    encoder = encoder_of(template)
    thinks = Row(messages=[asked, {'role': 'assistant', 'content': 'yes', 'reasoning': 'so'}])
    assert question_of(thinks, encoder).request['chat_template_kwargs'] == {'enable_thinking': True}
    assert 'chat_template_kwargs' not in question_of(row_of(asked), encoder).request


@pytest.mark.parametrize(
    ('row', 'reason'),
    [
        (Row(messages=[{'role': 'assistant', 'content': 'a'}], is_text=True), IS_TEXT),
        (row_of(), NO_QUESTION),
        (row_of({'role': 'user', 'content': 'word ' * 60}), CUT),
        (row_of({'role': 'observer', 'content': 'a'}), OTHER_ROLE),
        (row_of({'role': 'user', 'content': 'a'}, tools=[{'name': 'add'}]), OTHER_TOOL),
        (
            row_of(
                {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b', 'reasoning': 'so'},
                {'role': 'user', 'content': 'c'},
            ),
            LOST,
        ),
    ],
)  # fmt: skip
def test_a_row_that_the_api_cannot_carry_has_a_reason(row: Row, reason: str) -> None:
    template = CALLS.replace('{{ m.content }}', '{{ m.reasoning_content }}{{ m.content }}')
    with pytest.raises(NotSayable, match=re.escape(reason)):
        question_of(row, encoder_of(template, max_length=60))


def test_images_are_sent_as_data_urls_where_the_text_shows_them(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    folder = picture_rows(tmp_path / 'data').parent
    make_image_processor().save_pretrained(tmp_path)
    tokenizer = make_seeing_tokenizer(QWEN25_VL)
    seeing = make_seeing_model(QWEN25_VL, tokenizer).eval()
    images = open_images(seeing, tokenizer, tmp_path, max_pixels=None)
    encoder = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=-1, images=images)
    text = 'one <img>pictures/a.png</img><img></img>?'
    row = row_of({'role': 'user', 'content': text}, images=['pictures/b.png'], folder=str(folder))
    question = question_of(row, encoder)
    urls = [
        f'data:image/png;base64,{base64.b64encode((folder / "pictures" / name).read_bytes()).decode()}'
        for name in ('a.png', 'b.png')
    ]
    assert question.request['messages'][0]['content'] == [
        {'type': 'text', 'text': 'one '},
        *[{'type': 'image_url', 'image_url': {'url': url}} for url in urls],
        {'type': 'text', 'text': '?'},
    ]

    config = GenerationConfig(max_new_tokens=2, eos_token_id=[2], pad_token_id=5)
    model = Model(seeing, tokenizer, config, images)
    [answer] = model.answers([question], batch_size=1)
    likely = model.next_token(question).likely
    assert tokenizer.decode(answer[:1]) == max(likely, key=lambda token: likely[token])

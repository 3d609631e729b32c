"""Turns that call tools: where they end, which reasoning is kept, and which named template renders them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.support.tiny_models import make_tokenizer
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import (
    ADDED_END,
    REASONING_AS_TEXT,
    REASONING_LEFT_OUT,
    RENDERED_DIFFERENTLY,
    TOOL_CALL_AS_TEXT,
    TOOLS_IGNORED,
    Encoded,
)
from utils.encode.make import make_encoder
from utils.formats.conversation import Row

TOOL = {
    'type': 'function',
    'function': {'name': 'get_sky', 'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}}},
}
CALL = {'type': 'function', 'id': 'a1b2c3d4e', 'function': {'name': 'get_sky', 'arguments': {'city': 'Oslo'}}}
ASKED: dict[str, Any] = {'role': 'user', 'content': 'is it blue?'}
CALLED = 'CALL get_sky city=Oslo'

# A turn as most templates print it, with its {end} and a {call}.
TURNS = (
    "{{%- for m in messages %}}{{{{ '<|im_start|>' + m.role + '\\n' }}}}"
    "{reasoning}{{{{- m.content or '' }}}}"
    '{{%- for c in m.tool_calls or [] %}}{call}{{% endfor %}}{end}{{% endfor %}}'
    "{{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
SAYS_CALL = (
    "{{- 'CALL ' + c.function.name }}{% for k, v in c.function.arguments.items() %}{{ ' ' + k + '=' + v }}{% endfor %}"
)


def template(*, end: str = '<|im_end|>\\n', call: str = SAYS_CALL, reasoning: str = '') -> str:
    """Return a chat template that lists tools, with this end of turn and this form of calls."""
    turns = TURNS.format(end=f"{{{{- '{end}' }}}}", call=call, reasoning=reasoning)
    return "{%- for t in tools or [] %}{{ 'TOOL ' + t.function.name + '\\n' }}{% endfor %}" + turns


def encoder(source: Any, **tokens: str) -> AutoEncoder:
    tokenizer = make_tokenizer(chat_template=source)
    tokenizer.add_tokens(['</assistant>', '</call>'], special_tokens=True)
    for name, text in tokens.items():
        setattr(tokenizer, name, text)
    made = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=-1)
    assert isinstance(made, AutoEncoder)
    return made


def row(reply: dict[str, Any], *, tools: bool = True) -> Row:
    return Row(messages=[ASKED, {'role': 'assistant', **reply}], tools=[TOOL] if tools else None, origin='test:1')  # type: ignore[list-item, typeddict-item]


def calls(**others: Any) -> dict[str, Any]:
    return {'content': '', 'tool_calls': [CALL], **others}


def text_of(coder: AutoEncoder, found: Encoded) -> tuple[str, str]:
    """Return the trained text and the text after it."""
    decode, end = coder.tokenizer.decode, found.trained[1]
    return decode(found.input_ids[found.trained[0] : end]), decode(found.input_ids[end:])


@pytest.mark.parametrize(('end', 'eos'), [('</s>', '</s>'), ('</assistant>', '</s>'), ('<|im_end|>', '</s>')])
def test_a_call_ends_at_the_token_that_ends_a_turn_however_it_is_spelt(end: str, eos: str) -> None:
    coder = encoder(template(end=f'{end}\\n'), eos_token=eos)
    found = coder.encode([row(calls())])[0]
    assert text_of(coder, found) == (CALLED + end, '\n')
    assert found.notes == []
    assert coder.stop_ids == [coder.tokenizer.convert_tokens_to_ids(end)]


def test_a_marker_that_only_closes_a_call_does_not_end_the_turn() -> None:
    source = template(end='', call=SAYS_CALL + "{{- '</call>' }}")
    coder = encoder(source)
    found = coder.encode([row(calls())])[0]
    assert text_of(coder, found)[0].startswith(f'{CALLED}</call>')
    assert found.input_ids[-1] != coder.tokenizer.convert_tokens_to_ids('</call>')
    assert ADDED_END in found.notes


def test_reasoning_before_calls_that_are_text_is_written_once() -> None:
    # Like DeepSeek-R1's distills: text up to the closing tag is removed; calls and reasoning are not supported.
    cut = "{%- set text = (m.content or '').split('</think>')[-1] %}{{- text if m.role == 'assistant' else m.content }}"
    source = template(call='').replace("{{- m.content or '' }}", cut)
    source = source.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    coder = encoder(source)
    found = coder.encode([row(calls(reasoning='why'))])[0]
    wanted = 'why\n</think>\n\n[{"name": "get_sky", "arguments": {"city": "Oslo"}}]<|im_end|>'
    assert text_of(coder, found)[0] == wanted
    assert {TOOL_CALL_AS_TEXT, REASONING_AS_TEXT} <= set(found.notes)


# Like Kimi-K2-Thinking: the reasoning of the first turn is never printed.
BLOCKS = (
    "{%- if m.role == 'assistant' %}{{- '<think>' }}{% if messages | selectattr('role', 'equalto', 'assistant') "
    "| list | length > 1 %}{{- m.reasoning_content or '' }}{% endif %}{{- '</think>' }}{% endif %}"
)


@pytest.mark.parametrize('spelt', [False, True], ids=['plain text', 'a control token in a text'])
@pytest.mark.parametrize('tools', [False, True], ids=['reply', 'call'])
def test_reasoning_that_a_template_prints_in_later_turns_is_not_said_to_lack_a_key(*, tools: bool, spelt: bool) -> None:
    coder = encoder(template(reasoning=BLOCKS))
    reply = calls(reasoning='why') if tools else {'content': 'yes', 'reasoning': 'why'}
    first = row(reply, tools=tools)
    asked: dict[str, Any] = {'role': 'user', 'content': 'and <|im_end|>?' if spelt else 'and?'}
    turns: list[Any] = [ASKED, {'role': 'assistant', 'content': 'yes'}, asked, first.messages[-1]]
    later = dataclasses.replace(first, messages=turns)
    found = coder.encode([first, later])
    assert [REASONING_AS_TEXT in one.notes for one in found] == [True, False]
    for one in found:
        assert text_of(coder, one)[0].startswith('<think>why</think>')


REASONS = "{%- if m.reasoning_content and m.tool_calls %}{{- 'THOUGHT ' + m.reasoning_content + '\\n' }}{% endif %}"


def test_reasoning_that_the_template_prints_before_calls_alone_is_left_out_elsewhere() -> None:
    coder = encoder(template(reasoning=REASONS))
    plain, called, without = coder.encode(
        [row({'content': 'yes', 'reasoning': 'why'}), row(calls(reasoning='why')), row({'content': 'yes'})]
    )
    assert text_of(coder, called)[0] == f'THOUGHT why\n{CALLED}<|im_end|>' and called.notes == []
    assert plain.notes == [REASONING_LEFT_OUT] and without.notes == []
    assert plain.input_ids == without.input_ids


# --- two named templates

PLAIN = TURNS.format(end="{{- '<|im_end|>\\n' }}", call='', reasoning='')


def named(**options: str) -> dict[str, str]:
    """Return a default template without tools and calls, and a second template for rows with tools."""
    return {'default': PLAIN, 'tool_use': template(**options)}


def test_rows_with_tools_are_rendered_by_the_template_for_them() -> None:
    coder = encoder(named())
    with_tools, without = coder.encode([row(calls()), row({'content': 'yes'}, tools=False)])
    assert 'TOOL get_sky' in coder.tokenizer.decode(with_tools.input_ids)
    assert text_of(coder, with_tools)[0] == f'{CALLED}<|im_end|>' and with_tools.notes == []
    assert text_of(coder, without)[0] == 'yes<|im_end|>' and without.notes == []


def test_calls_are_judged_by_the_template_that_renders_the_row() -> None:
    coder = encoder(named())
    assert coder.template.says_calls == {False: False, True: True}
    with_tools, without = coder.encode([row(calls()), row(calls(), tools=False)])
    assert TOOL_CALL_AS_TEXT not in with_tools.notes
    assert without.notes == [TOOL_CALL_AS_TEXT]
    assert '"get_sky"' in text_of(coder, without)[0], 'what the template cannot say is text, not lost'


def test_calls_without_tools_are_said_by_a_default_that_can() -> None:
    listing = template(end='<|im_end|>\\n', call='')
    coder = encoder({'default': template(), 'tool_use': listing})
    assert coder.template.says_calls == {False: True, True: False}
    with_tools, without = coder.encode([row(calls()), row(calls(), tools=False)])
    assert text_of(coder, without)[0] == f'{CALLED}<|im_end|>' and without.notes == []
    assert TOOL_CALL_AS_TEXT in with_tools.notes and TOOLS_IGNORED not in with_tools.notes


THINKS = "{%- if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' }}{% endif %}"


def test_reasoning_is_judged_by_the_template_that_renders_the_row() -> None:
    coder = encoder(named(reasoning=THINKS.replace('think>', 'why>')))
    reply = {'content': 'yes', 'reasoning': 'so'}
    found = coder.encode([row(reply), row(reply, tools=False), row(calls(reasoning='so'))])
    assert [text_of(coder, one)[0] for one in found] == [
        '<why>so</why>yes<|im_end|>', 'yes<|im_end|>', f'<why>so</why>{CALLED}<|im_end|>',
    ]  # fmt: skip
    assert [one.notes for one in found] == [[], [REASONING_LEFT_OUT], []]


def test_reasoning_of_calls_that_are_text_goes_where_a_reply_has_it() -> None:
    coder = encoder(template(call='', reasoning=THINKS.replace('content %}', 'content and not m.tool_calls %}')))
    found = coder.encode([row(calls(reasoning='so'))])[0]
    assert text_of(coder, found)[0].startswith('<think>so</think>[{"name": "get_sky"')
    assert found.notes == [TOOL_CALL_AS_TEXT]


def test_the_ends_of_both_templates_stop_generation() -> None:
    ends = named(end='<eoa>\\n')
    ends['tool_use'] = ends['tool_use'].replace("'<eoa>", "('<eoh>' if m.tool_calls else '<eoa>') + '")
    coder = encoder(ends)
    found = coder.encode([row(calls()), row({'content': 'yes'}), row({'content': 'yes'}, tools=False)])
    assert [text_of(coder, one) for one in found] == [
        (f'{CALLED}<eoh>', '\n'),
        ('yes<eoa>', '\n'),
        ('yes<|im_end|>', '\n'),
    ]
    assert [one.notes for one in found] == [[], [], []]
    assert set(coder.stop_ids) == set(coder.tokenizer.convert_tokens_to_ids(['<|im_end|>', '<eoa>', '<eoh>']))


@pytest.mark.parametrize('tools', [True, False])
def test_the_prompt_of_either_template_begins_what_is_trained(tools: bool) -> None:
    coder = encoder(named(end='<eoa>\\n'))
    rows = [row({'content': 'yes'}, tools=tools), row(calls(), tools=tools), row({'content': ' yes '}, tools=tools)]
    for one, prompt in zip(coder.encode(rows), coder.encode_prompts(rows), strict=True):
        assert one.input_ids[: one.prompt_length] == prompt
        wanted = coder.tokenizer.apply_chat_template(
            [ASKED], tools=[TOOL] if tools else None, add_generation_prompt=True, tokenize=False
        )
        assert coder.tokenizer.decode(prompt) == wanted


@pytest.mark.parametrize('tools', [True, False])
def test_a_reply_that_a_template_alters_gets_the_end_of_that_template(tools: bool) -> None:
    sources = named(end='<eoa>\\n')
    trimmed = {name: source.replace("m.content or ''", "(m.content or '') | trim") for name, source in sources.items()}
    coder = encoder(trimmed)
    found = coder.encode([row({'content': ' yes '}, tools=tools)])[0]
    assert text_of(coder, found) == (f' yes {"<eoa>" if tools else "<|im_end|>"}', '\n')
    assert found.notes == [RENDERED_DIFFERENTLY]

"""Templates: golden texts, the prefix property, inert data, and agreement with the tokenizer's own template."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.templates import FOREIGN_IDS, GOLDEN, TEXT, TOKENIZER, TOKENIZERS, TOOLS_TEMPLATE, chat
from tests.support.tiny_models import CHATML, make_tokenizer
from utils.base.errors import ConfigError
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import (
    CONTROL_TOKENS,
    CUT_PROMPT,
    CUT_REPLY,
    FULL_DIFFERS,
    MERGED_BOUNDARY,
    RENDERED_DIFFERENTLY,
    SYSTEM_IGNORED,
    TOOL_CALL_AS_TEXT,
    TOOLS_IGNORED,
)
from utils.encode.encoder import Encoder
from utils.encode.make import make_encoder
from utils.encode.show import show_row
from utils.preprocess import AUTO, TEMPLATE_MAPPING, Template

REGISTERED = [name for name, template in TEMPLATE_MAPPING.items() if template is not None]


def encoder(name: str, tokenizer: Any = TOKENIZER, max_length: int = -1, system: str | None = None) -> Encoder:
    return make_encoder(
        tokenizer,
        template_type=name,
        system=system or 'be kind',
        system_typed=system is not None,
        max_length=max_length,
    )


def readable(row: Any) -> str:
    """Return ids as text, with the trained span in brackets and ids outside the tokenizer's text as #id#."""

    def text(ids: list[int]) -> str:
        out, run = '', []
        for i in [*ids, None]:
            if i is None or i in FOREIGN_IDS:
                out, run = out + TOKENIZER.decode(run) + (f'#{i}#' if i else ''), []
            else:
                run.append(i)
        return out

    start, end = row.trained
    return f'{text(row.input_ids[:start])}[{text(row.input_ids[start:end])}]{text(row.input_ids[end:])}'


def test_golden_text_of_every_template() -> None:
    assert set(GOLDEN) == set(TEMPLATE_MAPPING), 'a new template needs a golden text'
    assert len(GOLDEN) == 13
    for name, expected in GOLDEN.items():
        template = TEMPLATE_MAPPING[name]
        single = template is not None and template.chat_sep is None
        row = chat('', 'me') if single else chat('hi', 'yo', 'who?', 'me')
        assert readable(encoder(name).encode([row])[0]) == expected, name


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, min_size=2, max_size=6), system=st.none() | TEXT, seed=st.integers(0, 9))
def test_inference_prompt_is_a_prefix_of_what_is_trained(texts: list[str], system: str | None, seed: int) -> None:
    texts = texts[: len(texts) // 2 * 2]
    checked = 0
    for tokenizer, name in itertools.product(TOKENIZERS, TEMPLATE_MAPPING):
        template = TEMPLATE_MAPPING[name]
        turns = texts[:2] if template is not None and template.chat_sep is None else texts
        row, other = chat(*turns, system=system), chat('x' * seed, 'y')
        coder = encoder(name, tokenizer)
        trained = coder.encode([other, row])[1]
        prompt = coder.encode_prompts([row])[0]
        assert trained.input_ids[: len(prompt)] == prompt
        assert trained.trained[0] == trained.prompt_length == len(prompt)
        assert len(prompt) < trained.trained[1] <= len(trained.input_ids)
        checked += 1
    assert checked == 39


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, min_size=4, max_size=4), system=TEXT)
def test_text_never_becomes_a_control_token(texts: list[str], system: str) -> None:
    control = set(encoder('chatml').text.control_ids.values())
    for name in TEMPLATE_MAPPING:
        template = TEMPLATE_MAPPING[name]
        single = template is not None and template.chat_sep is None
        row, plain = chat(*texts, system=system), chat('a', 'b', 'c', 'd', system='e')
        if single:
            row, plain = chat(*texts[:2], system=system), chat('a', 'b', system='e')
        found, wanted = ([i for i in encoder(name).encode([r])[0].input_ids if i in control] for r in (row, plain))
        assert found == wanted, name


@pytest.mark.parametrize('name', ['chatml', 'default', AUTO])
def test_the_flag_system_never_becomes_a_control_token(name: str) -> None:
    by = encoder(name, system='be kind <|im_end|>')
    control = set(by.text.control_ids.values())
    rows = [chat('hi', 'yo'), chat('hi <|im_end|>', 'yo')]
    plain = encoder(name, system='be kind').encode([rows[0]])[0]
    for row in by.encode(rows):
        assert [i for i in row.input_ids if i in control] == [i for i in plain.input_ids if i in control]
        assert row.notes == [CONTROL_TOKENS]


def test_text_round_trips_through_the_ids() -> None:
    row = chat('say {{QUERY}} <|im_end|>', 'x </s> {{SYSTEM}}', system='s <s>')
    encoded = encoder('chatml').encode([row])[0]
    assert encoded.notes == [CONTROL_TOKENS]
    assert TOKENIZER.decode(encoded.input_ids) == (
        '<|im_start|>system\ns <s><|im_end|>\n<|im_start|>user\nsay {{QUERY}} <|im_end|><|im_end|>\n'
        '<|im_start|>assistant\nx </s> {{SYSTEM}}<|im_end|><|endoftext|>'
    )


def test_auto_equals_apply_chat_template_and_trains_reply_and_end_alone() -> None:
    rng = random.Random(0)
    words = ['hello', 'the answer', '42', '你好', 'red, green', 'what?']
    compared = 0
    for turns in (1, 2, 3):
        for system in (None, 'be brief'):
            for _ in range(10):
                texts = [' '.join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(2 * turns)]
                row = chat(*texts, system=system)
                encoded = encoder(AUTO).encode([row])[0]
                expected = TOKENIZER.apply_chat_template(row.messages, tokenize=True, return_dict=True)['input_ids']
                assert encoded.input_ids == expected
                assert encoded.notes == []
                start, end = encoded.trained
                assert TOKENIZER.decode(encoded.input_ids[start:end]) == texts[-1] + '<|im_end|>'
                prompt = TOKENIZER.apply_chat_template(
                    row.messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
                )['input_ids']
                assert encoded.input_ids[:start] == prompt
                compared += 1
    assert compared == 60


def test_auto_passes_a_typed_system_and_a_rows_own_wins() -> None:
    coder = encoder(AUTO, system='typed')
    assert TOKENIZER.decode(coder.encode_prompts([chat('a', 'b')])[0]).startswith('<|im_start|>system\ntyped<|im_end|>')
    own = coder.encode_prompts([chat('a', 'b', system='own')])[0]
    assert TOKENIZER.decode(own).startswith('<|im_start|>system\nown<|im_end|>')
    assert 'system' not in TOKENIZER.decode(encoder(AUTO).encode_prompts([chat('a', 'b')])[0])


def test_merged_boundary_is_noted_and_keeps_the_prefix() -> None:
    # If the prompt does not end with a separate newline token, a reply that starts with a newline merges with it.
    tokenizer = make_tokenizer(chat_template=CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n\n'"))
    coder = encoder(AUTO, tokenizer)
    row = chat('hi', '\n\nx')
    encoded, prompt = coder.encode([row])[0], coder.encode_prompts([row])[0]
    assert encoded.input_ids[: len(prompt)] == prompt
    assert RENDERED_DIFFERENTLY in encoded.notes or MERGED_BOUNDARY in encoded.notes


def test_template_that_alters_the_reply_is_noted_and_the_reply_is_trained_as_written() -> None:
    trimming = CHATML.replace("message['content']", "(message['content'] | trim)")
    coder = encoder(AUTO, make_tokenizer(chat_template=trimming))
    encoded = coder.encode([chat('hi', ' padded '), chat('hi', 'plain')])
    assert [row.notes for row in encoded] == [[RENDERED_DIFFERENTLY], []]
    start, end = encoded[0].trained
    assert TOKENIZER.decode(encoded[0].input_ids[start:end]) == ' padded <|im_end|>'


def test_an_empty_think_block_of_the_generation_prompt_is_never_trained() -> None:
    thinking = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n\n</think>\n\n'")
    coder = encoder(AUTO, make_tokenizer(chat_template=thinking))
    encoded = coder.encode([chat('hi', 'yo')])[0]
    assert encoded.notes == [FULL_DIFFERS]
    assert show_row(TOKENIZER, {'input_ids': encoded.input_ids, 'trained': encoded.trained}) == (
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦yo<|im_end|>⟧\n'
    )


def test_template_without_an_end_gets_the_end_of_sequence() -> None:
    endless = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoded = encoder(AUTO, make_tokenizer(chat_template=endless)).encode([chat('a', 'b')])[0]
    assert TOKENIZER.decode(encoded.input_ids) == 'user: aassistant: b</s>'
    assert encoded.trained == (len(encoded.input_ids) - 2, len(encoded.input_ids))


def test_templates_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ConfigError, match='needs a chat template, and this tokenizer has none'):
        encoder(AUTO, make_tokenizer(chat_template=None)).encode([chat('a', 'b')])
    with pytest.raises(ConfigError, match='does not print the assistant'):
        encoder(AUTO, make_tokenizer(chat_template='nothing'))
    refuses = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match='no system role. Run without --system'):
        encoder(AUTO, make_tokenizer(chat_template=refuses), system='x')


def test_history_with_a_single_turn_template_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="test:1: the row has history, and template 'default-generation' is single-turn"
    ):
        encoder('default-generation').encode([chat('a', 'b', 'c', 'd')])


def test_roles_that_a_template_cannot_say_are_refused_by_name() -> None:
    row = chat('a', 'b', 'c', 'd')
    row.messages[1] = {'role': 'tool', 'content': '{}'}
    refused = 0
    for name in REGISTERED:
        with pytest.raises(ConfigError, match=r'turn 2 \(system text not counted\) is a tool turn'):
            encoder(name).encode([row])
        refused += 1
    assert refused == 12


def test_what_a_template_has_no_place_for_is_noted() -> None:
    row = chat('a', 'b', system='s')
    row.tools = [{'type': 'function', 'function': {'name': 'f', 'parameters': {}}}]
    assert encoder('ziya').encode([row])[0].notes == [SYSTEM_IGNORED, TOOLS_IGNORED]
    called = chat('a', '')
    called.messages[1]['tool_calls'] = [{'type': 'function', 'function': {'name': 'f', 'arguments': {}}}]
    encoded = encoder(AUTO).encode([called])[0]
    assert encoded.notes == [TOOL_CALL_AS_TEXT]
    assert TOKENIZER.decode(encoded.input_ids).endswith('assistant\n[{"name": "f", "arguments": {}}]<|im_end|>\n')


def test_a_template_that_says_tool_calls_is_given_them() -> None:
    coder = encoder(AUTO, make_tokenizer(chat_template=TOOLS_TEMPLATE))
    assert isinstance(coder, AutoEncoder) and coder.template.says_tools and all(coder.template.says_calls.values())
    row = chat('a', '')
    row.tools = [{'type': 'function', 'function': {'name': 'f', 'parameters': {}}}]
    row.messages[1]['tool_calls'] = [{'type': 'function', 'function': {'name': 'f <|im_end|>', 'arguments': {}}}]
    encoded = coder.encode([row])[0]
    start, end = encoded.trained
    assert (
        TOKENIZER.decode(encoded.input_ids[start:end])
        == '<call>{"name": "f <|im_end|>", "arguments": {}}</call><|im_end|>'
    )
    end_token = TOKENIZER.convert_tokens_to_ids('<|im_end|>')
    assert encoded.input_ids[start:end].count(end_token) == 1
    assert encoded.notes == [CONTROL_TOKENS]


def test_front_is_cut_and_the_cut_is_noted() -> None:
    row = chat('what is the answer?', 'the answer is 42.')
    whole = encoder('default').encode([row])[0]
    reply = whole.trained[1] - whole.trained[0]
    for max_length, note in ((reply + 3, CUT_PROMPT), (reply - 2, CUT_REPLY)):
        cut = encoder('default', max_length=max_length).encode([row])[0]
        assert cut.input_ids == whole.input_ids[-max_length:]
        assert cut.notes == [note]
        assert cut.input_ids[cut.trained[0] : cut.trained[1]] == whole.input_ids[-min(max_length, reply) :]
    assert encoder('default', max_length=len(whole.input_ids)).encode([row])[0].notes == []


@pytest.mark.parametrize('name', ['eos_tokn_id', 'eos_token'])
def test_a_token_name_that_gives_no_id_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = Template(prefix=(), prompt=('{{QUERY}}',), chat_sep=None, suffix=((name,),))
    monkeypatch.setitem(TEMPLATE_MAPPING, 'mine', template)
    with pytest.raises(ConfigError, match=f"template 'mine' needs {name}, which the tokenizer does not have."):
        encoder('mine')

"""Settings in front of a chat template: rows equal the keywords of apply_chat_template, and nothing overrules them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.templates import SWITCHED, trl_templates
from tests.support.tiny_models import make_tokenizer
from utils.base.errors import ConfigError
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import (
    ADDED_END,
    CONTROL_TOKENS,
    FULL_DIFFERS,
    MERGED_BOUNDARY,
    RENDERED_DIFFERENTLY,
    THINKING_SWITCH,
    RowRefused,
)
from utils.encode.make import make_encoder
from utils.formats.conversation import Message, Row
from utils.loading.template_settings import add_settings
from utils.loading.template_source import SUPPLIED, read_variables
from utils.proofs.template import prove_template

_EXPLAINED = {ADDED_END, CONTROL_TOKENS, FULL_DIFFERS, MERGED_BOUNDARY, RENDERED_DIFFERENTLY}
# Values that are tried for a variable. A template may refuse or ignore some of them.
VALUES: Mapping[str, list[Any]] = {
    'reasoning_effort': ['low', 'high', 'none'],
    'reasoning_strength': ['low', 'high'],
    'builtin_tools': [['python'], []],
    'custom_tools': [[]],
    'tool_namespace_descriptions': [{'a': 'b'}],
    'date_string': ['1 May 2031'],
    'current_date': ['2031-05-01'],
    'knowledge_cutoff': ['2031-01'],
    'model_identity': ['You are "X"\nof {{ no }} one.'],
}
CHATS: list[list[Message]] = [
    [{'role': 'user', 'content': 'is it 1?'}, {'role': 'assistant', 'content': 'yes 1'}],
    [
        {'role': 'system', 'content': 'be brief'},
        {'role': 'user', 'content': 'is it 2?'},
        {'role': 'assistant', 'content': 'no'},
        {'role': 'user', 'content': 'and 3?'},
        {'role': 'assistant', 'content': 'yes 3'},
    ],
]
REASONS: list[Message] = [
    {'role': 'user', 'content': 'is it 4?'},
    {'role': 'assistant', 'content': 'yes 4', 'reasoning': 'count to 4'},
]


def encoder(source: str, settings: Mapping[str, Any] | None = None) -> AutoEncoder:
    tokenizer = make_tokenizer(chat_template=add_settings(source, settings or {}))
    made = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=-1)
    assert isinstance(made, AutoEncoder)
    return made


def rendered(source: str, messages: list[Message], settings: Mapping[str, Any], *, prompt: bool = False) -> str:
    """Return what transformers renders with the plain template and the settings as keywords."""
    tokenizer = make_tokenizer(chat_template=source)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **settings))


def ids_of(coder: AutoEncoder, text: str) -> list[int]:
    ids: list[int] = coder.tokenizer(text, add_special_tokens=False)['input_ids']
    return ids


def compare(source: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Compare the rows with the settings as keywords. Returns how many rows were equal, and how many explained."""
    coder = encoder(source, settings)
    equal = explained = 0
    for messages in CHATS:
        row = Row(messages=messages, origin='test:1')
        try:
            prompt = rendered(source, messages[:-1], settings, prompt=True)
        except Exception:
            with pytest.raises(RowRefused):
                coder.encode([row])
            continue
        (encoded,) = coder.encode([row])
        (asked,) = coder.encode_prompts([row])
        assert asked == ids_of(coder, prompt) == encoded.input_ids[: encoded.prompt_length], settings
        is_equal = encoded.input_ids == ids_of(coder, rendered(source, messages, settings))
        assert is_equal or _EXPLAINED & set(encoded.notes), settings
        equal += is_equal
        explained += not is_equal
    return equal, explained


def test_rows_of_a_switched_template_equal_the_keywords() -> None:
    assert compare(SWITCHED, {}) == compare(SWITCHED, {'enable_thinking': False}) == (2, 0)
    equal, explained = compare(SWITCHED, {'enable_thinking': True})
    assert equal + explained == 2
    coder = encoder(SWITCHED, {'enable_thinking': True})
    assert coder.tokenizer.decode(coder.encode_prompts([Row(messages=CHATS[0], origin='test:1')])[0]).endswith(
        '<|im_start|>assistant\n<think>\n'
    )


def test_the_automatic_switch_is_off_if_the_variable_is_set() -> None:
    row = Row(messages=REASONS, origin='test:1')
    assert encoder(SWITCHED).encode([row])[0].notes == [THINKING_SWITCH.format(switch='enable_thinking=True')]
    opened = encoder(SWITCHED, {'enable_thinking': True})
    assert opened.switch is None
    assert opened.encode([row])[0].notes == []
    assert opened.tokenizer.decode(opened.encode([row])[0].input_ids).endswith(
        '<|im_start|>assistant\n<think>\ncount to 4</think>\n\nyes 4<|im_end|>\n'
    )
    closed = encoder(SWITCHED, {'enable_thinking': False})
    assert closed.switch is None
    with pytest.raises(RowRefused) as caught:
        closed.encode([row])
    assert caught.value.reason == (
        'the reply has reasoning, but the template setting enable_thinking=false closes the think block'
    )


def test_another_name_of_the_switch_does_not_overrule_what_is_set() -> None:
    source = SWITCHED.replace('not enable_thinking', 'not (thinking or enable_thinking)')
    row = Row(messages=REASONS, origin='test:1')
    for name in ('thinking', 'enable_thinking'):
        coder = encoder(source, {name: False})
        assert coder.switch is None
        with pytest.raises(RowRefused) as caught:
            coder.encode([row])
        assert caught.value.reason.endswith(f'the template setting {name}=false closes the think block')


def test_a_setting_for_something_else_leaves_the_switch() -> None:
    source = SWITCHED.replace('{%- for m in', '{{ brand }}{%- for m in', 1)
    row = Row(messages=REASONS, origin='test:1')
    coder = encoder(source, {'brand': 'x'})
    assert coder.switch == 'enable_thinking=True'
    assert coder.encode([row])[0].notes == [THINKING_SWITCH.format(switch='enable_thinking=True')]


def test_the_proof_passes_the_settings_as_keywords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(messages=messages, origin=f'test:{n}') for n, messages in enumerate(CHATS, 1)]
    coder = encoder(SWITCHED, {'enable_thinking': True})
    prove_template(coder, rows, tmp_path)
    # A line in front that did not have the effect of its keyword would be found.
    monkeypatch.setattr('utils.proofs.template.split_settings', lambda source: ({'enable_thinking': False}, SWITCHED))
    with pytest.raises(ConfigError, match="the ids differ from those of the tokenizer's chat template"):
        prove_template(coder, rows, tmp_path)


def test_the_sandbox_stops_a_template_that_reaches_for_python() -> None:
    for expression in ("''.__class__.__mro__", 'messages.append(1)', 'cycler.__init__.__globals__'):
        with pytest.raises(ConfigError) as caught:
            encoder(f'{{{{ {expression} }}}}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}')
        (problem,) = caught.value.problems
        assert problem.startswith('the chat template of this tokenizer fails on a one-turn chat: ')
        assert 'unsafe' in problem or 'not safely callable' in problem


@pytest.mark.slow
def test_every_variable_of_the_templates_of_trl() -> None:
    templates = trl_templates()
    tried = settings_tried = equal = explained = 0
    named: set[str] = set()
    for name, source in templates.items():
        variables = read_variables(source) - SUPPLIED
        if name.endswith('_training') or not variables:
            continue
        tried += 1
        named |= variables
        singles = [{name: value} for name in variables for value in VALUES.get(name, [True, False])]
        together = {name: VALUES.get(name, [False])[0] for name in sorted(variables)}
        for settings in [*singles, together]:
            try:
                found = compare(source, settings)
            except ConfigError:  # the template refuses this value, for every chat
                with pytest.raises(Exception):  # noqa: B017, PT011
                    rendered(source, CHATS[0], settings)
                continue
            settings_tried += 1
            equal += found[0]
            explained += found[1]
    assert tried >= 20 and settings_tried >= 70
    assert equal >= 100 and equal + explained >= 130
    assert {'enable_thinking', 'preserve_thinking', 'reasoning_effort', 'truncate_history_thinking'} <= named
    assert len(named) <= 20, f'every one is a setting that its template documents: {sorted(named)}'

"""The template proof: its report, what stops a run, and that each mutation is found with its own message."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
from tests.support.modern_models import ENDS, template_tokenizer
from tests.support.tiny_models import CHATML, make_tokenizer
from utils.base.errors import ConfigError
from utils.encode.chat_renderer import ChatRenderer
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import ADDED_END, FULL_DIFFERS
from utils.encode.encoder import Encoder
from utils.encode.make import make_encoder
from utils.encode.template_encoder import TemplateEncoder
from utils.formats.columns import find_converter
from utils.formats.conversation import Row
from utils.formats.row_check import check_row
from utils.preprocess import Template
from utils.proofs.template import probes, prove_template, template_hash

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
ROW = Row(
    messages=[{'role': 'user', 'content': 'what is 7?'}, {'role': 'assistant', 'content': 'seven'}], origin='qa.jsonl:1'
)


def encoder(template_type: str = 'auto', *, chat_template: str | None = CHATML) -> Encoder:
    tokenizer = make_tokenizer(chat_template=chat_template)
    return make_encoder(tokenizer, template_type=template_type, system='be kind', system_typed=False, max_length=-1)


def read(raw: dict[str, Any]) -> Row:
    """Return a raw row as a run reads it."""
    converter = find_converter(raw)
    assert converter is not None
    return check_row(converter(raw))


def proof(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / 'proofs.json').read_text())['template']
    assert found.pop('seconds') >= 0
    return found


def test_equal_ids_are_said(tmp_path: Path) -> None:
    prove_template(encoder(), [ROW], tmp_path)
    assert len(probes()) == 10
    assert proof(tmp_path) == {
        'passed': True,
        'says': "11 of 11 conversations (1 of your rows, 10 probes) give the ids of the tokenizer's own chat template; "
        'in all of them the trained text begins with the prompt of inference and the end of turn carries loss',
        'equal': 11,
    }  # fmt: skip


@pytest.mark.parametrize('name', ENDS)
def test_no_chat_template_of_the_hub_is_stopped_without_cause(name: str, tmp_path: Path) -> None:
    prove_template(AutoEncoder(template_tokenizer(name), system=None, max_length=-1), [ROW], tmp_path)
    found = proof(tmp_path)
    assert found['passed'] and found.get('refused', 0) <= 2
    assert found.get('equal', 0) + found.get('explained', 0) + found.get('refused', 0) == 11


def test_a_registered_template_that_differs_is_said_and_trained(tmp_path: Path) -> None:
    prove_template(encoder('default'), [ROW], tmp_path)
    found = proof(tmp_path)
    assert found['passed'] and found['different'] == 10 and found['refused'] == 1
    assert "'default' was chosen and is trained: it differs in 10 (the first: qa.jsonl:1: token 0, " in found['says']


def test_a_tokenizer_without_chat_template_is_said(tmp_path: Path) -> None:
    prove_template(encoder('default', chat_template=None), [ROW], tmp_path)
    says = proof(tmp_path)['says']
    assert says.startswith("the tokenizer has no chat template to compare 'default' with; 11 conversations (1 of your ")


def test_a_registered_template_equals_the_chat_template_until_one_blank_changes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()

    def prove(turn: str) -> dict[str, Any]:
        template = Template(
            prefix=('<|im_start|>system\n{{SYSTEM}}<|im_end|>\n',),
            prompt=(f'<|im_start|>user\n{{{{QUERY}}}}<|im_end|>{turn}<|im_start|>assistant\n',),
            chat_sep=('<|im_end|>\n',),
            suffix=('<|im_end|>\n',),
        )
        ours = TemplateEncoder(tokenizer, template, name='chatml', system='be kind', max_length=-1)
        prove_template(ours, [ROW], tmp_path)
        return proof(tmp_path)

    same = prove('\n')
    assert same['equal'] == 10 and 'different' not in same, 'all but the tool call, which it cannot say'
    changed = prove(' \n')
    assert changed['different'] == 10 and 'equal' not in changed
    assert (
        "token 21, after '\\nwhat is 7?<|im_end|>', is ' ' (228), the chat template has '\\n' (206)" in changed['says']
    )


# ---- mutations: the encoder differs from the template ----


def stops(ours: Encoder, tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        prove_template(ours, [ROW], tmp_path)
    assert proof(tmp_path) == {'passed': False, 'says': error.value.problems[0]}
    return error.value.problems[0]


def test_a_blank_changed_in_what_is_rendered_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ChatRenderer.apply

    def with_a_blank(self: ChatRenderer, chats: list[Any], *options: Any) -> Any:
        found = plain(self, chats, *options)
        texts = [found] if isinstance(found, str) else found
        changed = [text.replace('<|im_end|>\n', '<|im_end|> \n') for text in texts]
        return changed[0] if isinstance(found, str) else changed

    monkeypatch.setattr(ChatRenderer, 'apply', with_a_blank)
    message = stops(AutoEncoder(make_tokenizer(), system=None, max_length=-1), tmp_path)
    assert "the ids differ from those of the tokenizer's chat template, and no known reason explains this" in message
    assert "is ' ' (228), the chat template has '\\n' (206)" in message


def test_a_blank_changed_in_what_is_encoded_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = AutoEncoder(make_tokenizer(), system=None, max_length=-1)
    plain = ours.splitter.split

    def with_a_blank(*args: Any) -> Any:
        part = plain(*args)
        return dataclasses.replace(part, reply=' ' + part.reply)

    monkeypatch.setattr(ours.splitter, 'split', with_a_blank)
    assert 'no known reason explains this' in stops(ours, tmp_path)


def test_an_end_token_without_loss_stops(tmp_path: Path) -> None:
    class Other(AutoEncoder):
        def _trained_end(self, ids: list[int], part: Any) -> int:
            return super()._trained_end(ids, part) - 1

    message = stops(Other(make_tokenizer(), system=None, max_length=-1), tmp_path)
    assert (
        "qa.jsonl:1: template auto: the end of turn '<|im_end|>' carries no loss: the model would never learn to stop."
        in message
    )


# A template that prints every key that a turn may have.
WHOLE = (
    '{% for t in tools or [] %}{{ t.function.name + " " + t.function.description + "\n" }}{% endfor %}'
    '{% for m in messages %}{{ "<|im_start|>" + m.role + (" " + m.name if m.name else "") }}'
    '{{ (" " + m.tool_call_id if m.tool_call_id else "") + "\n" }}'
    '{% if m.reasoning_content %}{{ "[" + m.reasoning_content + "]" }}{% endif %}{{ m.content or "" }}'
    '{% for c in m.tool_calls or [] %}{{ "<call " + (c.id or "") + ">" + (c.function | tojson) }}{% endfor %}'
    '{{ "<|im_end|>\n" }}{% endfor %}{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}'
)
CALLING: dict[str, Any] = {
    'messages': [
        {'role': 'user', 'content': 'how deep?'},
        {
            'role': 'assistant',
            'content': 'I look.',
            'tool_calls': [{'id': 'abcdefgh1', 'function': {'name': 'depth', 'arguments': '{"lake": "A"}'}}],
        },
        {'role': 'tool', 'name': 'depth', 'tool_call_id': 'abcdefgh1', 'content': '42 m'},
        {'role': 'assistant', 'content': 'It is 42 m.', 'reasoning_content': 'the tool says so'},
    ],
    'tools': [{'type': 'function', 'function': {'name': 'depth', 'description': 'depth of a lake', 'parameters': {}}}],
}


def test_a_row_with_calls_names_and_reasoning_gives_the_ids_of_the_chat_template(tmp_path: Path) -> None:
    ours = AutoEncoder(make_tokenizer(chat_template=WHOLE), system=None, max_length=-1)
    prove_template(ours, [read(CALLING)], tmp_path)
    assert proof(tmp_path)['equal'] == 11


@pytest.mark.parametrize('key', ['reasoning', 'name', 'tool_call_id', 'tool_calls', 'content', 'id', 'tools'])
def test_a_field_that_conversion_or_encoding_loses_stops(key: str, tmp_path: Path) -> None:
    """The proof reads the row as it was written, so text that is lost before the encoder is a difference."""
    row = read(CALLING)
    if key == 'tools':
        row.tools = [{'type': 'function', 'function': {'name': 'depth', 'description': '', 'parameters': {}}}]
    for message in row.messages:
        if key == 'id':
            for call in message.get('tool_calls', ()):
                call.pop('id')
        elif key == 'content':
            message['content'] = '' if 'tool_calls' in message else message['content']
        else:
            message.pop(key, None)  # type: ignore[misc]
    ours = AutoEncoder(make_tokenizer(chat_template=WHOLE), system=None, max_length=-1)
    with pytest.raises(ConfigError, match='the ids differ from those'):
        prove_template(ours, [row], tmp_path)


def turns(reply: dict[str, Any], content: Any = 'how deep?') -> dict[str, Any]:
    return {'messages': [{'role': 'user', 'content': content}, {'role': 'assistant', **reply}]}


def calling(function: dict[str, Any]) -> dict[str, Any]:
    return turns({'content': None, 'tool_calls': [{'id': 'abcdefgh1', 'function': function}]})


PARTS = [{'type': 'text', 'text': 'how '}, {'type': 'text', 'text': 'deep?'}]
# Like Qwen3's, it prints only the text of a turn, and here also a key that conversion reports as not used.
TEXT_ALONE = (
    '{% for m in messages %}{{ "<|im_start|>" + m.role + "\n" + (m.plan or "") }}'
    '{{ m.content if m.content is string else "" }}{{ "<|im_end|>\n" }}{% endfor %}'
    '{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}'
)
ODD_BUT_GOOD = {
    'no arguments': (WHOLE, calling({'name': 'depth'})),
    'null arguments': (WHOLE, calling({'name': 'depth', 'arguments': None})),
    'empty arguments': (WHOLE, calling({'name': 'depth', 'arguments': ' '})),
    'arguments that are no object': (WHOLE, calling({'name': 'depth', 'arguments': '[1]'})),
    'a legacy call': (WHOLE, turns({'content': None, 'function_call': {'name': 'depth', 'arguments': '{"a": 1}'}})),
    'a role of calls': (
        WHOLE,
        {'conversations': [
            {'from': 'human', 'value': 'how deep?'}, {'from': 'function_call', 'value': '{"name": "depth"}'}
        ]},
    ),
    'a missing name': (WHOLE, turns({'content': 'yes', 'name': float('nan')})),
    'a number': (WHOLE, turns({'content': 'yes'}, 5)),
    'parts of text': (TEXT_ALONE, turns({'content': 'yes'}, PARTS)),
    'a key that is named as not used': (TEXT_ALONE, turns({'content': 'yes', 'plan': 'first look'})),
    'turns as JSON text': (WHOLE, {'messages': json.dumps(CALLING['messages']), 'tools': json.dumps(CALLING['tools'])}),
    'tools without a wrapper': (WHOLE, {**CALLING, 'tools': [tool['function'] for tool in CALLING['tools']]}),
    'functions': (WHOLE, {'messages': CALLING['messages'], 'functions': [t['function'] for t in CALLING['tools']]}),
    'parameters as JSON text': (
        WHOLE,
        {**CALLING, 'tools': [{'function': {**CALLING['tools'][0]['function'], 'parameters': '{}'}}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize('kind', ODD_BUT_GOOD)
def test_a_row_that_is_only_written_oddly_stops_no_run(kind: str, tmp_path: Path) -> None:
    template, raw = ODD_BUT_GOOD[kind]
    ours = AutoEncoder(make_tokenizer(chat_template=template), system=None, max_length=-1)
    row = read(raw)
    row.origin = 'odd.jsonl:1'
    prove_template(ours, [row], tmp_path)
    found = proof(tmp_path)
    assert found['passed'] and found['equal'] + found.get('explained', 0) == 11, kind


CALLS_WHOLE = CHATML.replace(
    "message['content'] +", "(message['content'] or '') + (message.tool_calls | tojson if message.tool_calls else '') +"
)


@pytest.mark.parametrize(
    'call',
    [
        {'id': 'abcdefgh1', 'type': 'function', 'function': {'name': 'depth', 'arguments': '{"lake": "A"}'}},
        {'function': {'arguments': {'lake': 'A'}, 'name': 'depth'}, 'type': 'function', 'id': 'abcdefgh1'},
        {'function': {'name': 'depth', 'arguments': {}}, 'id': 'abcdefgh1'},
        {'name': 'depth', 'arguments': {'lake': 'A'}},
        {'type': 'function', 'function': {'name': 'depth'}},
    ],
)
def test_calls_that_a_template_prints_whole_keep_the_order_of_their_keys(call: dict[str, Any], tmp_path: Path) -> None:
    reply = {'role': 'assistant', 'content': '', 'tool_calls': [call]}
    row = read({'messages': [{'role': 'user', 'content': 'how deep?'}, reply]})
    row.origin = 'calls.jsonl:1'
    by = encoder(chat_template=CALLS_WHOLE)
    prove_template(by, [row], tmp_path)
    assert proof(tmp_path)['passed']
    shown = by.tokenizer.decode(by.encode([row])[0].input_ids)
    keys = [key for key in call if key in ('type', 'id', 'function')]
    assert sorted(keys, key=lambda key: shown.index(f'"{key}": ')) == keys


def test_a_text_beside_a_call_that_is_lost_stops_although_the_prompt_has_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{%- for c in m.tool_calls or [] %}{{ 'CALL ' + c.function.name + '\\n' }}{% endfor %}{{ m.content or '' }}"
        "{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=source)
    call = {'id': 'abcdefgh1', 'function': {'name': 'depth', 'arguments': {}}}
    row = read(turns({'content': 'deep', 'tool_calls': [call]}, 'deep'))
    whole = AutoEncoder(tokenizer, system=None, max_length=-1)
    assert ADDED_END in whole.encode([row])[0].notes
    prove_template(whole, [row], tmp_path)
    plain = whole.splitter.split

    def without_the_text(*args: Any) -> Any:
        part = plain(*args)
        return dataclasses.replace(part, reply=part.reply.removesuffix('deep'), notes=[*part.notes, FULL_DIFFERS])

    monkeypatch.setattr(whole.splitter, 'split', without_the_text)
    with pytest.raises(ConfigError, match='no known reason explains this'):
        prove_template(whole, [row], tmp_path)


def test_an_inference_prompt_that_is_no_prefix_stops(tmp_path: Path) -> None:
    class Other(AutoEncoder):
        def _encode_prompts(self, rows: Any) -> list[list[int]]:
            return [[*ids[:-1], 5] for ids in super()._encode_prompts(rows)]

    message = stops(Other(make_tokenizer(), system=None, max_length=-1), tmp_path)
    assert 'the prompt of inference is not the beginning of the trained row: token' in message


# ---- the stored hash ----


@pytest.mark.slow
def test_inference_refuses_a_chat_template_changed_since(
    run_sft: Run, model_dir: Path, problems: Problems, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_sft('--max_steps', '1')
    checkpoint = run / 'checkpoint-1'
    record = json.loads((run / 'sft_args.json').read_text())
    assert record['template_sha256'] == template_hash(encoder())
    assert json.loads((checkpoint / 'sft_args.json').read_text())['template_sha256'] == record['template_sha256']
    file = model_dir / 'chat_template.jinja'
    before = file.read_text()
    words = ['--ckpt_dir', str(checkpoint), '--do_sample', 'false', '--max_new_tokens', '2']
    try:
        file.write_text(before.replace('<|im_start|>assistant\n', '<|im_start|>assistant \n'))
        assert llm_infer.main(words) == 2
        assert 'the chat template of this tokenizer has changed since checkpoint-1 was trained' in problems()[0]
        assert (
            f'Copy the trained one from {checkpoint}/chat_template.jinja, or add --template_type auto' in problems()[0]
        )
        caplog.clear()
        assert llm_infer.main([*words, '--template_type', 'auto']) == 0
        assert 'The changed template is used, because --template_type is typed' in caplog.text
        assert 'to continue anyway' not in caplog.text
    finally:
        file.write_text(before)
    assert llm_infer.main(words) == 0

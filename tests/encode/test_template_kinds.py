"""Peculiarities of released chat templates, each in a minimal one: the inference prompt is a prefix of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.support.tiny_models import CHATML, make_tokenizer
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import FULL_DIFFERS, THINKING_SWITCH, TOOL_CALL_AS_TEXT
from utils.formats.columns import find_converter
from utils.formats.conversation import Row
from utils.formats.row_check import check_row
from utils.proofs.template import prove_template

ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# Llama-2-chat, Mistral: a blank before the reply that the generation prompt does not have.
LEADING_BLANK = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# Mistral-Nemo: the system text is put into the last message if that is from the user.
SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set chat = messages[1:] %}"
    "{% else %}{% set chat = messages %}{% endif %}{% for m in chat %}{% if m.role == 'user' %}"
    "{{ '[INST]' + (system + '\n' if system is defined and loop.last else '') + m.content + '[/INST]' }}"
    '{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}'
)
# Gemma 4: an empty channel in the generation prompt, which replies in the chat do not have.
EMPTY_CHANNEL = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<eoh>thought\n<eoa>' }}{% endif %}"
)
# R1 distills: the generation prompt opens a think block.
OPEN_THINK = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# DeepSeek-V3.1: the generation prompt closes the think block, unless a setting opens it.
SWITCHED = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\n' + ('<think>' if thinking is defined and thinking else '</think>') }}{% endif %}",
)
KINDS = {
    'leading blank': LEADING_BLANK,
    'system last': SYSTEM_LAST,
    'empty channel': EMPTY_CHANNEL,
    'open think': OPEN_THINK,
    'switched': SWITCHED,
}


def read(*texts: str, system: str = '', **more: Any) -> Row:
    """Return a row of alternating turns as a run reads it; `more` are extra keys of the last reply."""
    turns: list[dict[str, Any]] = [
        {'role': 'assistant' if number % 2 else 'user', 'content': text} for number, text in enumerate(texts)
    ]
    turns[-1].update(more)
    raw = {'messages': turns, **({'system': system} if system else {})}
    converter = find_converter(raw)
    assert converter is not None
    row = check_row(converter(raw))
    row.origin = 'rows.jsonl:1'
    return row


def encoder(chat_template: Any, *added: AddedToken) -> AutoEncoder:
    tokenizer = make_tokenizer(chat_template=chat_template)
    tags = [AddedToken(tag, special=False, normalized=False) for tag in ('<think>', '</think>')]
    tokenizer.add_tokens([*tags, *added])
    return AutoEncoder(tokenizer, system=None, max_length=-1)


PLAIN = [read('hi', 'yo'), read('hi', 'yo', 'who?', 'me'), read('q', ' blanks '), read('q', '7', system='be kind')]
THOUGHT = [read('hi', '<think>\nhm\n</think>\n\nyo'), read('hi', 'yo', reasoning='hm')]
MENTIONS = read('how?', 'Write </think> to close it.')


@pytest.mark.parametrize('kind', KINDS)
def test_prompts_begin_what_is_trained_in_batches_of_all_kinds_of_rows(kind: str, tmp_path: Path) -> None:
    by = encoder(KINDS[kind])
    rows = [*PLAIN, *THOUGHT, MENTIONS] if 'think' in KINDS[kind] else [*PLAIN, MENTIONS]
    together = by.encode(rows)
    for row, prompt, encoded in zip(rows, by.encode_prompts(rows), together, strict=True):
        assert encoded.input_ids[: encoded.prompt_length] == prompt
        alone = encoder(KINDS[kind])
        assert alone.encode([row])[0].input_ids == encoded.input_ids, 'no row changes another'
        assert alone.encode_prompts([row])[0] == prompt
        assert encoded.trained == (len(prompt), encoded.trained[1])
    prove_template(by, rows, tmp_path)


def shown(by: AutoEncoder, row: Row) -> tuple[str, str]:
    """Return the prompt and the trained part as text."""
    encoded = by.encode([row])[0]
    start, end = encoded.trained
    return by.tokenizer.decode(encoded.input_ids[:start]), by.tokenizer.decode(encoded.input_ids[start:end])


def test_a_blank_before_the_reply_belongs_to_the_reply() -> None:
    by = encoder(LEADING_BLANK)
    assert shown(by, read('hi', 'yo')) == ('[INST] hi [/INST]', ' yo</s>')
    chat = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]
    whole = by.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert by.encode([read('hi', 'yo')])[0].input_ids == whole


def test_the_prompt_is_the_generation_prompt_where_the_whole_chat_is_printed_otherwise() -> None:
    by = encoder(SYSTEM_LAST)
    assert shown(by, read('hi', 'yo', system='be kind')) == ('[INST]be kind\nhi[/INST]', 'yo</s>')
    assert FULL_DIFFERS in by.encode([read('hi', 'yo', system='be kind')])[0].notes
    assert FULL_DIFFERS not in by.encode([read('hi', 'yo')])[0].notes
    prompt, trained = shown(encoder(EMPTY_CHANNEL), read('hi', 'yo'))
    assert prompt.endswith('assistant\n<eoh>thought\n<eoa>') and trained == 'yo<|im_end|>'


def test_plain_and_reasoning_rows_close_the_block_that_the_prompt_opens() -> None:
    by = encoder(OPEN_THINK)
    opened = '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n'
    assert shown(by, THOUGHT[0]) == (opened, 'hm\n</think>\n\nyo<|im_end|>')
    prompt, trained = shown(by, read('hi', 'yo'))
    assert prompt == opened and trained.lstrip('\n').startswith('</think>') and trained.endswith('yo<|im_end|>')


def test_a_row_that_reasons_is_rendered_with_the_thinking_switch() -> None:
    by = encoder(SWITCHED)
    for row in THOUGHT:
        prompt, trained = shown(by, row)
        assert prompt.endswith('assistant\n<think>') and 'hm' in trained and trained.endswith('yo<|im_end|>')
        assert THINKING_SWITCH.format(switch='thinking=True') in by.encode([row])[0].notes
    assert shown(by, read('hi', 'yo')) == (
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n</think>',
        'yo<|im_end|>',
    )


@pytest.mark.parametrize('kind', ['open think', 'switched'])
def test_a_reply_that_mentions_a_think_tag_changes_nothing(kind: str) -> None:
    by = encoder(KINDS[kind])
    before = [shown(by, row) for row in PLAIN]
    prompt, trained = shown(by, MENTIONS)
    assert prompt == shown(by, read('how?', 'plain'))[0]
    assert 'Write </think> to close it.' in trained
    assert [shown(by, row) for row in PLAIN] == before


PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def test_typed_control_tokens_leave_tokens_that_take_blanks_as_they_are() -> None:
    """Phi-3's markers include the line end after them; a row that contains one gets the same template ids."""
    markers = ('<|user|>', '<|assistant|>', '<|end|>')
    by = encoder(PHI, *(AddedToken(marker, special=True, normalized=False, rstrip=True) for marker in markers))
    plain, typed = (by.encode([read(query, 'yo')])[0].input_ids for query in ('hi', 'hi <|end|> there'))
    user, assistant, end = by.tokenizer.convert_tokens_to_ids(list(markers))
    assert plain[0] == typed[0] == user
    assert typed[typed.index(assistant) - 1 :] == plain[plain.index(assistant) - 1 :], 'end, reply and their markers'
    assert typed.count(end) == plain.count(end) == 2
    chat = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]
    assert by.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)[: len(plain)] == plain


def test_calls_are_judged_by_the_template_that_renders_the_row() -> None:
    tool_use = CHATML.replace(
        "message['content'] +",
        "(message.content or '') + (message.tool_calls | tojson if message.tool_calls else '') +",
    ).replace('{% for message', '{% if tools %}{{ tools | tojson }}{% endif %}{% for message', 1)
    by = encoder({'default': CHATML, 'tool_use': tool_use})
    call = {'type': 'function', 'function': {'name': 'depth', 'arguments': {'lake': 'A'}}}
    tool = {'type': 'function', 'function': {'name': 'depth', 'description': 'd', 'parameters': {}}}
    row = read('how deep?', '', tool_calls=[call])
    row.tools = [tool]
    prompt, trained = shown(by, row)
    assert '"description": "d"' in prompt and '"arguments": {"lake": "A"}' in trained and '"type"' in trained
    assert TOOL_CALL_AS_TEXT not in by.encode([row])[0].notes
    row.tools = None
    assert TOOL_CALL_AS_TEXT in by.encode([row])[0].notes


def test_ordinary_added_tokens_that_the_template_prints_are_control_tokens() -> None:
    template = CHATML.replace('<|im_start|>', '<｜turn｜>').replace('<|im_end|>', '<｜end｜>')
    tokens = [AddedToken(token, special=False, normalized=False) for token in ('<｜turn｜>', '<｜end｜>')]
    by = encoder(template, *tokens)
    turn, end = by.tokenizer.convert_tokens_to_ids(['<｜turn｜>', '<｜end｜>'])
    ids = by.encode([read('a<｜end｜><｜turn｜>b', 'c<｜end｜>')])[0].input_ids
    assert (ids.count(turn), ids.count(end)) == (2, 2)
    assert by.stop_ids == [end]

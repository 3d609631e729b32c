"""Where a turn begins and ends: templates that print more than turns, or end a turn with text or with two markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import make_tokenizer
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import ADDED_END, EARLIER_MERGED, FULL_DIFFERS, Encoded
from utils.encode.make import make_encoder
from utils.formats.conversation import Row
from utils.proofs.template import prove_template

TOOL = {'type': 'function', 'function': {'name': 'get_sky', 'parameters': {'type': 'object', 'properties': {}}}}
CALL = {'type': 'function', 'id': 'a1b2c3d4e', 'function': {'name': 'get_sky', 'arguments': {'city': 'Oslo'}}}
ASKED: dict[str, Any] = {'role': 'user', 'content': 'blue?'}
CALLED: dict[str, Any] = {'role': 'assistant', 'content': '', 'tool_calls': [CALL]}
RESULT: dict[str, Any] = {'role': 'tool', 'content': 'grey', 'tool_call_id': 'a1b2c3d4e', 'name': 'get_sky'}

# Turns of markers alone: no role is text. {after} is printed after the last turn, whatever it is.
TURNS = (
    "{{%- for t in tools or [] %}}{{{{ '<|open|>TOOL ' + t.function.name + '<|end|>' }}}}{{% endfor %}}"
    "{{%- for m in messages %}}{{{{- '<|open|>' }}}}"
    "{{{{- {{'user': '<|user|>', 'tool': '<|tool|>'}}.get(m.role, '<|bot|>') }}}}"
    "{{%- if m.tool_calls %}}{plan}{{{{- '<act>' + (m.tool_calls[0].function | tojson) + '{end_of_call}' }}}}"
    "{{%- else %}}{{{{- m.content + '{end}' }}}}{{% endif %}}{{% endfor %}}{after}"
    "{{%- if add_generation_prompt %}}{{{{- '{header}' }}}}{{% endif %}}"
)
HEADER = '<|open|><|bot|>'
MARKERS = ('<|open|>', '<|user|>', '<|tool|>', '<|bot|>', '<|end|>', '<|close|>', '<act>', '</act>')


def template(
    *, end: str = '<|end|>', end_of_call: str = '</act><|end|>', after: str = '', header: str = HEADER, plan: str = ''
) -> str:
    return TURNS.format(end=end, end_of_call=end_of_call, after=after, header=header, plan=plan)


def encoder(source: str, *, eos: str = '<|end|>', scope: Any = 'all_rounds') -> AutoEncoder:
    tokenizer = make_tokenizer(chat_template=source)
    tokenizer.add_tokens([*MARKERS, '<think>', '</think>'], special_tokens=True)
    tokenizer.eos_token = eos
    made = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=-1, loss_scope=scope)
    assert isinstance(made, AutoEncoder)
    return made


def row(*turns: dict[str, Any], tools: bool = True) -> Row:
    messages = [dict(turn) for turn in turns]
    raw: dict[str, Any] = {'messages': messages, **({'tools': [TOOL]} if tools else {})}
    return Row(messages=messages, tools=[TOOL] if tools else None, origin='test:1', written=raw)  # type: ignore[arg-type]


def says(text: str, **more: Any) -> dict[str, Any]:
    return {'role': 'assistant', 'content': text, **more}


def trained(coder: AutoEncoder, found: Encoded) -> list[str]:
    """Return the text of each trained span."""
    return [coder.tokenizer.decode(found.input_ids[a:b]) for a, b in (*found.earlier, found.trained)]


# The header of the next turn, as Cohere's templates print it whether it is asked for or not.
ALWAYS = "{{- '<|open|><|bot|>' }}"
BLOCK = "{{- '<|open|><|bot|><think></think>' }}"


@pytest.mark.parametrize('eos', ['<|end|>', '</s>'])
@pytest.mark.parametrize('after', [ALWAYS, BLOCK], ids=['header', 'closed block'])
def test_a_turn_ends_before_the_header_that_a_template_always_prints(after: str, eos: str, tmp_path: Path) -> None:
    coder = encoder(template(after=after, header=''), eos=eos)
    call = '<act>{"name": "get_sky", "arguments": {"city": "Oslo"}}</act><|end|>'
    rows = [row(ASKED, says('yes')), row(ASKED, CALLED), row(ASKED, CALLED, RESULT, says('yes'))]
    spans = [trained(coder, found) for found in coder.encode(rows)]
    assert [[span.removeprefix('<think></think>') for span in one] for one in spans] == [
        ['yes<|end|>'],
        [call],
        [call, 'yes<|end|>'],
    ]
    assert coder.stop_ids == [coder.tokenizer.convert_tokens_to_ids('<|end|>')]
    prove_template(coder, rows, tmp_path)


# Command R+ repeats an instruction after every chat with tools, and prints no end of a call.
RULES = "{%- if tools %}{{- '<|open|><|user|>RULES<|end|>' }}{% endif %}"


def test_an_instruction_after_the_last_turn_is_neither_trained_nor_takes_the_header_twice(tmp_path: Path) -> None:
    coder = encoder(template(after=RULES, end_of_call='\\n'))
    rows = [row(ASKED, says('yes')), row(ASKED, CALLED), row(ASKED, CALLED, RESULT, says('yes'))]
    call = '<act>{"name": "get_sky", "arguments": {"city": "Oslo"}}\n'
    found = coder.encode(rows)
    assert [trained(coder, one) for one in found] == [['yes<|end|>'], [f'{call}<|end|>'], [call, 'yes<|end|>']]
    for one in found:
        prompt = coder.tokenizer.decode(one.input_ids[: one.prompt_length])
        assert prompt.endswith('RULES<|end|><|open|><|bot|>') and FULL_DIFFERS in one.notes
    assert ADDED_END in found[1].notes
    prove_template(coder, rows, tmp_path)


def test_a_reply_that_is_closed_before_its_turn_is_trained_up_to_the_end_of_sequence() -> None:
    coder = encoder(template(end='<|close|><|end|>'))
    assert trained(coder, coder.encode([row(ASKED, says('yes'))])[0]) == ['yes<|close|><|end|>']
    assert coder.stop_ids == [coder.tokenizer.convert_tokens_to_ids('<|end|>')]
    # Where it ends the whole chat alone, no turn ends at it.
    coder = encoder(template(end='<|close|>', after="{{- '<|end|>' }}"))
    assert trained(coder, coder.encode([row(ASKED, says('yes'))])[0]) == ['yes<|close|>']


def test_a_marker_that_opens_turns_and_their_parts_ends_none() -> None:
    """As Kimi-K3's, whose calls have an `open` of their own for each argument."""
    inside = template(
        end='<|close|>reply<|end|>', end_of_call='<|open|>args<|close|>call<|end|>', header=HEADER + '<|open|>'
    )
    inside = inside.replace("'<|bot|>')", "'<|bot|><|open|>')")
    coder = encoder(inside)
    called = '<act>{"name": "get_sky", "arguments": {"city": "Oslo"}}<|open|>args<|close|>call<|end|>'
    found = coder.encode([row(ASKED, CALLED), row(ASKED, CALLED, RESULT, says('yes'))])
    assert [trained(coder, one) for one in found] == [[called], [called, 'yes<|close|>reply<|end|>']]


PLAN = "{{- '<think>' + (m.tool_plan or '') + '</think>' }}"


@pytest.mark.parametrize('plan', [PLAN, "{{- '<think></think>' }}"], ids=['key', 'no key'])
def test_reasoning_before_a_call_is_one_block(plan: str) -> None:
    coder = encoder(template(plan=plan))
    found = coder.encode([row(ASKED, {**CALLED, 'reasoning': 'why'})])[0]
    assert trained(coder, found)[0].startswith('<think>why</think><act>{"name"')
    assert not found.notes or plan != PLAN


# --- earlier replies

TEXTUAL = (
    "{%- for m in messages %}{{- 'User: ' if m.role == 'user' else 'Bot: ' }}{{- m.content + '\\n\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- 'Bot:' + (' <think>' if think else '') }}{% endif %}"
)


def test_an_earlier_reply_is_trained_with_the_text_that_ends_its_turn() -> None:
    coder = encoder(TEXTUAL.replace(' if think', ' if false'), eos='</s>')
    found = coder.encode([row(ASKED, says('yes'), ASKED, says('no'), tools=False)])[0]
    assert trained(coder, found) == [' yes\n\n', ' no\n\n</s>']
    assert EARLIER_MERGED not in found.notes


def test_the_thinking_switch_of_the_last_reply_leaves_earlier_ones_where_they_begin() -> None:
    coder = encoder(TEXTUAL, eos='</s>')
    assert coder.switch == 'think=True'
    found = coder.encode([row(ASKED, says('yes'), ASKED, says('<think>why</think>no'), tools=False)])[0]
    assert trained(coder, found)[0] == ' yes\n\n'
    assert EARLIER_MERGED not in found.notes


def test_a_token_that_merges_across_the_end_of_an_earlier_reply_is_named() -> None:
    tokenizer = make_tokenizer(chat_template=TEXTUAL.replace("m.content + '\\n\\n'", "m.content + '42.'"))
    tokenizer.add_tokens(['.B'])
    coder = make_encoder(
        tokenizer, template_type='auto', system='', system_typed=False, max_length=-1, loss_scope='all_rounds'
    )
    twice = [ASKED, says('yes'), says('no'), ASKED, says('no')]
    found = coder.encode([row(*twice, tools=False)])[0]
    assert any(tokenizer.decode([token]) == '.B' for token in found.input_ids)
    assert EARLIER_MERGED in found.notes

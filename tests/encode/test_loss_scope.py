"""Loss on all rounds: exact spans for every template, the prefix property at every round, labels in a batch."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.runs import write_jsonl
from tests.support.templates import FOREIGN_IDS, TEXT, TOKENIZER, TOKENIZERS, TOOLS_TEMPLATE, chat
from tests.support.tiny_models import CHATML, make_tokenizer
from utils.data.collator import Collator
from utils.data.encode_plan import EncodedRows
from utils.encode.encoded import CONTROL_TOKENS, EARLIER_CHANGED, EARLIER_MERGED, RowRefused
from utils.encode.encoder import Encoder
from utils.encode.make import make_encoder
from utils.encode.show import show_row
from utils.formats.conversation import Row
from utils.preprocess import AUTO, TEMPLATE_MAPPING

MULTI_TURN = [name for name, t in TEMPLATE_MAPPING.items() if t is None or t.chat_sep is not None]


def encoder(name: str, tokenizer: Any = TOKENIZER, *, scope: Any = 'all_rounds', max_length: int = -1) -> Encoder:
    return make_encoder(
        tokenizer, template_type=name, system='be kind', system_typed=False, max_length=max_length, loss_scope=scope
    )


def spans(row: Any, tokenizer: Any = TOKENIZER) -> list[str]:
    """Return the text of each trained span."""
    return [
        tokenizer.decode([i for i in row.input_ids[start:end] if i not in FOREIGN_IDS])
        for start, end in (*row.earlier, row.trained)
    ]


EARLIER = {
    'default': 'yo', 'chatml': 'yo<|im_end|>', 'baichuan': 'yo', 'chatglm2': 'yo', 'llama': 'yo </s>', 'openbuddy':
    'yo', 'openbuddy-llama': 'yo', 'internlm': 'yo<eoa>', 'xverse': 'yo</s>', 'ziya': 'yo', 'auto': 'yo<|im_end|>',
}  # fmt: skip
LAST = {'chatml': 'me<|im_end|><|endoftext|>', 'internlm': 'me<eoa></s>', 'auto': 'me<|im_end|>'}


def test_exact_spans_of_every_template() -> None:
    assert set(EARLIER) == set(MULTI_TURN), 'a new template needs its spans'
    assert len(EARLIER) == 11
    for name, earlier in EARLIER.items():
        rows = encoder(name).encode([chat('hi', 'yo', 'oh', 'yo', 'who?', 'me'), chat('hi', 'me')])
        last = LAST.get(name, 'me</s>')
        assert spans(rows[0]) == [earlier, earlier, last], name
        assert spans(rows[1]) == [last] and rows[1].earlier == []
        assert rows[0].notes == []


def test_without_a_typed_scope_the_row_decides_which_replies_carry_loss() -> None:
    for name in MULTI_TURN:
        coder = make_encoder(TOKENIZER, template_type=name, system='s', system_typed=False, max_length=-1)
        last = chat('hi', 'yo', 'who?', 'me')
        every = dataclasses.replace(last, loss_scope='all_rounds')
        both = coder.encode([last, every])
        assert both[0].earlier == []
        assert spans(both[1])[0] == EARLIER[name]
        typed = encoder(name, scope='last_round')
        assert typed.encode([every])[0].earlier == []


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXT, min_size=6, max_size=6), system=st.none() | TEXT)
def test_the_prompt_of_every_round_is_a_prefix_and_every_span_is_its_reply(
    texts: list[str], system: str | None
) -> None:
    checked = 0
    # A blank earlier reply is never trained.
    earlier = [text for text in (texts[1], texts[3]) if text.strip()]
    for tokenizer, name in itertools.product(TOKENIZERS, MULTI_TURN):
        coder = encoder(name, tokenizer)
        row = coder.encode([chat(*texts, system=system)])[0]
        assert len(row.earlier) == len(earlier) or EARLIER_CHANGED in row.notes
        rounds = {(start, end) for start, end in (*row.earlier, row.trained)}
        prompts = [coder.encode_prompts([chat(*texts[:n], system=system)])[0] for n in (2, 4, 6)]
        starts = {len(prompt) for prompt in prompts if row.input_ids[: len(prompt)] == prompt}
        assert {start for start, _ in rounds} <= starts or EARLIER_MERGED in row.notes
        assert row.trained[0] == len(prompts[-1]) and row.input_ids[: len(prompts[-1])] == prompts[-1]
        if name != AUTO:
            for (start, end), text in zip(row.earlier, earlier, strict=True):
                assert row.input_ids[start : end - coder._round_end] == coder.text.ids([text], inert=True)[0]
        checked += 1
    assert checked == 33


def test_typed_control_tokens_stay_text_in_every_round() -> None:
    for name in MULTI_TURN:
        row = encoder(name).encode([chat('a </s>', 'b <|im_end|>', 'c', 'd')])[0]
        assert row.notes == [CONTROL_TOKENS]
        assert spans(row)[0] == EARLIER[name].replace('yo', 'b <|im_end|>')


def test_earlier_replies_are_trained_as_the_template_prints_them() -> None:
    dropping = CHATML.replace(
        "message['content']",
        "(message['content'] if loop.last or message['role'] != 'assistant' else message['content'].split(']')[-1])",
    )
    tokenizer = make_tokenizer(chat_template=dropping)
    row = encoder(AUTO, tokenizer).encode([chat('hi', '[thought]yo', 'oh', 'plain', 'who?', 'me')])[0]
    assert spans(row, tokenizer) == ['yo<|im_end|>', 'plain<|im_end|>', 'me<|im_end|>']
    assert row.notes == []


def test_earlier_replies_that_the_template_does_not_print_are_noted() -> None:
    dropping = CHATML.replace(
        "message['content']", "(message['content'] if loop.last or message['role'] != 'assistant' else '')"
    )
    tokenizer = make_tokenizer(chat_template=dropping)
    row = encoder(AUTO, tokenizer).encode([chat('hi', 'yo', 'who?', 'me')])[0]
    assert spans(row, tokenizer) == ['me<|im_end|>']
    assert row.notes == [EARLIER_CHANGED]


def test_a_row_decides_which_replies_carry_loss() -> None:
    for name in ('chatml', AUTO):
        marked = chat('hi', 'yo', 'oh', 'hey', 'who?', 'me')
        marked.messages[1]['loss'] = True
        marked.messages[5]['loss'] = False
        ended = LAST[name].removeprefix('me').partition('<|endoftext|>')[0]
        row = encoder(name, scope='last_round').encode([marked])[0]
        assert spans(row) == [f'yo{ended}'], name
        assert spans(encoder(name).encode([marked])[0]) == [f'yo{ended}', f'hey{ended}'], name
        marked.messages[1]['loss'] = False
        with pytest.raises(
            RowRefused, match='the last reply is marked to carry no loss .*, and no earlier reply carries loss'
        ):
            encoder(name, scope='last_round').encode([marked])


def test_tool_calls_of_earlier_rounds_are_trained_as_the_template_says_them() -> None:
    row = chat('a', '{"name": "f"}', 'x', 'b')
    call = {'type': 'function', 'function': {'name': 'f', 'arguments': {}}}
    row.messages[1]['tool_calls'] = [call]
    row.messages[2]['role'] = 'tool'
    row.tools = [{'type': 'function', 'function': {'name': 'f', 'parameters': {}}}]
    tokenizer = make_tokenizer(chat_template=TOOLS_TEMPLATE)
    assert spans(encoder(AUTO, tokenizer).encode([row])[0], tokenizer) == [
        '<call>{"name": "f", "arguments": {}}</call><|im_end|>', 'b<|im_end|>',
    ]  # fmt: skip


def test_spans_move_with_the_cut_front() -> None:
    row = chat('hi', 'yo', 'oh', 'hey there', 'who?', 'me')
    whole = encoder('chatml').encode([row])[0]
    for surplus in range(1, len(whole.input_ids) - 1):
        cut = encoder('chatml', max_length=len(whole.input_ids) - surplus).encode([row])[0]
        wanted = {i for start, end in (*whole.earlier, whole.trained) for i in range(start, end) if i >= surplus}
        found = {i + surplus for start, end in (*cut.earlier, cut.trained) for i in range(start, end)}
        assert found == wanted and all(start < end for start, end in cut.earlier)


def test_several_spans_are_kept_compactly_and_become_labels() -> None:
    rows = EncodedRows()
    encoded = encoder('chatml').encode([chat('hi', 'yo', 'who?', 'me'), chat('hi', 'me'), Row(messages=[
        {'role': 'user', 'content': ''}, {'role': 'assistant', 'content': 'x'}])])  # fmt: skip
    for row in encoded:
        rows.append(row)
    assert [rows[i].get('earlier', []) for i in range(3)] == [row.earlier for row in encoded]
    assert rows.trained_tokens() == sum(e - s for row in encoded for s, e in (*row.earlier, row.trained))
    assert show_row(TOKENIZER, rows[0]).count('⟦') == 2
    assert '⟦yo<|im_end|>⟧\n<|im_start|>user\nwho?' in show_row(TOKENIZER, rows[0])
    labels = Collator(5)([rows[0], rows[1]])['labels']
    assert [i for i, label in enumerate(labels[0].tolist()) if label != -100] == [
        i for start, end in (*encoded[0].earlier, encoded[0].trained) for i in range(start, end)
    ]
    assert TOKENIZER.decode(labels[0][labels[0] != -100]) == 'yo<|im_end|>me<|im_end|><|endoftext|>'


@pytest.mark.slow
def test_a_run_trains_every_reply_and_inference_takes_the_scope_from_the_run(
    run_sft: Callable[..., Path], tmp_path: Path
) -> None:
    import llm_infer

    rows = [{'query': 'who?', 'response': 'me', 'history': [['hi', 'yo'], ['oh', 'hey there']]}] * 20
    data = str(write_jsonl(tmp_path / 'rounds.jsonl', rows))
    shares = []
    for scope in ('last_round', 'all_rounds'):
        run = run_sft('--dataset', data, '--loss_scope', scope, '--max_steps', '2', '--template_type', 'llama')
        train = json.loads((run / 'run.json').read_text())['data']['train']
        shares.append(round(train['trained_share'] * train['tokens'] / train['rows']))
        assert (run / 'sample.txt').read_text(encoding='utf-8').count('⟦') == (1 if scope == 'last_round' else 3)
    row = encoder('llama').encode([chat('hi', 'yo', 'oh', 'hey there', 'who?', 'me')])[0]
    assert shares == [row.trained[1] - row.trained[0], sum(e - s for s, e in (*row.earlier, row.trained))]
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-2'), '--max_new_tokens', '2']) == 0
    assert json.loads((run / 'sft_args.json').read_text())['loss_scope'] == 'all_rounds'


def test_a_run_without_a_typed_scope_trains_every_reply_of_a_chat(run_sft: Callable[..., Path], tmp_path: Path) -> None:
    turns = [('user', 'hi'), ('assistant', 'yo'), ('user', 'who?'), ('assistant', 'me')]
    chats = [{'messages': [{'role': role, 'content': text} for role, text in turns]}] * 20
    data = str(write_jsonl(tmp_path / 'chats.jsonl', chats))
    run = run_sft('--dataset', data, '--max_steps', '1', '--template_type', 'llama')
    assert (run / 'sample.txt').read_text(encoding='utf-8').count('⟦') == 2
    said = 'loss is on every reply of rows with messages or conversations because --loss_scope is not typed: '
    decisions = json.loads((run / 'run.json').read_text())['decisions']
    assert [line for line in decisions if line.startswith(said)] == [
        f'{said}20 earlier replies carry loss too in 20 of 20 rows read'
    ]
    assert json.loads((run / 'sft_args.json').read_text())['loss_scope'] is None


# The generation prompt opens a think block. The last reply closes it; earlier replies have none.
OPENING = (
    '{% for m in messages %}{{ "<|im_start|>" + m.role + "\n" }}'
    '{% if m.role == "assistant" and loop.last %}{{ "</think>" }}{% endif %}{{ m.content }}'
    '{% for c in m.tool_calls or [] %}{{ "<call>" + (c.function | tojson) }}{% endfor %}'
    '{{ "<|im_end|>\n" }}{% endfor %}{% if add_generation_prompt %}{{ "<|im_start|>assistant\n<think>" }}{% endif %}'
)


def test_tags_that_begin_alike_are_never_cut_in_two() -> None:
    """The <think> of the generation prompt and the </think> of the whole chat share their first character."""
    tokenizer = make_tokenizer(chat_template=OPENING)
    tokenizer.add_tokens(['<think>', '</think>'])
    row = encoder(AUTO, tokenizer).encode([chat('hi', 'yo', 'who?', 'me')])[0]
    assert spans(row, tokenizer) == ['yo<|im_end|>', '</think>me<|im_end|>']
    assert tokenizer.decode(row.input_ids[: row.trained[0]]).endswith('<|im_start|>assistant\n<think>')


def test_an_earlier_call_is_trained_whole_where_its_turn_lacks_the_think_block_of_the_prompt() -> None:
    tokenizer = make_tokenizer(chat_template=OPENING)
    tokenizer.add_tokens(['<think>', '</think>'])
    row = chat('a', '', 'x', 'b')
    row.messages[1]['tool_calls'] = [{'type': 'function', 'function': {'name': 'f', 'arguments': {'at': 'it'}}}]
    row.messages[2]['role'] = 'tool'
    found = spans(encoder(AUTO, tokenizer).encode([row])[0], tokenizer)
    assert found == ['<call>{"name": "f", "arguments": {"at": "it"}}<|im_end|>', '</think>b<|im_end|>']


@pytest.mark.parametrize('name', ['auto', 'chatml'])
def test_an_empty_earlier_reply_carries_no_loss(name: str) -> None:
    tokenizer = make_tokenizer()
    encoder = make_encoder(
        tokenizer, template_type=name, system='', system_typed=False, max_length=-1, loss_scope='all_rounds'
    )
    for content, count in (('', 0), (' ', 0), ('yo', 1)):
        messages: list[Any] = [
            {'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': content},
            {'role': 'user', 'content': 'who?'}, {'role': 'assistant', 'content': 'me'},
        ]  # fmt: skip
        assert len(encoder.encode([Row(messages=messages)])[0].earlier) == count

"""The account of every character: exact on made-up rows, complete on random ones, and it notices a dropped field."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.support.tiny_models import make_tokenizer
from utils.base.names import LossScope
from utils.data.encode_plan import EncodedAgain
from utils.encode.account import Account
from utils.encode.encoder import Encoder
from utils.encode.make import make_encoder
from utils.encode.row_texts import row_texts
from utils.formats.columns import find_converter
from utils.formats.conversation import Row
from utils.formats.row_check import check_row

FULL = (
    '{% if tools %}{{ "<|im_start|>tools\n" + (tools | tojson) + "<|im_end|>\n" }}{% endif %}'
    '{% for m in messages %}{{ "<|im_start|>" + m.role + "\n" }}'
    '{% if m.name %}{{ "[name " + m.name + "]" }}{% endif %}'
    '{% if m.tool_call_id %}{{ "[to " + m.tool_call_id + "]" }}{% endif %}'
    '{% if m.reasoning_content %}{{ "<think>" + m.reasoning_content + "</think>" }}{% endif %}'
    '{{ m.content }}'
    '{% for c in m.tool_calls or [] %}{{ "<call>" + (c.id or "") + (c.function | tojson) }}{% endfor %}'
    '{{ "<|im_end|>\n" }}{% endfor %}{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}'
)


def encoder(template_type: str = 'auto', max_length: int = -1, scope: LossScope = 'last_round') -> Encoder:
    return make_encoder(
        make_tokenizer(chat_template=FULL), template_type=template_type, system=None, system_typed=False,
        max_length=max_length, loss_scope=scope,
    )  # fmt: skip


ENCODER = encoder()
AGAIN = EncodedAgain(ENCODER)


class Changed(EncodedAgain):
    """An encoder that encodes again with the same fault in the conversion."""

    def __init__(self, by: Encoder, change: Callable[[Row], None] | None) -> None:
        super().__init__(by)
        self.change = change

    def convert(self, written: Mapping[str, Any]) -> Row:
        row = super().convert(written)
        if self.change:
            self.change(row)
        return row


def account_of(raw: dict[str, Any], *, by: Encoder = ENCODER, change: Callable[[Row], None] | None = None) -> Account:
    converter = find_converter(raw)
    assert converter is not None
    row = converter(raw)
    if change:
        change(row)
    row.origin = 'row 1'
    account = Account()
    account.add(row, by.encode([row])[0], Changed(by, change))
    return account


def total(account: Account) -> int:
    return sum(count for counts in account.fields.values() for count in counts.values())


TOOL = {'name': 'lookupword', 'description': 'describesit', 'parameters': {'type': 'object', 'properties': {}}}
CHAT: dict[str, Any] = {
    'system': 'besystematic',
    'tools': [TOOL],
    'messages': [
        {'role': 'user', 'name': 'charlotte', 'content': 'questioning'},
        {
            'role': 'assistant', 'content': 'besidethecall', 'reasoning': 'firstreasons',
            'tool_calls': [
                {'id': 'callnumber1', 'function': {'name': 'lookupword', 'arguments': '{"q": "wanted\\nword"}'}},
            ],
        },
        {'role': 'tool', 'tool_call_id': 'callnumber1', 'content': 'toolresult'},
        {'role': 'assistant', 'content': 'finalanswer', 'reasoning_content': 'lastreasons'},
    ],
}  # fmt: skip


def test_a_chat_with_everything_is_used_to_the_last_character() -> None:
    account = account_of(CHAT)
    assert account.unused == {}
    assert account.fields['reply text'] == {'context': 13, 'trained': 11}
    assert account.fields['reasoning'] == {'context': 12, 'trained': 11}
    assert account.fields['user text'] == {'context': 11} and account.fields['system text'] == {'context': 12}
    assert account.fields['tool calls'] == {'context': 10 + 11 + 11}, 'name, argument, id'
    assert account.fields['message key `name`'] == {'context': 9}
    assert account.fields['message key `tool_call_id`'] == {'context': 11}
    assert account.fields['tools'] == {'context': 21, 'structure': 6}


def drop(key: str) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        for message in row.messages:
            message.pop(key, None)  # type: ignore[misc]

    return change


def no_text_beside(row: Row) -> None:
    for message in row.messages:
        if 'tool_calls' in message:
            message['content'] = ''


def no_description(row: Row) -> None:
    row.tools = [{'type': 'function', 'function': {**TOOL, 'description': ''}}]


def no_system(row: Row) -> None:
    row.messages = row.messages[1:]


@pytest.mark.parametrize(
    ('change', 'missed'),
    [
        (drop('name'), {'message key `name`'}),
        (drop('reasoning'), {'message key `reasoning`', 'message key `reasoning_content`'}),
        (drop('tool_call_id'), {'message key `tool_call_id`'}),
        (drop('tool_calls'), {'tool calls', 'tool call key `id`'}),
        (no_text_beside, {'reply text'}),
        (no_description, {'tools'}),
        (no_system, {'system text'}),
    ],
)
def test_a_field_that_conversion_drops_is_named(change: Callable[[Row], None], missed: set[str]) -> None:
    chat = json.loads(json.dumps(CHAT))
    if 'tool call key `id`' in missed:
        chat['messages'][2].pop('tool_call_id')
        chat['tools'] = None
    account = account_of(chat, change=change)
    assert set(account.unused) == missed
    assert total(account) == sum(len(row_text.text) for row_text in row_texts(chat))


def test_a_cut_row_says_what_it_lost() -> None:
    by = encoder(max_length=12)
    account = account_of({'query': 'questioning ' * 20, 'response': 'finalanswer'}, by=by)
    assert account.fields['user text']['cut'] > 200 and account.fields['reply text'].get('trained', 0) > 0
    assert total(account) == 12 * 20 + 11


def test_a_template_of_text_is_accounted_for_too() -> None:
    raw = {'query': 'questioning', 'response': ' finalanswer', 'history': [['before', 'earlier']], 'system': 'besystem'}
    account = account_of({**raw, 'system_prompt': 'ignored'}, by=encoder('chatml'))
    assert account.fields == {
        'system text': {'context': 8},
        'user text': {'context': 17},
        'reply text': {'context': 7, 'trained': 12},
        'column `system_prompt`': {'not used': 7},
    }
    assert account.unused == {'column `system_prompt`': 1}
    assert account.lines()[1] == 'not used: column `system_prompt` in 1 row'


def test_accounts_are_merged_and_rows_left_out_are_counted() -> None:
    account = account_of(CHAT)
    other = Account(**json.loads(json.dumps(account.record())))
    other.skip(CHAT, 'not drawn')
    size = total(account)
    account.merge(other)
    assert total(account) == 3 * size
    assert account.fields['user text'] == {'context': 22, 'not drawn': 11}


def random_row(
    rng: random.Random, *, scope: LossScope = 'last_round', longest: int = 13
) -> tuple[dict[str, Any], set[str], list[tuple[str, str]]]:
    """Return a row of a random layout, the names of its extra keys, and its texts with their buckets.

    Texts have up to `longest` letters; short ones occur inside others and inside the template's own text.
    """
    texts: list[tuple[str, str]] = []
    extra: set[str] = set()
    earlier = 'trained' if scope == 'all_rounds' else 'context'

    def word(bucket: str) -> str:
        made = ''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=rng.randrange(min(8, longest), longest + 1)))
        if longest < 3 and rng.random() < 0.3:
            made = rng.choice(['user', 'assistant', 'system', 'name', 'start', 'tools'])
        texts.append((made, bucket))
        return made

    def turn(role: str, bucket: str, keys: tuple[str, str]) -> dict[str, Any]:
        made = {keys[0]: role, keys[1]: word(bucket)}
        if role == 'user' and rng.random() < 0.3:
            made['name'] = word('context')
        if role == 'assistant' and rng.random() < 0.3:
            made[rng.choice(['reasoning', 'thinking', 'reasoning_content'])] = word(bucket)
        if rng.random() < 0.2:
            made['extrakey'] = word('not used')
            extra.add('message key `extrakey`')
        return made

    shape = rng.choice(['query', 'instruction', 'messages', 'conversations'])
    row: dict[str, Any] = {}
    if shape in ('query', 'instruction'):
        names = ('query', 'response') if shape == 'query' else ('instruction', 'output')
        row = {names[0]: word('context'), names[1]: word('trained')}
        if shape == 'instruction' and rng.random() < 0.5:
            row['input'] = word('context')
        row['history'] = [[word('context'), word(earlier)] for _ in range(rng.randrange(3))]
    else:
        keys = ('role', 'content') if shape == 'messages' else ('from', 'value')
        count = rng.randrange(1, 4)
        turns = []
        for number in range(count):
            bucket = 'trained' if number == count - 1 else earlier
            turns += [turn('user', 'context', keys), turn('assistant', bucket, keys)]
        row[shape] = json.dumps(turns) if rng.random() < 0.2 else turns
    if rng.random() < 0.3:
        row['system'] = word('context')
    if rng.random() < 0.3:
        row['tools'] = [{'name': word('context'), 'description': word('context')}]
    if rng.random() < 0.3:
        row['extracolumn'] = [{'nested': word('not used')}]
        extra.add('column `extracolumn`')
    return row, extra, texts


def in_all(account: Account) -> Counter[str]:
    """Return the characters of each bucket, summed over all labels, without those that are read as structure."""
    counted: Counter[str] = Counter()
    for counts in account.fields.values():
        counted.update(counts)
    del counted['structure']
    return counted


@pytest.mark.slow
@pytest.mark.parametrize('scope', ['last_round', 'all_rounds'])
@pytest.mark.parametrize('longest', [13, 2], ids=['long', 'short'])
def test_random_rows_are_accounted_for_in_full(longest: int, scope: LossScope) -> None:
    rng = random.Random(0)
    seen: set[str] = set()
    by = encoder(scope=scope)
    again = EncodedAgain(by)
    for _ in range(2000):
        raw, extra, texts = random_row(rng, scope=scope, longest=longest)
        converter = find_converter(raw)
        assert converter is not None
        row = converter(raw)
        row.origin = 'row 1'
        ids = by.encode([row])[0]
        account = Account()
        account.add(row, ids, again)
        assert set(account.unused) == extra, raw
        assert total(account) == sum(len(row_text.text) for row_text in row_texts(raw))
        shown = dict.fromkeys(('trained', 'context'), '')
        position = 0
        for start, end in [*ids.earlier, ids.trained]:
            shown['context'] += by.tokenizer.decode(ids.input_ids[position:start])
            shown['trained'] += by.tokenizer.decode(ids.input_ids[start:end])
            position = end
        expected: Counter[str] = Counter()
        for text, bucket in texts:
            assert bucket == 'not used' or text in shown[bucket], raw
            expected[bucket] += len(text)
        assert in_all(account) == expected, raw
        seen |= set(expected)
    assert seen == {'trained', 'context', 'not used'}


def without_key(rng: random.Random) -> Callable[[Row], None]:
    key = rng.choice(['name', 'reasoning', 'content', 'tools'])

    def change(row: Row) -> None:
        if key == 'tools':
            row.tools = None
        for message in row.messages[:-1]:
            if key == 'content' and message['role'] != 'system':
                message['content'] = '.'
            elif key in ('name', 'reasoning'):
                message.pop(key, None)  # type: ignore[misc]

    return change


def test_a_conversion_that_drops_a_field_is_seen_however_short_its_texts_are() -> None:
    rng = random.Random(1)
    named: Counter[str] = Counter()
    for _ in range(1000):
        raw, extra, _ = random_row(rng, longest=2)
        change = without_key(rng)
        whole, dropped = account_of(raw), account_of(raw, change=change)
        row = EncodedAgain(ENCODER).convert(raw)
        kept = EncodedAgain(ENCODER).convert(raw)
        change(kept)
        lost = text_of(row) - text_of(kept)
        assert in_all(dropped)['not used'] - in_all(whole)['not used'] == lost, raw
        named.update(set(dropped.unused) - extra)
    assert {'message key `name`', 'message key `reasoning`', 'user text', 'reply text', 'tools'} <= set(named)


def text_of(row: Row) -> int:
    """Return the number of text characters of a row, without a lone full stop and line ends between texts."""
    said = [message.get(key) or '' for message in row.messages for key in ('content', 'name', 'reasoning')]
    said += [tool['function'][key] for tool in row.tools or [] for key in ('name', 'description')]
    return sum(len(str(text).replace('\n', '')) for text in said if text != '.')


@pytest.mark.parametrize(
    ('raw', 'unused'),
    [
        # A name that equals a role, which the template prints anyway.
        ({'messages': [{'role': 'user', 'name': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'ho'}]},
         {'message key `name`'}),
        # Reasoning that also occurs in the reply and in the question.
        ({'messages': [{'role': 'user', 'content': 'yes or no?'}, {'role': 'assistant', 'content': 'yes, it is',
                                                                   'reasoning': 'yes'}]},
         {'message key `reasoning`'}),
        # The id of a call that equals the number in its result.
        ({'messages': [{'role': 'user', 'content': 'what is 7?'}, {'role': 'assistant', 'content': '7', 'name': '7'}]},
         {'message key `name`'}),
        ({'system': 'a', 'messages': [{'role': 'user', 'content': 'a cat'}, {'role': 'assistant', 'content': 'a'}]},
         set()),
    ],
)  # fmt: skip
def test_a_text_that_stands_elsewhere_too_is_judged_by_its_own_place(raw: dict[str, Any], unused: set[str]) -> None:
    plain = make_encoder(make_tokenizer(), template_type='auto', system='', system_typed=False, max_length=-1)
    account = account_of(raw, by=plain)
    assert set(account.unused) == unused
    assert total(account) == sum(len(row_text.text) for row_text in row_texts(raw))


def test_a_system_text_without_a_place_is_not_used_though_the_question_repeats_it() -> None:
    account = account_of({'system': 'a', 'query': 'a cat', 'response': 'a'}, by=encoder('baichuan'))
    assert account.fields == {
        'user text': {'context': 5}, 'reply text': {'trained': 1}, 'system text': {'not used': 1},
    }  # fmt: skip


@pytest.mark.parametrize('max_length', [20, 40, 60])
def test_what_is_cut_of_a_template_with_token_ids_is_exact(max_length: int) -> None:
    by = encoder('llama', max_length=max_length)
    raw = {'query': '0123456789' * 4, 'response': 'ok', 'history': [['9876543210' * 2, 'uv']]}
    account = account_of(raw, by=by)
    kept = by.tokenizer.decode(by.encode([EncodedAgain(by).convert(raw)])[0].input_ids)
    assert account.fields['user text'].get('cut', 0) == 60 - len(re.findall('[0-9]', kept))


def test_a_word_that_is_cut_off_is_not_taken_for_the_same_word_further_on() -> None:
    raw = {'history': [['go', 'went '], ['x' * 40, 'went']], 'query': 'go', 'response': 'went'}
    account = account_of(raw, by=encoder(max_length=40))
    assert account.fields['reply text'] == {'cut': 5, 'context': 4, 'trained': 4}


def test_blanks_around_a_text_that_the_template_trims_are_told_apart() -> None:
    trims = make_encoder(
        make_tokenizer(chat_template=FULL.replace('{{ m.content }}', '{{ m.content.strip() }}')),
        template_type='auto', system=None, system_typed=False, max_length=-1,
    )  # fmt: skip
    account = account_of({'query': ' user ', 'response': 'user'}, by=trims)
    assert account.fields == {'user text': {'context': 4, 'trimmed': 2}, 'reply text': {'trained': 4}}


def test_tools_that_the_template_leaves_out_are_not_used_though_a_call_repeats_their_words() -> None:
    function = {'name': 'depth_of_lake', 'description': 'tells the depth'}
    call = {'type': 'function', 'function': {'name': 'depth_of_lake', 'arguments': {'at': 'Baikal'}}}
    raw = {
        'messages': [
            {'role': 'user', 'content': 'how deep?'},
            {'role': 'assistant', 'content': '', 'tool_calls': [call]},
        ],
        'tools': [{'type': 'function', 'function': function}],
    }
    converter = find_converter(raw)
    assert converter is not None
    row = check_row(converter(raw))
    encoder = make_encoder(make_tokenizer(), template_type='auto', system='', system_typed=False, max_length=-1)
    account = Account()
    account.add(row, encoder.encode([row])[0], EncodedAgain(encoder))
    assert account.fields['tools'] == {
        'structure': len('function'),
        'not used': len('depth_of_lake' + 'tells the depth'),
    }
    assert account.unused == {'tools': 1}

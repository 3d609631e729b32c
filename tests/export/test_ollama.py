"""The TEMPLATE of a Modelfile gives the text of the chat template, or the reason why it cannot is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig

from tests.support.go_template import render_go
from tests.support.tiny_models import CHATML, make_tokenizer
from utils.encode.jinja import jinja_of
from utils.encode.make import make_encoder
from utils.encode.template_encoder import TemplateEncoder
from utils.export.ollama import NotExpressible, Turns, compare_turns, learn_turns, modelfile
from utils.formats.conversation import Row
from utils.preprocess import TEMPLATE_MAPPING
from utils.proofs.template import probes

CHATS = [row for row in probes() if not row.tools and all(m.keys() == {'role', 'content'} for m in row.messages[:-1])]


def renderer(source: str) -> Callable[[Any], str]:
    tokenizer = make_tokenizer(chat_template=source)
    return lambda messages: str(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    )


def go_gives_the_same(source: str) -> int:
    """Compare the Go template with the chat template on the probes. Returns how many gave the same text."""
    render = renderer(source)
    template = learn_turns(render).go_template()
    same = 0
    for row in CHATS:
        messages = [{'role': turn['role'], 'content': turn['content'].strip()} for turn in row.messages[:-1]]
        system = messages[0]['content'] if messages[0]['role'] == 'system' else ''
        try:
            wanted = render(messages)
        except TemplateError:  # the template refuses a system text
            continue
        same += render_go(template, system=system, messages=messages) == wanted
    return same


def test_go_templates_of_real_chat_templates_give_the_same_text() -> None:
    spec = find_spec('trl')
    if spec is None or spec.origin is None:
        pytest.skip('trl is not installed: pip install -r requirements-all.txt')
    found: Counter[str | int] = Counter()
    for file in sorted(Path(spec.origin).with_name('chat_templates').glob('*.jinja')):
        if file.stem.endswith('_training'):
            continue
        try:
            found[go_gives_the_same(file.read_text(encoding='utf-8'))] += 1
        except NotExpressible as error:
            found[str(error).partition(':')[0]] += 1
    # gemma has no system text. Three templates want the texts of a user as parts, beside images.
    assert found.pop('the text of the user is not printed exactly once and in order') == 2
    assert found.pop('it refuses a chat of three rounds') == 1
    assert found[len(CHATS)] >= 37 and set(found) == {len(CHATS), len(CHATS) - 2}


@pytest.mark.parametrize('name', ['default', 'chatml', 'llama', 'openbuddy', 'internlm', 'xverse', 'ziya'])
def test_registered_templates_give_the_same_text(name: str) -> None:
    encoder = make_encoder(make_tokenizer(), template_type=name, system='be kind', system_typed=False, max_length=-1)
    assert isinstance(encoder, TemplateEncoder)
    template = TEMPLATE_MAPPING[name]
    assert template is not None
    compared = compare_turns(learn_turns(renderer(jinja_of(encoder))), renderer(jinja_of(encoder)), probes())
    assert (compared.equal, compared.stripped) == (len(CHATS) - (0 if template.has_system else 2), 0)
    if template.has_system:
        assert go_gives_the_same(jinja_of(encoder)) == len(CHATS)


ROUNDS = CHATML.replace("message['content']", "loop.index | string + message['content']")
SWAPPED = CHATML.replace('in messages', 'in messages | reverse')
SINGLE = "{% if messages | length > 2 %}{{ raise_exception('single-turn') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ('source', 'reason'),
    [
        (ROUNDS, 'the text around a turn depends on its position'),
        (SWAPPED, 'the text of the assistant is not printed exactly once and in order'),
        (SINGLE, 'it refuses a chat of three rounds: single-turn'),
    ],
)
def test_templates_that_ollama_cannot_express_are_refused_with_the_reason(source: str, reason: str) -> None:
    with pytest.raises(NotExpressible, match=reason):
        learn_turns(renderer(source))


def test_a_text_that_changes_with_its_content_is_noticed_on_the_rows_of_the_user() -> None:
    source = CHATML.replace("message['content']", "(message['content'] | replace('€', 'EUR') | trim)")
    turns = learn_turns(renderer(source))
    compared = compare_turns(turns, renderer(source), probes())
    assert (compared.equal, compared.stripped, compared.unlike) == (7, 1, 2)
    assert compared.sentence() == (
        'its TEMPLATE gives the text of the chat template on 7 conversations, on 1 more except blanks at the ends of '
        'texts, which Ollama keeps; 2 with tools, reasoning or other turns need a server that runs the chat template'
    )
    euro = Row(messages=[{'role': 'user', 'content': '5 €'}, {'role': 'assistant', 'content': 'ok'}], origin='rows:1')
    with pytest.raises(NotExpressible, match='the prompt of rows:1 would be a different text'):
        compare_turns(turns, renderer(source), [euro])


def test_texts_with_quotes_braces_and_line_breaks_are_written_exactly() -> None:
    odd = 'a "quoted" \\ {{ .Role }} }} """\n\t\x01é'
    turns = Turns(opening=odd, before_reply='R', after_reply='N', before_answer=odd, before_system='', after_system='S')
    chat = [{'role': role, 'content': role} for role in ('user', 'assistant', 'user')]
    template = turns.go_template()
    assert render_go(template, system='', messages=chat) == turns.prompt(chat)
    assert '"""' not in template, 'the Modelfile puts the template between three quotes'
    answered = [*chat, {'role': 'assistant', 'content': 'begun'}]
    assert render_go(template, system='', messages=answered).endswith('userRbegun'), 'Ollama continues a begun answer'
    assert turns.without_bos('a ').opening == odd[2:]


def test_a_modelfile_states_what_ollama_would_choose_otherwise() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, repetition_penalty=1.0, max_new_tokens=None)
    text = modelfile(
        'My.gguf',
        template=None,
        system='say "hi" to me',
        stops=['</s>', '\nUser:'],
        config=config,
        max_length=8192,
        note='a\nb',
    )
    assert text == (
        '# ollama create my -f My.Modelfile\nFROM ./My.gguf\n# a\n# b\n'
        'SYSTEM """say "hi" to me"""\nPARAMETER stop "</s>"\n'
        'PARAMETER stop """\nUser:"""\nPARAMETER temperature 0.7\nPARAMETER top_k 50\nPARAMETER top_p 1.0\n'
        'PARAMETER repeat_penalty 1.0\nPARAMETER num_ctx 8192\n'
    )

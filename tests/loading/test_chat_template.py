"""--chat_template and --template_settings: what is read from files and words, and the lines in front of a template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import CHATML, make_tokenizer
from utils.base.errors import ConfigError
from utils.loading.chat_template import folder_templates, read_chat_template, set_chat_template, write_templates
from utils.loading.template_settings import (
    Templates,
    add_settings,
    as_word,
    parse_settings,
    settings_problems,
    split_settings,
)
from utils.loading.template_source import read_variables

SHOWS = '{{ messages | length }}|{{ a is defined }}|{{ a | tojson }}'
CHAT = [{'role': 'user', 'content': 'q'}]


def shown(template: str, **keywords: Any) -> str:
    """Return what transformers renders."""
    tokenizer = make_tokenizer(chat_template=template)
    return str(tokenizer.apply_chat_template(CHAT, tokenize=False, **keywords))


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('true', True), ('False', False), ('none', None), ('null', None), ('3', 3), ('-0.5', -0.5), ('1e-07', 1e-07),
        ('low', 'low'), ('', ''), ('a=b', 'a=b'), ('1.2.3', '1.2.3'), ('007', '007'), ('1e999', '1e999'),
        ('"true"', 'true'), ('[1, "a", null]', [1, 'a', None]), ('{"k": {"l": [true]}}', {'k': {'l': [True]}}),
        ('say "hi" -%}\n{{ x }} {# 🙂', 'say "hi" -%}\n{{ x }} {# 🙂'), ("back\\slash 'q'", "back\\slash 'q'"),
    ],
)  # fmt: skip
def test_a_value_in_front_of_a_template_is_the_value_passed_as_a_keyword(text: str, value: Any) -> None:
    settings = parse_settings([f'a={text}'])
    assert settings == {'a': value} and type(settings['a']) is type(value)
    written = add_settings(SHOWS, settings)
    assert shown(written) == shown(SHOWS, a=value) == f'1|True|{json.dumps(value, ensure_ascii=False)}'
    assert shown(written, a='other') == shown(written), 'a caller does not change it'
    assert split_settings(written) == (settings, SHOWS)
    assert parse_settings([as_word('a', value)]) == settings


@pytest.mark.parametrize(
    'begin', ['', '\n', '   ', '\n\n  {% if true %}\n  x{% endif %}\n', '{#- note #}\n ', '{{ a }}']
)
def test_lines_in_front_print_nothing(begin: str) -> None:
    source = begin + SHOWS
    assert shown(add_settings(source, {'a': 1, 'b': 'x'})) == shown(source, a=1)


def test_settings_are_replaced_in_their_line_and_written_once() -> None:
    once = add_settings(SHOWS, {'a': 1, 'b': [2]})
    assert once == f'{{%- set a = 1 -%}}\n{{%- set b = [2] -%}}\n{SHOWS}'
    assert add_settings(once, {'a': 1, 'b': [2]}) == once
    assert add_settings(once, {'b': None, 'c': -3}) == (
        f'{{%- set a = 1 -%}}\n{{%- set b = none -%}}\n{{%- set c = -3 -%}}\n{SHOWS}'
    )


@pytest.mark.parametrize(
    'line',
    [
        '{%- set a = namespace(x=1) -%}\n', '{%- set a = 1 + 1 -%}\n', '{%- set a = 1 -%}{%- set b = 2 -%}\n',
        '{%- set messages = [] -%}\n', '{%- set a = b -%}\n', '{%- set a = 9**9**9**9 -%}\n', '{%- set a = " -%}\n',
        '{% set a = 1 %}\n',
    ],
)  # fmt: skip
def test_what_a_template_computes_is_no_setting(line: str) -> None:
    assert split_settings(line + SHOWS) == ({}, line + SHOWS)


READS = {
    '{{ x }}': {'x'},
    '{% set x = 1 %}{{ x }}': set(),
    '{{ x }}{% set x = 1 %}': {'x'},
    '{% set x = x %}': {'x'},
    '{% if x is defined %}{% endif %}': {'x'},
    '{% if not x is defined %}{% set x = 1 %}{% endif %}{{ x }}': {'x'},
    '{% if y %}{% set x = 1 %}{% else %}{% set x = 2 %}{% endif %}{{ x }}': {'y'},
    '{% if y %}{% set x = 1 %}{% elif z %}{% endif %}{{ x }}': {'x', 'y', 'z'},
    '{% if y %}{% set x = 1 %}{% else %}{{ raise_exception("no") }}{% endif %}{{ x }}': {'y'},
    '{% for x in y if x > z %}{{ x }}{{ loop.index }}{% else %}{{ x }}{% endfor %}': {'y', 'z', 'x'},
    '{% for i in y %}{% set x = i %}{% endfor %}{{ x }}': {'y', 'x'},
    '{% macro m(a, b=c) %}{{ a }}{{ b }}{{ d }}{{ e }}{% endmacro %}{% set e = 1 %}{{ m(1) }}': {'c', 'd'},
    '{% macro m() %}{{ caller() }}{% endmacro %}{% call(a) m() %}{{ a }}{{ b }}{% endcall %}': {'b'},
    '{% set ns = namespace(x=y) %}{% set ns.x = 1 %}{{ ns.x }}{{ range(3) }}{{ strftime_now("%d") }}': {'y'},
    '{% set ns.x = 1 %}': {'ns'},
    '{% with a = b %}{{ a }}{% endwith %}{{ a }}': {'b', 'a'},
    '{% set x %}{{ y }}{% endset %}{{ x }}': {'y'},
    '{% block b %}{{ x }}{% endblock %}{% filter upper %}{{ y }}{% endfilter %}': {'x', 'y'},
    '{% generation %}{{ x }}{% endgeneration %}{% for a in b %}{% break %}{% endfor %}': {'x', 'b'},
    '{% set a, b = c %}{{ a }}{{ b }}': {'c'},
    "{{ messages[0]['x'].y | tojson }}": {'messages'},
}


def test_variables_are_what_a_template_reads_before_it_sets_it() -> None:
    for source, names in READS.items():
        assert read_variables(source) == names, source


# A variable that is read in every way in which Jinja looks a name up.
SCOPES = (
    '{% macro late() %}[{{ v }}]{% endmacro %}{% macro given(v) %}({{ v }}){% endmacro %}{% set ns = namespace(n=v) %}'
    '{% for m in messages %}{{ v }}{% set v = "inner" %}{{ v }}{% endfor %}{{ v }}{{ late() }}{{ given(1) }}{{ ns.n }}'
    '{% block b %}{{ v }}{% endblock %}{% macro around() %}<{{ caller() }}{{ v }}>{% endmacro %}'
    '{% call around() %}{{ v }}{% endcall %}'
    '{% filter upper %}{{ v }}{% endfilter %}'
    '{% with v = v ~ "w" %}{{ v }}{{ late() }}{% endwith %}{% set w %}{{ v }}{% endset %}{{ w }}{{ self.b() }}'
    '{% if v is not defined %}none{% elif v is none %}null{% else %}{{ v | default("d", true) }}{% endif %}'
    '{% macro twice() %}{% for i in [1, 2] %}{{ late() }}{% endfor %}{% endmacro %}{{ twice() }}'
)


@pytest.mark.parametrize('value', [False, True, None, 'text', 0, [1], {'k': 'v'}])
def test_a_setting_reaches_every_scope_as_a_keyword_does(value: Any) -> None:
    written = add_settings(SCOPES, {'v': value})
    assert shown(written) == shown(SCOPES, v=value) == shown(written, v='other')
    assert shown(written) != shown(SCOPES)


def test_words_that_are_no_settings_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(['thinking', 'a=1', 'a=2', '1x=3', 'b=[1,', 'c={"n": NaN}'])
    example = 'Type e.g. --template_settings enable_thinking=false.'
    quotes = 'Put the whole word in single quotes, and separate settings by blanks.'
    assert caught.value.problems == (
        f"--template_settings takes name=value, got 'thinking'. {example}",
        "--template_settings: 'a' is set twice. Set it once.",
        f"--template_settings takes name=value, got '1x=3'. {example}",
        "--template_settings b: '[1,' is not valid JSON (Expecting value: line 1 column 4 (char 3)). " + quotes,
        '--template_settings c: \'{"n": NaN}\' is not valid JSON (NaN is no number of JSON). ' + quotes,
    )


def test_names_are_those_that_any_of_the_templates_reads() -> None:
    templates: Templates = {
        'default': '{{ messages }}{{ enable_thinking }}{{ bos_token }}{{ image_token }}',
        'tool_use': '{%- set effort = "low" -%}\n{{ messages }}{{ effort }}',
    }
    assert settings_problems(['enable_thinking', 'effort'], templates) == []
    reads = 'It reads effort, enable_thinking.'
    filled = 'is filled for each chat and cannot be set. Leave it out, or change the template with --chat_template.'
    assert settings_problems(['enable_thinkin', 'x', 'bos_token', 'image_token'], templates, ['image_token']) == [
        "--template_settings: the chat template has no variable 'enable_thinkin': did you mean 'enable_thinking'? "
        + reads,
        f"--template_settings: the chat template has no variable 'x'. {reads}",
        f"--template_settings: 'bos_token' {filled}",
        f"--template_settings: 'image_token' {filled}",
    ]
    assert settings_problems(['x'], '{{ messages }}') == [
        "--template_settings: the chat template has no variable 'x'. It has no settings. Leave --template_settings out."
    ]


BAD_FILES = {
    'gone': (None, '{path} is not there (looked in {folder}). Correct the path.'),
    'empty': (b' \n', '{path} has an empty chat template. Give a file with a Jinja chat template.'),
    'latin': (b'{{ messages }}\xff', None),
    'tag': (
        b'{{ messages }}\n{% if a %}\n{% endfor %}\n',
        "{path}: line 3 is not valid Jinja: Encountered unknown tag 'endfor'. Jinja was looking for the following "
        "tags: 'elif' or 'else' or 'endif'. The innermost block that needs to be closed is 'if'. Correct this line.",
    ),
    'filter': (
        b'{{ messages }}\n{{ a | shout }}',
        "{path}: line 2 is not valid Jinja: No filter named 'shout'. Correct this line.",
    ),
    'other': (
        b'{"chat_template": 1}',
        '{path} does not read `messages`, so it cannot render a chat. Give a file with a Jinja chat template.',
    ),
    'deep': (b'{{ messages }}{{ ' + b'(' * 100_000, None),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_a_file_that_is_no_template_is_named(name: str, tmp_path: Path) -> None:
    content, says = BAD_FILES[name]
    path = tmp_path / f'{name}.jinja'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_chat_template(path)
    (problem,) = caught.value.problems
    if name == 'latin':
        assert problem == f'{path} is not UTF-8 (byte 14). Save it as UTF-8.'
    elif name == 'deep':
        assert problem.startswith(f'--chat_template {path} is too large or too deeply nested for Jinja: ')
        assert problem.endswith('Simplify the template.')
    else:
        assert says is not None and problem == f'--chat_template {says.format(path=path, folder=tmp_path)}'


@pytest.mark.skipif(not Path('/proc/self/mem').is_file(), reason='a file that exists and cannot be read')
def test_a_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        read_chat_template(Path('/proc/self/mem'))
    assert str(caught.value) == '/proc/self/mem cannot be read: Input/output error. Correct its permissions.'


def test_a_folder_without_a_template_is_named(tmp_path: Path) -> None:
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_chat_template(tmp_path)
    assert str(caught.value) == (
        f'--chat_template {tmp_path} has no chat template. Give a file with a Jinja chat template.'
    )


def test_a_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    (tmp_path / 'chat_template.jinja').write_bytes(b'\xef\xbb\xbf{{ messages }}\r\n{{ 1 }}\r\n')
    assert read_chat_template(tmp_path / 'chat_template.jinja') == '{{ messages }}\n{{ 1 }}\n'


NAMED = {'default': CHATML, 'tool_use': '{{ messages }}{{ a }}'}


@pytest.mark.parametrize('templates', [CHATML, NAMED], ids=['one', 'named'])
def test_a_folder_gives_what_its_tokenizer_has(templates: Templates, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(tmp_path / 'saved')
    tokenizer.save_pretrained(tmp_path / 'old', save_jinja_files=False)
    write_templates(tmp_path, templates)
    for folder in (tmp_path / 'saved', tmp_path / 'old', tmp_path):
        assert folder_templates(folder) == templates
    assert AutoTokenizer.from_pretrained(tmp_path / 'old').chat_template == templates


def test_settings_are_written_into_every_named_template_and_a_file_replaces_all(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NAMED
    set_chat_template(tokenizer, None, {'a': False})
    line = '{%- set a = false -%}\n'
    assert tokenizer.chat_template == {name: line + source for name, source in NAMED.items()}
    file = tmp_path / 'mine.jinja'
    file.write_text('{{ messages }}')
    set_chat_template(tokenizer, str(file), {})
    assert tokenizer.chat_template == '{{ messages }}'


def test_settings_need_a_template_and_its_variables() -> None:
    with pytest.raises(ConfigError, match='this tokenizer has no chat template. Name one with --chat_template.'):
        set_chat_template(make_tokenizer(chat_template=None), None, {'a': 1})
    with pytest.raises(ConfigError, match="the chat template has no variable 'a'"):
        set_chat_template(make_tokenizer(), None, {'a': 1})


def test_markers_outside_of_the_vocabulary_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / 'mine.jinja'
    file.write_text("{{ '<|im_start|>' }}{{ messages }}<|end|><start_of_turn>{# <|note|> #}")
    set_chat_template(make_tokenizer(), str(file), {})
    assert 'contains <|end|>, <start_of_turn>, and the vocabulary of this tokenizer does not' in caplog.text.replace(
        '<start_of_turn>, <|end|>', '<|end|>, <start_of_turn>'
    )
    assert 'write them to a text file, one per line, and use --new_tokens FILE.' in caplog.text

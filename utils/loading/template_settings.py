"""Settings of a chat template (name=value). A setting gives a variable of the template a fixed value.

Each setting is written as a line before the template, for example `{%- set enable_thinking = false -%}`. The lines are
saved with the template in every checkpoint, so every server renders prompts as in training. If a caller passes a value
for such a variable, the line replaces this value.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from utils.base.errors import ConfigError, did_you_mean
from utils.loading.template_source import SUPPLIED, environment, read_variables

# The chat template of a tokenizer: one text, or several texts by name.
Templates = str | dict[str, str]

_WORD = re.compile(r'([A-Za-z_]\w*)=(.*)', re.DOTALL)
_NUMBER = re.compile(r'-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?')
_LINE = re.compile(r'\{%- set ([A-Za-z_]\w*) = (.*?) (-?)%\}\n')
_WORDS: Mapping[str, Any] = {'true': True, 'false': False, 'none': None, 'null': None}
_EXAMPLE = 'Type e.g. --template_settings enable_thinking=false.'


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return a dictionary from the names of the settings to their values. Raises ConfigError with all problems."""
    settings: dict[str, Any] = {}
    problems = []
    for word in words:
        match = _WORD.fullmatch(word)
        if match is None:
            problems.append(f"--template_settings takes name=value, got '{word}'. {_EXAMPLE}")
            continue
        name, text = match.groups()
        if name in settings:
            problems.append(f"--template_settings: '{name}' is set twice. Set it once.")
        try:
            settings[name] = _parse_value(text)
        except ValueError as error:
            problems.append(
                f"--template_settings {name}: '{text}' is not valid JSON ({error}). Put the whole word in single "
                'quotes, and separate settings by blanks.'
            )
    if problems:
        raise ConfigError(*problems)
    return settings


def setting_names(words: Sequence[str]) -> list[str]:
    """Return the name in each word of the form name=value, even if its value is not valid."""
    return [match[1] for word in words if (match := _WORD.fullmatch(word))]


def _parse_value(text: str) -> Any:
    """Return the value that a text states: true, false, none, a number, or a JSON list, object or string.

    Any other text is returned unchanged. Raises ValueError if the text begins with [, { or " and is not valid JSON.
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text[:1] in ('[', '{', '"'):
        return json.loads(text, parse_constant=_refuse_constant)
    if not _NUMBER.fullmatch(text):
        return text
    number = json.loads(text)
    return number if math.isfinite(number) else text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f'{name} is no number of JSON')


def as_word(name: str, value: Any) -> str:
    """Return the text name=value, as the user would type it."""
    if value is None:
        return f'{name}=none'
    is_plain = isinstance(value, str) and value[:1] not in ('[', '{', '"') and _parse_value(value) == value
    return f'{name}={value if is_plain else json.dumps(value, ensure_ascii=False)}'


def _literal(value: Any) -> str:
    """Return a value as source text of Jinja, which is JSON except that null is written as none."""
    if value is None:
        return 'none'
    if isinstance(value, list):
        return f'[{", ".join(map(_literal, value))}]'
    if isinstance(value, dict):
        return f'{{{", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items())}}}'
    return json.dumps(value, ensure_ascii=False)


@functools.lru_cache(maxsize=32)
def split_settings(source: str) -> tuple[dict[str, Any], str]:
    """Return the settings in the lines at the beginning of a template, and the rest of the template."""
    lines, rest = _split_lines(source)
    return {name: value for name, value, _ in lines}, rest


def _split_lines(source: str) -> tuple[list[tuple[str, Any, str]], str]:
    """Return a list with (name, value, line) for each setting at the beginning of a template, and the rest."""
    lines = []
    while match := _LINE.match(source):
        value = _constant(match[0])
        if value is None or match[1] in SUPPLIED:
            break
        lines.append((match[1], value[0], match[0]))
        source = source[match.end() :]
    return lines, source


def _constant(line: str) -> tuple[Any] | None:
    """Return a tuple with the value that a line sets. Returns None if the line does more than set one constant."""
    from jinja2 import TemplateSyntaxError, nodes

    try:
        body = environment().parse(line).body
    except TemplateSyntaxError:
        return None
    if len(body) != 1 or not isinstance(body[0], nodes.Assign):
        return None
    value = body[0].node
    plain = (nodes.Const, nodes.List, nodes.Dict, nodes.Pair, nodes.Neg)
    if not isinstance(value, nodes.Expr) or not all(isinstance(n, plain) for n in (value, *value.find_all(nodes.Node))):
        return None
    return (value.as_const(),)


def add_settings(source: str, settings: Mapping[str, Any]) -> str:
    """Return the template with one line for each setting at its beginning.

    If the template already begins with a line that sets the same name, this line is replaced.
    """
    lines, rest = _split_lines(source)
    kept = {name for name, _, _ in lines}
    written = [
        _line(name, settings[name], strips=line.endswith('-%}\n')) if name in settings else line
        for name, _, line in lines
    ]
    # The minus removes the line end in every program. It would also remove blanks with which the template begins.
    # Before such a template, the line end is removed by the option trim_blocks, which servers set.
    strips = not rest[:1].isspace()
    written += [_line(name, value, strips=strips) for name, value in settings.items() if name not in kept]
    return ''.join(written) + rest


def _line(name: str, value: Any, *, strips: bool) -> str:
    return f'{{%- set {name} = {_literal(value)} {"-" if strips else ""}%}}\n'


def sources_of(templates: Templates) -> list[str]:
    """Return a list with the text of each template."""
    return list(templates.values()) if isinstance(templates, dict) else [templates]


def change_each(templates: Templates, change: Callable[[str], str]) -> Templates:
    """Return the templates with `change` applied to each text."""
    if isinstance(templates, dict):
        return {name: change(source) for name, source in templates.items()}
    return change(templates)


def settings_problems(settings: Iterable[str], templates: Templates, supplied: Iterable[str] = ()) -> list[str]:
    """Return a message for each name that is not a setting of the templates.

    A name is a setting if a template reads a variable of this name, or if a template begins with a line that sets it,
    such as `{%- set enable_thinking = false -%}`. Variables that the tokenizer supplies are not settings. `supplied`
    has further variables that this tokenizer supplies, e.g. its special tokens.
    """
    filled = {*SUPPLIED, *supplied}
    known: set[str] = set()
    for source in sources_of(templates):
        known |= read_variables(source) | split_settings(source)[0].keys()
    known -= filled

    reads = f'It reads {", ".join(sorted(known))}.' if known else 'It has no settings. Leave --template_settings out.'
    problems = []
    for name in settings:
        if name in filled:
            problems.append(
                f"--template_settings: '{name}' is filled for each chat and cannot be set. Leave it out, or change the "
                'template with --chat_template.'
            )
        elif name not in known:
            problems.append(
                f"--template_settings: the chat template has no variable '{name}'{did_you_mean(name, known)} {reads}"
            )
    return problems

"""Checks an entry of TEMPLATE_MAPPING before anything is loaded. A wrong entry would silently drop text of the data."""

from __future__ import annotations

import re

from utils.base.errors import did_you_mean
from utils.preprocess import Template

# The placeholders that are replaced in the texts of each field.
_PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    'prefix': ('{{SYSTEM}}',),
    'prompt': ('{{QUERY}}', '{{ROUND}}'),
    'chat_sep': (),
    'suffix': (),
}
# Also matches what was meant to be a placeholder, such as {{ query }}.
_PLACEHOLDER = re.compile(r'\{\{\s*\w+\s*\}\}')


def entry_problems(name: str, template: Template) -> list[str]:
    """Return a message for each mistake in the entry `name`. Returns [] if there is none."""
    entry = f'--template_type {name}: its entry in utils/preprocess.py'
    if not isinstance(template, Template):
        return [f'{entry} is a {type(template).__name__}, not a Template. Remove a comma behind Template(...).']

    problems = []
    for field, known in _PLACEHOLDERS.items():
        pieces = getattr(template, field)
        if isinstance(pieces, tuple):
            problems += [f'{entry}, {field}: {fault}' for piece in pieces for fault in _faults(piece, known)]
        elif not (field == 'chat_sep' and pieces is None):
            problems.append(f'{entry}, {field}: {pieces!r} is no tuple. Write ({pieces!r},), with the comma.')
    if problems:
        return problems

    if not any('{{QUERY}}' in piece for piece in template.prompt if isinstance(piece, str)):
        problems.append(
            f'{entry}, prompt: it has no {{{{QUERY}}}}, so the model would see no question. Add {{{{QUERY}}}}.'
        )
    if not template.suffix:
        problems.append(
            f"{entry}, suffix: it is empty, so the model would not learn to end a reply. Write (('eos_token_id',),)."
        )
    return problems


def _faults(piece: object, known: tuple[str, ...]) -> list[str]:
    """Return what is wrong with a piece of a template. `known` has the placeholders that its field can have."""
    if isinstance(piece, tuple):
        if all(isinstance(part, int | str) for part in piece):
            return []
        return [f"{piece!r} has parts that are neither token ids nor names. Write e.g. ('eos_token_id',)."]
    if not isinstance(piece, str):
        return [f'{piece!r} is neither a text nor a tuple. Write ({piece!r},) for the token with this id.']

    unknown = [match[0] for match in _PLACEHOLDER.finditer(piece) if match[0] not in known]
    has = ' and '.join(known) if known else 'no placeholders'
    return [f'{word} is unknown{did_you_mean(word, known)} This field has {has}.' for word in unknown]

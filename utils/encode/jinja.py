"""Writes a registered template as a chat template in Jinja, for servers that load a merged folder."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence

from jinja2.exceptions import TemplateError

from utils.base.errors import ConfigError
from utils.encode.encoder import Encoder
from utils.encode.template_encoder import TemplateEncoder
from utils.encode.text_encoder import TextEncoder
from utils.formats.conversation import Row
from utils.preprocess import Piece

# The Jinja template for a chat: first a system text, which is optional, then turns of user and assistant.
_FRAME = """\
{{%- if messages[0]['role'] == 'system' %}}{{%- set system = messages[0]['content'] %}}\
{{%- set turns = messages[1:] %}}\
{{%- else %}}{{%- set system = {system} %}}{{%- set turns = messages %}}{{%- endif %}}\
{refuse}{prefix}{{%- for turn in turns %}}\
{{%- if turn['role'] == 'user' %}}{prompt}\
{{%- elif turn['role'] == 'assistant' %}}{{{{- turn['content'] }}}}\
{{%- if loop.last %}}{suffix}{{%- else %}}{chat_sep}{{%- endif %}}\
{{%- else %}}{{{{- raise_exception('this template has only system, user and assistant turns') }}}}{{%- endif %}}\
{{%- endfor %}}"""
_SINGLE = "{%- if turns | length > 2 %}{{- raise_exception('this template is single-turn') }}{%- endif %}"
_PLACES = {
    '{{SYSTEM}}': 'system',
    '{{QUERY}}': "turn['content']",
    '{{ROUND}}': '(loop.index0 // 2 + 1)',
}


def jinja_of(encoder: TemplateEncoder) -> str:
    """Return the registered template as Jinja source. Token ids in the template become the text of their tokens."""
    tokenizer, template = encoder.tokenizer, encoder.template

    def print_pieces(pieces: Iterable[Piece]) -> str:
        texts = [
            piece if isinstance(piece, str) else ''.join(tokenizer.decode([encoder.token_id(part)]) for part in piece)
            for piece in pieces
        ]
        parts = re.split(f'({"|".join(map(re.escape, _PLACES))})', ''.join(texts))
        expressions = [_PLACES.get(part) or json.dumps(part, ensure_ascii=False) for part in parts if part]
        return ''.join(f'{{{{- {expression} }}}}' for expression in expressions)

    return _FRAME.format(
        system=json.dumps(encoder.system, ensure_ascii=False),
        refuse=_SINGLE if template.chat_sep is None else '',
        prefix=print_pieces(template.prefix),
        prompt=print_pieces(template.prompt),
        suffix=print_pieces(template.suffix),
        chat_sep=print_pieces(template.chat_sep or ()),
    )


def serving_template(encoder: Encoder, rows: Sequence[Row]) -> tuple[str | None, str]:
    """Return the chat template for a server, and a sentence that compares it with the template used in training.

    If the encoder uses a registered template, this function translates the template to Jinja and tests the translation
    on the prompts of the rows: it must give the same ids as `encode_prompts` without a cut to max_length. Rows of plain
    text, and rows that the registered template cannot encode, are skipped. If the test fails, the returned template is
    None. Then only llm_infer.py can serve the model correctly.

    If the encoder encodes only plain text, the returned template is None too, and any server can continue text.
    """
    if isinstance(encoder, TextEncoder):
        return None, 'it has no chat template, as in training: it continues text'
    if not isinstance(encoder, TemplateEncoder):
        return encoder.tokenizer.chat_template, 'its chat template is the template used in training'
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = jinja_of(encoder)
    uncut = copy.copy(encoder)
    uncut.max_length = -1  # a server does not cut
    compared = 0
    for row in rows:
        if row.is_text:
            continue
        try:
            wanted = uncut.encode_prompts([row])[0]
        except ConfigError:  # the template is single-turn, or has no form for a role of the row
            continue
        try:
            found = tokenizer.apply_chat_template(
                row.messages[:-1], add_generation_prompt=True, return_dict=False, tokenize=True
            )
        except TemplateError as error:
            return None, f"template '{encoder.name}' cannot be written in Jinja ({error})"
        if found != wanted:
            return None, f"template '{encoder.name}' in Jinja gives different ids ({row.origin})"
        compared += 1
    name = f"template '{encoder.name}' was written into its chat template: the same ids on {compared} conversations"
    return tokenizer.chat_template, name

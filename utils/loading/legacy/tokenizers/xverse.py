"""Reads the tokenizer.json of XVERSE (2023). Current versions of `tokenizers` cannot read this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.loading.legacy.tokenizers.sentencepiece import added_token, common_options, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_STEPS = ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder')
_SPECIAL_NAMES = ('unk_token', 'bos_token', 'eos_token', 'pad_token')


def repair(content: Any) -> Any:
    """Return a copy of a part of tokenizer.json in which all objects of type Metaspace have the current format.

    In the current format, `prepend_scheme` replaces `add_prefix_space`, and there is no `str_rep`. Version 0.23 of
    `tokenizers` needs the current format.
    """
    if isinstance(content, list):
        return [repair(step) for step in content]

    if not isinstance(content, dict):
        return content

    step = {name: repair(value) for name, value in content.items()}

    if step.get('type') == 'Metaspace':
        step.pop('str_rep', None)
        prefixed = step.pop('add_prefix_space', True)
        step.setdefault('prepend_scheme', 'always' if prefixed else 'never')

    return step


def build_xverse_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of XVERSE.

    Special tokens are read from tokenizer_config.json. If a special token is missing there, it is read from
    special_tokens_map.json.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = model_dir / 'tokenizer.json'
    content = read_json(path)
    repaired = {**content, **{name: repair(content.get(name)) for name in _STEPS}}

    try:
        backend = Tokenizer.from_str(json.dumps(repaired))
    except Exception as error:  # The `tokenizers` library raises a plain Exception for every error.
        raise ConfigError(f'{path} cannot be read as a tokenizer: {error}. Download it again.') from None

    settings = read_settings(model_dir)
    named = {**read_settings(model_dir, 'special_tokens_map.json'), **settings}
    tokens = {name: added_token(named.get(name), model_dir) for name in _SPECIAL_NAMES}

    # Only the texts of the special tokens are passed. Their other settings (lstrip, rstrip, ...) are in tokenizer.json.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token.content for name, token in tokens.items() if token is not None},
        **common_options(settings),
    )

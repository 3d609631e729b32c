"""Saves a tokenizer: copies the files from which it was opened, or writes new files for transformers 4 and 5."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.base.files import read_json
from utils.loading.chat_template import replace_templates
from utils.loading.portable import CONFIG, save_portable

# Names and patterns of all files from which transformers opens a tokenizer.
PATTERNS = (
    CONFIG, 'tokenizer.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'vocab.txt', 'merges.txt',
    'tokenizer.model', 'tokenizer.model.v*', 'spiece.model', 'sentencepiece.bpe.model', 'tekken.json', '*.tiktoken',
    'chat_template.jinja', 'chat_template.json', 'additional_chat_templates/*.jinja',
)  # fmt: skip
# Keys that name Python code of a checkpoint. This code is never run, and these keys are never copied.
CODE_KEYS = ('auto_map', 'custom_generate')


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer to a folder, as copies of the files from which it was opened or as new files.

    The files are copied byte for byte, with two exceptions. The chat template is the one that the tokenizer has now.
    Keys that name code (CODE_KEYS) are left out.

    New files are written if there is nothing to copy, if a token of the tokenizer is missing in the old files, or if
    tokenizer_config.json does not name the class of the tokenizer.
    """
    source = Path(tokenizer.name_or_path)
    if not tokenizer.name_or_path or not _has_tokenizer(source) or not has_tokens(source, tokenizer):
        save_portable(tokenizer, folder)
        return

    for pattern in PATTERNS:
        for file in source.glob(pattern):
            copy_file(file, folder / file.relative_to(source))
    replace_templates(folder, tokenizer.chat_template)


def copy_file(file: Path, target: Path) -> None:
    """Copy a file byte for byte. But if a file *config.json has keys that name code (CODE_KEYS), leave them out."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith('config.json') and any(f'"{key}"'.encode() in file.read_bytes() for key in CODE_KEYS):
        content = read_json(file)
        kept = {key: value for key, value in content.items() if key not in CODE_KEYS}
        if kept != content:
            target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
            return
    shutil.copyfile(file, target)


def _has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer that can be opened without the config.json of a model."""
    config = folder / CONFIG
    return config.is_file() and isinstance(read_json(config).get('tokenizer_class'), str)


def has_tokens(folder: Path, tokenizer: Any) -> bool:
    """Return whether the files of a folder have all tokens of a tokenizer.

    Returns True if there is no tokenizer.json, because other vocabulary files are not read.
    """
    file = folder / 'tokenizer.json'
    if not file.is_file():
        return True
    content = read_json(file)
    vocabulary = content['model']['vocab']
    tokens = set(vocabulary) if isinstance(vocabulary, dict) else {text for text, _ in vocabulary}
    tokens.update(_texts(content.get('added_tokens')))

    for name in (CONFIG, 'special_tokens_map.json', 'added_tokens.json'):
        if (folder / name).is_file():
            tokens.update(_texts(read_json(folder / name)))
    return tokens.issuperset(tokenizer.get_vocab())


def _texts(content: Any) -> Iterator[str]:
    """Yield all keys and all strings in the content of a JSON file."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        yield from content
        for value in content.values():
            yield from _texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)

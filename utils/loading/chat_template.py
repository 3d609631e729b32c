"""Reads and writes the chat templates of a folder, and gives a tokenizer the template of --chat_template."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import Keys, read_json
from utils.base.logger import logger
from utils.loading.gguf import is_gguf
from utils.loading.gguf_header import read_header
from utils.loading.template_settings import Templates, add_settings, change_each, settings_problems, sources_of
from utils.loading.template_source import parse_template, read_variables

# The names of transformers: the template, and the folder of further templates, such as tool_use.jinja.
TEMPLATE_FILE = 'chat_template.jinja'
_FURTHER = 'additional_chat_templates'
# The files that may have the template in a key. Processors of 2024 stored it in the second file.
_WITH_KEY = ('tokenizer_config.json', 'chat_template.json')
_KEYS: Keys = {'chat_template': (None, str, {'*': str}, [{'name': str, 'template': str}])}
# Texts that are control tokens in most vocabularies.
_MARKER = re.compile(r'<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|<\w+_of_\w+>')


def folder_templates(folder: Path) -> Templates | None:
    """Return the chat template that the tokenizer of a model folder or GGUF file will have, or None."""
    if is_gguf(folder):
        return read_header(folder).chat_template

    found = {}
    if (folder / TEMPLATE_FILE).is_file():
        found['default'] = _read_text(folder / TEMPLATE_FILE)
    for file in sorted((folder / _FURTHER).glob('*.jinja')):
        found[file.stem] = _read_text(file)
    if found:
        return found['default'] if list(found) == ['default'] else found

    for file in (folder / name for name in _WITH_KEY):
        stored = read_json(file, keys=_KEYS).get('chat_template') if file.is_file() else None
        if isinstance(stored, dict):
            return stored
        if isinstance(stored, str):
            return stored or None
        if isinstance(stored, list) and stored:
            return {entry['name']: entry['template'] for entry in stored}
    return None


def read_chat_template(path: Path) -> Templates:
    """Return the template that --chat_template names: a file, or a folder with a model or a checkpoint.

    Raises ConfigError if there is no template, if a template is empty or not valid, or if it does not read `messages`.
    """
    given = f'--chat_template {path}'
    if path.is_dir():
        found = folder_templates(path)
        if found is None:
            raise ConfigError(f'{given} has no chat template. Give a file with a Jinja chat template.')
    elif path.is_file():
        found = _read_text(path)
    else:
        raise ConfigError(f'{given} is not there (looked in {path.absolute().parent}). Correct the path.')

    for source in sources_of(found):
        if not source.strip():
            raise ConfigError(f'{given} has an empty chat template. Give a file with a Jinja chat template.')
        parse_template(source, given)
        if 'messages' not in read_variables(source):
            raise ConfigError(
                f'{given} does not read `messages`, so it cannot render a chat. Give a file with a Jinja chat template.'
            )
    return found


def hash_templates(content: Any) -> str:
    """Return the sha256 of the JSON of `content`, as hex digits.

    `content` is the text of a template, a dict from name to text for several templates, or a dict with the fields of an
    entry of TEMPLATE_MAPPING.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_template_file(path: Path) -> str:
    """Return the sha256 of the file that --chat_template names. For a folder, return the hash of its templates."""
    if path.is_dir():
        return hash_templates(read_chat_template(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ConfigError(f'{file} is not UTF-8 (byte {error.start}). Save it as UTF-8.') from None
    except OSError as error:
        raise ConfigError(f'{file} cannot be read: {error.strerror}. Correct its permissions.') from None


def write_templates(folder: Path, templates: Templates) -> None:
    """Write the templates to a folder, with the file names of transformers."""
    named = templates if isinstance(templates, dict) else {'default': templates}
    for name, source in named.items():
        file = folder / TEMPLATE_FILE if name == 'default' else folder / _FURTHER / f'{name}.jinja'
        file.parent.mkdir(exist_ok=True)
        file.write_text(source, encoding='utf-8')


def replace_templates(folder: Path, templates: Templates | None) -> None:
    """Make `templates` the chat templates of a model folder. Nothing is written if the folder has them already.

    The templates are written to .jinja files. If a JSON file of the folder has a template, the templates are also
    written to this file, because programs read different files. If `templates` is None, all templates of the folder are
    removed.
    """
    if (folder_templates(folder) or None) == (templates or None):
        return
    (folder / TEMPLATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / _FURTHER, ignore_errors=True)

    for name in _WITH_KEY:
        file = folder / name
        content = read_json(file) if file.is_file() else {}
        if 'chat_template' not in content:
            continue
        if templates is None:
            del content['chat_template']
        else:
            content['chat_template'] = _as_key(templates)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    if templates:
        write_templates(folder, templates)


def _as_key(templates: Templates) -> str | list[dict[str, str]]:
    """Return the templates as the value of the key `chat_template` in tokenizer_config.json."""
    if isinstance(templates, str):
        return templates
    return [{'name': name, 'template': source} for name, source in templates.items()]


def set_chat_template(tokenizer: Any, path: str | None, settings: Mapping[str, Any]) -> None:
    """Give the tokenizer the template at `path`, or keep its template if `path` is None. Then add the settings.

    Each setting is written as a line before the template, for example `{%- set enable_thinking = false -%}`. Raises
    ConfigError if the template at `path` cannot be used, if a setting is not a variable of the template, or if there
    are settings but no template. If `path` is given, and the template contains control tokens that the tokenizer lacks,
    a warning is logged.
    """
    if path is None and not settings:
        return
    templates = tokenizer.chat_template if path is None else read_chat_template(Path(path))
    if not templates:
        raise ConfigError('--template_settings: this tokenizer has no chat template. Name one with --chat_template.')
    if problems := settings_problems(settings, templates, tokenizer.special_tokens_map):
        raise ConfigError(*problems)

    if path is not None and (unknown := _unknown_markers(templates, tokenizer)):
        logger.warning(
            f'--chat_template: the template contains {", ".join(unknown)}, and the vocabulary of this tokenizer does '
            'not. So each of them becomes several tokens of plain text. To add them when training, write them to a '
            'text file, one per line, and use --new_tokens FILE.'
        )
    tokenizer.chat_template = change_each(templates, lambda source: add_settings(source, settings))


def _unknown_markers(templates: Templates, tokenizer: Any) -> list[str]:
    """Return the texts in the templates that look like control tokens but are not in the vocabulary."""
    from jinja2 import nodes

    literals = []
    for source in sources_of(templates):
        tree = parse_template(source, 'the chat template')
        literals += [node.data for node in tree.find_all(nodes.TemplateData)]
        literals += [str(node.value) for node in tree.find_all(nodes.Const)]
    vocabulary = tokenizer.get_vocab()
    found = dict.fromkeys(marker for literal in literals for marker in _MARKER.findall(literal))
    return [marker for marker in found if marker not in vocabulary]

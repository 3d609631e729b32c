"""Saves a tokenizer with the setting names of transformers 4, which transformers 5 reads too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.base.files import read_json

CONFIG = 'tokenizer_config.json'
# Keys of transformers 5 that say how a tokenizer was opened.
_OF_MACHINE = ('backend', 'is_local', 'local_files_only')


def save_portable(tokenizer: Any, folder: Path) -> None:
    """Write new files of a tokenizer to a folder. transformers 4 and 5 can open these files."""
    tokenizer.save_pretrained(folder)

    config = folder / CONFIG
    content = {key: value for key, value in read_json(config).items() if key not in _OF_MACHINE}
    if content.get('tokenizer_class') == 'TokenizersBackend':
        content['tokenizer_class'] = 'PreTrainedTokenizerFast'
    if isinstance(content.get('extra_special_tokens'), list):
        content['additional_special_tokens'] = content.pop('extra_special_tokens')
    config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')

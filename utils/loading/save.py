"""Saves a model as an ordinary model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from utils.base.files import read_json, use_default_modes
from utils.loading.image_processors import Images
from utils.loading.packed import record_packed_format
from utils.loading.portable import CONFIG
from utils.loading.tokenizer_files import CODE_KEYS, save_tokenizer


def save_whole(model: Any, tokenizer: Any, folder: Path, images: Images | None = None) -> None:
    """Write all files of the model to `folder`: weights, settings, tokenizer and, if there is one, image processor.

    References to code and the local path of the model are removed from the saved files. The end token of the tokenizer
    is added to the generation settings of `model`.
    """
    record_packed_format(model)
    add_end_token(tokenizer, model.generation_config)

    model.save_pretrained(folder)
    if images is not None:
        images.save(folder)
    save_tokenizer(tokenizer, folder)

    for name in ('config.json', CONFIG):
        content = read_json(folder / name)
        kept = {key: value for key, value in content.items() if key not in ('_name_or_path', *CODE_KEYS)}
        if kept != content:
            text = json.dumps(kept, indent=2, ensure_ascii=False)
            (folder / name).write_text(f'{text}\n', encoding='utf-8')
    use_default_modes(folder)


def add_end_token(tokenizer: Any, settings: Any) -> None:
    """Add the tokenizer's end token to the end tokens in the generation settings, so that generate() stops at it.

    The config.json of some chat models names only the token that ends a document, not the token that ends a turn.
    """
    given = settings.eos_token_id

    if given is None:
        settings.eos_token_id = tokenizer.eos_token_id
        return

    ends = given if isinstance(given, list) else [given]
    if tokenizer.eos_token_id not in ends:
        settings.eos_token_id = [*ends, tokenizer.eos_token_id] if ends else tokenizer.eos_token_id


def export_native(model: Any, tokenizer: Any, target: Path, images: Images | None = None) -> None:
    """Write all files of the model to the new folder `target`. If writing fails, `target` does not exist."""
    temporary = target.with_name(f'.{target.name}.aside')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)

    save_whole(model, tokenizer, temporary, images)
    temporary.rename(target)

"""Writes a model as a plain folder of its native class, complete or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from utils.loading.image_processors import Images
from utils.loading.packed import name_format


def save_whole(model: Any, tokenizer: Any, folder: Path, images: Images | None = None) -> None:
    """Save weights, config, generation settings and tokenizer; neither code references nor a local path are kept."""
    name_format(model)
    _end_with(tokenizer, model.generation_config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if images is not None:
        images.save(folder)
    for name, dropped in (('config.json', ('_name_or_path', 'auto_map')), ('tokenizer_config.json', ('auto_map',))):
        path = folder / name
        content = json.loads(path.read_text(encoding='utf-8'))
        kept = {key: value for key, value in content.items() if key not in dropped}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _end_with(tokenizer: Any, settings: Any) -> None:
    """Have generate() stop at the tokenizer's end too: a chat model's config.json may name that of a document alone."""
    given = settings.eos_token_id
    ends = given if isinstance(given, list) else [] if given is None else [given]
    if tokenizer.eos_token_id not in ends:
        settings.eos_token_id = [*ends, tokenizer.eos_token_id] if ends else tokenizer.eos_token_id


def export_native(model: Any, tokenizer: Any, target: Path, images: Images | None = None) -> None:
    """Write the model as `target`, which must not be there yet."""
    aside = target.with_name(f'.{target.name}.aside')
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    save_whole(model, tokenizer, aside, images)
    aside.rename(target)

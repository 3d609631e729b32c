"""Base models as a hub has them: bf16 shards with tensors that the class does not load, files of transformers 4."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import CHATML, make_tokenizer

# Tensors that the class does not load.
EXTRA = {
    'mtp.layers.0.weight': torch.arange(32.0).reshape(4, 8),
    'vision_tower.patch.weight': torch.full((5,), 0.1, dtype=torch.bfloat16),
    'vision_tower.count': torch.tensor([3], dtype=torch.int64),
}
TOKENIZER_CONFIG = {
    'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<|endoftext|>', 'unk_token': '<unk>',
    'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': 1000, 'chat_template': CHATML,
}  # fmt: skip


def add_extra(folder: Path, shards: int) -> None:
    """Store a model folder in bf16, with the extra tensors, in several files."""
    weights = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    state = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()} | EXTRA
    names = sorted(state)
    weight_map = {
        name: f'model-{1 + number % shards:05}-of-{shards:05}.safetensors' for number, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == file}, folder / file, {'format': 'pt'})
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))


def write_base(folder: Path, model: Any, shards: int = 3) -> Path:
    """Write a base as a hub has it: bf16 shards with further tensors, and files that transformers 4 wrote."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    add_extra(folder, shards)
    (folder / 'chat_template.jinja').unlink()
    (folder / 'tokenizer_config.json').write_text(json.dumps(TOKENIZER_CONFIG, indent=7))
    (folder / 'config.json').write_text(json.dumps(json.loads((folder / 'config.json').read_text()), indent=5))
    (folder / 'LICENSE').write_text('free')
    (folder / 'README.md').write_text('the base')
    (folder / 'modeling.py').write_text('raise SystemExit')
    return folder


def stored(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Return each tensor of a model folder with the name of its file."""
    files = sorted(folder.glob('model*.safetensors'))
    return {name: (file.name, tensor) for file in files for name, tensor in load_file(file).items()}


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype and the same bytes."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def modes(folder: Path) -> set[int]:
    """Return the permissions of the files in a folder."""
    return {file.stat().st_mode & 0o777 for file in folder.iterdir() if file.is_file()}


def usual_mode() -> int:
    """Return the permissions of a new file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask

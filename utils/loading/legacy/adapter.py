"""Adapters made for a fused 2023 layout, read as adapters of the native class: A is shared, B is split."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.loading.folder import read_config
from utils.loading.legacy.family import Family, State
from utils.loading.legacy.registry import find_family
from utils.loading.weight_files import read_file

_FILE, _OLD_FILE, _CONFIG = 'adapter_model.safetensors', 'adapter_model.bin', 'adapter_config.json'
_PREFIX = 'base_model.model.'


def convert_adapter(family: Family, original: dict[str, Any], state: State) -> State:
    """Return an adapter's tensors under the native names.

    B of a fused layer is cut as the layer's own weight is, by the family's mapping; A, which acts before the cut, is
    the same for each part. So base + adapter computes what it did. Raises ConfigError for a tensor that is neither.
    """
    native: State = {}
    for key, tensor in state.items():
        module, mark, _ = key.removeprefix(_PREFIX).partition('.lora_A.')
        if not mark:
            if key.replace('.lora_B.', '.lora_A.') in state and '.lora_B.' in key:
                continue
            raise ConfigError(
                f"the adapter's tensor '{key}' is no half of a LoRA, so it has no native name. Train a plain LoRA."
            )
        matrix_b = state.get(key.replace('.lora_A.', '.lora_B.'))
        if matrix_b is None:
            raise ConfigError(f"the adapter has '{key}' without its lora_B. Copy it whole.")
        for new, part in family.tensors({f'{module}.weight': matrix_b}, original).items():
            name = _PREFIX + new.removesuffix('.weight')
            native[f'{name}.lora_A.weight'] = tensor.clone()
            native[f'{name}.lora_B.weight'] = part.clone().contiguous()
    return native


@contextlib.contextmanager
def native_adapter(
    checkpoint: Path, layers: Container[str], base: Path | None = None, name: str | None = None
) -> Iterator[Path]:
    """Yield a folder with the adapter in native names as safetensors: the checkpoint itself, or a copy while in use.

    `base` is the directory of the base model, `name` its family where config.json does not tell.
    """
    from safetensors.torch import save_file

    config = read_json(checkpoint / _CONFIG)
    targets = config.get('target_modules') or []
    fits = base is None or not base.is_dir() or isinstance(targets, str) or all(target in layers for target in targets)
    original = {} if fits or base is None else read_config(base)
    family = find_family(original, name) if original else None
    if family is None and (checkpoint / _FILE).is_file():
        yield checkpoint
        return
    state = _read_adapter(checkpoint)
    if family is not None:
        state = convert_adapter(family, original, state)
        config['target_modules'] = sorted({key.partition('.lora_')[0].rpartition('.')[2] for key in state})
    with tempfile.TemporaryDirectory(prefix='adapter-') as folder:
        save_file(state, Path(folder) / _FILE)
        (Path(folder) / _CONFIG).write_text(json.dumps(config), encoding='utf-8')
        yield Path(folder)


def _read_adapter(checkpoint: Path) -> State:
    for name in (_FILE, _OLD_FILE):
        if (checkpoint / name).is_file():
            return read_file(checkpoint / name)
    raise ConfigError(f'{checkpoint} holds no adapter weights: neither {_FILE} nor {_OLD_FILE}. Copy it whole.')

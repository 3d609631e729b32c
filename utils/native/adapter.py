"""Adapters made for a fused 2023 layout, read as adapters of the native class: A is shared, B is split."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from utils.errors import ConfigError
from utils.native.family import Family, State
from utils.native.read import read_config

_FILE, _CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
_PREFIX = 'base_model.model.'


def convert_adapter(family: Family, original: dict[str, Any], state: State) -> State:
    """Return an adapter's tensors under the native names.

    B of a fused layer is cut as the layer's own weight is, by the family's mapping; A, which acts before the cut, is
    the same for each part. So base + adapter computes what it did.
    """
    native: State = {}
    for key, tensor in state.items():
        module, mark, _ = key.removeprefix(_PREFIX).partition('.lora_A.')
        if not mark:
            continue
        matrix_b = state.get(key.replace('.lora_A.', '.lora_B.'))
        if matrix_b is None:
            raise ConfigError(f"the adapter has '{key}' without its lora_B.")
        for new, part in family.tensors({f'{module}.weight': matrix_b}, original).items():
            name = _PREFIX + new.removesuffix('.weight')
            native[f'{name}.lora_A.weight'] = tensor.clone()
            native[f'{name}.lora_B.weight'] = part.clone().contiguous()
    return native


@contextlib.contextmanager
def native_adapter(checkpoint: Path, layers: Container[str], base: Path | None = None) -> Iterator[Path]:
    """Yield a folder with the adapter in native names: the checkpoint itself, or a converted copy while in use."""
    config = json.loads((checkpoint / _CONFIG).read_text(encoding='utf-8'))
    targets = config.get('target_modules') or []
    if base is None or not base.is_dir() or isinstance(targets, str) or all(target in layers for target in targets):
        yield checkpoint
        return
    from safetensors.torch import save_file

    from utils.native.registry import find_family

    original = read_config(base)
    family = find_family(original)
    if family is None:
        yield checkpoint
        return
    state = convert_adapter(family, original, _read_adapter(checkpoint))
    modules = {key.removeprefix(_PREFIX).split('.lora_')[0].rsplit('.', 1)[-1] for key in state}
    with tempfile.TemporaryDirectory(prefix='adapter-') as folder:
        save_file(state, Path(folder) / _FILE)
        (Path(folder) / _CONFIG).write_text(json.dumps({**config, 'target_modules': sorted(modules)}), encoding='utf-8')
        yield Path(folder)


def _read_adapter(checkpoint: Path) -> State:
    import torch
    from safetensors.torch import load_file

    if (checkpoint / _FILE).is_file():
        return load_file(checkpoint / _FILE)
    old = checkpoint / 'adapter_model.bin'
    if not old.is_file():
        raise ConfigError(f'{checkpoint} holds no adapter weights: neither {_FILE} nor {old.name}.')
    state: State = torch.load(old, map_location='cpu', weights_only=True)
    return state

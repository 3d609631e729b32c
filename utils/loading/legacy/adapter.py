"""Converts LoRA adapters of 2023 to adapters for the native class.

The old adapters were trained with the Python code that was published with the model.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.loading.folder import ADAPTER_CONFIG, read_adapter_config, read_config
from utils.loading.layers import named_by
from utils.loading.legacy.family import Family, State
from utils.loading.legacy.registry import find_family
from utils.loading.weight_files import read_file

_FILE = 'adapter_model.safetensors'
_OLD_FILE = 'adapter_model.bin'
_PREFIX = 'base_model.model.'


def convert_adapter(family: Family, original: dict[str, Any], state: State) -> State:
    """Return a state dict with the tensors of an adapter, under the names of the native class.

    If a fused layer is split, its LoRA matrix B is split in the same way as the weight of the layer. Each part gets a
    copy of the matrix A, because A acts before the split. So the base model with the adapter computes the same as
    before. `original` is the config.json of the base model. Raises ConfigError if a tensor is neither an A nor a B, or
    if an A or a B lacks the other matrix.
    """
    native: State = {}

    for key, tensor in state.items():
        is_a = '.lora_A.' in key
        if not is_a and '.lora_B.' not in key:
            raise ConfigError(
                f"the adapter's tensor '{key}' is neither a lora_A nor a lora_B, so it cannot be converted to "
                'the layer names of transformers. Train the adapter again with --sft_type lora.'
            )

        own, other = ('lora_A', 'lora_B') if is_a else ('lora_B', 'lora_A')
        matrix = state.get(key.replace(f'.{own}.', f'.{other}.'))
        if matrix is None:
            raise ConfigError(f"the adapter has '{key}' without its {other}. Copy the complete checkpoint.")
        if not is_a:
            continue  # This B is converted together with its A.

        module = key.removeprefix(_PREFIX).partition('.lora_A.')[0]
        for new, part in family.tensors({f'{module}.weight': matrix}, original).items():
            name = _PREFIX + new.removesuffix('.weight')
            native[f'{name}.lora_A.weight'] = tensor.clone()
            native[f'{name}.lora_B.weight'] = part.clone().contiguous()

    return native


@contextlib.contextmanager
def native_adapter(
    checkpoint: Path, layers: Collection[str], base: Path | None = None, name: str | None = None
) -> Iterator[Path]:
    """Yield a folder with the adapter as safetensors, under the tensor names of the opened model.

    If nothing has to be converted, the folder is `checkpoint`. Otherwise it is a temporary folder.

    `layers` are the paths of the model's linear layers. `base` is the folder of the base model. `name` is the name of
    the family of the base model. It is needed only if config.json of the base model does not tell the family.
    """
    from safetensors.torch import save_file

    config = read_adapter_config(checkpoint)
    targets = config.get('target_modules') or []
    original: dict[str, Any] = {}

    if (
        base is not None
        and base.is_dir()
        and not isinstance(targets, str)
        and not all(named_by([target], layers) for target in targets)
    ):
        original = read_config(base)

    family = find_family(original, name) if original else None

    if family is None and (checkpoint / _FILE).is_file():
        yield checkpoint
        return

    state = read_adapter(checkpoint)
    if family is not None:
        state = convert_adapter(family, original, state)
        config['target_modules'] = sorted({key.partition('.lora_')[0].rpartition('.')[2] for key in state})

    with tempfile.TemporaryDirectory(prefix='adapter-') as folder:
        save_file(state, Path(folder) / _FILE)
        (Path(folder) / ADAPTER_CONFIG).write_text(json.dumps(config), encoding='utf-8')
        yield Path(folder)


def read_adapter(checkpoint: Path) -> State:
    """Return the tensors of an adapter. They are read from the .bin file only if there is no .safetensors file.

    Raises ConfigError if there is neither file, or if the file is damaged.
    """
    for name in (_FILE, _OLD_FILE):
        if (checkpoint / name).is_file():
            return read_file(checkpoint / name)

    raise ConfigError(
        f'{checkpoint} holds no adapter weights: neither {_FILE} nor {_OLD_FILE}. Copy the complete checkpoint.'
    )

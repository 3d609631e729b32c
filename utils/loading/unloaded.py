"""Keeps the tensors of a base model that its class does not load, for example MTP layers and vision towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.base.files import read_json, write_json
from utils.loading.class_names import names_in_class
from utils.loading.folder import read_config
from utils.loading.tensor_ranges import TensorRange, only_safetensors, tensor_ranges

UNLOADED_FILE = 'model-not-loaded.safetensors'
_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'


def unloaded_tensors(model: Any, base: Path, family: str | None) -> dict[str, TensorRange]:
    """Return the tensors in the folder `base` that the class of `model` does not load, as {name: TensorRange}.

    Returns {} if there is no config.json, if the weights are quantised, if they are not in safetensors files, or if the
    folder is not for a class of transformers.
    """
    from utils.loading.legacy.registry import find_family, find_saved

    if not (base / 'config.json').is_file() or not any(base.glob('*.safetensors')):
        return {}
    config = read_config(base)
    if find_family(config, family) or find_saved(config) or 'quantization_config' in config:
        return {}
    if not only_safetensors(base):
        return {}

    ranges = tensor_ranges(base)
    names = names_in_class(model, ranges)
    return {name: found for name, found in ranges.items() if names[name] is None}


def write_unloaded(tensors: dict[str, TensorRange], folder: Path) -> None:
    """Write tensors byte for byte to a new file in a model folder, and add their names to the index of the folder.

    If the folder has no index, one is written. If there are no tensors, nothing is written.
    """
    if not tensors:
        return
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    size = 0
    for name, found in tensors.items():
        end = size + found.end - found.start
        header[name] = {'dtype': found.dtype, 'shape': list(found.shape), 'data_offsets': [size, end]}
        size = end

    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with (folder / UNLOADED_FILE).open('wb') as stream:
        stream.write(len(text).to_bytes(8, 'little') + text)
        for found in tensors.values():
            for block in found.blocks():
                stream.write(block)

    index = folder / _INDEX
    if index.is_file():
        content = read_json(index)
    else:
        own = tensor_ranges(folder)
        total = sum(found.end - found.start for found in own.values())
        content = {'metadata': {'total_size': total}, 'weight_map': dict.fromkeys(own, _WEIGHTS)}
    content['metadata']['total_size'] += size
    content['weight_map'].update(dict.fromkeys(tensors, UNLOADED_FILE))
    write_json(index, content)

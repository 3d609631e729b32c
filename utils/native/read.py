"""Reads the weights of a checkpoint directory, memory-mapped, without executing anything in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.errors import ConfigError
from utils.native.family import State

_SINGLE = ('model.safetensors', 'pytorch_model.bin')


def read_config(model_dir: Path) -> dict[str, Any]:
    """Return config.json of a directory; raises ConfigError where it is not an object."""
    try:
        config = json.loads((model_dir / 'config.json').read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f'{model_dir}/config.json cannot be read: {error}') from None
    if not isinstance(config, dict):
        raise ConfigError(f'{model_dir}/config.json does not hold an object.')
    return config


def weight_files(model_dir: Path) -> list[Path]:
    """Return the weight files of a directory: those of its index, else the single file."""
    for name in _SINGLE:
        index = model_dir / f'{name}.index.json'
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()))
            if outside := [shard for shard in shards if Path(shard).name != shard]:
                raise ConfigError(f'{index} names {outside[0]!r}, which is not a file of its folder.')
            if missing := [shard for shard in shards if not (model_dir / shard).is_file()]:
                raise ConfigError(f'{index} names {missing[0]}, which is not there: the download is incomplete.')
            return [model_dir / shard for shard in shards]
        if (model_dir / name).is_file():
            return [model_dir / name]
    raise ConfigError(f'{model_dir} holds no weights: neither {" nor ".join(_SINGLE)}, nor an index of shards.')


def read_state(model_dir: Path) -> State:
    """Return every tensor of a directory by its original name; safetensors, or .bin read with weights_only.

    Raises ConfigError for a truncated file, one that is no tensor archive, or a name that two shards hold.
    """
    import torch

    state: State = {}
    for file in weight_files(model_dir):
        for key, tensor in _read_file(file).items():
            if key in state:
                raise ConfigError(f"{file.name}: tensor '{key}' is in another shard too.")
            # A .bin may hold Parameters, which would drag a graph along; 4-bit files hold lists beside tensors.
            state[key] = tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
    return state


def _read_file(file: Path) -> dict[str, Any]:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == '.safetensors':
            return load_file(file)
        content = torch.load(file, map_location='cpu', mmap=True, weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ConfigError(
            f'{file} cannot be read as a tensor archive: {str(error).splitlines()[0]} '
            'It is truncated, or holds more than tensors, which is never executed.'
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f'{file} holds a {type(content).__name__}, not tensors by name.')
    return content

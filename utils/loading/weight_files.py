"""Reads the weights of a checkpoint directory, memory-mapped, without executing anything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.loading.legacy.family import State

_SINGLE = ('model.safetensors', 'pytorch_model.bin')
# What the 4-bit files of 2023 hold beside tensors.
_LISTS = '.quant_state'


def weight_files(model_dir: Path) -> list[Path]:
    """Return the weight files of a directory: those of its index, else the single file."""
    for name in _SINGLE:
        index = model_dir / f'{name}.index.json'
        if index.is_file():
            places = read_json(index).get('weight_map')
            if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
                raise ConfigError(f'{index} has no weight_map of tensors and their files: it is damaged. Get it again.')
            shards = sorted(set(places.values()))
            if outside := [shard for shard in shards if Path(shard).name != shard]:
                raise ConfigError(f'{index} names {outside[0]!r}, which is not a file of its folder. Get it again.')
            if missing := [shard for shard in shards if not (model_dir / shard).is_file()]:
                raise ConfigError(
                    f'{index} names {missing[0]}, which is not there: the download is incomplete. Go on with it.'
                )
            return [model_dir / shard for shard in shards]
        if (model_dir / name).is_file():
            return [model_dir / name]
    raise ConfigError(
        f'{model_dir} holds no weights: neither {" nor ".join(_SINGLE)}, nor an index of them. Get it whole.'
    )


def read_state(model_dir: Path) -> State:
    """Return every tensor of a directory by its original name; safetensors, or .bin read with weights_only.

    Raises ConfigError for a truncated file, one that is no tensor archive, or a name that two shards hold.
    """
    import torch

    state: State = {}
    for file in weight_files(model_dir):
        for key, tensor in read_file(file).items():
            if key in state:
                raise ConfigError(f"{file.name}: tensor '{key}' is in another shard too. Get them again.")
            is_tensor = isinstance(tensor, torch.Tensor)
            if not is_tensor and not str(key).endswith(_LISTS):
                raise ConfigError(
                    f"{file} holds a {type(tensor).__name__} as '{key}', where a tensor must be. Get it as safetensors."
                )
            # A .bin may hold Parameters, which would drag a graph along.
            state[key] = tensor.detach() if is_tensor else tensor
    return state


def read_file(file: Path) -> dict[str, Any]:
    """Return what a weight file holds by name, memory-mapped; raises ConfigError where that cannot be read as data."""
    import pickle
    import zipfile

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == '.safetensors':
            return load_file(file)
        # Files older than PyTorch 1.6's format are no zip archives and cannot be mapped.
        content = torch.load(file, map_location='cpu', mmap=zipfile.is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError:  # whose text says how to run it all the same
        raise ConfigError(
            f'{file} cannot be read as a tensor archive: it is damaged, or holds more than tensors. '
            'That would be code, which is never run. Get it as safetensors.'
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        raise ConfigError(
            f'{file} cannot be read as a tensor archive: {next(iter(str(error).splitlines()), type(error).__name__)} '
            'It is truncated or of another format.'
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f'{file} holds a {type(content).__name__}, not tensors by name. Get it as safetensors.')
    return content

"""Reads the weight files of a model folder. Code in the files is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.loading.legacy.family import State

_SINGLE = ('model.safetensors', 'pytorch_model.bin')

# In the 4-bit files of 2023, an entry with this suffix is a list, not a tensor.
_LIST_SUFFIX = '.quant_state'


def weight_files(model_dir: Path) -> list[Path]:
    """Return the weight files of a folder: all files that the index names, or the single file if there is no index.

    If there are safetensors files and .bin files, the safetensors files are returned. The files are sorted by name.
    Raises ConfigError if the index is damaged, if a file is missing, or if the folder has no weights.
    """
    for name in _SINGLE:
        index = model_dir / f'{name}.index.json'

        if index.is_file():
            file_of = read_json(index).get('weight_map')
            if not isinstance(file_of, dict) or not all(isinstance(shard, str) for shard in file_of.values()):
                raise ConfigError(
                    f'{index} has no weight_map of tensors and their files: it is damaged. Download or copy it again.'
                )

            shards = sorted(set(file_of.values()))

            if outside := [shard for shard in shards if Path(shard).name != shard]:
                raise ConfigError(
                    f'{index} names the file {outside[0]!r}, which is outside the folder of the index. Download or '
                    'copy the index again.'
                )

            if missing := [shard for shard in shards if not (model_dir / shard).is_file()]:
                raise ConfigError(
                    f'{index} names {missing[0]}, which is not there: the download is incomplete. '
                    'Download or copy the missing files.'
                )

            return [model_dir / shard for shard in shards]

        if (model_dir / name).is_file():
            return [model_dir / name]

    raise ConfigError(
        f'{model_dir} holds no weights: neither {" nor ".join(_SINGLE)}, nor an index of them. '
        'Download or copy the complete folder.'
    )


def read_state(model_dir: Path) -> State:
    """Return a dict from name to tensor for all weight files of a folder. The names are the names in the files.

    In the 4-bit files of 2023, an entry whose name ends in .quant_state is a list. Raises ConfigError if a file is
    missing or damaged, if any other entry is not a tensor, or if two shards have a tensor of the same name.
    """
    import torch

    state: State = {}

    for file in weight_files(model_dir):
        for key, tensor in read_file(file).items():
            if key in state:
                raise ConfigError(
                    f"{file.name}: tensor '{key}' is in another shard too. Download or copy all shards again."
                )

            is_tensor = isinstance(tensor, torch.Tensor)
            if not is_tensor and not str(key).endswith(_LIST_SUFFIX):
                raise ConfigError(
                    f"{file} holds a {type(tensor).__name__} as '{key}', where a tensor must be. "
                    'Use the safetensors files of this model.'
                )

            # A .bin file may hold Parameters. A view of a Parameter would keep an autograd graph.
            state[key] = tensor.detach() if is_tensor else tensor

    return state


def read_file(file: Path) -> dict[str, Any]:
    """Return a dict from name to tensor for one weight file. The tensors are memory-mapped.

    Only .bin files from before PyTorch 1.6 are read into memory. Raises ConfigError if the file is damaged, contains
    code, or is not a dict. The values of the dict are not checked.
    """
    import pickle
    import zipfile

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == '.safetensors':
            return load_file(file)

        # Files from before PyTorch 1.6 are not zip archives, so they cannot be memory-mapped.
        content = torch.load(file, map_location='cpu', mmap=zipfile.is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError:  # The error text is not shown, because it explains how to run the file's code.
        raise ConfigError(
            f'{file} cannot be read as a tensor archive: it is damaged, or holds more than tensors. '
            'Only tensors are loaded, because other objects can run code. Use the safetensors files of this model.'
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f'{file} cannot be read as a tensor archive: {reason} It is truncated or of another format. '
            'Download or copy it again.'
        ) from None

    if not isinstance(content, dict):
        raise ConfigError(
            f'{file} holds a {type(content).__name__}, not tensors by name. Use the safetensors files of this model.'
        )

    return content

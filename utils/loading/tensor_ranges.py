"""Finds the tensors in the safetensors files of a model folder, without loading them.

This module imports neither torch nor safetensors, so that it needs little memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils.base.errors import ConfigError
from utils.loading.weight_files import weight_files

SUFFIX = '.safetensors'
_BLOCK = 1 << 20
# The largest header that the safetensors library accepts.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, kw_only=True)
class TensorRange:
    """A tensor in a file: its dtype as the file names it (F32, BF16, ...), its shape, and the range of its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes of the tensor, at most 1 MiB at a time."""
        with self.file.open('rb') as stream:
            yield from _blocks(stream, self.start, self.end)

    def sha256(self) -> str:
        """Return the sha256 of the bytes of the tensor."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


def _blocks(stream: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    stream.seek(start)
    left = end - start
    while left > 0 and (block := stream.read(min(left, _BLOCK))):
        left -= len(block)
        yield block


def only_safetensors(model_dir: Path) -> bool:
    """Return whether all files that `weight_files` finds in a folder are safetensors files.

    Raises ConfigError if the folder has no weights or an incomplete download.
    """
    return all(file.suffix == SUFFIX for file in weight_files(model_dir))


def tensor_ranges(model_dir: Path) -> dict[str, TensorRange]:
    """Return a dict from name to TensorRange for all tensors in the safetensors files of a folder.

    Raises ConfigError if a file is missing or damaged, or is not a safetensors file.
    """
    return {name: found for file in weight_files(model_dir) for name, found in _read_header(file).items()}


def _read_header(file: Path) -> dict[str, TensorRange]:
    size = file.stat().st_size
    try:
        with file.open('rb') as stream:
            length = int.from_bytes(stream.read(8), 'little')
            if length > min(_MAX_HEADER, size):
                raise ValueError('its header is longer than the file')
            header = json.loads(stream.read(length))

        first = 8 + length
        ranges = {
            name: TensorRange(
                file=file,
                dtype=entry['dtype'],
                shape=tuple(entry['shape']),
                start=first + entry['data_offsets'][0],
                end=first + entry['data_offsets'][1],
            )
            for name, entry in header.items()
            if name != '__metadata__'
        }
        if any(found.end > size for found in ranges.values()):
            raise ValueError('it is shorter than its header says')
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{file} cannot be read as safetensors: {error}. It is truncated or of another format. Download or copy '
            'it again.'
        ) from None
    return ranges

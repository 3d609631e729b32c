"""Fingerprints of base models: hashes that are compared to tell whether two sets of weights are the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

_WEIGHT_SUFFIXES = ('.safetensors', '.bin', '.gguf')

# Weights up to this size are hashed completely. If the weights are larger, only the first and the last part of each
# file are hashed, so that a run starts quickly.
_WHOLE_LIMIT_BYTES = 1 << 30
_PART_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """A sha256 of weights, and how much of the weights was hashed.

    `covers` is 'whole' if every byte of the weights was hashed. It is 'sampled' if only the first and the last MiB of
    each file were hashed, which is the case for weights above 1 GiB.
    """

    sha256: str
    covers: str


def fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of a weight file or of a folder.

    For a folder, the names, sizes and bytes of its weight files and of config.json are hashed together.
    """
    if path.is_file():
        files = [path]
    else:
        files = sorted(f for f in path.iterdir() if f.suffix in _WEIGHT_SUFFIXES or f.name == 'config.json')

    whole = sum(f.stat().st_size for f in files) <= _WHOLE_LIMIT_BYTES
    digest = hashlib.sha256()

    for file in files:
        size = file.stat().st_size
        if path.is_dir():
            digest.update(f'{file.name}:{size}\n'.encode())

        with file.open('rb') as stream:
            if whole:
                while block := stream.read(_PART_BYTES):
                    digest.update(block)
            else:
                digest.update(stream.read(_PART_BYTES))
                stream.seek(max(size - _PART_BYTES, 0))
                digest.update(stream.read(_PART_BYTES))

    return Fingerprint(sha256=digest.hexdigest(), covers='whole' if whole else 'sampled')

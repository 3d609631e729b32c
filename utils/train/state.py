"""Store nested states (dicts, lists and tuples with tensors) in one safetensors file: bitwise exact, without pickle."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from utils.base import device


def save_tree(path: Path, tree: Any) -> None:
    """Write a nested value to a safetensors file, from which `load_tree` reads it.

    The value can contain dict, list, tuple, str, bool, int, float, None and tensors. All other types raise TypeError. A
    tensor that occurs twice is stored once. Everything except the tensors is stored as JSON in the header of the file.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def pack(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            # Two states may share one tensor, for example the code book of 8-bit optimizers. safetensors refuses to
            # store the same memory twice.
            key = (node.device, node.data_ptr() or id(node), node.dtype, node.shape, node.stride())
            if key not in names:
                names[key] = f't{len(tensors)}'
                tensors[names[key]] = node.detach().contiguous()
            return {'tensor': names[key]}
        if isinstance(node, dict):
            return {'dict': [[pack(key), pack(value)] for key, value in node.items()]}
        if isinstance(node, tuple):
            return {'tuple': [pack(item) for item in node]}
        if isinstance(node, list):
            return [pack(item) for item in node]
        if isinstance(node, float) and not math.isfinite(node):
            return {'float': repr(node)}
        if node is None or isinstance(node, str | bool | int | float):
            return node
        raise TypeError(f'{type(node).__name__} cannot be stored in {path.name}')

    save_file(tensors, path, metadata={'tree': json.dumps(pack(tree))})


def load_tree(path: Path) -> Any:
    """Return the nested value that `save_tree` wrote. All tensors are on the CPU."""
    with safe_open(path, framework='pt') as file:

        def unpack(node: Any) -> Any:
            if isinstance(node, list):
                return [unpack(item) for item in node]
            if not isinstance(node, dict):
                return node
            ((kind, content),) = node.items()
            if kind == 'tensor':
                return file.get_tensor(content)
            if kind == 'dict':
                return {unpack(key): unpack(value) for key, value in content}
            if kind == 'float':
                return float(content)
            return tuple(unpack(item) for item in content)

        return unpack(json.loads(file.metadata()['tree']))


def random_state() -> dict[str, Any]:
    """Return the states of the random generators of Python, NumPy and torch (CPU and device), for save_tree."""
    name, words, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(np.asarray(words, dtype=np.int64)), *rest),
        'torch': torch.random.get_rng_state(),
        'device': device.kind(),
        device.kind(): device.random_states(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random generators to the states that `random_state` returned.

    The states of devices of a different kind, and of devices that do not exist now, are ignored.
    """
    random.setstate(state['python'])
    name, words, *rest = state['numpy']
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state['torch'])
    device.set_random_states(state.get(device.kind(), []))

"""The random generators of this process, taken and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators (CPU and every GPU), as save_tree takes it."""
    name, words, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(np.asarray(words, dtype=np.int64)), *rest),
        'torch': torch.random.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to a state taken before; GPUs that are not here any more are passed over."""
    random.setstate(state['python'])
    name, words, *rest = state['numpy']
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state['torch'])
    for index, generator in enumerate(state['cuda'][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, index)

"""Rank and world size from the environment that torchrun sets, without importing torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# The device files of NVIDIA on Linux, of NVIDIA under WSL and of ROCm, whose torch build calls RCCL 'nccl'.
_GPU_DEVICE_FILES = ('/dev/nvidiactl', '/dev/dxg', '/dev/kfd')


def rank() -> int:
    """Return this process's global rank, 0 outside torchrun."""
    return int(os.environ.get('RANK', '0'))


def local_rank() -> int:
    """Return this process's rank on its machine, 0 outside torchrun."""
    return int(os.environ.get('LOCAL_RANK', '0'))


def world_size() -> int:
    """Return the number of processes that train together, 1 outside torchrun."""
    return int(os.environ.get('WORLD_SIZE', '1'))


def is_main() -> bool:
    """Return whether this process is the one that writes files and logs."""
    return rank() == 0


def has_gpu_device() -> bool:
    """Return whether the machine shows a GPU that nccl can serve; reads device files only."""
    return any(Path(name).exists() for name in _GPU_DEVICE_FILES)


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Run the body on the first process of each machine, then on the others: one download, one conversion."""
    if world_size() == 1:
        yield
        return
    import torch.distributed

    if local_rank() != 0:
        torch.distributed.barrier()
    yield
    if local_rank() == 0:
        torch.distributed.barrier()


def broadcast_text(text: str) -> str:
    """Return rank 0's `text` on every rank; needs the process group where there are several."""
    if world_size() == 1:
        return text
    import torch.distributed

    box = [text]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]

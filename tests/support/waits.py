"""A stand-in for a device: tensors on the CPU that count as tensors of a device, and modes that refuse to wait for it.

A tensor is on the device if it was marked, or if an operation made it from a tensor on the device. Everything that a
GPU would have to finish its work for is an error: reading values, and operations whose result has a shape that depends
on values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READING = {'tolist', 'item', 'cpu', 'numpy', '__bool__', '__float__', '__int__', '__index__', '__contains__'}
_WAITING = {'_local_scalar_dense', 'nonzero', 'masked_select', 'equal', '_unique2', 'unique_dim', 'is_nonzero'}


class WaitError(AssertionError):
    """Something would have waited for the device."""


class Device:
    """Knows which tensors are on the device."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self.operations = 0

    def mark(self, *tensors: torch.Tensor) -> None:
        """Put tensors on the device."""
        for tensor in tensors:
            found = StorageWeakRef(tensor.untyped_storage())
            self._storages[found.cdata] = found

    def has(self, tensor: Any) -> bool:
        """Return whether a tensor is on the device."""
        if not isinstance(tensor, torch.Tensor):
            return False
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    @contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """A context in which waiting for the device raises WaitError. Results of the device stay on the device."""
        with _Calls(self), _Operations(self):
            yield


class _Calls(TorchFunctionMode):
    """Refuses the methods that read values. Some of them call no operation that a dispatch mode could see."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, '__name__', '')
        if name in _READING and any(map(self.device.has, args)):
            raise WaitError(f'{name} of a tensor on the device')
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Refuses the operations that wait, and marks the results of all others."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        on_device = any(map(self.device.has, leaves))
        if on_device:
            self.device.operations += 1
            name = func.overloadpacket.__name__
            masks = [x for x in leaves[1:] if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)]
            if name in _WAITING or (name.startswith('index') and name != 'index_select' and masks):
                raise WaitError(f'{func} on the device')
        out = func(*args, **(kwargs or {}))
        if on_device:
            self.device.mark(*(x for x in tree_leaves(out) if isinstance(x, torch.Tensor)))
        return out

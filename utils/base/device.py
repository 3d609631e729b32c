"""Functions for the device on which torch computes. They hide the differences between the kinds of devices.

The kinds are cuda (NVIDIA, and AMD with the ROCm build of torch), xpu (Intel), npu (Ascend), mps (Apple) and cpu. torch
is imported only inside functions. `visible_kind` in dist.py finds the kind without torch, from files of the machine.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

DeviceKind = Literal['cuda', 'xpu', 'npu', 'mps', 'cpu']
_GIVEN_NAMES: tuple[DeviceKind, ...] = ('xpu', 'npu', 'mps')
# Tensors that share memory start at a multiple of this number of bytes.
_ALIGNED = 16


def kind() -> DeviceKind:
    """Return the kind of device that torch uses. It is cpu if torch finds no accelerator of a supported kind."""
    import torch

    if torch.cuda.is_available():
        return 'cuda'
    found = torch.accelerator.current_accelerator(check_available=True)
    return next((name for name in _GIVEN_NAMES if found is not None and found.type == name), 'cpu')


def reason() -> str:
    """Return the reason for the kind of device that torch uses, as text for the log."""
    import torch

    if kind() != 'cpu':
        return 'torch can use it'
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None:
        return f'this toolkit does not support {found.type}'
    return f'torch {torch.__version__} finds no GPU'


def _module() -> Any:
    """Return the module of torch for the kind of device, e.g. torch.cuda."""
    import torch

    return torch.get_device_module(kind())


def count() -> int:
    """Return the number of devices that torch can use. It is 0 on a CPU."""
    return 0 if kind() == 'cpu' else int(_module().device_count())


def address(index: int) -> int | str:
    """Return a device as a value for `device_map`: its index on CUDA, 'mps' on a Mac, else e.g. 'xpu:0'."""
    found = kind()
    if found in ('cuda', 'mps'):
        return index if found == 'cuda' else 'mps'
    return f'{found}:{index}'


def torch_name(index: int) -> str:
    """Return the name of a device for torch, e.g. 'cuda:0'. On MPS and CPU, the name has no index."""
    found = kind()
    return found if found in ('mps', 'cpu') else f'{found}:{index}'


def use(index: int) -> None:
    """Make a device the current device of this process. Does nothing on MPS, because a Mac has only one device."""
    if kind() != 'mps':
        _module().set_device(index)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a CUDA device is the current device. For other kinds the context changes nothing.

    Triton starts a kernel on the current device, even if the tensors are on another one.
    """
    import torch

    return torch.cuda.device(device) if device.type == 'cuda' else nullcontext()


def description(index: int) -> str:
    """Return the product name of a device."""
    if kind() == 'mps':
        return f'GPU of this Mac ({platform.machine()})'
    return str(_module().get_device_name(index))


def memory(index: int) -> tuple[int, int]:
    """Return the free memory and the total memory of a device, in bytes.

    A Mac's GPU shares the main memory. Its total memory is the part that the system recommends for the GPU.
    """
    module = _module()
    if kind() == 'mps':
        whole = int(module.recommended_max_memory())
        return max(0, whole - int(module.driver_allocated_memory())), whole
    free, whole = module.mem_get_info(index)
    return int(free), int(whole)


def free_unused() -> None:
    """Return the cached memory of torch's allocator to the devices, so that it counts as free."""
    if kind() != 'cpu':
        gc.collect()
        _module().empty_cache()


def peak_bytes() -> int:
    """Return the peak memory of this process's tensors, summed over all devices. Do not call it on a CPU.

    MPS does not measure the peak. On MPS, this function returns the memory that the allocator has reserved now.
    """
    module = _module()
    if kind() == 'mps':
        return int(module.driver_allocated_memory())
    return sum(int(module.max_memory_allocated(index)) for index in range(count()))


def reset_peak() -> None:
    """Restart the measurement of the peak memory. Does nothing on CPU and MPS, which do not measure it."""
    if kind() not in ('mps', 'cpu'):
        for index in range(count()):
            _module().reset_peak_memory_stats(index)


def peak_reserved_bytes() -> int:
    """Return the peak memory that torch's allocator reserved, summed over all devices. Do not call it on a CPU.

    Reserved memory includes freed memory that the allocator keeps. A device is full if no more can be reserved.
    """
    module = _module()
    if kind() == 'mps':
        return int(module.driver_allocated_memory())
    return sum(int(module.max_memory_reserved(index)) for index in range(count()))


def wait() -> None:
    """Wait until the device has done all its work. Does nothing on a CPU."""
    if kind() != 'cpu':
        _module().synchronize()


def has_bf16() -> bool:
    """Return whether the device computes in bf16 natively. Do not call it on a CPU."""
    import torch

    found = kind()
    if found == 'mps':
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    if found == 'npu':
        return bool(_module().is_bf16_supported())
    return bool(_module().is_bf16_supported(including_emulation=False))


def has_flash_attention() -> bool:
    """Return whether the library flash-attn supports the device."""
    return kind() == 'cuda' and bool(_module().get_device_capability()[0] >= 8)


def pins_memory() -> bool:
    """Return whether batches are copied to the device from pinned memory."""
    return kind() in ('cuda', 'xpu', 'npu')


def send(tensors: Mapping[str, torch.Tensor], target: torch.device) -> dict[str, torch.Tensor]:
    """Return the dict `tensors` with all CPU tensors moved to the device `target`.

    They are moved together in one copy. If the device supports pinned memory, this copy is asynchronous: the CPU does
    not wait for its end.
    """
    import torch

    if target.type == 'cpu':
        return dict(tensors)

    starts = {}
    size = 0
    for name, x in tensors.items():
        if x.device.type == 'cpu':
            starts[name] = size
            size += -(-x.nbytes // _ALIGNED) * _ALIGNED
    pins = pins_memory()
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pins)
    for name, start in starts.items():
        _view(packed, start, tensors[name]).copy_(tensors[name])

    sent = packed.to(target, non_blocking=pins)
    return {name: _view(sent, starts[name], x) if name in starts else x for name, x in tensors.items()}


def _view(packed: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `packed` from `start` on as a tensor with the dtype and the shape of `like`."""
    return packed[start : start + like.nbytes].view(like.dtype).view(like.shape)


def read_later(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start to copy the values (N,) to the CPU. Returns a function that waits for the copy and returns the values.

    Later changes of `values` do not change what the function returns.
    """
    import torch

    if values.device.type == 'cpu':
        return values.clone().tolist

    copied = torch.empty_like(values, device='cpu', pin_memory=pins_memory())
    copied.copy_(values, non_blocking=True)
    event = _module().Event()
    event.record()

    def read() -> list[float]:
        event.synchronize()
        return copied.tolist()

    return read


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the most exact dtype for sums on a device: fp64, or fp32 on MPS, which has no fp64."""
    import torch

    return torch.float32 if device.type == 'mps' else torch.float64


def random_states() -> list[torch.Tensor]:
    """Return the state of the random generator of each device. The list is empty on a CPU."""
    if kind() == 'cpu':
        return []
    if kind() == 'mps':
        return [_module().get_rng_state()]
    return list(_module().get_rng_state_all())


def set_random_states(states: list[torch.Tensor]) -> None:
    """Set the random generators of the devices to the states that `random_states` returned.

    If there are fewer devices than states, the last states are ignored.
    """
    for index, state in enumerate(states[: count()]):
        if kind() == 'mps':
            _module().set_rng_state(state)
        else:
            _module().set_rng_state(state, index)

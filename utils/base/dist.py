"""The rank of this process, the number of processes, and collective operations.

Rank and number are read from the environment variables of torchrun. torch is imported only for the collective
operations.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from utils.base.device import DeviceKind
from utils.base.errors import ConfigError
from utils.base.packages import package_version

T = TypeVar('T')

# NVIDIA on Linux, NVIDIA under WSL, and ROCm. The torch build for ROCm uses RCCL under the name 'nccl'.
_GPU_DEVICE_FILES = ('/dev/nvidiactl', '/dev/dxg', '/dev/kfd')
# For each kind of device: the environment variables that list the visible devices, and the device files.
_VISIBLE = {
    'cuda': (('CUDA_VISIBLE_DEVICES', 'HIP_VISIBLE_DEVICES', 'ROCR_VISIBLE_DEVICES'), 'nvidia[0-9]*'),
    'xpu': (('ZE_AFFINITY_MASK',), 'dri/renderD*'),
    'npu': (('ASCEND_RT_VISIBLE_DEVICES',), 'davinci[0-9]*'),
}
# The driver of AMD lists processors and GPUs here. In the file gpu_id, the id of a processor is 0.
_AMD_NODES = Path('/sys/class/kfd/kfd/topology/nodes')
# The backend of torch.distributed for each kind of device.
_BACKENDS = {'cuda': 'nccl', 'xpu': 'xccl', 'npu': 'hccl', 'mps': 'gloo', 'cpu': 'gloo'}


def rank() -> int:
    """Return the global rank of this process. Returns 0 outside torchrun."""
    return int(os.environ.get('RANK', '0'))


def local_rank() -> int:
    """Return the rank of this process on its machine. Returns 0 outside torchrun."""
    return int(os.environ.get('LOCAL_RANK', '0'))


def world_size() -> int:
    """Return the number of processes that train together. Returns 1 outside torchrun."""
    return int(os.environ.get('WORLD_SIZE', '1'))


def local_world_size() -> int:
    """Return the number of processes on this machine. Returns 1 outside torchrun."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', '1'))


def started_by_torchrun() -> bool:
    """Return whether torchrun or another launcher set the rank of this process."""
    return 'RANK' in os.environ


def is_main() -> bool:
    """Return whether this process has rank 0. Only rank 0 writes the files of a run. Other ranks log only errors."""
    return rank() == 0


def has_gpu_device() -> bool:
    """Return whether /dev has the device file of a GPU that nccl supports."""
    return any(Path(name).exists() for name in _GPU_DEVICE_FILES)


def visible_kind() -> DeviceKind:
    """Return the kind of device that this machine seems to have. torch may still be unable to use the device.

    Device files, the build of torch, the packages and the operating system are checked. torch is not imported.
    """
    if has_gpu_device() or (sys.platform == 'win32' and shutil.which('nvidia-smi')):
        return 'cuda'
    if sys.platform == 'darwin' and platform.machine() == 'arm64':
        return 'mps'
    has_intel_gpu = sys.platform == 'win32' or any(Path('/dev').glob(_VISIBLE['xpu'][1]))
    if has_intel_gpu and package_version('torch').endswith('+xpu'):
        return 'xpu'
    if any(Path('/dev').glob(_VISIBLE['npu'][1])) and package_version('torch_npu'):
        return 'npu'
    return 'cpu'


def default_backend() -> str:
    """Return the backend of torch.distributed for the devices of this machine. It is always gloo on Windows."""
    return 'gloo' if sys.platform == 'win32' else _BACKENDS[visible_kind()]


def visible_gpus() -> int:
    """Return how many GPUs this process may use.

    If an environment variable such as CUDA_VISIBLE_DEVICES is set, the GPUs in it are counted. Otherwise, device files
    are counted, or for AMD the GPUs that the driver lists.

    On WSL and Windows, GPUs cannot be counted without torch. There, one GPU per process on this machine is assumed.
    Later, start_processes counts with torch, and raises ConfigError if there are fewer GPUs than processes.
    """
    kind = visible_kind()
    if kind in ('cpu', 'mps'):
        return int(kind == 'mps')

    variables, files = _VISIBLE[kind]
    if listed := [os.environ[variable] for variable in variables if variable in os.environ]:
        return min(len([name for name in names.split(',') if name.strip() not in ('', '-1')]) for names in listed)
    return len(list(Path('/dev').glob(files))) or _amd_gpus(_AMD_NODES) or local_world_size()


def _amd_gpus(nodes: Path) -> int:
    """Return how many GPUs the driver of AMD lists in the folder `nodes`. GPUs hidden from a container do not count."""
    count = 0
    for file in nodes.glob('*/gpu_id'):
        with contextlib.suppress(OSError):  # the GPU is hidden from this container
            count += file.read_text(encoding='ascii').strip() != '0'
    return count


def own_gpus(gpus: int) -> range:
    """Return the indices of the GPUs that this process uses. `gpus` is the number of GPUs of the machine.

    Every process of a machine gets the same number of GPUs. No two processes share a GPU. If there are fewer GPUs than
    processes, the range is empty.
    """
    share = gpus // local_world_size()
    return range(local_rank() * share, (local_rank() + 1) * share)


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """A context whose body runs on the first process of each machine, and then on the other processes.

    So a download or conversion in the body is done only once per machine.
    """
    if world_size() == 1:
        yield
        return

    import torch.distributed

    # A separate process group, because a download may take longer than the timeout of the default group.
    group = torch.distributed.new_group(backend='gloo', timeout=timedelta(days=1))
    if local_rank() != 0:
        torch.distributed.barrier(group)
    yield
    if local_rank() == 0:
        torch.distributed.barrier(group)


def gather(mine: list[T]) -> list[T]:
    """Join the parts of a list that the ranks hold. Returns the complete list on every rank.

    `mine` is the part of this rank: rank r has the items r, r + world_size, r + 2 * world_size and so on. This is a
    collective operation: every process must call it.
    """
    parts = from_all(mine)
    world = len(parts)
    count = sum(len(part) for part in parts)
    return [parts[index % world][index // world] for index in range(count)]


def report_failure(message: str, trace: str = '') -> None:
    """Write the error file of this rank. torchrun reads these files and reports which rank failed first.

    `trace` is the traceback of the error. Does nothing if TORCHELASTIC_ERROR_FILE is not set.
    """
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if not file:
        return

    extra = {'py_callstack': trace, 'timestamp': str(int(time.time()))}
    content = {'message': {'message': message, 'extraInfo': extra}}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(content), encoding='utf-8')


@functools.cache
def _cpu_group() -> Any:
    """Return a gloo process group, for exchanges on the CPU. In an nccl group, an exchange waits for the GPU."""
    import torch.distributed

    backend = torch.distributed.get_backend()
    return torch.distributed.group.WORLD if backend == 'gloo' else torch.distributed.new_group(backend='gloo')


def from_all(value: T) -> list[T]:
    """Return a list with the `value` of each process, in rank order. Every process must call this function."""
    if world_size() == 1:
        return [value]

    import torch.distributed

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value, group=_cpu_group())
    return values


def from_main(work: Callable[[], T]) -> T:
    """Call `work` on the main process, and return its result on every process.

    If `work` raises a ConfigError, every process raises it. A collective operation: every process must call it.
    """
    result: T | ConfigError | None = None
    if is_main():
        try:
            result = work()
        except ConfigError as error:
            result = error
    found: Any = from_all(result)[0]
    if isinstance(found, ConfigError):
        raise found
    return found  # type: ignore[no-any-return]


def first_failure(failure: str | None) -> str | None:
    """Return the failure of the lowest rank that failed. Returns None if no rank failed.

    `failure` is the failure of this process, or None. A collective operation: every process must call it.
    """
    return next((found for found in from_all(failure) if found), None)


def sums(values: Sequence[float]) -> list[float]:
    """Return the sum of each value over all processes. The sums are computed on the CPU.

    A collective operation: every process must call it.
    """
    if world_size() == 1:
        return list(values)

    import torch.distributed

    total = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(total, group=_cpu_group())
    return total.tolist()

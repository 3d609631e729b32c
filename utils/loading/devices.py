"""Chooses the dtype of a model, and the GPU of each layer if one process uses several GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base import device
from utils.base.errors import ConfigError
from utils.base.logger import logger

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A request to place the layers of a model on several GPUs.

    `memory` is a dict from GPU to the number of bytes that the model may use there. `linear_bytes` is the number of
    bytes per parameter in linear layers except the output head. This number is small if the layers are quantised.
    `parameter_bytes` is the number of bytes per parameter in the rest of the model. `must_fit` tells what `map` does if
    the model does not fit on the GPUs: raise ConfigError (True) or return 'auto' (False).
    """

    memory: Mapping[int | str, int]
    parameter_bytes: float
    linear_bytes: float
    # If False, layers that do not fit are placed on the CPU or the disk. Such a model can be used for inference in one
    # process, but it cannot be trained.
    must_fit: bool = True

    def map(self, model: PreTrainedModel) -> dict[str, int | str] | str:
        """Return a device map: a dict from the path of each block to its GPU. The model must be on the meta device.

        If the model does not fit on the GPUs, returns 'auto' if `must_fit` is False, and raises ConfigError otherwise.
        """
        blocks = _blocks(model)
        sizes = _sizes(model, blocks, self)
        devices = list(self.memory)
        indices = _partition(list(sizes.values()), [self.memory[device] for device in devices])

        if indices is None and not self.must_fit:
            return 'auto'

        if indices is None:
            gib = 2**30
            raise ConfigError(
                f'{type(model).__name__} needs {sum(sizes.values()) / gib:.1f} GiB on GPUs {devices} with '
                f'{", ".join(f"{self.memory[d] / gib:.1f}" for d in devices)} GiB usable: layers would be left on the '
                'CPU or disk, which is possible only for inference in one process. Use more GPUs or '
                '--quantization_bit 4, or train with DeepSpeed ZeRO-3.'
            )

        device_of = {name: devices[index] for name, index in zip(sizes, indices, strict=True)}
        placed = {name: device_of[owner] for name, owner in _owners(blocks).items()}
        logger.info(f'blocks per GPU: {dict(Counter(placed.values()))}')

        return placed


def resolve_device_map(device_map: Any, build: Callable[[], PreTrainedModel]) -> Any:
    """Return a device map that from_pretrained accepts.

    If `device_map` is a Spread, the Spread computes the returned map for the model that `build` makes. Any other
    `device_map` is returned unchanged. Raises ConfigError if the model must fit on the GPUs and does not.
    """
    if not isinstance(device_map, Spread):
        return device_map

    import torch

    with torch.device('meta'):
        return device_map.map(build())


def _blocks(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return a dict from path to module for all blocks, in the order of the model.

    A block is a module whose parameters must be on the same GPU. For example, each decoder layer is one block.
    """
    whole = set(model._no_split_modules or ())

    def walk(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        owns_parameters = next(module.parameters(recurse=False), None) is not None
        children = list(module.named_children())

        if name and (owns_parameters or not children or type(module).__name__ in whole):
            yield name, module
            return

        for child_name, child in children:
            yield from walk(f'{name}.{child_name}' if name else child_name, child)

    return dict(walk('', model))


def _owners(blocks: Mapping[str, torch.nn.Module]) -> dict[str, str]:
    """Return a dict from the path of each block to the path of the block that decides on its GPU.

    If a block shares a parameter with earlier blocks (tied weights), the first of these decides. Any other block
    decides for itself, so its value is its own path.
    """
    first: dict[int, str] = {}
    owners = {}

    for name, module in blocks.items():
        ids = [id(p) for p in module.parameters()]
        owners[name] = next((first[i] for i in ids if i in first), name)
        first.update({i: owners[name] for i in ids if i not in first})

    return owners


def _sizes(model: PreTrainedModel, blocks: Mapping[str, torch.nn.Module], spread: Spread) -> dict[str, int]:
    """Return a dict from the path of a block to its size in bytes.

    Blocks that share a parameter (tied weights) must be on the same GPU. So only the first of them is in the dict, with
    the size of all of them together. A shared parameter is counted once.
    """
    import torch

    head = model.get_output_embeddings()
    parameter_bytes: dict[int, float] = {id(p): spread.parameter_bytes for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            parameter_bytes[id(module.weight)] = spread.linear_bytes

    owners = _owners(blocks)
    sizes = dict.fromkeys((name for name in blocks if owners[name] == name), 0)
    counted: set[int] = set()

    for name, module in blocks.items():
        for parameter in module.parameters():
            if id(parameter) not in counted:
                counted.add(id(parameter))
                sizes[owners[name]] += int(parameter.numel() * parameter_bytes[id(parameter)])

    return sizes


def _partition(sizes: Sequence[int], capacities: Sequence[int]) -> list[int] | None:
    """Return the index of a device for each block. Returns None if the blocks do not fit on the devices.

    `sizes` are the sizes of the blocks in bytes, and `capacities` the free bytes of the devices. Each device gets
    contiguous blocks. All devices are filled to about the same share.
    """
    # With contiguous blocks, activations move from one device to the next only once. The sum of load^2 / capacity is
    # minimised, so that about the same share of each device is used.
    sums = [0, *accumulate(sizes)]

    # Number of blocks placed so far -> (lowest cost, number of blocks that were placed after each device).
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}

    for capacity in capacities:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}

        for start, (cost, ends) in best.items():
            for end in range(start, len(sizes) + 1):
                load = sums[end] - sums[start]
                if load > capacity:
                    break

                total = cost + load * load / capacity
                if end not in reached or total < reached[end][0]:
                    reached[end] = (total, (*ends, end))

        best = reached

    if len(sizes) not in best:
        return None

    ends = best[len(sizes)][1]
    return [sum(end <= index for end in ends) for index in range(len(sizes))]


def pick_dtype(name: str | None) -> tuple[torch.dtype, str]:
    """Return a torch dtype, and the reason for this choice as text.

    If `name` is bf16, fp16 or fp32, this dtype is returned. If `name` is None, the best dtype for the device is chosen.
    """
    import torch

    names = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
    if name is not None:
        return names[name], 'it was asked for'

    if device.kind() != 'cpu':
        if device.has_bf16():
            return torch.bfloat16, 'the GPU supports it'
        if device.kind() == 'mps':
            return torch.float32, 'macOS before 14 has no bf16 on its GPU, and fp16 cannot be trained there'
        return torch.float16, 'the GPU has no bf16'

    if cpu_has_bf16():
        return torch.bfloat16, 'the CPU multiplies it natively'

    return torch.float32, 'the CPU has no native bf16'


def cpu_has_bf16() -> bool:
    """Return whether the CPU has instructions for bf16 arithmetic.

    This is the case if /proc/cpuinfo lists avx512_bf16 or amx_bf16 (x86), or bf16 (Arm). Without /proc/cpuinfo, for
    example on macOS, the answer is False.
    """
    cpuinfo = Path('/proc/cpuinfo')
    words = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return bool(words & {'avx512_bf16', 'amx_bf16', 'bf16'})

"""Merges an adapter into copies of the base's own files. Only the tensors that the adapter changes are written anew.

Each tensor keeps its name, its dtype and its file. Tensors that the class of the model does not load, such
as MTP layers and vision towers, are copied. Memory is needed for one tensor at a time, beside the adapter.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.export.same import carried_files
from utils.loading.class_names import names_in_class, tensors_of_class
from utils.loading.folder import read_config
from utils.loading.tensor_ranges import TensorRange, only_safetensors, tensor_ranges
from utils.loading.tokenizer_files import copy_file
from utils.loading.weight_files import weight_files

if TYPE_CHECKING:
    import torch

# dtype in a safetensors file -> its name in torch.
_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
# Settings of PEFT with which an adapter changes more than the weights of its layers and the layers trained whole.
_OTHER_CHANGES = ('bias', 'lora_bias', 'trainable_token_indices', 'layer_replication')
_OF_PEFT = 'base_model.model.'
# The number of weights that are compared at once, so that comparing needs little memory.
_AT_ONCE = 2**20


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A weight with LoRA: the PEFT layer `module`, and the name of the weight in its base layer."""

    module: Any
    parameter: str

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        return tuple(self.module.get_base_layer()._parameters[self.parameter].shape)

    def new(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the merged weight in fp32: the weight `stored` of the base plus the change by the adapter."""
        import torch

        owner = self.module.get_base_layer()
        earlier = owner._parameters[self.parameter]
        place = next(self.module.lora_B.parameters(), None)
        value = stored.to(device=earlier.device if place is None else place.device, dtype=torch.float32)
        owner._parameters[self.parameter] = torch.nn.Parameter(value, requires_grad=False)
        self.module.merge(safe_merge=True)
        merged: torch.Tensor = owner._parameters[self.parameter].data
        owner._parameters[self.parameter] = earlier
        return merged.cpu()


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """A tensor that was trained directly, without LoRA."""

    trained: torch.Tensor

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return tuple(self.trained.shape)

    def new(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the trained tensor."""
        return self.trained.cpu()


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A planned merge: the folder of the base, all tensors in this folder by name, and the changes by tensor name."""

    base: Path
    ranges: Mapping[str, TensorRange]
    changes: Mapping[str, _Layer | _Whole]

    def dtypes(self) -> set[str]:
        """Return the torch names of the dtypes of the changed tensors."""
        return {_DTYPES[self.ranges[name].dtype] for name in self.changes}


class _NotPossible(Exception):
    """The adapter cannot be merged into copies of the base's files. The message says why."""


def plan_patch(model: Any, base: Path, checkpoint: Path, *, family: str | None, dtype: str | None) -> Patch | str:
    """Return the Patch that merges an adapter into its base. Returns the reason as text if this is not possible.

    `model` is the PeftModel with the adapter of `checkpoint`, and `base` the folder of its base model. `family` is the
    name of a Family (utils/loading/legacy) if the base has the file layout of an early release of 2023, else None.
    `dtype` is the value of --dtype as torch names it, e.g. 'bfloat16'. It is None if the command has no --dtype.
    """
    try:
        _check_base(base, family)
        ranges = tensor_ranges(base)
        changes = dict(_find_changes(model, checkpoint, ranges))
    except _NotPossible as reason:
        return str(reason)

    patch = Patch(base=base, ranges=ranges, changes=changes)
    if dtype is not None and patch.dtypes() != {dtype}:
        return f'--dtype asks for {dtype}, and the base has {" and ".join(sorted(patch.dtypes()))}'
    return patch


def _check_base(base: Path, family: str | None) -> None:
    from utils.loading.legacy.registry import find_family, find_saved

    config = read_config(base)
    if find_family(config, family) or find_saved(config):
        raise _NotPossible('the base has a layout of 2023')
    if not only_safetensors(base):
        raise _NotPossible('the weights of the base are not in safetensors files')


def _find_changes(
    model: Any, checkpoint: Path, ranges: Mapping[str, TensorRange]
) -> Iterator[tuple[str, _Layer | _Whole]]:
    """Yield (name of a tensor in the files of the base, its change) for each tensor that the adapter changes.

    `ranges` has all tensors of these files by name. Raises _NotPossible if a change belongs to no tensor of the files.
    """
    touched: dict[str, _Layer | _Whole] = {**_adapted(model), **_trained_whole(model, checkpoint)}
    base_model = model.get_base_model()

    # Tied weights are one tensor with several names.
    tied: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors_of_class(base_model).items():
        tied[id(tensor)].append(name)
    twins = {name: names for names in tied.values() for name in names}

    in_files: dict[str, list[str]] = defaultdict(list)
    for stored, held in names_in_class(base_model, ranges).items():
        in_files[held or ''].append(stored)

    for name, change in touched.items():
        if name not in twins or any(touched.get(twin) is not change for twin in twins[name]):
            raise _NotPossible(f'the adapter changes {name}, which is tied to another weight in the base')
        stored_names = [stored for twin in twins[name] for stored in in_files[twin]]
        if not stored_names:
            raise _NotPossible(f'the files of the base do not store {name} as one tensor')
        for stored in stored_names:
            if ranges[stored].dtype not in _DTYPES:
                raise _NotPossible(f'the base stores {stored} as {ranges[stored].dtype}, and not as fp32, bf16 or fp16')
            if ranges[stored].shape != change.shape():
                raise _NotPossible(f'{stored} has another shape in the base')
            yield stored, change


def _adapted(model: Any) -> dict[str, _Layer]:
    """Return {name of a weight: its LoRA layer}. The names are those in the base model without an adapter."""
    from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper

    config = model.peft_config[model.active_adapter].to_dict()
    if other := [name for name in _OTHER_CHANGES if config.get(name) not in (None, False, 'none', [], {})]:
        raise _NotPossible(f'the adapter sets {other[0]}')

    found = {}
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module, Linear | Embedding | ParamWrapper):
            raise _NotPossible(f'{path} is a {type(module).__name__}')
        parameter = module.parameter_name if isinstance(module, ParamWrapper) else 'weight'
        found[f'{path.replace(".base_layer", "")}.{parameter}'] = _Layer(module=module, parameter=parameter)
    return found


def _trained_whole(model: Any, checkpoint: Path) -> dict[str, _Whole]:
    """Return {name: tensor} for the tensors of layers that were trained whole, without LoRA.

    The names are those in the base model without an adapter. The values are read from the checkpoint, because PEFT
    rounds the tensors of `model` to the dtype of the model. Tied layers share one tensor, which the checkpoint can have
    under the name of any of these layers.
    """
    from peft.utils.other import ModulesToSaveWrapper

    from utils.loading.legacy.adapter import read_adapter

    stored = {name.removeprefix(_OF_PEFT): tensor for name, tensor in read_adapter(checkpoint).items()}
    found = {
        f'{path}.{name}': parameter
        for path, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for name, parameter in module.modules_to_save[model.active_adapter].named_parameters()
    }
    held: dict[int, _Whole] = {}
    for name, parameter in found.items():
        if name in stored or id(parameter) not in held:
            held[id(parameter)] = _Whole(trained=stored.get(name, parameter.data))
    return {name: held[id(parameter)] for name, parameter in found.items()}


def release(model: Any) -> None:
    """Free the memory of all weights of a model except LoRA weights. The model cannot be used afterwards."""
    import torch

    for path, module in model.named_modules():
        if '.lora_' in f'.{path}':
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device='meta')
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)


class Kept:
    """Measures the share of the changes to the weights that remains after the merged weights are rounded.

    The weights themselves are compared, so the share is exact. A comparison of 16-bit logits could miss a small change,
    because every operation rounds its result.
    """

    def __init__(self) -> None:
        self.wanted = 0.0
        self.found = 0.0

    def count(self, stored: torch.Tensor, merged: torch.Tensor, rounded: torch.Tensor) -> None:
        """Include a tensor in the share.

        `stored` is the tensor of the base, `merged` is the merged tensor, and `rounded` is `merged` after rounding.
        """
        parts = zip(*(tensor.detach().reshape(-1).split(_AT_ONCE) for tensor in (stored, merged, rounded)), strict=True)
        for before, after, written in parts:
            moved = after.float() - before.float()
            self.wanted += float(moved.dot(moved))
            self.found += float(moved.dot(written.float() - before.float()))

    def share(self) -> float:
        """Return the share of the changes that remains after rounding, as a mean over all counted weights.

        Each weight counts in proportion to the square of its change. Without any change, the share is 1.
        """
        return self.found / self.wanted if self.wanted else 1.0


def write_patched(patch: Patch, folder: Path) -> tuple[dict[str, str], float]:
    """Write the merged model to the new folder `folder`.

    The weight files and the files that `carried_files` returns are copied from the base. In the copies of the weight
    files, the changed tensors are overwritten.

    Returns a dict {name of a changed tensor: sha256 of its new bytes}, and the result of `Kept.share`. This is the
    share of the changes that remains after the changed tensors are rounded to the dtypes of the base.
    """
    from safetensors import safe_open

    folder.mkdir(parents=True)
    for name in carried_files(patch.base):
        copy_file(patch.base / name, folder / name)

    hashes = {}
    kept = Kept()
    for file in weight_files(patch.base):
        shutil.copyfile(file, folder / file.name)
        names = [name for name in patch.changes if patch.ranges[name].file == file]
        with safe_open(file, 'pt') as stored, (folder / file.name).open('r+b') as stream:
            for name in names:
                earlier = stored.get_tensor(name)
                merged = patch.changes[name].new(earlier)
                rounded = _rounded(merged, patch.ranges[name])
                kept.count(earlier, merged, rounded)
                content = _bytes_of(rounded)
                stream.seek(patch.ranges[name].start)
                stream.write(content)
                hashes[name] = hashlib.sha256(content).hexdigest()
    return hashes, kept.share()


def _rounded(tensor: torch.Tensor, place: TensorRange) -> torch.Tensor:
    """Return a tensor rounded to the dtype that it has in the file."""
    import torch

    rounded = tensor.detach().to(getattr(torch, _DTYPES[place.dtype])).contiguous()
    assert tuple(rounded.shape) == place.shape, 'the class and the file store the same tensor'
    return rounded


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    content: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return content

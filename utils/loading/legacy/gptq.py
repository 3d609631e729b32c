"""GPTQ tensors: splits the tensors of fused layers, and computes weights from packed integers.

The layout is that of AutoGPTQ (auto_gptq/nn_modules/qlinear). A layer is stored transposed, as (inputs, outputs):

* qweight (inputs * bits / 32, outputs): the packed integers. Each int32 packs 32 / bits rows.
* qzeros (groups, outputs * bits / 32): the packed zero points. Each int32 packs 32 / bits columns.
* scales (groups, outputs): the scales.
* g_idx (inputs,): the group of each input.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.loading.legacy.family import Config, State, refuse
from utils.loading.legacy.lazy import LazyMatrix
from utils.loading.packed import trainable_backend

if TYPE_CHECKING:
    import torch

TENSORS = ('qweight', 'qzeros', 'scales', 'g_idx')

# Tensor name -> the axis of the outputs. g_idx has no such axis: all parts of a fused layer have the same inputs.
_OUTPUT_AXIS = {'weight': 0, 'bias': 0, 'qweight': 1, 'qzeros': 1, 'scales': 1}


@dataclass(frozen=True, kw_only=True)
class Format:
    """The format in which GPTQ integers are packed."""

    bits: int
    # This number was subtracted from the zero points before they were stored. It is 1 in the format of 2023, and 0 in
    # gptq_v2.
    zero_offset: int

    @property
    def per_word(self) -> int:
        """Return the number of integers that are packed into one int32."""
        return 32 // self.bits


def packed_available() -> bool:
    """Return whether optimum and gptqmodel are installed. Both are needed to compute with packed weights."""
    return all(importlib.util.find_spec(name) is not None for name in ('optimum', 'gptqmodel'))


def read_format(original: Config, family: str) -> Format:
    """Return the GPTQ format that quantization_config in config.json states.

    Raises ConfigError if the weights are not GPTQ weights with 4 or 8 bits, or if checkpoint_format is unknown.
    """
    settings = original.get('quantization_config')
    why = 'and this family reads GPTQ: pass the --model_type of these weights'
    refuse(not isinstance(settings, dict), family, 'quantization_config', settings, why)
    settings = cast('dict[str, Any]', settings)

    method = settings.get('quant_method')
    refuse(method != 'gptq', family, 'quant_method', method, why)

    bits = settings.get('bits')
    refuse(bits not in (4, 8), family, 'bits', bits, 'supported are 4 and 8')

    kind = settings.get('checkpoint_format', 'gptq')
    refuse(kind not in ('gptq', 'gptq_v2'), family, 'checkpoint_format', kind, 'supported are gptq and gptq_v2')

    return Format(bits=cast('int', bits), zero_offset=0 if kind == 'gptq_v2' else 1)


def packed_settings(original: Config) -> dict[str, Any]:
    """Return a quantization_config that keeps the weights packed and selects a kernel with a backward pass."""
    return {**original['quantization_config'], 'backend': trainable_backend()}


def split_fused(key: str, tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Split one tensor of a fused layer along the outputs and return the `count` equal parts.

    `key` ends in weight, bias, qweight, qzeros, scales or g_idx. g_idx has no axis of outputs, so each part is the
    whole g_idx. The parts of the other tensors are views. Raises ConfigError if the axis of the outputs cannot be split
    into equal parts.
    """
    name = key.rpartition('.')[2]
    if name == 'g_idx':
        return [tensor, *(tensor.clone() for _ in range(count - 1))]

    axis = _OUTPUT_AXIS[name]
    # An element of qzeros packs the zero points of several outputs. So if a part of the layer would begin inside an
    # element, the number of elements is no multiple of `count`.
    if tensor.dim() <= axis or tensor.shape[axis] % count:
        raise ConfigError(
            f"tensor '{key}' of shape {tuple(tensor.shape)} cannot be cut into {count} equal parts along axis {axis}: "
            'the checkpoint is damaged or belongs to another model. Download or copy it again.'
        )

    return list(tensor.chunk(count, dim=axis))


@dataclass(frozen=True, kw_only=True)
class PackedWeight(LazyMatrix):
    """A weight that stays packed until the loader needs its values.

    A value is (integer - zero point) * scale. It has at most 20 significant bits, so it is exact in fp32. In fp16 and
    bf16, it is rounded once.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        """Return (outputs, inputs), which is the shape of the weight in nn.Linear."""
        return self.qweight.shape[1], self.qweight.shape[0] * self.format.per_word

    def rows(self, which: slice) -> torch.Tensor:
        """Return the rows `which` of the weight in fp32, one row per output.

        `which.start` must be a multiple of `format.per_word`. Each int32 of `qzeros` packs `per_word` zero points, and
        the slice must not begin inside an int32.
        """
        import torch

        # Shapes: integers, centred and weight are (inputs, outputs). zeros is (groups, outputs). scales is (groups,
        # outputs). groups is (inputs,).
        per_word = self.format.per_word
        shifts = torch.arange(0, 32, self.format.bits, dtype=torch.int32)
        mask = 2**self.format.bits - 1

        # A right shift of a negative int32 fills with ones from the left. The mask removes these ones.
        integers = ((self.qweight[:, which].unsqueeze(1) >> shifts[None, :, None]) & mask).flatten(0, 1)

        words = self.qzeros[:, which.start // per_word : -(-which.stop // per_word)]
        zeros = (((words.unsqueeze(2) >> shifts) & mask) + self.format.zero_offset).flatten(1)

        groups = self.g_idx.long()
        scales = self.scales[:, which].float()
        centred = integers - zeros[groups]
        weight: torch.Tensor = centred.float() * scales[groups]

        return weight.t()

    def check(self, layer: str) -> None:
        """Raise ConfigError if the shapes of the four tensors do not fit each other, or if g_idx is out of range."""
        outputs, inputs = self.shape
        groups = self.scales.shape[0]
        per_word = self.format.per_word

        fits = (
            self.scales.shape == (groups, outputs)
            and self.qzeros.shape == (groups, outputs / per_word)
            and self.g_idx.shape == (inputs,)
        )

        if not fits or not 0 <= int(self.g_idx.min()) <= int(self.g_idx.max()) < groups:
            shapes = ', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in self._tensors())
            raise ConfigError(
                f"layer '{layer}' does not hold {self.format.bits}-bit GPTQ weights: {shapes} do not fit each other. "
                'The checkpoint is damaged, or its quantization_config belongs to a different checkpoint. '
                'Download or copy it again.'
            )

    def packed_bytes(self) -> int:
        """Return the size of the packed tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return (name, tensor) for each of the four tensors of the layer."""
        return zip(TENSORS, (self.qweight, self.qzeros, self.scales, self.g_idx), strict=True)


def packed_layers(state: State, packing: Format) -> dict[str, PackedWeight]:
    """Return a dict from layer name to packed weight, for all GPTQ layers in `state`.

    Raises ConfigError if a layer lacks a tensor or if the tensors of a layer do not fit each other.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}

    for key, tensor in state.items():
        layer, _, name = key.rpartition('.')
        if name in TENSORS:
            layers.setdefault(layer, {})[name] = tensor

    weights = {}

    for layer, tensors in layers.items():
        if missing := [name for name in TENSORS if name not in tensors]:
            raise ConfigError(
                f"layer '{layer}' is quantised and has no {missing[0]}: the checkpoint is incomplete. "
                'Download or copy it again.'
            )

        weights[layer] = PackedWeight(**tensors, format=packing)
        weights[layer].check(layer)

    return weights


def dequantise(state: State, packing: Format) -> State:
    """Return `state` with one lazy weight in place of the four tensors of each packed layer.

    The values of the weight are computed when the loader needs them. If there are packed layers, a warning is logged
    that states the required memory.
    """
    weights = packed_layers(state, packing)

    if weights:
        packed = sum(weight.packed_bytes() for weight in weights.values())
        count = sum(weight.shape[0] * weight.shape[1] for weight in weights.values())
        logger.warning(
            f'the {packing.bits}-bit GPTQ weights are unpacked while loading, because optimum or gptqmodel is not '
            f'installed. The unpacked weights take {_gib(2 * count)} GiB in 16 bits or {_gib(4 * count)} GiB in fp32, '
            f'instead of {_gib(packed)} GiB. To keep the weights packed: pip install optimum gptqmodel'
        )

    plain: dict[str, Any] = {key: tensor for key, tensor in state.items() if key.rpartition('.')[2] not in TENSORS}
    return plain | {f'{layer}.weight': weight for layer, weight in weights.items()}


def _gib(size: int) -> str:
    """Return a number of bytes as text in GiB with three significant digits."""
    return f'{size / 2**30:.3g}'

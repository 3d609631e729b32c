"""GPTQ tensors: how a fused layer is cut into parts, and what weights the packed integers stand for.

The layout is AutoGPTQ's (auto_gptq/nn_modules/qlinear): a layer of `in` x `out` is stored transposed. `qweight` packs
32 / bits rows into an int32, `qzeros` as many columns; `scales` has a row per group, `g_idx` the group of each input.
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
# The axis of the outputs; g_idx has none, every part of a fused layer reads the same inputs.
_OUTPUT_AXIS = {'weight': 0, 'bias': 0, 'qweight': 1, 'qzeros': 1, 'scales': 1}


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the integers are packed."""

    bits: int
    # What was taken off the zero points when they were stored: 1 in the format of 2023, 0 in gptq_v2.
    zero_offset: int

    @property
    def per_word(self) -> int:
        """Return how many integers an int32 holds."""
        return 32 // self.bits


def packed_available() -> bool:
    """Return whether the libraries that compute with packed weights are installed: optimum and gptqmodel."""
    return all(importlib.util.find_spec(name) is not None for name in ('optimum', 'gptqmodel'))


def read_format(original: Config, family: str) -> Format:
    """Return the format that quantization_config states; raises ConfigError for what is not GPTQ in 4 or 8 bits."""
    settings = original.get('quantization_config')
    why = 'and this family reads GPTQ: choose the model_type of the weights you have'
    refuse(not isinstance(settings, dict), family, 'quantization_config', settings, why)
    settings = cast('dict[str, Any]', settings)
    method, bits = settings.get('quant_method'), settings.get('bits')
    refuse(method != 'gptq', family, 'quant_method', method, why)
    refuse(bits not in (4, 8), family, 'bits', bits, 'known are 4 and 8')
    kind = settings.get('checkpoint_format', 'gptq')
    refuse(kind not in ('gptq', 'gptq_v2'), family, 'checkpoint_format', kind, 'known are gptq and gptq_v2')
    return Format(bits=cast('int', bits), zero_offset=0 if kind == 'gptq_v2' else 1)


def packed_settings(original: Config) -> dict[str, Any]:
    """Return the quantization_config that keeps weights packed, with a kernel that can be trained through."""
    return {**original['quantization_config'], 'backend': trainable_backend()}


def split_fused(key: str, tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Return the equal parts of one tensor of a fused layer, views where that is possible.

    `key` ends in weight, bias, qweight, qzeros, scales or g_idx. Raises ConfigError where the outputs cannot be cut:
    packed zero points only between whole words.
    """
    name = key.rpartition('.')[2]
    if name == 'g_idx':
        return [tensor, *(tensor.clone() for _ in range(count - 1))]
    axis = _OUTPUT_AXIS[name]
    if tensor.dim() <= axis or tensor.shape[axis] % count:
        raise ConfigError(
            f"tensor '{key}' of shape {tuple(tensor.shape)} cannot be cut into {count} equal parts along axis {axis}: "
            'the checkpoint is damaged or of another model.'
        )
    return list(tensor.chunk(count, dim=axis))


@dataclass(frozen=True, kw_only=True)
class PackedWeight(LazyMatrix):
    """A weight that exists as packed integers until the loader asks for it.

    (integer - zero) * scale has at most 20 significant bits: exact in fp32, rounded once in fp16 and bf16.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        """Return (outputs, inputs), as a linear layer has it."""
        return self.qweight.shape[1], self.qweight.shape[0] * self.format.per_word

    def rows(self, which: slice) -> torch.Tensor:
        """Return the weights of some outputs in fp32; the first one begins a word of zero points."""
        import torch

        outputs, per_word = which, self.format.per_word
        shifts = torch.arange(0, 32, self.format.bits, dtype=torch.int32)
        mask = 2**self.format.bits - 1
        # The shift keeps the sign of the word, which the mask takes off.
        integers = (self.qweight[:, outputs].unsqueeze(1) >> shifts[None, :, None]) & mask
        words = self.qzeros[:, outputs.start // per_word : -(-outputs.stop // per_word)]
        zeros = ((words.unsqueeze(2) >> shifts) & mask) + self.format.zero_offset
        groups = self.g_idx.long()
        scales = self.scales[:, outputs].float()
        centred = integers.flatten(0, 1) - zeros.flatten(1)[groups]
        weight: torch.Tensor = centred.float() * scales[groups]
        return weight.t()

    def check(self, layer: str) -> None:
        """Raise ConfigError where the four tensors do not fit each other."""
        outputs, inputs = self.shape
        groups, per_word = self.scales.shape[0], self.format.per_word
        fits = (
            self.scales.shape == (groups, outputs)
            and self.qzeros.shape == (groups, outputs / per_word)
            and self.g_idx.shape == (inputs,)
        )
        if not fits or not 0 <= int(self.g_idx.min()) <= int(self.g_idx.max()) < groups:
            shapes = ', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in self._tensors())
            raise ConfigError(
                f"layer '{layer}' does not hold {self.format.bits}-bit GPTQ weights: {shapes} do not fit each other. "
                'The checkpoint is damaged, or its quantization_config is of another one.'
            )

    def packed_bytes(self) -> int:
        """Return what the packed tensors take."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(TENSORS, (self.qweight, self.qzeros, self.scales, self.g_idx), strict=True)


def packed_layers(state: State, form: Format) -> dict[str, PackedWeight]:
    """Return the packed layers by name; raises ConfigError for one that is incomplete or does not fit together."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        layer, _, name = key.rpartition('.')
        if name in TENSORS:
            layers.setdefault(layer, {})[name] = tensor
    weights = {}
    for layer, tensors in layers.items():
        if missing := [name for name in TENSORS if name not in tensors]:
            raise ConfigError(f"layer '{layer}' is quantised and has no {missing[0]}: the checkpoint is incomplete.")
        weights[layer] = PackedWeight(**tensors, format=form)
        weights[layer].check(layer)
    return weights


def dequantise(state: State, form: Format) -> State:
    """Return the tensors with every packed layer replaced by its weight, which is computed when it is loaded.

    Warns of the memory that this costs.
    """
    weights = packed_layers(state, form)
    if weights:
        packed = sum(weight.packed_bytes() for weight in weights.values())
        count = sum(weight.shape[0] * weight.shape[1] for weight in weights.values())
        logger.warning(
            f'the {form.bits}-bit GPTQ weights are unpacked while loading, because optimum and gptqmodel are not both '
            f'installed: their layers take {_gib(2 * count)} GiB in 16 bits, {_gib(4 * count)} GiB in fp32, instead of '
            f'{_gib(packed)} GiB. To keep them packed: pip install optimum gptqmodel'
        )
    plain: dict[str, Any] = {key: t for key, t in state.items() if key.rpartition('.')[2] not in TENSORS}
    return plain | {f'{layer}.weight': weight for layer, weight in weights.items()}


def _gib(size: int) -> str:
    return f'{size / 2**30:.3g}'

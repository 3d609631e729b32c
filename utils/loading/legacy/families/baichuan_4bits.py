"""Baichuan2-7B-Chat-4bits and Baichuan2-13B-Chat-4bits. Their weights were packed by bitsandbytes of 2023.

Current versions of bitsandbytes cannot read this layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.loading.legacy.families.baichuan import BAICHUAN2_7B
from utils.loading.legacy.families.baichuan_13b import BAICHUAN2_13B
from utils.loading.legacy.family import Config, Family, State
from utils.loading.legacy.lazy import LazyMatrix

if TYPE_CHECKING:
    import torch

_DATA = '.data'
_QUANT = '.quant_state'


def _unquantised_config(original: Config) -> Config:
    """Return config.json without quantization_config. What remains is the config.json of the unquantised model."""
    return {field: value for field, value in original.items() if field != 'quantization_config'}


def _matches(original: Config, *, unquantised: Family) -> bool:
    """Return whether a config.json describes the 4-bit weights of a model.

    `unquantised` is the family for the unquantised weights of the same model.
    """
    quantization = original.get('quantization_config') or {}
    return quantization.get('load_in_4bit') is True and unquantised.matches(_unquantised_config(original))


def unpack_state(state: State) -> State:
    """Return the state dict with a lazy weight `<name>` in place of each `<name>.data` and `<name>.quant_state`.

    Raises ConfigError if one of the two entries is missing, or if a weight cannot be unpacked. If there are packed
    weights, a warning is logged that states the required memory.
    """
    unpacked: State = {}

    for key, value in state.items():
        if key.endswith(_DATA):
            name = key.removesuffix(_DATA)
            if name + _QUANT not in state:
                raise ConfigError(
                    f"tensor '{key}' has no '{name}{_QUANT}', so it cannot be read. Download or copy the files again."
                )
            unpacked[name] = cast('torch.Tensor', _weight(name, value, state[name + _QUANT]))
        elif not key.endswith(_QUANT):
            unpacked[key] = value.detach()
        elif key.removesuffix(_QUANT) + _DATA not in state:
            raise ConfigError(
                f"'{key}' describes the tensor '{key.removesuffix(_QUANT)}{_DATA}', which is missing. "
                'Download or copy the files again.'
            )

    packed = [weight for weight in unpacked.values() if isinstance(weight, Nf4Weight)]
    if packed:
        count = sum(weight.shape[0] * weight.shape[1] for weight in packed)
        logger.warning(
            f'the 4-bit weights are unpacked while loading: they take {count / 2**29:.3g} GiB in 16 bits instead of '
            f'about {count / 2**31:.3g} GiB. With --quantization_bit 4, each layer is then packed again.'
        )

    return unpacked


@dataclass(frozen=True, kw_only=True)
class Nf4Weight(LazyMatrix):
    """A packed weight. The unpacked values are exactly the same as in bitsandbytes of 2023.

    Each byte of `packed` holds two values of four bits, the first value in the high bits. Four bits select one of the
    16 numbers in `values` (nf4 or fp4). A value of the weight is this number times the scale of its block. A block is
    `block` contiguous values.

    If `nested` is None, `absmax` holds the scales in fp32. Otherwise the scales are quantised too (double
    quantisation). Then `absmax` holds indices into a table, and scale = table[index] * second scale + offset. Each
    second scale belongs to a block of contiguous scales. `nested` holds the table, the second scales and the offset.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested: Any
    values: torch.Tensor
    block: int
    size: tuple[int, int]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, columns) of the unpacked weight."""
        return self.size

    def rows(self, which: slice) -> torch.Tensor:
        """Return the rows `which` in the dtype that the weight had before it was packed."""
        import torch

        columns = self.size[1]
        begin = which.start * columns
        end = which.stop * columns
        start = begin // self.block * self.block  # A block always starts at a whole byte.

        # This table has both values for each of the 256 bytes. So one look-up per byte is enough, instead of two.
        pairs = torch.cartesian_prod(self.values, self.values)
        numbers = pairs[self.packed[start // 2 : -(-end // 2)].int()].flatten()[: end - start]

        scales = self._scales(start // self.block, -(-end // self.block)).repeat_interleave(self.block)
        part = (numbers * scales[: end - start])[begin - start :]
        return part.to(self.dtype).view(-1, columns)

    def _scales(self, first: int, last: int) -> torch.Tensor:
        """Return the scales of the blocks from `first` up to, but not including, `last`, in fp32."""
        import torch

        scales = self.absmax[first:last]
        if self.nested is None:
            return scales

        offset, (outer, table, block, *_) = self.nested
        coarse = outer[torch.arange(first, last) // block]
        return cast('torch.Tensor', table[scales.int()] * coarse + offset)


def _weight(name: str, packed: torch.Tensor, quant_state: Any) -> Nf4Weight:
    """Return the weight that the entries `.data` (`packed`) and `.quant_state` describe.

    Raises ConfigError if quant_state has an unknown layout, or if the two entries do not fit each other.
    """
    layout = ConfigError(
        f"'{name}{_QUANT}' does not have the layout of bitsandbytes of 2023. It is damaged, or was written by another "
        'version. Download or copy the files again.'
    )

    try:
        absmax, (rows, columns), dtype, block, nested, _, values = quant_state
        count = rows * columns
        blocks = absmax.numel()
        needed_blocks = -(-count // block)
        needed_bytes = -(-count // 2)
    except (AttributeError, ArithmeticError, TypeError, ValueError):
        raise layout from None

    if packed.numel() != needed_bytes or blocks != needed_blocks:
        raise ConfigError(
            f"tensor '{name}{_DATA}' has {packed.numel()} bytes and {blocks} scales, but a weight of shape "
            f'{(rows, columns)} has {needed_bytes} bytes and {needed_blocks} scales: the file is damaged. Download or '
            'copy it again.'
        )

    weight = Nf4Weight(
        packed=packed.flatten(), absmax=absmax, nested=nested, values=values, block=block, size=(rows, columns),
        dtype=dtype,
    )  # fmt: skip

    try:
        weight.rows(slice(rows - 1, rows))  # A wrong table causes an error only when a row is computed.
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        raise layout from None

    return weight


def native_config(original: Config, *, unquantised: Family) -> dict[str, Any]:
    """Return the arguments of the native configuration class. They are the same as for the unquantised model.

    A native class is a class of transformers or of this project.
    """
    return unquantised.config(_unquantised_config(original))


def native_tensors(state: State, original: Config, *, unquantised: Family) -> State:
    """Unpack the tensors and return them under the names in the native class of the unquantised model."""
    return unquantised.tensors(unpack_state(state), _unquantised_config(original))


def _packed(unquantised: Family) -> Family:
    """Return the family for the 4-bit weights of a model.

    `unquantised` is the family for the unquantised weights of the same model.
    """
    return replace(
        unquantised,
        name=f'{unquantised.name}_4bits',
        matches=partial(_matches, unquantised=unquantised),
        config=partial(native_config, unquantised=unquantised),
        tensors=partial(native_tensors, unquantised=unquantised),
    )


BAICHUAN2_7B_4BITS = _packed(BAICHUAN2_7B)
BAICHUAN2_13B_4BITS = _packed(BAICHUAN2_13B)

"""Baichuan2-7B-Chat-4bits and -13B-: weights that bitsandbytes of 2023 packed, in a layout it no longer reads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.errors import ConfigError
from utils.native.baichuan import BAICHUAN2_7B
from utils.native.baichuan_13b import BAICHUAN2_13B
from utils.native.family import Config, Family, State

if TYPE_CHECKING:
    import torch

_DATA, _QUANT = '.data', '.quant_state'
# Read at once, an even number, so that indices and fp32 values never take more memory than a whole weight.
_BLOCKS = 2**14


def _dense(original: Config) -> Config:
    """Return a config.json as that of the full-width model, which the weights are once they are read."""
    return {field: value for field, value in original.items() if field != 'quantization_config'}


def _matches(original: Config, *, full_width: Family) -> bool:
    quantization = original.get('quantization_config') or {}
    return quantization.get('load_in_4bit') is True and full_width.matches(_dense(original))


def unpack_state(state: State) -> State:
    """Return the state with each `<name>.data` and `<name>.quant_state` replaced by the weight that they encode."""
    unpacked: State = {}
    for key, value in state.items():
        if key.endswith(_DATA):
            name = key.removesuffix(_DATA)
            if name + _QUANT not in state:
                raise ConfigError(f"tensor '{key}' has no '{name}{_QUANT}', so it cannot be read.")
            unpacked[name] = _dequantised(name, value, state[name + _QUANT])
        elif not key.endswith(_QUANT):
            unpacked[key] = value.detach()
        elif key.removesuffix(_QUANT) + _DATA not in state:
            raise ConfigError(f"'{key}' has no tensor '{key.removesuffix(_QUANT)}{_DATA}' that it describes.")
    return unpacked


def _dequantised(name: str, packed: torch.Tensor, quant_state: Any) -> torch.Tensor:
    """Return one weight, exactly as the library that packed it computes it.

    Two values share a byte, the first in the high half. Each is an entry of a table of 16, nf4's or fp4's, times the
    scale of its block.
    """
    import torch

    try:
        absmax, shape, dtype, block, nested, _, values = quant_state
        scales = _scales(absmax, nested)
        count = shape.numel()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        raise ConfigError(
            f"'{name}{_QUANT}' is not laid out as bitsandbytes of 2023 does: it is damaged, or of another version."
        ) from None
    blocks = scales.numel()
    if (packed.numel(), blocks) != (-(-count // 2), -(-count // block)):
        raise ConfigError(
            f"tensor '{name}{_DATA}' has {packed.numel()} bytes and {blocks} scales, which are not those of a weight "
            f'of {tuple(shape)} in blocks of {block}: the file is damaged.'
        )
    # Every byte's two values: a table of 256 rows is read once per byte, not the table of 16 twice.
    pairs, data = torch.cartesian_prod(values, values), packed.flatten()
    dense = torch.empty(count, dtype=dtype)
    step = _BLOCKS * block
    for first in range(0, count, step):
        last = min(first + step, count)
        part = pairs[data[first // 2 : -(-last // 2)].int()].flatten()[: last - first]
        part *= scales[first // block : -(-last // block)].repeat_interleave(block)[: last - first]
        dense[first:last] = part
    return dense.view(shape)


def _scales(absmax: torch.Tensor, nested: Any) -> torch.Tensor:
    """Return the scale of each block, fp32; quantised ones are table entries, scaled by block again, plus an offset."""
    if nested is None:
        return absmax
    offset, (outer, table, block, *_) = nested
    scales: torch.Tensor = table[absmax.int()] * outer.repeat_interleave(block)[: absmax.numel()] + offset
    return scales


def native_config(original: Config, *, full_width: Family) -> dict[str, Any]:
    """Return the configuration's arguments of the full-width model."""
    return full_width.config(_dense(original))


def native_tensors(state: State, original: Config, *, full_width: Family) -> State:
    """Return the tensors of the full-width model."""
    return full_width.tensors(unpack_state(state), _dense(original))


def _packed(full_width: Family) -> Family:
    return replace(
        full_width,
        name=f'{full_width.name}_4bits',
        matches=partial(_matches, full_width=full_width),
        config=partial(native_config, full_width=full_width),
        tensors=partial(native_tensors, full_width=full_width),
    )


BAICHUAN2_7B_4BITS = _packed(BAICHUAN2_7B)
BAICHUAN2_13B_4BITS = _packed(BAICHUAN2_13B)

"""Reads the settings for sharding and offloading from a DeepSpeed configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.cli.arguments import SftArguments


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """The settings that this project reads from a DeepSpeed configuration, and the whole content of the file."""

    # The ZeRO stage. It says what is sharded. 0: nothing; 1: optimizer states; 2: also gradients; 3: also weights.
    stage: int = 0
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    content: Mapping[str, Any]


def read_zero(path: str | Path) -> ZeroConfig:
    """Return the sharding and offloading settings of a DeepSpeed configuration file.

    Raises ConfigError if the file holds no JSON object, if its `zero_optimization` is not an object, or if the stage is
    not a number.
    """
    content = read_json(Path(path), remedy='Use --deepspeed_config_path ds_config/zero2.json, for example.')
    zero = content.get('zero_optimization', {})
    if not isinstance(zero, dict):
        raise ConfigError(
            f'--deepspeed_config_path {path}: zero_optimization must be an object, got {zero!r}. Write for example '
            '"zero_optimization": {"stage": 2}.'
        )
    try:
        stage = int(zero.get('stage', 0))
    except (TypeError, ValueError):
        raise ConfigError(
            f'--deepspeed_config_path {path}: the stage of zero_optimization must be a number, got {zero["stage"]!r}. '
            'Write for example "zero_optimization": {"stage": 2}.'
        ) from None
    return ZeroConfig(
        stage=stage,
        offloads_optimizer=_offloads(zero, 'offload_optimizer'),
        offloads_weights=_offloads(zero, 'offload_param'),
        content=content,
    )


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    """Return whether the section `name` of zero_optimization moves tensors from the GPU to a CPU or a disk."""
    settings = zero.get(name)
    return isinstance(settings, dict) and settings.get('device', 'none') not in ('none', None)


def shards_weights(args: SftArguments) -> bool:
    """Return whether each process holds only a part of the weights (--fsdp true or ZeRO stage 3)."""
    if args.fsdp:
        return True
    return args.deepspeed_config_path is not None and read_zero(args.deepspeed_config_path).stage == 3

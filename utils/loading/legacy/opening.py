"""Opens a model folder with an original layout of 2023 in a native class.

In 2023 these models came with code of their own, which reads the original layout. A native class is a class of
transformers or of this project.
"""

from __future__ import annotations

import importlib
from copy import deepcopy
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError, error_text
from utils.base.files import read_json
from utils.base.logger import logger
from utils.loading.devices import resolve_device_map
from utils.loading.folder import read_config
from utils.loading.layers import exclude_towers
from utils.loading.legacy.family import Family
from utils.loading.legacy.lazy import compute_all
from utils.loading.weight_files import read_state

# The maximum number of tensor names in a message.
_MAX_NAMES = 5


def _class(name: str) -> Any:
    """Return the class with this name: 'module:class' is a class of this project, 'class' a class of transformers."""
    module, _, cls = name.rpartition(':')
    return getattr(importlib.import_module(f'utils.loading.legacy.classes.{module}' if module else 'transformers'), cls)


def open_original(family: Family, model_dir: Path, **options: Any) -> Any:
    """Return the model of a folder with an original layout, in the native class of its family.

    `options` are passed to from_pretrained (dtype, device_map, quantization_config, ...). Raises ConfigError if
    config.json does not fit the family, if a tensor of the class is missing, if a tensor of the checkpoint is not used,
    or if a shape is wrong.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    original = read_config(model_dir)

    try:
        config = _class(family.config_class)(**family.config(original))
    except (ArithmeticError, LookupError, TypeError) as error:
        raise ConfigError(f'{model_dir}/config.json does not fit family {family.name}: {error_text(error)}') from error

    exclude_towers(options.get('quantization_config'), lambda: _class(family.model_class)(deepcopy(config)))

    state = family.tensors(read_state(model_dir), original)
    if is_deepspeed_zero3_enabled():  # The loader of ZeRO-3 cannot compute lazy matrices; it copies only tensors.
        state = compute_all(state)

    cls = _class(family.model_class)
    options['device_map'] = resolve_device_map(options.get('device_map'), lambda: cls(config))

    # With ignore_mismatched_sizes, a wrong shape is not an error here. check_loading then names the tensors.
    model, info = cls.from_pretrained(
        None,
        config=config,
        state_dict=state,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **drop_unsupported_attention(cls, options),
    )
    check_loading(info, model_dir, f'family {family.name}')
    _read_generation(model, model_dir)

    return model


def open_saved(family: Family, model_dir: Path, **options: Any) -> Any:
    """Return a model that was saved in a class of this project. AutoModel of transformers does not know these classes.

    `options` are passed to from_pretrained. Raises ConfigError if tensors are missing, not used, or of a wrong shape.
    """
    cls = _class(family.model_class)

    def build() -> Any:
        return cls(cls.config_class.from_pretrained(model_dir))

    exclude_towers(options.get('quantization_config'), build)
    options['device_map'] = resolve_device_map(options.get('device_map'), build)

    # With ignore_mismatched_sizes, a wrong shape is not an error here. check_loading then names the tensors.
    model, info = cls.from_pretrained(
        model_dir, output_loading_info=True, ignore_mismatched_sizes=True, **drop_unsupported_attention(cls, options)
    )
    check_loading(info, model_dir, f'family {family.name}')

    return model


def build_empty(family: Family, model_dir: Path) -> Any:
    """Return the model that the config.json of a folder describes. No weight file is read.

    The weights of the model are random. On the `meta` device, the model has no weights.
    """
    cls = _class(family.model_class)

    if read_config(model_dir)['model_type'] == family.model_type != family.saved_model_type:
        return cls(_class(family.config_class)(**family.config(read_config(model_dir))))

    return cls(cls.config_class.from_pretrained(model_dir))


def drop_unsupported_attention(cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, without flash attention if the class does not support it.

    ALiBi and Bloom add a bias to the attention scores. Flash attention cannot add such a bias.
    """
    if options.get('attn_implementation') != 'flash_attention_2' or cls._supports_flash_attn:
        return options

    logger.info(f'attn_implementation = default because {cls.__name__} does not support flash attention')
    return {**options, 'attn_implementation': None}


def _read_generation(model: Any, model_dir: Path) -> None:
    """Set the generation settings of the model from generation_config.json, if the folder has this file.

    Settings that only the original code knows are ignored.
    """
    from transformers import GenerationConfig

    if not (model_dir / 'generation_config.json').is_file():
        return

    known = GenerationConfig().to_dict()
    given = read_json(model_dir / 'generation_config.json')
    chosen = {name: value for name, value in given.items() if name in known and name != 'transformers_version'}

    model.generation_config = GenerationConfig(**{**model.generation_config.to_dict(), **chosen})


def make_generation_savable(model: Any) -> None:
    """Make the sampling settings of a model valid. transformers does not save invalid settings.

    Sampling settings such as top_p are valid only with do_sample=True. If they are invalid and do_sample is missing,
    do_sample is set to True, because in 2023 the sampling settings alone turned sampling on. If they are invalid and
    do_sample is False, they have no effect and are removed. Other invalid settings are not changed.
    """
    settings = model.generation_config

    try:
        settings.validate(strict=True)
    except ValueError:
        if settings.do_sample is not False:
            settings.do_sample = True
            return

        for name in ('temperature', 'top_k', 'top_p', 'min_p', 'typical_p', 'epsilon_cutoff', 'eta_cutoff', 'top_h'):
            setattr(settings, name, None)


def check_loading(info: dict[str, Any], model_dir: Path, what: str, *, unexpected: bool = True) -> None:
    """Raise ConfigError if tensors are missing or have a wrong shape.

    With `unexpected`, ConfigError is also raised if tensors of the files are not used. `info` is the loading info of
    from_pretrained. `what` names the class or the family in the message.
    """
    kinds = ['missing', 'mismatched']
    if unexpected:
        kinds.append('unexpected')

    for kind in kinds:
        if names := sorted(map(str, info[f'{kind}_keys'])):
            shown = ', '.join(names[:_MAX_NAMES]) + (', ...' if len(names) > _MAX_NAMES else '')
            remedy = 'Use the weights and config.json of one repository or folder.'
            raise ConfigError(f'{model_dir}, read as {what}, has {len(names)} {kind} tensors: {shown}. {remedy}')

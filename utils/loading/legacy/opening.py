"""Opens a checkpoint in an original 2023 layout as a native class."""

from __future__ import annotations

import importlib
from copy import deepcopy
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError, error_text
from utils.base.files import read_json
from utils.base.logger import logger
from utils.loading.devices import place
from utils.loading.folder import read_config
from utils.loading.layers import spare_towers
from utils.loading.legacy.family import Family
from utils.loading.legacy.lazy import computed
from utils.loading.weight_files import read_state

_NAMED = 5


def _class(name: str) -> Any:
    """Return a class of transformers by its name, or one of ours written 'module:class'."""
    module, _, cls = name.rpartition(':')
    return getattr(importlib.import_module(f'utils.loading.legacy.classes.{module}' if module else 'transformers'), cls)


def open_original(family: Family, model_dir: Path, **options: Any) -> Any:
    """Return the model; `options` go to from_pretrained (dtype, device_map, quantization_config, ...).

    Every tensor of the class must come from the checkpoint and every tensor of the checkpoint must be used: anything
    missing, unexpected or of another shape is a ConfigError that names it.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    original = read_config(model_dir)
    try:
        native = _class(family.config_class)(**family.config(original))
    except (ArithmeticError, LookupError, TypeError) as error:
        raise ConfigError(f'{model_dir}/config.json does not fit family {family.name}: {error_text(error)}') from error
    spare_towers(options.get('quantization_config'), lambda: _class(family.model_class)(deepcopy(native)))
    state = family.tensors(read_state(model_dir), original)
    if is_deepspeed_zero3_enabled():  # copies what is a tensor, and on one process alone
        state = computed(state)
    # Shapes that do not fit are let through to be named below, where the library would only count them.
    cls = _class(family.model_class)
    options['device_map'] = place(options.get('device_map'), lambda: cls(native))
    model, info = cls.from_pretrained(
        None,
        config=native,
        state_dict=state,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **fitting(cls, options),
    )
    check_loading(info, model_dir, f'family {family.name}')
    _read_generation(model, model_dir)
    return model


def open_saved(family: Family, model_dir: Path, **options: Any) -> Any:
    """Return a model that was saved in a class of ours, which plain AutoModel does not know."""
    cls = _class(family.model_class)

    def built() -> Any:
        return cls(cls.config_class.from_pretrained(model_dir))

    spare_towers(options.get('quantization_config'), built)
    options['device_map'] = place(options.get('device_map'), built)
    model, info = cls.from_pretrained(model_dir, output_loading_info=True, **fitting(cls, options))
    check_loading(info, model_dir, f'family {family.name}')
    return model


def build_empty(family: Family, model_dir: Path) -> Any:
    """Return the model that a directory of a family describes, without weights where torch's device is `meta`."""
    cls = _class(family.model_class)
    if read_config(model_dir)['model_type'] == family.model_type != family.saved_model_type:
        return cls(_class(family.config_class)(**family.config(read_config(model_dir))))
    return cls(cls.config_class.from_pretrained(model_dir))


def fitting(cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options without flash attention where a class has none: ALiBi and Bloom add a bias that it lacks."""
    if options.get('attn_implementation') != 'flash_attention_2' or cls._supports_flash_attn:
        return options
    logger.info(f'attention is its own default because {cls.__name__} takes no flash attention')
    return {**options, 'attn_implementation': None}


def _read_generation(model: Any, model_dir: Path) -> None:
    """Give a model the settings of generation_config.json; those that only the original code knew are left out."""
    from transformers import GenerationConfig

    if (model_dir / 'generation_config.json').is_file():
        known = GenerationConfig().to_dict()
        given = read_json(model_dir / 'generation_config.json')
        chosen = {name: value for name, value in given.items() if name in known and name != 'transformers_version'}
        model.generation_config = GenerationConfig(**{**model.generation_config.to_dict(), **chosen})


def make_generation_savable(model: Any) -> None:
    """Have sampling settings without do_sample mean sampling, as in 2023; today they could not be saved.

    Where do_sample is false they have no effect, and are left out.
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
    """Raise ConfigError for tensors that are missing, of another shape or, where that is asked, unexpected."""
    for problem in ('missing_keys', 'mismatched_keys', *(('unexpected_keys',) if unexpected else ())):
        if names := sorted(map(str, info[problem])):
            shown = ', '.join(names[:_NAMED]) + (', ...' if len(names) > _NAMED else '')
            kind = problem.removesuffix('_keys')
            remedy = 'Get weights and config.json from one place.'
            raise ConfigError(f'{model_dir} as {what} has {len(names)} {kind} tensors: {shown}. {remedy}')

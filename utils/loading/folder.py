"""Reads facts about a model folder from its small files, without opening the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import Keys, check_keys, read_json
from utils.loading.gguf import gguf_problem, is_gguf

ADAPTER_CONFIG = 'adapter_config.json'
_COPY_AGAIN = 'Copy the adapter again.'
_CONFIG_KEYS: Keys = {
    'model_type': str | None,
    'text_config': dict | None,
    'vision_config': dict | None,
    'quantization_config': dict | None,
}
_ADAPTER_KEYS: Keys = {
    'peft_type': str | None,
    'target_modules': str | list[str] | None,
    'target_parameters': list[str] | None,
    'modules_to_save': list[str] | None,
    'trainable_token_indices': ({'*': list[int]}, list[int], None),
    'base_model_name_or_path': str | None,
    'use_dora': bool | None,
    'use_rslora': bool | None,
}
_LORA_KEYS: Keys = {'r': int, 'lora_alpha': float}


def check_model_dir(model_dir: Path) -> str | None:
    """Return the reason why a local folder or a GGUF file cannot be opened. Returns None if no problem is found.

    This function imports neither torch nor transformers.
    """
    if is_gguf(model_dir):
        return gguf_problem(model_dir)

    if files := _only_gguf(model_dir):
        return f'model directory {model_dir} holds GGUF files and no config.json. Name the file: {files[0]}.'

    if not model_dir.exists() and model_dir.suffix.lower() == '.gguf':
        return (
            f'--model_id_or_path {model_dir}: there is no such file (looked in {model_dir.absolute().parent}). Correct '
            'the path.'
        )
    if not model_dir.is_dir():
        what = 'is a file' if model_dir.exists() else f'is not there (looked in {model_dir.absolute().parent})'
        return f'model directory {model_dir} {what}.'

    config = model_dir / 'config.json'
    if not config.is_file():
        hint = ' It holds an adapter: pass it to llm_infer.py with --ckpt_dir.' if is_adapter(model_dir) else ''
        return f'model directory {model_dir} has no config.json, so its architecture is unknown.{hint}'

    try:
        found = read_config(model_dir)
    except ConfigError as error:
        return error.problems[0]

    if 'model_type' not in found:
        return f'{config} names no model_type, so its architecture is unknown.'

    return None


def _only_gguf(model_dir: Path) -> list[Path]:
    """Return the GGUF files of a folder without config.json. Returns [] if there are none."""
    if (model_dir / 'config.json').is_file():
        return []
    return sorted(model_dir.glob('*.[gG][gG][uU][fF]'))


def stored_quantization(model_dir: Path) -> str | None:
    """Return the quant_method in config.json if it is gptq, awq or bitsandbytes. Only LoRA can train such weights.

    Returns None if there is no config.json, or if config.json has no quant_method or a different quant_method.
    """
    config = read_config(model_dir) if (model_dir / 'config.json').is_file() else {}

    settings = config.get('quantization_config')
    method = settings.get('quant_method') if isinstance(settings, dict) else None

    return str(method) if method in ('gptq', 'awq', 'bitsandbytes') else None


def stored_dtype(model_dir: Path) -> str | None:
    """Return the name of the dtype in config.json, e.g. 'bfloat16'. Returns None if there is no dtype.

    The key is `dtype`, or `torch_dtype` before transformers 5. In a multimodal model, the key can be in text_config.
    """
    config = read_config(model_dir)
    for part in (config, config.get('text_config') or {}):
        if name := part.get('dtype') or part.get('torch_dtype'):
            return str(name)
    return None


def is_adapter(directory: Path) -> bool:
    """Return whether a folder contains a PEFT adapter."""
    return (directory / ADAPTER_CONFIG).is_file()


def read_config(model_dir: Path) -> dict[str, Any]:
    """Return the content of config.json. Raises ConfigError if the file is missing, or a value has the wrong type."""
    content: dict[str, Any] = read_json(model_dir / 'config.json', keys=_CONFIG_KEYS)
    return content


def read_adapter_config(folder: Path, *, remedy: str = _COPY_AGAIN) -> dict[str, Any]:
    """Return the content of adapter_config.json. A LoRA adapter must state its rank and its alpha.

    Raises ConfigError with `remedy` if the file is missing, or if a value has the wrong type.
    """
    content: dict[str, Any] = read_json(folder / ADAPTER_CONFIG, keys=_ADAPTER_KEYS, remedy=remedy)
    if content.get('peft_type') == 'LORA':
        check_keys(content, _LORA_KEYS, str(folder / ADAPTER_CONFIG), remedy=remedy)
    return content

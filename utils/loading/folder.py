"""Reads facts about a model folder from its small files, without opening the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.loading.gguf import gguf_problem, is_gguf
from utils.loading.gguf_header import read_header


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
        found = read_json(config)
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
    return (directory / 'adapter_config.json').is_file()


def read_config(model_dir: Path) -> dict[str, Any]:
    """Return the content of config.json. Raises ConfigError if the file is missing or is not a JSON object."""
    content: dict[str, Any] = read_json(model_dir / 'config.json')
    return content


def has_chat_template(directory: Path) -> bool:
    """Return whether a model has a chat template: in a file of its folder, or in its GGUF file.

    In a folder, only the names of files and the text of tokenizer_config.json are searched. The template is not read.
    """
    if is_gguf(directory):
        return read_header(directory).chat_template is not None

    config = directory / 'tokenizer_config.json'

    if (directory / 'chat_template.jinja').is_file() or (directory / 'chat_template.json').is_file():
        return True

    return config.is_file() and '"chat_template"' in config.read_text(encoding='utf-8', errors='replace')

"""Reads facts about a model folder from its small files, without opening the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.files import read_json


def check_model_dir(model_dir: Path) -> str | None:
    """Return the reason why a local folder cannot be opened. Returns None if no problem is found.

    This function imports neither torch nor transformers.
    """
    if (model_dir.is_file() and model_dir.suffix.lower() == '.gguf') or _holds_only_gguf(model_dir):
        return (
            f'model directory {model_dir}: GGUF is a format for inference and is not read. Name the folder or hub '
            'id that it was made from, or convert it: AutoModelForCausalLM and AutoTokenizer of transformers take '
            "gguf_file='<its name>' in from_pretrained(<its folder>), and save_pretrained writes a folder for "
            '--model_id_or_path.'
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


def _holds_only_gguf(model_dir: Path) -> bool:
    """Return whether a folder has a GGUF file and no config.json."""
    return (
        model_dir.is_dir() and not (model_dir / 'config.json').is_file() and any(model_dir.glob('*.[gG][gG][uU][fF]'))
    )


def stored_quantization(model_dir: Path) -> str | None:
    """Return the quant_method in config.json if it is gptq, awq or bitsandbytes. Only LoRA can train such weights.

    Returns None if config.json has no quant_method or a different quant_method.
    """
    config = read_config(model_dir) if (model_dir / 'config.json').is_file() else {}

    settings = config.get('quantization_config')
    method = settings.get('quant_method') if isinstance(settings, dict) else None

    return str(method) if method in ('gptq', 'awq', 'bitsandbytes') else None


def is_adapter(directory: Path) -> bool:
    """Return whether a folder contains a PEFT adapter."""
    return (directory / 'adapter_config.json').is_file()


def read_config(model_dir: Path) -> dict[str, Any]:
    """Return the content of config.json. Raises ConfigError if it is not a JSON object."""
    content: dict[str, Any] = read_json(model_dir / 'config.json')
    return content


def has_chat_template(directory: Path) -> bool:
    """Return whether a model folder has a chat template, as a file or inside tokenizer_config.json."""
    config = directory / 'tokenizer_config.json'

    if (directory / 'chat_template.jinja').is_file() or (directory / 'chat_template.json').is_file():
        return True

    return config.is_file() and '"chat_template"' in config.read_text(encoding='utf-8', errors='replace')

"""Converts the embedded quick-start model, a GGUF file inside a pip package, to an ordinary bf16 checkpoint."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from utils.base.cache import cache_dir
from utils.base.logger import logger
from utils.loading.fingerprint import fingerprint
from utils.loading.tokenizer_files import save_tokenizer

# Control tokens have this token type: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_CONTROL = 3
# Raise this number when a change of `_convert` changes the files.
_FORMAT = 2


def find_packaged_file(package: str, file: str) -> Path | None:
    """Return the path of a file in an installed package. The package is not imported.

    Returns None if the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None

    path = Path(next(iter(spec.submodule_search_locations))) / file
    return path if path.is_file() else None


def dense_directory(gguf: Path) -> Path:
    """Return a cache folder with the weights of a GGUF file as bf16 safetensors. The first call writes the folder.

    For 135M parameters, reading the GGUF file takes about 15 s, and opening the folder takes less than 1 s. The name of
    the folder contains the sha256 of the file. The folder is written under a temporary name and then renamed, so it is
    either complete or absent.
    """
    target = cache_dir() / f'gguf-{fingerprint(gguf).sha256[:32]}-{_FORMAT}'
    if target.is_dir():
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info(f'reading {gguf.name} into {target} (once per machine)')
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix='.aside-'))

    try:
        _convert(gguf, temporary)
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # A different process may have written the folder at the same time.
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    return target


def model_directory(path: Path) -> Path:
    """Return the folder with the weights: `path` itself or, if it is a GGUF file, its folder in the cache."""
    return dense_directory(path) if path.is_file() else path


def _convert(gguf: Path, target: Path) -> None:
    """Write the model (in bf16) and the tokenizer of a GGUF file to the folder `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _complete_tokenizer(tokenizer, gguf)
    save_tokenizer(tokenizer, target)


def _complete_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Add to the tokenizer what transformers does not read from GGUF: control tokens, and the split at every digit."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, pre_tokenizers

    fields = GGUFReader(gguf).fields
    types = fields['tokenizer.ggml.token_type']
    tokens = fields['tokenizer.ggml.tokens']

    control = [
        bytes(tokens.parts[token]).decode()
        for kind, token in zip(types.data, tokens.data, strict=True)
        if types.parts[kind][0] == _CONTROL
    ]
    tokenizer.add_special_tokens(
        {'additional_special_tokens': [AddedToken(text, special=True, normalized=False) for text in control]}
    )

    pre = fields['tokenizer.ggml.pre']
    assert bytes(pre.parts[pre.data[0]]) == b'smollm', 'only the pre-tokenizer of SmolLM is implemented here'

    # The text is split at every digit, and then by the pattern of GPT-2: LLAMA_VOCAB_PRE_TYPE_SMOLLM in
    # https://github.com/ggml-org/llama.cpp.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

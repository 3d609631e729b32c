"""The embedded quick-start model: a GGUF file inside a pip package, read as an ordinary bf16 checkpoint."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from utils.base.cache import cache_dir
from utils.base.logger import logger
from utils.loading.fingerprint import fingerprint

# GGUF's token type for control tokens: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_CONTROL = 3


def find_packaged_file(package: str, file: str) -> Path | None:
    """Return the path of a file inside an installed package, which is not imported; None where it is not."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    return path if path.is_file() else None


def dense_directory(gguf: Path) -> Path:
    """Return a directory with the file's weights as bf16 safetensors, made on the first call.

    Reading GGUF takes about 15 s for 135M parameters, the directory under one. It is named by the file's sha256,
    written aside and renamed, so that it is whole or absent.
    """
    target = cache_dir() / f'gguf-{fingerprint(gguf).sha256[:32]}'
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info(f'reading {gguf.name} into {target} (once per machine)')
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix='.aside-'))
    try:
        _convert(gguf, aside)
        aside.chmod(0o755)
        aside.rename(target)
    except OSError:
        if not target.is_dir():  # another process may have been first
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
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
    tokenizer.save_pretrained(target)


def _complete_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Add what transformers leaves behind: the control tokens, and SmolLM's cut at every digit."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, pre_tokenizers

    fields = GGUFReader(gguf).fields
    types, tokens = fields['tokenizer.ggml.token_type'], fields['tokenizer.ggml.tokens']
    control = [
        bytes(tokens.parts[t]).decode()
        for k, t in zip(types.data, tokens.data, strict=True)
        if types.parts[k][0] == _CONTROL
    ]
    tokenizer.add_special_tokens(
        {'additional_special_tokens': [AddedToken(text, special=True, normalized=False) for text in control]}
    )
    pre = fields['tokenizer.ggml.pre']
    assert bytes(pre.parts[pre.data[0]]) == b'smollm', 'only the pre-tokenizer of SmolLM is written here'
    # https://github.com/ggml-org/llama.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM: every digit by itself, then GPT-2's pattern.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

"""Reads a GGUF file as an ordinary model: its weights are dequantised to bf16 and written to a folder of the cache."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from utils.base.cache import cache_dir
from utils.base.errors import ConfigError, error_text
from utils.base.logger import logger
from utils.loading.fingerprint import fingerprint
from utils.loading.gguf_header import GgufHeader, read_header
from utils.loading.portable import save_portable

# Raise this number when a change here changes the files in the cache.
_FORMAT = 2
# The architectures that are read. Files of these were converted by llama.cpp from small models with random weights, and
# gave the logits of these models.
ARCHITECTURES = ('llama', 'qwen2', 'qwen3', 'gemma3')
# The types of tensors that the package gguf can dequantise.
_TYPES = {
    'F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'TQ1_0',
    'TQ2_0', 'MXFP4', 'NVFP4', 'IQ2_XXS', 'IQ2_XS', 'IQ2_S', 'IQ3_XXS', 'IQ3_S', 'IQ1_S', 'IQ1_M', 'IQ4_NL', 'IQ4_XS',
}  # fmt: skip
# The names by which a file says how text is split before byte-level BPE, as far as transformers or _split knows them.
_SPLITS = {
    'gpt-2', 'smollm', 'llama3', 'llama-v3', 'llama-bpe', 'falcon3', 'tekken', 'qwen2', 'deepseek-r1-qwen', 'megrez',
}  # fmt: skip
# The settings of a file, and the attribute of the configuration that each decides.
_SETTINGS = {
    'context_length': 'max_position_embeddings',
    'block_count': 'num_hidden_layers',
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
    'attention.key_length': 'head_dim',
    'vocab_size': 'vocab_size',
}
# Settings that are read in other places, or that follow from the settings above.
_OTHER_SETTINGS = {
    'attention.value_length', 'attention.sliding_window', 'rope.dimension_count', 'rope.freq_base', 'rope.scaling.type',
    'rope.scaling.factor', 'rope.freq_base_swa',
}  # fmt: skip
# The factors for the frequencies of the rotary embedding, a tensor that only models with Llama 3's scaling have.
_ROPE_FACTORS = 'rope_freqs.weight'
# The scaling of Llama 3.1 (factor 8) and of Llama 3.2 (factor 32).
_LLAMA3 = [
    {
        'rope_type': 'llama3',
        'factor': factor,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192,
    }
    for factor in (8.0, 32.0)
]
# The number of layers of Gemma 3 27B.
_LAYERS_27B = 62
_NAME_ANOTHER = 'Name the folder or hub id that the file was made from.'


def is_gguf(path: Path) -> bool:
    """Return whether the path is a file with the suffix .gguf."""
    return path.suffix.lower() == '.gguf' and path.is_file()


def gguf_problem(path: Path) -> str | None:
    """Return the reason why a GGUF file cannot be read as a model. Returns None if its header shows no problem.

    Only the header is read, and nothing heavy is imported. `open_gguf` may still find problems.
    """
    try:
        header = read_header(path)
    except ConfigError as error:
        return error.problems[0]

    arch = header.architecture
    parts = header.metadata.get('split.count', 1)
    unread = sorted({kind for kind, _ in header.tensors.values()} - _TYPES)
    unknown = sorted(
        name
        for name in (key.removeprefix(f'{arch}.') for key in header.metadata if key.startswith(f'{arch}.'))
        if name not in _SETTINGS.keys() | _OTHER_SETTINGS
    )
    if parts > 1:
        return f'{path} is one of {parts} parts. Join them with llama-gguf-split --merge of llama.cpp.'
    if arch not in ARCHITECTURES:
        known = ', '.join(ARCHITECTURES)
        return f"{path}: GGUF files of architecture '{arch}' are not supported, only {known}. {_NAME_ANOTHER}"
    if unread:
        return f'{path}: its tensors have the type {", ".join(unread)}, which is not supported. {_NAME_ANOTHER}'
    if unknown:
        return (
            f'{path}: its setting {arch}.{unknown[0]} is not known here, so the model might be computed wrongly. '
            f'{_NAME_ANOTHER}'
        )
    return _tokenizer_problem(path, header)


def _tokenizer_problem(path: Path, header: GgufHeader) -> str | None:
    """Return the reason why no tokenizer can be built from the file. Returns None if one can be built."""
    kind = header.metadata.get('tokenizer.ggml.model')
    split = header.metadata.get('tokenizer.ggml.pre')
    if kind == 'llama' or (kind == 'gpt2' and split in _SPLITS):
        return None
    return (
        f"{path}: its tokenizer (model '{kind}', pre '{split}') is not known here, so text might get wrong tokens. "
        f'{_NAME_ANOTHER}'
    )


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
    """Return a cache folder with the model of a GGUF file as bf16 safetensors. The first call writes the folder.

    If the file changes, the next call writes a new folder. A folder is either complete or absent. Raises ConfigError if
    the file cannot be read as a model, or if the cache cannot be written.
    """
    # For 135M parameters, reading the GGUF file takes about 15 s, and opening the folder takes less than 1 s.
    found = fingerprint(gguf)
    # The hash of a file above 1 GiB covers only its first and last MiB, so the time of its last change is added.
    changed = '' if found.covers == 'whole' else f'-{gguf.stat().st_mtime_ns}'
    target = cache_dir() / f'gguf-{found.sha256[:32]}{changed}-{_FORMAT}'
    if target.is_dir():
        return target

    logger.info(f'reading {gguf.name} into {target} (once per machine)')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The folder is written under a temporary name and then renamed.
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix='.aside-'))
        try:
            model, tokenizer = open_gguf(gguf)
            model.save_pretrained(temporary)
            save_portable(tokenizer, temporary)
            temporary.chmod(0o755)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not target.is_dir():  # A different process may have written the folder at the same time.
            raise ConfigError(
                f'{target.parent}: the cache folder cannot be written: {error.strerror}. '
                'Set the environment variable ASSAY_CACHE to another folder.'
            ) from error

    return target


def model_directory(path: Path) -> Path:
    """Return the folder with the weights: `path` itself or, if it is a GGUF file, the result of `dense_directory`."""
    return dense_directory(path) if path.is_file() else path


def open_gguf(gguf: Path, dtype: Any = None) -> tuple[Any, Any]:
    """Return the model and the tokenizer of a GGUF file. The model has dequantised weights in `dtype` (default: bf16).

    Raises ConfigError if the file cannot be read as a model, or if its tensors are not those of the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    if problem := gguf_problem(gguf):
        raise ConfigError(problem)
    header = read_header(gguf)

    try:
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _complete_config(config, header, gguf)
        model, loading = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype or torch.bfloat16,
            output_loading_info=True,
        )
        tokenizer = _open_tokenizer(gguf, header)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, NotImplementedError) as error:
        why = error_text(error).rstrip('.')
        raise ConfigError(f'{gguf} cannot be read as a model: {why}. {_NAME_ANOTHER}') from error

    _check_tensors(model, header, gguf, loading['missing_keys'])
    return model, tokenizer


def _check_tensors(model: Any, header: GgufHeader, gguf: Path, missing: Any) -> None:
    """Raise ConfigError if the file lacks a tensor of the model, or has a different number of tensors.

    `missing` are the names of the model's tensors that transformers did not find in the file.
    """
    stored = sum(1 for name in header.tensors if name != _ROPE_FACTORS)
    used = len(list(model.named_parameters()))
    if missing or stored != used:
        lacks = f'; the file lacks {min(missing)}' if missing else ''
        raise ConfigError(
            f'{gguf} has {stored} tensors, and {type(model).__name__} has {used}: they do not match{lacks}. '
            f'{_NAME_ANOTHER}'
        )


def _complete_config(config: Any, header: GgufHeader, gguf: Path) -> None:
    """Set the fields of the configuration from the settings of the file.

    transformers does not read all settings, for example not the head size of Qwen3. Raises ConfigError if a setting has
    a value that is not supported.
    """
    for name, attribute in _SETTINGS.items():
        if (value := header.setting(name)) is not None:
            setattr(config, attribute, value)

    window = header.setting('attention.sliding_window')
    if config.model_type in ('gemma3_text', 'mistral'):
        config.sliding_window = window
    elif window is not None:
        raise ConfigError(f'{gguf}: {config.model_type} with a sliding window is not supported. {_NAME_ANOTHER}')

    if config.model_type == 'gemma3_text':
        _set_gemma(config, header)

    widths = {header.setting('rope.dimension_count'), header.setting('attention.value_length')} - {None}
    head = _head_size(config)
    if widths - {head}:
        raise ConfigError(
            f'{gguf}: its heads have the size {head}, but rope.dimension_count or attention.value_length is '
            f'{max(widths - {head})}. Such heads are not supported. {_NAME_ANOTHER}'
        )
    _set_rope(config, header, gguf)


def _set_gemma(config: Any, header: GgufHeader) -> None:
    """Set two values of a Gemma 3 model: query_pre_attn_scalar, and the base of the local rotary embedding.

    The base is set only if the file states it. query_pre_attn_scalar is never stated in the file. In the 27B model, it
    is hidden size / number of heads. In all other models, it is the size of a head. As in llama.cpp, the 27B model is
    recognised by its number of layers.
    """
    is_27b = config.num_hidden_layers == _LAYERS_27B
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    local = header.setting('rope.freq_base_swa')
    if local is not None:
        config.rope_parameters['sliding_attention']['rope_theta'] = local


def _head_size(config: Any) -> int:
    """Return the size of an attention head. The size is computed if the configuration has no head_dim."""
    return int(config.to_dict().get('head_dim') or config.hidden_size // config.num_attention_heads)


def _set_rope(config: Any, header: GgufHeader, gguf: Path) -> None:
    """Set the scaling of the rotary embedding. Raises ConfigError if the kind or the factors are not known."""
    rope = config.rope_parameters
    rope = rope.get('full_attention', rope)  # Gemma 3 has one setting for each kind of layer.
    kind = header.setting('rope.scaling.type')
    if kind == 'linear':
        rope.update(rope_type='linear', factor=float(header.setting('rope.scaling.factor')))
    elif kind not in (None, 'none'):
        raise ConfigError(
            f"{gguf}: its rotary embedding has the scaling '{kind}', which is not supported. {_NAME_ANOTHER}"
        )

    if _ROPE_FACTORS not in header.tensors:
        return
    stored = _rope_factors(gguf)
    for scaling in _LLAMA3:
        config.rope_parameters = {**rope, **scaling}
        if _is_close(stored, _factors_of(config)):
            return
    raise ConfigError(
        f'{gguf}: the factors of its rotary embedding are neither those of Llama 3.1 nor of Llama 3.2. {_NAME_ANOTHER}'
    )


def _rope_factors(gguf: Path) -> Any:
    """Return the factors by which the file divides the frequencies of the rotary embedding, as a tensor."""
    import torch
    from gguf import GGUFReader

    found = next(tensor for tensor in GGUFReader(gguf).tensors if tensor.name == _ROPE_FACTORS)
    return torch.tensor(found.data.copy())


def _factors_of(config: Any) -> Any:
    """Return the factors by which a configuration divides the frequencies of the rotary embedding, as a tensor."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS['llama3'](config, torch.device('cpu'))
    head = _head_size(config)
    plain = config.rope_parameters['rope_theta'] ** -(torch.arange(0, head, 2).float() / head)
    return plain / scaled


def _is_close(one: Any, other: Any) -> bool:
    """Return whether two tensors have the same shape and the same elements, up to a relative difference of 1e-4."""
    import torch

    return one.shape == other.shape and bool(torch.allclose(one, other, rtol=1e-4))


def _open_tokenizer(gguf: Path, header: GgufHeader) -> Any:
    """Return the tokenizer of a GGUF file."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if header.metadata.get('tokenizer.ggml.pre') == 'smollm':
        # The text is split at every digit, and then by the pattern of GPT-2: LLAMA_VOCAB_PRE_TYPE_SMOLLM in
        # https://github.com/ggml-org/llama.cpp. transformers does not know this name.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer

"""Builds the tokenizers of Qwen and Qwen-VL from qwen.tiktoken, as objects of the `tokenizers` library."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.loading.legacy.tokenizers.sentencepiece import common_options, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Before merging, tokenization_qwen.py of Qwen splits a text by this pattern. Every digit is split off.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)

_END_OF_TEXT = '<|endoftext|>'
_IM_START = '<|im_start|>'
_IM_END = '<|im_end|>'

# The special tokens in the order of their ids. Their ids follow the last rank in qwen.tiktoken.
_SPECIAL = (_END_OF_TEXT, _IM_START, _IM_END, *(f'<|extra_{i}|>' for i in range(205)))
_VISION = ('<ref>', '</ref>', '<box>', '</box>', '<quad>', '</quad>', '<img>', '</img>', '<imgpad>')


def read_ranks(file: Path) -> dict[bytes, int]:
    """Return a dict from token to rank for all lines of a tiktoken file.

    Raises ConfigError if the file is missing, truncated or corrupt.
    """
    ranks: dict[bytes, int] = {}

    try:
        for line in file.read_bytes().splitlines():
            if not line.strip():
                continue

            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if token in ranks:
                raise ValueError(f'token {token!r} occurs twice')

            ranks[token] = int(rank)
    except (OSError, ValueError) as error:
        raise ConfigError(f'{file} cannot be read as lines of token and rank: {error}. Download it again.') from None

    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        why = f'byte {missing[0]} has no rank' if missing else f'the {len(ranks)} ranks have gaps'
        raise ConfigError(f'{file} is truncated or corrupt: {why}. Download it again.')

    return ranks


def _backend(ranks: Mapping[bytes, int], special: tuple[str, ...]) -> Any:
    """Return a `tokenizers.Tokenizer` for these ranks. The id of a token is its rank.

    The `special` tokens get the ids after the last rank.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = bytes_to_unicode()
    text = {token: ''.join(characters[byte] for byte in token) for token in ranks}

    # tiktoken merges the pair whose concatenation has the lowest rank. It does not matter where the concatenation is
    # split into the pair. So there is one merge for every possible split of every token.
    merges = sorted(
        (rank, ranks[token[:cut]], ranks[token[cut:]], text[token[:cut]], text[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )

    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocabulary, [merge[3:] for merge in merges], fuse_unk=False, ignore_merges=True))

    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    return backend


def _end_token(model_dir: Path, first_special: int) -> str:
    """Return <|im_end|> if generation_config.json belongs to a chat model, else <|endoftext|>.

    `first_special` is the id of the first special token.
    """
    generation = read_settings(model_dir, 'generation_config.json')
    ends = generation.get('eos_token_id')
    im_end = first_special + _SPECIAL.index(_IM_END)
    chat = generation.get('chat_format') == 'chatml' or im_end in (ends if isinstance(ends, list) else [ends])

    return _IM_END if chat else _END_OF_TEXT


def _build(model_dir: Path, special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder: the tokens in qwen.tiktoken, followed by the tokens `special`."""
    from transformers import PreTrainedTokenizerFast

    ranks = read_ranks(model_dir / 'qwen.tiktoken')
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(ranks, special),
        eos_token=_end_token(model_dir, len(ranks)),
        pad_token=_END_OF_TEXT,
        extra_special_tokens=[token for token in special if token not in (_END_OF_TEXT, _IM_END)],
        **common_options(read_settings(model_dir)),
    )


def build_qwen_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of Qwen.

    It has no bos token, and <|endoftext|> is used for padding. The eos token is <|im_end|> for a chat model, and
    <|endoftext|> for a base model.
    """
    return _build(model_dir, _SPECIAL)


def build_qwen_vl_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of Qwen-VL.

    It is the tokenizer of Qwen with additional tags for references, boxes, quadrangles and images.
    """
    return _build(model_dir, (*_SPECIAL, *_VISION))

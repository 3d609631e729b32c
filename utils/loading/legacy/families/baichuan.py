"""Baichuan-7B and Baichuan2-7B. They are Llama models in which query, key and value are one fused tensor.

Baichuan2 also normalises the rows of its output head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from utils.base.errors import ConfigError
from utils.loading.legacy.families.internlm import llama_config, static_rope
from utils.loading.legacy.family import Config, Family, State, map_each, refuse
from utils.loading.legacy.lazy import LazyMatrix

if TYPE_CHECKING:
    import torch

_V1 = 'baichuan_7b'
_V2 = 'baichuan2_7b'
_13B = 'a Baichuan of 13B'

_SIZES: dict[str, int] = {
    'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32, 'num_attention_heads': 32,
    'max_position_embeddings': 4096, 'pad_token_id': 0,
}  # fmt: skip
_VOCAB = {_V1: 64000, _V2: 125696}

_FUSED = re.compile(r'^(.*\.self_attn\.)W_pack\.weight$')


def native_config(original: Config, *, family: str) -> dict[str, Any]:
    """Return the arguments of LlamaConfig.

    Raises ConfigError if config.json belongs to a different Baichuan model or has a value that is not supported.
    """
    found = _variant(original)
    architectures = original.get('architectures')
    refuse(
        found not in (None, family),
        family,
        'architectures',
        architectures,
        f'and its other fields say that it is {found}: pass the matching --model_type',
    )

    config = llama_config(original, family, {**_SIZES, 'vocab_size': _VOCAB[family]})
    if family == _V2:
        refuse_tied(config, family)

    return {**config, 'rope_parameters': static_rope(original, family)}


def _variant(original: Config) -> str | None:
    """Return which Baichuan model a config.json describes: _V1, _V2 or _13B. Returns None if config.json does not tell.

    model_type does not help, because it is the same for all Baichuan models.
    """
    architecture = next(iter(original.get('architectures') or ()), None)

    if architecture == 'BaiChuanForCausalLM':  # Only Baichuan-7B has the capital C.
        return _V1

    if 'max_position_embeddings' not in original:  # Only 13B models lack this field, because ALiBi does not need it.
        return _13B if 'model_max_length' in original else None

    if architecture == 'BaichuanForCausalLM':
        return _V2

    return next((family for family, size in _VOCAB.items() if size == original.get('vocab_size')), None)


def _matches(original: Config, *, family: str) -> bool:
    """Return whether a config.json describes the model `family` with plain (not quantised) weights."""
    return _variant(original) == family and not original.get('quantization_config')


def refuse_tied(config: Config, family: str) -> None:
    """Raise ConfigError if a Baichuan2 model uses one matrix as the embedding and the output head."""
    tied = config['tie_word_embeddings']
    refuse(tied, family, 'tie_word_embeddings', tied, 'but its normalised head cannot be the embedding too')


def native_tensors(state: State, original: Config, *, width: int) -> State:
    """Return the tensors with W_pack split into query, key and value. All other names are already the names of Llama.

    `width` is used as the hidden size if config.json does not state the hidden size.
    """
    return map_each(state, partial(_split, width=original.get('hidden_size', width)))


def native_tensors_normalised(state: State, original: Config, *, width: int) -> State:
    """Return the tensors under the names of Llama, with each row of the output head divided by its Euclidean norm.

    W_pack is split into query, key and value. `width` is used as the hidden size if config.json does not state it.
    """
    return with_normalised_head(native_tensors(state, original, width=width))


def _split(key: str, tensor: torch.Tensor, *, width: int) -> dict[str, torch.Tensor]:
    """Return a dict with the tensors of Llama that replace one tensor of the checkpoint: W_pack becomes three tensors.

    Raises ConfigError if a W_pack tensor does not have 3 * `width` rows.
    """
    fused = _FUSED.match(key)
    if fused is None:
        return {key: tensor}

    rows = next(iter(tensor.shape), 0)
    if rows != 3 * width:
        raise ConfigError(
            f"tensor '{key}' has {rows} rows, but hidden_size {width} requires {3 * width} rows (query + key + value). "
            'The file is damaged, or config.json belongs to a model of another size. Use the weights and config.json '
            'of one repository or folder.'
        )

    return {f'{fused[1]}{name}_proj.weight': part for name, part in zip('qkv', tensor.chunk(3), strict=True)}


@dataclass(frozen=True, kw_only=True)
class NormalisedRows(LazyMatrix):
    """An output head. When it is loaded, each row is divided by its Euclidean norm."""

    head: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, columns) of the output head."""
        return self.head.shape[0], self.head.shape[1]

    def rows(self, which: slice) -> torch.Tensor:
        """Return the rows `which` in fp32, each divided by its Euclidean norm."""
        return normalise_rows(self.head[which])


def with_normalised_head(native: State) -> State:
    """Return the tensors of `native`, but with an output head whose rows have the Euclidean norm 1.

    The division by the norm is lazy: a row is divided when the row is loaded.
    """
    head = native.get('lm_head.weight')
    if head is None or head.dim() != 2:  # The loader reports such a head as missing or mismatched.
        return native

    return {**native, 'lm_head.weight': cast('torch.Tensor', NormalisedRows(head=head))}


def normalise_rows(head: torch.Tensor) -> torch.Tensor:
    """Return the output head in fp32, with each row divided by its Euclidean norm. Rows with norm 1 do not change.

    The result is in fp32 even if `head` is in half precision. The loader then rounds it to the dtype of the opened
    model. If the model is opened in fp32, the logits are those of the original code.
    """
    import torch

    length = torch.linalg.vector_norm(head, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
    return torch.div(head, length)


BAICHUAN_7B = Family(
    name=_V1,
    model_type='baichuan',
    matches=partial(_matches, family=_V1),
    config_class='LlamaConfig',
    model_class='LlamaForCausalLM',
    config=partial(native_config, family=_V1),
    tensors=partial(native_tensors, width=_SIZES['hidden_size']),
)
BAICHUAN2_7B = replace(
    BAICHUAN_7B,
    name=_V2,
    matches=partial(_matches, family=_V2),
    config=partial(native_config, family=_V2),
    tensors=partial(native_tensors_normalised, width=_SIZES['hidden_size']),
)

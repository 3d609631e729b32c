"""Baichuan-7B and Baichuan2-7B: Llamas with fused query, key and value; the second with a normalised output head."""

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

_V1, _V2, _13B = 'baichuan_7b', 'baichuan2_7b', 'a Baichuan of 13B'
_SIZES: dict[str, int] = {
    'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32, 'num_attention_heads': 32,
    'max_position_embeddings': 4096, 'pad_token_id': 0,
}  # fmt: skip
_VOCAB = {_V1: 64000, _V2: 125696}
_FUSED = re.compile(r'^(.*\.self_attn\.)W_pack\.weight$')


def native_config(original: Config, *, family: str) -> dict[str, Any]:
    """Return the arguments of LlamaConfig; raises ConfigError where config.json is of another Baichuan."""
    found = _variant(original)
    architectures = original.get('architectures')
    refuse(
        found not in (None, family),
        family,
        'architectures',
        architectures,
        f'and its other fields say that it is {found}: name the model_type that it is',
    )
    config = llama_config(original, family, {**_SIZES, 'vocab_size': _VOCAB[family]})
    if family == _V2:
        refuse_tied(config, family)
    return {**config, 'rope_parameters': static_rope(original, family)}


def _variant(original: Config) -> str | None:
    """Return which Baichuan a config.json is of, None where it does not tell; all share one model_type."""
    architecture = next(iter(original.get('architectures') or ()), None)
    if architecture == 'BaiChuanForCausalLM':  # the capital C is of Baichuan-7B alone
        return _V1
    if 'max_position_embeddings' not in original:  # ALiBi has no table of positions, so only 13B models lack it
        return _13B if 'model_max_length' in original else None
    if architecture == 'BaichuanForCausalLM':
        return _V2
    return next((family for family, size in _VOCAB.items() if size == original.get('vocab_size')), None)


def _matches(original: Config, *, family: str) -> bool:
    return _variant(original) == family and not original.get('quantization_config')


def refuse_tied(config: Config, family: str) -> None:
    """Raise ConfigError where the output head of a second generation is the embedding too."""
    tied = config['tie_word_embeddings']
    refuse(tied, family, 'tie_word_embeddings', tied, 'but its normalised head cannot be the embedding too')


def native_tensors(state: State, original: Config, *, width: int) -> State:
    """Return W_pack cut into query, key and value; every other name is Llama's already.

    `width` is the original class's own for a config.json that names none.
    """
    return map_each(state, partial(_split, width=original.get('hidden_size', width)))


def native_tensors_normalised(state: State, original: Config, *, width: int) -> State:
    """Return the tensors of `native_tensors` with the output head folded: its rows have length 1."""
    return with_normalised_head(native_tensors(state, original, width=width))


def _split(key: str, tensor: torch.Tensor, *, width: int) -> dict[str, torch.Tensor]:
    fused = _FUSED.match(key)
    if fused is None:
        return {key: tensor}
    rows = next(iter(tensor.shape), 0)
    if rows != 3 * width:
        raise ConfigError(
            f"tensor '{key}' has {rows} rows where query, key and value of hidden_size {width} need "
            f'{3 * width}: the file is damaged, or config.json is of another size.'
        )
    return {f'{fused[1]}{n}_proj.weight': part for n, part in zip('qkv', tensor.chunk(3), strict=True)}


@dataclass(frozen=True, kw_only=True)
class NormalisedRows(LazyMatrix):
    """A head whose rows are divided by their lengths."""

    head: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the head."""
        return self.head.shape[0], self.head.shape[1]

    def rows(self, which: slice) -> torch.Tensor:
        """Return some rows in fp32, of length 1."""
        return normalise_rows(self.head[which])


def with_normalised_head(native: State) -> State:
    """Return native tensors with the output head folded."""
    head = native.get('lm_head.weight')
    if head is None or head.dim() != 2:  # named as missing, or as of another shape, when it is loaded
        return native
    return {**native, 'lm_head.weight': cast('torch.Tensor', NormalisedRows(head=head))}


def normalise_rows(head: torch.Tensor) -> torch.Tensor:
    """Return the rows of a head divided by their lengths, in fp32; rows of length 1 stay as they are.

    The original divides in the dtype it runs in. The result is rounded once, to the dtype a model is loaded in: so
    half-precision files opened in fp32 give the logits of the original in fp32.
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

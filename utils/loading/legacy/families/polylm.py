"""PolyLM, a GPT-2 model of a different size. Its config.json states wrong ids of the begin and end tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from utils.loading.legacy.family import Config, Family, State, map_each, refuse

if TYPE_CHECKING:
    import torch

# The fields of config.json that affect the computation or the training. GPT2Config accepts both the names in the first
# line and its shorter names, e.g. hidden_size and n_embd.
_FIELDS = (
    'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'max_position_embeddings',
    'vocab_size', 'n_positions', 'n_embd', 'n_layer', 'n_head', 'n_inner', 'activation_function', 'resid_pdrop',
    'embd_pdrop', 'attn_pdrop', 'layer_norm_epsilon', 'initializer_range', 'scale_attn_weights', 'use_cache',
    'pad_token_id', 'scale_attn_by_inverse_layer_idx', 'reorder_and_upcast_attn', 'tie_word_embeddings',
)  # fmt: skip

_MATRIX = re.compile(r'\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$')


def native_config(original: Config) -> dict[str, Any]:
    """Return the arguments of GPT2Config. The ids of the begin and end tokens are the ids in the tokenizer.

    Raises ConfigError if the weights are quantised.
    """
    quantised = original.get('quantization_config')
    refuse(bool(quantised), 'polylm', 'quantization_config', quantised, 'but only full-width weights are readable')

    given = {name: original[name] for name in _FIELDS if name in original}

    # In config.json, the end token is the last token of the vocabulary. The model never generates this token, so a
    # reply would not end.
    return {**given, 'bos_token_id': 1, 'eos_token_id': 2}


def native_tensors(state: State, original: Config) -> State:
    """Return the tensors under the names of GPT-2, with all matrices as (in, out).

    If the checkpoint stores matrices as (out, in), they are transposed.
    """
    transposed = any(
        tensor.shape[0] == 3 * tensor.shape[1] for key, tensor in state.items() if key.endswith('.attn.c_attn.weight')
    )

    def rename(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        new = key if key.startswith(('transformer.', 'lm_head.')) else f'transformer.{key}'
        return {new: tensor.T.contiguous() if transposed and _MATRIX.search(new) else tensor}

    return map_each(state, rename)


# `matches` is always False, so this family is used only if --model_type names it. The model_type in config.json does
# not help, because it is gpt2 for every GPT-2 model.
POLYLM = Family(
    name='polylm',
    model_type='gpt2',
    matches=lambda config: False,
    config_class='GPT2Config',
    model_class='GPT2LMHeadModel',
    config=native_config,
    tensors=native_tensors,
)

"""XVERSE 7B and 13B. They are Llama models with a different model_type. XVERSE-MoE is not supported."""

from __future__ import annotations

from typing import Any

from utils.loading.legacy.families.internlm import llama_config, static_rope
from utils.loading.legacy.family import Config, Family, refuse, same_tensors

# Defaults of the original class. They are the sizes of the 13B model.
_XVERSE = {
    'vocab_size': 100278, 'hidden_size': 5120, 'intermediate_size': 13824, 'num_hidden_layers': 40,
    'num_attention_heads': 40, 'max_position_embeddings': 8192, 'pad_token_id': None,
}  # fmt: skip


def native_config(original: Config) -> dict[str, Any]:
    """Return the arguments of LlamaConfig.

    Raises ConfigError if the model is XVERSE-MoE, which has the same model_type, or if config.json has a value that is
    not supported.
    """
    for field, value in original.items():
        experts = field.startswith('moe_') or field in ('num_experts', 'num_shared_experts', 'num_experts_per_tok')
        refuse(
            experts and bool(value), 'xverse', field, value, 'so it is XVERSE-MoE, which transformers has no class for'
        )
    return {**llama_config(original, 'xverse', _XVERSE), 'rope_parameters': static_rope(original, 'xverse')}


XVERSE = Family(
    name='xverse',
    model_type='xverse',
    config_class='LlamaConfig',
    model_class='LlamaForCausalLM',
    config=native_config,
    tensors=same_tensors,
)

"""Llama with ALiBi instead of rotary embedding: Baichuan-13B and Baichuan2-13B.

It is saved under a model_type of this project. So AutoModel refuses the folder, instead of opening a Llama with rotary
embedding, which computes something else from the same tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaPreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaModel

# The other implementations take no bias per head, or ignore it without an error.
_ATTENTION = ('eager', 'sdpa')


def alibi_slopes(heads: int) -> list[float]:
    """Return the penalty of each head per position of distance (Press, Smith and Lewis: Train Short, Test Long).

    For n heads, a power of two, the slopes are the geometric sequence that starts at 2^(-8/n) and has the same ratio.
    For another number of heads, they are the slopes of the next lower power of two, followed by every other slope of
    the next higher one.
    """
    lower = 2 ** int(math.log2(heads))
    sequence = [2.0 ** (-8.0 * step / lower) for step in range(1, lower + 1)]
    between = [2.0 ** (-4.0 * step / lower) for step in range(1, 2 * lower + 1, 2)]
    return sequence + between[: heads - lower]


class AlibiLlamaConfig(LlamaConfig):
    """LlamaConfig under a name that transformers does not know; its rope_parameters have no effect."""

    model_type = 'assay_baichuan_13b'


class NoRotary(nn.Module):
    """Replaces the rotary tables of Llama: with cos 1 and sin 0, queries and keys are not rotated."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one = x.new_ones(1, 1, 1)
        return one, torch.zeros_like(one)


class AlibiLlamaModel(LlamaModel):
    """LlamaModel that adds a bias by distance instead of rotating queries and keys."""

    config_class = AlibiLlamaConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: AlibiLlamaConfig) -> None:
        super().__init__(config)
        self.rotary_emb = NoRotary()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what LlamaModel returns.

        Positions are counted from the start of the padded row. Only distances matter, so left padding changes nothing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('pass either input_ids or inputs_embeds.')

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        name = self.config._attn_implementation
        if name not in _ATTENTION:
            raise ValueError(f"attention '{name}' takes no ALiBi: open the model with {' or '.join(_ATTENTION)}.")

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            allow_is_causal_skip=False,
        )
        first = 0 if past_key_values is None else past_key_values.get_query_offset(0)

        # LlamaModel passes a mask with four dimensions to attention without changing it.
        return super().forward(
            attention_mask=self._with_distance(mask, inputs_embeds, first),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _with_distance(self, mask: torch.Tensor, queries: torch.Tensor, first: int | torch.Tensor) -> torch.Tensor:
        """Return the bias (B, H, Q, K) from a mask (B, 1, Q, K), which is True or 0 where a key is visible.

        The slopes are computed here because a buffer would stay empty when a model is loaded on the meta device. Masked
        keys get the lowest finite number: with -inf, the rows of padding would be NaN.
        """
        dtype = queries.dtype
        device = queries.device

        slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads), device=device)
        positions = torch.arange(queries.shape[1], device=device) + first
        distance = torch.arange(mask.shape[-1], device=device) - positions[:, None]
        bias = (slopes[:, None, None] * distance).to(dtype)

        lowest = torch.finfo(dtype).min
        visible = mask if mask.dtype == torch.bool else mask > lowest / 2

        return torch.where(visible, bias, lowest)


class AlibiLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM on an AlibiLlamaModel."""

    config_class = AlibiLlamaConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: AlibiLlamaConfig) -> None:
        # The constructor of LlamaForCausalLM would build a second set of layers first.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = AlibiLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

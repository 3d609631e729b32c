"""Llama with ALiBi instead of rotary embedding, for Baichuan-13B and Baichuan2-13B.

The model is saved under a model_type that AutoModel does not know. So AutoModel refuses to open the saved folder. With
the model_type of Llama, AutoModel would open a Llama with rotary embedding, and the results would be wrong.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaPreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaModel

from utils.loading.cache_names import cache_of

# The attention implementations that add a bias per head. All others refuse the bias or silently ignore it.
_ATTENTION = ('eager', 'sdpa')


def alibi_slopes(heads: int) -> list[float]:
    """Return the slope of each head (Press, Smith and Lewis: Train Short, Test Long).

    A key at distance d gets the bias -slope * d. If the number of heads n is a power of two, the slopes are 2^(-8/n),
    2^(-16/n), 2^(-24/n) and so on. Otherwise, let m be the largest power of two below n. The first m slopes are those
    for m heads. They are followed by the first, third, fifth (and so on) slope for 2m heads.
    """
    lower = 2 ** int(math.log2(heads))
    sequence = [2.0 ** (-8.0 * step / lower) for step in range(1, lower + 1)]
    between = [2.0 ** (-4.0 * step / lower) for step in range(1, 2 * lower + 1, 2)]
    return sequence + between[: heads - lower]


class AlibiLlamaConfig(LlamaConfig):
    """LlamaConfig under a model_type that transformers does not know. The rope_parameters have no effect."""

    model_type = 'assay_baichuan_13b'


class NoRotary(nn.Module):
    """Replaces the rotary embedding of Llama. It returns cos = 1 and sin = 0, so queries and keys are not rotated."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one = x.new_ones(1, 1, 1)
        return one, torch.zeros_like(one)


class AlibiLlamaModel(LlamaModel):
    """LlamaModel with ALiBi: queries and keys are not rotated. Each attention score gets a bias for the distance."""

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
        *,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the outputs of LlamaModel.

        Positions are counted from the start of the padded row. Left padding does not change the result, because only
        the distances between positions matter.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('pass either input_ids or inputs_embeds.')

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        name = self.config._attn_implementation
        if name not in _ATTENTION:
            raise ValueError(f"attention '{name}' takes no ALiBi: open the model with {' or '.join(_ATTENTION)}.")

        # The cache is passed by its position, because its name depends on the version of transformers.
        cache = cache_of(kwargs)
        mask = create_causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            cache,
            position_ids=position_ids,
            allow_is_causal_skip=False,
        )
        first = 0 if cache is None else cache.get_query_offset(0)

        # A mask with four dimensions reaches the attention layers unchanged.
        return super().forward(
            attention_mask=self._with_distance(mask, inputs_embeds, first),
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _with_distance(self, mask: torch.Tensor, queries: torch.Tensor, first: int | torch.Tensor) -> torch.Tensor:
        """Return the bias (B, H, Q, K) for a mask (B, 1, Q, K).

        At visible keys, a boolean mask is True, and a float mask is 0. `queries` are (B, Q, hidden). `first` is the
        position of the first query in the padded row.

        The slopes are computed here and not stored in a buffer, because a buffer stays empty if the model is created on
        the meta device. The bias of masked keys is the lowest finite number. With -inf, the results at padding would be
        NaN.
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
    """LlamaForCausalLM with an AlibiLlamaModel inside."""

    config_class = AlibiLlamaConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: AlibiLlamaConfig) -> None:
        # The constructor of LlamaForCausalLM is not called, because it would build all layers a second time.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = AlibiLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

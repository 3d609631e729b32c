"""Qwen2 with the long-context inference of Qwen (2023): dynamic NTK and log-n attention.

Both extensions act only in eval mode, and only beyond the training length (`max_position_embeddings`). In all other
cases, the model computes the same as Qwen2 of transformers. The class is also named Qwen2ForCausalLM, so that
transformers can open a saved model without the code of this project.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2Model
from transformers import Qwen2ForCausalLM as PlainQwen2
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from utils.loading.cache_names import cache_of, without_cache


def ntk_alpha(length: int, trained: int) -> float:
    """Return the NTK factor for a prompt of `length` tokens. `trained` is the training length of the model.

    If the prompt is not longer than the training length, the factor is 1. It is 3 for a prompt of up to 2 times the
    training length, 7 for up to 4 times, and 15 for up to 8 times. The base of the rotary embedding is computed from
    the factor.
    """
    return float(max(2 ** math.ceil(math.log2(max(length, 1) / trained) + 1) - 1, 1))


def logn_factors(positions: torch.Tensor, trained: int) -> torch.Tensor:
    """Return the log-n factor of each position. Attention multiplies the query at a position by this factor.

    The factor is the logarithm of position + 1 to the base `trained`, but never less than 1.
    """
    return ((positions + 1).float().log() / math.log(trained)).clamp(min=1.0)


class QwenRotaryEmbedding(Qwen2RotaryEmbedding):
    """Rotary embedding with a base that depends on the prompt length of each row.

    The base does not change while tokens are generated.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        # One NTK factor per row. None if no prompt is longer than the training length.
        self.alphas: list[float] | None = None

    def start(self, lengths: list[int]) -> None:
        """Set the NTK factor of each row. `lengths` has the prompt length of each row."""
        alphas = [ntk_alpha(length, self.config.max_position_embeddings) for length in lengths]
        self.alphas = alphas if max(alphas) > 1.0 else None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and the sines, both (B, T, head size)."""
        if self.training or self.alphas is None:
            cos, sin = super().forward(x, position_ids)
            return cos, sin

        size = 2 * self.inv_freq.numel()
        theta = self.config.rope_parameters['rope_theta']

        bases = torch.tensor([theta * alpha ** (size / (size - 2)) for alpha in self.alphas], device=x.device)
        powers = torch.arange(0, size, 2, dtype=torch.float, device=x.device) / size
        angles = position_ids[..., None].float() / (bases[:, None, None] ** powers)
        angles = torch.cat((angles, angles), dim=-1)

        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class QwenLogNAttention(Qwen2Attention):
    """Attention that multiplies queries beyond the training length by their log-n factors, but not in training mode.

    The class works with every attention implementation. Queries are scaled after the rotation and not in q_proj,
    because an adapter can wrap q_proj.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output (B, T, hidden) and the attention weights, as Qwen2Attention does.

        The attention weights are None if the implementation does not return them.
        """
        if self.training:
            plain: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, **kwargs
            )
            return plain

        batch, length = hidden_states.shape[:2]
        query, key, value = (
            layer(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        # Queries are multiplied even if all factors are 1. A check for larger factors would make each layer wait for
        # the GPU.
        factors = logn_factors(kwargs['position_ids'], self.config.max_position_embeddings)
        query = query * factors[:, None, :, None].to(query.dtype)

        cache = cache_of(kwargs)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **without_cache(kwargs),
        )

        return self.o_proj(output.reshape(batch, length, -1).contiguous()), weights


class QwenModel(Qwen2Model):
    """Qwen2Model that passes the length of each prompt to its rotary embedding."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)

        if config.use_dynamic_ntk:
            self.rotary_emb = QwenRotaryEmbedding(config)

        if config.use_logn_attn:
            for index, layer in enumerate(self.layers):
                layer.self_attn = QwenLogNAttention(config, index)

        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the outputs of Qwen2Model. In eval mode, the NTK factors of a new prompt are set first."""
        # If the cache is not empty, the tokens continue a prompt. The factors of this prompt are already set.
        cache = cache_of(kwargs)
        is_prompt = cache is None or int(cache.get_seq_length()) == 0
        if self.config.use_dynamic_ntk and not self.training and is_prompt:
            inputs = input_ids if input_ids is not None else inputs_embeds
            if inputs is not None:
                self.rotary_emb.start(_prompt_lengths(inputs, attention_mask, position_ids))

        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class Qwen2ForCausalLM(PlainQwen2):
    """Qwen2ForCausalLM with dynamic NTK and log-n attention. config.json switches each of them on or off."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model = QwenModel(config)
        self.post_init()


def _prompt_lengths(inputs: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None) -> list[int]:
    """Return the number of tokens in each row of the batch.

    Padding is left out if a 2-D `attention_mask` or `position_ids` show it. For a packed row (several sequences in one
    row), only the tokens of the longest sequence are counted.
    """
    rows, width = inputs.shape[:2]
    lengths = [width] * rows

    # A mask leaves padding out. Positions begin at 0 again in each concatenated row.
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        lengths = attention_mask.sum(dim=-1).tolist()
    if position_ids is not None:
        last: list[int] = position_ids.expand(rows, -1).amax(dim=-1).tolist()
        lengths = [min(length, position + 1) for length, position in zip(lengths, last, strict=True)]
    return lengths

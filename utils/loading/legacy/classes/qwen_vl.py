"""Qwen-VL: a Qwen with a vision tower.

The tower converts an image to features. The features replace the embeddings of the tokens between two control tokens.
The parameters of the tower have the same names as in the checkpoint.

The model is saved under a model_type that AutoModel does not know. So AutoModel refuses to open the saved folder. With
the model_type of Qwen2, AutoModel would open a Qwen2 without the tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer

from utils.base.errors import ConfigError
from utils.loading.legacy.classes.qwen_long import Qwen2ForCausalLM

_EPS = 1e-6

# Both numbers are constants in the original code. The learnt position table has 16 x 16 rows, and a head of the
# resampler has the width 128.
_TABLE = 256
_POOL_HEAD = 128


class QwenVLConfig(Qwen2Config):
    """Qwen2Config with the settings of the vision tower in `visual`. The original config.json has the same field."""

    model_type = 'assay_qwen_vl'
    visual: dict[str, Any] | None = None
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True


def image_mask(ids: torch.Tensor, start: int) -> torch.Tensor:
    """Return a mask (B, T) that is True at the image tokens.

    The image tokens are the tokens between an id `start` and the next id `start + 1`.
    """
    opens = ids == start
    closes = ids == start + 1
    is_open = opens.cumsum(-1) > closes.cumsum(-1)

    # A model may generate a start token without an end token. The tokens after it are not image tokens.
    closed_later = closes.flip(-1).cumsum(-1).flip(-1) > 0

    return is_open & closed_later & ~opens


def resize_table(table: torch.Tensor, count: int) -> torch.Tensor:
    """Resize a position table from S x S positions to `count` positions, by bicubic interpolation.

    `table` is (S * S, C), and the result is (count, C). `count` must be the square of an integer.
    """
    source = math.isqrt(table.shape[0])
    target = math.isqrt(count)
    if source == target:
        return table

    grid = table.float().t().reshape(1, -1, source, source)
    grid = F.interpolate(grid, size=(target, target), mode='bicubic', align_corners=False)
    return grid.flatten(2)[0].t().to(table.dtype)


class GroupedHeads(nn.Module):
    """Self-attention over all patches.

    The outputs of in_proj are (heads, 3, head size): first q, k and v of the first head, then of the second, and so on.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fused = self.in_proj(x).unflatten(-1, (self.heads, 3, -1))
        query, key, value = fused.permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        out: torch.Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class VisualMLP(nn.Module):
    """Two linear layers with a GELU between them. It is the exact GELU, not the approximation with tanh."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class VisualBlock(GradientCheckpointingLayer):
    """One block of the vision tower, with the norms before attention and before the MLP."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = GroupedHeads(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = VisualMLP(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        out: torch.Tensor = x + self.mlp(self.ln_2(x))
        return out


class VisualBlocks(nn.Module):
    """All blocks of the vision tower, applied one after the other."""

    def __init__(self, count: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisualBlock(width, heads, inner) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class CrossHeads(nn.Module):
    """Cross-attention with the same parameter names as nn.MultiheadAttention.

    nn.MultiheadAttention reads the weight of its output layer but never calls the layer. So an adapter on the output
    layer would have no effect. This class calls the output layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // _POOL_HEAD
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)

        query, key, value = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )

        attended = F.scaled_dot_product_attention(query, key, value)
        out: torch.Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class Resampler(nn.Module):
    """Reduces any number of patches to a fixed number of features, by cross-attention with learnt queries."""

    def __init__(self, queries: int, width: int, patch_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02)
        # A table of sines and cosines. It is stored in the checkpoint but not trained.
        self.register_buffer('pos_embed', torch.zeros(queries, width))
        self.kv_proj = nn.Identity() if patch_width == width else nn.Linear(patch_width, width, bias=False)
        self.attn = CrossHeads(width)
        self.ln_q = nn.LayerNorm(width, eps=_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=_EPS)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the features (images, queries, width).

        Positions are added to the queries and the keys, but not to the values.
        """
        table: torch.Tensor = self.get_buffer('pos_embed')
        values = self.ln_kv(self.kv_proj(patches))
        queries = (self.ln_q(self.query) + table).expand(len(patches), -1, -1)
        out: torch.Tensor = self.attn(queries, values + resize_table(table, patches.shape[1]), values)
        return out


class VisualTower(nn.Module):
    """The vision tower. It converts images to features that are as wide as the embeddings of the language model."""

    def __init__(self, visual: Mapping[str, Any]) -> None:
        super().__init__()
        width = visual['width']
        out = visual['output_dim']
        patch = visual['patch_size']

        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(_TABLE, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width, eps=_EPS)
        self.transformer = VisualBlocks(visual['layers'], width, visual['heads'], int(width * visual['mlp_ratio']))
        self.attn_pool = Resampler(visual['n_queries'], out, width)
        self.ln_post = nn.LayerNorm(out, eps=_EPS)
        self.proj = nn.Parameter(torch.randn(out, out) * out**-0.5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features (images, n_queries, output_dim) for `pixels` (images, 3, side, side)."""
        patches = self.conv1(pixels.to(self.conv1.weight)).flatten(2).transpose(1, 2)
        patches = self.ln_pre(patches + resize_table(self.positional_embedding, patches.shape[1]))
        out: torch.Tensor = self.ln_post(self.attn_pool(self.transformer(patches))) @ self.proj
        return out


class QwenVLForCausalLM(Qwen2ForCausalLM):
    """Qwen2ForCausalLM with a vision tower.

    `pixel_values` are (images, 3, side, side): first all images of the first row, then all images of the second row,
    and so on.
    """

    config_class = QwenVLConfig
    _no_split_modules = ('Qwen2DecoderLayer', 'VisualBlock', 'Resampler')

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        assert config.visual is not None, 'a Qwen-VL has a visual tower'
        self.visual = VisualTower(config.visual)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the outputs of Qwen2ForCausalLM.

        Raises ConfigError if `input_ids` and `pixel_values` have different numbers of images, or if `pixel_values` are
        given without `input_ids`.
        """
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, pixel_values)
        elif pixel_values is not None:
            raise ConfigError('pixel_values need input_ids: embeddings do not show where the image tokens are.')

        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _embed(self, ids: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
        """Return the embeddings (B, T, hidden). The features of the images replace the embeddings of image tokens."""
        embeds: torch.Tensor = self.model.embed_tokens(ids)
        mask = image_mask(ids, self.config.visual['image_start_id'])
        self._check_count(int(mask.sum()), 0 if pixels is None else len(pixels))

        if pixels is not None:
            embeds = embeds.masked_scatter(mask[..., None], self.visual(pixels).to(embeds))
        elif self.training and any(weight.requires_grad for weight in self.visual.parameters()):
            # Even if a batch has no image, distributed training waits for the gradient of every trained weight. So the
            # tower is applied to an empty image, and the result is multiplied by 0.
            side = self.config.visual['image_size']
            embeds = embeds + self.visual(embeds.new_zeros(1, 3, side, side)).mean().to(embeds) * 0

        return embeds

    def _check_count(self, tokens: int, images: int) -> None:
        """Raise ConfigError if `tokens` is not the number of image tokens for this number of images."""
        each = self.config.visual['n_queries']
        if tokens != images * each:
            raise ConfigError(
                f'{images} images need {images} x {each} image tokens, but the token ids contain {tokens}. Give one '
                'image for each image tag, and do not truncate a row inside an image.'
            )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Return the inputs with each row repeated `expand_size` times. The images of the row are repeated too."""
        pixels: torch.Tensor | None = model_kwargs.get('pixel_values')

        if expand_size > 1 and pixels is not None and input_ids is not None:
            tokens = image_mask(input_ids, self.config.visual['image_start_id']).sum(-1)
            self._check_count(int(tokens.sum()), len(pixels))
            groups = pixels.split((tokens // self.config.visual['n_queries']).tolist())
            pixels = torch.cat([group.repeat(expand_size, 1, 1, 1) for group in groups])

        rest = {name: value for name, value in model_kwargs.items() if name != 'pixel_values'}
        ids, expanded = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **rest
        )
        return ids, {**expanded, 'pixel_values': pixels}

"""Adds a few tokens after the rows of a concatenated batch, because matrix products on a CPU are then faster.

The matrix products of oneDNN are up to a fifth slower for some numbers of tokens, but never for multiples of 4.
Multiples of 8 also need fewer compiled kernels. No row attends to the added tokens, and nothing is computed from their
output. So they change neither the loss nor the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from utils.fast.layout import groups_tokens
from utils.loading.layers import RECURRENT

_MULTIPLE = 8
# In smaller batches the products do not take longer, and the added tokens would be a larger share.
_FEWEST_TOKENS = 256


def can_fill(model: Any) -> bool:
    """Return whether tokens can be added after the concatenated rows of this model.

    The model must be on a CPU. It must have no recurrent layers, because they compute each row separately. It must have
    no experts and no 8-bit layers of bitsandbytes. In such layers, added tokens could change the rounding of other
    tokens.
    """
    types = set(model.config.get_text_config().to_dict().get('layer_types') or ())
    return bool(model.device.type == 'cpu') and not types & RECURRENT and not groups_tokens(model)


def filled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs (1, T) of concatenated rows, with zeros after them, so that T becomes a multiple of 8."""
    tokens = inputs['input_ids'].shape[1]
    extra = -tokens % _MULTIPLE
    if tokens < _FEWEST_TOKENS or not extra:
        return inputs
    return {name: F.pad(x, (0, extra)) if x.shape == (1, tokens) else x for name, x in inputs.items()}

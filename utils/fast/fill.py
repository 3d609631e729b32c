"""Adds a few tokens to the end of a concatenated batch, because matrix products on a CPU are then faster.

The matrix products of oneDNN are up to a fifth slower for some numbers of tokens, but never for multiples of 4.
Multiples of 8 also need fewer compiled kernels.

No row attends to the added tokens, and their output is not used. So they change neither the loss nor the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from utils.fast.layout import rounding_depends_on_batch
from utils.loading.layers import RECURRENT

_MULTIPLE = 8
# In smaller batches the products do not take longer, and the added tokens would be a larger share.
_FEWEST_TOKENS = 256


def can_fill(model: Any) -> bool:
    """Return whether a few tokens may be added to the end of the concatenated batches of this model.

    Added tokens make matrix products on a CPU faster. Returns False in three cases:

    - The model is not on a CPU.
    - The model has recurrent layers. They compute each row separately, so added tokens do not help.
    - The model has experts or 8-bit layers of bitsandbytes. There, added tokens could change the rounding.
    """
    types = set(model.config.get_text_config().to_dict().get('layer_types') or ())
    return bool(model.device.type == 'cpu') and not types & RECURRENT and not rounding_depends_on_batch(model)


def filled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs of a concatenated batch, with zeros added until the number of tokens is a multiple of 8.

    Zeros are added to tensors [1, tokens]. Other tensors are not changed. If a batch has fewer than 256 tokens, it is
    returned unchanged.
    """
    tokens = inputs['input_ids'].shape[1]
    extra = -tokens % _MULTIPLE
    if tokens < _FEWEST_TOKENS or not extra:
        return inputs
    return {name: F.pad(x, (0, extra)) if x.shape == (1, tokens) else x for name, x in inputs.items()}

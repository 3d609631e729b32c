"""Keeps concatenated rows apart in layers with a recurrent state: gated delta nets and short convolutions.

Such a layer passes a state from token to token. In a concatenated batch, the state would also pass from row to row. So
the layer gets padded batches instead. The padding is at the end of a row. It changes no result, because no state goes
back to earlier tokens.

Shapes in names: T tokens of all rows, B rows of a group, L length of its longest row, C hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from utils.fast.rows import RowMask, rows_of_batch
from utils.fast.swap import swap_class
from utils.loading.layers import ATTENDING

# Recurrent layers of the classes Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear and LFM2 end in one of these names.
_NAMES = ('GatedDeltaNet', 'DeltaAttention', 'ShortConv')
_MASKS = 'attention_mask'


class _RowsApart(nn.Module):
    """Mixin for the class of a recurrent layer. The layer keeps rows apart if its attention_mask is a RowMask."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the layer, (1, T, C) for concatenated rows."""
        rows = kwargs.get(_MASKS)
        if not isinstance(rows, RowMask):
            unchanged: torch.Tensor = super().forward(hidden_states, *args, **kwargs)
            return unchanged

        groups, place_T = rows.group_indices(hidden_states.device)
        kwargs[_MASKS] = None
        parts = []
        for index_BL in groups:
            group_BLC = hidden_states[0].index_select(0, index_BL.flatten()).unflatten(0, index_BL.shape)
            parts.append(super().forward(group_BLC, *args, **kwargs).flatten(0, 1))
        return torch.cat(parts).index_select(0, place_T)[None]


def keep_rows_apart(model: Any, *, flash_package: bool) -> int:
    """Make the recurrent layers of a model keep concatenated rows apart. Returns the number of such layers.

    Inside the context `concatenated_rows`, the decoder then passes a RowMask to its layers in place of the mask tensor.
    The layers do not read the RowMask from the context, because gradient checkpointing calls a layer a second time,
    after the context has ended. The second call has the same arguments. With `flash_package`, attention layers get no
    mask, because the package flash-attn finds the rows from position_ids.
    """
    layers = [m for m in model.modules() if type(m).__name__.endswith(_NAMES)]
    changed = [layer for layer in layers if not isinstance(layer, _RowsApart)]
    if not changed:
        return len(layers)
    for layer in changed:
        swap_class(layer, _RowsApart)

    config = model.config.get_text_config()
    types = sorted(set(config.layer_types))
    windows = {'sliding_attention': getattr(config, 'sliding_window', None)}

    def pass_rows(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        rows = rows_of_batch()
        if rows is None:
            return None
        masks: dict[str, RowMask | None] = {}
        for name in types:
            needs_none = flash_package and name in ATTENDING
            masks[name] = None if needs_none else RowMask(rows.lengths, windows.get(name), rows.tensors)
        return args, {**kwargs, _MASKS: masks}

    model.get_decoder().register_forward_pre_hook(pass_rows, with_kwargs=True)
    return len(layers)

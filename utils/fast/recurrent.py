"""Makes recurrent layers (gated delta nets, short convolutions) compute each row of a concatenated batch separately.

A recurrent layer passes a state from token to token. In a concatenated batch, the state would also pass from one row to
the next row. So the layer gets padded batches instead, each made of rows of similar length. The padding is at the end
of a row. It changes no result, because no state goes back to earlier tokens.

The letters at the end of a name are the dimensions of the tensor. For example, `group_BLC` has the shape
[rows of a group, length of its longest row, hidden width]. T stands for the tokens of all rows.
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
    """Mixin for a recurrent layer, so that its state does not pass from one concatenated row to the next.

    The layer finds the rows in its argument attention_mask, if this is a RowMask. With any other mask, it computes as
    before.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the layer. For concatenated rows, the shape is [1, tokens, hidden width]."""
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
    """Change a model's recurrent layers so that no state passes from row to row. Returns the number of these layers.

    The change has an effect only inside the context `concatenated_rows`. There, layers get a RowMask, which has the row
    lengths, in place of the attention mask. If `flash_package` is True, attention layers get None instead, because the
    package flash-attn finds the rows from position_ids.
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

    # The layers get the rows as an argument, because gradient checkpointing calls a layer a second time with the same
    # arguments. The context has ended then, so the layer could not read the rows from it.
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

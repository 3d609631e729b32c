"""How batches are laid out and where logits come from: the fast way where a model proves exact in it."""

from __future__ import annotations

from typing import Any

import torch

from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Decide, log_decision
from utils.fast.attention import attend_by_rows, laid_end_to_end
from utils.fast.chunked_loss import Head, find_head, head_is_exact
from utils.loading.layers import ATTENDING, is_sharded


def lay_end_to_end(model: Any, args: SftArguments, *, longest: int, decide: Decide = log_decision) -> bool:
    """Switch the model to rows laid end to end where that is exact; returns whether it is, and tells `decide` why.

    Raises ConfigError where --padding_free true or --packing true cannot be had.
    """
    if args.padding_free is False:
        return False
    reason = why_padded(model, longest) or _prove(model)
    if reason is None:
        decide('padding_free', True, 'no row of this model sees another when rows are laid end to end')
        return True
    if args.packing or args.padding_free:
        flag = 'packing' if args.packing else 'padding_free'
        raise ConfigError(f'--{flag} true cannot be had: {reason}. Leave it out: rows are padded then.')
    decide('padding_free', False, reason)
    return False


def exact_head(model: Any, args: SftArguments, decide: Decide = log_decision) -> Head | None:
    """Return the head for a loss at trained positions in chunks, None where logits must come from the model itself."""
    if not args.chunked_loss:
        return None
    head = None if is_sharded(model) else find_head(model)
    if head is not None and head_is_exact(model, head, _some_ids(model, 8)):
        return head
    decide('chunked_loss', False, f'{type(model).__name__} computes its logits in a way of its own')
    return None


def why_padded(model: Any, longest: int) -> str | None:
    """Return what in a model's class keeps its rows from being laid end to end, None where nothing does."""
    config = model.config
    name = type(model).__name__
    settings = config.to_dict()
    if any(field.startswith('vis') for field in settings):
        return f'{name} sees images, whose tokens have places in a padded batch'
    if others := sorted(set(settings.get('layer_types') or ()) - ATTENDING):
        return f'{name} has layers of {", ".join(others)}, which would carry one row into the next'
    if not (model._supports_flash_attn and model._supports_attention_backend):
        return f'the attention of {name} takes no implementation of ours (ALiBi, or code of its own)'
    if settings.get('use_dynamic_ntk') and longest > config.max_position_embeddings:
        return f'rows are longer than the {config.max_position_embeddings} tokens from where {name} scales by row'
    if is_sharded(model):
        return 'the weights lie in pieces on several processes'
    return None


def _some_ids(model: Any, count: int, first: int = 0) -> torch.Tensor:
    size = model.get_input_embeddings().weight.shape[0]
    return torch.tensor([[(first + 7 * i) % size for i in range(1, count + 1)]], device=model.device)


@torch.no_grad()
def _prove(model: Any) -> str | None:
    """Return why a row laid behind others is not as it is alone, None where it is; then attention stays switched."""
    before, training = model.config._attn_implementation, model.training
    row = _some_ids(model, 9)
    model.eval()
    try:
        alone = model(input_ids=row, use_cache=False).logits[0].float()
        attend_by_rows(model)
        behind = _behind(model, [_some_ids(model, 5, 3), row, _some_ids(model, 12, 2), row])
    except ValueError as error:
        model.set_attn_implementation(before)
        return f'{type(model).__name__} refuses: {error}'
    finally:
        model.train(training)
    share = 1e-3 if alone.dtype == model.dtype else 3e-2
    difference = float((behind - alone).abs().max())
    if difference <= share * float(alone.abs().max()):
        return None
    model.set_attn_implementation(before)
    return f'a row of {type(model).__name__} changes with its neighbour, by up to {difference:.3g} in its logits'


def _behind(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    """Return the logits (2, T, V) of the second and the fourth of rows laid end to end, which are of one length."""
    lengths, device = [row.shape[1] for row in rows], rows[0].device
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    columns = torch.arange(sum(lengths), device=device)
    with laid_end_to_end(lengths):
        output = model(
            input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False, logits_to_keep=columns
        )
    parts = output.logits[0].float().split(lengths)
    return torch.stack([parts[1], parts[3]])

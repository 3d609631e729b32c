"""Decide whether batches are padded or concatenated, and whether the loss is computed in chunks.

Concatenated batches and chunks are faster. If no flag forbids them, they are used if a check on the loaded model shows
that the result is the same, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch

from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Decide, log_decision
from utils.fast.attention import attend_by_rows, unpadded
from utils.fast.chunked_loss import Head, find_head, head_is_exact
from utils.fast.rows import concatenated_rows
from utils.loading.layers import ATTENDING, RECURRENT, is_sharded

_SHARDED = 'the weights are sharded over several processes'


def use_padding_free(model: Any, args: SftArguments, *, longest: int, decide: Decide = log_decision) -> bool:
    """Switch the model to concatenated rows if this changes no result, and return whether the model was switched.

    If --padding_free is false, nothing is done and the result is False. Otherwise `decide` is called with the decision
    and its reason. `longest` is the number of tokens of the longest row. Raises ConfigError if --padding_free true or
    --packing true is not possible.
    """
    if args.padding_free is False:
        return False

    reason = why_padded(model, longest) or _try_concatenated(model)
    if reason is None:
        decide('padding_free', True, 'concatenated rows of this model do not see each other')
        return True
    if asked := [flag for flag in ('packing', 'padding_free') if getattr(args, flag)]:
        raise ConfigError(
            *(f'--{flag} true is not possible: {reason}. Use --{flag} false to pad the rows.' for flag in asked)
        )
    decide('padding_free', False, reason)
    return False


def exact_head(model: Any, args: SftArguments, decide: Decide = log_decision) -> Head | None:
    """Return the output head if the loss can be computed from it in chunks, otherwise None.

    If --chunked_loss is false, the result is None. If the weights are sharded, or if only the model itself can compute
    the logits, the result is None too, and `decide` is called with the reason.
    """
    if not args.chunked_loss:
        return None
    if is_sharded(model):
        decide('chunked_loss', False, _SHARDED)
        return None

    head = find_head(model)
    if head is not None and head_is_exact(model, head, _some_ids(model, 8)):
        return head
    decide('chunked_loss', False, f'the logits of {type(model).__name__} are not those of a plain linear head')
    return None


def why_padded(model: Any, longest: int) -> str | None:
    """Return the reason why rows must be padded for this model, or None if there is no reason.

    `longest` is the number of tokens of the longest row. Only the class, the config and the sharding of the model are
    checked. The model is not run.
    """
    config = model.config
    name = type(model).__name__
    settings = config.to_dict()
    if any(field.startswith('vis') for field in settings):
        return f'{name} has a vision tower, which needs a padded batch'
    types = set(settings.get('layer_types') or ())
    if others := sorted(types - ATTENDING - RECURRENT):
        return f'{name} has layers of {", ".join(others)}, which would carry one row into the next'
    # transformers does not say of models with recurrent layers that their attention can be replaced.
    if not (model._supports_flash_attn and (model._supports_attention_backend or types & RECURRENT)):
        return f'the attention of {name} cannot be replaced (ALiBi, or its own code)'
    if settings.get('use_dynamic_ntk') and longest > config.max_position_embeddings:
        return f'rows are longer than the {config.max_position_embeddings} tokens from which {name} scales each row'
    if is_sharded(model):
        return _SHARDED
    return None


def _some_ids(model: Any, count: int, first: int = 0) -> torch.Tensor:
    """Return `count` token ids for a test, as a tensor [1, count]. A different `first` gives different ids."""
    size = model.get_input_embeddings().weight.shape[0]
    return torch.tensor([[(first + 7 * i) % size for i in range(1, count + 1)]], device=model.device)


@torch.no_grad()
def _try_concatenated(model: Any) -> str | None:
    """Switch the model to concatenated rows and test it. If the test fails, switch back and return the reason.

    If the test passes, the result is None. The test computes the logits of one row three times: alone, and in two
    concatenated batches whose other rows differ. It has three conditions:

    - The model raises no ValueError.
    - The logits in the two batches are bitwise equal. If `rounding_depends_on_batch(model)` is True, a difference by
      rounding is allowed.
    - The logits in the batches are near the logits of the row alone.
    """
    before = model.config._attn_implementation
    training = model.training
    row = _some_ids(model, 9)
    model.eval()
    try:
        alone_TV = model(input_ids=row, use_cache=False).logits[0].float()
        attend_by_rows(model)
        first_2TV, second_2TV = (_logits_beside(model, row, number) for number in (2, 3))
    except ValueError as error:
        model.set_attn_implementation(before)
        return f'{type(model).__name__} refuses: {error}'
    finally:
        model.train(training)

    is_exact = alone_TV.dtype == model.dtype
    largest = float(alone_TV.abs().max())
    allowed = 0.0
    if rounding_depends_on_batch(model):
        allowed = (1e-3 if is_exact else 3e-2) * largest
    changed = float((second_2TV - first_2TV).abs().max())
    changed_alone = float((first_2TV - alone_TV).abs().max())
    # Not `>`, which is false for NaN.
    if changed <= allowed and changed_alone <= (1e-3 if is_exact else 0.2) * largest:
        return None
    model.set_attn_implementation(before)
    difference = max(changed, changed_alone)
    return f'the logits of a row of {type(model).__name__} change by up to {difference:.3g} beside other rows'


def rounding_depends_on_batch(model: Any) -> bool:
    """Return whether the rounding errors of a token depend on the other tokens of its batch.

    They do in a model with experts, because an expert computes all its tokens in one matrix product. They also do in
    8-bit layers of bitsandbytes. These layers compute some columns of their input in 16 bits, and the choice of the
    columns depends on all tokens.
    """
    settings = model.config.to_dict()
    text = model.config.get_text_config().to_dict()
    has_experts = any('experts' in field and bool(value) for field, value in text.items())
    return has_experts or bool((settings.get('quantization_config') or {}).get('load_in_8bit'))


def _logits_beside(model: Any, row: torch.Tensor, number: int) -> torch.Tensor:
    """Return the logits [2, tokens, vocabulary] of a row that is computed twice in one concatenated batch.

    `row` is a tensor of token ids [1, tokens]. The batch has four rows, of which the second and the fourth are `row`.
    `number` determines the token ids of the other two rows.
    """
    rows = [_some_ids(model, 5, number + 1), row, _some_ids(model, 12, number), row]
    lengths = [ids.shape[1] for ids in rows]
    positions = torch.cat([torch.arange(length, device=row.device) for length in lengths])[None]
    ids = torch.cat(rows, dim=1)
    inputs = {'input_ids': ids, 'position_ids': positions, **unpadded(model, ids)}
    with concatenated_rows(lengths):
        # Gemma 4 would cut its masks to a number.
        output = model(**inputs, use_cache=False, logits_to_keep=slice(None))
    parts = output.logits[0].float().split(lengths)
    return torch.stack([parts[1], parts[3]])

"""Computes the loss and the hits of a padded or concatenated batch.

A hit is a trained token to which the model gives the highest probability of all tokens.

Shapes in names: B rows, T tokens of a padded row or of all concatenated rows, P trained tokens, K columns that predict
a trained token in at least one row, C hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from utils.base.device import sum_dtype
from utils.data.collator import NOT_FOR_THE_MODEL, take_rows
from utils.encode.encoded import IGNORE_INDEX
from utils.fast.chunked_loss import Head, head_input, head_logits, scored, summed_loss
from utils.fast.rotary import depends_on_batch_from, forget_longer_batches, groups_of_rows
from utils.fast.rows import concatenated_rows

# The number of logits that are compared at the same time: 16 MiB in float64 for each of the two models.
_DIVERGENCE_LOGITS = 2**21

Predictors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Scorer:
    """Computes loss and hits of batches: in chunks if a head is given, otherwise from the logits of the model."""

    def __init__(self, base: Any, head: Head | None, *, splits: bool = True) -> None:
        """Set up scoring for the model `base`.

        With some models, a row above a certain length changes the results of all rows in its batch. With `splits`, each
        row above this length gets a separate forward pass, and all shorter rows share one forward pass.
        """
        self.base = base
        self.head = head
        # A sharded model needs the same number of forward passes on each process, so `splits` is False for it.
        self.row_limit = depends_on_batch_from(base.config) if splits else None
        self.selects_logits = 'logits_to_keep' in inspect.signature(base.forward).parameters

    def loss(self, model: Any, batch: dict[str, torch.Tensor], divisor: float) -> torch.Tensor:
        """Return the loss of the batch in fp32, summed over its trained tokens and divided by `divisor`."""
        found, targets_P, _ = self._predictors(model, batch)
        if self.head is None:
            return F.cross_entropy(found.float(), targets_P, reduction='sum') / divisor
        return summed_loss(found, targets_P, self.head, divisor)

    @torch.no_grad()
    def by_row(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a tensor (B, 3): the summed loss, the hits and the trained tokens of each row.

        It is in float64, on MPS in float32.
        """
        found, targets_P, row_P = self._predictors(model, batch)
        if self.head is None:
            losses_P = F.cross_entropy(found.float(), targets_P, reduction='none')
            hits_P = found.argmax(dim=-1) == targets_P
        else:
            losses_P, hits_P = scored(found, targets_P, self.head)

        exact = sum_dtype(losses_P.device)
        parts_P3 = torch.stack([losses_P.to(exact), hits_P.to(exact), torch.ones_like(losses_P, dtype=exact)], dim=1)
        sums_B3 = torch.zeros(len(batch['row_lengths']), 3, dtype=exact, device=parts_P3.device)
        return sums_B3.index_add_(0, row_P.to(parts_P3.device), parts_P3)

    @torch.no_grad()
    def divergence(
        self, model: Any, as_base: Callable[[], AbstractContextManager[None]], batch: dict[str, torch.Tensor]
    ) -> float:
        """Return KL(base || model) in nats, the mean over the trained tokens of the batch.

        In the context `as_base` the model computes like its base. The probabilities are computed in float64.
        """
        tuned = self._predictors(model, batch)[0]
        tuned_head = self.head and self.head.fixed()
        with as_base():
            base = self._predictors(model, batch)[0]
            base_head = self.head and self.head.fixed()

        columns = self.head.size if self.head is not None else tuned.shape[-1]
        size = max(1, _DIVERGENCE_LOGITS // columns)
        total = 0.0
        for tuned_N, base_N in zip(tuned.split(size), base.split(size), strict=True):
            tuned_NV = _log_probabilities(tuned_N, tuned_head)
            base_NV = _log_probabilities(base_N, base_head)
            total += float(F.kl_div(tuned_NV, base_NV, reduction='sum', log_target=True))
        return total / len(tuned)

    def _predictors(self, model: Any, batch: dict[str, torch.Tensor]) -> Predictors:
        """Return three tensors, each with one entry for each trained token.

        The first tensor is what the token is predicted from: hidden states (P, C) if there is a head, else logits
        (P, V). The second is the ids of the trained tokens (P). The third is the index of the token's row (P).
        """
        if self.row_limit is None:
            return self._in_one_pass(model, batch)

        found: list[Predictors] = []
        for indices in groups_of_rows(batch['row_lengths'].tolist(), self.row_limit):
            forget_longer_batches(self.base)
            # `model` may be a wrapper (DDP) that runs collective operations, and processes may have different numbers
            # of groups. So only the first pass, which every process runs, uses the wrapper.
            module = self.base if found else model
            predictors, targets_P, row_P = self._in_one_pass(module, take_rows(batch, indices))
            found.append((predictors, targets_P, torch.tensor(indices, device=row_P.device)[row_P]))
        parts = [torch.cat(part) for part in zip(*found, strict=True)]
        return parts[0], parts[1], parts[2]

    def _in_one_pass(self, model: Any, batch: dict[str, torch.Tensor]) -> Predictors:
        labels_BT = F.pad(batch['labels'][:, 1:], (0, 1), value=IGNORE_INDEX)
        is_trained_BT = labels_BT != IGNORE_INDEX
        columns_K = is_trained_BT.any(dim=0).nonzero().squeeze(-1)
        lengths_B = batch['row_lengths']
        is_concatenated = 'attention_mask' not in batch

        inputs = {name: x for name, x in batch.items() if name not in NOT_FOR_THE_MODEL}
        # logits_to_keep must be a tensor: Gemma 4 would cut its masks to a number.
        keep = {'logits_to_keep': columns_K} if self.selects_logits else {}
        to_head: AbstractContextManager[list[torch.Tensor]] = head_input(self.head) if self.head else nullcontext([])
        layout = concatenated_rows(lengths_B.tolist()) if is_concatenated else nullcontext()
        with layout, to_head as collected:
            logits = model(**inputs, use_cache=False, **keep).logits

        found = collected[0].to(self.head.device) if self.head else logits
        if not keep:
            found = found[:, columns_K.to(found.device)]
        found = found[is_trained_BT[:, columns_K].to(found.device)]

        position_P = is_trained_BT.flatten().nonzero().squeeze(-1)
        if is_concatenated:
            row_P = torch.searchsorted(lengths_B.cumsum(0), position_P, right=True)
        else:
            row_P = position_P // labels_BT.shape[1]
        return found, labels_BT[is_trained_BT].to(found.device), row_P


def _log_probabilities(found: torch.Tensor, head: Head | None) -> torch.Tensor:
    """Return the log-probabilities (N, V) in float64, from what `_predictors` returned for N tokens."""
    logits_NV = found if head is None else head_logits(found, head)
    return logits_NV.double().log_softmax(dim=-1)

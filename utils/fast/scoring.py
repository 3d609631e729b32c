"""Loss and hits of a batch, padded or laid end to end, at its trained tokens alone."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from utils.data.collator import NOT_FOR_THE_MODEL, take_rows
from utils.encode.encoded import IGNORE_INDEX
from utils.fast.attention import laid_end_to_end
from utils.fast.chunked_loss import Head, head_input, scored, summed_loss
from utils.fast.rotary import depends_on_batch_from, forget_longer_batches, groups_of_rows

Predictors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Scorer:
    """Scores batches of one model: by the head it is given, in chunks, or by logits as the model's class makes them."""

    def __init__(self, base: Any, head: Head | None, *, splits: bool = True) -> None:
        """Score batches of `base`; where it `splits`, rows that a longer one would change get a pass of their own."""
        self.base = base
        self.head = head
        # A sharded model computes as often on each process, so that none may split.
        self.row_limit = depends_on_batch_from(base.config) if splits else None
        self.selects_logits = 'logits_to_keep' in inspect.signature(base.forward).parameters

    def loss(self, model: Any, batch: dict[str, torch.Tensor], divisor: float) -> torch.Tensor:
        """Return the summed loss of the batch over `divisor`, in fp32."""
        found, targets, _ = self._predictors(model, batch)
        if self.head is None:
            return F.cross_entropy(found.float(), targets, reduction='sum') / divisor
        return summed_loss(found, targets, self.head, divisor)

    @torch.no_grad()
    def by_row(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return (summed loss, hits, trained tokens) of each row, B x 3, in float64."""
        found, targets, rows = self._predictors(model, batch)
        if self.head is None:
            losses, hits = F.cross_entropy(found.float(), targets, reduction='none'), found.argmax(dim=-1) == targets
        else:
            losses, hits = scored(found, targets, self.head)
        parts = torch.stack([losses.double(), hits.double(), torch.ones_like(losses).double()], dim=1)
        sums = torch.zeros(len(batch['row_lengths']), 3, dtype=torch.float64, device=parts.device)
        return sums.index_add_(0, rows.to(parts.device), parts)

    def _predictors(self, model: Any, batch: dict[str, torch.Tensor]) -> Predictors:
        """Return what predicts the P trained tokens, (P, C) or logits (P, V), the tokens, and the row of each."""
        if self.row_limit is None:
            return self._in_one_pass(model, batch)
        found: list[Predictors] = []
        for indices in groups_of_rows(batch['row_lengths'].tolist(), self.row_limit):
            forget_longer_batches(self.base)
            # Processes meet in the first pass alone: the wrapper may exchange values there, and others split otherwise.
            predictors, targets, rows = self._in_one_pass(self.base if found else model, take_rows(batch, indices))
            found.append((predictors, targets, torch.tensor(indices, device=rows.device)[rows]))
        parts = [torch.cat(part) for part in zip(*found, strict=True)]
        return parts[0], parts[1], parts[2]

    def _in_one_pass(self, model: Any, batch: dict[str, torch.Tensor]) -> Predictors:
        labels = F.pad(batch['labels'][:, 1:], (0, 1), value=IGNORE_INDEX)
        trained = labels != IGNORE_INDEX
        inputs = {name: x for name, x in batch.items() if name not in NOT_FOR_THE_MODEL}
        lengths, laid = batch['row_lengths'], 'attention_mask' not in batch
        columns = trained.any(dim=0).nonzero().squeeze(-1)
        # A tensor, not a number: Gemma 4 cuts masks by a number.
        keep = {'logits_to_keep': columns} if self.selects_logits else {}
        to_head: AbstractContextManager[list[torch.Tensor]] = head_input(self.head) if self.head else nullcontext([])
        with laid_end_to_end(lengths.tolist()) if laid else nullcontext(), to_head as collected:
            logits = model(**inputs, use_cache=False, **keep).logits
        found = collected[0].to(self.head.linear.weight.device) if self.head else logits
        found = found if keep else found[:, columns.to(found.device)]
        found = found[trained[:, columns].to(found.device)]
        places = trained.flatten().nonzero().squeeze(-1)
        rows = torch.searchsorted(lengths.cumsum(0), places, right=True) if laid else places // labels.shape[1]
        return found, labels[trained].to(found.device), rows

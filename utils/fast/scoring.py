"""Computes the loss and the hits of a padded or concatenated batch.

A hit is a trained token to which the model gives a higher probability than to any other token.

The letters at the end of a name are the dimensions of the tensor. For example, `targets_P` has the shape
[trained tokens].

    B: rows
    T: tokens of a padded row, or of all concatenated rows
    P: trained tokens
    N: trained tokens that are computed at the same time
    C: hidden width
    V: vocabulary
    K: columns of a padded batch in which at least one row predicts a trained token
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from utils.base.device import sum_dtype
from utils.data.collator import NOT_FOR_THE_MODEL, on_device, predicting_positions, take_rows
from utils.fast.attention import unpadded
from utils.fast.chunked_loss import Head, head_input, head_logits, scored, summed_loss
from utils.fast.fill import can_fill, filled
from utils.fast.rotary import depends_on_batch_from, forget_longer_batches, groups_of_rows
from utils.fast.rows import concatenated_rows

# The number of logits that are compared at the same time: 16 MiB in float64 for each of the two models.
_DIVERGENCE_LOGITS = 2**21

Batch = dict[str, torch.Tensor]
# What a trained token is predicted from: hidden states (P, C) if there is a head, else logits (P, V).
Predictors = torch.Tensor
Use = Callable[[Predictors, Batch], torch.Tensor]


class Scorer:
    """Computes the loss of batches, and the number of tokens that a model predicts right.

    If `head` is given, the scorer applies this output head to the hidden states in chunks. If it is None, the model
    itself computes the logits.
    """

    def __init__(self, base: Any, head: Head | None, *, splits: bool = True) -> None:
        """Set up scoring for the model `base`.

        With some models, a row above a certain length changes the results of all rows in its batch. If `splits` is
        True, each row above this length gets a separate forward pass. All shorter rows share one forward pass.
        """
        self.base = base
        self.head = head
        # A sharded model needs the same number of forward passes on each process, so `splits` is False for it.
        self.row_limit = depends_on_batch_from(base.config) if splits else None
        self.selects_logits = 'logits_to_keep' in inspect.signature(base.forward).parameters
        self.fills = can_fill(base)

    def loss(self, model: Any, batch: Batch, divisor: float) -> torch.Tensor:
        """Return the loss of the batch in fp32, summed over its trained tokens and divided by `divisor`.

        The loss is on the device of the output head.
        """

        def summed(found: Predictors, part: Batch) -> torch.Tensor:
            if self.head is None:
                targets_P = part['targets'].to(found.device, non_blocking=True)
                return F.cross_entropy(found.float(), targets_P, reduction='sum') / divisor
            return summed_loss(found, part['targets'], self.head, divisor)

        losses = [self._forward(module, part, summed) for module, part in self._passes(model, batch)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    @torch.no_grad()
    def by_row(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return a tensor [rows, 3] with three sums for each row: the loss, the hits, and the number of trained tokens.

        A hit is a trained token to which the model gives the highest probability. The tensor is on the device of the
        output head. Its dtype is float64, but float32 on MPS.
        """
        found, targets_P, owners_P = self._predictors(model, batch)
        if self.head is None:
            targets_P = targets_P.to(found.device, non_blocking=True)
            losses_P = F.cross_entropy(found.float(), targets_P, reduction='none')
            hits_P = found.argmax(dim=-1) == targets_P
        else:
            losses_P, hits_P = scored(found, targets_P, self.head)

        exact = sum_dtype(losses_P.device)
        parts_P3 = torch.stack([losses_P.to(exact), hits_P.to(exact), torch.ones_like(losses_P, dtype=exact)], dim=1)
        sums_B3 = torch.zeros(len(batch['row_lengths']), 3, dtype=exact, device=parts_P3.device)
        return sums_B3.index_add_(0, owners_P.to(parts_P3.device, non_blocking=True), parts_P3)

    @torch.no_grad()
    def divergence(self, model: Any, as_base: Callable[[], AbstractContextManager[None]], batch: Batch) -> float:
        """Return the divergence KL(base || model) in nats, as the mean over the trained tokens of the batch.

        Inside the context `as_base`, the model must compute like its base model, for example with the adapter switched
        off. The probabilities are computed in float64, but in float32 on MPS.
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

    def _predictors(self, model: Any, batch: Batch) -> tuple[Predictors, torch.Tensor, torch.Tensor]:
        """Return three tensors with one entry per trained token: the predictors, the token ids, and the row indices.

        If the scorer has a head, the predictors are the hidden states before the trained tokens,
        [trained tokens, hidden width]. Otherwise they are the logits for these tokens, [trained tokens, vocabulary].
        If the batch needs several forward passes, the entries are in the order of the passes.
        """
        found = []
        parts = []
        for module, part in self._passes(model, batch):
            found.append(self._forward(module, part, lambda predictors, _: predictors))
            parts.append(part)
        targets, owners = (torch.cat([part[name] for part in parts]) for name in ('targets', 'owners'))
        return torch.cat(found), targets, owners

    def _passes(self, model: Any, batch: Batch) -> Iterator[tuple[Any, Batch]]:
        """Yield (model to call, its batch) for each forward pass that `batch` needs.

        A yielded batch has some or all rows of `batch`. Its entry 'owners' has, for each trained token, the index of
        the token's row in `batch`.
        """
        if self.row_limit is None:
            yield model, batch
            return

        device = batch['input_ids'].device
        groups = groups_of_rows(batch['row_lengths'].tolist(), self.row_limit)
        for number, indices in enumerate(groups):
            forget_longer_batches(self.base)
            part = take_rows(batch, indices)
            part['owners'] = torch.tensor(indices)[part['owners']]
            # `model` may be a wrapper (DDP) that runs collective operations, and processes may have different numbers
            # of groups. So only the first pass, which every process runs, uses the wrapper.
            yield self.base if number else model, on_device(part, device)

    def _forward(self, model: Any, batch: Batch, use: Use) -> torch.Tensor:
        """Run the model on the batch, and return use(predictors, batch).

        If the scorer has a head, the predictors are the hidden states before the trained tokens,
        [trained tokens, hidden width]. Otherwise they are the logits for these tokens, [trained tokens, vocabulary].
        """
        inputs = {name: x for name, x in batch.items() if name not in NOT_FOR_THE_MODEL}
        layout: AbstractContextManager[None] = nullcontext()
        if 'attention_mask' not in batch:
            layout = concatenated_rows(batch['row_lengths'].tolist(), batch['cu_seqlens'])
            if self.fills:
                inputs = filled(inputs)
            inputs.update(unpadded(self.base, inputs['input_ids']))

        if self.head is None:
            with layout:
                return use(self._from_logits(model, inputs, batch), batch)

        # Gemma 4 would cut its masks to a number, and a slice selects all hidden states without a copy.
        keep = {'logits_to_keep': slice(None)} if self.selects_logits else {}
        module = model.module if isinstance(model, DistributedDataParallel) else model
        with layout, head_input(self.head, batch['positions']) as collected:

            def used() -> torch.Tensor:
                return use(collected[0], batch)

            # DDP finds the used parameters from the tensor that the forward pass returns. So `use` is called inside the
            # forward pass, and its result is the tensor that the forward pass returns.
            with _returning(module, used):
                result: torch.Tensor = model(**inputs, use_cache=False, **keep)
        return result

    def _from_logits(self, model: Any, inputs: Batch, batch: Batch) -> torch.Tensor:
        """Return the logits [trained tokens, vocabulary] that predict the trained tokens of the batch."""
        length = batch['input_ids'].shape[1]
        positions_P = predicting_positions(batch['labels'])
        if not self.selects_logits:
            logits_BTV: torch.Tensor = model(**inputs, use_cache=False).logits
            return logits_BTV.flatten(0, 1)[positions_P]

        # These indices are on the CPU. Tensors on all devices accept them, and the last layer may be on another device
        # than the batch.
        columns_K, column_of_P = (positions_P % length).unique(return_inverse=True)
        logits_BKV: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=columns_K).logits
        return logits_BKV.flatten(0, 1)[positions_P // length * len(columns_K) + column_of_P]


@contextmanager
def _returning(module: torch.nn.Module, result: Callable[[], torch.Tensor]) -> Iterator[None]:
    """A context in which the forward pass of `module` returns result() instead of its own output."""
    handle = module.register_forward_hook(lambda *_: result())
    try:
        yield
    finally:
        handle.remove()


def _log_probabilities(found: torch.Tensor, head: Head | None) -> torch.Tensor:
    """Return log-probabilities [tokens, vocabulary] in float64, but in float32 on MPS.

    If `head` is None, `found` are logits. Otherwise they are hidden states.
    """
    logits_NV = found if head is None else head_logits(found, head)
    return logits_NV.to(sum_dtype(logits_NV.device)).log_softmax(dim=-1)

"""Compare the trainer's loss on real batches with the loss of a plain forward pass over one row at a time.

Shapes in names: T tokens of a row, P trained tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.encode.encoded import Encoded, cut_front, spans_of, trains_nothing
from utils.run.record import record_proof
from utils.train.trainer import SftTrainer

# At most this many rows are compared, each cut to this many tokens. They show a wrong shift, mask, position, scale or
# count, and cost little time.
_ROWS = 4
_MAX_TOKENS = 256
_BATCH_ROWS = 2
# The allowed difference as a fraction of the loss. It is not 0, because sums over a batch are rounded differently than
# sums over one row. _EXACT is for fp32. In 16 bits, the loss of each token is rounded independently, so the allowed
# difference falls with the square root of the number of tokens, from _ROUNDED for up to _FEW tokens to _LEAST. With
# SmolLM2-135M in bf16, the largest of 22 differences was a sixth of this or less. Deeper models round more.
_EXACT = 1e-3
_ROUNDED = 5e-2
_FEW = 25
_LEAST = 2e-2

Items = list[dict[str, Any]]


class LossProof(TrainerCallback):
    """Before the first step, compares the loss of the trainer with a separately computed loss of the same rows."""

    def __init__(self, trainer: SftTrainer, rows: Sequence[dict[str, Any]]) -> None:
        self.trainer = trainer
        self.rows = choose_rows(rows)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the losses, and write the outcome to proofs.json.

        Raises ConfigError if the trainer's loss differs from the loss of the plain forward pass. With DeepSpeed or
        FSDP, nothing is compared.
        """
        trainer = self.trainer
        started = time.perf_counter()
        # Under FSDP a forward pass without gradients before the first training step crashes the process (SIGSEGV).
        # Under DeepSpeed, which may shard the model too, the comparison is skipped as well.
        if trainer.is_deepspeed_enabled or trainer.is_distributed_loading_by_transformers:
            logger.info(
                'loss value: the loss of a batch is not compared with the losses of its rows, because the run '
                'uses DeepSpeed or FSDP'
            )
            return

        trainer.model_wrapped.eval()
        trainer.in_preflight = True
        try:
            with torch.no_grad():
                self._prove(Path(args.output_dir), started)
        finally:
            trainer.in_preflight = False
            trainer.guard.begin(())
            trainer.model_wrapped.train()

    def _prove(self, run_dir: Path, started: float) -> None:
        rows = []
        summed_losses = []
        for row in self.rows:
            loss = self._plain_loss(row)
            # A row with an infinite or NaN loss is skipped here. The guard reports it in the first step.
            if math.isfinite(loss):
                rows.append(row)
                summed_losses.append(loss)
        if not rows:
            return

        tokens = sum(len(trained_positions(row)) for row in rows)
        wanted = sum(summed_losses) / tokens
        found, counted = self._trainer_loss(rows)
        dtype = self._dtype()
        allowed = allowed_share(dtype, tokens) * max(1.0, abs(wanted))
        says = (
            f'the loss of {len(rows)} rows in batches, {found:.6g} over {counted} tokens, '
            f'{_comparison(found, wanted)} that of the same rows one by one in the plain forward pass, {wanted:.6g} '
            f'over {tokens}; rounding in {dtype} may move it by up to {allowed:.2g}'
        )
        fault = None
        if counted != tokens or not abs(found - wanted) <= allowed:
            fault = (
                f'--padding_free, --chunked_loss: the trainer computes a loss of {found:.6g} over {counted} tokens for '
                f'{len(rows)} rows, and the plain forward pass of one row at a time {wanted:.6g} over {tokens}. Use '
                '--padding_free false --chunked_loss false, and please report this model.'
            )

        fault = dist.first_failure(fault)
        outcome = {'passed': fault is None, 'says': fault or says, 'rows_checked': len(rows)}
        record_proof(run_dir, 'loss_value', {**outcome, 'seconds': round(time.perf_counter() - started, 2)})
        if fault:
            raise ConfigError(fault)
        logger.info(f'loss value: {says}')

    def _plain_loss(self, row: dict[str, Any]) -> float:
        """Return the loss of one row, summed over its trained tokens. The model gets only the row's ids and images."""
        trainer = self.trainer
        device = trainer.args.device
        ids_1T = torch.tensor([row['input_ids']], device=device)
        images = trainer.images.inputs(ids_1T.cpu(), list(row.get('images', ()))) if trainer.images else {}
        images = {name: x.to(device) for name, x in images.items()}
        with trainer.accelerator.autocast():
            output = trainer.model(input_ids=ids_1T, **images, use_cache=False)

        log_p_TV = output.logits[0].float().log_softmax(-1)
        position_P = torch.tensor(trained_positions(row), device=log_p_TV.device)
        target_P = ids_1T[0].to(log_p_TV.device)[position_P]
        return float(-log_p_TV[position_P - 1].gather(1, target_P[:, None]).cpu().double().sum())

    def _trainer_loss(self, rows: Items) -> tuple[float, int]:
        """Return the mean loss that the trainer computes for these rows, and the number of their trained tokens.

        The trainer gets the rows as one step of several micro-batches.
        """
        trainer = self.trainer
        parts = [rows[start : start + _BATCH_ROWS] for start in range(0, len(rows), _BATCH_ROWS)]
        collated = iter([trainer.data_collator(part) for part in parts])
        batches, count = trainer.get_batch_samples(collated, len(parts), trainer.args.device)
        losses = [
            trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(batch), num_items_in_batch=count)
            for batch in batches
            if batch
        ]
        # The count is the sum over all processes, and here all processes have the same rows.
        return sum(map(float, losses)), round(int(count) / dist.world_size())

    def _dtype(self) -> str:
        """Return the dtype of the computation: 'fp32', 'fp16', 'bf16', or 'quantised weights'."""
        autocast = self.trainer.accelerator.mixed_precision
        if autocast != 'no':
            return str(autocast)
        used = {p.dtype for p in self.trainer.model.parameters()}
        names = {torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.float32: 'fp32'}
        if not used <= set(names):
            return 'quantised weights'
        return next(name for dtype, name in names.items() if dtype in used)


def allowed_share(dtype: str, tokens: int) -> float:
    """Return how much rounding in `dtype` may change a mean loss over `tokens` tokens, as a fraction of the loss."""
    if dtype == 'fp32':
        return _EXACT
    return max(_LEAST, _ROUNDED * min(1.0, math.sqrt(_FEW / tokens)))


def _comparison(found: float, wanted: float) -> str:
    """Return 'equals' if two losses round to the same 6 digits. Otherwise, return e.g. 'differs by 0.022 from'."""
    if f'{found:.6g}' == f'{wanted:.6g}':
        return 'equals'
    return f'differs by {abs(found - wanted):.2g} from'


def trained_positions(row: dict[str, Any]) -> list[int]:
    """Return all positions in the trained spans of a row, except position 0, which cannot be predicted."""
    return [position for start, end in spans_of(row) for position in range(max(start, 1), end)]


def choose_rows(rows: Sequence[dict[str, Any]]) -> Items:
    """Return a few rows of different lengths for the comparison.

    Rows without images are cut to their last _MAX_TOKENS tokens, and skipped if none of these tokens carries loss. If
    all rows without images are skipped, a few rows with images are returned uncut.
    """
    shortened = [_shortened(row) for row in rows if not row.get('images')]
    found = [row for row in shortened if row] or [row for row in rows if row.get('images')]
    found.sort(key=lambda row: len(row['input_ids']))
    count = min(_ROWS, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def _shortened(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row with only its last _MAX_TOKENS tokens, or None if none of these tokens is trained."""
    spans = {name: row[name] for name in ('trained', 'prompt_length', 'earlier') if name in row}
    encoded = cut_front(Encoded(input_ids=row['input_ids'], **spans), _MAX_TOKENS)
    item = {'row': row.get('row', -1), **encoded.as_item()}
    return None if trains_nothing(spans_of(item)) else item

"""The loss that the trainer computes on real batches, against the plain forward pass of one row at a time."""

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

# So few rows of so many tokens show a wrong shift, mask, position, scale or count, and cost next to nothing.
_ROWS, _TOKENS, _ROWS_OF_A_BATCH = 4, 256, 2
# How far the two may lie apart, as a share of the loss: a batch is rounded otherwise than a row alone.
_EXACT, _ROUNDED = 1e-3, 5e-2

Items = list[dict[str, Any]]


class LossProof(TrainerCallback):
    """Compares before the first step, when model and processes are set up as training will use them."""

    def __init__(self, trainer: SftTrainer, rows: Sequence[dict[str, Any]]) -> None:
        self.trainer = trainer
        self.rows = choose_rows(rows)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the outcome; raises ConfigError where the trainer's loss is not that of the rows."""
        trainer, started = self.trainer, time.perf_counter()
        # A forward pass without gradients before the first training step ends FSDP's processes with a SIGSEGV.
        if trainer.is_deepspeed_enabled or trainer.is_distributed_loading_by_transformers:
            logger.info('the loss is not compared with that of single rows: DeepSpeed or FSDP holds the model')
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
        alone = [(row, self._alone(row)) for row in self.rows]
        # A row whose loss is no number is the guard's, who names it.
        finite = [(row, loss) for row, loss in alone if math.isfinite(loss)]
        if not finite:
            return
        rows = [row for row, _ in finite]
        tokens = sum(len(trained_places(row)) for row in rows)
        wanted = sum(loss for _, loss in finite) / tokens
        found, counted = self._together(rows)
        says = (
            f'the loss of {len(rows)} rows in batches, {found:.6g} over {counted} tokens, is that of the same rows '
            f'one by one in the plain forward pass, {wanted:.6g} over {tokens}'
        )
        fault = None
        if counted != tokens or not abs(found - wanted) <= self._bound() * max(1.0, abs(wanted)):
            fault = (
                f'--padding_free, --chunked_loss: the trainer computes a loss of {found:.6g} over {counted} tokens '
                f'for {len(rows)} rows, the plain forward pass of one row at a time {wanted:.6g} over {tokens}. '
                'Type --padding_free false --chunked_loss false, and please report this model.'
            )
        fault = dist.first_failure(fault)
        outcome = {'passed': fault is None, 'says': fault or says, 'rows_checked': len(rows)}
        record_proof(run_dir, 'loss_value', {**outcome, 'seconds': round(time.perf_counter() - started, 2)})
        if fault:
            raise ConfigError(fault)
        logger.info(f'loss value: {says}')

    def _alone(self, row: dict[str, Any]) -> float:
        """Return the summed loss of a row: its ids alone go in, and the labels are read from its spans."""
        trainer = self.trainer
        ids = torch.tensor([row['input_ids']], device=trainer.args.device)
        pictures = trainer.images.inputs(ids.cpu(), list(row.get('images', ()))) if trainer.images else {}
        with trainer.accelerator.autocast():
            output = trainer.model(
                input_ids=ids, **{name: x.to(trainer.args.device) for name, x in pictures.items()}, use_cache=False
            )
        log_p = output.logits[0].float().log_softmax(-1)
        places = torch.tensor(trained_places(row), device=log_p.device)
        targets = ids[0].to(log_p.device)[places]
        return float(-log_p[places - 1].gather(1, targets[:, None]).double().sum())

    def _together(self, rows: Items) -> tuple[float, int]:
        """Return the loss of rows as training computes it over a step of several batches, and its count of tokens."""
        trainer = self.trainer
        parts = [rows[start : start + _ROWS_OF_A_BATCH] for start in range(0, len(rows), _ROWS_OF_A_BATCH)]
        collated = iter([trainer.data_collator(part) for part in parts])
        batches, count = trainer.get_batch_samples(collated, len(parts), trainer.args.device)
        losses = [
            trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(batch), num_items_in_batch=count)
            for batch in batches
            if batch
        ]
        # The count is over all processes, and each has the same rows here.
        return sum(map(float, losses)), round(int(count) / dist.world_size())

    def _bound(self) -> float:
        trainer = self.trainer
        is_exact = all(p.dtype == torch.float32 for p in trainer.model.parameters())
        return _EXACT if is_exact and trainer.accelerator.mixed_precision == 'no' else _ROUNDED


def trained_places(row: dict[str, Any]) -> list[int]:
    """Return the positions of a row that are predicted: those in its spans, but for the first of all."""
    return [place for start, end in spans_of(row) for place in range(max(start, 1), end)]


def choose_rows(rows: Sequence[dict[str, Any]]) -> Items:
    """Return rows of different lengths, each with its last tokens: text where there is any, else with pictures."""
    text = [row for row in map(_shortened, (row for row in rows if not row.get('images'))) if row]
    found = sorted(text or [row for row in rows if row.get('images')], key=lambda row: len(row['input_ids']))
    count = min(_ROWS, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def _shortened(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row with its last tokens, None where none of them is trained."""
    spans = {name: row[name] for name in ('trained', 'prompt_length', 'earlier') if name in row}
    cut = {'row': row.get('row', -1), **cut_front(Encoded(input_ids=row['input_ids'], **spans), _TOKENS).as_item()}
    return None if trains_nothing(spans_of(cut)) else cut

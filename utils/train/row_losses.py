"""Stores the losses of validation rows before and after training, in rows.jsonl of the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base.logger import logger
from utils.data.encoded_rows import EncodedRows
from utils.run.read_back import ROWS_JSONL, read_rows
from utils.train.callbacks import EvaluationCutError
from utils.train.state import random_state, set_random_state

if TYPE_CHECKING:
    from utils.train.trainer import SftTrainer


class RowLosses(TrainerCallback):
    """Writes the losses of all validation rows after training, and of `count` of them before training.

    With a new LoRA adapter, the losses before training are computed at the end, with the adapter switched off.

    With --sft_type full or with --adapter (`from_adapter`), the losses before training are computed before the first
    step. The adapter of --adapter is switched on. If such a run resumes from a checkpoint, it cannot compute these
    losses, so it reads them from the folder of the run that wrote the checkpoint.

    The losses after training are those of the last evaluation, so they are not computed again.
    """

    def __init__(
        self, trainer: SftTrainer, count: int, resumed_from: str | None, *, from_adapter: bool = False
    ) -> None:
        self.trainer = trainer
        self.at_end = isinstance(trainer.model, PeftModel) and not from_adapter
        rows = trainer.eval_dataset
        self.rows: EncodedRows | None = rows.evenly(count) if count and rows is not None else None
        self.resumed_from = resumed_from
        # Losses per token before training, by origin.
        self.before: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute or read the losses before training, and write them to rows.jsonl. Does nothing if `at_end`."""
        if self.rows is None or self.at_end:
            return
        if self.resumed_from is not None:
            earlier = read_rows(Path(self.resumed_from).absolute().parent)
            self.before = {row['origin']: row['loss_before'] for row in earlier if row['loss_before'] is not None}
            if not self.before:
                logger.info(
                    f'{ROWS_JSONL}: the losses before training are missing, because the run that wrote the checkpoint '
                    'did not store them'
                )
        else:
            self._compute()
        if self.trainer.args.should_save:
            self._write({})

    def _compute(self) -> None:
        """Compute the losses of `self.rows`, and store them in `self.before`.

        If a stop signal arrives, nothing is stored. The state of the random generators is the same before and after the
        call.
        """
        assert self.rows is not None, 'checked'
        random = random_state()
        try:
            sums = self.trainer.sums_by_row(self.rows)
            self.before = {o: loss / tokens for o, (loss, _, tokens) in _by_origin(self.rows, sums).items() if tokens}
        except EvaluationCutError:
            logger.info(
                f'{ROWS_JSONL}: the losses before training are missing, because a signal stopped their computation'
            )
        finally:
            set_random_state(random)

    def finish(self) -> None:
        """Write rows.jsonl. If `at_end`, first compute the losses without the adapter. Every process must call this.

        Does nothing if no evaluation has computed losses.
        """
        trainer = self.trainer
        if trainer.last_sums is None:
            return
        model: Any = trainer.model
        if self.rows is not None and self.at_end:
            with model.disable_adapter():
                self._compute()
        if trainer.args.should_save:
            self._write(_by_origin(trainer.eval_dataset, trainer.last_sums))

    def _write(self, sums: dict[str, list[float]]) -> None:
        """Write a line for each row that has a loss before or after training.

        `sums` has the results after training: a dict from the origin of a row to its [loss, hits, trained tokens].
        """
        lines = []
        for origin in dict.fromkeys([*sums, *self.before]):
            loss, _, tokens = sums.get(origin, (None, None, None))
            content = {
                'origin': origin,
                'trained_tokens': tokens if tokens is None else int(tokens),
                'loss_before': self.before.get(origin),
                'loss_after': loss / tokens if loss is not None and tokens else None,
            }
            lines.append(json.dumps(content, ensure_ascii=False) + '\n')
        (Path(self.trainer.args.output_dir) / ROWS_JSONL).write_text(''.join(lines), encoding='utf-8')


def _by_origin(rows: EncodedRows, sums: Any) -> dict[str, list[float]]:
    """Return a dict from the origin of a row (its file and line) to its [loss, hits, trained tokens].

    `sums` (N, 3) has these three numbers for each encoded row. With --overlong split, a row can have several encoded
    rows. Their numbers are added.
    """
    found: dict[str, list[float]] = {}
    for index, new in enumerate(sums.tolist()):
        origin = rows.origin(index)
        found[origin] = [a + b for a, b in zip(found.get(origin, (0.0, 0.0, 0.0)), new, strict=True)]
    return found

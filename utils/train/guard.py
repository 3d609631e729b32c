"""Numbers that mean nothing end the run before they reach a weight or a checkpoint; spikes of the loss are reported."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base import dist
from utils.base.checkpoint import last_checkpoint
from utils.base.errors import ConfigError
from utils.base.logger import logger

# A spike lies this many spreads above the median of the last steps, and is half as much again as the median: a flat
# curve's spread is next to nothing. The spread is a normal curve's sigma by the median difference between neighbours,
# which a falling curve does not widen.
_WINDOW, _SPREADS, _SHARE = 20, 8.0, 1.5
_SIGMAS_OF_A_DIFFERENCE = 0.6745 * math.sqrt(2)
# A loss scale of 2^16 is down to 2^-4 after so many skipped steps in a row: then it is not the scale.
_SKIPPED_IN_A_ROW = 20
# Below it a row is learnt by heart, and gradients may round to zero.
_LEARNT = 1e-4
_NAMED = 5
# The names of learnt positions: wpe, embed_positions, position_embeddings.
_POSITIONS = re.compile(r'(?:^|[._])(?:wpe|positions?)(?:$|[._])')


class Guard(TrainerCallback):
    """Looks at loss and gradient norm of each step before the optimizer does. It waits for the device once a step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        self.norm: Any = None
        self.spikes: list[dict[str, Any]] = []
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._batches: Sequence[dict[str, Any]] = ()
        self._window: deque[float] = deque(maxlen=_WINDOW)
        # Of the weights before the first step; None where a run is resumed.
        self._fingerprint_at_start: list[int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take note of the weights a run begins with. The last steps of a resumed one may change no bit of them."""
        if state.global_step == 0:
            self._fingerprint_at_start = weight_fingerprint(self.trainer.model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run where its weights are bit for bit those it began with."""
        if self._fingerprint_at_start is None or self.trainer.stopped:
            return
        has_changed = weight_fingerprint(self.trainer.model) != self._fingerprint_at_start
        if dist.sums([has_changed])[0] == 0:
            skipped = f', of which fp16 skipped {self.skipped}' if self.skipped else ''
            raise ConfigError(
                f'--learning_rate {args.learning_rate}: the weights after {state.global_step} steps{skipped} are those '
                'the run began with, bit for bit: nothing was learnt. Raise it, or train more steps (--max_steps, '
                '--num_train_epochs).'
            )

    def begin(self, batches: Sequence[dict[str, Any]]) -> None:
        """Take note of the micro-batches of a step that begins."""
        self._batches, self.losses, self.norm = batches, [], None

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {'window': list(self._window), 'spikes': self.spikes, 'skipped': self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._window.extend(state['window'])
        self.spikes, self.skipped = state['spikes'], state['skipped']

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the step; learn on the way whether any process was told to stop."""
        step = state.global_step + 1
        loss, losses = self.judge(f'step {step}')
        self._judge_spike(step, loss, losses)

    def judge(self, where: str) -> tuple[float, list[float]]:
        """Return the step's loss and those of this process's micro-batches.

        Ends the run where the loss or its gradients are not finite, and where there is no gradient at all.
        """
        losses = torch.stack(self.losses).tolist()
        norm = math.nan if self.norm is None else self.norm.item() if isinstance(self.norm, torch.Tensor) else self.norm
        bad_loss = not all(map(math.isfinite, losses))
        total, any_bad_loss, any_bad_norm, signals = dist.sums(
            [0.0 if bad_loss else sum(losses), bad_loss, not math.isfinite(norm), self.trainer.signals.signum]
        )
        self.trainer.stop_agreed = signals > 0
        loss = total / dist.world_size()
        if any_bad_loss:
            self._refuse_loss(where, losses)
        if self.norm is not None:
            self._judge_norm(where, loss, norm, bool(any_bad_norm))
        return loss, losses

    def _refuse_loss(self, where: str, losses: list[float]) -> None:
        bad = [batch for batch, loss in zip(self._batches, losses, strict=False) if not math.isfinite(loss)]
        rows = [row for part in dist.from_all([row for batch in bad for row in self._bad_rows(batch)]) for row in part]
        self._end(
            f'{where}: the loss is not a finite number for {_listed(rows)}. Look at these rows. If nothing is '
            'wrong with them, training has diverged or overflows: lower --learning_rate'
            + (', or use --dtype bf16.' if self.trainer.args.fp16 else '.')
        )

    def _judge_norm(self, where: str, loss: float, norm: float, is_bad: bool) -> None:
        if is_bad and self.trainer.args.fp16:
            # The loss scale was too high: the optimizer skips the step and the scale is halved.
            self.skipped, self._skipped_in_a_row = self.skipped + 1, self._skipped_in_a_row + 1
            if self._skipped_in_a_row < _SKIPPED_IN_A_ROW:
                return
            self._end(
                f'{where}: gradients overflow in fp16 whatever the loss scale, {_SKIPPED_IN_A_ROW} steps in a row '
                'were skipped. Use --dtype bf16 or fp32.'
            )
        self._skipped_in_a_row = 0
        if is_bad:
            rows = [row for part in dist.from_all(self._rows()) for row in part]
            self._end(
                f'{where}: the loss is finite, its gradients are not (norm {norm}). The rows of this step: '
                f'{_listed(rows)}. Lower --learning_rate, or use --dtype fp32 to see whether precision is the cause.'
            )
        if norm == 0 and loss > _LEARNT:
            count = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
            self._end(
                f'{where}: the loss is {loss:.4g} and every gradient is exactly zero: none of the {count:,} '
                'trainable parameters is reached from it, so nothing would be learnt. Frozen or detached layers, or '
                'underflow of --dtype fp16, do this; try --dtype fp32 and --gradient_checkpointing false.'
            )

    def _judge_spike(self, step: int, loss: float, losses: list[float]) -> None:
        window = list(self._window)
        self._window.append(loss)
        if len(window) < _WINDOW:
            return
        usual = median(window)
        spread = median(abs(b - a) for a, b in pairwise(window)) / _SIGMAS_OF_A_DIFFERENCE
        if loss <= max(usual + _SPREADS * spread, _SHARE * usual):
            return
        highest, batch = max(zip(losses, self._batches, strict=False), key=lambda pair: pair[0])
        _, rows = max(dist.from_all((highest, self._origins(batch))))
        self.spikes.append({'step': step, 'loss': round(loss, 4), 'usual': round(usual, 4), 'rows': rows[:_NAMED]})
        logger.warning(
            f'step {step}: the loss jumped to {loss:.4g}, the median of the {len(window)} steps before is {usual:.4g}. '
            f'Highest in: {_listed(rows)}'
        )

    def judge_evaluation(self, where: str, sums: Any, rows: Iterable[int]) -> None:
        """End the run for validation rows whose loss is no number: `sums` holds a line (loss, ...) for each row."""
        bad = [index for index, line in zip(rows, sums, strict=False) if not math.isfinite(line[0])]
        if bad:
            origins = [self.trainer.eval_dataset.origin(index) for index in bad]
            self._end(
                f'{where}: the validation loss is not a finite number for {_listed(origins)}. Look at these rows. If '
                'nothing is wrong with them, training has diverged: lower --learning_rate.'
            )

    def _end(self, what: str) -> NoReturn:
        last = last_checkpoint(Path(self.trainer.args.output_dir))
        raise ConfigError(f'{what} Nothing of this step is saved; the last good checkpoint: {last or "none yet"}.')

    def _origins(self, batch: dict[str, Any]) -> list[str]:
        return [self.trainer.train_dataset.origin(index) for index in batch['rows'].flatten().tolist()]

    def _rows(self) -> list[str]:
        return [row for batch in self._batches for row in self._origins(batch)]

    def _bad_rows(self, batch: dict[str, Any]) -> list[str]:
        """Return the rows of a micro-batch whose own loss is not finite; all of them where none is so by itself."""
        trainer, origins = self.trainer, self._origins(batch)
        if trainer.is_deepspeed_enabled or trainer.is_distributed_loading_by_transformers or len(origins) == 1:
            return origins  # a forward pass of one process alone would wait for the others
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = []
        for index, origin in zip(batch['rows'].flatten().tolist(), origins, strict=True):
            inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset.row(index)]))
            with torch.no_grad(), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=1)
            if not math.isfinite(float(loss)):
                found.append(origin)
        return found or origins


@torch.no_grad()
def weight_fingerprint(model: torch.nn.Module) -> list[int]:
    """Return for each weight that shows whether a model learns the sum of its bits, read where it lies.

    Of an adapter this is B alone: it begins as zero, and with it the adapter does nothing, however A decays.
    """
    found: list[int] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or 'lora_A' in name or 'lora_embedding_A' in name:
            continue
        # DeepSpeed keeps this process's part of a weight beside it, FSDP inside it.
        part: Any = getattr(parameter, 'ds_tensor', parameter)
        part = part.to_local() if isinstance(part, DTensor) else part.detach()
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]
        found.append(int(part.contiguous().view(words).sum(dtype=torch.int64)))
    return found


def check_positions(model: Any, longest: int) -> None:
    """Raise ConfigError where a row has more tokens than the model learnt positions; warn where it was made for fewer.

    Rotary positions go on behind the length a model was made for, learnt ones end.
    """
    limit = getattr(model.config.get_text_config(), 'max_position_embeddings', None)
    if limit is None or longest <= limit:
        return
    # Some classes keep a few entries for padding; a table of another size is an image's.
    tables = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and _POSITIONS.search(name)
        and 0 <= module.num_embeddings - limit <= 8
    ]
    if tables:
        raise ConfigError(
            f'--max_length {limit} is the most that {type(model).__name__} has positions for ({tables[0]}), and the '
            f'longest row has {longest} tokens. Give --max_length {limit} or less: longer rows then lose their front.'
        )
    logger.warning(
        f'the longest row has {longest} tokens, {type(model).__name__} was made for {limit} '
        f'(max_position_embeddings): what it learns beyond may be of little use. --max_length {limit} cuts such rows.'
    )


def _listed(rows: Sequence[str]) -> str:
    more = f' and {len(rows) - _NAMED} more' if len(rows) > _NAMED else ''
    return ', '.join(rows[:_NAMED]) + more

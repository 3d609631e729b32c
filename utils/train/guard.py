"""End a run before it damages weights or checkpoints: if loss or gradients are not finite, or if gradients are zero.

Also report loss spikes, and check that training changes the weights and that no row is too long for the model.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base import device, dist
from utils.base.checkpoint import last_checkpoint
from utils.base.errors import ConfigError
from utils.base.logger import logger

# A loss is a spike if two conditions hold. It is more than _SPIKE_SIGMAS robust standard deviations above the median of
# the last _WINDOW steps, and it is more than _SPIKE_RATIO times this median. The second condition is needed because the
# deviation of a flat curve is close to zero.
_WINDOW = 20
_SPIKE_SIGMAS = 8.0
_SPIKE_RATIO = 1.5
# The median absolute difference of two normally distributed values, in standard deviations. Differences are taken
# between neighbouring steps, so that a falling loss curve does not increase the estimate.
_SIGMAS_OF_A_DIFFERENCE = 0.6745 * math.sqrt(2)
# Each skipped step halves the loss scale. After this many skipped steps in a row it has fallen from 2^16 to 2^-4, so a
# high scale is not the cause of the overflow.
_MAX_SKIPPED_IN_A_ROW = 20
# Below this loss the rows are memorised, and gradients that round to zero are no error.
_MEMORISED_LOSS = 1e-4
# A message names at most this many rows.
_MAX_NAMED = 5
# Matches the module names of learned positions, for example wpe, embed_positions and position_embeddings.
_POSITIONS = re.compile(r'(?:^|[._])(?:wpe|positions?)(?:$|[._])')


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """A step whose loss and norm are not checked yet.

    `read` returns the losses of its micro-batches and, as the last item, the norm of its gradients.
    """

    step: int
    batches: Sequence[dict[str, Any]]
    read: Callable[[], list[float]]


class Guard(TrainerCallback):
    """Stops a run if the loss or the gradient norm of a step is not finite, before the step changes the weights.

    In most runs, the guard checks a step before the optimizer runs. On CUDA with the fused AdamW of torch, reading loss
    and norm at this point would leave the GPU without work. So this optimizer itself skips a step whose loss or norm is
    not finite. The guard reads the values one step later, but before anything is logged, saved or evaluated.

    In fp16, steps whose norm is not finite are normal: the optimizer skips them. The guard stops the run only if 20
    steps in a row are skipped.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        self.norm: Any = None
        self.spikes: list[dict[str, Any]] = []
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._batches: Sequence[dict[str, Any]] = ()
        self._taken: _Taken | None = None
        self._window: deque[float] = deque(maxlen=_WINDOW)
        # The fingerprint of the weights before the first step. It is None in a resumed run.
        self._fingerprint_at_start: list[int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store a fingerprint of the weights, so that `on_train_end` can check that training changed them.

        A resumed run stores none, so it is not checked. It may have so few steps left that no weight changes. The
        check would then fail wrongly.
        """
        if state.global_step == 0:
            self._fingerprint_at_start = weight_fingerprint(self.trainer.model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the last step, if it is not checked yet. Then check that training has changed the weights.

        Raises ConfigError if all trained weights are bitwise identical to the weights before training. The A weights of
        LoRA are not compared. A resumed run, and a run that a signal stopped, may end without a change.
        """
        self.settle()
        if self._fingerprint_at_start is None or self.trainer.stopped:
            return
        has_changed = weight_fingerprint(self.trainer.model) != self._fingerprint_at_start
        if dist.sums([has_changed])[0] == 0:
            skipped = f', of which fp16 skipped {self.skipped}' if self.skipped else ''
            raise ConfigError(
                f'--learning_rate {args.learning_rate}: the weights after {state.global_step} steps{skipped} are '
                'bitwise identical to those before, so nothing was learnt. Raise --learning_rate, or train more steps '
                'with --max_steps or --num_train_epochs.'
            )

    def begin(self, batches: Sequence[dict[str, Any]]) -> None:
        """Store the micro-batches of the step that starts, and delete the losses of the step before."""
        self._batches = batches
        self.losses = []
        self.norm = None

    def state(self) -> dict[str, Any]:
        """Return the guard's state for a checkpoint: the latest losses, the spikes and the number of skipped steps."""
        return {'window': list(self._window), 'spikes': self.spikes, 'skipped': self.skipped}

    def restore(self, stored: dict[str, Any]) -> None:
        """Restore the guard from `stored`, a dict that `state()` returned for a checkpoint."""
        self._window.extend(stored['window'])
        self.spikes = stored['spikes']
        self.skipped = stored['skipped']

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the loss and the gradients of a step, and log a warning if the loss is a spike.

        Raises ConfigError if the loss or the gradients are not finite, or if every gradient is zero although the loss
        is not. In fp16, a step with gradients that are not finite is skipped, and the error comes at the 20th skipped
        step in a row.

        The function `judges_late` decides which step is checked. If `judges_late` returns False, the current step is
        checked. If `judges_late` returns True, each step is checked by the next call, or earlier by `settle`. In that
        case, the optimizer skips a step whose loss or gradients are not finite, and the error comes with the check.
        """
        step = state.global_step + 1
        if not judges_late(self.trainer):
            loss, losses = self.judge(f'step {step}')
            self._judge_spike(step, loss, losses, self._batches)
            return

        values = torch.stack([*self.losses, self.norm.to(self.losses[0])]).float()
        # The fused optimizer reads it on the GPU, as it does for the gradient scaler of fp16.
        self.trainer.optimizer.optimizer.found_inf = (~values.isfinite().all()).float()
        before = self._taken
        self._taken = _Taken(step=step, batches=self._batches, read=device.read_later(values))
        *losses, norm = before.read() if before is not None else [0.0]
        sums = self._exchange(_to_sum(losses, norm))
        if before is not None:
            self._conclude(before, losses, norm, sums)

    def settle(self) -> None:
        """Check the loss and the gradients of the last step, if they are not checked yet.

        Every process must call this at the same step. Raises ConfigError in the same cases as `judge`.
        """
        if self._taken is None:
            return
        before = self._taken
        self._taken = None
        *losses, norm = before.read()
        self._conclude(before, losses, norm, dist.sums(_to_sum(losses, norm)))

    def _conclude(self, taken: _Taken, losses: list[float], norm: float, sums: Sequence[float]) -> None:
        """Check the step `taken` as `_verdict` does, and log a warning if the loss of the step is a spike.

        `losses` are the losses of the micro-batches on this process, and `norm` is the gradient norm on this process.
        `sums` has three sums over all processes: the loss, the number of processes whose loss is not finite, and the
        number of processes whose norm is not finite.
        """
        loss = self._verdict(f'step {taken.step}', losses, norm, sums, taken.batches)
        self._judge_spike(taken.step, loss, losses, taken.batches)

    def judge(self, where: str) -> tuple[float, list[float]]:
        """Check the loss and the gradients of a step. `where` names the step in messages, e.g. 'step 5'.

        Returns the loss of the step over all processes, and the losses of this process's micro-batches.

        Raises ConfigError if the loss or the gradients are not finite, or if every gradient is zero although the loss
        is not. In fp16, gradients that are not finite raise ConfigError only at the 20th such step in a row.

        Also sets two attributes to the same value in all processes. `trainer.stop_agreed` says whether any process has
        received a stop signal. `trainer.deadline.agreed` is the new last step of the run. If the planned last step does
        not change, `trainer.deadline.agreed` is 0.
        """
        losses = torch.stack(self.losses).tolist()
        norm = self._norm_value()
        sums = self._exchange(_to_sum(losses, norm))
        return self._verdict(where, losses, norm, sums, self._batches), losses

    def _exchange(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all processes.

        The same collective operation also shares two other values. `trainer.stop_agreed` becomes True if any process
        has received a stop signal. `trainer.deadline.agreed` becomes the step after which training is to end, or 0 for
        no change.
        """
        trainer = self.trainer
        *found, signals, end = dist.sums([*values, trainer.signals.signum, trainer.deadline.proposal()])
        trainer.stop_agreed = signals > 0
        trainer.deadline.agreed = int(end)
        return found

    def _verdict(
        self,
        where: str,
        losses: list[float],
        norm: float | None,
        sums: Sequence[float],
        batches: Sequence[dict[str, Any]],
    ) -> float:
        """Return the loss of a step over all processes.

        `sums` has three sums over all processes: the loss, the number of processes whose loss is not finite, and the
        number of processes whose norm is not finite. If `norm` is None, the gradients are not checked.

        Raises ConfigError if the loss or the gradients are not finite, or if every gradient is zero although the loss
        is not. In fp16, gradients that are not finite raise ConfigError only at the 20th such step in a row.
        """
        total, any_bad_loss, any_bad_norm = sums
        loss = total / dist.world_size()
        if any_bad_loss:
            self._refuse_loss(where, losses, batches)
        if norm is not None:
            self._judge_norm(where, loss, norm, bool(any_bad_norm), batches)
        return loss

    def _norm_value(self) -> float | None:
        """Return the norm of the gradients, or None if DeepSpeed has not computed it."""
        if self.norm is None:
            return None
        return self.norm.item() if isinstance(self.norm, torch.Tensor) else self.norm

    def _refuse_loss(self, where: str, losses: list[float], batches: Sequence[dict[str, Any]]) -> None:
        own: list[str] = []
        for batch, loss in zip(batches, losses, strict=False):
            if not math.isfinite(loss):
                own += self._bad_rows(batch)
        rows = _of_all_processes(own)
        remedy = ', or use --dtype bf16.' if self.trainer.args.fp16 else '.'
        self._end(
            f'{where}: the loss is not a finite number for {_listed(rows)}. Check these rows. If nothing is wrong with '
            f'them, training diverges or overflows: lower --learning_rate{remedy}'
        )

    def _judge_norm(
        self, where: str, loss: float, norm: float, is_bad: bool, batches: Sequence[dict[str, Any]]
    ) -> None:
        if is_bad and self.trainer.args.fp16:
            # The loss scale was too high, so the optimizer skips the step and the loss scale is halved.
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row < _MAX_SKIPPED_IN_A_ROW:
                return
            self._end(
                f'{where}: gradients overflow in fp16 at every loss scale, {_MAX_SKIPPED_IN_A_ROW} steps in a row were '
                'skipped. Use --dtype bf16 or --dtype fp32.'
            )

        self._skipped_in_a_row = 0
        if is_bad:
            rows = _of_all_processes([row for batch in batches for row in self._origins(batch)])
            self._end(
                f'{where}: the loss is finite, but its gradients are not (norm {norm}). The rows of this step: '
                f'{_listed(rows)}. Lower --learning_rate, or use --dtype fp32 to see whether precision is the cause.'
            )
        if norm == 0 and loss > _MEMORISED_LOSS:
            # Under ZeRO-3 a parameter has only a part of its values here. ds_numel counts all of them.
            sizes = [getattr(p, 'ds_numel', p.numel()) for p in self.trainer.model.parameters() if p.requires_grad]
            self._end(
                f'{where}: the loss is {loss:.4g}, but every gradient is exactly zero. None of the {sum(sizes):,} '
                'trainable parameters affects the loss, so nothing would be learnt. Frozen or detached layers, or '
                'underflow with --dtype fp16, cause this. Use --dtype fp32 or --gradient_checkpointing false.'
            )

    def _judge_spike(self, step: int, loss: float, losses: list[float], batches: Sequence[dict[str, Any]]) -> None:
        window = list(self._window)
        self._window.append(loss)
        if len(window) < _WINDOW:
            return

        usual = median(window)
        sigma = median(abs(b - a) for a, b in pairwise(window)) / _SIGMAS_OF_A_DIFFERENCE
        if loss <= max(usual + _SPIKE_SIGMAS * sigma, _SPIKE_RATIO * usual):
            return

        highest, batch = max(zip(losses, batches, strict=False), key=lambda pair: pair[0])
        _, rows = max(dist.from_all((highest, self._origins(batch))))
        self.spikes.append({'step': step, 'loss': round(loss, 4), 'usual': round(usual, 4), 'rows': rows[:_MAX_NAMED]})
        logger.warning(
            f'step {step}: the loss jumped to {loss:.4g}, and the median of the {len(window)} steps before is '
            f'{usual:.4g}. Check the rows with the highest loss: {_listed(rows)}'
        )

    def judge_evaluation(self, where: str, sums: Any, rows: Iterable[int]) -> None:
        """Raise ConfigError if the loss of a validation row is not finite.

        `where` names the step in the message, e.g. 'step 100'. `rows` are the indices of the rows in the validation
        set. `sums` has one item for each row, and the first number of an item is the loss.
        """
        bad = [index for index, (loss, *_) in zip(rows, sums, strict=False) if not math.isfinite(loss)]
        if bad:
            origins = [self.trainer.eval_dataset.origin(index) for index in bad]
            self._end(
                f'{where}: the validation loss is not a finite number for {_listed(origins)}. Check these rows. If '
                'nothing is wrong with them, training diverges: lower --learning_rate.'
            )

    def _end(self, problem: str) -> NoReturn:
        last = last_checkpoint(Path(self.trainer.args.output_dir))
        raise ConfigError(
            f'{problem} Nothing of this step is saved; the last good checkpoint of this run: {last or "none yet"}.'
        )

    def _origins(self, batch: dict[str, Any]) -> list[str]:
        return [self.trainer.train_dataset.origin(index) for index in batch['rows'].flatten().tolist()]

    def _bad_rows(self, batch: dict[str, Any]) -> list[str]:
        """Return the origins (file and line) of the rows that make the loss of a micro-batch NaN or infinite.

        The loss of each row is computed separately. If every separate loss is finite, the origins of all rows of the
        micro-batch are returned. With DeepSpeed or FSDP, they are returned without a computation.
        """
        trainer = self.trainer
        origins = self._origins(batch)
        if trainer.is_deepspeed_enabled or trainer.is_distributed_loading_by_transformers or len(origins) == 1:
            return origins  # with a sharded model, a forward pass on only one process would wait for the others

        model = trainer.accelerator.unwrap_model(trainer.model)
        found = []
        for index, origin in zip(batch['rows'].flatten().tolist(), origins, strict=True):
            inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset.row(index)]))
            with torch.no_grad(), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=1)
            if not math.isfinite(float(loss)):
                found.append(origin)
        return found or origins


def judges_late(trainer: Any) -> bool:
    """Return whether the guard checks each step only after the gradients of the next step are computed.

    It does so only on CUDA with the fused AdamW of torch, and not in fp16 or with DeepSpeed or FSDP. The fused AdamW
    itself can skip a step whose loss or norm is not finite.
    """
    if device.kind() != 'cuda' or trainer.accelerator.scaler is not None:
        return False
    if trainer.is_deepspeed_enabled or trainer.is_distributed_loading_by_transformers:
        return False  # the gradients are sharded
    inner = trainer.optimizer.optimizer  # inside the wrapper of accelerate
    return isinstance(inner, torch.optim.AdamW) and bool(inner.defaults['fused'])


def _to_sum(losses: list[float], norm: float | None) -> list[float]:
    """Return [loss, is the loss not finite, is the norm not finite] of this process, to be summed over all processes.

    A loss that is not finite counts as 0.
    """
    is_bad = not all(map(math.isfinite, losses))
    return [0.0 if is_bad else sum(losses), is_bad, norm is not None and not math.isfinite(norm)]


@torch.no_grad()
def weight_fingerprint(model: torch.nn.Module) -> list[int]:
    """Return one checksum for each trainable weight, to find out whether training changes the model.

    The A weights of an adapter are left out. Weight decay changes A from the first step on, but the adapter has no
    effect as long as B is zero. A checksum is the sum of the weight's values, read as integers of the same width. If
    the weights are sharded, only the parts on this process count.
    """
    found: list[int] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or 'lora_A' in name or 'lora_embedding_A' in name:
            continue
        # DeepSpeed stores the part on this process in `ds_tensor`, and FSDP in a DTensor.
        part: Any = getattr(parameter, 'ds_tensor', parameter)
        part = part.to_local() if isinstance(part, DTensor) else part.detach()
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]
        found.append(int(part.contiguous().view(words).sum(dtype=torch.int64)))
    return found


def check_positions(model: Any, longest: int) -> None:
    """Raise ConfigError if the longest row has more tokens than the model has learned positions.

    Models without learned positions, for example with rotary positions, can compute longer rows. For these models, a
    warning is logged if a row is longer than max_position_embeddings.
    """
    limit = getattr(model.config.get_text_config(), 'max_position_embeddings', None)
    if limit is None or longest <= limit:
        return
    # Some classes have a few extra entries for padding. A table with a very different size belongs to a vision tower.
    tables = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and _POSITIONS.search(name)
        and 0 <= module.num_embeddings - limit <= 8
    ]
    if tables:
        raise ConfigError(
            f'--max_length: {type(model).__name__} has positions for {limit} tokens ({tables[0]}), and the longest row '
            f'has {longest} tokens. Use --max_length {limit} or less. --overlong says what then happens to longer rows.'
        )
    logger.warning(
        f'--max_length: the longest row has {longest} tokens, but {type(model).__name__} was made for at most {limit} '
        f'(max_position_embeddings). The model may learn little from later tokens. Training continues. Use '
        f'--max_length {limit} to avoid such rows.'
    )


def _of_all_processes(rows: list[str]) -> list[str]:
    return [row for part in dist.from_all(rows) for row in part]


def _listed(rows: Sequence[str]) -> str:
    more = f' and {len(rows) - _MAX_NAMED} more' if len(rows) > _MAX_NAMED else ''
    return ', '.join(rows[:_MAX_NAMED]) + more

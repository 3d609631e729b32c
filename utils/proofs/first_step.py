"""The first-step gate: before training, try a step, an evaluation and a checkpoint, and then undo their effects.

They are tried with the batches that need the most memory. Afterwards the weights and all other state are bitwise the
same as before.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import EvalPrediction

from utils.base import device, dist
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.encode.encoded import Encoded, cut_front
from utils.run.record import record_proof
from utils.train.callbacks import peak_memory_gib
from utils.train.state import random_state, set_random_state
from utils.train.trainer import SftTrainer

_SCRATCH = '.preflight'
_GATE = 'the first-step gate'
# A few tokens are enough to check that answers can be generated and scored.
_NEW_TOKENS = 8
# The numbers of tokens up to which micro-batches are joined on a GPU, in the order in which they are tried. A GPU
# computes a small micro-batch faster than the CPU can start its kernels, so it would wait for the CPU.
_JOINED = (16384, 8192, 4096)
# What cuBLAS says if its workspace does not fit into memory.
_CUBLAS_WITHOUT_MEMORY = ('CUBLAS_STATUS_ALLOC_FAILED', 'CUBLAS_STATUS_NOT_INITIALIZED')
Rows = list[dict[str, Any]]
T = TypeVar('T')


class FirstStepGate(TrainerCallback):
    """Tries steps, an evaluation and a checkpoint before the training, so that a lack of memory or disk shows early.

    The steps are tried with the micro-batches that need the most memory.

    With --group_by_length on CUDA, the gate also tries whether several micro-batches of a step fit into memory as one
    larger batch. If they fit, the training computes them as one batch, which is faster.
    """

    def __init__(self, trainer: SftTrainer, *, resumed_from: str | None) -> None:
        self.trainer = trainer
        self.resumed_from = resumed_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Try steps, an evaluation and a checkpoint, undo them, and write the outcome to proofs.json.

        If the memory or the disk is too small, or if the loss or the gradients are bad, raises ConfigError with a
        message that says which flags to change.
        """
        started = time.perf_counter()
        heaviest = self.trainer.train_dataset.heaviest(args.per_device_train_batch_size)
        self.trainer.in_preflight = True
        try:
            with self._scratch(_SCRATCH) as scratch, self._undone(scratch):
                if failed := self._steps(heaviest):
                    self._advise(*failed)
                self._join_more()
                self._evaluate()
                size = self._save(scratch)
        finally:
            self.trainer.in_preflight = False

        self.trainer.preflight_seconds = round(time.perf_counter() - started, 2)
        tokens = _longest(heaviest[0])
        peak = peak_memory_gib()
        says = (
            f'tried and undone: {len(heaviest[0])} rows of up to {tokens} tokens, peak memory {peak} GiB, '
            f'a checkpoint takes {size / 2**20:.1f} MiB'
        )
        outcome = {
            'passed': True,
            'says': says,
            'heaviest_batch': {'rows': len(heaviest[0]), 'longest_row_tokens': tokens},
            'peak_memory_gib': peak,
            'checkpoint_bytes': size,
            'seconds': self.trainer.preflight_seconds,
        }
        record_proof(Path(args.output_dir), 'first_step', outcome)
        logger.info(f'first step, {self.trainer.preflight_seconds} s: {says}')

    @contextlib.contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        """A context with the path of a folder in the run folder. The folder is deleted when the context ends."""
        folder = Path(self.trainer.args.output_dir) / name
        try:
            yield folder
        finally:
            if self.trainer.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _undone(self, scratch: Path) -> Iterator[None]:
        """A context that restores weights, optimizer, loss scale and random state when it ends without an error.

        A copy of the trainable weights is kept in main memory (4 bytes for each fp32 parameter). DeepSpeed shards the
        weights, so with DeepSpeed a checkpoint in the folder `scratch` is used instead of the copy.
        """
        trainer = self.trainer
        engine = trainer.deepspeed
        scaler = trainer.accelerator.scaler
        random = random_state()
        scale = scaler.state_dict() if scaler is not None else None
        trained = [p.detach() for p in trainer.model.parameters() if p.requires_grad and engine is None]
        weights = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
        copies = [weight.to('cpu', copy=True) for weight in weights]
        if engine is not None:
            engine.save_checkpoint(str(scratch), exclude_frozen_parameters=isinstance(trainer.model, PeftModel))

        yield

        if engine is not None:
            deepspeed_load_checkpoint(engine, str(scratch), load_module_strict=not isinstance(trainer.model, PeftModel))
            engine.micro_steps = 0
            # The main process deletes the checkpoint, but only after all processes have read it.
            trainer.accelerator.wait_for_everyone()
        else:
            with torch.no_grad():
                for weight, copied in zip(weights, copies, strict=True):
                    weight.copy_(copied)
            _forget(trainer.optimizer)
            if self.resumed_from is not None:
                trainer.checkpoints.load_optimizer(Path(self.resumed_from))
        if scaler is not None:
            scaler.load_state_dict(scale)
        trainer.model_wrapped.zero_grad()
        trainer.guard.begin(())
        set_random_state(random)

    def _steps(self, heaviest: list[Rows]) -> tuple[Rows, str] | None:
        """Try a whole step, and then a forward and a backward pass over each of the batches `heaviest`.

        Returns the batch that does not fit into memory, with the first memory error of any process. Returns None if the
        memory is sufficient. Raises ConfigError if the loss or the gradients are not finite, or if every gradient is
        zero.
        """
        trainer = self.trainer
        is_sharded = self._is_sharded()
        # The whole step comes first, because it allocates the state of the optimizer.
        if failure := self._forward_backward(heaviest[0], exchanges=is_sharded):
            return heaviest[0], failure
        self._optimize()

        # These passes have no collective operations. So if a process runs out of memory, the others do not wait for it.
        # Only a sharded model always has collective operations, and there the others can hang.
        for rows in heaviest:
            if failure := self._forward_backward(rows, exchanges=is_sharded):
                return rows, failure
        # One pass, over one row, averages the gradients over the processes.
        if dist.world_size() > 1 and not is_sharded:
            trainer.model_wrapped.zero_grad()
            if failure := self._forward_backward(heaviest[0][-1:], exchanges=True):
                return heaviest[0], failure
        return None

    def _join_more(self) -> None:
        """Set the maximum number of tokens of a batch that is joined from several micro-batches.

        The numbers in _JOINED are tried, the largest first, until a batch fits into memory. If the run is resumed, only
        the number that it used before is tried. Does nothing if the run joins no micro-batches.
        """
        trainer = self.trainer
        order = trainer.order
        if order is None or trainer.capacity is None:
            return
        heaviest_tokens = sum(heapq.nlargest(order.batch, order.lengths))
        if self.resumed_from is not None:
            self._join_again(trainer.capacity, heaviest_tokens)
        elif joins_more():
            for tokens in _JOINED:
                tried, failure = self._try_joined(tokens, heaviest_tokens)
                if failure is None:
                    trainer.capacity = tried
                    break
            if trainer.capacity > heaviest_tokens:
                reason = 'micro-batches of a step are joined up to so many tokens, which fit into memory'
                trainer.checkpoints.run.decide('joined_tokens', trainer.capacity, reason)

    def _join_again(self, tokens: int, heaviest_tokens: int) -> None:
        """Try a batch of up to `tokens` tokens, the maximum that this run used before it was resumed.

        If the batch does not fit into memory, the maximum becomes `heaviest_tokens`, which is known to fit.
        """
        if tokens <= heaviest_tokens or self._try_joined(tokens, heaviest_tokens)[1] is None:
            return
        self.trainer.capacity = heaviest_tokens
        logger.warning(
            '--resume_from_checkpoint: before it was resumed, the run joined several micro-batches into a batch of up '
            f'to {tokens} tokens. Such a batch does not fit into the memory of this machine. So batches of up to '
            f'{heaviest_tokens} tokens are used from now on. The gradients are the same up to rounding.'
        )

    def _try_joined(self, tokens: int, heaviest_tokens: int) -> tuple[int, str | None]:
        """Try the longest rows as one batch of at most `tokens` tokens. Every token carries loss.

        Returns (number of tokens of the batch, memory error or None).

        Batches of `heaviest_tokens` tokens are known to fit into memory. If the batch would not be larger, nothing is
        tried, and (`heaviest_tokens`, None) is returned.
        """
        trainer = self.trainer
        assert trainer.order is not None, 'checked by the caller'
        # All processes have the same rows, so they try the same.
        lengths = heapq.nlargest(trainer.order.batch * trainer.args.gradient_accumulation_steps, trainer.order.lengths)
        count = sum(total <= tokens for total in itertools.accumulate(lengths))
        tried = sum(lengths[:count])
        if tried <= heaviest_tokens:
            return heaviest_tokens, None

        rows = [_with_loss_on_all(row) for row in trainer.train_dataset.heaviest(count)[0]]
        failure = self._forward_backward(rows, exchanges=False)
        trainer.model_wrapped.zero_grad()
        if failure is not None:
            clear_device_cache(garbage_collection=True)
        return tried, failure

    def _is_sharded(self) -> bool:
        return bool(self.trainer.is_deepspeed_enabled or self.trainer.is_distributed_loading_by_transformers)

    def _forward_backward(self, rows: Rows, *, exchanges: bool) -> str | None:
        """Do a forward and a backward pass over the rows. If `exchanges` is True, processes average their gradients.

        Returns the first memory error of any process, or None if there was no error.
        """
        trainer = self.trainer
        batches, count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, trainer.args.device)
        trainer.accelerator.gradient_state._set_sync_gradients(exchanges)
        context = contextlib.nullcontext()
        if not exchanges:
            context = trainer.accelerator.no_sync(model=trainer.model_wrapped)
        with context:
            _, failure = _tried(lambda: trainer.training_step(trainer.model_wrapped, batches[0], count))
        return dist.first_failure(failure)

    def _optimize(self) -> None:
        trainer = self.trainer
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        norm = trainer._clip_grad_norm(trainer.model_wrapped) if trainer.args.max_grad_norm > 0 else None
        trainer._get_grad_norm(trainer.model_wrapped, grad_norm=norm)
        trainer.guard.judge(_GATE)
        trainer.optimizer.step()
        trainer.model_wrapped.zero_grad()

    def _advise(self, rows: Rows, failure: str) -> NoReturn:
        """Try settings that need less memory, and raise a ConfigError that says which of them fit into memory.

        `failure` is the memory error of the batch `rows`.
        """
        trainer = self.trainer
        tokens = _longest(rows)
        tried = []
        # With a sharded model, processes are not synchronised after an error, so no other setting can be tried.
        for flag, lighter in [] if self._is_sharded() else self._lighter(rows, tokens):
            trainer.model_wrapped.zero_grad()
            _forget(trainer.optimizer)
            clear_device_cache(garbage_collection=True)
            device.reset_peak()

            if lighter is rows:
                trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
            fits = self._steps([lighter]) is None
            if lighter is rows:
                trainer.model.gradient_checkpointing_disable()

            result = 'fits' if fits else 'does not fit'
            if fits and device.kind() != 'cpu':
                result += f' (peak {peak_memory_gib()} GiB)'
            tried.append(f'{flag}: {result}')

        advice = f'Tried just now: {"; ".join(tried)}.' if tried else 'Lower --batch_size or --max_length.'
        if len(rows) > 1:
            advice += ' A smaller --batch_size with more --gradient_accumulation_steps trains the same.'
        raise ConfigError(
            f'--batch_size: the heaviest batch ({len(rows)} rows of up to {tokens} tokens) does not fit into memory: '
            f'{failure} {advice}'
        )

    def _lighter(self, rows: Rows, tokens: int) -> list[tuple[str, Rows]]:
        """Return a list of (flag that would save memory, heaviest batch of a run with this flag).

        `rows` is the batch that does not fit into memory, and `tokens` the length of its longest row.
        """
        lighter: list[tuple[str, Rows]] = []
        if half := len(rows) // 2:
            lighter.append((f'--batch_size {half}', rows[:half]))
        if not self.trainer.model.is_gradient_checkpointing:
            # This flag does not change the batch. The caller recognises the flag by the object `rows` itself.
            lighter.append(('--gradient_checkpointing true', rows))
        # Packs and rows with images cannot be cut to a number of tokens.
        if not any('rows' in row or 'images' in row for row in rows):
            length = tokens // 2
            lighter.append((f'--max_length {length}', [_last(row, length) for row in rows]))
        return lighter

    def _evaluate(self) -> None:
        """Try an evaluation of the longest validation rows. Generated answers are kept short.

        Raises ConfigError if the batch does not fit into memory, if the loss of a row is not finite, or if the scores
        of --score raise it.
        """
        trainer = self.trainer
        rows = trainer.eval_dataset
        if rows is None:
            return

        batch = rows.heaviest(trainer.args.per_device_eval_batch_size)[0]
        generation = trainer.generation
        trainer.generation = copy.copy(generation)
        trainer.generation.max_new_tokens = min(_NEW_TOKENS, generation.max_new_tokens or _NEW_TOKENS)
        trainer.model_wrapped.eval()
        result, failure = _tried(
            lambda: trainer.prediction_step(trainer.model_wrapped, trainer.data_collator(batch), False)
        )
        trainer.generation = generation
        if failure := dist.first_failure(failure):
            raise ConfigError(
                f'--eval_batch_size: the heaviest validation batch ({len(batch)} rows) does not fit into memory: '
                f'{failure} Lower --eval_batch_size or --max_length.'
            )

        assert result is not None, 'no process failed'
        _, found, labels = result
        if not trainer.args.predict_with_generate:
            trainer.guard.judge_evaluation(_GATE, found.tolist(), [row['row'] for row in batch])
        trainer.compute_metrics(EvalPrediction(predictions=found.cpu().numpy(), label_ids=labels.cpu().numpy()))

    def _save(self, scratch: Path) -> int:
        """Write a checkpoint to the folder `scratch`, and return its size in bytes.

        Logs a warning if the disk has too little space for the later checkpoints. Raises ConfigError if the checkpoint
        cannot be written.
        """
        trainer = self.trainer
        checkpoint = scratch / 'checkpoint-0'
        if failure := trainer.checkpoints.write(checkpoint, resumable=not trainer.args.save_only_model):
            folder = trainer.args.output_dir
            raise ConfigError(
                f'{folder}: a checkpoint cannot be written: {failure}. Free disk space, or use another --output_dir.'
            )

        size = dist.from_all(sum(p.stat().st_size for p in checkpoint.rglob('*')) if dist.is_main() else 0)[0]
        limit = trainer.checkpoints.limit
        # The best and the last checkpoint are kept. An old checkpoint is deleted only after the next checkpoint is
        # written, so one more must fit on the disk.
        held = max(limit, 1 if trainer.eval_dataset is None else 2) + 1 if limit > 0 else 2
        free = shutil.disk_usage(scratch.parent).free + size
        if free < held * size:
            many = f'up to {held}' if limit > 0 else f'{held} or more'
            logger.warning(
                f'--save_total_limit: {many} checkpoints of {size / 2**30:.1f} GiB will exist at the same time, but '
                f'{free / 2**30:.1f} GiB are free. Free disk space before the checkpoints are written.'
            )
        return size


def joins_more() -> bool:
    """Return whether joined micro-batches may have more tokens than the heaviest single one. True only on CUDA."""
    return device.kind() == 'cuda'


def _with_loss_on_all(item: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `item` (a row, or a pack of several rows) in which every token carries loss."""
    if 'rows' in item:
        return {**item, 'rows': [_with_loss_on_all(row) for row in item['rows']]}
    return {**item, 'earlier': [], 'trained': (0, len(item['input_ids']))}


def _tried(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Call `work`, and return (its result, None). If it runs out of memory, return (None, first line of the error)."""
    try:
        return work(), None
    except (RuntimeError, MemoryError) as error:
        text = str(error) or type(error).__name__
        is_cublas = any(status in text for status in _CUBLAS_WITHOUT_MEMORY)
        if not (isinstance(error, MemoryError) or is_cublas or should_reduce_batch_size(error)):
            raise
        return None, text.splitlines()[0]


def _forget(optimizer: Any) -> None:
    """Reset the state of an optimizer, as if it had done no step.

    bitsandbytes never releases the memory of a paged optimizer, and a new state would take the same amount again. So
    the state of a paged optimizer is kept and set to zero, except the constant tables `qmap`.
    """
    inner = optimizer.optimizer  # inside the wrapper of accelerate
    if not (type(inner).__module__.startswith('bitsandbytes.') and inner.is_paged):
        optimizer.state.clear()
        return

    device.wait()
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and not name.startswith('qmap'):
                value.zero_()
        state['step'] = 0


def _longest(rows: Rows) -> int:
    """Return the number of tokens of the longest row or pack."""

    def tokens(item: dict[str, Any]) -> int:
        return sum(len(row['input_ids']) for row in item.get('rows', [item]))

    return max(map(tokens, rows))


def _last(row: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the row with only its last `count` tokens, as if --max_length had cut it."""
    spans = {name: row[name] for name in ('trained', 'prompt_length', 'earlier') if name in row}
    encoded = cut_front(Encoded(input_ids=row['input_ids'], **spans), count)
    return {**row, 'earlier': [], **encoded.as_item()}

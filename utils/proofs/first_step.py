"""The first-step gate: everything a run will do is done once, on the heaviest rows, and undone bit for bit."""

from __future__ import annotations

import contextlib
import copy
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

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.encode.encoded import Encoded, cut_front
from utils.run.record import record_proof
from utils.train.callbacks import peak_memory_gib
from utils.train.state import random_state, set_random_state
from utils.train.trainer import SftTrainer

_SCRATCH = '.preflight'
_GATE = 'the first-step gate'
# Whether answers can be generated and scored shows in a few tokens.
_NEW_TOKENS = 8
Rows = list[dict[str, Any]]
T = TypeVar('T')


class FirstStepGate(TrainerCallback):
    """Runs before the first step, when model, optimizer and processes are set up as training will use them."""

    def __init__(self, trainer: SftTrainer, *, resumed_from: str | None) -> None:
        self.trainer = trainer
        self.resumed_from = resumed_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go through steps, an evaluation and a checkpoint; ends the run with advice where one of them fails."""
        started = time.perf_counter()
        scratch = Path(args.output_dir) / _SCRATCH
        heaviest = self.trainer.train_dataset.heaviest(args.per_device_train_batch_size)
        self.trainer.in_preflight = True
        try:
            with self._undone(scratch):
                if failure := self._steps(heaviest):
                    self._advise(heaviest, failure)
                self._evaluate()
                size = self._save(scratch)
        finally:
            self.trainer.in_preflight = False
            if args.should_save:
                shutil.rmtree(scratch, ignore_errors=True)
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
    def _undone(self, scratch: Path) -> Iterator[None]:
        """Put weights, optimizer, loss scale and random state back as they were on entering.

        Trainable weights are copied to main memory (4 bytes for each fp32 parameter); DeepSpeed, which holds them in
        parts, writes and reads a checkpoint of its own instead.
        """
        trainer, engine = self.trainer, self.trainer.deepspeed
        randomness, scaler = random_state(), trainer.accelerator.scaler
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
            trainer.accelerator.wait_for_everyone()  # the main process removes what others may still read
        else:
            with torch.no_grad():
                for weight, kept in zip(weights, copies, strict=True):
                    weight.copy_(kept)
            trainer.optimizer.state.clear()
            if self.resumed_from is not None:
                trainer.checkpoints.load_optimizer(Path(self.resumed_from))
        if scaler is not None:
            scaler.load_state_dict(scale)
        trainer.model_wrapped.zero_grad()
        trainer.guard.begin(())
        set_random_state(randomness)

    def _steps(self, heaviest: list[Rows]) -> str | None:
        """Step once, then go forward and backward beside the optimizer's state; returns what memory was short of.

        Processes compute alone, so that one which runs out of memory leaves no other waiting; at last they exchange
        the gradients of a single row. Where the model itself is shared out, every pass is an exchange.
        """
        trainer, shared = self.trainer, self._is_shared()
        if failure := self._forward_backward(heaviest[0], alone=not shared):
            return failure
        self._optimize()
        for rows in heaviest:
            if failure := self._forward_backward(rows, alone=not shared):
                return failure
        if dist.world_size() > 1 and not shared:
            trainer.model_wrapped.zero_grad()
            return self._forward_backward(heaviest[0][-1:], alone=False)
        return None

    def _is_shared(self) -> bool:
        return bool(self.trainer.is_deepspeed_enabled or self.trainer.is_distributed_loading_by_transformers)

    def _forward_backward(self, rows: Rows, *, alone: bool) -> str | None:
        trainer = self.trainer
        batches, count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, trainer.args.device)
        trainer.accelerator.gradient_state._set_sync_gradients(not alone)
        quiet = trainer.accelerator.no_sync(model=trainer.model_wrapped) if alone else contextlib.nullcontext()
        with quiet:
            _, failure = _tried(lambda: trainer.training_step(trainer.model_wrapped, batches[0], count))
        return dist.first_failure(failure)

    def _optimize(self) -> None:
        trainer = self.trainer
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        clipped = trainer._clip_grad_norm(trainer.model_wrapped) if trainer.args.max_grad_norm > 0 else None
        trainer._get_grad_norm(trainer.model_wrapped, grad_norm=clipped)
        trainer.guard.judge(_GATE)
        trainer.optimizer.step()
        trainer.model_wrapped.zero_grad()

    def _advise(self, heaviest: list[Rows], failure: str) -> NoReturn:
        """Try what would save memory, and end the run with what was found."""
        trainer, rows = self.trainer, heaviest[0]
        tokens = _longest(rows)
        found = []
        # Processes that share a model are not in step any more.
        for flag, lighter in [] if self._is_shared() else self._lighter(rows, tokens):
            trainer.model_wrapped.zero_grad()
            trainer.optimizer.state.clear()
            clear_device_cache(garbage_collection=True)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            if lighter is rows:
                trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
            fits = self._steps([lighter]) is None
            if lighter is rows:
                trainer.model.gradient_checkpointing_disable()
            peak = f' (peak {peak_memory_gib()} GiB)' if torch.cuda.is_available() else ''
            found.append(f'{flag}: {"fits" + peak if fits else "does not fit"}')
        raise ConfigError(
            f'the heaviest batch ({len(rows)} rows of up to {tokens} tokens) does not fit into memory: {failure} '
            + (f'Tried just now: {"; ".join(found)}.' if found else 'Lower --batch_size or --max_length.')
            + ' A smaller --batch_size with more --gradient_accumulation_steps trains the same.'
        )

    def _lighter(self, rows: Rows, tokens: int) -> list[tuple[str, Rows]]:
        """Return flags and the rows they leave of a batch; gradient checkpointing leaves the rows themselves."""
        count = len(rows) // 2
        is_text = not any('rows' in row or 'images' in row for row in rows)  # what is cut by its tokens alone
        return [
            *([(f'--batch_size {count}', rows[:count])] if count else []),
            *([('--gradient_checkpointing true', rows)] if not self.trainer.model.is_gradient_checkpointing else []),
            *([(f'--max_length {tokens // 2}', [_last(row, tokens // 2) for row in rows])] if is_text else []),
        ]

    def _evaluate(self) -> None:
        """Evaluate one batch, its answers cut to a few tokens."""
        trainer, rows = self.trainer, self.trainer.eval_dataset
        if rows is None:
            return
        (batch, *_) = rows.heaviest(trainer.args.per_device_eval_batch_size)
        generation, trainer.generation = trainer.generation, copy.copy(trainer.generation)
        trainer.generation.max_new_tokens = min(_NEW_TOKENS, generation.max_new_tokens or _NEW_TOKENS)
        trainer.model_wrapped.eval()
        result, failure = _tried(
            lambda: trainer.prediction_step(trainer.model_wrapped, trainer.data_collator(batch), False)
        )
        trainer.generation = generation
        if failure := dist.first_failure(failure):
            raise ConfigError(
                f'the heaviest validation batch ({len(batch)} rows) does not fit into memory: {failure} '
                'Lower --eval_batch_size or --max_length.'
            )
        assert result is not None, 'no process failed'
        _, found, labels = result
        if not trainer.args.predict_with_generate:
            trainer.guard.judge_evaluation(_GATE, found.tolist(), [row['row'] for row in batch])
        trainer.compute_metrics(EvalPrediction(predictions=found.cpu().numpy(), label_ids=labels.cpu().numpy()))

    def _save(self, scratch: Path) -> int:
        """Write one checkpoint; returns its bytes."""
        trainer, checkpoint = self.trainer, scratch / 'checkpoint-0'
        if failure := trainer.checkpoints.write(checkpoint, resumable=not trainer.args.save_only_model):
            folder = trainer.args.output_dir
            raise ConfigError(f'a checkpoint cannot be written to {folder}: {failure}. Make room, or name another.')
        size = dist.from_all(sum(p.stat().st_size for p in checkpoint.rglob('*')) if dist.is_main() else 0)[0]
        held = trainer.checkpoints.limit + 1 if trainer.checkpoints.limit > 0 else 2
        free = shutil.disk_usage(scratch.parent).free + size
        if free < held * size:
            logger.warning(
                f'{held} checkpoints of {size / 2**30:.1f} GiB are held at once, {free / 2**30:.1f} GiB are free: '
                'make room before the first of them is written.'
            )
        return size


def _tried(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what `work` returns, or what it was short of memory for."""
    try:
        return work(), None
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        return None, (str(error) or type(error).__name__).splitlines()[0]


def _longest(rows: Rows) -> int:
    """Return the tokens of the longest row or pack."""
    return max(sum(len(row['input_ids']) for row in item.get('rows', [item])) for item in rows)


def _last(row: dict[str, Any], count: int) -> dict[str, Any]:
    """Return a row with its last `count` tokens, as --max_length would leave it."""
    spans = {name: row[name] for name in ('trained', 'prompt_length', 'earlier') if name in row}
    return {**row, 'earlier': [], **cut_front(Encoded(input_ids=row['input_ids'], **spans), count).as_item()}

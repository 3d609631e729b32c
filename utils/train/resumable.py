"""A trainer whose checkpoints are whole or absent, hold no pickle, and lead to the same bits as a run never stopped."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from peft import PeftModel
from safetensors import safe_open
from transformers import Seq2SeqTrainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base import dist
from utils.base.checkpoint import (
    OPTIMIZER_STATE,
    PICKLE_SUFFIXES,
    PROCESS_STATES,
    last_checkpoint,
    partial_name,
    rotate,
    seal,
)
from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.base.logger import logger
from utils.data.collator import refill
from utils.model import load_model
from utils.run.record import record_proof
from utils.train.guard import Guard
from utils.train.state import load_tree, random_state, save_tree, set_random_state
from utils.train.stop import StopSignals, ignore_signals
from utils.train.trainer_args import make_schedule

# What flags say of a group of weights; the rate of the step is made from the first.
_TYPED_SETTINGS = ('initial_lr', 'weight_decay')


class EvaluationCutError(Exception):
    """An evaluation given up because the run is to stop; it is made up for on resuming."""


def together(work: Callable[[], object]) -> str | None:
    """Do `work` on every process; returns the first failure of any, None where all succeeded."""
    failure = None
    try:
        work()
    except Exception as error:  # a full disk shows as many kinds, one for each library that writes
        failure = f'{type(error).__name__}: {error}'
    return dist.first_failure(failure)


def use_settings(optimizer: Any, schedule: Any, settings: Sequence[dict[str, float]]) -> None:
    """Put settings into an optimizer's groups and its schedule, and the learning rate of the coming step with them."""
    schedule.base_lrs = [setting['initial_lr'] for setting in settings]
    rates = [
        base * share(schedule.last_epoch) for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, setting, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(setting, lr=rate)
    schedule._last_lr = rates


def check_targets(model: PeftModel, checkpoint: Path) -> None:
    """Raise ConfigError where the adapter of a checkpoint is on other layers than that of the model."""
    stored = read_json(checkpoint / 'adapter_config.json', remedy='Give another checkpoint of the run.')
    config = model.peft_config['default'].to_dict()
    has, wants = (
        sorted({*(one.get('target_modules') or ()), *(one.get('target_parameters') or ())}) for one in (stored, config)
    )
    if has != wants:
        raise ConfigError(
            f'--lora_target_modules {",".join(wants)}: the adapter in {checkpoint} is on {",".join(has)}. '
            f'Type --lora_target_modules {",".join(has)}, or start a new run: leave --resume_from_checkpoint out.'
        )


class ResumableTrainer(Seq2SeqTrainer):
    """Saving, loading and stopping; what is trained and how is said by the subclass."""

    def __init__(self, *, save_total_limit: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_total_limit = save_total_limit
        self.signals = StopSignals()
        self.guard = Guard(self)
        self.stop_agreed = False
        self.evaluation_pending = False
        # Tokens up to which the micro-batches of a step are joined; None: they stay as they are.
        self.capacity: int | None = None
        self.add_callback(self.guard)
        self.add_callback(_Stop(self))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of one step, joined where that fits, known to the guard."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.capacity is not None and len(batches) > 1:
            batches = refill(batches, self.capacity)
        self.guard.begin([batch for batch in batches if batch])
        return batches, count

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss of one micro-batch, known to the guard; one whose rows went to others costs nothing."""
        if not inputs:
            return torch.zeros((), device=self.args.device)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.guard.losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.guard.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.guard.norm

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
        return loader

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning-rate schedule; DeepSpeed asks for it with an optimizer of its own."""
        scheduler: Any = self.lr_scheduler  # type: ignore[has-type]
        if scheduler is None:
            scheduler = make_schedule(
                optimizer or self.optimizer,
                self.args.lr_scheduler_type,
                learning_rate=self.args.learning_rate,
                warmup_ratio=self.args.warmup_steps,
                steps=num_training_steps,
            )
            self.lr_scheduler = scheduler
            self._created_lr_scheduler = True
        return scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint and delete the ones that are too many; ends the run where it could not be written."""
        self.store_flos()
        run_dir = Path(self.args.output_dir)
        checkpoint = run_dir / f'checkpoint-{self.state.global_step}'
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
        if failure := self.write_checkpoint(checkpoint, resumable=not self.args.save_only_model):
            last = last_checkpoint(run_dir)
            gib = shutil.disk_usage(run_dir).free / 2**30
            raise ConfigError(
                f'{checkpoint} could not be written: {failure}. Nothing older was touched: the last complete '
                f'checkpoint is {last or "none yet"}. {gib:.1f} GiB are free there. Make room'
                + (f', then go on with --resume_from_checkpoint {last}' if last else ' and start again.')
            )
        if self.args.should_save:
            pickles = [str(p.relative_to(checkpoint)) for p in checkpoint.rglob('*') if p.suffix in PICKLE_SUFFIXES]
            says = f'{checkpoint.name} got its name once it was whole on the disk, with the sha256 of each of its files'
            outcome = {'passed': True, 'says': says, 'pickled_by_deepspeed': sorted(pickles)}
            record_proof(run_dir, 'checkpoints', outcome)
            rotate(run_dir, limit=self.save_total_limit, best=self.state.best_model_checkpoint)

    def write_checkpoint(self, checkpoint: Path, *, resumable: bool) -> str | None:
        """Write a checkpoint aside and give it its name once it is on the disk; returns what failed, or None."""
        partial = partial_name(checkpoint)
        states = dist.from_all(self._process_state())  # before anything can fail on one process alone

        def make_folder() -> None:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def fill() -> None:
            self.save_model(str(partial), _internal_call=True)
            if resumable:
                self._save_optimizer_and_scheduler(str(partial))
            if self.args.should_save:
                if resumable:
                    save_tree(partial / PROCESS_STATES, states)
                self.state.save_to_json(str(partial / 'trainer_state.json'))

        def finish() -> None:
            if self.args.should_save:
                seal(partial, checkpoint)

        failure = together(make_folder) or together(fill) or together(finish)
        if failure and self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        return failure

    def _process_state(self) -> dict[str, Any]:
        """Return what differs between processes, and what of the loop itself a resumed run has to know."""
        return {
            'random': random_state(),
            'loss_not_logged': self._tr_loss.item(),
            'last_logged_step': self._globalstep_last_logged,
            'evaluation_pending': self.evaluation_pending,
            'guard': self.guard.state(),
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write optimizer, schedule and loss scale; what DeepSpeed keeps goes into DeepSpeed's own files."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=isinstance(self.model, PeftModel))
        if self.args.should_save:
            scaler = self.accelerator.scaler
            tree = {
                'optimizer': None if self.is_deepspeed_enabled else self.optimizer.state_dict(),
                'scheduler': None if self._deepspeed_schedules() else self.lr_scheduler.state_dict(),
                'scaler': scaler.state_dict() if scaler is not None else None,
            }
            save_tree(Path(output_dir) / OPTIMIZER_STATE, tree)

    def _deepspeed_schedules(self) -> bool:
        return isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put the weights of a checkpoint into the model.

        A class may be saved in another layout than it is held in (a mixture's experts one by one): read by name, as
        transformers' trainer does, such weights would be passed over and stay those of the base model.
        """
        if isinstance(self.model, PeftModel):
            check_targets(self.model, Path(resume_from_checkpoint))
        names: set[str] = set()
        for file in Path(resume_from_checkpoint).glob('model*.safetensors'):
            names.update(safe_open(file, framework='pt').keys())
        held = self.model.state_dict() if names else {}
        found = {tensor.data_ptr() for name, tensor in held.items() if name in names}  # tied weights have one name
        if all(tensor.data_ptr() in found for tensor in held.values()):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            opened = load_model(Path(resume_from_checkpoint), torch_dtype=self.model.dtype)
            self.model.load_state_dict(opened.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Put optimizer, schedule and loss scale back; DeepSpeed has loaded what it keeps by itself.

        The settings of the optimizer stay those of this command line: what is typed anew counts from here on.
        """
        if checkpoint is None:
            return
        tree = load_tree(Path(checkpoint) / OPTIMIZER_STATE)
        settings = [{name: group[name] for name in _TYPED_SETTINGS} for group in self.optimizer.param_groups]
        if not self.is_deepspeed_enabled:
            self.optimizer.load_state_dict(tree['optimizer'])
        if not self._deepspeed_schedules():
            self.lr_scheduler.load_state_dict(tree['scheduler'])
        if not self.is_deepspeed_enabled:
            use_settings(self.optimizer, self.lr_scheduler, settings)
        if tree['scaler'] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(tree['scaler'])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: the loss scale stands with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put this process back to where the checkpoint left it; makes up for an evaluation that was cut off."""
        if checkpoint is None:
            return
        states = load_tree(Path(checkpoint) / PROCESS_STATES)
        if len(states) != dist.world_size():
            logger.warning(
                f'{checkpoint} was written by {len(states)} processes, here are {dist.world_size()}: '
                'the result will differ from an uninterrupted run.'
            )
        state = states[min(dist.rank(), len(states) - 1)]
        set_random_state(state['random'])
        self.guard.restore(state['guard'])
        self._tr_loss = torch.tensor(state['loss_not_logged'], device=self.args.device)
        self._globalstep_last_logged = state['last_logged_step']
        if state['evaluation_pending']:
            self.evaluation_pending = True
            metrics = self._evaluate(None, None)
            self.evaluation_pending = False
            is_saved = self.state.global_step % self.args.save_steps == 0
            if is_saved and Seq2SeqTrainer._determine_best_metric(self, metrics, None):
                self.state.best_model_checkpoint = checkpoint

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.signals:
            return super()._inner_training_loop(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        if self.args.should_save and self.save_total_limit == 1 and not self.stopped:
            rotate(Path(self.args.output_dir), limit=1, best=self.state.best_model_checkpoint, keep_last=False)
        return output

    @property
    def stopped(self) -> bool:
        """Return whether a signal ended the training before its last step."""
        return bool(self.stop_agreed and self.state.global_step < self.state.max_steps)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the metrics; cut off by a signal, none, and the state is that before the evaluation."""
        before = random_state()
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        except EvaluationCutError:
            set_random_state(before)
            self.evaluation_pending = True
            self.control.should_save = self.control.should_training_stop = True
            return {}
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Only a step that is saved can be kept as the best one.
        return bool(metrics and self.control.should_save and super()._determine_best_metric(metrics, trial))


class _Stop(TrainerCallback):
    """Ends the run at the step at which all processes know of a signal; cuts an evaluation off."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to go on with a run that has ended: the loop would train one step more."""
        if state.global_step >= state.max_steps:
            raise ConfigError(
                f'the checkpoint to resume from is of step {state.global_step} and this run ends at step '
                f'{state.max_steps}: nothing is left to train. Raise --max_steps or --num_train_epochs.'
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end; an evaluation that is due is left to the resumed run."""
        trainer = self.trainer
        if trainer.stop_agreed and state.global_step < state.max_steps:
            trainer.evaluation_pending = control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give an evaluation up once a process was told to stop; one that is made up for, and the last, is finished."""
        trainer = self.trainer
        if trainer.evaluation_pending or state.global_step >= state.max_steps:
            return
        trainer.stop_agreed = dist.sums([trainer.signals.signum])[0] > 0
        if trainer.stop_agreed:
            raise EvaluationCutError


def _start_worker(then: Callable[[int], None] | None, worker_id: int) -> None:
    ignore_signals()
    if then is not None:
        then(worker_id)

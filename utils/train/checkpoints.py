"""Write checkpoints and resume from them.

A checkpoint is either complete or does not exist. It contains no pickle, except the files that DeepSpeed writes. With
the same number of processes and the same kind of device, a resumed run continues with the bitwise same state.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from peft import PeftModel
from safetensors import safe_open

from utils.base import device, dist
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
from utils.base.logger import logger
from utils.loading.folder import read_adapter_config
from utils.loading.gguf import model_directory
from utils.loading.tokenizer_files import save_tokenizer
from utils.loading.unloaded import UNLOADED_FILE, unloaded_tensors, write_unloaded
from utils.model import get_model_info, load_model
from utils.run.record import record_proof
from utils.train.state import load_tree, random_state, save_tree, set_random_state

if TYPE_CHECKING:
    from utils.loading.image_processors import Images
    from utils.loading.tensor_ranges import TensorRange
    from utils.run.folder import Run
    from utils.train.trainer import SftTrainer

# The settings of an optimizer's parameter group that come from flags. `initial_lr` is --learning_rate, from which the
# learning rate of each step is computed. Only some optimizers have `betas` and `eps`.
_FLAG_SETTINGS = ('initial_lr', 'weight_decay', 'betas', 'eps')


def first_failure_of(work: Callable[[], object]) -> str | None:
    """Call `work` on every process. All processes return the message of the first failure, or None if none failed."""
    failure = None
    try:
        work()
    except Exception as error:  # for a full disk, each library raises a different error
        failure = f'{type(error).__name__}: {error}'
    return dist.first_failure(failure)


def use_settings(optimizer: Any, schedule: Any, settings: Sequence[dict[str, Any]]) -> None:
    """Change the settings of an optimizer and its schedule to `settings`, which come from the flags.

    `settings` has one dict for each parameter group. The learning rate of the next step is computed from `settings`.
    """
    schedule.base_lrs = [setting['initial_lr'] for setting in settings]
    rates = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, setting, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(setting, lr=rate)
    schedule._last_lr = rates


def check_targets(model: PeftModel, checkpoint: Path) -> None:
    """Raise ConfigError if the adapter of a checkpoint and the adapter of the model are on different layers.

    The layers of which the adapters have full weights (--lora_modules_to_save) must be the same too.
    """
    stored = read_adapter_config(checkpoint, remedy='Use another checkpoint of the run.')
    found = _targets(stored)
    wanted = _targets(model.peft_config['default'].to_dict())
    if found != wanted:
        raise ConfigError(
            f'--lora_target_modules {",".join(wanted)}: the adapter in {checkpoint} is on {",".join(found)}. '
            f'Use --lora_target_modules {",".join(found)}, or remove --resume_from_checkpoint to start a new run.'
        )

    saved = [sorted(config.get('modules_to_save') or ()) for config in (model.peft_config['default'].to_dict(), stored)]
    if saved[0] != saved[1]:
        then, now = (' '.join(names) or 'no layer' for names in reversed(saved))
        raise ConfigError(
            f'--lora_modules_to_save: {checkpoint} was trained with {then}, and this run has {now}. Use the value of '
            'that run, or remove --resume_from_checkpoint to start a new run.'
        )


def _targets(adapter_config: dict[str, Any]) -> list[str]:
    """Return the sorted names of all modules and parameters to which an adapter is added."""
    modules = adapter_config.get('target_modules') or ()
    if isinstance(modules, str):  # a pattern
        modules = (modules,)
    parameters = adapter_config.get('target_parameters') or ()
    return sorted({*modules, *parameters})


class Checkpoints:
    """Writes the checkpoints of a trainer, and restores the trainer from a checkpoint."""

    def __init__(self, trainer: SftTrainer, *, run: Run, images: Images | None, limit: int) -> None:
        self.trainer = trainer
        # The Run is stored and not its record, because the record may be replaced until the training starts.
        self.run = run
        self.images = images
        # This many checkpoints are kept (--save_total_limit), or all if it is 0 or below. The best and the last
        # checkpoint are always kept while the run trains.
        self.limit = limit
        # The tensors of the base that its class does not load. None before the first checkpoint.
        self._unloaded: dict[str, TensorRange] | None = None

    def save(self) -> None:
        """Write the checkpoint of this step. If there are more checkpoints than the limit, delete old checkpoints.

        The best checkpoint is never deleted. Raises ConfigError if the checkpoint cannot be written. The message names
        the last complete checkpoint.
        """
        trainer = self.trainer
        trainer.store_flos()
        run_dir = Path(trainer.args.output_dir)
        checkpoint = run_dir / f'checkpoint-{trainer.state.global_step}'
        if trainer.state.best_global_step == trainer.state.global_step:
            trainer.state.best_model_checkpoint = str(checkpoint)

        if failure := self.write(checkpoint, resumable=not trainer.args.save_only_model):
            last = last_checkpoint(run_dir)
            gib = shutil.disk_usage(run_dir).free / 2**30
            if last:
                state = f'No older checkpoint was changed. The last complete checkpoint of this run is {last}.'
                remedy = f'use --resume_from_checkpoint {last}'
            else:
                state = 'This run has no complete checkpoint yet.'
                remedy = 'start again.'
            raise ConfigError(
                f'{checkpoint} could not be written: {failure}. {state} The disk has {gib:.1f} GiB free. If this is '
                f'too little, delete files. Then {remedy}'
            )

        if trainer.args.should_save:
            pickles = [str(p.relative_to(checkpoint)) for p in checkpoint.rglob('*') if p.suffix in PICKLE_SUFFIXES]
            says = (
                f'{checkpoint.name} was renamed into place once it was complete on disk, with the sha256 of its files'
            )
            outcome = {'passed': True, 'says': says, 'pickled_by_deepspeed': sorted(pickles)}
            record_proof(run_dir, 'checkpoints', outcome)
            rotate(run_dir, limit=self.limit, best=trainer.state.best_model_checkpoint)

    def keep_only_best(self) -> None:
        """With --save_total_limit 1, delete the last checkpoint if an earlier checkpoint is the best one.

        Call this after training. Does nothing if a signal stopped the training, because a resumed run needs the last
        checkpoint.
        """
        trainer = self.trainer
        if trainer.args.should_save and self.limit == 1 and not trainer.stopped:
            best = trainer.state.best_model_checkpoint
            rotate(Path(trainer.args.output_dir), limit=1, best=best, keep_last=False)

    def write(self, checkpoint: Path, *, resumable: bool) -> str | None:
        """Write a checkpoint to a temporary folder, and rename the folder when it is complete.

        With `resumable`, the states of optimizer, schedule and processes are written too, so that a run can resume.
        Returns the message of the first failure, or None if no process failed.
        """
        trainer = self.trainer
        partial = partial_name(checkpoint)
        # Collecting the states is a collective operation. It comes first, because the other processes would wait
        # forever for a process that failed before it.
        states = dist.from_all(self._process_state())

        def make_folder() -> None:
            if trainer.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def fill() -> None:
            trainer.save_model(str(partial), _internal_call=True)
            if resumable:
                self._write_optimizer(partial)
            if trainer.args.should_save:
                if resumable:
                    save_tree(partial / PROCESS_STATES, states)
                trainer.state.save_to_json(str(partial / 'trainer_state.json'))

        def finish() -> None:
            if trainer.args.should_save:
                seal(partial, checkpoint)

        failure = first_failure_of(make_folder) or first_failure_of(fill) or first_failure_of(finish)
        if failure and trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        return failure

    def write_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Write weights, tokenizer, image processor and sft_args.json to the folder. No file is a pickle.

        With sharded weights, every process writes its part. Otherwise only the main process writes.
        """
        trainer = self.trainer
        if not trainer.args.should_save and not trainer.is_distributed_loading_by_transformers:
            return  # only with sharded weights all processes continue here, because each has a part of the weights

        folder.mkdir(parents=True, exist_ok=True)
        # save_embedding_layers='auto' would ask a hub for the original vocabulary size, which never changes here.
        extra = {'save_embedding_layers': False} if hasattr(trainer.model, 'peft_config') else {}
        trainer.model.save_pretrained(folder, state_dict=state_dict, is_main_process=trainer.args.should_save, **extra)
        if not trainer.args.should_save:
            return

        if self.images is not None:
            self.images.save(folder)
        save_tokenizer(trainer.processing_class, folder)
        if not isinstance(trainer.model, PeftModel):
            self._write_unloaded(folder)
        self.run.record.write(folder)

    def _write_unloaded(self, folder: Path) -> None:
        """Write UNLOADED_FILE in the folder: the tensors of the base that the class of the model does not load.

        Writes nothing if there are no such tensors.
        """
        if self._unloaded is None:
            flags = self.run.record.flags
            names = flags.get('model_type'), flags.get('model_id_or_path')
            family = get_model_info(*names).family if any(names) else None
            base = model_directory(self.run.weights.path)
            self._unloaded = unloaded_tensors(self.trainer.model, base, family)
            if self._unloaded:
                logger.info(
                    f'{type(self.trainer.model).__name__} does not load {len(self._unloaded)} tensors of the base, for '
                    f'example {min(self._unloaded)}. They are kept in {UNLOADED_FILE}'
                )
        write_unloaded(self._unloaded, folder)

    def _write_optimizer(self, folder: Path) -> None:
        """Write the states of optimizer, schedule and loss scale.

        With DeepSpeed, some of these states are written to DeepSpeed's own files.
        """
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            is_adapter = isinstance(trainer.model, PeftModel)
            trainer.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=is_adapter)
        if trainer.args.should_save:
            scaler = trainer.accelerator.scaler
            tree = {
                'optimizer': None if trainer.is_deepspeed_enabled else trainer.optimizer.state_dict(),
                'scheduler': None if self._deepspeed_has_schedule() else trainer.lr_scheduler.state_dict(),
                'scaler': scaler.state_dict() if scaler is not None else None,
            }
            if trainer.capacity is not None:
                tree['joined'] = {'device': device.kind(), 'tokens': trainer.capacity}
            if trainer.timetable.segments:
                tree['timetable'] = trainer.timetable.state()
            save_tree(folder / OPTIMIZER_STATE, tree)

    def _deepspeed_has_schedule(self) -> bool:
        return isinstance(self.trainer.lr_scheduler, DeepSpeedSchedulerWrapper)

    def _process_state(self) -> dict[str, Any]:
        """Return the state of this process for a checkpoint, as a dict that `load_process` restores."""
        trainer = self.trainer
        return {
            'random': random_state(),
            'loss_not_logged': trainer._tr_loss.item(),
            'last_logged_step': trainer._globalstep_last_logged,
            'evaluation_pending': trainer.evaluation_pending,
            'guard': trainer.guard.state(),
            **({'early_stop': trainer.early_stop.state()} if trainer.early_stop is not None else {}),
        }

    def load_model(self, checkpoint: Path) -> bool:
        """Load the weights of a checkpoint if transformers' trainer cannot load them. Return whether they were loaded.

        transformers' trainer loads weights by name. Some classes save weights in a different layout than in memory, for
        example each expert as a separate tensor. The trainer would ignore such tensors and keep the base model's
        weights, so they are loaded here. Raises ConfigError if the adapter of the checkpoint is on other layers.
        """
        model = self.trainer.model
        if isinstance(model, PeftModel):
            check_targets(model, checkpoint)

        names: set[str] = set()
        for file in checkpoint.glob('model*.safetensors'):
            names.update(safe_open(file, framework='pt').keys())
        in_memory = model.state_dict() if names else {}
        # Weights are compared by address, because tied weights have several names but are saved under one name.
        found = {tensor.data_ptr() for name, tensor in in_memory.items() if name in names}
        if all(tensor.data_ptr() in found for tensor in in_memory.values()):
            return False

        model.load_state_dict(load_model(checkpoint, torch_dtype=model.dtype).state_dict())
        return True

    def load_optimizer(self, checkpoint: Path) -> None:
        """Restore the states of optimizer, schedule and loss scale, except those that DeepSpeed has restored itself.

        Without DeepSpeed, learning rate, weight decay, betas and epsilon come from the flags of this run, not from the
        checkpoint.

        Also restores the timetable of --max_minutes.

        Also restores `trainer.capacity`, the number of tokens up to which the micro-batches of a step are joined into
        larger ones. This is done only outside of the first-step trial, if the kind of device has not changed, and if
        both the earlier run and this run join micro-batches.
        """
        trainer = self.trainer
        tree = load_tree(checkpoint / OPTIMIZER_STATE)
        settings = [
            {name: group[name] for name in _FLAG_SETTINGS if name in group} for group in trainer.optimizer.param_groups
        ]
        if not trainer.is_deepspeed_enabled:
            trainer.optimizer.load_state_dict(tree['optimizer'])
        if not self._deepspeed_has_schedule():
            trainer.lr_scheduler.load_state_dict(tree['scheduler'])
        trainer.deadline.restore(tree.get('timetable'))
        # If micro-batches were joined differently, gradients of the same rows would be the same only up to rounding.
        joined = tree.get('joined')
        is_joined = joined is not None and trainer.capacity is not None and joined['device'] == device.kind()
        # The first-step trial loads the state again. It may have found that so many tokens do not fit into memory here.
        if is_joined and not trainer.in_preflight:
            trainer.capacity = joined['tokens']
        if not trainer.is_deepspeed_enabled:
            use_settings(trainer.optimizer, trainer.lr_scheduler, settings)
        if tree['scaler'] is not None and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(tree['scaler'])

    def load_process(self, checkpoint: Path) -> None:
        """Restore the state of this process: random generators, guard, logging and early stop.

        Also restores `evaluation_pending`, which says whether the evaluation of this step still has to be done. Logs a
        warning if the number of processes or the kind of device has changed. Raises ConfigError if --early_stop allows
        no further step.
        """
        trainer = self.trainer
        states = load_tree(checkpoint / PROCESS_STATES)
        if len(states) != dist.world_size():
            logger.warning(
                f'{checkpoint} was written by {len(states)} processes, and this run has {dist.world_size()}: '
                'the result will differ from an uninterrupted run.'
            )

        state = states[min(dist.rank(), len(states) - 1)]
        had = state['random'].get('device')
        if had not in (None, device.kind()):
            logger.warning(
                f'{checkpoint} was written on {had}, and this run uses {device.kind()}: the result will differ from an '
                'uninterrupted run.'
            )
        set_random_state(state['random'])
        trainer.guard.restore(state['guard'])
        trainer._tr_loss = torch.tensor(state['loss_not_logged'], device=trainer.args.device)
        trainer._globalstep_last_logged = state['last_logged_step']
        trainer.evaluation_pending = state['evaluation_pending']
        if trainer.early_stop is not None and 'early_stop' in state:
            trainer.early_stop.restore(state['early_stop'])

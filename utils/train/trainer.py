"""A subclass of transformers' trainer with its own training step, evaluation and checkpoints."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderShard, SeedableRandomSampler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler
from transformers import PrinterCallback, Seq2SeqTrainer

from utils.base import dist
from utils.base.files import write_json
from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.data.collator import NOT_FOR_THE_MODEL, Collator, on_device, refill, split_rows
from utils.data.encode_plan import PreparedData
from utils.data.encoded_rows import EncodedRows, Filled, IndexedRows, TrainRows
from utils.data.packing import PackedRows, StepSampler
from utils.data.stream import TrainingStream
from utils.encode.encoded import IGNORE_INDEX
from utils.encode.encoder import Encoder
from utils.fast.layout import exact_head, use_padding_free
from utils.fast.scoring import Scorer
from utils.infer.generation import generate_batch, generation_config
from utils.infer.scores import Scores
from utils.loading.image_processors import Images
from utils.loading.layers import is_sharded, trains_towers
from utils.run.folder import Run
from utils.train.bf16_adamw import BF16AdamW
from utils.train.callbacks import (
    EarlyStop,
    EndedEarlyError,
    EpochOrder,
    EvaluateAtEnd,
    EvaluationCutError,
    LogLines,
    Speedometer,
    StepIntervals,
    StopCallback,
)
from utils.train.checkpoints import Checkpoints
from utils.train.deadline import Deadline
from utils.train.drift import Drift
from utils.train.guard import Guard, check_positions
from utils.train.metrics import GenerationMetrics, Metrics, ValidationSets, loss_metrics
from utils.train.overrides import overrides
from utils.train.state import random_state, set_random_state
from utils.train.stop import StopSignals, with_workers_ignoring_signals
from utils.train.timetable import Timetable
from utils.train.trackers import add_trackers
from utils.train.trainer_args import dummy_optimizer, make_schedule, training_arguments

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import GenerationConfig, TrainingArguments

    from utils.formats.conversation import Row

# The model inputs of a batch without images. Images add further inputs.
_TEXT_INPUTS = ('input_ids', 'attention_mask', 'position_ids')


class SftTrainer(Seq2SeqTrainer):
    """A trainer whose loss is the mean over all trained tokens of a step, for padded and concatenated batches.

    In each step, the base class calls get_batch_samples, then training_step and compute_loss for each micro-batch, then
    _get_grad_norm, then the optimizer. Each method that replaces a method of the base class has the decorator
    @overrides, which checks that the parameters of both methods are the same.
    """

    # Declared here, because the library declares no type for it.
    train_dataset: TrainRows

    def __init__(
        self,
        *,
        run: Run,
        save_total_limit: int,
        generation: GenerationConfig,
        scorer: Scorer,
        groups_by_length: bool,
        images: Images | None = None,
        early_stop: int = 0,
        drift: bool = False,
        optimizer_of: tuple[type[BF16AdamW], dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.optimizer_cls_and_kwargs = optimizer_of
        self.scorer = scorer
        self.groups_by_length = groups_by_length
        self.images = images
        self.generation = generation
        self.checkpoints = Checkpoints(self, run=run, images=images, limit=save_total_limit)
        self.signals = StopSignals()
        self.timetable = Timetable()
        self.deadline = Deadline(self)
        self.guard = Guard(self)
        self.speedometer = Speedometer()
        self.in_preflight = False
        self.preflight_seconds: float | None = None
        # The number of parameters outside the embeddings. Counting visits every module, so it is done once.
        self._parameters: int | None = None
        self.order: StepSampler | None = None
        # Micro-batches of one step are joined into batches of up to this many tokens. If None, they are not joined.
        self.capacity: int | None = None
        # stop_agreed: all processes know that a process got a signal to stop. evaluation_pending: an evaluation was
        # left out or ended early because of the signal, and the resumed run has to do it.
        self.stop_agreed = False
        self.evaluation_pending = False
        # With True the base class counts the trained tokens of a step (num_items_in_batch) for any model. compute_loss
        # divides by this number.
        self.model_accepts_loss_kwargs = True
        self.drift = Drift(self) if drift else None
        # The result of the last evaluation by loss: summed loss, hits and trained tokens of each validation row.
        self.last_sums: Any = None
        self.early_stop = EarlyStop(early_stop) if early_stop else None
        # The deadline may end the run earlier, so it comes before the callbacks that look for the last step.
        callbacks = (self.guard, self.deadline, StopCallback(self), EpochOrder(self), self.speedometer, EvaluateAtEnd())
        for callback in callbacks:
            self.add_callback(callback)
        if self.early_stop is not None:
            self.add_callback(self.early_stop)

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the training before its last step."""
        return bool(self.stop_agreed and self.state.global_step < self.state.max_steps)

    @overrides(Seq2SeqTrainer)
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train until the last step, --early_stop or a stop signal, and return the output of the base class.

        With --save_total_limit 1, one checkpoint remains unless a signal stopped the training: the best one, or the
        last one if there were no evaluations.
        """
        with self.signals:
            output = super().train(*args, **kwargs)
        self.checkpoints.keep_only_best()
        return output

    @overrides(Seq2SeqTrainer)
    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """Return the output of the base class. `num_train_samples` is the planned number of rows.

        If --max_minutes ended the run early, the base class gets a number that is reduced in proportion to the steps.
        """
        asked = max(self.deadline.asked, 1)
        return super()._finalize_training(trial, num_train_samples * self.state.max_steps / asked, start_time)

    @overrides(Seq2SeqTrainer)
    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of accelerate. They let DDP exchange the gradients without copying them."""
        args: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        for handler in args['kwargs_handlers']:
            handler.gradient_as_bucket_view = True
        return args

    @overrides(Seq2SeqTrainer)
    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base class returns: the wrapped model and the data loader.

        Also make zero_grad faster, except with DeepSpeed.
        """
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if not self.is_deepspeed_enabled:
            clear_only_trained(model)
        return model, loader

    # A step

    @overrides(Seq2SeqTrainer)
    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of training batches.

        A streamed data set divides its rows between processes itself. For it, the method of the base class is not
        called, because accelerate would divide the rows a second time.
        """
        if isinstance(self.train_dataset, TrainingStream):
            return DataLoader(self.train_dataset, batch_size=self._train_batch_size, collate_fn=self.data_collator)
        return with_workers_ignoring_signals(_leaving_on_cpu(super().get_train_dataloader()))

    @overrides(Seq2SeqTrainer)
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the sampler of rows. With --group_by_length the sampler sorts the rows within each step by length.

        With --group_by_length, the sampler is also stored in `self.order`. If the micro-batches of a step can be joined
        into larger ones, `self.capacity` is set to the maximum number of tokens of a joined micro-batch.
        """
        order = super()._get_train_sampler(train_dataset)
        if not self.groups_by_length or not isinstance(order, RandomSampler):
            return order

        args = self.args
        seeded = SeedableRandomSampler(self.train_dataset, data_seed=args.data_seed)
        self.order = StepSampler(
            seeded,
            self.train_dataset.lengths(),
            batch=args.train_batch_size,
            batches=args.gradient_accumulation_steps * args.world_size,
            pads=self.data_collator.pads,
        )
        is_sharded = self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers
        if not self.data_collator.pads and self.scorer.head is not None and not is_sharded:
            # The capacity is the number of tokens in the batch of the longest rows. The first-step gate tries this
            # batch, so joined batches need no more memory than the gate.
            self.capacity = sum(heapq.nlargest(args.train_batch_size, self.order.lengths))
        return self.order

    def typical_batches(self, offset: int) -> list[list[dict[str, Any]]]:
        """Return lists of training rows for a trial: the batches that one process computes in one step.

        The rows are at equal distances in the training set, from row `offset` on. For a stream, they are its first
        rows, and `offset` is not used.
        """
        size = self.args.per_device_train_batch_size
        batches = self.args.gradient_accumulation_steps
        count = size * batches
        if isinstance(self.train_dataset, TrainingStream):
            first = self.train_dataset.first(count)
            rows = [first[i % len(first)] for i in range(count)]
        else:
            known: Any = self.train_dataset
            indices = [(i * len(known) // count + offset) % len(known) for i in range(count)]
            order = self.order
            if order is not None:
                indices = list(StepSampler(indices, order.lengths, batch=size, batches=batches, pads=order.pads))
            rows = [known[index] for index in indices]
        return [rows[start : start + size] for start in range(0, count, size)]

    @overrides(Seq2SeqTrainer)
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train one epoch. If --early_stop ends a resumed run before its first step, only write a checkpoint."""
        try:
            super()._run_epoch(*args, **kwargs)
        except EndedEarlyError:
            self.checkpoints.save()

    @overrides(Seq2SeqTrainer)
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of one step, and the number of their trained tokens.

        If `capacity` is set, the rows are joined to fewer micro-batches of at most `capacity` tokens. The micro-batches
        are also passed to the guard, which names their rows in messages (see Guard).
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.capacity is not None and len(batches) > 1:
            batches = refill(batches, self.capacity)
        self.guard.begin([batch for batch in batches if batch])
        return batches, count

    @overrides(Seq2SeqTrainer)
    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> int:
        """Return the number of trained tokens in the batches of all processes. It is counted on the CPU."""
        return round(dist.sums([sum(len(batch['targets']) for batch in batch_samples)])[0])

    @overrides(Seq2SeqTrainer)
    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the batch on the device. It is sent in one copy. With pinned memory, the CPU does not wait."""
        sent = on_device(inputs, self.args.device)
        if not self.is_deepspeed_enabled:
            return sent
        # DeepSpeed takes images in its own dtype.
        return {name: self._prepare_input(x) if x.is_floating_point() else x for name, x in sent.items()}

    @overrides(Seq2SeqTrainer)
    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the loss and the gradients of one micro-batch, and return the loss.

        The loss is also passed to the guard, which checks it (see Guard). Returns 0 for a micro-batch that is empty
        because all its rows were joined to other micro-batches.
        """
        if not inputs:
            return torch.zeros((), device=self.args.device)
        # model.train() takes as long as the kernels of a small batch, because it visits every module.
        if not (model.training and self.model.training and self.scorer.base.training):
            model.train()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        # The loss is divided by the tokens of the whole step, so DeepSpeed must not divide it by the micro-batches.
        self.accelerator.backward(loss, **({'scale_wrt_gas': False} if self.is_deepspeed_enabled else {}))
        found: torch.Tensor = loss.detach()
        self.guard.losses.append(found)
        return found

    @overrides(Seq2SeqTrainer)
    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Return the number of floating-point operations of a micro-batch, as the base class computes it."""
        if not inputs:
            return 0
        if self._parameters is None:
            self._parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs['input_ids'].numel() * self._parameters

    @overrides(Seq2SeqTrainer)
    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """Return the contribution of a micro-batch to the loss of the step.

        It is the summed loss of the micro-batch, divided by the number of trained tokens in the step of all processes.
        It is multiplied by the number of processes, because gradients are averaged over processes.
        """
        self.speedometer.count(inputs)
        assert num_items_in_batch is not None, 'the collator always returns labels'
        # Gradients are averaged over processes, but num_items_in_batch is the sum over processes.
        divisor = num_items_in_batch / self.accelerator.num_processes
        with self.accelerator.autocast():
            loss = self.scorer.loss(model, inputs, divisor)
        # With several GPUs in one process, the loss is on that of the head, and the base class needs it on the first.
        loss = loss.to(self.args.device)
        return (loss, {}) if return_outputs else loss

    @overrides(Seq2SeqTrainer)
    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients, and return their norm before clipping. BF16AdamW clips later, in its method `step`."""
        inner = self.optimizer.optimizer  # inside the wrapper of accelerate
        if isinstance(inner, BF16AdamW):
            return inner.clip(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    @overrides(Seq2SeqTrainer)
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients, and pass it to the guard, which checks it (see Guard)."""
        self.guard.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.guard.norm

    @overrides(Seq2SeqTrainer)
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as the control says. If anything is to be done, the guard checks the step first."""
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.guard.settle()
            self.speedometer.add_wait()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    @overrides(Seq2SeqTrainer)
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning-rate schedule. The first call makes it for `optimizer` or the trainer's optimizer."""
        scheduler: Any = self.lr_scheduler  # type: ignore[has-type]
        if scheduler is None:

            def made_for(steps: int, optimizer: Any) -> LambdaLR:
                return make_schedule(
                    optimizer,
                    self.args.lr_scheduler_type,
                    learning_rate=self.args.learning_rate,
                    warmup=self.args.warmup_steps,
                    steps=steps,
                    **self.args.lr_scheduler_kwargs,
                )

            scheduler = made_for(num_training_steps, optimizer or self.optimizer)
            self.timetable.follow(scheduler, lambda steps: made_for(steps, dummy_optimizer(self.args.learning_rate)))
            self.lr_scheduler = scheduler
            self._created_lr_scheduler = True
        return scheduler

    # An evaluation

    @overrides(Seq2SeqTrainer)
    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the loader of evaluation batches. Its workers ignore signals."""
        return with_workers_ignoring_signals(_leaving_on_cpu(super().get_eval_dataloader(eval_dataset)))

    @overrides(Seq2SeqTrainer)
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and return the metrics by name. If a signal ends the evaluation early, return {}.

        In this case the random state from before the evaluation is restored, and a checkpoint and the end of training
        are requested. Raises ConfigError if the loss of a row is not finite.
        """
        before = random_state()
        try:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        except EvaluationCutError:
            set_random_state(before)
            self.evaluation_pending = True
            # Otherwise the base class would evaluate once more at the end of the epoch.
            self.control.should_evaluate = False
            self.control.should_save = True
            self.control.should_training_stop = True
            return {}
        return metrics

    @overrides(Seq2SeqTrainer)
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Return the evaluation result of the base class, in which each row is counted exactly once.

        Raises ConfigError if the loss of a row is not finite. With --predict_with_generate, there is no loss to check.
        """
        # accelerate fills up the last batches with repeated rows. gather_for_metrics removes these rows; the function
        # that Seq2SeqTrainer.evaluate sets would keep them.
        self.gather_function = self.accelerator.gather_for_metrics
        output = super().evaluation_loop(*args, **kwargs)
        if not self.args.predict_with_generate:
            self.guard.judge_evaluation(f'step {self.state.global_step}', output.predictions, itertools.count())
            self.last_sums = output.predictions
        if self.drift is not None and output.metrics is not None:
            output.metrics['eval_drift_kl'] = self.drift.measure()
        return output

    def sums_by_row(self, rows: EncodedRows) -> Any:
        """Return (N, 3) for N rows: summed loss, hits (correctly predicted tokens) and trained tokens of each row.

        Raises EvaluationCutError if a stop signal arrives before the last planned step (`max_steps`) is complete.
        """
        self.gather_function = self.accelerator.gather_for_metrics
        loader = self.get_eval_dataloader(rows)
        return super().evaluation_loop(loader, 'rows', prediction_loss_only=False).predictions

    @overrides(Seq2SeqTrainer)
    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **_: Any,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Return (None, predictions, labels) for a batch of B rows. The loss is not needed, so it is None.

        Predictions are (B, 3): summed loss, hits and trained tokens of each row. Labels are the indices of the rows (B,
        1). With --predict_with_generate, predictions are the generated ids, and labels are the index of the row
        followed by the ids of the expected reply.
        """
        # Results of several processes are gathered on their devices.
        device = self.args.device
        sent = self._prepare_inputs(inputs)
        indices = inputs['rows'][:, None]
        if self.args.predict_with_generate:
            answers, labels = self._generated(model, inputs, sent)
            return None, answers.to(device), torch.cat([indices, labels], dim=1).to(device)
        with self.accelerator.autocast():
            sums = self.scorer.by_row(model, sent)
        return None, sums.to(device), indices.to(device)

    def _generated(
        self, model: Any, inputs: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Generate an answer to the prompt of each row. `sent` is the batch `inputs` on the device.

        Returns the generated ids (B, N) and the ids of the expected last replies (B, L), on the CPU. Both are padded
        with IGNORE_INDEX.
        """
        prompts = [
            ids[:length].tolist()
            for ids, length in zip(split_rows(inputs, 'input_ids'), inputs['prompt_lengths'], strict=True)
        ]
        # Weights in fp32 compute in the dtype of the training.
        with self.accelerator.autocast():
            answers = generate_batch(
                self.accelerator.unwrap_model(model),
                prompts,
                self.generation,
                images=self.images,
                pixels={name: x for name, x in sent.items() if name not in (*NOT_FOR_THE_MODEL, *_TEXT_INPUTS)},
            )
        width = max(1, *map(len, answers))  # at least one column, because all answers may be empty
        padded = [ids + [IGNORE_INDEX] * (width - len(ids)) for ids in answers]
        labels = pad_sequence(_last_replies(inputs), batch_first=True, padding_value=IGNORE_INDEX)
        return torch.tensor(padded, dtype=torch.long).view(-1, width), labels

    @overrides(Seq2SeqTrainer)
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return True if the metrics are the best so far and this step saves a checkpoint."""
        return bool(metrics and self.control.should_save and super()._determine_best_metric(metrics, trial))

    # A checkpoint

    @overrides(Seq2SeqTrainer)
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save()

    @overrides(Seq2SeqTrainer)
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the model. The method of the base class would also write the trainer's arguments as a pickle."""
        self.checkpoints.write_model(Path(output_dir or self.args.output_dir), state_dict)

    @overrides(Seq2SeqTrainer)
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.checkpoints.load_model(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @overrides(Seq2SeqTrainer)
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.checkpoints.load_optimizer(Path(checkpoint))

    @overrides(Seq2SeqTrainer)
    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state, the guard and the logging state of this process from a checkpoint.

        If a stop signal had prevented an evaluation or cut it short, the evaluation is done now.
        """
        if checkpoint is None:
            return

        self.checkpoints.load_process(Path(checkpoint))
        if self.evaluation_pending:
            self._finish_cut_evaluation(checkpoint)

    def _finish_cut_evaluation(self, checkpoint: str) -> None:
        """Do the evaluation that a stop signal had prevented or cut short.

        If a checkpoint was due at this step, and `checkpoint` is better than all earlier checkpoints, it becomes the
        best checkpoint. Raises EndedEarlyError if --early_stop ends the run now.
        """
        metrics = self.evaluate()
        self.evaluation_pending = False
        ends = self.early_stop is not None and self.early_stop.reason is not None
        is_saved = self.state.global_step % self.state.save_steps == 0 or ends
        if is_saved and super()._determine_best_metric(metrics, None):
            self.state.best_model_checkpoint = checkpoint
        if ends:
            raise EndedEarlyError


def clear_only_trained(model: torch.nn.Module) -> None:
    """Replace zero_grad of the model by a function that visits only the trained parameters. This saves time.

    Under DDP without find_unused_parameters, the function sets the gradients to zero. In all other cases, it sets them
    to None.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Under DDP, the gradients are views of the buffers that DDP exchanges, and new gradients would need more memory.
    # With find_unused_parameters, an unused parameter must have no gradient.
    keeps = isinstance(model, DistributedDataParallel) and not model.find_unused_parameters

    def zero_grad(set_to_none: bool = True) -> None:
        found = [parameter.grad for parameter in trained if parameter.grad is not None]
        if keeps and found:
            torch._foreach_zero_(found)
        elif not keeps:
            for parameter in trained:
                parameter.grad = None

    model.zero_grad = zero_grad  # type: ignore[method-assign]


def _leaving_on_cpu(loader: Any) -> Any:
    """Make the loader of accelerate return its batches on the CPU, and return the loader.

    On the CPU, batches can be counted and joined without waiting for the device. `_prepare_inputs` later moves the
    batches to the device.
    """
    assert isinstance(loader, DataLoaderShard), 'only this class divides the batches before they are made'
    loader.device = None
    return loader


def _last_replies(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return one tensor for each row in a batch. It contains the last reply, which is all that follows the prompt.

    If the reply carries no loss, the tensor has the token ids of the reply. If the reply carries loss, the tensor has
    the labels of the reply. A token that carries loss has its id as the label. All other tokens have IGNORE_INDEX.
    """
    replies = []
    ids_of_rows = split_rows(inputs, 'input_ids')
    labels_of_rows = split_rows(inputs, 'labels')
    for ids, labels, prompt in zip(ids_of_rows, labels_of_rows, inputs['prompt_lengths'], strict=True):
        trained = labels[prompt:]
        replies.append(trained if (trained != IGNORE_INDEX).any() else ids[prompt:])
    return replies


@dataclass(frozen=True, kw_only=True)
class TrainerSetup:
    """The arguments of `make_trainer` besides the flags, the model and the data."""

    # Checkpoints are written to the folder of this run. Each checkpoint contains the record of the run.
    run: Run
    tokenizer: Any
    dtype: torch.dtype
    generation: GenerationConfig
    images: Images | None = None
    # The scores of generated answers, with --predict_with_generate.
    scores: Scores | None = None
    # The validation rows by origin, for scores that are functions of a file.
    held_out: Mapping[str, Row] = field(default_factory=dict)


def build_trainer(
    args: SftArguments,
    run: Run,
    model: Any,
    encoder: Encoder,
    data: PreparedData,
    *,
    dtype: torch.dtype,
    scores: Scores | None = None,
    held_out: Mapping[str, Row] | None = None,
) -> SftTrainer:
    """Return the trainer of a run.

    The main process passes the log lines to the trackers of --report_to, and writes training_args.json. `scores` are
    for --predict_with_generate. `held_out` is for score functions of the user. It is a dict from the origin of a
    validation row (its file and line) to the row.
    """
    setup = TrainerSetup(
        run=run,
        tokenizer=encoder.tokenizer,
        dtype=dtype,
        generation=generation_config(args, encoder.tokenizer, encoder.stop_ids, model.generation_config),
        images=encoder.images,
        scores=scores,
        held_out=held_out or {},
    )
    trainer = make_trainer(args, model, data, setup)
    if trainer.args.should_save:
        write_json(run.folder / 'training_args.json', trainer.args.to_dict())
        add_trackers(trainer, args, run)
    return trainer


def _arranged(rows: EncodedRows, args: SftArguments, pad_token_id: int) -> IndexedRows:
    """Return the training rows: packed with --packing. With --test_oom_error, the longest rows or packs come first.

    With several processes, rows without loss are added, so that each process has the same number of rows.
    """
    ordered: EncodedRows | PackedRows = rows
    if args.packing:
        packed = PackedRows(rows, args.max_length)
        fill = int(rows.sizes().sum()) / len(packed) / args.max_length
        logger.info(f'packing: {len(rows)} rows in {len(packed)} packs, {fill:.1%} of --max_length filled')
        ordered = packed

    arranged: IndexedRows = ordered.longest_first() if args.test_oom_error else ordered
    if dist.world_size() > 1:
        arranged = Filled(arranged, args.batch_size * dist.world_size(), pad_token_id)
    return arranged


def _optimizer_of_bf16(
    args: SftArguments, training: TrainingArguments
) -> tuple[type[BF16AdamW], dict[str, Any]] | None:
    """Return the class and the settings of the optimizer of bf16 weights.

    Returns None with LoRA, and with --full_weights other than bf16.
    """
    if args.sft_type != 'full' or args.full_weights != 'bf16':
        return None
    settings = {
        'lr': training.learning_rate,
        'betas': (training.adam_beta1, training.adam_beta2),
        'eps': training.adam_epsilon,
        'seed': args.seed,
    }
    return BF16AdamW, settings


def _metrics(setup: TrainerSetup, sets: ValidationSets) -> Metrics:
    if setup.scores is None:
        return loss_metrics(sets)
    return GenerationMetrics(setup.tokenizer, setup.scores, sets, setup.held_out)


def make_trainer(args: SftArguments, model: Any, data: PreparedData, setup: TrainerSetup) -> SftTrainer:
    """Return a trainer that has no trackers. `build_trainer` adds the trackers of --report_to.

    Rows are concatenated if --padding_free and the model allow it, otherwise padded. Raises ConfigError if the model
    has too few positions for the longest row.
    """
    base = model.get_base_model() if args.sft_type == 'lora' else model
    longest = max([*data.train.lengths(), *data.val.lengths()])
    check_positions(base, longest)
    is_concatenated = use_padding_free(base, args, longest=longest, decide=setup.run.decide)
    pad_id = setup.tokenizer.pad_token_id
    train: TrainRows = data.train
    if isinstance(data.train, EncodedRows):
        train = _arranged(data.train, args, pad_id)
    head = exact_head(base, args, setup.run.decide)
    val = data.val.longest_first()
    sets = ValidationSets(rows=val, names=data.val_sets)
    training = training_arguments(
        args,
        setup.run.folder,
        dtype=setup.dtype,
        evaluates=len(data.val) > 0,
        trains_tower=not args.freeze_vision and trains_towers(base),
    )

    trainer = SftTrainer(
        run=setup.run,
        save_total_limit=args.save_total_limit,
        early_stop=args.early_stop if len(data.val) else 0,
        drift=bool(args.drift),
        generation=setup.generation,
        images=setup.images,
        model=model,
        scorer=Scorer(base, head, splits=setup.images is None and not is_sharded(base)),
        groups_by_length=args.group_by_length,
        args=training,
        optimizer_of=_optimizer_of_bf16(args, training),
        train_dataset=train,
        eval_dataset=val if len(val) else None,
        data_collator=Collator(pad_id, setup.images, pads=not is_concatenated),
        processing_class=setup.tokenizer,
        compute_metrics=_metrics(setup, sets),
    )
    trainer.add_callback(StepIntervals(args, setup.run))
    if training.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines())
    return trainer

"""The trainer: the step, the evaluation and the checkpoint, where ours differ from transformers' own."""

from __future__ import annotations

import heapq
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler
from transformers import Seq2SeqTrainer

from utils.base import dist
from utils.base.files import write_json
from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Decide, log_decision
from utils.data.collator import NOT_FOR_THE_MODEL, Collator, refill, split_rows
from utils.data.encode_plan import PreparedData
from utils.data.encoded_rows import Filled
from utils.data.packing import PackedRows, StepSampler
from utils.data.stream import TrainingStream
from utils.encode.encoded import IGNORE_INDEX
from utils.encode.encoder import Encoder
from utils.fast.layout import exact_head, lay_end_to_end
from utils.fast.scoring import Scorer
from utils.infer.generation import generate_batch, generation_config
from utils.loading.image_processors import Images
from utils.loading.layers import is_sharded
from utils.run.folder import Run
from utils.train.callbacks import EpochOrder, EvaluateAtEnd, EvaluationCutError, Speedometer, StopCallback
from utils.train.checkpoints import Checkpoints
from utils.train.guard import Guard, check_positions
from utils.train.metrics import compute_loss_metrics, generation_metrics
from utils.train.overrides import overrides
from utils.train.state import random_state, set_random_state
from utils.train.stop import StopSignals, deaf_to_signals
from utils.train.trainer_args import make_schedule, training_arguments

if TYPE_CHECKING:
    from transformers import GenerationConfig

# The model's inputs that every batch has; images add theirs.
_OF_TEXT = ('input_ids', 'attention_mask', 'position_ids')


class SftTrainer(Seq2SeqTrainer):
    """A trainer whose loss is a mean over the trained tokens of the whole effective batch, whatever its layout.

    A step, in the order in which the base class calls it: get_batch_samples, training_step and compute_loss for each
    micro-batch, _get_grad_norm, the optimizer. Each method of the base class that is replaced is marked with
    @overrides, which compares it with the library's.
    """

    def __init__(
        self,
        *,
        run_record: dict[str, Any],
        save_total_limit: int,
        generation: GenerationConfig,
        scorer: Scorer,
        groups_by_length: bool,
        images: Images | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scorer = scorer
        self.groups_by_length = groups_by_length
        self.images = images
        self.generation = generation
        self.checkpoints = Checkpoints(self, record=run_record, images=images, limit=save_total_limit)
        self.signals = StopSignals()
        self.guard = Guard(self)
        self.speedometer = Speedometer()
        self.in_preflight = False
        self.preflight_seconds: float | None = None
        self.order: StepSampler | None = None
        # Tokens up to which the micro-batches of a step are joined; None: they stay as they are.
        self.capacity: int | None = None
        # Whether all processes know of a signal to stop, and whether an evaluation was given up for it.
        self.stop_agreed = False
        self.evaluation_pending = False
        # The loss below is divided by num_items_in_batch, whatever the model's own forward would accept.
        self.model_accepts_loss_kwargs = True
        for callback in (self.guard, StopCallback(self), EpochOrder(self), self.speedometer, EvaluateAtEnd()):
            self.add_callback(callback)

    def log_to(self, run_dir: Path) -> None:
        """Write TensorBoard logs under runs/ and the trainer's arguments beside them, on the main process."""
        if not self.args.should_save:
            return
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        self.add_callback(TensorBoardCallback(SummaryWriter(run_dir / 'runs')))
        write_json(run_dir / 'training_args.json', self.args.to_dict())

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the training before its last step."""
        return bool(self.stop_agreed and self.state.global_step < self.state.max_steps)

    @overrides(Seq2SeqTrainer)
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with signals to stop heard, and keep only the best checkpoint where only one may stay."""
        with self.signals:
            output = super().train(*args, **kwargs)
        self.checkpoints.keep_best_alone()
        return output

    # A step

    @overrides(Seq2SeqTrainer)
    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of training; a stream shares its rows out by itself, so no one else may."""
        if isinstance(self.train_dataset, TrainingStream):
            return DataLoader(self.train_dataset, batch_size=self._train_batch_size, collate_fn=self.data_collator)
        return deaf_to_signals(super().get_train_dataloader())

    @overrides(Seq2SeqTrainer)
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of rows, rearranged by length within what one optimizer step is made of."""
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
        shares = self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers
        if not self.data_collator.pads and self.scorer.head is not None and not shares:
            # Of the heaviest batch, which the first-step gate tries, so joining asks for no more memory.
            self.capacity = sum(heapq.nlargest(args.train_batch_size, self.order.lengths))
        return self.order

    @overrides(Seq2SeqTrainer)
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of one step, joined where that fits, known to the guard."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.capacity is not None and len(batches) > 1:
            batches = refill(batches, self.capacity)
        self.guard.begin([batch for batch in batches if batch])
        return batches, count

    @overrides(Seq2SeqTrainer)
    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the loss of one micro-batch, known to the guard; one whose rows went to others costs nothing."""
        if not inputs:
            return torch.zeros((), device=self.args.device)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.losses.append(loss)
        return loss

    @overrides(Seq2SeqTrainer)
    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the summed loss over the number of trained tokens of all micro-batches and processes."""
        self.speedometer.count(inputs)
        assert num_items_in_batch is not None, 'the collator always gives labels'
        # Gradients are averaged over processes; the token count is over all of them.
        divisor = float(num_items_in_batch) / self.accelerator.num_processes
        with self.accelerator.autocast():
            loss = self.scorer.loss(model, inputs, divisor)
        return (loss, {}) if return_outputs else loss

    @overrides(Seq2SeqTrainer)
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients, known to the guard."""
        self.guard.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.guard.norm

    @overrides(Seq2SeqTrainer)
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

    # An evaluation

    @overrides(Seq2SeqTrainer)
    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the batches of evaluation."""
        return deaf_to_signals(super().get_eval_dataloader(eval_dataset))

    @overrides(Seq2SeqTrainer)
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the metrics; where a signal cut the evaluation off none, and the random state is that before it."""
        before = random_state()
        try:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        except EvaluationCutError:
            set_random_state(before)
            self.evaluation_pending = True
            self.control.should_save = self.control.should_training_stop = True
            return {}
        return metrics

    @overrides(Seq2SeqTrainer)
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base class does, over each row once; ends the run where a row's loss is not finite."""
        # Seq2SeqTrainer.evaluate has put `gather` here, which keeps the rows that even out the processes' last batches.
        self.gather_function = self.accelerator.gather_for_metrics
        output = super().evaluation_loop(*args, **kwargs)
        if not self.args.predict_with_generate:
            self.guard.judge_evaluation(f'step {self.state.global_step}', output.predictions, itertools.count())
        return output

    @overrides(Seq2SeqTrainer)
    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **_: Any,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Return no loss, but per row what the metrics add up: (loss, hits, tokens), or generated ids and labels."""
        inputs = self._prepare_inputs(inputs)
        if self.args.predict_with_generate:
            return (None, *self._generated(model, inputs))
        with self.accelerator.autocast():
            sums = self.scorer.by_row(model, inputs)
        return None, sums, inputs['row_lengths'][:, None]

    def _generated(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids that the model generates for each row's prompt, and the row's labels, both padded."""
        prompts = [
            ids[:length].tolist()
            for ids, length in zip(split_rows(inputs, 'input_ids'), inputs['prompt_lengths'], strict=True)
        ]
        answers = generate_batch(
            self.accelerator.unwrap_model(model),
            prompts,
            self.generation,
            images=self.images,
            pixels={name: x for name, x in inputs.items() if name not in (*NOT_FOR_THE_MODEL, *_OF_TEXT)},
        )
        width = max(1, *map(len, answers))  # at least one column: all answers may be empty
        padded = [ids + [IGNORE_INDEX] * (width - len(ids)) for ids in answers]
        labels = pad_sequence(_last_replies(inputs), batch_first=True, padding_value=IGNORE_INDEX)
        return torch.tensor(padded, dtype=torch.long, device=labels.device).view(-1, width), labels

    @overrides(Seq2SeqTrainer)
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return whether this is the best step so far; only a step that is saved can be kept as the best one."""
        return bool(metrics and self.control.should_save and super()._determine_best_metric(metrics, trial))

    # A checkpoint

    @overrides(Seq2SeqTrainer)
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save()

    @overrides(Seq2SeqTrainer)
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the model; the base class would pickle its arguments beside it."""
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
        """Put this process back to where the checkpoint left it; makes up for an evaluation that was cut off."""
        if checkpoint is None:
            return
        self.checkpoints.load_process(Path(checkpoint))
        if self.evaluation_pending:
            self._finish_cut_evaluation(checkpoint)

    def _finish_cut_evaluation(self, checkpoint: str) -> None:
        """Evaluate as the run that was stopped would have, and keep its checkpoint as the best one where it is."""
        metrics = self.evaluate()
        self.evaluation_pending = False
        is_saved = self.state.global_step % self.args.save_steps == 0
        if is_saved and super()._determine_best_metric(metrics, None):
            self.state.best_model_checkpoint = checkpoint


def _last_replies(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the ids of each row's last reply, which is what a prompt is answered with; those before are in the prompt.

    Where the row marks it to carry no loss, it is what follows the prompt.
    """
    replies = []
    of_rows = zip(split_rows(inputs, 'input_ids'), split_rows(inputs, 'labels'), inputs['prompt_lengths'], strict=True)
    for ids, labels, prompt in of_rows:
        trained = labels[prompt:]
        replies.append(trained if (trained != IGNORE_INDEX).any() else ids[prompt:])
    return replies


def build_trainer(
    args: SftArguments, run: Run, model: Any, encoder: Encoder, data: PreparedData, *, dtype: torch.dtype
) -> SftTrainer:
    """Return the trainer of a run, with its logs and its pushes."""
    generation = generation_config(args, encoder.tokenizer, encoder.stop_ids, model.generation_config)
    trainer = make_trainer(
        args,
        run.folder,
        model,
        encoder.tokenizer,
        data,
        dtype=dtype,
        record=run.record,
        generation=generation,
        images=encoder.images,
        decide=run.decide,
    )
    trainer.log_to(run.folder)
    return trainer


def make_trainer(
    args: SftArguments,
    folder: Path,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    *,
    dtype: torch.dtype,
    record: dict[str, Any],
    generation: GenerationConfig,
    images: Images | None = None,
    decide: Decide = log_decision,
) -> SftTrainer:
    """Return a trainer that writes checkpoints to `folder`, its batches laid out as the model allows."""
    base = model.get_base_model() if args.sft_type == 'lora' else model
    longest = max([*data.train.lengths(), *data.val.lengths()])
    check_positions(base, longest)
    laid = lay_end_to_end(base, args, longest=longest, decide=decide)
    train: Any = data.train.longest_first() if args.test_oom_error else data.train
    if args.packing:
        train = PackedRows(data.train, args.max_length)
        full = len(data.train.ids) / len(train) / args.max_length
        logger.info(f'packing: {len(data.train)} rows in {len(train)} packs, {full:.1%} of --max_length full')
    if dist.world_size() > 1 and not args.streaming:
        train = Filled(train, args.batch_size * dist.world_size(), tokenizer.pad_token_id)
    return SftTrainer(
        run_record=record,
        save_total_limit=args.save_total_limit,
        generation=generation,
        images=images,
        model=model,
        scorer=Scorer(base, exact_head(base, args, decide), splits=images is None and not is_sharded(base)),
        groups_by_length=args.group_by_length,
        args=training_arguments(args, folder, dtype=dtype, evaluates=len(data.val) > 0),
        train_dataset=train,
        eval_dataset=data.val.longest_first() if len(data.val) else None,
        data_collator=Collator(tokenizer.pad_token_id, images, pads=not laid),
        processing_class=tokenizer,
        compute_metrics=generation_metrics(tokenizer) if args.predict_with_generate else compute_loss_metrics,
    )

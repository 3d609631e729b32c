"""The trainer: transformers' own, and the few places where ours differs from it."""

from __future__ import annotations

import heapq
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler

from utils.base import dist
from utils.base.files import write_json
from utils.base.logger import logger
from utils.base.names import SFT_ARGS
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Decide, log_decision
from utils.data.collator import NOT_FOR_THE_MODEL, Collator, split_rows
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
from utils.train.callbacks import EvaluateAtEnd, Speedometer
from utils.train.guard import check_positions
from utils.train.metrics import compute_loss_metrics, generation_metrics
from utils.train.resumable import ResumableTrainer
from utils.train.trainer_args import training_arguments

if TYPE_CHECKING:
    from transformers import GenerationConfig

# The model's inputs that every batch has; images add theirs.
_OF_TEXT = ('input_ids', 'attention_mask', 'position_ids')


class SftTrainer(ResumableTrainer):
    """A trainer whose loss is a mean over the trained tokens of the whole effective batch, whatever its layout."""

    def __init__(
        self,
        *,
        run_record: dict[str, Any],
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
        self.run_record = run_record
        self.generation = generation
        self.in_preflight = False
        self.preflight_seconds: float | None = None
        self.order: StepSampler | None = None
        # The loss below is divided by num_items_in_batch, whatever the model's own forward would accept.
        self.model_accepts_loss_kwargs = True
        self.speedometer = Speedometer()
        self.add_callback(self.speedometer)
        self.add_callback(EvaluateAtEnd())

    def log_to(self, run_dir: Path) -> None:
        """Write TensorBoard logs under runs/ and the trainer's arguments beside them, on the main process."""
        if not self.args.should_save:
            return
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        self.add_callback(TensorBoardCallback(SummaryWriter(run_dir / 'runs')))
        write_json(run_dir / 'training_args.json', self.args.to_dict())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of training; a stream shares its rows out by itself, so no one else may."""
        if isinstance(self.train_dataset, TrainingStream):
            return DataLoader(self.train_dataset, batch_size=self._train_batch_size, collate_fn=self.data_collator)
        batches: DataLoader[Any] = super().get_train_dataloader()
        return batches

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

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base class does, over each row once; ends the run where a row's loss is not finite."""
        # Seq2SeqTrainer.evaluate has put `gather` here, which keeps the rows that even out the processes' last batches.
        self.gather_function = self.accelerator.gather_for_metrics
        output = super().evaluation_loop(*args, **kwargs)
        if not self.args.predict_with_generate:
            self.guard.judge_evaluation(f'step {self.state.global_step}', output.predictions, itertools.count())
        return output

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
            return None, torch.tensor(padded, dtype=torch.long, device=labels.device).view(-1, width), labels
        with self.accelerator.autocast():
            sums = self.scorer.by_row(model, inputs)
        return None, sums, inputs['row_lengths'][:, None]

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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A resumed epoch's order lies inside samplers that skip and deal out batches, which do not pass this on.
        if self.order is not None:
            self.order.set_epoch(kwargs['epoch'])
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write weights, tokenizer and sft_args.json; unlike the base class no pickled arguments."""
        if not self.args.should_save and not self.is_distributed_loading_by_transformers:
            return  # where weights are sharded, every rank gives its part
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # save_embedding_layers='auto' would ask a hub whether the vocabulary grew; it never does here.
        extra = {'save_embedding_layers': False} if hasattr(self.model, 'peft_config') else {}
        self.model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save, **extra)
        if not self.args.should_save:
            return
        self.processing_class.save_pretrained(folder)
        if self.images is not None:
            self.images.save(folder)
        write_json(folder / SFT_ARGS, self.run_record)


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

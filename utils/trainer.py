"""The trainer: transformers' own, and the few places where ours differs from it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import Seq2SeqTrainer

from utils import dist, hub
from utils.argument import SftArguments
from utils.callbacks import EvaluateAtEnd, Speedometer
from utils.collator import Collator
from utils.encoder import Encoder
from utils.encoding import PreparedData
from utils.filler import Filled
from utils.generation import generate_batch, generation_config
from utils.metrics import compute_loss_metrics, generation_metrics
from utils.native.image_readers import Images
from utils.preprocess import IGNORE_INDEX
from utils.push_callback import PushCallback
from utils.resolve import SFT_ARGS
from utils.run_dir import Run, write_json
from utils.trainer_args import training_arguments

if TYPE_CHECKING:
    from transformers import GenerationConfig


# What every batch holds; anything more is of images and goes to the model as it is.
_OF_TEXT = ('input_ids', 'attention_mask', 'labels', 'prompt_lengths')


def _image_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name not in _OF_TEXT}


class SftTrainer(Seq2SeqTrainer):
    """A trainer whose loss is a mean over the trained tokens of the whole effective batch, whatever its layout."""

    def __init__(
        self, *, run_record: dict[str, Any], generation: GenerationConfig, images: Images | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.images = images
        self.run_record = run_record
        self.generation = generation
        # The loss below is divided by num_items_in_batch, whatever the model's own forward would accept.
        self.model_accepts_loss_kwargs = True
        base = self.model.get_base_model() if hasattr(self.model, 'get_base_model') else self.model
        self.speedometer = Speedometer()
        self.add_callback(self.speedometer)
        self.add_callback(EvaluateAtEnd())
        self.selects_logits = 'logits_to_keep' in inspect.signature(base.forward).parameters

    def log_to(self, run_dir: Path) -> None:
        """Write TensorBoard logs under runs/ and the trainer's arguments beside them, on the main process."""
        if not self.args.should_save:
            return
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        self.add_callback(TensorBoardCallback(SummaryWriter(run_dir / 'runs')))
        write_json(run_dir / 'training_args.json', self.args.to_dict())

    def token_scores(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (negative log likelihoods, hits), each B x P, over the columns P where any row is trained.

        The output head is applied to those columns alone where the class can. Untrained places hold 0.
        """
        labels = inputs['labels'][:, 1:]
        columns = (labels != IGNORE_INDEX).any(dim=0).nonzero().squeeze(-1)
        keep = {'logits_to_keep': columns} if self.selects_logits else {}
        extra = _image_inputs(inputs)
        logits = model(
            input_ids=inputs['input_ids'], attention_mask=inputs['attention_mask'], use_cache=False, **keep, **extra
        ).logits
        logits = logits if self.selects_logits else logits[:, columns]
        targets = labels[:, columns]
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction='none'
        )
        return losses.view_as(targets), logits.detach().argmax(dim=-1) == targets

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the summed loss over the number of trained tokens of all micro-batches and processes."""
        self.speedometer.count(inputs)
        losses, _ = self.token_scores(model, inputs)
        assert num_items_in_batch is not None, 'the collator always gives labels'
        # Gradients are averaged over processes; the token count is over all of them.
        loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base class does, over each row once."""
        # Seq2SeqTrainer.evaluate has put `gather` here, which keeps the rows that even out the processes' last batches.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

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
        labels = inputs['labels']
        if self.args.predict_with_generate:
            prompts = [
                ids[:length].tolist() for ids, length in zip(inputs['input_ids'], inputs['prompt_lengths'], strict=True)
            ]
            answers = generate_batch(
                self.accelerator.unwrap_model(model),
                prompts,
                self.generation,
                images=self.images,
                pixels=_image_inputs(inputs),
            )
            width = max(1, *map(len, answers))  # at least one column: all answers may be empty
            padded = [ids + [IGNORE_INDEX] * (width - len(ids)) for ids in answers]
            return None, torch.tensor(padded, dtype=torch.long, device=labels.device).view(-1, width), labels
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, hits = self.token_scores(model, inputs)
        counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
        sums = torch.stack([losses.double().sum(dim=1), hits.double().sum(dim=1), counts.double()], dim=1)
        return None, sums, labels[:, :1]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Only a step that is saved can be kept as the best one.
        return bool(self.control.should_save and super()._determine_best_metric(metrics, trial))

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


def build_trainer(
    args: SftArguments, run: Run, model: Any, encoder: Encoder, data: PreparedData, *, dtype: torch.dtype
) -> SftTrainer:
    """Return the trainer of a run, with its logs and its pushes."""
    tokenizer = encoder.tokenizer
    trainer = SftTrainer(
        run_record=run.record,
        generation=generation_config(args, tokenizer, encoder.stop_ids),
        images=encoder.images,
        model=model,
        args=training_arguments(args, run.folder, dtype=dtype, evaluates=len(data.val) > 0),
        train_dataset=Filled(
            data.train.longest_first() if args.test_oom_error else data.train,
            args.batch_size * dist.world_size() if dist.world_size() > 1 else 1,
            tokenizer.pad_token_id,
        ),
        eval_dataset=data.val.longest_first() if len(data.val) else None,
        data_collator=Collator(tokenizer.pad_token_id, encoder.images),
        processing_class=tokenizer,
        compute_metrics=generation_metrics(tokenizer) if args.predict_with_generate else compute_loss_metrics,
    )
    trainer.log_to(run.folder)
    if args.push_to_hub:
        token = hub.find_token(args.hub_token, args.hub)
        assert token is not None, 'checked before'
        trainer.add_callback(PushCallback(args, token, run.folder, data.summary))
    return trainer

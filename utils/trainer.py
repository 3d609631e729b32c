"""From our arguments to transformers' trainer, and the few places where ours differs from it."""

from __future__ import annotations

import inspect
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from utils import dist
from utils.argument import SftArguments
from utils.generation import generate_rows
from utils.metrics import score_texts
from utils.preprocess import IGNORE_INDEX
from utils.resolve import SFT_ARGS
from utils.run_dir import write_json

if TYPE_CHECKING:
    from transformers import GenerationConfig


def training_arguments(
    args: SftArguments, run_dir: Path, *, dtype: torch.dtype, evaluates: bool
) -> Seq2SeqTrainingArguments:
    """Return the trainer's arguments. No token goes into them: they are written to the run folder."""
    has_cuda = torch.cuda.is_available()
    # Frozen bf16 weights compute in bf16 by themselves; fp32 weights and fp16 gradients need autocast.
    autocasts = args.sft_type == 'full' or dtype == torch.float16
    return Seq2SeqTrainingArguments(
        output_dir=str(run_dir),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.eval_batch_size or args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        optim=args.optim,
        learning_rate=args.learning_rate or 0.0,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_ratio,
        predict_with_generate=args.predict_with_generate,
        eval_strategy='steps' if evaluates else 'no',
        eval_steps=args.eval_steps,
        metric_for_best_model=('rouge-l' if args.predict_with_generate else 'loss') if evaluates else None,
        greater_is_better=args.predict_with_generate,
        save_strategy='steps',
        save_steps=args.save_steps or args.eval_steps,
        save_total_limit=args.save_total_limit if args.save_total_limit > 0 else None,
        save_only_model=bool(args.only_save_model),
        logging_steps=args.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        bf16=autocasts and dtype == torch.bfloat16,
        fp16=autocasts and dtype == torch.float16,
        use_cpu=not has_cuda,
        seed=args.seed + dist.rank(),
        data_seed=args.seed,
        train_sampling_strategy='sequential' if args.test_oom_error else 'random',
        dataloader_num_workers=args.dataloader_num_workers,
        dataloader_pin_memory=has_cuda,
        ddp_backend=args.ddp_backend if dist.world_size() > 1 else None,
        ddp_find_unused_parameters=False if dist.world_size() > 1 else None,
        deepspeed=args.deepspeed_config_path,
        remove_unused_columns=False,
        label_names=['labels'],
        report_to='none',
        disable_tqdm=not dist.is_main(),
    )


class SftTrainer(Seq2SeqTrainer):
    """A trainer whose loss is a mean over the trained tokens of the whole effective batch, whatever its layout."""

    def __init__(self, *, run_record: dict[str, Any], generation: GenerationConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
        logits = model(
            input_ids=inputs['input_ids'], attention_mask=inputs['attention_mask'], use_cache=False, **keep
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
            answers = generate_rows(
                self.accelerator.unwrap_model(model), prompts, self.generation, batch_size=len(prompts)
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
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # save_embedding_layers='auto' would ask a hub whether the vocabulary grew; it never does here.
        extra = {'save_embedding_layers': False} if hasattr(self.model, 'peft_config') else {}
        self.model.save_pretrained(folder, state_dict=state_dict, **extra)
        self.processing_class.save_pretrained(folder)
        write_json(folder / SFT_ARGS, self.run_record)


def compute_loss_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return loss and token accuracy over all validation tokens."""
    loss, hits, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    return {'loss': float(loss / tokens), 'acc': float(hits / tokens)}


def generation_metrics(tokenizer: Any) -> Any:
    """Return a function that scores generated ids against labels with ROUGE and BLEU."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        def texts(rows: Any) -> list[str]:
            return [tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True).strip() for row in rows]

        return score_texts(texts(np.asarray(prediction.predictions)), texts(np.asarray(prediction.label_ids)))

    return compute


class EvaluateAtEnd(TrainerCallback):
    """Evaluates the last step too, so that the last checkpoint can be the best."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for an evaluation at the last step."""
        if state.global_step >= state.max_steps and str(args.eval_strategy.value) == 'steps':
            control.should_evaluate = True
        return control


class Speedometer(TrainerCallback):
    """Counts real tokens (padding is none) and the seconds of training steps, evaluation and saving left out."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.steps = 0
        self._pending = 0
        self._since: float | None = None

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        """Add the tokens of one micro-batch."""
        self._pending += int(inputs['attention_mask'].sum())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Leave the first step out: it pays for warm-up."""
        self._since = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Close a step."""
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
            self.tokens += self._pending
        self.steps += 1
        self._pending, self._since = 0, now

    def _restart(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    on_evaluate = on_save = on_log = _restart

    def tokens_per_second(self) -> float | None:
        """Return real tokens per second of this process, None after a single step."""
        return round(self.tokens / self.seconds, 1) if self.seconds else None


def peak_memory_gib() -> float:
    """Return the peak of GPU memory, or of the process's resident memory where there is no GPU."""
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    else:
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    return round(peak / 2**30, 3)

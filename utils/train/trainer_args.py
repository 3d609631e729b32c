"""Make the arguments of transformers' trainer, and the learning-rate schedule, from the flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Seq2SeqTrainingArguments, get_scheduler

from utils.base import device, dist
from utils.base.logger import shows_bars
from utils.cli.arguments import SftArguments
from utils.cli.schedule import STABLE_DECAY, count_decay_steps, count_warmup_steps, warmup_asked
from utils.cli.scores import score_name


def training_arguments(
    args: SftArguments, run_dir: Path, *, dtype: torch.dtype, evaluates: bool, trains_tower: bool = False
) -> Seq2SeqTrainingArguments:
    """Return the arguments of the trainer. They contain no access token, because they are written to the run folder.

    With `trains_tower`, parameters of a vision tower are trained.
    """
    # bf16 weights compute in bf16 without autocast. fp32 weights and fp16 gradients need autocast. DeepSpeed
    # needs the arguments bf16 and fp16 below, because it reads the precision of the model and of adapters from them.
    has_fp32_weights = args.sft_type == 'full' and args.full_weights == 'fp32'
    autocasts = has_fp32_weights or dtype == torch.float16 or args.deepspeed_config_path is not None
    sharded = args.fsdp or args.deepspeed_config_path is not None
    return Seq2SeqTrainingArguments(
        output_dir=str(run_dir),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.eval_batch_size or args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        # The fused optimizer makes no temporary tensors, which would be several times the largest weight.
        optim='adamw_torch_fused' if args.optim == 'adamw_torch' and not sharded else args.optim,
        learning_rate=args.learning_rate or 0.0,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
        lr_scheduler_type=args.lr_scheduler_type,
        lr_scheduler_kwargs=_schedule_settings(args),
        # The trainer takes a share of the steps if the value is below 1.
        warmup_steps=warmup_asked(args),
        predict_with_generate=args.predict_with_generate,
        eval_strategy='steps' if evaluates else 'no',
        eval_steps=args.eval_steps,
        metric_for_best_model=best_metric(args) if evaluates else None,
        greater_is_better=args.predict_with_generate,
        save_strategy='steps',
        save_steps=args.save_steps or args.eval_steps,
        # The trainer would delete a checkpoint file by file while it still has its final name. The function `rotate`
        # of base/checkpoint.py deletes checkpoints instead.
        save_total_limit=None,
        save_only_model=bool(args.only_save_model),
        logging_steps=args.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        bf16=autocasts and dtype == torch.bfloat16,
        fp16=autocasts and dtype == torch.float16,
        use_cpu=device.kind() == 'cpu',
        seed=args.seed + dist.rank(),
        data_seed=args.seed,
        train_sampling_strategy='sequential' if args.test_oom_error else 'random',
        dataloader_num_workers=args.dataloader_num_workers or 0,
        dataloader_pin_memory=device.pins_memory(),
        ddp_backend=args.ddp_backend if dist.world_size() > 1 else None,
        # A vision tower that is trained gets no gradient from a batch without images, and DDP must allow this.
        ddp_find_unused_parameters=trains_tower if dist.world_size() > 1 else None,
        deepspeed=args.deepspeed_config_path,
        remove_unused_columns=False,
        label_names=['labels'],
        # --report_to is done by train/trackers.py.
        report_to='none',
        disable_tqdm=not shows_bars(),
    )


def best_metric(args: SftArguments) -> str:
    """Return the name of the metric that decides which checkpoint is best, without the prefix eval_."""
    return score_name(args.score[0]) if args.predict_with_generate else 'loss'


def _schedule_settings(args: SftArguments) -> dict[str, float]:
    """Return the settings of the schedule for `make_schedule`, except the warm-up."""
    settings = {} if args.min_lr_ratio is None else {'min_lr_ratio': args.min_lr_ratio}
    if args.lr_scheduler_type == STABLE_DECAY:
        settings['decay_ratio'] = args.decay_ratio
    return settings


def dummy_optimizer(learning_rate: float) -> Any:
    """Return an optimizer that trains nothing. It is only used to make a schedule and read its learning rates.

    Making a schedule changes the optimizer, so the optimizer of the run must not be used for this.
    """
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)


def make_schedule(
    optimizer: Any,
    name: str,
    *,
    learning_rate: float,
    warmup: float,
    steps: int,
    min_lr_ratio: float | None = None,
    decay_ratio: float = 0.0,
) -> LambdaLR:
    """Return the learning-rate schedule of transformers, with a different warm-up and with a lowest rate.

    `warmup` is a share of the steps if it is below 1, else a number of steps. At most half of the steps are warm-up.
    With w warm-up steps, step k (counted from 0) has (k + 1) / (w + 1) of the learning rate. In transformers, step 0
    has rate 0 and changes no weight.

    With `min_lr_ratio`, the schedule ends at this share of the learning rate. `decay_ratio` is for the schedule
    warmup_stable_decay. It is the share of all steps in which the rate decays.
    """
    first = 0 if name == 'constant' else count_warmup_steps(warmup, steps)
    settings: dict[str, float] = {}
    if name == STABLE_DECAY:
        settings['num_decay_steps'] = count_decay_steps(decay_ratio, steps, warmup=first)
    elif name == 'polynomial' and min_lr_ratio is not None:
        settings['lr_end'] = 0.0  # instead of 1e-7, so that the rate ends exactly at the lowest rate
    # Only lr_lambdas of this schedule is used.
    original = get_scheduler(
        name,
        dummy_optimizer(learning_rate),
        num_warmup_steps=first,
        num_training_steps=steps,
        scheduler_specific_kwargs=settings,
    )
    (after_warmup,) = original.lr_lambdas
    lowest = min_lr_ratio or 0.0

    def share_of_rate(step: int) -> float:
        if step < first:
            return (step + 1) / (first + 1)
        share = float(after_warmup(step))
        return share + lowest * (1 - share)

    return LambdaLR(optimizer, share_of_rate)

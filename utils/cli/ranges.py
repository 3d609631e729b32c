"""Checks that numeric flags are in their ranges, and that the named optimizer and schedule exist."""

from __future__ import annotations

import math
from typing import Any

from utils.base import dist
from utils.base.errors import did_you_mean
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Resolution

# The names that transformers uses. A test compares both lists with the enums of transformers.
OPTIMIZERS = (
    'adamw_torch', 'adamw_torch_fused', 'adafactor', 'sgd', 'adagrad', 'rmsprop', 'adamw_bnb_8bit', 'adamw_8bit',
    'lion_8bit', 'lion_32bit', 'ademamix', 'ademamix_8bit', 'paged_adamw_32bit', 'paged_adamw_8bit',
    'paged_lion_32bit', 'paged_lion_8bit', 'paged_ademamix_32bit', 'paged_ademamix_8bit', 'rmsprop_bnb',
    'rmsprop_bnb_8bit', 'rmsprop_bnb_32bit',
)  # fmt: skip
SCHEDULERS = (
    'linear', 'cosine', 'cosine_with_restarts', 'polynomial', 'constant', 'constant_with_warmup', 'inverse_sqrt',
    'warmup_stable_decay',
)  # fmt: skip

_SAMPLING = ('temperature', 'top_k', 'top_p')


def is_of_bitsandbytes(optim: str) -> bool:
    """Return whether the optimizer `optim` comes from bitsandbytes."""
    return any(part in optim for part in ('8bit', '32bit', 'bnb', 'ademamix'))


def has_betas(optim: str) -> bool:
    """Return whether the optimizer `optim` uses --adam_beta1 and --adam_beta2."""
    return 'lion' in optim or has_epsilon(optim)


def has_epsilon(optim: str) -> bool:
    """Return whether the optimizer `optim` uses --adam_epsilon."""
    return 'adamw' in optim or 'ademamix' in optim


def _is_interval(value: float) -> bool:
    """Return whether the value is a valid interval: a whole number of steps, or a share (below 1) of all steps."""
    return 0 < value < 1 or (value >= 1 and float(value).is_integer())


def _check_number(done: Resolution[Any], name: str, ok: bool, wanted: str) -> None:
    """Add a problem if `ok` is False, or if the argument `name` is not a finite number.

    `wanted` describes the allowed values in the message.
    """
    value = getattr(done.args, name)
    if not ok or (isinstance(value, float) and not math.isfinite(value)):
        done.problems.add(f'--{name} takes {wanted}, got {value}.')


def check_common_numbers(done: Resolution[Any]) -> None:
    """Check the numeric flags that both programs have, and add a problem for each value out of range."""
    args = done.args
    _check_number(done, 'dataset_test_ratio', 0 <= args.dataset_test_ratio < 1, 'a share from 0 to below 1')
    if args.max_length != -1 and args.max_length < 2:
        done.problems.add(
            f'--max_length {args.max_length} leaves no room for one token of prompt and one of reply. '
            'Give 2 or more, or -1 for no limit.'
        )

    # numpy accepts only seeds below 2**32, and each process adds its rank to the seed.
    seeds = 2**32 - dist.world_size()
    _check_number(done, 'seed', 0 <= args.seed <= seeds, f'a whole number from 0 to {seeds}')
    _check_number(done, 'max_pixels', args.max_pixels is None or args.max_pixels >= 1, '1 or more')


def check_sft_numbers(done: Resolution[SftArguments]) -> None:
    """Check the flags of llm_sft.py, and add a problem for each number out of range and each unknown name."""
    args = done.args
    at_least_one = (
        'lora_rank', 'lora_alpha', 'batch_size', 'gradient_accumulation_steps', 'logging_steps',
    )  # fmt: skip
    for name in at_least_one:
        _check_number(done, name, getattr(args, name) >= 1, '1 or more')
    _check_number(done, 'eval_batch_size', args.eval_batch_size is None or args.eval_batch_size >= 1, '1 or more')

    at_least_zero = (
        'weight_decay', 'max_grad_norm', 'stream_val_rows', 'show_samples', 'report_samples', 'early_stop',
    )  # fmt: skip
    for name in at_least_zero:
        _check_number(done, name, getattr(args, name) >= 0, '0 or more')
    workers = args.dataloader_num_workers
    _check_number(done, 'dataloader_num_workers', workers is None or workers >= 0, '0 or more')
    _check_number(done, 'lora_dropout_p', 0 <= args.lora_dropout_p < 1, 'a share from 0 to below 1')

    _check_optimisation(done)
    _check_number(done, 'train_dataset_sample', args.train_dataset_sample == -1 or args.train_dataset_sample >= 1,
                  '1 or more, or -1 for all')  # fmt: skip
    _check_number(done, 'compare_rows', args.compare_rows >= -1, '0 or more, or -1 for all')
    _check_number(done, 'save_total_limit', args.save_total_limit == -1 or args.save_total_limit >= 1,
                  '1 or more, or -1 for all')  # fmt: skip

    _check_number(done, 'max_minutes', args.max_minutes is None or args.max_minutes > 0, 'a number above 0')


def _check_optimisation(done: Resolution[SftArguments]) -> None:
    """Check the flags of optimizer, schedule and intervals, and add a problem for each value out of range."""
    args = done.args
    _check_number(done, 'learning_rate', args.learning_rate is None or args.learning_rate > 0, 'a number above 0')
    for name in ('adam_beta1', 'adam_beta2', 'warmup_ratio'):
        _check_number(done, name, 0 <= getattr(args, name) < 1, 'a share from 0 to below 1')
    _check_number(done, 'adam_epsilon', args.adam_epsilon > 0, 'a number above 0')
    lowest = args.min_lr_ratio
    _check_number(done, 'min_lr_ratio', lowest is None or 0 <= lowest < 1, 'a share from 0 to below 1')
    _check_number(done, 'decay_ratio', 0 < args.decay_ratio <= 1, 'a share above 0, up to 1')
    _check_number(done, 'warmup_steps', args.warmup_steps is None or args.warmup_steps >= 0, '0 or more')

    interval = '1 or more whole steps, or a share of the run between 0 and 1'
    _check_number(done, 'eval_steps', _is_interval(args.eval_steps), interval)
    _check_number(done, 'save_steps', args.save_steps is None or _is_interval(args.save_steps), interval)
    if args.max_steps < 0:
        _check_number(done, 'num_train_epochs', args.num_train_epochs > 0, 'a number above 0')
    elif args.max_steps == 0:
        done.problems.add('--max_steps 0 trains nothing. Give 1 or more, or remove --max_steps to train whole epochs.')

    for name, known in (('optim', OPTIMIZERS), ('lr_scheduler_type', SCHEDULERS)):
        value = getattr(args, name)
        if value not in known:
            done.problems.add(f"--{name} '{value}' is not known{did_you_mean(value, known)}")


def check_generation(done: Resolution[Any]) -> None:
    """Add a problem for each generation flag out of range, and a warning for each flag that greedy decoding ignores."""
    args = done.args
    _check_number(done, 'max_new_tokens', args.max_new_tokens >= 1, '1 or more')
    _check_number(done, 'repetition_penalty', args.repetition_penalty > 0, 'a number above 0')
    if not args.do_sample:
        done.without_effect(_SAMPLING, 'decoding is greedy (--do_sample false)')
        return
    _check_number(
        done, 'temperature', args.temperature > 0, 'a number above 0 (for greedy decoding use --do_sample false)'
    )
    _check_number(done, 'top_k', args.top_k >= 0, '0 or more')
    _check_number(done, 'top_p', 0 < args.top_p <= 1, 'a share above 0 up to 1')

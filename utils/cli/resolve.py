"""Resolves the typed flags of llm_sft.py into its arguments: sets missing values, and checks combinations.

The reason for each automatic value is recorded. The functions read no file, use no network and import no heavy
library. So a wrong command line fails within a second, and all its mistakes are reported together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from utils.base import dist
from utils.base.names import LAST
from utils.cli.arguments import GENERATION, HUB_FLAGS, SftArguments
from utils.cli.parallel import resolve_scale
from utils.cli.parser import Parsed
from utils.cli.ranges import check_common_numbers, check_generation, check_sft_numbers, has_betas, has_epsilon
from utils.cli.resolution import Resolution, run_name
from utils.cli.resolve_common import check_template_flags, resolve_datasets, resolve_model, resolve_quantization
from utils.cli.schedule import ENDS_AT_A_RATIO, STABLE_DECAY, not_a_multiple
from utils.cli.scores import check_scores
from utils.cli.trackers import resolve_trackers
from utils.data.sources import Source, val_set_names
from utils.loading.layers import ALL_LINEAR, bad_pattern

# Shares typed as 0.333333 need not sum to exactly 1.
_SHARES_TOLERANCE = Fraction(1, 10**6)
# The optimizers for which --full_weights bf16 has a version with stochastic rounding.
_ADAMW = ('adamw_torch', 'adamw_torch_fused')
# A number in bf16 has 8 bits. If a sum has 64 equal summands, only 2 bits of the next summand are added.
_MAX_SUMMANDS = 64
_LORA_ONLY = (
    'lora_target_modules',
    'lora_rank',
    'lora_alpha',
    'lora_dropout_p',
    'use_dora',
    'use_rslora',
    'lora_modules_to_save',
    'tuner_backend',
)


def resolve_sft(parsed: Parsed[SftArguments]) -> Resolution[SftArguments]:
    """Return the resolved command line of a training run. Problems are collected, not raised."""
    done = Resolution(args=replace(parsed.args), typed=parsed.typed, problems=parsed.problems)
    _resolve_verification(done)
    resolve_model(done)
    check_template_flags(done)
    check_common_numbers(done)
    check_sft_numbers(done)
    sources = resolve_datasets(done)
    _resolve_validation(done)
    _resolve_mixture(done, sources)
    _resolve_streaming(done)
    _resolve_clean_copy(done)
    resolve_quantization(done)
    resolve_scale(done)
    _resolve_tuning(done)
    _resolve_full_weights(done)
    _resolve_schedule(done)
    _resolve_intervals(done)
    resolve_trackers(done)
    _check_layout(done)
    _resolve_hub(done)

    if done.args.predict_with_generate:
        check_generation(done)
        check_scores(done.args.score, done.problems, sets=val_set_names(done.args.val_dataset or ()))
    else:
        done.without_effect((*GENERATION, 'score'), 'evaluation is by loss (no --predict_with_generate true)')
    return done


def _resolve_verification(done: Resolution[SftArguments]) -> None:
    """With --verify true, switch off features that do not change the numbers of a run, for example the report."""
    args = done.args
    if not args.verify:
        return
    if args.from_run is None:
        done.problems.add('--verify true: no run is named. Add --from_run output/<model>/vN-<time>.')
    switched_off = {
        'preflight': False,
        'push_to_hub': False,
        'report_to': ['none'],
        'show_samples': 0,
        'report_samples': 0,
        'compare_rows': 0,
    }
    for name, value in switched_off.items():
        if getattr(args, name) != value:
            done.decide(name, value, '--verify true only compares numbers')


def _resolve_validation(done: Resolution[SftArguments]) -> None:
    if not done.args.val_dataset:
        return
    done.decisions.append(
        f'validation rows = all rows of --val_dataset {",".join(done.args.val_dataset)} because it is typed: no row of '
        '--dataset is held out'
    )
    done.without_effect(('dataset_test_ratio', 'stream_val_rows'), '--val_dataset names the validation rows')


def _resolve_mixture(done: Resolution[SftArguments], sources: Sequence[Source]) -> None:
    """Check the shares of --dataset. A data set with a share (name%0.3) gives this part of all training rows.

    If there are shares, --train_dataset_sample is set to -1, unless it was typed or the data are streamed.
    """
    shares = [source.share for source in sources if source.share is not None]
    others = ', '.join(source.name for source in sources if source.share is None)
    if not shares:
        return

    args = done.args
    total = sum(shares, Fraction(0))
    if args.streaming and others:
        done.problems.add(
            f'--dataset {others}: a data set without a share (%) decides the size of the mixture by its number of '
            'rows, but --streaming true does not know this number. Give every data set a share, e.g. name%0.3, or '
            'remove --streaming.'
        )
    elif others and total >= 1:
        done.problems.add(
            f'--dataset: the shares (the numbers after %) sum to {float(total):.7g}, so nothing is left for the data '
            f'sets that have no share ({others}). Lower the shares, or give every data set a share so that they sum '
            'to 1.'
        )
    elif not others and abs(total - 1) > _SHARES_TOLERANCE:
        done.problems.add(
            f'--dataset: every data set has a share (the number after %), but the shares sum to {float(total):.7g} '
            'instead of 1. Change the shares, or remove the share of one data set to use all its rows.'
        )

    if not args.streaming and 'train_dataset_sample' not in done.typed:
        done.decide('train_dataset_sample', -1, 'the shares (%) of --dataset decide the number of training rows')


def _resolve_streaming(done: Resolution[SftArguments]) -> None:
    args = done.args
    problems = done.problems
    if not args.streaming:
        if not args.val_dataset:
            done.without_effect(('stream_val_rows',), 'it is for --streaming true')
        return

    if args.max_steps < 1:
        problems.add(
            '--streaming true needs --max_steps, because a stream has no known length. Add e.g. --max_steps 1000.'
        )
    if args.test_oom_error:
        problems.add(
            '--test_oom_error true sorts all rows, but --streaming true never has all rows in memory. Remove '
            '--test_oom_error or --streaming.'
        )
    if args.packing:
        problems.add(
            '--packing true chooses from all rows, but --streaming true never has all rows in memory. Remove --packing '
            'or --streaming.'
        )
    for word in args.dataset:
        if '#' in word:  # a word of --val_dataset may have one: validation sets are read whole
            problems.add(
                f"--dataset '{word}': the number after # draws from all rows, but --streaming true never has all rows "
                'in memory. Remove # and the number, or remove --streaming.'
            )

    unused = ['train_dataset_sample', 'dataset_test_ratio', 'dataloader_num_workers', 'group_by_length']
    reason = 'with --streaming true the training process reads all rows, and the first rows are held out'
    if args.val_dataset:
        unused.remove('dataset_test_ratio')
        reason = 'with --streaming true the training process reads all rows'
    done.without_effect(tuple(unused), reason)
    done.decide('dataloader_num_workers', 0, 'a stream is read by the training process')


def _resolve_clean_copy(done: Resolution[SftArguments]) -> None:
    """Add a problem for each flag that does not fit --write_clean.

    --write_clean copies all rows. So it sets --train_dataset_sample to -1 (all rows), unless this flag was typed.
    """
    args = done.args
    problems = done.problems
    if args.write_clean is None:
        return

    given = f'--write_clean {args.write_clean}'
    if not args.check_dataset:
        problems.add(f'{given}: only the data check writes the clean copy. Add --check_dataset true to run the check.')
    if not args.write_clean.lower().endswith(('.jsonl', '.jsonl.gz')):
        problems.add(f'{given}: the clean copy consists of JSON lines. Give a name that ends in .jsonl or .jsonl.gz.')
    if dist.world_size() > 1:
        problems.add(
            f'{given}: only one process can write the clean copy. Start the command with python, not torchrun.'
        )
    if 'train_dataset_sample' not in done.typed:
        done.decide('train_dataset_sample', -1, '--write_clean copies all rows')


def _resolve_tuning(done: Resolution[SftArguments]) -> None:
    args = done.args
    if args.learning_rate is None:
        value = 1e-4 if args.sft_type == 'lora' else 2e-5
        done.decide('learning_rate', value, f'sft_type is {args.sft_type}')

    if args.sft_type == 'full':
        done.without_effect(_LORA_ONLY, 'it is for --sft_type lora')
    elif args.lora_target_modules is not None:
        for problem in filter(None, map(bad_pattern, args.lora_target_modules)):
            done.problems.add(problem)
    elif done.info is not None and args.model_type is not None:
        done.decide('lora_target_modules', list(done.info.lora_target_modules), 'the model entry names them')
    elif done.info is not None:
        done.decide('lora_target_modules', [ALL_LINEAR], 'the model has no registry entry')

    if args.use_dora and args.sft_type == 'lora' and args.quantization_bit == 8:
        # PEFT 0.21 moves the weight that it reads, and bitsandbytes then loses its scales. See
        # https://github.com/huggingface/peft, utils/integrations.py, dequantize_module_weight.
        done.problems.add(
            '--use_dora true cannot read the weights of --quantization_bit 8. Use --quantization_bit 4, or remove '
            '--use_dora.'
        )

    _resolve_drift(done)
    _resolve_compare_rows(done)
    if args.only_save_model is None:
        resumable = args.sft_type == 'lora' and args.deepspeed_config_path is None
        reason = f'sft_type is {args.sft_type}' + (' with DeepSpeed' if args.deepspeed_config_path else '')
        done.decide('only_save_model', not resumable, reason)
    if args.only_save_model and args.resume_from_checkpoint == LAST:
        done.warnings.append(
            '--resume_from_checkpoint last: with --only_save_model true no checkpoint of this run can be resumed, so a '
            'restarted command trains from the beginning. Add --only_save_model false.'
        )


def _resolve_drift(done: Resolution[SftArguments]) -> None:
    """Decide --drift, which measures the difference between the model and the same model without its adapter.

    Each process measures the difference on its own, so each process must hold all weights.
    """
    args = done.args
    reason = None
    if args.sft_type == 'full':
        reason = '--sft_type full has no adapter that could be switched off to compare with the base'
    elif args.fsdp or args.deepspeed_config_path is not None:
        reason = 'no process holds all weights with --fsdp or --deepspeed_config_path'

    if args.drift is None:
        done.decide('drift', reason is None, reason or 'sft_type is lora')
    elif args.drift and reason is not None:
        done.problems.add(f'--drift true: {reason}. Remove --drift.')


def _resolve_compare_rows(done: Resolution[SftArguments]) -> None:
    args = done.args
    reason = None
    if args.predict_with_generate:
        reason = 'evaluation is by generated answers, and the loss of rows is not computed'
    elif args.fsdp or args.deepspeed_config_path is not None:
        reason = 'no process holds all weights with --fsdp or --deepspeed_config_path'
    if reason is None:
        return
    done.without_effect(('compare_rows',), reason)
    done.decide('compare_rows', 0, reason)


def _resolve_full_weights(done: Resolution[SftArguments]) -> None:
    args = done.args
    if args.full_weights == 'fp32' or args.sft_type == 'lora':
        if args.full_weights == 'bf16':
            done.problems.add(
                '--full_weights bf16 needs --sft_type full, got lora: adapters are always trained in fp32. Use '
                '--sft_type full, or remove --full_weights.'
            )
        elif args.sft_type == 'lora':
            done.without_effect(('full_weights',), 'it is for --sft_type full')
        return

    if args.deepspeed_config_path is not None or args.fsdp:
        sharded = '--fsdp true' if args.fsdp else '--deepspeed_config_path'
        done.problems.add(
            f'--full_weights bf16 and {sharded}: stochastic rounding needs whole weights, and {sharded} shards them. '
            f'Remove --full_weights or {sharded}.'
        )
    if args.optim not in _ADAMW:
        done.problems.add(
            f'--optim {args.optim} rounds bf16 weights to the nearest number, which loses small updates. Use --optim '
            'adamw_torch with --full_weights bf16, or remove --full_weights.'
        )
    if args.dtype in ('fp16', 'fp32') and 'dtype' in done.typed:
        done.problems.add(
            f'--full_weights bf16 computes in bf16, but --dtype is {args.dtype}. Use --dtype bf16, or remove '
            '--full_weights.'
        )
    elif args.dtype != 'bf16':
        done.decide('dtype', 'bf16', '--full_weights bf16 computes in bf16')
    if args.gradient_accumulation_steps > _MAX_SUMMANDS:
        done.warnings.append(
            f'--gradient_accumulation_steps {args.gradient_accumulation_steps}: with --full_weights bf16 the gradients '
            f'of a step are added in bf16, and more than {_MAX_SUMMANDS} summands lose precision. Use a larger '
            '--batch_size with fewer steps.'
        )


def _resolve_schedule(done: Resolution[SftArguments]) -> None:
    """Check the flags of the learning-rate schedule and of the optimizer against each other."""
    args = done.args
    problems = done.problems
    kind = args.lr_scheduler_type
    if {'warmup_steps', 'warmup_ratio'} <= done.typed:
        problems.add(
            f'--warmup_steps {args.warmup_steps} and --warmup_ratio {args.warmup_ratio} both give the length of the '
            'warm-up. Remove --warmup_steps or --warmup_ratio.'
        )
    if args.min_lr_ratio is not None and kind not in ENDS_AT_A_RATIO:
        problems.add(
            f'--min_lr_ratio {args.min_lr_ratio}: --lr_scheduler_type {kind} has no minimum learning rate. Remove '
            f'--min_lr_ratio, or set --lr_scheduler_type to one of {", ".join(ENDS_AT_A_RATIO)}.'
        )
    if 'decay_ratio' in done.typed and kind != STABLE_DECAY:
        problems.add(
            f'--decay_ratio {args.decay_ratio} is for --lr_scheduler_type {STABLE_DECAY}, got {kind}. Remove '
            f'--decay_ratio, or add --lr_scheduler_type {STABLE_DECAY}.'
        )
    if kind == 'constant':
        done.without_effect(
            ('warmup_ratio', 'warmup_steps'), '--lr_scheduler_type constant has no warm-up; constant_with_warmup has'
        )

    if not has_betas(args.optim):
        done.without_effect(('adam_beta1', 'adam_beta2'), f'--optim {args.optim} does not use it')
    if not has_epsilon(args.optim):
        done.without_effect(('adam_epsilon',), f'--optim {args.optim} does not use it')


def _resolve_intervals(done: Resolution[SftArguments]) -> None:
    """Set the intervals of checkpoints and the batch size of evaluations, if they were not typed."""
    args = done.args
    are_counts = args.eval_steps >= 1 and args.save_steps is not None and args.save_steps >= 1
    if args.save_steps is None:
        done.decide('save_steps', args.eval_steps, 'it follows --eval_steps')
    elif are_counts and args.save_steps % args.eval_steps and (args.dataset_test_ratio > 0 or args.val_dataset):
        done.warnings.append(not_a_multiple(args.save_steps, args.eval_steps))

    if args.eval_batch_size is None and args.predict_with_generate:
        done.decide('eval_batch_size', 1, 'evaluation generates answers')
    elif args.eval_batch_size is None:
        done.decide('eval_batch_size', args.batch_size, 'it follows --batch_size')

    if args.max_steps > 0:
        done.without_effect(('num_train_epochs',), f'--max_steps {args.max_steps} overrides it')
    if 'ddp_backend' in done.typed and dist.world_size() == 1:
        done.without_effect(('ddp_backend',), 'there is one process; start several with torchrun')


def _check_layout(done: Resolution[SftArguments]) -> None:
    args = done.args
    if args.packing and args.padding_free is False:
        done.problems.add(
            '--packing true concatenates rows, and --padding_free false pads them. Remove --packing or --padding_free.'
        )
    if args.packing and args.max_length == -1:
        done.problems.add(
            '--packing true fills rows up to --max_length, but --max_length -1 sets no limit. Give a length, e.g. '
            '--max_length 2048.'
        )
    if args.test_oom_error:
        done.without_effect(('group_by_length',), '--test_oom_error true sorts all rows by length')


def _resolve_hub(done: Resolution[SftArguments]) -> None:
    args = done.args
    if not args.push_to_hub:
        done.without_effect(HUB_FLAGS, 'nothing is pushed without --push_to_hub true')
        return
    if args.hub_model_id is None:
        done.decide('hub_model_id', f'{run_name(args)}-{args.sft_type}', 'it is <model_type>-<sft_type>')
    elif args.hub_model_id.count('/') > 1 or not all(args.hub_model_id.split('/')):
        done.problems.add(f"--hub_model_id takes repo or user/repo, got '{args.hub_model_id}'.")

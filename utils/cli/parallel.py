"""Checks which flags for several processes and devices cannot be combined. Each problem names a remedy."""

from __future__ import annotations

from utils.base import dist
from utils.cli.arguments import SftArguments
from utils.cli.deepspeed import ZeroConfig
from utils.cli.ranges import is_of_bitsandbytes
from utils.cli.resolution import Resolution

# Optimizers that DeepSpeed can run on the CPU.
_OFFLOADED = ('adamw_torch', 'adamw_torch_fused')


def resolve_scale(done: Resolution[SftArguments]) -> None:
    """With --fsdp true, add a problem for each flag that does not fit, and set --only_save_model if it was not typed.

    Without --fsdp, only adds a warning if --check_dataset makes --dry_run useless.

    Only the flags are checked here. cli/machine.py checks files, and cli/devices.py the device.
    """
    args = done.args
    problems = done.problems
    if args.check_dataset:
        done.without_effect(('dry_run',), '--check_dataset true only reads the data')
    if not args.fsdp:
        return

    done.without_effect(
        ('fused_norms', 'fused_mlp', 'fused_rotary'), 'layers sharded by --fsdp are computed by their own classes'
    )
    if args.deepspeed_config_path is not None:
        problems.add('--fsdp true and --deepspeed_config_path both shard the model. Remove one of these two flags.')
    if args.quantization_bit:
        problems.add(
            '--fsdp true cannot shard quantised weights. Use --deepspeed_config_path ds_config/zero2.json instead of '
            '--fsdp, or remove --quantization_bit.'
        )
    if args.dtype == 'fp16':
        problems.add(
            '--fsdp true with --dtype fp16 would scale the loss differently on each process. Use --dtype bf16 or fp32.'
        )
    if args.new_tokens is not None:
        problems.add(
            '--fsdp true shards the embedding, and --new_tokens cannot enlarge a sharded embedding. Remove '
            '--new_tokens, or use --deepspeed_config_path ds_config/zero2.json instead of --fsdp.'
        )
    if args.lora_modules_to_save is not None:
        problems.add(
            '--fsdp true shards the weights, but --lora_modules_to_save needs whole layers. Remove '
            '--lora_modules_to_save, or use --deepspeed_config_path ds_config/zero2.json instead of --fsdp.'
        )
    if args.use_dora:
        problems.add(
            '--fsdp true shards the weights, but --use_dora true needs the whole weight of a layer. Remove --use_dora, '
            'or use --deepspeed_config_path ds_config/zero2.json instead of --fsdp.'
        )
    if is_of_bitsandbytes(args.optim) and args.sft_type == 'full':
        problems.add(f'--optim {args.optim} cannot update sharded weights. Use --optim adamw_torch with --fsdp true.')
    # transformers does not store the state of an optimizer over sharded weights.
    needs_state = {
        '--resume_from_checkpoint': args.resume_from_checkpoint is not None,
        '--only_save_model false': args.only_save_model is False,
    }
    if any(needs_state.values()):
        given = ' and '.join(flag for flag, is_typed in needs_state.items() if is_typed)
        problems.add(
            f'{given} cannot be used with --fsdp true, which does not store the state of the optimizer. Remove '
            f'{given}, or use --deepspeed_config_path ds_config/zero3.json instead of --fsdp.'
        )
    elif args.only_save_model is None:
        done.decide('only_save_model', True, 'the state of an optimizer over sharded weights (--fsdp) is not stored')


def check_processes(done: Resolution[SftArguments]) -> None:
    """Add a problem for each argument that does not fit the number of processes or GPUs."""
    args = done.args
    problems = done.problems
    gpus = dist.visible_gpus()
    processes = dist.local_world_size()
    sharded = None
    if args.fsdp:
        sharded = '--fsdp true'
    elif args.deepspeed_config_path:
        sharded = '--deepspeed_config_path'

    start = f'torchrun --nproc_per_node {max(gpus, 2)} llm_sft.py'
    if sharded and not dist.started_by_torchrun():
        problems.add(f'{sharded} needs processes that are started by torchrun. Start the command with: {start} ...')
    elif args.fsdp and dist.world_size() == 1:
        problems.add(f'--fsdp true needs 2 or more processes, got 1. Start the command with: {start} ...')

    if gpus and processes > gpus:
        problems.add(
            f'torchrun started {processes} processes for {gpus} GPUs, and each process needs its own GPU. Use '
            f'--nproc_per_node {gpus} or less.'
        )
    elif gpus // processes > 1:
        flag = None
        if sharded and dist.started_by_torchrun():
            flag = sharded
        elif args.quantization_bit and processes > 1:
            flag = f'--quantization_bit {args.quantization_bit}'
        if flag is not None:
            problems.add(
                f'{flag} needs one GPU per process, but {gpus} GPUs are visible and {processes} processes were '
                f'started. Use --nproc_per_node {gpus}, or show fewer GPUs to the command, e.g. with '
                'CUDA_VISIBLE_DEVICES.'
            )

    if gpus and args.quantization_bit and args.ddp_backend == 'gloo' and dist.world_size() > 1:
        problems.add(
            f'--ddp_backend gloo with --quantization_bit {args.quantization_bit} on GPUs does not work: gloo cannot '
            'all-reduce tensors of bitsandbytes. Remove --ddp_backend.'
        )


def check_deepspeed(zero: ZeroConfig, done: Resolution[SftArguments]) -> None:
    """Add a problem for each argument that does not fit the DeepSpeed configuration."""
    args = done.args
    problems = done.problems
    path = f'--deepspeed_config_path {args.deepspeed_config_path}'
    if zero.stage == 3 and (args.quantization_bit or (done.info is not None and done.info.quantization)):
        problems.add(f'{path}: ZeRO stage 3 does not shard quantised weights. Use ds_config/zero2.json.')
    if zero.stage == 3 and args.new_tokens is not None:
        problems.add(
            f'{path}: ZeRO stage 3 shards the embedding, and --new_tokens cannot enlarge a sharded embedding. Use '
            'ds_config/zero2.json, or remove --new_tokens.'
        )
    if zero.stage == 3 and args.lora_modules_to_save is not None:
        problems.add(
            f'{path}: ZeRO stage 3 shards the weights, but --lora_modules_to_save needs whole layers. Use '
            'ds_config/zero2.json, or remove --lora_modules_to_save.'
        )
    if zero.stage == 3 and args.use_dora:
        problems.add(
            f'{path}: ZeRO stage 3 shards the weights, but --use_dora true needs the whole weight of a layer. Use '
            'ds_config/zero2.json, or remove --use_dora.'
        )
    if zero.offloads_optimizer and 'optimizer' not in zero.content and args.optim not in _OFFLOADED:
        problems.add(
            f'{path} offloads the optimizer, and --optim {args.optim} cannot be offloaded. Use --optim adamw_torch.'
        )

    if args.max_minutes is not None and 'scheduler' in zero.content:
        problems.add(
            f'{path} sets the schedule in its block "scheduler", and --max_minutes sets it too. Remove the block, '
            'or remove --max_minutes.'
        )

    from_flags = {
        'train_micro_batch_size_per_gpu': ('batch_size', args.batch_size),
        'gradient_accumulation_steps': ('gradient_accumulation_steps', args.gradient_accumulation_steps),
        'gradient_clipping': ('max_grad_norm', args.max_grad_norm),
    }
    optimizer = zero.content.get('optimizer') or {}
    settings = optimizer.get('params', {}) if isinstance(optimizer, dict) else {}
    betas = [args.adam_beta1, args.adam_beta2]
    if settings.get('betas', 'auto') not in ('auto', betas):
        problems.add(
            f'{path} sets betas to {settings["betas"]}, and --adam_beta1 and --adam_beta2 are {betas}. '
            'Set betas to "auto" in the file.'
        )
    if settings.get('eps', 'auto') not in ('auto', args.adam_epsilon):
        problems.add(
            f'{path} sets eps to {settings["eps"]}, and --adam_epsilon is {args.adam_epsilon}. '
            'Set eps to "auto" in the file.'
        )
    for name, (flag, value) in from_flags.items():
        if zero.content.get(name, 'auto') not in ('auto', value):
            problems.add(
                f'{path} sets {name} to {zero.content[name]}, and --{flag} is {value}. '
                f'Set {name} to "auto" in the file.'
            )

"""Which ways to train on several processes and devices go together, and what to use instead of those that do not."""

from __future__ import annotations

from pathlib import Path

from utils.base import dist
from utils.cli.arguments import SftArguments
from utils.cli.deepspeed import ZeroConfig
from utils.cli.ranges import is_of_bitsandbytes
from utils.cli.resolution import Resolution

# Optimizers that DeepSpeed has a form of for the CPU.
_OFFLOADED = ('adamw_torch', 'adamw_torch_fused')


def resolve_scale(done: Resolution[SftArguments]) -> None:
    """Decide what a sharded run must be, and refuse what the flags alone rule out."""
    args, problems = done.args, done.problems
    if args.check_dataset:
        done.without_effect(('dry_run',), '--check_dataset true reads the data and does no more')
    if not args.fsdp:
        return
    done.without_effect(('fused_norms', 'fused_mlp'), 'layers whose weights --fsdp shards compute as their classes do')
    if args.deepspeed_config_path is not None:
        problems.add('--fsdp true and --deepspeed_config_path both shard the model. Drop one of them.')
    if args.quantization_bit:
        problems.add(
            '--fsdp true cannot shard quantised weights. Use --deepspeed_config_path ds_config/zero2.json, or plain '
            'torchrun, with them; or --fsdp true with the unquantised model.'
        )
    if args.dtype == 'fp16':
        problems.add('--fsdp true with --dtype fp16 would scale the loss on each process by itself. Use bf16 or fp32.')
    if is_of_bitsandbytes(args.optim) and args.sft_type == 'full':
        problems.add(f'--optim {args.optim} cannot update sharded weights. Use adamw_torch with --fsdp true.')
    if args.resume_from_checkpoint is not None or args.only_save_model is False:
        problems.add(
            '--fsdp true cannot be resumed: transformers does not store the state of an optimizer over sharded '
            'weights. Leave out --resume_from_checkpoint and --only_save_model false, or use ds_config/zero3.json.'
        )
    elif args.only_save_model is None:
        done.decide('only_save_model', True, 'the state of an optimizer over sharded weights (--fsdp) is not stored')


def check_processes(done: Resolution[SftArguments]) -> None:
    """Add what the number of processes and of GPUs says against these arguments."""
    args, problems = done.args, done.problems
    gpus, processes = dist.visible_gpus(), dist.local_world_size()
    sharded = '--fsdp true' if args.fsdp else '--deepspeed_config_path' if args.deepspeed_config_path else None
    start = f'torchrun --nproc_per_node {max(gpus, 2)} llm_sft.py'
    if sharded and not dist.started_by_torchrun():
        problems.add(f'{sharded} shards over processes that torchrun starts. Start it with: {start} ...')
    elif args.fsdp and dist.world_size() == 1:
        problems.add(f'--fsdp true shards over 2 or more processes, this is 1. Start it with: {start} ...')
    if gpus and processes > gpus:
        problems.add(f'{processes} processes for {gpus} GPUs: each needs its own. Use --nproc_per_node {gpus} or less.')
    elif gpus // processes > 1:
        each = f'each of {processes} processes has {gpus // processes} of the {gpus} GPUs'
        instead = f'Use --nproc_per_node {gpus}, or fewer CUDA_VISIBLE_DEVICES.'
        if sharded and dist.started_by_torchrun():
            problems.add(f'{sharded} needs one GPU per process, here {each}. {instead}')
        elif args.quantization_bit and processes > 1:
            problems.add(
                f'--quantization_bit {args.quantization_bit} cannot spread over several GPUs in several processes, '
                f'here {each}. {instead}'
            )
    if gpus and args.quantization_bit and args.ddp_backend == 'gloo' and dist.world_size() > 1:
        problems.add(
            f'--ddp_backend gloo with --quantization_bit {args.quantization_bit} on GPUs does not work: gloo does not '
            'reduce what bitsandbytes keeps there. Leave it out: nccl is used.'
        )


def check_deepspeed(zero: ZeroConfig, done: Resolution[SftArguments]) -> None:
    """Add what a DeepSpeed configuration says against these arguments."""
    args, problems = done.args, done.problems
    path = f'--deepspeed_config_path {args.deepspeed_config_path}'
    if zero.stage == 3 and (args.quantization_bit or (done.info is not None and done.info.quantization)):
        problems.add(f'{path} is ZeRO stage 3, which does not shard quantised weights. Use ds_config/zero2.json.')
    if zero.offloads_optimizer and 'optimizer' not in zero.content and args.optim not in _OFFLOADED:
        problems.add(f'{path} offloads the optimizer, which --optim {args.optim} cannot. Use adamw_torch.')
    if args.resume_from_checkpoint is not None:
        shards = len(list(Path(args.resume_from_checkpoint).glob('global_step*/*optim_states.pt')))
        if shards != dist.world_size():
            problems.add(
                f'--resume_from_checkpoint {args.resume_from_checkpoint} holds the optimizer of {shards} DeepSpeed '
                f'processes, here are {dist.world_size()}. Start as many as it was saved by; with 0 it was saved with '
                '--only_save_model true, or without DeepSpeed, and cannot be resumed with it.'
            )
    ours = {
        'train_micro_batch_size_per_gpu': ('batch_size', args.batch_size),
        'gradient_accumulation_steps': ('gradient_accumulation_steps', args.gradient_accumulation_steps),
        'gradient_clipping': ('max_grad_norm', args.max_grad_norm),
    }
    for name, (flag, value) in ours.items():
        if zero.content.get(name, 'auto') not in ('auto', value):
            problems.add(f"{path} sets {name} {zero.content[name]}, --{flag} is {value}. Write 'auto' there.")

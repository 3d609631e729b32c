"""Checks the checkpoint of --resume_from_checkpoint before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from utils.base import dist
from utils.base.checkpoint import (
    DEEPSPEED_STATES,
    OPTIMIZER_STATE,
    all_checkpoints,
    damage,
    last_checkpoint,
    partial_name,
)
from utils.base.errors import Problems
from utils.base.system import is_held
from utils.cli.arguments import SftArguments
from utils.loading.folder import is_adapter, read_adapter_config

TRAINER_STATE = 'trainer_state.json'
_GIVE_CHECKPOINT = 'Give the checkpoint of a run: output/<model>/vN-<time>/checkpoint-N, or the word last.'


def partial_checkpoints(run_dir: Path) -> list[str]:
    """Return a warning for each incomplete checkpoint of a run that has ended.

    Do not call this function for a run in progress, which may be writing a checkpoint now.
    """
    pattern = partial_name(Path('checkpoint-*')).name
    return [
        f'{partial} was being written when that run ended. It is incomplete and can be deleted.'
        for partial in sorted(run_dir.glob(pattern))
    ]


def warn_of_resumed_run(checkpoint: Path) -> list[str]:
    """Return warnings about the run of a checkpoint from which training resumes."""
    run_dir = checkpoint.absolute().parent
    if is_held(run_dir):
        return [
            f'--resume_from_checkpoint {checkpoint}: another process trains {run_dir} now. This run is a second one '
            'beside it, and that run may delete the checkpoint while it is read (--save_total_limit). To continue '
            'that run, wait until it ends.'
        ]
    return partial_checkpoints(run_dir)


def check_resume(checkpoint: Path, args: SftArguments, problems: Problems) -> None:
    """Add a problem if training cannot resume from a checkpoint.

    To save time, only one process per machine verifies the hashes of the files.
    """
    given = f'--resume_from_checkpoint {checkpoint}'
    has_deepspeed = any(checkpoint.glob(DEEPSPEED_STATES))
    if not checkpoint.is_dir():
        problems.add(f'{given} is not a directory. {_GIVE_CHECKPOINT}')
    elif not (checkpoint / TRAINER_STATE).is_file():
        newest = last_checkpoint(checkpoint)
        remedy = f'It is a run folder: give {newest}.' if newest else _GIVE_CHECKPOINT
        problems.add(f'{given} is not a checkpoint: it has no {TRAINER_STATE}. {remedy}')
    elif dist.local_rank() == 0 and (problem := damage(checkpoint)):
        intact = [p for p in all_checkpoints(checkpoint.parent) if p != checkpoint and damage(p) is None]
        if intact:
            remedy = f'Use {intact[-1]}, which is intact.'
        else:
            remedy = 'Remove --resume_from_checkpoint: the run has no other intact checkpoint.'
        problems.add(f'{given} cannot be used, because {problem}. {remedy}')
    elif not (checkpoint / OPTIMIZER_STATE).is_file():
        problems.add(
            f'{given} has no optimizer state ({OPTIMIZER_STATE}): it was saved with --only_save_model true and cannot '
            'be resumed. To train its weights further, leave --resume_from_checkpoint out, and name this checkpoint '
            'with --adapter (LoRA) or --model_id_or_path (full).'
        )
    elif has_deepspeed and args.deepspeed_config_path is None:
        problems.add(
            f'{given} was written with DeepSpeed. Add --deepspeed_config_path and the file of the original run.'
        )
    elif is_adapter(checkpoint) != (args.sft_type == 'lora'):
        kind, trained_with = ('an adapter', 'lora') if is_adapter(checkpoint) else ('all weights', 'full')
        problems.add(
            f'{given} holds {kind}, and --sft_type is {args.sft_type}. Use --sft_type {trained_with}, as in the '
            'original run.'
        )
    elif args.sft_type == 'lora':
        _check_resumed_adapter(checkpoint, args, problems)

    if args.deepspeed_config_path is not None and checkpoint.is_dir():
        _check_resumed_shards(checkpoint, problems)


def _check_resumed_adapter(checkpoint: Path, args: SftArguments, problems: Problems) -> None:
    """Add a problem if --lora_rank, --use_dora or --use_rslora does not fit the adapter in the checkpoint.

    The target modules are compared later, when the model is open.
    """
    config = read_adapter_config(checkpoint, remedy=_GIVE_CHECKPOINT)
    found = {
        'lora_rank': config.get('r'),
        'use_dora': config.get('use_dora', False),
        'use_rslora': config.get('use_rslora', False),
    }
    for name, value in found.items():
        present = getattr(args, name)
        if value != present:
            trained_with = f'--{name} {str(value).lower()}'
            problems.add(
                f'--{name} {str(present).lower()}: the adapter in {checkpoint} was trained with {trained_with}. Use '
                f'{trained_with}, or remove --resume_from_checkpoint to start a new run.'
            )


def _check_resumed_shards(checkpoint: Path, problems: Problems) -> None:
    """Add a problem if the checkpoint has no DeepSpeed state, or one of a different number of processes."""
    shards = len(list(checkpoint.glob('global_step*/*optim_states.pt')))
    given = f'--resume_from_checkpoint {checkpoint}'
    if shards == 0:
        problems.add(
            f'{given} holds no optimizer state of DeepSpeed: it was saved with --only_save_model true, or without '
            'DeepSpeed. Remove --deepspeed_config_path, or start a new run without --resume_from_checkpoint.'
        )
    elif shards != dist.world_size():
        problems.add(
            f'{given} holds the optimizer state of {shards} DeepSpeed processes, and this run has '
            f'{dist.world_size()}. Start the command with {shards} processes.'
        )

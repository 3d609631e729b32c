"""Checks a resolved command line against the files, packages and processes of this machine.

Arguments whose value depends on the machine are set. No function uses the network or imports a heavy library.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.checkpoint import DEEPSPEED_STATES, OPTIMIZER_STATE, all_checkpoints, damage, partial_name
from utils.base.errors import ConfigError, Problems
from utils.base.files import read_json
from utils.base.leak_scan import find_secrets
from utils.base.names import LOCK_JSON
from utils.base.packages import has_package, missing_requirement
from utils.cli.arguments import CommonArguments, InferArguments, SftArguments
from utils.cli.deepspeed import read_zero
from utils.cli.parallel import check_deepspeed, check_processes
from utils.cli.ranges import is_of_bitsandbytes
from utils.cli.resolution import Ready, Resolution
from utils.cli.resolve import quantized_problems
from utils.data.sources import check_sources
from utils.dataset import DATASET_MAPPING
from utils.formats.hub_dataset import HubDataset
from utils.hub import snapshot as hub
from utils.hub.clients import TOKEN_VARIABLES
from utils.loading.folder import check_model_dir, has_chat_template, is_adapter, stored_quantization
from utils.loading.info import ModelInfo
from utils.loading.new_tokens import read_tokens
from utils.preprocess import AUTO, TEMPLATE_MAPPING

TRAINER_STATE = 'trainer_state.json'
ADAPTER_CONFIG = 'adapter_config.json'
_GIVE_CHECKPOINT = 'Give the checkpoint of a run: output/<model>/vN-<time>/checkpoint-N.'


def started_in(run_dir: Path) -> str | None:
    """Return the folder in which a run was started. Returns None if its lock.json does not name the folder."""
    if not (run_dir / LOCK_JSON).is_file():
        return None
    try:
        directory = read_json(run_dir / LOCK_JSON).get('directory')
    except ConfigError:  # the code that needs lock.json reports that it is damaged
        return None
    return directory if isinstance(directory, str) else None


def _started_in(args: CommonArguments) -> str | None:
    """Return the folder in which the run of --from_run or --ckpt_dir was started. Returns None without such a run."""
    if isinstance(args, SftArguments) and args.from_run:
        return started_in(Path(args.from_run))
    if isinstance(args, InferArguments) and args.ckpt_dir:
        return started_in(Path(args.ckpt_dir).absolute().parent)
    return None


def _settle(done: Resolution[Any]) -> None:
    """Check the arguments that both programs have: whether the files exist and the packages are installed.

    Problems and warnings are added to `done`.
    """
    args = done.args
    problems = done.problems
    for requirement in done.info.requires if done.info is not None else ():
        if problem := missing_requirement(requirement):
            problems.add(problem)

    model_is_here = args.model_id_or_path is not None and _is_path(args.model_id_or_path)
    if model_is_here and done.info is not None:
        _settle_model_directory(done, done.info, Path(args.model_id_or_path))

    if args.reads_data:
        for problem in check_sources(args.dataset, _started_in(args)):
            problems.add(problem)

    pushes = isinstance(args, SftArguments) and args.push_to_hub
    if model_is_here and not _reads_hub_data(args) and not pushes:
        done.without_effect(('hub',), 'model and data are on this machine, and nothing is pushed')

    if args.quantization_bit and not has_package('bitsandbytes'):
        problems.add(f'--quantization_bit {args.quantization_bit} needs bitsandbytes: pip install bitsandbytes')
    if args.use_flash_attn and not has_package('flash_attn'):
        problems.add(
            '--use_flash_attn true needs flash-attn and an NVIDIA GPU: pip install flash-attn --no-build-isolation'
        )


def settle_infer(done: Resolution[InferArguments]) -> Ready[InferArguments]:
    """Check the command line of llm_infer.py on this machine, and return it ready to run.

    If there are problems, raises ConfigError with all of them.
    """
    _settle(done)
    args = done.args
    problems = done.problems
    if args.result_path is not None and args.reads_data:
        _check_writable('result_path', args.result_path, Path(args.result_path), problems)
        if Path(args.result_path).is_dir():
            problems.add(f'--result_path {args.result_path} is a folder. Give a file in it, e.g. answers.jsonl.')

    if args.export_native and args.output_dir is not None:
        _check_writable('output_dir', args.output_dir, Path(args.output_dir), problems)
        if Path(args.output_dir).exists():
            problems.add(f'--output_dir {args.output_dir} exists already and is not replaced. Name a new folder.')
    return done.checked()


def _settle_model_directory(done: Resolution[Any], info: ModelInfo, directory: Path) -> None:
    """Add a problem if a model folder cannot be used.

    If its weights are stored quantised, set the kind of quantisation in `done.info`.
    """
    if problem := check_model_dir(directory):
        done.problems.add(problem)
        return

    done.info = replace(info, quantization=info.quantization or stored_quantization(directory))
    for problem in quantized_problems(done.args, done.info):
        done.problems.add(problem)
    if done.args.template_type == AUTO and not has_chat_template(directory):
        names = ', '.join(name for name in TEMPLATE_MAPPING if name != AUTO)
        done.problems.add(f'{directory} has no chat template. Choose one with --template_type: {names}.')


def _reads_hub_data(args: CommonArguments) -> bool:
    """Return whether this command reads rows of a data set on a hub."""
    if not args.reads_data:
        return False
    entries = [DATASET_MAPPING.get(word.split('#')[0]) for word in args.dataset]
    return any(isinstance(entry, HubDataset) for entry in entries)


def _is_path(model_id_or_path: str) -> bool:
    """Return whether the argument names a local directory.

    This is so if the directory exists, or if the argument does not have the form of a hub id (owner/name).
    """
    if Path(model_id_or_path).exists() or model_id_or_path.startswith(('/', '.', '~')):
        return True
    return model_id_or_path.count('/') != 1


def settle_sft(done: Resolution[SftArguments]) -> Ready[SftArguments]:
    """Check the command line of llm_sft.py on this machine, and return it ready to run.

    If there are problems, raises ConfigError with all of them.
    """
    _settle(done)
    args = done.args
    problems = done.problems
    _check_writable('output_dir', args.output_dir, Path(args.output_dir, 'run'), problems)

    if args.new_tokens is not None:
        try:
            read_tokens(Path(args.new_tokens))
        except ConfigError as error:
            for problem in error.problems:
                problems.add(problem)
    if args.resume_from_checkpoint is not None:
        checkpoint = Path(args.resume_from_checkpoint)
        _check_resume(checkpoint, args, problems)
        pattern = partial_name(Path('checkpoint-*')).name
        done.warnings += [
            f'{partial} was being written when that run ended. It is incomplete and can be deleted.'
            for partial in sorted(checkpoint.absolute().parent.glob(pattern))
        ]

    if is_of_bitsandbytes(args.optim) and not has_package('bitsandbytes'):
        problems.add(f'--optim {args.optim} needs bitsandbytes: pip install bitsandbytes')
    if args.deepspeed_config_path is not None:
        _check_deepspeed(Path(args.deepspeed_config_path), done)
    check_processes(done)

    if not dist.has_gpu_device():
        if 'ddp_backend' in done.typed and args.ddp_backend == 'nccl':
            problems.add(
                '--ddp_backend nccl needs a GPU, and this machine shows none. Use --ddp_backend gloo, or remove '
                '--ddp_backend.'
            )
        elif 'ddp_backend' not in done.typed and dist.world_size() > 1:
            done.decide('ddp_backend', 'gloo', 'this machine shows no GPU')

    if not (args.check_dataset or args.dry_run):
        check_environment(os.environ, problems)
    if args.push_to_hub and hub.find_token(args.hub_token, args.hub) is None:
        problems.add(f'--push_to_hub true needs a token: set the environment variable {TOKEN_VARIABLES[args.hub]}.')
    return done.checked()


def check_environment(environment: Mapping[str, str], problems: Problems) -> None:
    """Add a problem for each environment variable with a secret-like name whose value is not UTF-8.

    After training, the run folder is searched for the values of these variables. This needs UTF-8.
    """
    for holder, secret in find_secrets(environment, {}).items():
        try:
            secret.encode()
        except UnicodeEncodeError:
            problems.add(
                f'{holder} of the environment is not UTF-8, so the run folder cannot be searched for it. '
                'Set it to text, or unset it.'
            )


def _check_writable(flag: str, given: str, target: Path, problems: Problems) -> None:
    """Add a problem if `target` cannot be created, for example without write permission for the parent folder."""
    try:
        existing = next(p for p in target.absolute().parents if p.exists())
        if not existing.is_dir():
            problems.add(f'--{flag} {given} cannot be created: {existing} is a file. Give another folder.')
        elif not os.access(existing, os.W_OK | os.X_OK):
            problems.add(
                f'--{flag} {given} cannot be written: you have no write permission for {existing}. Give another folder.'
            )
        else:
            # Try it, because the permissions do not show a full quota or a file system without new folders (/proc).
            tempfile.TemporaryDirectory(prefix='.assay-', dir=existing).cleanup()
    except OSError as error:  # `exists` also raises OSError, if a name is too long
        problems.add(f'--{flag} {given} cannot be created: {error.strerror}. Give another folder.')


def _check_resume(checkpoint: Path, args: SftArguments, problems: Problems) -> None:
    """Add a problem if training cannot resume from a checkpoint.

    To save time, only one process per machine compares the files with their hashes.
    """
    given = f'--resume_from_checkpoint {checkpoint}'
    has_deepspeed = any(checkpoint.glob(DEEPSPEED_STATES))
    if not checkpoint.is_dir():
        problems.add(f'{given} is not a directory. {_GIVE_CHECKPOINT}')
    elif not (checkpoint / TRAINER_STATE).is_file():
        problems.add(f'{given} is not a checkpoint: it has no {TRAINER_STATE}. {_GIVE_CHECKPOINT}')
    elif dist.local_rank() == 0 and (problem := damage(checkpoint)):
        intact = [p for p in all_checkpoints(checkpoint.parent) if p != checkpoint and damage(p) is None]
        if intact:
            remedy = f'Use {intact[-1]}, which is intact.'
        else:
            remedy = 'Remove --resume_from_checkpoint: the run has no other checkpoint.'
        problems.add(f'{given} cannot be resumed from: {problem}. {remedy}')
    elif not (checkpoint / OPTIMIZER_STATE).is_file():
        problems.add(
            f'{given} has no optimizer state ({OPTIMIZER_STATE}): it was saved with --only_save_model true and cannot '
            'be resumed. To continue from its weights, start a new run with --model_id_or_path.'
        )
    elif has_deepspeed and args.deepspeed_config_path is None:
        problems.add(f'{given} was written with DeepSpeed. Add --deepspeed_config_path.')
    elif is_adapter(checkpoint) != (args.sft_type == 'lora'):
        kind, trained_with = ('an adapter', 'lora') if is_adapter(checkpoint) else ('all weights', 'full')
        problems.add(
            f'{given} holds {kind}, and --sft_type is {args.sft_type}. Use --sft_type {trained_with}, as in the '
            'original run.'
        )
    elif args.sft_type == 'lora':
        _check_resumed_adapter(checkpoint, args, problems)


def _check_resumed_adapter(checkpoint: Path, args: SftArguments, problems: Problems) -> None:
    """Add a problem for each flag that differs from the adapter, if it decides the shape or the scale of the adapter.

    The target modules are compared later, when the model is open.
    """
    config = read_json(checkpoint / ADAPTER_CONFIG, remedy=_GIVE_CHECKPOINT)
    found = {
        'lora_rank': (config.get('r'), 'rank'),
        'use_dora': (config.get('use_dora', False), 'use_dora'),
        'use_rslora': (config.get('use_rslora', False), 'use_rslora'),
    }
    for name, (has, what) in found.items():
        value = getattr(args, name)
        if has != value:
            problems.add(
                f'--{name} {str(value).lower()}: the adapter in {checkpoint} has {what} {str(has).lower()}. '
                f'Use --{name} {str(has).lower()}, or remove --resume_from_checkpoint to start a new run.'
            )


def _check_deepspeed(path: Path, done: Resolution[SftArguments]) -> None:
    """Add a problem if the DeepSpeed configuration cannot be read or does not fit the arguments.

    Also add a problem if the package deepspeed is not installed.
    """
    problems = done.problems
    if not path.is_file():
        problems.add(
            f'--deepspeed_config_path {path} is not a file (looked in {path.absolute().parent}). Use one of '
            'ds_config/*.json, or correct the path.'
        )
    else:
        try:
            check_deepspeed(read_zero(path), done)
        except ConfigError as error:
            problems.add(error.problems[0])
    if not has_package('deepspeed'):
        problems.add('--deepspeed_config_path needs DeepSpeed: pip install deepspeed')

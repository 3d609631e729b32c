"""Checks a resolved command line against the files, packages and processes of this machine.

Arguments whose value depends on the machine are set. No function uses the network or imports a heavy library.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.checkpoint import DEEPSPEED_STATES, OPTIMIZER_STATE, all_checkpoints, damage, partial_name
from utils.base.errors import ConfigError, Problems
from utils.base.files import read_json
from utils.base.leak_scan import find_secrets
from utils.base.names import CONVERTER, LAST, LLAMA_CPP, LOCK_JSON
from utils.base.packages import has_package, missing_requirement
from utils.cli.arguments import CommonArguments, InferArguments, SftArguments
from utils.cli.deepspeed import read_zero
from utils.cli.parallel import check_deepspeed, check_processes
from utils.cli.ranges import is_of_bitsandbytes
from utils.cli.resolution import Ready, Resolution, decision, reading_of, run_name
from utils.cli.resolve_common import quantized_problems
from utils.cli.scores import check_score_files
from utils.cli.trackers import check_tracker_packages, variables_without_effect
from utils.data.parts import open_parts
from utils.data.sources import Source, check_sources, find_files, is_text_file, parse_source
from utils.formats.conversation import Row
from utils.formats.hub_files import HubFiles
from utils.hub import snapshot as hub
from utils.hub.clients import TOKEN_VARIABLES
from utils.loading.chat_template import folder_templates, read_chat_template
from utils.loading.folder import check_model_dir, has_chat_template, is_adapter, stored_quantization
from utils.loading.info import ModelInfo
from utils.loading.template_settings import setting_names, settings_problems
from utils.preprocess import AUTO, TEMPLATE_MAPPING

TRAINER_STATE = 'trainer_state.json'
ADAPTER_CONFIG = 'adapter_config.json'
# The backends of torch.distributed that need a kind of device, and how the device is called.
_BACKEND_DEVICES = {
    'nccl': ('cuda', 'a GPU'),
    'xccl': ('xpu', 'an Intel GPU'),
    'hccl': ('npu', 'an Ascend NPU'),
}
_DEVICES = {'mps': 'the GPU of a Mac', 'npu': 'an Ascend NPU', 'xpu': 'an Intel GPU'}
_WITHOUT_BITSANDBYTES = ('mps', 'npu')
_GIVE_CHECKPOINT = 'Give the checkpoint of a run: output/<model>/vN-<time>/checkpoint-N, or the word last.'


def started_in(run_dir: Path) -> str | None:
    """Return the working directory in which a run was started. Returns None if its lock.json does not name it."""
    if not (run_dir / LOCK_JSON).is_file():
        return None
    try:
        directory = read_json(run_dir / LOCK_JSON).get('directory')
    except ConfigError:  # the code that needs lock.json reports that it is damaged
        return None
    return directory if isinstance(directory, str) else None


def _started_in(args: CommonArguments) -> str | None:
    """Return the working directory in which the run of --from_run or --ckpt_dir was started, else None."""
    if isinstance(args, SftArguments) and args.from_run:
        return started_in(Path(args.from_run))
    if isinstance(args, InferArguments) and args.ckpt_dir:
        return started_in(Path(args.ckpt_dir).absolute().parent)
    return None


def _settle(done: Resolution[Any]) -> None:
    """Check the files and packages that the flags of both programs need.

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
    _settle_chat_template(done)

    if args.reads_data:
        words, val_words = args.datasets_read()
        for problem in check_sources(words, _started_in(args), val_words=val_words):
            problems.add(problem)
        if 'text_rows' in done.typed and not _text_files(args):
            done.without_effect(('text_rows',), '--dataset names no .txt or .md file')

    pushes = isinstance(args, SftArguments) and args.push_to_hub
    if model_is_here and not _reads_hub_data(done) and not pushes:
        done.without_effect(('hub',), 'model and data are on this machine or name their hub, and nothing is pushed')

    _check_device(done)
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
    if args.reads_data:
        check_score_files(args.score, problems)

    if args.gguf is not None:
        _check_gguf(args, args.gguf, problems)
    if args.export_native and args.output_dir is not None:
        _check_writable('output_dir', args.output_dir, Path(args.output_dir), problems)
        if Path(args.output_dir).exists():
            problems.add(f'--output_dir {args.output_dir} exists already and is not replaced. Name a new folder.')
    return done.checked()


def _check_gguf(args: InferArguments, gguf: str, problems: Problems) -> None:
    """Add a problem if the file of --gguf cannot be written, or if --llama_cpp has no converter."""
    target = Path(gguf)
    if target.exists():
        problems.add(f'--gguf {gguf} exists already and is not replaced. Name a new file.')
    else:
        _check_writable('gguf', gguf, target, problems)

    if args.llama_cpp is not None and not (Path(args.llama_cpp) / CONVERTER).is_file():
        problems.add(
            f'--llama_cpp {args.llama_cpp} has no {CONVERTER}. Name the folder of a checkout: git clone --depth 1 '
            f'{LLAMA_CPP}'
        )


def _settle_model_directory(done: Resolution[Any], info: ModelInfo, directory: Path) -> None:
    """Add a problem if a model folder cannot be used.

    If the weights in the folder are quantised, `done.info` gets the kind of quantisation.
    """
    if problem := check_model_dir(directory):
        done.problems.add(problem)
        return

    done.info = replace(info, quantization=info.quantization or stored_quantization(directory))
    for problem in quantized_problems(done.args, done.info):
        done.problems.add(problem)
    args = done.args
    lacks_template = args.chat_template is None and not has_chat_template(directory)
    if args.template_type == AUTO and lacks_template and _needs_template(args):
        names = ', '.join(name for name in TEMPLATE_MAPPING if name != AUTO)
        done.problems.add(
            f'{directory} has no chat template. Name a file with --chat_template, or choose a --template_type: {names}.'
        )


def _settle_chat_template(done: Resolution[Any]) -> None:
    """Add a problem if --chat_template cannot be used, or if --template_settings names an unknown setting.

    If the template is not on this machine yet, the settings are checked after the weights are downloaded.
    """
    args = done.args
    if args.template_type not in (AUTO, None):
        return
    try:
        check_chat_template(args, Path(str(args.model_id_or_path)))
    except ConfigError as error:
        for problem in error.problems:
            done.problems.add(problem)


def check_chat_template(args: CommonArguments, model_dir: Path) -> None:
    """Raise ConfigError if --chat_template cannot be used, or if --template_settings names an unknown setting.

    The template is the file of --chat_template, else the template of the model folder. Does nothing if both are absent.
    """
    if args.chat_template is not None:
        templates = read_chat_template(Path(args.chat_template))
    elif args.template_settings and (found := folder_templates(model_dir)):
        templates = found
    else:
        return
    if problems := settings_problems(setting_names(args.template_settings or ()), templates):
        raise ConfigError(*problems)


def _needs_template(args: CommonArguments) -> bool:
    """Return whether the command applies a chat template. Plain text needs no template.

    Only the first row of each data set is read. A data set that cannot be read is reported later.
    """
    if not args.reads_data:
        return isinstance(args, InferArguments) and args.eval_human
    try:
        sources = [parse_source(word) for word in itertools.chain(*args.datasets_read())]
        if any(source.hub is not None for source in sources):
            return False  # rows that are not on this machine yet are judged when they are encoded
        if any(source.path is None for source in sources):
            return True  # the entries of registered data sets give questions and replies
        parts = [part for source in sources for part in open_parts(source, reading=reading_of(args))]
        rows = [next((row for _, _, row in part.read(sha256()) if isinstance(row, Row)), None) for part in parts]
    except ConfigError:
        return False
    return not all(row is not None and row.is_text for row in rows)


def _text_files(args: CommonArguments) -> list[Path]:
    """Return the files of plain text that --dataset names. Words that name no files are skipped."""
    found: list[Path] = []
    for word in itertools.chain(*args.datasets_read()):
        try:
            source = parse_source(word)
            found += find_files(source) if source.path is not None else []
        except ConfigError:  # reported with the other problems of the words
            continue
    return [file for file in found if is_text_file(file)]


def _reads_hub_data(done: Resolution[Any]) -> bool:
    """Return whether this command reads a data set from the hub of --hub. Names with hf: or ms: do not count."""
    args = done.args
    if not args.reads_data or done.problems.found:
        return bool(args.reads_data)  # words that are not understood are reported already
    entries = [parse_source(word).entry for word in itertools.chain(*args.datasets_read())]
    return any(entry is not None and not (isinstance(entry, HubFiles) and entry.chosen_hub) for entry in entries)


def _is_path(model_id_or_path: str) -> bool:
    """Return whether the argument names a local folder or GGUF file.

    This is so if the path exists, if it ends in .gguf, or if it does not have the form of a hub id (owner/name).
    """
    if Path(model_id_or_path).exists() or model_id_or_path.startswith(('/', '.', '~')):
        return True
    if model_id_or_path.lower().endswith('.gguf'):
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
    if args.predict_with_generate:
        check_score_files(args.score, problems)

    if args.write_clean is not None:
        _check_clean_copy(Path(args.write_clean), args, problems)

    if args.resume_from_checkpoint == LAST:
        if args.dry_run:
            done.decisions.append(decision('resume_from_checkpoint', LAST, 'it is chosen when the training starts'))
    elif args.resume_from_checkpoint is not None:
        checkpoint = Path(args.resume_from_checkpoint)
        check_resume(checkpoint, args, problems)
        done.warnings += partial_checkpoints(checkpoint.absolute().parent)

    if is_of_bitsandbytes(args.optim) and not has_package('bitsandbytes'):
        problems.add(f'--optim {args.optim} needs bitsandbytes: pip install bitsandbytes')
    if args.deepspeed_config_path is not None:
        _check_deepspeed(Path(args.deepspeed_config_path), done)
    check_processes(done)
    if 'report_to' in done.typed:  # the default is among the packages that every run needs
        check_tracker_packages(args.report_to, problems)
    done.warnings += variables_without_effect(args.report_to, os.environ)

    _settle_backend(done)
    _settle_workers(done)
    _check_training_device(args, problems)
    if dist.visible_kind() != 'cuda':
        done.without_effect(('fused_rotary',), 'its kernel is for GPUs of NVIDIA and AMD')
    if not (args.check_dataset or args.dry_run):
        check_environment(os.environ, problems)
    if args.push_to_hub and hub.find_token(args.hub_token, args.hub) is None:
        problems.add(f'--push_to_hub true needs a token: set the environment variable {TOKEN_VARIABLES[args.hub]}.')
    return done.checked()


def _settle_backend(done: Resolution[SftArguments]) -> None:
    """Set --ddp_backend if it was not typed. Add a problem if a typed backend needs a device that is missing."""
    args = done.args
    kind = dist.visible_kind()
    backend = dist.default_backend()
    if 'ddp_backend' in done.typed:
        needed, device = _BACKEND_DEVICES.get(args.ddp_backend, (kind, ''))
        if needed != kind:
            done.problems.add(
                f'--ddp_backend {args.ddp_backend} needs {device}, and this machine has none. Use --ddp_backend '
                'gloo, or remove --ddp_backend.'
            )
    elif dist.world_size() > 1 and backend != args.ddp_backend:
        shows = 'no GPU' if kind == 'cpu' else f'a device of kind {kind}'
        done.decide('ddp_backend', backend, f'this machine shows {shows}')


def _settle_workers(done: Resolution[SftArguments]) -> None:
    """Decide --dataloader_num_workers, if it was not typed.

    On Linux a worker is a fork of the training process. Each page of memory that training changes after the fork is
    copied, and the worker keeps the old page. Without a GPU this memory holds the model and its activations: in
    training of SmolLM2-135M a worker kept 0.7 GiB, and steps took up to 12 % longer.
    """
    if done.args.dataloader_num_workers is not None:
        return
    if dist.visible_kind() in ('cpu', 'mps'):  # on a Mac a worker is a new process, which imports everything again
        done.decide('dataloader_num_workers', 0, 'without a GPU of its own memory a worker costs more than it saves')
    else:
        done.decide('dataloader_num_workers', 1, 'a worker prepares batches while the GPU computes')


def _check_device(done: Resolution[Any]) -> None:
    """Add a problem for each flag that needs a library that does not run on the device of this machine."""
    args = done.args
    kind = dist.visible_kind()
    if args.use_flash_attn and kind not in ('cuda', 'cpu'):
        done.problems.add(
            f'--use_flash_attn true: flash-attn does not run on {_DEVICES[kind]}. Leave --use_flash_attn out.'
        )
    if kind not in _WITHOUT_BITSANDBYTES:
        return

    if args.quantization_bit:
        done.problems.add(
            f'--quantization_bit {args.quantization_bit}: bitsandbytes does not run on {_DEVICES[kind]}. Remove '
            '--quantization_bit.'
        )
    elif done.info is not None and done.info.quantization == 'nf4':
        done.problems.add(
            f"the weights of '{run_name(args)}' are stored in 4 bits, and bitsandbytes, which reads them, does not run "
            f'on {_DEVICES[kind]}. Use --model_type with the unquantised model, e.g. baichuan2-7b-chat.'
        )


def _check_training_device(args: SftArguments, problems: Problems) -> None:
    """Add a problem for each flag of training that the device of this machine does not support."""
    kind = dist.visible_kind()
    if kind in _WITHOUT_BITSANDBYTES and is_of_bitsandbytes(args.optim):
        problems.add(
            f'--optim {args.optim}: bitsandbytes does not run on {_DEVICES[kind]}. Use --optim adamw_torch; with '
            '--sft_type full, --full_weights bf16 saves memory.'
        )
    if kind != 'mps':
        return

    if args.deepspeed_config_path is not None:
        problems.add(
            '--deepspeed_config_path: DeepSpeed does not run on the GPU of a Mac. Remove --deepspeed_config_path.'
        )
    if args.fsdp:
        problems.add('--fsdp true: a Mac has one GPU, so nothing can be sharded. Remove --fsdp.')
    if args.dtype == 'fp16':
        problems.add(
            '--dtype fp16: training on the GPU of a Mac has no loss scaling, which fp16 needs. Use --dtype bf16 or '
            '--dtype fp32.'
        )


def check_environment(environment: Mapping[str, str], problems: Problems) -> None:
    """Add a problem for each environment variable with a secret-like name whose value is not UTF-8.

    After training, the run folder is searched for leaks of these values. The search needs UTF-8.
    """
    for variable, secret in find_secrets(environment, {}).items():  # e.g. 'the variable HF_TOKEN'
        try:
            secret.encode()
        except UnicodeEncodeError:
            problems.add(
                f'the value of {variable} is not UTF-8, so a leak of this secret into the run folder cannot be found. '
                'Set the variable to UTF-8 text, or unset it.'
            )


def _check_writable(flag: str, given: str, target: Path, problems: Problems) -> None:
    """Add a problem if `target` cannot be created, for example because its folder is not writable.

    The message names the flag (`flag`, without --) and the value that was typed for the flag (`given`).
    """
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


def _check_clean_copy(target: Path, args: SftArguments, problems: Problems) -> None:
    """Add a problem if the file of --write_clean exists, cannot be written, or would be read as data by --dataset."""
    given = f'--write_clean {target}'
    sources = [source for word in itertools.chain(*args.datasets_read()) for source in _local_source(word)]
    if target.resolve() in [file.resolve() for source in sources for file in _files_of(source)]:
        problems.add(f'{given} is one of the data files, which are never changed. Name a new file.')
    elif target.exists() or target.is_symlink():
        problems.add(f'{given} exists already and is not replaced. Name a new file.')
    elif any(_will_name(source, target) for source in sources):
        problems.add(
            f'{given}: --dataset names a folder or a pattern that includes this new file, so the next run would read '
            'the rows twice, from the old files and from the new file. Name a file in another folder.'
        )
    else:
        _check_writable('write_clean', str(target), target, problems)


def _local_source(word: str) -> list[Source]:
    """Return [source] if a word of --dataset names local files, else []. Invalid words are reported elsewhere."""
    try:
        source = parse_source(word)
    except ConfigError:
        return []
    return [] if source.path is None else [source]


def _files_of(source: Source) -> list[Path]:
    """Return the files of a source. Returns [] if the source has no files; a different check reports this."""
    try:
        return find_files(source)
    except ConfigError:
        return []


def _will_name(source: Source, target: Path) -> bool:
    """Return whether a folder or pattern of --dataset would include the file `target` if the file existed."""
    assert source.path is not None, 'it is local'
    if source.path.is_dir():
        return target.absolute().parent.resolve() == source.path.resolve()
    return glob.has_magic(source.name) and fnmatch.fnmatch(str(target.absolute()), str(source.path.absolute()))


def partial_checkpoints(run_dir: Path) -> list[str]:
    """Return a warning for each incomplete checkpoint of a run, left by a process that ended while writing."""
    pattern = partial_name(Path('checkpoint-*')).name
    return [
        f'{partial} was being written when that run ended. It is incomplete and can be deleted.'
        for partial in sorted(run_dir.glob(pattern))
    ]


def check_resume(checkpoint: Path, args: SftArguments, problems: Problems) -> None:
    """Add a problem if training cannot resume from a checkpoint.

    To save time, only one process per machine verifies the hashes of the files.
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
    """Add a problem if the rank, use_dora or use_rslora of the adapter in the checkpoint differs from the flags.

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


def _check_resumed_shards(checkpoint: Path, problems: Problems) -> None:
    """Add a problem if the number of processes in a checkpoint's DeepSpeed state differs from that of this run."""
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

"""Checks a resolved command line against the files, packages and processes of this machine.

Arguments whose value depends on the machine are set. No function uses the network or imports a heavy library.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError, Problems
from utils.base.files import read_json
from utils.base.leak_scan import find_secrets
from utils.base.names import LAST, LOCK_JSON
from utils.base.packages import has_package, missing_requirement
from utils.cli.arguments import CommonArguments, InferArguments, SftArguments
from utils.cli.deepspeed import read_zero
from utils.cli.devices import check_device, settle_training_device
from utils.cli.outputs import check_clean_copy, check_gguf, check_writable
from utils.cli.parallel import check_deepspeed, check_processes
from utils.cli.ranges import is_of_bitsandbytes
from utils.cli.resolution import Ready, Resolution, decision, reading_of
from utils.cli.resolve_common import quantized_problems
from utils.cli.resumed import check_resume, warn_of_resumed_run
from utils.cli.scores import check_score_files
from utils.cli.trackers import check_tracker_packages, variables_without_effect
from utils.data.open_parts import open_parts
from utils.data.sources import check_sources, find_files, is_text_file, parse_source
from utils.formats.conversation import Row
from utils.formats.hub_files import HubFiles
from utils.hub import snapshot as hub
from utils.hub.clients import TOKEN_VARIABLES
from utils.loading.chat_template import folder_templates, read_chat_template
from utils.loading.folder import check_model_dir, stored_quantization
from utils.loading.info import ModelInfo
from utils.loading.template_settings import setting_names, settings_problems
from utils.preprocess import AUTO, TEMPLATE_MAPPING


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
            done.without_effect(('text_rows',), '--dataset and --val_dataset name no .txt or .md file')

    pushes = isinstance(args, SftArguments) and args.push_to_hub
    if model_is_here and not _reads_hub_data(done) and not pushes:
        done.without_effect(('hub',), 'model and data are on this machine or name their hub, and nothing is pushed')

    check_device(done)
    if args.quantization_bit and not has_package('bitsandbytes'):
        problems.add(f'--quantization_bit {args.quantization_bit} needs bitsandbytes: pip install bitsandbytes')
    if args.use_flash_attn and not has_package('flash_attn'):
        problems.add(
            '--use_flash_attn true needs flash-attn and a GPU of NVIDIA or AMD: pip install flash-attn '
            '--no-build-isolation'
        )


def settle_infer(done: Resolution[InferArguments]) -> Ready[InferArguments]:
    """Check the command line of llm_infer.py on this machine, and return it ready to run.

    If there are problems, raises ConfigError with all of them.
    """
    _settle(done)
    args = done.args
    problems = done.problems
    if args.result_path is not None and args.reads_data:
        check_writable('result_path', args.result_path, Path(args.result_path), problems)
        if Path(args.result_path).is_dir():
            problems.add(f'--result_path {args.result_path} is a folder. Give a file in it, e.g. answers.jsonl.')
    if args.reads_data:
        check_score_files(args.score, problems)

    if args.gguf is not None:
        check_gguf(args, args.gguf, problems)
    if args.export_native and args.output_dir is not None:
        check_writable('output_dir', args.output_dir, Path(args.output_dir), problems)
        if Path(args.output_dir).exists():
            problems.add(f'--output_dir {args.output_dir} exists already and is not replaced. Name a new folder.')
    return done.checked()


def _settle_model_directory(done: Resolution[Any], info: ModelInfo, directory: Path) -> None:
    """Add problems if a model folder or GGUF file cannot be used with these flags.

    If the weights in the folder are quantised, `done.info` gets the kind of quantisation.
    """
    if problem := check_model_dir(directory):
        was_recorded = isinstance(done.args, InferArguments) and 'model_id_or_path' not in done.typed
        if was_recorded and not directory.exists():
            problem += (
                ' The checkpoint was trained on this base model. If the base model was moved, name its folder with '
                '--model_id_or_path: its sha256 is compared with the recorded one.'
            )
        done.problems.add(problem)
        return

    done.info = replace(info, quantization=info.quantization or stored_quantization(directory))
    for problem in quantized_problems(done.args, done.info):
        done.problems.add(problem)
    args = done.args
    if args.template_type != AUTO or args.chat_template is not None:
        return
    try:
        templates = folder_templates(directory)
    except ConfigError as error:
        done.problems.add(error.problems[0])
        return
    if not templates and _needs_template(args):
        names = ', '.join(name for name in TEMPLATE_MAPPING if name != AUTO)
        done.problems.add(
            f'{directory} has no chat template. Name a file with --chat_template, or choose a --template_type: {names}.'
        )


def _settle_chat_template(done: Resolution[Any]) -> None:
    """Add a problem if --chat_template cannot be used, or if --template_settings names an unknown setting.

    Nothing is checked with a --template_type other than auto. If the template is not on this machine yet, the settings
    are checked after the weights are downloaded.
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
    """Return the files of plain text that --dataset and --val_dataset name. Words that name no files are skipped."""
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
    check_writable('output_dir', args.output_dir, Path(args.output_dir, 'run'), problems)
    if args.predict_with_generate:
        check_score_files(args.score, problems)

    if args.write_clean is not None:
        check_clean_copy(Path(args.write_clean), args, problems)

    if args.resume_from_checkpoint == LAST:
        if args.dry_run:
            done.decisions.append(decision('resume_from_checkpoint', LAST, 'it is chosen when the training starts'))
    elif args.resume_from_checkpoint is not None:
        checkpoint = Path(args.resume_from_checkpoint)
        check_resume(checkpoint, args, problems)
        done.warnings += warn_of_resumed_run(checkpoint)

    if is_of_bitsandbytes(args.optim) and not has_package('bitsandbytes'):
        problems.add(f'--optim {args.optim} needs bitsandbytes: pip install bitsandbytes')
    if args.deepspeed_config_path is not None:
        _check_deepspeed(Path(args.deepspeed_config_path), done)
    check_processes(done)
    if 'report_to' in done.typed:  # the default is among the packages that every run needs
        check_tracker_packages(args.report_to, problems)
    done.warnings += variables_without_effect(args.report_to, os.environ)

    settle_training_device(done)
    if not (args.check_dataset or args.dry_run):
        check_environment(os.environ, problems)
    if args.push_to_hub and hub.find_token(args.hub_token, args.hub) is None:
        problems.add(f'--push_to_hub true needs a token: set the environment variable {TOKEN_VARIABLES[args.hub]}.')
    return done.checked()


def check_environment(environment: Mapping[str, str], problems: Problems) -> None:
    """Add a problem for each environment variable with a secret-like name whose value is not UTF-8.

    Values of fewer than 8 characters are not checked.
    After training, the run folder is searched for leaks of these values. The search needs UTF-8.
    """
    for variable, secret in find_secrets(environment, {}).items():  # e.g. 'the variable HF_TOKEN'
        try:
            secret.encode()
        except UnicodeEncodeError:
            problems.add(
                f'the value of {variable} is not UTF-8. After training, the run folder is searched for secrets of the '
                'environment, and this search needs UTF-8. Set the variable to UTF-8 text, or unset it.'
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

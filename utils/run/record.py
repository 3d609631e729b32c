"""What a run writes about itself, and how it is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.checkpoint import last_checkpoint
from utils.base.errors import ConfigError, Problems
from utils.base.files import read_json, write_json
from utils.base.logger import logger
from utils.base.names import SFT_ARGS
from utils.cli.arguments import GENERATION, HUB_FLAGS, InferArguments, SftArguments, flag_types, to_dict
from utils.cli.parser import Parsed
from utils.loading.folder import is_adapter
from utils.run.lock import DATA_FLAGS, check_same_data

ANSWERS_JSON = 'answers.json'


PROOFS_JSON = 'proofs.json'


def record_proof(run_dir: Path, name: str, outcome: dict[str, Any]) -> None:
    """Put one entry into proofs.json, whole or not at all; the other entries stay. The main process alone writes."""
    if not dist.is_main():
        return
    file = run_dir / PROOFS_JSON
    proofs = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
    write_json(file, {**proofs, name: outcome})


RUN_JSON = 'run.json'
_GIVE_RUN = 'Give a run folder, output/<model>/vN-<time>.'
_RESUME_REMEDY = 'or start a new run on what is there now: leave --resume_from_checkpoint out'
# What a run shows or is started from, not how it trains.
_SHOWN = ('show_samples', 'report_samples', 'from_run', 'doctor')


def run_record(args: SftArguments, *, system_typed: bool, base_model: dict[str, Any]) -> dict[str, Any]:
    """Return what sft_args.json holds: every argument as used, secrets left out, and what the base model was."""
    return {**to_dict(args), 'system_typed': system_typed, 'base_model': base_model}


def read_arguments(run_dir: Path) -> dict[str, Any]:
    """Return the sft_args.json of a run folder; raises ConfigError where it is none."""
    arguments: dict[str, Any] = read_json(run_dir / SFT_ARGS, remedy=_GIVE_RUN)
    if 'sft_type' not in arguments:
        raise ConfigError(f'{run_dir / SFT_ARGS} does not say how a run was trained. {_GIVE_RUN}')
    return arguments


def read_run_record(checkpoint: Path) -> dict[str, Any] | None:
    """Return the sft_args.json that a checkpoint belongs to: its own copy, else its run's; None where there is none."""
    for folder in (checkpoint, checkpoint.absolute().parent):
        file = folder / SFT_ARGS
        if file.is_file():
            record: dict[str, Any] = read_json(file, remedy='Put back the one that the run wrote.')
            return record
    return None


def open_checkpoint(checkpoint: Path, problems: Problems) -> dict[str, Any]:
    """Return the record of the run a --ckpt_dir is of; raises ConfigError where it cannot be used as one."""
    if problem := _checkpoint_problem(checkpoint):
        problems.add(problem)
        problems.raise_if_any()
    record = read_run_record(checkpoint)
    assert record is not None, 'checked'
    return record


def _checkpoint_problem(checkpoint: Path) -> str | None:
    if not checkpoint.is_dir():
        return f'--ckpt_dir {checkpoint} is not a directory (looked in {checkpoint.absolute().parent}).'
    holds_model = (checkpoint / 'adapter_config.json').is_file() or (checkpoint / 'config.json').is_file()
    if not holds_model:
        newest = last_checkpoint(checkpoint)
        hint = f' It is a run folder: give {newest}.' if newest else ''
        return f'--ckpt_dir {checkpoint} is no checkpoint: it has neither adapter_config.json nor config.json.{hint}'
    try:
        if not read_run_record(checkpoint):
            return (
                f'--ckpt_dir {checkpoint} has no {SFT_ARGS} beside it, or an empty one, so how it was trained is '
                'unknown. Was it copied without it?'
            )
    except ConfigError as error:
        return error.problems[0]
    return None


def fill_from_run(
    parsed: Parsed[InferArguments], record: dict[str, Any], warnings: list[str]
) -> Parsed[InferArguments]:
    """Return the arguments with each one not typed taken from the trained run; contradictions are warned about."""
    args, problems = parsed.args, parsed.problems
    if not is_adapter(Path(str(args.ckpt_dir))):
        record = {**record, 'model_id_or_path': args.ckpt_dir}  # whole weights serve themselves
    base = ('model_type', 'model_id_or_path')
    for name in base:
        typed, trained = getattr(args, name), record.get(name)
        if name in parsed.typed and typed != trained and typed not in record.get('base_model', {}).values():
            problems.add(
                f"--{name} '{typed}' is not the base model of this checkpoint, which is "
                f"'{record.get('model_type') or record.get('model_id_or_path')}'. Leave the flag out."
            )
    for name in flag_types(InferArguments):
        if name not in record or name in ('ckpt_dir', 'ignore_args_error', 'output_dir'):
            continue
        if name == 'use_flash_attn' and record[name] is not record.get('asked', {}).get(name, record[name]):
            continue  # the training machine had it or lacked it: here this machine decides
        if name not in parsed.typed:
            setattr(args, name, record[name])
        elif name not in (*base, *GENERATION, 'seed', 'hub') and getattr(args, name) != record[name]:
            warnings.append(f'--{name} {getattr(args, name)} is not what the run was trained with ({record[name]}).')
    return Parsed(args=args, typed=parsed.typed, problems=problems)


def check_resumed(checkpoint: Path, record: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """Return a warning for each argument that differs from the resumed run's.

    Raises for other base weights, another optimizer, and where the same flags of data give other rows.
    """
    trained = read_run_record(checkpoint)
    if trained is None:
        return [f'{checkpoint} has no {SFT_ARGS}: whether the arguments are those it was trained with is not checked.']
    problems = Problems()
    check_base(trained, record['base_model'], problems)
    trained |= trained.get('asked', {})
    _check_resumed_optimizer(trained, record, problems)
    unchecked = []
    if all(trained.get(name) == record[name] for name in DATA_FLAGS):
        unchecked = check_same_data(checkpoint, data, problems, remedy=_RESUME_REMEDY)
    problems.raise_if_any()
    free = {'resume_from_checkpoint', 'output_dir', 'base_model', 'hub', 'preflight', *_SHOWN, *HUB_FLAGS}
    return unchecked + [
        f'--{name} is {record[name]}, the run that is resumed had {trained[name]}: the result will differ from it.'
        for name in record
        if name in trained and name not in free and record[name] != trained[name]
    ]


def _check_resumed_optimizer(trained: dict[str, Any], record: dict[str, Any], problems: Problems) -> None:
    """Add a problem for each setting of the optimizer that cannot be another one than the checkpoint's."""
    fixed = ['optim']
    if record['deepspeed_config_path'] is not None:
        fixed += ['learning_rate', 'weight_decay']  # DeepSpeed puts its optimizer back with what it was made with
    for name in fixed:
        had, typed = trained.get(name, record[name]), record[name]
        are_one = {had, typed} == {'adamw_torch', 'adamw_torch_fused'}
        if had != typed and not are_one:
            problems.add(
                f'--{name} {typed}: the optimizer that is resumed was made with {had} and is put back as it was. '
                f'Type --{name} {had}, or start a new run: leave --resume_from_checkpoint out.'
            )


def check_base(record: dict[str, Any], serves: dict[str, str], problems: Problems) -> None:
    """Add a problem where the base weights that serve are not those the checkpoint was trained on."""
    trained = record.get('base_model')
    if trained is None:
        logger.warning(
            f'{SFT_ARGS} does not say which base weights it was trained on: that they are these is not checked.'
        )
    elif trained['sha256'] != serves['sha256']:
        problems.add(
            f'the base weights differ: this checkpoint was trained on {trained["source"]} (sha256 '
            f'{trained["sha256"][:12]}), what serves here is {serves["source"]} (sha256 {serves["sha256"][:12]}). '
            'An adapter is right only on the weights it was trained on.'
        )


def check_resumed_template(checkpoint: Path, record: dict[str, Any]) -> None:
    """Raise ConfigError where the template of the same name is not the one that the resumed run trained."""
    trained = read_run_record(checkpoint) or {}
    had, now = trained.get('template_sha256'), record['template_sha256']
    if had in (None, now) or trained.get('template_type') != record['template_type']:
        return
    raise ConfigError(
        f'--resume_from_checkpoint {checkpoint}: the template has changed since (sha256 {had[:12]}, now {now[:12]}), '
        f'other prompts would be trained. Put it back, {_RESUME_REMEDY}.'
    )

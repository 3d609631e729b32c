"""--adapter: a run starts from a trained adapter. This module reads, checks and records the adapter.

The files of the adapter decide its shape (rank, layers), the base model and the template of the run. Rows, optimizer
and schedule are new.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.base.checkpoint import MANIFEST, damage, last_checkpoint, sha256_of
from utils.base.errors import ConfigError
from utils.base.names import LAST
from utils.cli.arguments import SftArguments
from utils.cli.machine import started_in
from utils.cli.parser import Parsed
from utils.cli.resolution import decision
from utils.data.sources import abbreviated
from utils.loading.folder import ADAPTER_CONFIG, is_adapter, read_adapter_config
from utils.loading.info import ModelInfo
from utils.loading.layers import PATTERN
from utils.run.record import RunRecord, find_record

ADAPTER_FILES = ('adapter_model.safetensors', 'adapter_model.bin')
# The flags that the run of the adapter decides, unless they are typed.
_OF_RUN = ('template_type', 'freeze_vision')
# Settings of PEFT that no flag here expresses, with the values that have no effect.
_UNEXPRESSED: dict[str, tuple[Any, ...]] = {
    'bias': (None, 'none'),
    'lora_bias': (None, False),
    'init_lora_weights': (None, True, False, 'gaussian'),
    'rank_pattern': (None, {}),
    'alpha_pattern': (None, {}),
    'layers_to_transform': (None, []),
    'layer_replication': (None, []),
    'use_qalora': (None, False),
}
_GIVE_ADAPTER = 'Give the checkpoint of a LoRA run: output/<model>/vN-<time>/checkpoint-N.'


def fill_from_adapter(parsed: Parsed[SftArguments], decisions: list[str], warnings: list[str]) -> Parsed[SftArguments]:
    """Set the flags that the adapter of --adapter decides, unless they were typed. Returns the command line.

    Adds a line to `decisions` for each value that changes. If the adapter cannot be used, or if a typed flag such as
    --lora_rank does not fit it, adds a problem to `parsed.problems`.

    Adds a line to `warnings` for each of --system, --template_type and --freeze_vision that differs from the run of the
    adapter. The last two can differ only if they were typed. If the adapter has no record of its run, a line says so.

    A command without --adapter may resume a run that began with --adapter. In this case, the flags of the command are
    set from the resumed checkpoint. Any other command without --adapter is returned unchanged.
    """
    args = parsed.args
    if args.adapter is None:
        return _fill_from_checkpoint(parsed, decisions)

    problems = parsed.problems
    given = f'--adapter {args.adapter}'
    if args.resume_from_checkpoint not in (None, LAST):
        problems.add(
            f'{given}: a run that is resumed goes on from the adapter in its checkpoint. Remove --adapter to resume, '
            'or remove --resume_from_checkpoint to start a new run from the adapter.'
        )
        args.resume_from_checkpoint = None  # so that the flags are not compared with the checkpoint too
    if args.sft_type == 'full':
        problems.add(
            f'{given} is for --sft_type lora. Remove --sft_type full, or merge the adapter and name the merged folder '
            'with --model_id_or_path instead of --adapter.'
        )

    folder = Path(args.adapter)
    try:
        if problem := _folder_problem(folder, args.from_run):
            problems.add(f'{given} {problem}')
            return parsed
        config = read_adapter_config(folder, remedy=_GIVE_ADAPTER)
        record = find_record(folder)
    except ConfigError as error:
        problems.add(error.problems[0])
        return parsed

    for name, without_effect in _UNEXPRESSED.items():
        if config.get(name) not in without_effect:
            problems.add(
                f'{given}: its {ADAPTER_CONFIG} sets {name}, which no flag can set. Merge the adapter into its base '
                'with merge_and_unload of PEFT, and name the merged folder with --model_id_or_path.'
            )
    if config.get('trainable_token_indices') and not (record and record.added_tokens):
        problems.add(
            f'{given}: the adapter has embedding rows of new tokens, but no sft_args.json that names these tokens. '
            'Merge the adapter into its base with merge_and_unload of PEFT, and name the merged folder with '
            '--model_id_or_path.'
        )
    _fill_shape(parsed, config, decisions)
    _fill_model(parsed, config, record, decisions)
    if record is None:
        warnings.append(
            f'{given}: it has no record of its run (sft_args.json), so neither its base weights nor its template can '
            'be checked.'
        )
    else:
        _fill_from_run(parsed, record, decisions, warnings)
    return parsed


def _folder_problem(folder: Path, from_run: str | None) -> str | None:
    """Return why a folder cannot be used as --adapter, as the end of a message. Returns None if it can be used."""
    if not folder.is_dir():
        hint = f' The run was started in {started_in(Path(from_run))}.' if from_run and not folder.is_absolute() else ''
        return f'is not a directory (looked in {folder.absolute().parent}). {_GIVE_ADAPTER}{hint}'
    if not is_adapter(folder):
        if newest := last_checkpoint(folder):
            return f'is a run folder. Give one of its checkpoints, e.g. {newest}.'
        if (folder / 'config.json').is_file():
            return 'is a whole model, not an adapter. Name it with --model_id_or_path instead.'
        return f'is not an adapter: it has no {ADAPTER_CONFIG}. {_GIVE_ADAPTER}'
    if adapter_file(folder) is None:
        return f'holds no adapter weights: neither {" nor ".join(ADAPTER_FILES)}. Copy the complete checkpoint.'
    if (folder / MANIFEST).is_file() and (problem := damage(folder)):
        return f'cannot be used: {problem}. Copy the checkpoint again, or give another one.'

    kind = read_adapter_config(folder, remedy=_GIVE_ADAPTER).get('peft_type')
    if kind != 'LORA':
        return f'is an adapter of the kind {kind}, and only LoRA adapters are trained here. {_GIVE_ADAPTER}'
    return None


def adapter_file(folder: Path) -> Path | None:
    """Return the file with the weights of an adapter. Returns None if the folder has none."""
    return next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)


def adapter_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that describe an adapter, from the content of its adapter_config.json."""
    targets = config.get('target_modules') or []
    names = [f'{PATTERN}{targets}'] if isinstance(targets, str) else sorted(targets)
    return {
        'lora_rank': config.get('r'),
        'lora_alpha': config.get('lora_alpha'),
        'use_dora': bool(config.get('use_dora')),
        'use_rslora': bool(config.get('use_rslora')),
        'lora_target_modules': names + sorted(config.get('target_parameters') or []),
        'lora_modules_to_save': sorted(config.get('modules_to_save') or []) or None,
    }


def _fill_shape(parsed: Parsed[SftArguments], config: Mapping[str, Any], decisions: list[str]) -> None:
    """Set the flags that describe an adapter (e.g. --lora_rank) to the values of the adapter, unless they were typed.

    `config` is the content of adapter_config.json. If this changes the value of a flag, adds a line to `decisions`. If
    a typed flag has a different value, adds a problem. Typed names of layers are compared later, when the model is
    open.
    """
    for name, value in adapter_flags(config).items():
        typed = getattr(parsed.args, name)
        if name not in parsed.typed:
            if typed != value:
                decisions.append(decision(name, value, 'the adapter has it'))
            setattr(parsed.args, name, value)
        elif name not in ('lora_target_modules', 'lora_modules_to_save') and typed != value:
            parsed.problems.add(
                f'--{name} {str(typed).lower()}: the adapter {parsed.args.adapter} was trained with --{name} '
                f'{str(value).lower()}. Remove --{name}, or train a new adapter without --adapter.'
            )


def _fill_model(
    parsed: Parsed[SftArguments], config: Mapping[str, Any], record: RunRecord | None, decisions: list[str]
) -> None:
    """If no model is typed, set the model to the base model of the adapter.

    Adds a problem if the adapter names no base model.
    """
    names = ('model_type', 'model_id_or_path')
    if parsed.typed & set(names):
        return
    found = {name: record.flags.get(name) for name in names} if record is not None else {}
    if not any(found.values()):
        found = {'model_id_or_path': config.get('base_model_name_or_path')}
    if not any(found.values()):
        parsed.problems.add(
            f'--adapter {parsed.args.adapter} does not say which base model it was trained on. Name the base '
            'model with --model_type or --model_id_or_path.'
        )
    for name, value in found.items():
        setattr(parsed.args, name, value)
        if value is not None:
            decisions.append(decision(name, value, 'the adapter was trained on it'))


def _fill_from_run(
    parsed: Parsed[SftArguments], record: RunRecord, decisions: list[str], warnings: list[str] | None = None
) -> None:
    """Set --template_type and --freeze_vision to the values that the adapter was trained with, unless they were typed.

    `record` is the record of the run that trained the adapter. If this changes the value of a flag, adds a line to
    `decisions`. If `warnings` is given, it gets a line if a typed flag has a different value, and a line if --system
    differs.
    """
    args = parsed.args
    for name in _OF_RUN:
        then = record.flags.get(name)
        if then is None:
            continue
        if name not in parsed.typed:
            if getattr(args, name) != then:
                decisions.append(decision(name, then, 'the adapter was trained with it'))
            setattr(args, name, then)
        elif getattr(args, name) != then and warnings is not None:
            warnings.append(f'--{name} {getattr(args, name)} is not what the adapter was trained with ({then}).')

    system = record.flags.get('system')
    if warnings is not None and system is not None and system != args.system:
        warnings.append(f"--system '{args.system}': the adapter was trained with '{system}'.")


def _fill_from_checkpoint(parsed: Parsed[SftArguments], decisions: list[str]) -> Parsed[SftArguments]:
    """Set the flags that describe the adapter and its base model to the values in the resumed checkpoint.

    Typed flags are not changed. If the command does not resume a run that began with --adapter, nothing is changed.
    Returns the command line.
    """
    if parsed.args.resume_from_checkpoint is None:
        return parsed
    checkpoint = Path(parsed.args.resume_from_checkpoint)
    try:
        record = find_record(checkpoint)
        if record is None or record.lineage is None or not is_adapter(checkpoint):
            return parsed
        config = read_adapter_config(checkpoint)
    except ConfigError:  # the checks of --resume_from_checkpoint report the damaged file
        return parsed

    own = [name for name in adapter_flags(config) if name not in parsed.typed]
    for name in own:
        setattr(parsed.args, name, adapter_flags(config)[name])
    decisions += [decision(name, getattr(parsed.args, name), 'the checkpoint has it') for name in own]
    _fill_model(parsed, config, record, decisions)
    _fill_from_run(parsed, record, decisions)
    return parsed


def find_lineage(
    args: SftArguments, info: ModelInfo, base_model: Mapping[str, str], warnings: list[str]
) -> dict[str, Any] | None:
    """Return a dictionary about the adapter from which a run starts. Returns None if the run starts without --adapter.

    The keys are path, sha256 (of the file with the adapter's weights), run (the name of its run folder, or None) and
    base. A resumed run has the dictionary of the earlier run.

    Raises ConfigError if the adapter was trained on different base weights. If the adapter has no hash of its base
    weights, only the names are compared: `warnings` gets a line if they differ, and `base` is 'not checked' instead of
    'checked'.
    """
    if args.resume_from_checkpoint is not None:
        resumed = find_record(Path(args.resume_from_checkpoint))
        return None if resumed is None or resumed.lineage is None else dict(resumed.lineage)
    if args.adapter is None:
        return None

    folder = Path(args.adapter)
    record = find_record(folder)
    trained_on = None if record is None else record.base_model
    if trained_on is None:
        _compare_names(folder, args, info, warnings)
    elif trained_on['sha256'] != base_model['sha256']:
        raise ConfigError(
            f'--adapter {folder}: the base weights differ: it was trained on {trained_on["source"]} (sha256 '
            f'{trained_on["sha256"][:12]}), but {base_model["source"]} was found (sha256 {base_model["sha256"][:12]}). '
            'An adapter is valid only for the weights it was trained on. Name them with --model_id_or_path.'
        )

    file = adapter_file(folder)
    assert file is not None, 'checked'
    return {
        'path': abbreviated(folder.absolute()),
        'sha256': sha256_of(file),
        'run': None if record is None else folder.absolute().parent.name,
        'base': 'not checked' if trained_on is None else 'checked',
    }


def _compare_names(folder: Path, args: SftArguments, info: ModelInfo, warnings: list[str]) -> None:
    """Add a warning if the adapter names a different base model than this run. Only the names are compared."""
    named = read_adapter_config(folder).get('base_model_name_or_path')
    own = {str(name).rstrip('/').rsplit('/', 1)[-1].lower() for name in (
        info.model_id_or_path, info.hf_model_id, info.public_id, args.model_id_or_path, args.model_type,
    ) if name}  # fmt: skip
    if named and str(named).rstrip('/').rsplit('/', 1)[-1].lower() not in own:
        warnings.append(
            f"--adapter {folder}: its {ADAPTER_CONFIG} names the base model '{named}', and this run trains on "
            f"'{info.public_id}'. An adapter is valid only for the weights it was trained on."
        )

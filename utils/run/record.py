"""Writes and reads sft_args.json, the record of how a run was trained.

The record is compared with the arguments if the run is resumed, or if llm_infer.py opens its checkpoint.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.checkpoint import last_checkpoint
from utils.base.errors import ConfigError, Problems
from utils.base.files import Keys, fits, read_json, write_json
from utils.base.logger import logger
from utils.base.names import SFT_ARGS
from utils.cli.arguments import GENERATION, HUB_FLAGS, InferArguments, SftArguments, flag_types, to_dict
from utils.cli.parser import Parsed
from utils.cli.scores import own_words, score_name
from utils.loading.folder import is_adapter
from utils.run.lock import DATA_FLAGS, check_same_data, flag_words, recorded

ANSWERS_JSON = 'answers.json'
PROOFS_JSON = 'proofs.json'
RUN_JSON = 'run.json'

_GIVE_RUN = 'Give a run folder, output/<model>/vN-<time>.'
_RESTORE = 'Put back the file that the run wrote.'
_RESUME_REMEDY = 'leave --resume_from_checkpoint out to start a new run'
# Flags that do not change how a run trains: they decide what the run shows, or how it is started.
_SHOWN = (
    'show_samples', 'report_samples', 'report_to', 'drift', 'compare_rows', 'from_run', 'doctor', 'verify',
)  # fmt: skip
# The hash of the template shows whether it differs. The same template may be at another path.
_OF_CHAT_TEMPLATE = ('chat_template', 'template_settings')
# The fields of sft_args.json that are not flags.
_FACTS: Keys = {
    'system_typed': bool | None,
    'base_model': (None, {'id': str | None, 'source': str, 'sha256': str, 'covers': str | None}),
    'asked': dict | None,
    'template_sha256': str | None,
    'thinking': str | None,
    'thinking_rows': (None, {'switched': int, 'of': int}),
    'lineage': (None, {'path': str, 'sha256': str}),
    'added_tokens': list[str] | None,
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of sft_args.json: how a run was trained. The file stores flags and other fields in one object."""

    # The value of every argument that the run used, by flag name, without secrets. Records of older versions may lack
    # newer flags.
    flags: Mapping[str, Any] = field(default_factory=dict)
    # Some flags are decided after the run was opened, from the machine, the model or the rows. For each of them, the
    # value before this decision.
    asked: Mapping[str, Any] = field(default_factory=dict)
    system_typed: bool = False
    # The base weights, with the keys `id`, `source`, `sha256` and `covers`.
    base_model: Mapping[str, str] | None = None
    template_sha256: str | None = None
    # The setting of the chat template that switches reasoning on, e.g. 'enable_thinking=True' (the "thinking switch").
    # It is set only if most trained replies were rendered with this setting.
    thinking: str | None = None
    # The number of replies that were rendered with the switch ("switched"), and of all replies examined ("of").
    thinking_rows: Mapping[str, int] | None = None

    # The adapter from which the run started (--adapter), as `find_lineage` of run/lineage.py returns it.
    lineage: Mapping[str, Any] | None = None
    # The tokens that the run added to the tokenizer of the base model (--new_tokens).
    added_tokens: Sequence[str] = ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunRecord:
        """Return the record, made from the content of an sft_args.json file."""
        facts = {name: content[name] for name in _FACTS if content.get(name) is not None}
        flags = {name: value for name, value in content.items() if name not in _FACTS}
        return cls(flags=flags, **facts)

    @classmethod
    def read(cls, folder: Path, *, remedy: str = _RESTORE) -> RunRecord:
        """Return the record in a folder.

        Raises ConfigError with `remedy` if sft_args.json is missing or damaged, or if a value has the wrong type.
        """
        flags = {name: (None, of) for name, of in flag_types(SftArguments).items()}
        return cls.from_json(read_json(folder / SFT_ARGS, keys={**flags, **_FACTS}, remedy=remedy))

    def to_json(self) -> dict[str, Any]:
        """Return the content for sft_args.json. Fields that the run did not set are left out."""
        content = {**self.flags, 'system_typed': self.system_typed}
        if self.base_model is not None:
            content['base_model'] = self.base_model
        if self.asked:
            content['asked'] = self.asked
        if self.template_sha256 is not None:
            content['template_sha256'] = self.template_sha256
        if self.thinking is not None or 'thinking' in self.asked:
            content['thinking'] = self.thinking
        if self.thinking_rows is not None:
            content['thinking_rows'] = self.thinking_rows
        if self.lineage is not None:
            content['lineage'] = self.lineage
        if self.added_tokens:
            content['added_tokens'] = list(self.added_tokens)
        return content

    def write(self, folder: Path) -> None:
        """Write sft_args.json to a folder, atomically."""
        write_json(folder / SFT_ARGS, self.to_json())

    def with_flags(self, **flags: Any) -> RunRecord:
        """Return a copy of the record with these flag values replaced."""
        return replace(self, flags={**self.flags, **flags})

    def with_decision(self, name: str, value: Any) -> RunRecord:
        """Return a copy of the record in which the flag or field `name` has the decided value.

        The field `asked` of the copy has the value from before. If `name` is decided several times, `asked` has the
        value from before the first decision.
        """
        if name in _FACTS:
            before = getattr(self, name)
            decided = replace(self, **{name: value})
        else:
            before = self.flags.get(name)
            decided = self.with_flags(**{name: value})

        return replace(decided, asked={**self.asked, name: self.asked.get(name, before)})


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint and the record of the run that wrote it."""

    checkpoint: Path
    record: RunRecord


def record_proof(run_dir: Path, name: str, outcome: dict[str, Any]) -> None:
    """Write the outcome of a check of the run to proofs.json, under the key `name`. Other entries are kept.

    The file is replaced atomically. Only the main process writes it.
    """
    if not dist.is_main():
        return
    file = run_dir / PROOFS_JSON
    proofs = read_json(file, remedy='Move or delete the file.') if file.is_file() else {}
    write_json(file, {**proofs, name: outcome})


def record_of(args: SftArguments, *, system_typed: bool, base_model: Mapping[str, str]) -> RunRecord:
    """Return the record of a run that starts with these arguments on these base weights."""
    return RunRecord(flags=to_dict(args), system_typed=system_typed, base_model=base_model)


def read_run_record(run_dir: Path) -> RunRecord:
    """Return the record of a run folder. Raises ConfigError if the folder is not a run folder."""
    if _holds_model(run_dir) and (run_dir / SFT_ARGS).is_file():  # a checkpoint repeats the record of its run
        parent = run_dir.absolute().parent
        remedy = f'Give the folder of its run: {parent}' if (parent / SFT_ARGS).is_file() else _GIVE_RUN
        raise ConfigError(f'{run_dir}: is a checkpoint, not a run folder. {remedy}')
    if not (run_dir / SFT_ARGS).is_file():
        raise ConfigError(f'{run_dir}: is not a run folder, because it has no {SFT_ARGS}. {_GIVE_RUN}')
    record = RunRecord.read(run_dir, remedy=_GIVE_RUN)
    if not fits(record.flags, {'sft_type': str, 'dataset': list[str]}):
        raise ConfigError(f'{run_dir / SFT_ARGS}: it does not say how a run was trained. {_GIVE_RUN}')
    return record


def find_record(checkpoint: Path) -> RunRecord | None:
    """Return the record in a checkpoint folder, else the record in its parent folder, else None.

    Raises ConfigError if the sft_args.json that is found is damaged.
    """
    for folder in (checkpoint, checkpoint.absolute().parent):
        if (folder / SFT_ARGS).is_file():
            return RunRecord.read(folder)
    return None


def open_checkpoint(checkpoint: Path, problems: Problems) -> Trained:
    """Return the checkpoint with the record of its run.

    If the checkpoint cannot be used, raises ConfigError with this problem and the earlier problems in `problems`.
    """
    if problem := _checkpoint_problem(checkpoint):
        problems.add(problem)
        problems.raise_if_any()
    record = find_record(checkpoint)
    assert record is not None, 'checked'
    return Trained(checkpoint=checkpoint, record=record)


def _holds_model(folder: Path) -> bool:
    return (folder / 'adapter_config.json').is_file() or (folder / 'config.json').is_file()


def _checkpoint_problem(checkpoint: Path) -> str | None:
    if not checkpoint.is_dir():
        return f'--ckpt_dir {checkpoint} is not a directory (looked in {checkpoint.absolute().parent}).'

    if not _holds_model(checkpoint):
        newest = last_checkpoint(checkpoint)
        remedy = f'It is a run folder: give {newest}.' if newest else 'Give a folder checkpoint-N of a run.'
        return (
            f'--ckpt_dir {checkpoint} is not a checkpoint: it holds neither adapter_config.json nor config.json. '
            f'{remedy}'
        )

    try:
        record = find_record(checkpoint)
    except ConfigError as error:
        return error.problems[0]
    if record is None or not record.flags:
        return (
            f'--ckpt_dir {checkpoint}: neither it nor its parent folder has an {SFT_ARGS} with content, so how it was '
            f'trained is unknown. Copy the {SFT_ARGS} of its run into it.'
        )
    return None


def fill_from_run(parsed: Parsed[InferArguments], trained: Trained, warnings: list[str]) -> Parsed[InferArguments]:
    """Set the flags that were not typed to their values in the training run, and return the command line.

    A checkpoint can come from anyone, so its record must not make this command send data, run a file or write a file.
    Therefore only flags that llm_sft.py has too are set. Flags such as --check_server, --llama_cpp and --result_path
    must be typed.

    Adds a problem if a different base model was typed. If the checkpoint is an adapter, a local path may be typed,
    because `check_base` compares the weights in it later. Adds a line to `warnings` if another typed flag differs from
    the training run. The flags of generation, --score, --seed and --hub may differ without a warning.
    """
    args = parsed.args
    record = trained.record
    if not is_adapter(trained.checkpoint):
        record = record.with_flags(model_id_or_path=args.ckpt_dir)  # a whole model is opened from the checkpoint
    flags = record.flags

    base = ('model_type', 'model_id_or_path')
    for name in base:
        typed = getattr(args, name)
        ids = (record.base_model or {}).values()
        if name not in parsed.typed or typed == flags.get(name) or typed in ids:
            continue
        # The base model may have been moved. `check_base` compares the weights in the folder by their sha256.
        may_be_moved = name == 'model_id_or_path' and Path(typed).exists() and is_adapter(trained.checkpoint)
        if not may_be_moved:
            parsed.problems.add(
                f"--{name} '{typed}' is not the base model of this checkpoint, which is "
                f"'{flags.get('model_type') or flags.get('model_id_or_path')}'. Leave --{name} out."
            )

    _use_saved_template(parsed, trained)
    if planted := sorted(
        name for name in flags if name in flag_types(InferArguments) and name not in flag_types(SftArguments)
    ):
        warnings.append(
            f'{trained.checkpoint}: its {SFT_ARGS} has {", ".join(f"--{name}" for name in planted)}, which no training '
            'run writes: not used. Type a flag to use it.'
        )
    of_training = flag_types(SftArguments)
    for name in (name for name in flag_types(InferArguments) if name in of_training):
        if name not in flags or name in ('ignore_args_error', 'output_dir', *_OF_CHAT_TEMPLATE):
            continue
        value = flags[name]
        if name == 'use_flash_attn' and value is not record.asked.get(name, value):
            continue  # the value depended on the machine used for training, so this machine decides again
        if name == 'score' and name not in parsed.typed:
            args.score = _built_in_scores(value, default=args.score, warnings=warnings)
        elif name not in parsed.typed:
            setattr(args, name, value)
        elif name not in (*base, *GENERATION, 'score', 'seed', 'hub') and getattr(args, name) != value:
            warnings.append(f'--{name} {getattr(args, name)} is not what the run was trained with ({value}).')
    return Parsed(args=args, typed=parsed.typed, problems=parsed.problems)


def _built_in_scores(words: Sequence[str], *, default: Sequence[str], warnings: list[str]) -> list[str]:
    """Return the built-in scores of a run, or `default` if it has none.

    Functions of the user (FILE.py:name) are left out, because a checkpoint must not decide which code is executed. A
    warning names them.
    """
    own = own_words(words)
    if own:
        warnings.append(
            f'--score: the run was also scored by {" ".join(own)}. A function of a file is only executed if it is '
            f'typed: add --score {" ".join(words)} to use it.'
        )
    return [word for word in words if word not in own] or list(default)


def _use_saved_template(parsed: Parsed[InferArguments], trained: Trained) -> None:
    """Set --chat_template to the copy in the checkpoint, if the run had --chat_template or --template_settings.

    The copy includes the settings of the run. Nothing is set if a different template is typed.
    """
    flags = trained.record.flags
    args = parsed.args
    is_other = 'chat_template' in parsed.typed or args.template_type not in (None, flags.get('template_type'))
    if not is_other and any(flags.get(name) is not None for name in _OF_CHAT_TEMPLATE):
        args.chat_template = str(trained.checkpoint)


def check_resumed(checkpoint: Path, record: RunRecord, data: dict[str, Any]) -> list[str]:
    """Compare this run with the run that it resumes. Return a warning for each changed flag that decides the training.

    `record` is the record of this run, and `data` is the entry `data` in the lock.json of this run. If the files of the
    resumed run are missing, a warning says what cannot be compared.

    Raises ConfigError if the base weights, the optimizer or the metric of the best checkpoint differ, or if the same
    data flags now give different rows.
    """
    resumed = find_record(checkpoint)
    if resumed is None:
        return [f'{checkpoint} has no {SFT_ARGS}, so the arguments cannot be compared with the arguments of its run.']

    problems = Problems()
    check_base(resumed, record.base_model or {}, problems)
    then = _asked(resumed)
    now = _asked(record)
    _check_resumed_optimizer(then, now, problems)
    _check_resumed_metric(then, now, problems)
    unchecked = []
    if all(recorded(then, name) == now[name] for name in DATA_FLAGS):
        unchecked = check_same_data(checkpoint, data, problems, remedy=_RESUME_REMEDY)
    problems.raise_if_any()

    return unchecked + [
        f'--{name} is {value}, the run that is resumed had {earlier}: the result will differ from it.'
        for name, value, earlier in changed_flags(resumed, record)
        if name not in _OF_CHAT_TEMPLATE
    ]


def _asked(record: RunRecord) -> dict[str, Any]:
    """Return the flags of a run as they were before its automatic decisions, which depend on the machine.

    The key `system_typed` says whether the user typed --system. The value of `new_tokens` is the list of tokens, not
    the path of a file.
    """
    facts = {'system_typed': record.system_typed, 'new_tokens': list(record.added_tokens)}
    return {**record.flags, **facts, **record.asked}


def changed_flags(earlier: RunRecord, record: RunRecord) -> list[tuple[str, Any, Any]]:
    """Return (name, value in `record`, value in `earlier`) of each flag that differs and decides how a run trains."""
    then = _asked(earlier)
    free = {'resume_from_checkpoint', 'adapter', 'output_dir', 'hub', 'preflight', 'push_to_hub', *_SHOWN, *HUB_FLAGS}
    return [
        (name, value, then[name])
        for name, value in _asked(record).items()
        if name in then and name not in free and value != then[name]
    ]


def _check_resumed_optimizer(then: Mapping[str, Any], now: Mapping[str, Any], problems: Problems) -> None:
    """Add a problem for each optimizer setting that must not change when a run is resumed, but differs.

    `then` and `now` are the flag values of the resumed run and of this run.
    """
    fixed = ['optim', 'full_weights']
    then = {'full_weights': 'fp32', **then}  # runs from before the flag
    if now['deepspeed_config_path'] is not None:
        # DeepSpeed restores these settings together with its optimizer.
        fixed += ['learning_rate', 'weight_decay', 'adam_beta1', 'adam_beta2', 'adam_epsilon']
    for name in fixed:
        typed = now[name]
        had = then.get(name, typed)
        same_update = {had, typed} == {'adamw_torch', 'adamw_torch_fused'}
        if had != typed and not same_update:
            problems.add(
                f'--{name} {typed}: the state of the resumed optimizer was written with --{name} {had}. '
                f'Type --{name} {had}, or leave --resume_from_checkpoint out to start a new run.'
            )


def _check_resumed_metric(then: Mapping[str, Any], now: Mapping[str, Any], problems: Problems) -> None:
    """Add a problem if the metric that decides which checkpoint is best differs from that of the resumed run.

    The checkpoint stores the best value so far, and values of two metrics cannot be compared.
    """
    metrics = [
        score_name(flags['score'][0]) if flags['predict_with_generate'] else 'loss'
        for flags in (
            {'score': ['rouge'], 'predict_with_generate': now['predict_with_generate'], **then},
            now,
        )
    ]
    if metrics[0] != metrics[1]:
        problems.add(
            f'--score: this run would choose its best checkpoint by {metrics[1]}, but the resumed run chose it by '
            f'{metrics[0]}. Type --predict_with_generate and --score as in the resumed run, or leave '
            '--resume_from_checkpoint out to start a new run.'
        )


def check_base(record: RunRecord, found: Mapping[str, str], problems: Problems) -> None:
    """Add a problem if the base weights `found` differ from the base weights that the checkpoint was trained on.

    If the record does not name these weights, a warning is logged instead.
    """
    trained = record.base_model
    if trained is None:
        logger.warning(
            f'{SFT_ARGS} does not name the base weights of the run, so the weights found here cannot be checked.'
        )
    elif trained['sha256'] != found['sha256']:
        problems.add(
            f'the base weights differ: this checkpoint was trained on {trained["source"]} (sha256 '
            f'{trained["sha256"][:12]}), but {found["source"]} was found (sha256 {found["sha256"][:12]}). '
            'Put back the weights that it was trained on.'
        )


def check_resumed_template(checkpoint: Path, record: RunRecord) -> None:
    """Raise ConfigError if the template has the same name as in the resumed run, but different content."""
    resumed = find_record(checkpoint) or RunRecord()
    then = resumed.template_sha256
    now = record.template_sha256
    same_name = resumed.flags.get('template_type') == record.flags['template_type']
    if then is None or now is None or then == now or not same_name:
        return
    raise ConfigError(
        f'--resume_from_checkpoint {checkpoint}: the template has changed since that run (its sha256 was '
        f'{then[:12]}, now it is {now[:12]}), so other prompts would be trained. '
        f'{_template_remedy(resumed.flags, record.flags)}, or {_RESUME_REMEDY}.'
    )


def _template_remedy(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the remedy that restores the template of the resumed run, as the beginning of a sentence."""
    words = []
    for name in _OF_CHAT_TEMPLATE:
        had = then.get(name)
        if had == now.get(name):
            continue
        words.append(f'leave --{name} out' if had is None else f'type {shlex.join(flag_words(name, had))}')
    remedy = ' and '.join(words) or 'put the template back'
    return remedy[0].upper() + remedy[1:]

"""--resume_from_checkpoint last: finds the newest undamaged checkpoint of a run that fits the command.

A run fits if it has the flags, data, base weights and number of processes of the command. So if a run is killed, the
same command continues it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.checkpoint import all_checkpoints, sha256_of
from utils.base.errors import ConfigError, Problems
from utils.base.files import read_json
from utils.base.logger import logger
from utils.base.names import LAST
from utils.base.system import is_held
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Ready, run_name
from utils.cli.resumed import TRAINER_STATE, check_resume, partial_checkpoints
from utils.loading.chat_template import hash_template_file
from utils.loading.weights import Weights
from utils.run.folder import run_dirs
from utils.run.lineage import adapter_file
from utils.run.lock import read_compared
from utils.run.new_tokens import find_new_tokens
from utils.run.outcome import read_outcome, use_commands
from utils.run.record import RUN_JSON, RunRecord, changed_flags, record_of

_SKIPPED = 'it is skipped.'


@dataclass(kw_only=True)
class Found:
    """The result of the search for a run to resume. If no run can be resumed, only `skipped` is set."""

    # The checkpoint to resume from.
    checkpoint: str | None = None
    # The folder of a run that fits and has trained all its steps.
    complete: str | None = None
    # The folder of a run that fits and is being trained now.
    running: str | None = None
    # One line for each run or checkpoint that was searched before the found one, with the reason why it was skipped.
    skipped: list[str] = field(default_factory=list)


def resume_last(done: Ready[SftArguments], weights: Weights, data: Mapping[str, Any]) -> bool:
    """Replace the value `last` of --resume_from_checkpoint by the path of a checkpoint, or by None.

    The checkpoint is the newest undamaged checkpoint of a run that fits this command. A run fits if it has the same
    flags, data, weights and number of processes. The value is None if there is no such checkpoint. If a checkpoint is
    found, --adapter is set to None, because the checkpoint holds the adapter.

    Returns True if nothing is left to train: the search found a complete run. Then the value stays `last`. The main
    process searches, and all processes get the same result. Raises ConfigError if another process trains the run now,
    or if a process does not have the folder of the checkpoint. If the value is not `last`, nothing is done, and False
    is returned.
    """
    args = done.args
    if args.resume_from_checkpoint != LAST:
        return False

    record = record_of(args, system_typed='system' in done.typed, base_model=weights.record(done.info))
    record = replace(record, added_tokens=find_new_tokens(args))
    found: Found = dist.from_all(find_last(args, record, data) if dist.is_main() else Found())[0]
    for line in found.skipped:
        logger.info(line)
    if found.running is not None:
        raise ConfigError(
            f'--resume_from_checkpoint last: {found.running} fits this command, and another process trains it now. '
            'Wait until it ends. To train a second run beside it, leave --resume_from_checkpoint out.'
        )
    if found.complete is not None:
        _tell_complete(Path(found.complete))
        return True

    if found.checkpoint is None:
        reason = f'no run in {_runs_folder(args)} can be resumed: a new run starts'
    else:
        reason = 'it is the newest whole checkpoint of a run with the same flags, data and weights'
        _check_everywhere(Path(found.checkpoint))
    done.decide('resume_from_checkpoint', found.checkpoint, reason)
    logger.info(done.decisions[-1])
    if found.checkpoint is not None and args.adapter is not None:
        done.decide('adapter', None, 'the run continues with the adapter in the checkpoint')
        logger.info(done.decisions[-1])

    if found.checkpoint is not None:
        for line in partial_checkpoints(Path(found.checkpoint).parent):
            logger.warning(line)
    return False


def _runs_folder(args: SftArguments) -> Path:
    return Path(args.output_dir) / run_name(args)


def _check_everywhere(checkpoint: Path) -> None:
    """Raise ConfigError if a process does not have the checkpoint, for example on a different machine."""
    is_here = dist.from_all(checkpoint.is_dir())
    if not all(is_here):
        raise ConfigError(
            f'--resume_from_checkpoint last: process 0 found {checkpoint}, and process {is_here.index(False)} has no '
            'such folder. Use an --output_dir that all machines share.'
        )


def find_last(args: SftArguments, record: RunRecord, data: Mapping[str, Any]) -> Found:
    """Search the runs of this model from the newest to the oldest for a run that this command can resume.

    `record` has the flags and the base weights of this command, as sft_args.json stores them. `data` has the hash of
    the rows of each data set of this command, as lock.json stores it. If --from_run names a run, that run is skipped,
    because this command trains it once more from its beginning.
    """
    found = Found()
    at_end = None
    repeated = args.from_run and Path(args.from_run).resolve()
    for run in run_dirs(_runs_folder(args)):
        if run.resolve() == repeated:
            continue
        if reason := _misfit(run, record, data):
            found.skipped.append(f'{run}: {reason}: {_SKIPPED}')
            continue
        if (run / RUN_JSON).is_file():
            found.complete = str(run)
            return found
        if is_held(run):
            found.running = str(run)
            return found

        for checkpoint in reversed(all_checkpoints(run)):
            problems = Problems()
            check_resume(checkpoint, args, problems)
            if problems.found:
                found.skipped.append(f'{problems.found[0].split(". ")[0].partition(" ")[2]}: {_SKIPPED}')
            elif _is_at_end(checkpoint):
                at_end = at_end or checkpoint
                found.skipped.append(f'{checkpoint} is of the last step, and {RUN_JSON} is missing: {_SKIPPED}')
            else:
                found.checkpoint = str(checkpoint)
                return found

    if at_end is not None:
        found.complete = str(at_end.parent)
    return found


def _misfit(run: Path, record: RunRecord, data: Mapping[str, Any]) -> str | None:
    """Return why this command cannot resume the earlier run in the folder `run`. Returns None if it can.

    `record` has the flags and the base weights of this command, as sft_args.json stores them. `data` has the hash of
    the rows of each data set of this command, as lock.json stores it.
    """
    try:
        earlier = RunRecord.read(run)
        lock = read_compared(run)
    except ConfigError as error:
        return error.problems[0].split('. ')[0]

    if reason := _other_adapter(lock, record):
        return reason
    if changed := changed_flags(earlier, record):
        return 'other flags, ' + ', '.join(f'--{name} {then} (now {now})' for name, now, then in changed)
    if lock.get('processes') != dist.world_size():
        return f'it was trained by {lock.get("processes")} processes (now {dist.world_size()})'
    if (earlier.base_model or {}).get('sha256') != (record.base_model or {}).get('sha256'):
        return 'other base weights'

    if record.flags.get('chat_template'):
        path = record.flags['chat_template']
        trained = (lock.get('chat_template') or {}).get('sha256')
        if trained is not None and trained != hash_template_file(Path(path)):
            return f'{path} has changed since'

    then = lock.get('data') or {}
    changed_rows = [
        name for name in sorted({*then, *data}) if then.get(name, {}).get('sha256') != data.get(name, {}).get('sha256')
    ]
    return f'other rows of {", ".join(changed_rows)}' if changed_rows else None


def _other_adapter(lock: Mapping[str, Any], record: RunRecord) -> str | None:
    """Return why an earlier run did not start from the adapter that this command names. Returns None if it did.

    `lock` is the lock.json of the earlier run, and `record` is the record of this command. If this command has no
    --adapter, the earlier run must have started without an adapter.
    """
    started_from = (lock.get('adapter') or {}).get('sha256')
    adapter = record.flags.get('adapter')
    if adapter is None:
        return None if started_from is None else 'it started from an adapter, and this command has no --adapter'

    file = adapter_file(Path(adapter))
    if file is None or sha256_of(file) != started_from:
        return f'it did not start from the adapter in {adapter}'
    return None


def _state(checkpoint: Path) -> dict[str, Any]:
    keys = {'global_step': int, 'max_steps': int, 'best_model_checkpoint': str | None}
    state: dict[str, Any] = read_json(checkpoint / TRAINER_STATE, keys=keys)
    return state


def _is_at_end(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written after the last step of its run."""
    state = _state(checkpoint)
    return bool(state['global_step'] >= state['max_steps'])


def _tell_complete(run: Path) -> None:
    """Log that a run is complete, and name its best checkpoint."""
    logger.info(f'{run} is complete: it has the flags, data and weights of this command. Nothing is left to train.')
    outcome = read_outcome(run)
    best = outcome.get('best_checkpoint')
    if best is None:
        logger.warning(f'{run} was ended after its last step and before {RUN_JSON} and the report were written.')
        newest = all_checkpoints(run)[-1]
        best = _state(newest).get('best_model_checkpoint') or newest

    logger.info(f'best checkpoint: {best}')
    for name, command in use_commands(best, outcome).items():
        logger.info(f'{name}: {command}')

"""Pushes checkpoints to a hub.

The files of a checkpoint are first staged: linked into a folder with the layout of the repository. Then a separate
process pushes this folder.

`python -m utils.export.push RUN_DIR` repeats failed pushes. It needs no GPU and does not load the model.
"""

from __future__ import annotations

if __name__ == '__main__':
    from utils.base.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.base.checkpoint import all_checkpoints
from utils.base.errors import ConfigError
from utils.base.files import Keys, check_keys, read_json, write_json
from utils.base.leak_scan import scan_for_push
from utils.base.logger import logger, set_up_logging
from utils.base.names import SFT_ARGS
from utils.export.model_card import model_card
from utils.hub import snapshot as hub
from utils.hub.clients import TOKEN_VARIABLES, DeniedError, GoneError
from utils.loading.tokenizer_files import PATTERNS
from utils.loading.unloaded import UNLOADED_FILE
from utils.run.curves import curves_of_scores, curves_of_sets, plot_curves
from utils.run.record import RUN_JSON, RunRecord, read_run_record

# Files that are pushed from a checkpoint: all files that are needed to open the model. The optimizer, the trainer's
# state and sft_args.json are never pushed.
PUSHED = (
    'adapter_config.json', 'adapter_model.safetensors', 'config.json', 'generation_config.json', 'model.safetensors',
    'model-*-of-*.safetensors', UNLOADED_FILE, 'model.safetensors.index.json', *PATTERNS, '*processor_config.json',
    'processor.json',
)  # fmt: skip
CURVES = ('loss', 'eval_loss', 'eval_rouge-l')
# Seconds to wait before each retry.
_WAITS = (5, 30)
_STAGED = '.push'
_DAMAGED = 'Restore the file that the run wrote.'
# The types of what is read from the files of a run.
_DATA_KEYS = (None, {'train': (None, {'rows': float | None}), 'validation': (None, {'rows': float | None})})
_OUTCOME_KEYS: Keys = {'best_checkpoint': str | None, 'data': _DATA_KEYS}
_STATE_KEYS: Keys = {'global_step': int, 'log_history': [{'step': float}]}
_PROGRESS_KEYS: Keys = {'step': int, 'log_history': [{'step': float}], 'data': _DATA_KEYS}
_HUB_KEYS: Keys = {
    'hub': str,
    'hub_model_id': str | None,
    'hub_private_repo': bool,
    'push_hub_strategy': str,
    'base_model': {'id': str, 'sha256': str, 'covers': str},
}


def folder_in_repo(strategy: str, checkpoint: str) -> str:
    """Return the name of the folder in the repository to which a checkpoint is pushed. '' is the root folder."""
    return {'checkpoint': 'last-checkpoint', 'all_checkpoints': checkpoint}.get(strategy, '')


def stage(run_dir: Path, checkpoint: Path, *, strategy: str, progress: dict[str, Any]) -> Path:
    """Make a folder in which the files of a checkpoint have the layout of the repository, and return the folder.

    The files are hard links, or copies if the file system has no hard links. So they remain if the checkpoint is
    deleted. `progress`, which the model card shows, is written to <folder>.json.
    """
    target = run_dir / _STAGED / checkpoint.name
    shutil.rmtree(target, ignore_errors=True)
    inside = target / folder_in_repo(strategy, checkpoint.name)
    inside.mkdir(parents=True)

    for file in sorted({f for pattern in PUSHED for f in checkpoint.glob(pattern)}):
        staged = inside / file.relative_to(checkpoint)
        staged.parent.mkdir(exist_ok=True)
        try:
            os.link(file, staged)
        except OSError:  # the run folder is on a file system without hard links
            shutil.copy2(file, staged)

    write_json(target.with_suffix('.json'), progress)
    return target


def staged_folders(run_dir: Path) -> list[Path]:
    """Return the staged folders of a run that have not been pushed yet, oldest first."""
    return [p for p in all_checkpoints(run_dir / _STAGED) if p.with_suffix('.json').is_file()]


def unstage(folder: Path) -> None:
    """Delete a staged folder and its file <folder>.json."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix('.json').unlink(missing_ok=True)


def _record(run_dir: Path) -> RunRecord:
    """Return the record of a run. Raises ConfigError if the record does not say how the run is pushed."""
    record = read_run_record(run_dir)
    found = {**record.flags, 'base_model': record.base_model}
    check_keys(found, _HUB_KEYS, str(run_dir / SFT_ARGS), remedy=_DAMAGED)
    return record


def push_one(run_dir: Path, folder: Path) -> None:
    """Push a staged folder with a model card, and delete the folder.

    The model card is also written to README.md of the run folder. Before the push, the folder is searched for secrets
    and pickles. A failed push is repeated after 5 and after 30 seconds, unless the hub refuses it.

    Raises ConfigError if there is no token, if a secret or a pickle is found, or if the last push fails. In these cases
    the folder is kept.
    """
    record = _record(run_dir)
    flags = record.flags
    progress = read_json(folder.with_suffix('.json'), keys=_PROGRESS_KEYS, remedy=_DAMAGED)
    token = hub.find_token(None, flags['hub'])
    if token is None:
        raise ConfigError(
            f'{folder.name}: pushing needs a token. Set the environment variable {TOKEN_VARIABLES[flags["hub"]]}.'
        )

    shown = {'step', *CURVES, *curves_of_scores(flags), *curves_of_sets(flags)}
    history = [{k: v for k, v in e.items() if k in shown} for e in progress['log_history']]
    pictures = [f'images/{path.name}' for path in plot_curves(history, folder / 'images', flags)]
    name = flags['hub_model_id'].rsplit('/', 1)[-1]
    card = model_card(name, record, progress, pictures)
    (folder / 'README.md').write_text(card, encoding='utf-8')
    (run_dir / 'README.md').write_text(card, encoding='utf-8')

    if found := scan_for_push(folder, token):
        raise ConfigError(
            f'{folder.name}: not pushed, because of what it contains: {"; ".join(found)}. Remove that from '
            f'{folder}, then run python -m utils.export.push {run_dir}.'
        )

    for wait in (*_WAITS, None):
        try:
            repo = hub.push_folder(
                folder,
                repo=flags['hub_model_id'],
                hub=flags['hub'],
                token=token,
                private=flags['hub_private_repo'],
                message=f'Upload {folder.name}',
            )
            break
        except Exception as error:  # the hub clients raise many types of exceptions
            lines = str(error).replace(token, '<token>').strip().splitlines() or ['']
            problem = f'{folder.name}: {type(error).__name__}: {lines[0]}'
            if wait is None or isinstance(error, DeniedError | GoneError):
                raise ConfigError(
                    f'{problem}. The folder is kept. To push it again, run python -m utils.export.push {run_dir}.'
                ) from None
            logger.warning(f'{problem}; trying again in {wait} s')
            time.sleep(wait)

    unstage(folder)
    logger.info(f'pushed {folder.name} to {flags["hub"]}:{repo}')


def _outcome(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json. Returns an empty dict if the run has not ended."""
    file = run_dir / RUN_JSON
    return read_json(file, keys=_OUTCOME_KEYS, remedy=_DAMAGED) if file.is_file() else {}


def _promised(run_dir: Path, record: RunRecord) -> list[Path]:
    """Return the existing checkpoints that --push_hub_strategy selects, newest last."""
    existing = all_checkpoints(run_dir)
    if record.flags['push_hub_strategy'] == 'all_checkpoints':
        return existing
    if record.flags['push_hub_strategy'] == 'push_best' and (found := _outcome(run_dir).get('best_checkpoint')):
        best = Path(found).name
        return [p for p in existing if p.name == best] or existing[-1:]
    return existing[-1:]


def push_again(run_dir: Path) -> None:
    """Push the staged folders of a run. If there are none, push the checkpoints that --push_hub_strategy selects.

    Raises ConfigError if the run has no repository or no checkpoint, or if a push fails. The folders after a failed
    push are not pushed.
    """
    record = _record(run_dir)
    if not record.flags.get('hub_model_id'):
        raise ConfigError(
            f'{run_dir}: the run has no repository, because it was trained without --push_to_hub true. '
            'Set hub_model_id in its sft_args.json to the name of a repository, as repo or user/repo.'
        )

    folders = staged_folders(run_dir)
    if not folders:
        run = _outcome(run_dir)
        for checkpoint in _promised(run_dir, record):
            state = read_json(checkpoint / 'trainer_state.json', keys=_STATE_KEYS, remedy=_DAMAGED)
            progress = {'step': state['global_step'], 'log_history': state['log_history'], 'data': run.get('data')}
            folders.append(stage(run_dir, checkpoint, strategy=record.flags['push_hub_strategy'], progress=progress))
    if not folders:
        raise ConfigError(f'{run_dir}: has no checkpoint to push. Name another run folder.')

    for folder in folders:
        push_one(run_dir, folder)


def main(argv: Sequence[str]) -> int:
    """Repeat the pushes of a run (argv: RUN_DIR), or push one staged checkpoint (argv: RUN_DIR CHECKPOINT).

    Returns the exit code: 0, or 2 for a problem.
    """
    set_up_logging()
    if len(argv) not in (1, 2) or argv[0].startswith('-'):
        print('usage: python -m utils.export.push RUN_DIR', file=sys.stderr)
        return 2
    try:
        if len(argv) == 2:
            push_one(Path(argv[0]), Path(argv[0]) / _STAGED / argv[1])
        else:
            push_again(Path(argv[0]))
    except ConfigError as error:
        logger.error('\n'.join(error.problems))
        return 2
    except OSError as error:
        where = error.filename or argv[0]
        logger.error(f'{where}: the push stopped: {error.strerror}. Correct the permissions, or free disk space.')
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

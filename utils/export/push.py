"""Checkpoints on their way to a hub: set aside in the run folder, then pushed by a program of its own.

`python -m utils.export.push RUN_DIR` pushes again what did not arrive. It needs no GPU and no model in memory.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.base.checkpoint import all_checkpoints
from utils.base.errors import ConfigError
from utils.base.files import read_json, write_json
from utils.base.leak_scan import scan_for_push
from utils.base.logger import logger, set_up_logging
from utils.export.model_card import model_card
from utils.hub import snapshot as hub
from utils.hub.clients import TOKEN_VARIABLES, DeniedError, GoneError
from utils.run.curves import plot_curves
from utils.run.record import RUN_JSON, RunRecord, read_run_record

# What is pushed of a checkpoint: what opens the model. Never the optimizer, the trainer's state or sft_args.json.
PUSHED = (
    'adapter_config.json', 'adapter_model.safetensors', 'config.json', 'generation_config.json', 'model.safetensors',
    'model-*-of-*.safetensors', 'model.safetensors.index.json', 'tokenizer.json', 'tokenizer_config.json',
    'tokenizer.model', 'special_tokens_map.json', 'added_tokens.json', 'vocab.*', 'merges.txt', '*.tiktoken',
    'chat_template.*', '*processor_config.json', 'processor.json',
)  # fmt: skip
CURVES = ('loss', 'eval_loss', 'eval_rouge-l')
# Seconds before each further attempt.
_WAITS = (5, 30)
_ASIDE = '.push'
_DAMAGED = 'Put back the one that the run wrote.'


def folder_in_repo(strategy: str, checkpoint: str) -> str:
    """Return where a checkpoint goes in the repository: '' is the top."""
    return {'checkpoint': 'last-checkpoint', 'all_checkpoints': checkpoint}.get(strategy, '')


def set_aside(run_dir: Path, checkpoint: Path, *, strategy: str, progress: dict[str, Any]) -> Path:
    """Return a folder laid out as the repository will be, of hard links that outlive the checkpoint's deletion."""
    target = run_dir / _ASIDE / checkpoint.name
    shutil.rmtree(target, ignore_errors=True)
    inside = target / folder_in_repo(strategy, checkpoint.name)
    inside.mkdir(parents=True)
    for file in sorted({f for pattern in PUSHED for f in checkpoint.glob(pattern)}):
        try:
            os.link(file, inside / file.name)
        except OSError:  # another file system
            shutil.copy2(file, inside / file.name)
    write_json(target.with_suffix('.json'), progress)
    return target


def waiting(run_dir: Path) -> list[Path]:
    """Return the folders set aside that were not pushed, the oldest first."""
    return [p for p in all_checkpoints(run_dir / _ASIDE) if p.with_suffix('.json').is_file()]


def forget(folder: Path) -> None:
    """Remove a folder set aside."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix('.json').unlink(missing_ok=True)


def push_one(run_dir: Path, folder: Path) -> None:
    """Write the model card, look for what must not leave, and push; raises ConfigError where that stops it."""
    record = read_run_record(run_dir)
    flags = record.flags
    progress = read_json(folder.with_suffix('.json'), remedy=_DAMAGED)
    token = hub.find_token(None, flags['hub'])
    if token is None:
        raise ConfigError(f'pushing needs a token: set the environment variable {TOKEN_VARIABLES[flags["hub"]]}.')
    history = [{k: v for k, v in e.items() if k in ('step', *CURVES)} for e in progress['log_history']]
    pictures = [f'images/{path.name}' for path in plot_curves(history, folder / 'images')]
    name = flags['hub_model_id'].rsplit('/', 1)[-1]
    card = model_card(name, record, progress, pictures)
    (folder / 'README.md').write_text(card, encoding='utf-8')
    (run_dir / 'README.md').write_text(card, encoding='utf-8')
    if found := scan_for_push(folder, token):
        raise ConfigError(
            f'{folder.name} was not pushed, because it holds what must not leave this machine: {"; ".join(found)}. '
            'Remove it from the checkpoint, then push again.'
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
        except Exception as error:  # the clients raise many kinds
            told = str(error).replace(token, '<token>').strip().splitlines() or ['']
            if wait is None or isinstance(error, DeniedError | GoneError):
                raise ConfigError(
                    f'{folder.name}: {type(error).__name__}: {told[0]}. It is kept: push it again.'
                ) from None
            logger.warning(f'{folder.name}: {type(error).__name__}: {told[0]}; trying again in {wait} s')
            time.sleep(wait)
    forget(folder)
    logger.info(f'pushed {folder.name} to {flags["hub"]}:{repo}')


def _outcome(run_dir: Path) -> dict[str, Any]:
    """Return what the end of a run wrote, empty where it has not ended."""
    file = run_dir / RUN_JSON
    return read_json(file, remedy=_DAMAGED) if file.is_file() else {}


def _promised(run_dir: Path, record: RunRecord) -> list[Path]:
    """Return the checkpoints that the strategy promises and that are still there, the newest last."""
    there = all_checkpoints(run_dir)
    strategy = record.flags['push_hub_strategy']
    if strategy == 'all_checkpoints':
        return there
    if strategy == 'push_best' and (found := _outcome(run_dir).get('best_checkpoint')):
        best = Path(found).name
        return [p for p in there if p.name == best] or there[-1:]
    return there[-1:]


def push_again(run_dir: Path) -> None:
    """Push what the run's strategy promises: what is set aside still, else what its checkpoints hold."""
    record = read_run_record(run_dir)
    if not record.flags.get('hub_model_id'):
        raise ConfigError(f'{run_dir} was trained without --push_to_hub true, so it names no repository.')
    folders = waiting(run_dir)
    if not folders:
        run = _outcome(run_dir)
        for checkpoint in _promised(run_dir, record):
            state = read_json(checkpoint / 'trainer_state.json', remedy=_DAMAGED)
            progress = {'step': state['global_step'], 'log_history': state['log_history'], 'data': run.get('data')}
            folders.append(
                set_aside(run_dir, checkpoint, strategy=record.flags['push_hub_strategy'], progress=progress)
            )
    if not folders:
        raise ConfigError(f'{run_dir} has no checkpoint to push.')
    for folder in folders:
        push_one(run_dir, folder)


def main(argv: Sequence[str]) -> int:
    """Push from a run folder: what one push of a training needs (RUN_DIR CHECKPOINT), or all again (RUN_DIR)."""
    set_up_logging()
    if len(argv) not in (1, 2) or argv[0].startswith('-'):
        print('usage: python -m utils.export.push RUN_DIR', file=sys.stderr)
        return 2
    try:
        if len(argv) == 2:
            push_one(Path(argv[0]), Path(argv[0]) / _ASIDE / argv[1])
        else:
            push_again(Path(argv[0]))
    except ConfigError as error:
        logger.error('\n'.join(error.problems))
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

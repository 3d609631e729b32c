"""Writes, verifies and deletes checkpoint folders.

A checkpoint is complete or absent. Its manifest.json holds the size and the sha256 of each file, except
generation_config.json.
This module imports only the standard library and other modules of utils/base.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path

from utils.base.files import use_default_modes
from utils.base.system import flush_to_disk

MANIFEST = 'manifest.json'
OPTIMIZER_STATE = 'optimizer.safetensors'
PROCESS_STATES = 'process_states.safetensors'
DEEPSPEED_STATES = 'global_step*'
# Suffixes of pickle files. Only DeepSpeed writes such files into a checkpoint. proofs.json lists them.
PICKLE_SUFFIXES = ('.bin', '.pt', '.pth', '.pkl')
_PREFIX = 'checkpoint-'
# llm_infer.py overwrites this file with its generation settings; training never reads the file.
_MAY_CHANGE = 'generation_config.json'


def partial_name(checkpoint: Path) -> Path:
    """Return the temporary folder in which a checkpoint is written. `seal` renames the folder when it is complete."""
    return checkpoint.with_name(f'.{checkpoint.name}.partial')


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, from the oldest to the newest."""
    found = [p for p in run_dir.glob(f'{_PREFIX}*') if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def last_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint folder of a run. Returns None if the run has no checkpoint."""
    return next(reversed(all_checkpoints(run_dir)), None)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open('rb') as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hashes(files: Collection[Path]) -> list[str]:
    """Return the sha256 of each file, in the order of `files`. Threads hash the files in parallel."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(sha256_of, files))


def seal(partial: Path, checkpoint: Path) -> None:
    """Turn the folder `partial`, which holds all files of a checkpoint, into the checkpoint.

    Writes the manifest, flushes everything to the disk, and then renames `partial` to `checkpoint`.
    """
    use_default_modes(partial)
    all_files = [p for p in partial.rglob('*') if p.is_file()]
    for path in all_files:
        flush_to_disk(path)

    files = sorted(p for p in all_files if p.name != _MAY_CHANGE)
    entries = {
        str(path.relative_to(partial)): {'bytes': path.stat().st_size, 'sha256': digest}
        for path, digest in zip(files, _hashes(files), strict=True)
    }
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({'files': entries}, indent=1) + '\n', encoding='utf-8')

    for path in [manifest, *(p for p in partial.rglob('*') if p.is_dir()), partial]:
        flush_to_disk(path)
    partial.rename(checkpoint)
    flush_to_disk(checkpoint.parent)


def damage(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be used, as text for a message. Returns None if all its files are intact.

    Files that manifest.json does not name are not checked.
    """
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding='utf-8'))['files'].items()
        files = {checkpoint / name: (entry['bytes'], entry['sha256']) for name, entry in entries}
    except FileNotFoundError:
        return f'it has no {MANIFEST}, which is written last: it is incomplete'
    except (ValueError, KeyError, TypeError, AttributeError):
        return f'its {MANIFEST} cannot be read: it is corrupted'

    for path, (size, _) in files.items():
        if not path.is_file():
            return f'{path.name} is missing'
        if path.stat().st_size != size:
            return f'{path.name} has {path.stat().st_size} bytes, it was written with {size}'

    for (path, (_, wanted)), digest in zip(files.items(), _hashes(files), strict=True):
        if digest != wanted:
            return f'{path.name} is corrupted: its bytes are not those that were written (sha256 differs)'
    return None


def remove(folder: Path) -> None:
    """Delete a checkpoint. The folder is renamed first, so that no process uses a partly deleted checkpoint."""
    renamed = folder.with_name(f'.{folder.name.removeprefix(".")}.removed')
    folder.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def rotate(run_dir: Path, *, limit: int, best: str | None, keep_last: bool = True) -> None:
    """Delete the oldest checkpoints until `limit` remain. A limit of 0 or below keeps all checkpoints.

    The best checkpoint (`best` is its path) is never deleted, so more than `limit` may remain. The last checkpoint is
    deleted only if `keep_last` is False and there is a best checkpoint.
    """
    found = all_checkpoints(run_dir)
    protected = {p for p in found if best is not None and p.resolve() == Path(best).resolve()}
    if keep_last or not protected:
        protected.update(found[-1:])

    if limit <= 0:
        return
    surplus = max(len(found) - max(limit, len(protected)), 0)
    for checkpoint in [p for p in found if p not in protected][:surplus]:
        remove(checkpoint)

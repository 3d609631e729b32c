"""Files made once per machine and reused: complete or absent, checked when opened, bounded in size."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from utils.base.errors import ConfigError
from utils.base.logger import logger

_SUMS = 'sha256.json'
_ASIDE = '.aside-'
_DEFAULT_GIB = 20.0


def cache_dir() -> Path:
    """Return the folder for files made once per machine: $ASSAY_CACHE, else assay/ in the user's cache."""
    named = os.environ.get('ASSAY_CACHE')
    return Path(named) if named else Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'assay'


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cache folder `<kind>-<key>`, made on the first call and wherever a file of it is not as written.

    `make` fills a folder aside, which is then renamed: no one sees half of it. Folders of the kind that were not used
    for longest are removed when all of them exceed $ASSAY_CACHE_GIB (20 where it is not set).
    """
    target = cache_dir() / name
    if _is_whole(target):
        os.utime(target)
        logger.info(f'reused: {target}')
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=_ASIDE))
        try:
            make(aside)
            sums = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
            (aside / _SUMS).write_text(json.dumps(sums), encoding='utf-8')
            if not _is_whole(target):  # another process may have been first
                shutil.rmtree(target, ignore_errors=True)
                aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _bound(target)
    except OSError as error:
        raise ConfigError(
            f'the cache folder {target.parent} cannot be written: {error.strerror}. '
            'Name another with the environment variable ASSAY_CACHE.'
        ) from error
    return target


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open('rb') as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_whole(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        sums = json.loads((folder / _SUMS).read_text(encoding='utf-8'))
        whole = all(_sha256(folder / name) == wanted for name, wanted in sums.items())
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        logger.warning(f'{folder} is damaged: it is made anew')
    return whole


def _limit_gib() -> float:
    given = os.environ.get('ASSAY_CACHE_GIB')
    try:
        return float(given) if given else _DEFAULT_GIB
    except ValueError:
        raise ConfigError(f"the environment variable ASSAY_CACHE_GIB takes a number of GiB, got '{given}'.") from None


def _bound(newest: Path) -> None:
    """Remove what was not used for longest, and what a killed process left aside."""
    limit = _limit_gib() * 2**30
    kind = newest.name.partition('-')[0]
    folders = sorted(newest.parent.glob(f'{kind}-*'), key=lambda f: f.stat().st_mtime, reverse=True)
    for folder in [newest, *(f for f in folders if f != newest)]:
        limit -= sum(file.stat().st_size for file in folder.iterdir())
        if limit < 0 and folder != newest:
            logger.info(f'removed from the cache: {folder}')
            shutil.rmtree(folder, ignore_errors=True)
    for folder in newest.parent.glob(f'{_ASIDE}*'):
        if folder.stat().st_mtime < time.time() - 86400:
            shutil.rmtree(folder, ignore_errors=True)

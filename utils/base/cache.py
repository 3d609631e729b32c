"""A cache of files that are made once per machine. A cache folder is complete or absent, and is verified when opened.

The total size of the cache is limited.
"""

from __future__ import annotations

import errno
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
_TEMPORARY = '.aside-'
_DEFAULT_GIB = 20.0
_DAY_SECONDS = 86400
# The errors of a write that name no file: the disk or the quota is full, or the file is too large.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_dir() -> Path:
    """Return the cache folder of this project.

    It is $ASSAY_CACHE if this variable is set, else $XDG_CACHE_HOME/assay, else ~/.cache/assay.
    """
    named = os.environ.get('ASSAY_CACHE')
    if named:
        return Path(named)

    user_cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(user_cache) / 'assay'


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cache folder `name`, which has the form `<kind>-<key>`. Makes the folder if it is absent or damaged.

    `make` writes the files to a temporary folder, which is then renamed. So no process sees an incomplete folder. If
    all folders of the same kind together then exceed $ASSAY_CACHE_GIB (default 20), the least recently used ones are
    removed. Raises ConfigError if the cache cannot be written, or if $ASSAY_CACHE_GIB is not a number. Any other error
    of `make` is raised unchanged, for example if it cannot read a file.
    """
    target = cache_dir() / name
    if _is_whole(target):
        os.utime(target)
        logger.info(f'reused: {target}')
        return target

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=_TEMPORARY))
        try:
            make(temporary)
            sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
            (temporary / _SUMS).write_text(json.dumps(sums), encoding='utf-8')

            if not _is_whole(target):  # another process may have made the folder
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_surplus(target)
    except OSError as error:
        if not _is_of_cache(error, target.parent):
            raise
        raise ConfigError(
            f'{target.parent}: the cache folder cannot be written: {error.strerror}. '
            'Set the environment variable ASSAY_CACHE to another folder.'
        ) from error
    return target


def _is_of_cache(error: OSError, folder: Path) -> bool:
    """Return whether an error names a file in the cache. An error of a full disk names no file, and counts too."""
    if error.filename is None:
        return error.errno in _FULL
    named = Path(os.fsdecode(error.filename)).absolute()
    own = folder.absolute()
    return own.is_relative_to(named) or named.is_relative_to(own)


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
        logger.warning(f'{folder}: this cache folder is damaged and is made again.')
    return whole


def _limit_gib() -> float:
    given = os.environ.get('ASSAY_CACHE_GIB')
    try:
        return float(given) if given else _DEFAULT_GIB
    except ValueError:
        raise ConfigError(
            f"ASSAY_CACHE_GIB: this variable takes a number of GiB, got '{given}'. Set a number, or unset the variable."
        ) from None


def _remove_surplus(newest: Path) -> None:
    """Remove the least recently used folders of the same kind as `newest`, until the rest fits into the size limit.

    `newest` is always kept. Temporary folders older than a day are removed too. They are left by killed processes.
    """
    kind = newest.name.partition('-')[0]
    folders = sorted(newest.parent.glob(f'{kind}-*'), key=lambda f: f.stat().st_mtime, reverse=True)
    bytes_left = _limit_gib() * 2**30

    for folder in [newest, *(f for f in folders if f != newest)]:
        bytes_left -= sum(file.stat().st_size for file in folder.iterdir())
        if bytes_left < 0 and folder != newest:
            logger.info(f'removed from the cache: {folder}')
            shutil.rmtree(folder, ignore_errors=True)

    for folder in newest.parent.glob(f'{_TEMPORARY}*'):
        if folder.stat().st_mtime < time.time() - _DAY_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)

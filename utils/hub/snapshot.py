"""Finds models and data sets on the hubs, and downloads each only once per machine.

If a hub cannot be reached, files that were downloaded before are used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from utils.base.cache import cache_dir
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import HubName, Kind
from utils.base.system import locked
from utils.hub.clients import (
    TOKEN_VARIABLES,
    Client,
    DeniedError,
    GoneError,
    Listed,
    Listing,
    Repo,
    UnreachableError,
    connect,
)

T = TypeVar('T')

# Seconds before each retry after a failure that may be temporary. The packages of the hubs also retry.
_WAITS = (1.0, 4.0)
# The file name of a shard, e.g. model-00002-of-00005.safetensors.
_SHARD = re.compile(r'(.*?)(\d{5})-of-(\d{5})(.*)')
_CONTINUE = 'Downloaded files are kept: run the same command again to continue.'


def find_token(typed: str | None, hub: HubName) -> str | None:
    """Return the token that the user typed. If none was typed, return the token in the environment variable of the hub.

    Returns None if there is no token. The token is never logged or saved.
    """
    return typed or os.environ.get(TOKEN_VARIABLES[hub]) or None


def repos_of(hub: HubName, ids: dict[HubName, Sequence[str]], *, revision: str = 'master') -> list[Repo]:
    """Return the repositories in the order in which they are tried. Repositories on `hub` come first.

    `ids` is a dict from hub to the ids on this hub.
    """
    order = sorted(ids, key=lambda name: name != hub)
    return [Repo(hub=name, id=repo_id, revision=revision) for name in order for repo_id in ids[name]]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A repository that was found, and the size and digest of each of its files.

    `online` is False if a hub could not be reached. Then `files` are the files at the last download. If another program
    downloaded the repository, they are the files in its folder.
    """

    repo: Repo
    kind: Kind
    files: dict[str, Listed]
    online: bool
    client: Client
    # The newest commit of the revision. '' if it is not known.
    commit: str = ''

    def fetch(self, names: Sequence[str]) -> Path:
        """Download the files that are not on this machine yet, and return the folder that contains all `names`.

        Only one process of a machine downloads at a time. The others wait, and then find the files. Raises
        ConfigError if the files cannot be downloaded.
        """
        record = _record_file(self.repo, self.kind)
        with locked(record.with_suffix('.lock')):
            recorded, verified = _read_record(record)
            needed = self.to_fetch(names)
            if not needed:
                return self.client.cached(self.repo, self.kind)
            if not self.online:
                folder = self.client.cached(self.repo, self.kind)
                raise ConfigError(_incomplete_offline(self.repo, self.kind, folder, needed))

            try:
                folder = _with_retries(self.repo, functools.partial(self.client.download, self.repo, self.kind, names))
            except (GoneError, DeniedError, UnreachableError) as error:
                remedy = f'{_token_remedy(self.repo)} ' if isinstance(error, DeniedError) else ''
                raise ConfigError(
                    f'{self.kind} {self.repo}: the download stopped: {_one_line(error)}. {remedy}{_CONTINUE}'
                ) from error

            if absent := self._absent(folder, names):
                raise ConfigError(
                    f'{self.kind} {self.repo}: {absent[0]} is missing or differs from the list of the hub '
                    f'(number of such files: {len(absent)}). Remove {folder} and run the same command again.'
                )
            still_verified = verified if recorded.files == self.files else set()
            _save_record(record, Listing(files=self.files, commit=self.commit), still_verified | set(names))
        return folder

    def to_fetch(self, names: Sequence[str]) -> list[str]:
        """Return the names of the files that `fetch` would request from the hub.

        Usually these are the files that are missing on this machine or have a wrong size. If a file has changed on the
        hub, or if one of `names` was never downloaded by `fetch`, all `names` are requested. Then the Python package of
        the hub compares them with the hub. If the hub cannot be reached, only missing files and files of a wrong size
        are returned.
        """
        recorded, verified = _read_record(_record_file(self.repo, self.kind))
        if self.online and not (recorded.files == self.files and verified >= set(names)):
            return list(names)
        return self._absent(self.client.cached(self.repo, self.kind), names)

    def _absent(self, folder: Path, names: Sequence[str]) -> list[str]:
        """Return the names of the files that are missing in the folder, or whose size is not the size on the hub."""
        absent = []
        for name in dict.fromkeys(names):
            path = folder / name
            size, _ = self.files[name]
            if not path.is_file() or size not in (None, path.stat().st_size):
                absent.append(name)
        return absent


def find(repos: Sequence[Repo], kind: Kind, *, remedy: str = '') -> Snapshot:
    """Return the first repository of the list that exists on its hub.

    The repositories are tried in order. If a hub cannot be reached, this repository and all later ones are looked for
    only in the cache of this machine. Raises ConfigError if no repository is found, if a hub refuses the account, or if
    the list of files cannot be fetched. `remedy` is appended to the message if no repository is found.
    """
    gone: list[str] = []
    for index, repo in enumerate(repos):
        client = connect(repo.hub, find_token(None, repo.hub))
        try:
            listing = _with_retries(repo, functools.partial(client.list_files, repo, kind))
        except GoneError:
            gone.append(str(repo))
            if index + 1 < len(repos):
                logger.warning(f'{kind} {repo} is not found (404): trying {repos[index + 1]}')
            continue
        except DeniedError as error:
            raise ConfigError(
                f'{kind} {repo}: the hub refuses this account ({_one_line(error)}). {_token_remedy(repo)}'
            ) from error
        except UnreachableError as error:
            return _find_cached(repos[index:], kind, why=_one_line(error), remedy=remedy)
        return Snapshot(repo=repo, kind=kind, files=listing.files, online=True, client=client, commit=listing.commit)

    hint = ' Give a local directory with --model_id_or_path.' if kind == 'model' else ''
    tokens = ' or '.join(dict.fromkeys(TOKEN_VARIABLES[repo.hub] for repo in repos))
    raise ConfigError(
        f'{kind} {", ".join(gone)}: not found (404). It does not exist, or it is private. Check the id and the '
        f'revision. If it is private, set the environment variable {tokens} to a token that may read it.{hint}{remedy}'
    )


def _token_remedy(repo: Repo) -> str:
    return (
        f'Set the environment variable {TOKEN_VARIABLES[repo.hub]} to a token that may read it. If its page asks to '
        'accept terms, accept them first.'
    )


def push_folder(folder: Path, *, repo: str, hub: HubName, token: str, private: bool, message: str) -> str:
    """Upload a folder to a model repository and return the id of the repository, `user/name`.

    `repo` is `name` or `user/name`. The repository is created if it does not exist, and `private` decides whether the
    new repository is private. Raises the errors of utils/hub/clients.py and of the package of the hub.
    """
    client = connect(hub, token)
    repo_id = repo if '/' in repo else f'{client.user()}/{repo}'
    client.upload(repo_id, folder, private=private, message=message)
    return repo_id


def _find_cached(repos: Sequence[Repo], kind: Kind, *, why: str, remedy: str) -> Snapshot:
    searched: list[Path] = []
    for repo in repos:
        client = connect(repo.hub, find_token(None, repo.hub))
        folder = client.cached(repo, kind)
        searched.append(folder)
        if not folder.is_dir() or not any(folder.iterdir()):
            continue

        recorded, _ = _read_record(_record_file(repo, kind))
        files = recorded.files
        if not files:  # a different program downloaded the repository, so only the files in the folder are known
            found = [p for p in folder.rglob('*') if p.is_file()]
            files = {p.relative_to(folder).as_posix(): (p.stat().st_size, '') for p in found}
            if absent := _absent_shards(files):
                raise ConfigError(_incomplete_offline(repo, kind, folder, absent))

        logger.warning(f'{repos[0].hub} cannot be reached ({why}): {kind} {repo} is taken from {folder}')
        return Snapshot(repo=repo, kind=kind, files=files, online=False, client=client, commit=recorded.commit)

    local = ', or give a local directory with --model_id_or_path' if kind == 'model' else ''
    raise ConfigError(
        f'{repos[0].hub} cannot be reached ({why}), and {kind} {repos[0].id} is not in the cache. Run once with '
        f'network, or use another --hub. Without network, copy the folder {" or ".join(map(str, searched))} from a '
        f'machine that has downloaded the {kind}{local}.{remedy}'
    )


def _incomplete_offline(repo: Repo, kind: Kind, folder: Path, absent: Sequence[str]) -> str:
    return (
        f'a hub cannot be reached, and {len(absent)} files of {kind} {repo.id} are missing or incomplete in '
        f'{folder}, the first is {absent[0]}. Run once with network: the download continues where it stopped.'
    )


def _absent_shards(files: Collection[str]) -> list[str]:
    """Return the names of missing shards. The name of each shard tells how many shards there must be."""
    wanted: set[str] = set()
    for name in files:
        match = _SHARD.fullmatch(name)
        if match is None:
            continue
        head, _, total, tail = match.groups()
        # Data sets count shards from 0, models from 1.
        first = 0 if f'{head}00000-of-{total}{tail}' in files else 1
        wanted.update(f'{head}{number:05d}-of-{total}{tail}' for number in range(first, first + int(total)))
    return sorted(wanted - set(files))


def _with_retries(repo: Repo, call: Callable[[], T]) -> T:
    """Return the result of `call`. The call is repeated after a failure that may be temporary.

    Raises ConfigError if the last attempt fails too. GoneError, DeniedError and UnreachableError are raised at once.
    """
    for wait in (*_WAITS, None):
        try:
            return call()
        except (GoneError, DeniedError, UnreachableError):
            raise
        except Exception as error:  # many types: server errors, truncated responses, wrong checksums
            if wait is None:
                raise ConfigError(
                    f'{repo} could not be fetched in {len(_WAITS) + 1} attempts: {type(error).__name__}: '
                    f'{_one_line(error)}. {_CONTINUE}'
                ) from error
            logger.warning(f'{repo}: {type(error).__name__}: {_one_line(error)}; trying again in {wait:.0f} s')
            time.sleep(wait)
    raise AssertionError('the last attempt returns or raises')


def _one_line(error: Exception) -> str:
    """Return the message of an error in one line, at most 300 characters.

    If the message contains an error of the operating system ([Errno ...]), only this error is returned.
    """
    cause = re.search(r'\[Errno -?\d+\][\w ,-]*', str(error))
    if cause:
        return cause[0]
    text = ' '.join(str(error).split()) or type(error).__name__
    return text[:300]


def _record_file(repo: Repo, kind: Kind) -> Path:
    name = re.sub(r'[^\w.-]+', '--', f'{kind}-{repo}')[:120]
    digest = hashlib.sha256(f'{kind} {repo}'.encode()).hexdigest()[:12]
    return cache_dir() / 'hub' / f'{name}-{digest}.json'


def _save_record(path: Path, listing: Listing, verified: set[str]) -> None:
    temporary = path.with_name(f'{path.name}.aside')
    content = {'files': listing.files, 'whole': sorted(verified), 'commit': listing.commit}
    temporary.write_text(json.dumps(content), encoding='utf-8')
    temporary.replace(path)


def _read_record(path: Path) -> tuple[Listing, set[str]]:
    """Return the listing at the last download, and the names of the verified files.

    Both are empty if the record `path` does not exist or is damaged.
    """
    if not path.is_file():
        return Listing(files={}), set()

    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        files = {name: (size, digest) for name, (size, digest) in record['files'].items()}
        # Records of older versions have no commit.
        return Listing(files=files, commit=str(record.get('commit', ''))), set(record['whole'])
    except (ValueError, TypeError, KeyError, AttributeError):  # a damaged record is ignored
        return Listing(files={}), set()

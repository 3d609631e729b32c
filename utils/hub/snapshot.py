"""The only door to the model hubs: where a thing is, fetched once per machine, and what the network's absence means."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from utils.base.cache import cache_dir
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import HubName, Kind
from utils.hub.clients import TOKEN_VARIABLES, Client, DeniedError, GoneError, Listed, Repo, UnreachableError, connect

T = TypeVar('T')

# Seconds before each further attempt after an answer that may be a passing fault; the clients retry underneath too.
_WAITS = (1.0, 4.0)
# One file of several of equal standing, e.g. model-00002-of-00005.safetensors.
_SHARD = re.compile(r'(.*?)(\d{5})-of-(\d{5})(.*)')


def find_token(typed: str | None, hub: HubName) -> str | None:
    """Return the typed token, else the hub's in the environment. It is never logged or saved."""
    return typed or os.environ.get(TOKEN_VARIABLES[hub]) or None


def repos_of(hub: HubName, ids: dict[HubName, Sequence[str]], *, revision: str = 'master') -> list[Repo]:
    """Return the places to look in, those on the chosen hub first."""
    order = sorted(ids, key=lambda name: name != hub)
    return [Repo(hub=name, id=repo_id, revision=revision) for name in order for repo_id in ids[name]]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A repository that was found and its files; `online` is false where only the cache answers."""

    repo: Repo
    kind: Kind
    files: dict[str, Listed]
    online: bool
    client: Client

    def fetch(self, names: Sequence[str]) -> Path:
        """Return the folder that holds these files, downloaded by one process of the machine. Raises ConfigError."""
        record = _record_file(self.repo, self.kind)
        with _alone(record.with_suffix('.lock')):
            told, whole = _read_record(record)
            absent = self.to_fetch(names)
            if not absent or not self.online:
                folder = self.client.cached(self.repo, self.kind)
                if not absent:
                    return folder
                raise ConfigError(_offline(self.repo, self.kind, folder, absent))
            try:
                folder = _patiently(self.repo, lambda: self.client.download(self.repo, self.kind, names))
            except (GoneError, DeniedError, UnreachableError) as error:
                raise ConfigError(
                    f'{self.kind} {self.repo}: the download broke off: {_one_line(error)}. '
                    'What came is kept: the same command goes on from there.'
                ) from error
            if absent := self._absent(folder, names):
                raise ConfigError(
                    f'{self.kind} {self.repo}: {absent[0]} is not what the hub lists, or was not delivered '
                    f'({len(absent)} files). Remove {folder} and fetch it again.'
                )
            _save_record(record, self.files, (whole if told == self.files else set()) | set(names))
        return folder

    def to_fetch(self, names: Sequence[str]) -> list[str]:
        """Return the files that `fetch` would ask its client for: all of them where one is new, changed or not whole.

        The client hashes every byte again; what it verified once needs no more than a look at the sizes.
        """
        told, whole = _read_record(_record_file(self.repo, self.kind))
        if self.online and not (told == self.files and whole >= set(names)):
            return list(names)
        return self._absent(self.client.cached(self.repo, self.kind), names)

    def _absent(self, folder: Path, names: Sequence[str]) -> list[str]:
        """Return the files that are not there, or not in the size that the hub gives."""
        found = {name: folder / name for name in names}
        return [
            name
            for name, path in found.items()
            if not path.is_file() or self.files[name][0] not in (None, path.stat().st_size)
        ]


def find(repos: Sequence[Repo], kind: Kind) -> Snapshot:
    """Return the first of these places that is there; a gone one is logged, and without network the cache answers.

    Raises ConfigError where each is gone, where the hub refuses, and where neither network nor cache has it.
    """
    gone: list[str] = []
    for index, repo in enumerate(repos):
        client = connect(repo.hub, find_token(None, repo.hub))
        try:
            files = _patiently(repo, lambda: client.list_files(repo, kind))  # noqa: B023 (called at once)
        except GoneError:
            gone.append(str(repo))
            if index + 1 < len(repos):
                logger.warning(f'{kind} {repo} is gone (404): trying {repos[index + 1]}')
            continue
        except DeniedError as error:
            raise ConfigError(
                f'{kind} {repo}: the hub refuses this account ({_one_line(error)}). Set the environment variable '
                f'{TOKEN_VARIABLES[repo.hub]} to a token that may read it.'
            ) from error
        except UnreachableError as error:
            return _find_cached(repos[index:], kind, why=_one_line(error))
        return Snapshot(repo=repo, kind=kind, files=files, online=True, client=client)
    hint = ' Give a local directory with --model_id_or_path.' if kind == 'model' else ''
    raise ConfigError(
        f'{kind} is gone, or private and not shown without a token: {", ".join(gone)} (404). Check the id.{hint}'
    )


def push_folder(folder: Path, *, repo: str, hub: HubName, token: str, private: bool, message: str) -> str:
    """Upload a folder to a model repository, made if it is not there; returns its id. `repo` is name or user/name."""
    client = connect(hub, token)
    repo_id = repo if '/' in repo else f'{client.user()}/{repo}'
    client.upload(repo_id, folder, private=private, message=message)
    return repo_id


def _find_cached(repos: Sequence[Repo], kind: Kind, *, why: str) -> Snapshot:
    looked: list[Path] = []
    for repo in repos:
        client = connect(repo.hub, find_token(None, repo.hub))
        folder = client.cached(repo, kind)
        looked.append(folder)
        if not folder.is_dir() or not any(folder.iterdir()):
            continue
        files, _ = _read_record(_record_file(repo, kind))
        if not files:  # fetched by another program: what lies there is all that is known
            found = [p for p in folder.rglob('*') if p.is_file()]
            files = {p.relative_to(folder).as_posix(): (p.stat().st_size, '') for p in found}
            if absent := _absent_shards(files):
                raise ConfigError(_offline(repo, kind, folder, absent))
        logger.warning(f'{repo.hub} cannot be reached ({why}): {kind} {repo} is taken from {folder}')
        return Snapshot(repo=repo, kind=kind, files=files, online=False, client=client)
    local = ', give a local directory with --model_id_or_path,' if kind == 'model' else ''
    raise ConfigError(
        f'{repos[0].hub} cannot be reached ({why}), and {kind} {repos[0].id} is not in the cache (looked in '
        f'{", ".join(map(str, looked))}). Fetch it once with network, or copy that folder from a machine that has it'
        f'{local}, or use another --hub.'
    )


def _offline(repo: Repo, kind: Kind, folder: Path, absent: Sequence[str]) -> str:
    return (
        f'{repo.hub} cannot be reached, and {len(absent)} files of {kind} {repo.id} are not whole in {folder}, '
        f'first {absent[0]}. Run once with network: the download goes on where it broke off.'
    )


def _absent_shards(files: Collection[str]) -> list[str]:
    found = [match for name in files if (match := _SHARD.fullmatch(name))]
    wanted = {
        # Data sets count shards from 0, models from 1.
        f'{head}{number + (f"{head}00000-of-{total}{tail}" not in files):05d}-of-{total}{tail}'
        for head, _, total, tail in (match.groups() for match in found)
        for number in range(int(total))
    }
    return sorted(wanted - set(files))


def _patiently(repo: Repo, call: Callable[[], T]) -> T:
    """Return what `call` returns; a failure that is not final is tried again, then a ConfigError."""
    for wait in (*_WAITS, None):
        try:
            return call()
        except (GoneError, DeniedError, UnreachableError):
            raise
        except Exception as error:  # the clients raise many kinds: server errors, bodies cut short, wrong checksums
            if wait is None:
                raise ConfigError(
                    f'{repo} could not be fetched in {len(_WAITS) + 1} attempts: {type(error).__name__}: '
                    f'{_one_line(error)}. What came is kept: the same command goes on from there.'
                ) from error
            logger.warning(f'{repo}: {type(error).__name__}: {_one_line(error)}; trying again in {wait:.0f} s')
            time.sleep(wait)
    raise AssertionError('the last attempt returns or raises')


def _one_line(error: Exception) -> str:
    """Return what the operating system said where it said something, else the beginning of all."""
    cause = re.search(r'\[Errno -?\d+\][\w ,-]*', str(error))
    return cause[0] if cause else (' '.join(str(error).split()) or type(error).__name__)[:300]


def _record_file(repo: Repo, kind: Kind) -> Path:
    name = re.sub(r'[^\w.-]+', '--', f'{kind}-{repo}')[:120]
    digest = hashlib.sha256(f'{kind} {repo}'.encode()).hexdigest()[:12]
    return cache_dir() / 'hub' / f'{name}-{digest}.json'


def _save_record(path: Path, files: dict[str, Listed], whole: set[str]) -> None:
    aside = path.with_name(f'{path.name}.aside')
    aside.write_text(json.dumps({'files': files, 'whole': sorted(whole)}), encoding='utf-8')
    aside.replace(path)


def _read_record(path: Path) -> tuple[dict[str, Listed], set[str]]:
    """Return what the hub listed when files were last fetched, and which of them came whole."""
    if not path.is_file():
        return {}, set()
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        return {name: (size, digest) for name, (size, digest) in record['files'].items()}, set(record['whole'])
    except (ValueError, TypeError, KeyError, AttributeError):  # damaged: as if it were not there
        return {}, set()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that one process of the machine has at a time; it ends with the process."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

"""The two hubs behind one shape: list a repository, fetch files of it, upload a folder. Clients are imported on use."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.names import HubName, Kind

# What a hub says of a file: its size, and what identifies its content.
Listed = tuple[int | None, str]

TOKEN_VARIABLES: dict[HubName, str] = {'modelscope': 'MODELSCOPE_API_TOKEN', 'huggingface': 'HF_TOKEN'}
_ADDRESSES: dict[HubName, tuple[str, str]] = {
    'modelscope': ('MODELSCOPE_ENDPOINT', 'https://www.modelscope.cn'),
    'huggingface': ('HF_ENDPOINT', 'https://huggingface.co'),
}


def answers(hub: HubName) -> tuple[str, bool]:
    """Return a hub's address and whether anything answers there in time, over the proxy of the environment."""
    import urllib.error
    import urllib.request

    variable, usual = _ADDRESSES[hub]
    address = os.environ.get(variable) or usual
    try:
        with urllib.request.urlopen(address, timeout=5):
            return address, True
    except urllib.error.HTTPError:
        return address, True
    except (OSError, ValueError):
        return address, False


class GoneError(Exception):
    """The repository or its revision is not there, or is private and not shown to this account."""


class DeniedError(Exception):
    """The hub knows the repository and refuses this account."""


class UnreachableError(Exception):
    """No answer came from the hub."""


@dataclass(frozen=True, kw_only=True)
class Repo:
    """One place where a model or data set may be."""

    hub: HubName
    id: str
    revision: str = 'master'

    def __str__(self) -> str:
        return f'{self.hub}:{self.id}@{self.revision}'


class ModelScope:
    """ModelScope's own client. The endpoint, the cache and the token are read from the environment at each use.

    Methods raise GoneError, DeniedError and UnreachableError, else the client's own.
    """

    def __init__(self, token: str | None) -> None:
        from modelscope_hub import HubApi
        from modelscope_hub.config import HubConfig
        from modelscope_hub.utils.logger import get_logger

        get_logger().setLevel('ERROR')  # it tells each file and retry
        self._api = HubApi(HubConfig(token=token))
        self._listed: dict[str, dict[str, Any]] = {}

    def list_files(self, repo: Repo, kind: Kind) -> dict[str, Listed]:
        """Return every file of a repository."""
        with self._told():
            entries = self._api.legacy.list_repo_files(repo.id, kind, revision=repo.revision)
        self._listed = {entry['Path']: entry for entry in entries if entry.get('Type') != 'tree'}
        return {name: (entry.get('Size'), entry.get('Sha256') or '') for name, entry in self._listed.items()}

    def download(self, repo: Repo, kind: Kind, names: Sequence[str]) -> Path:
        """Return the folder that holds these files, verified by the client against what was listed."""
        with self._told():
            return Path(
                self._api.downloader.download_repo(
                    repo.id, kind, revision=repo.revision, file_list=[self._listed[name] for name in names]
                )
            )

    def cached(self, repo: Repo, kind: Kind) -> Path:
        """Return the folder where the cache holds or would hold this repository."""
        from modelscope_hub.errors import CacheNotFound

        manager = self._api.downloader
        try:
            return Path(manager.download_repo(repo.id, kind, revision=repo.revision, local_files_only=True))
        except CacheNotFound as error:
            return Path(str(error.cache_dir))

    def user(self) -> str:
        """Return the account's name."""
        with self._told():
            return str(self._api.whoami().username)

    def upload(self, repo_id: str, folder: Path, *, private: bool, message: str) -> None:
        """Upload a folder into a model repository, made first where it is not there."""
        with self._told():
            if not self._api.repo_exists(repo_id, 'model'):
                self._api.create_repo(repo_id, 'model', visibility='private' if private else 'public')
            self._api.upload_folder(
                repo_id, 'model', folder, commit_message=message, use_cache=False, disable_tqdm=True
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        from modelscope_hub import errors

        try:
            yield
        except errors.NotExistError as error:
            raise GoneError(str(error)) from error
        except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
            raise DeniedError(str(error)) from error
        except errors.NetworkError as error:
            raise UnreachableError(str(error)) from error
        except errors.FileDownloadError as error:
            failed = list(error.failed_files.values())
            for theirs, ours in (
                (errors.NetworkError, UnreachableError),
                ((errors.AuthenticationError, errors.PermissionDeniedError), DeniedError),
                (errors.NotExistError, GoneError),
            ):
                if failed and all(isinstance(e, theirs) for e in failed):
                    raise ours(str(error)) from error
            raise


class HuggingFace:
    """The same of Hugging Face. A revision 'master' means its 'main'."""

    def __init__(self, token: str | None) -> None:
        # The client sends usage figures unless told not to, and reads this once, when it is imported.
        os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
        from huggingface_hub import HfApi

        home = os.environ.get('HF_HOME') or Path.home() / '.cache' / 'huggingface'
        self._cache = Path(os.environ.get('HF_HUB_CACHE') or Path(home) / 'hub')
        self._api = HfApi(endpoint=os.environ.get('HF_ENDPOINT') or None, token=token)

    @staticmethod
    def _revision(repo: Repo) -> str:
        return 'main' if repo.revision == 'master' else repo.revision

    def list_files(self, repo: Repo, kind: Kind) -> dict[str, Listed]:
        with self._told():
            ask = self._api.dataset_info if kind == 'dataset' else self._api.model_info
            info = ask(repo.id, revision=self._revision(repo), files_metadata=True, timeout=30)
        return {file.rfilename: (file.size, file.blob_id or '') for file in info.siblings or ()}

    def download(self, repo: Repo, kind: Kind, names: Sequence[str]) -> Path:
        with self._told():
            return self._snapshot(repo, kind, names)

    def cached(self, repo: Repo, kind: Kind) -> Path:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self._snapshot(repo, kind, [], local_files_only=True)
        except LocalEntryNotFoundError:
            return self._cache / f'{kind}s--{repo.id.replace("/", "--")}'

    def _snapshot(self, repo: Repo, kind: Kind, names: Sequence[str], *, local_files_only: bool = False) -> Path:
        return Path(
            self._api.snapshot_download(
                repo.id,
                repo_type=kind,
                revision=self._revision(repo),
                cache_dir=self._cache,
                local_files_only=local_files_only,
                allow_patterns=[glob.escape(name) for name in names],
            )
        )

    def user(self) -> str:
        with self._told():
            return str(self._api.whoami()['name'])

    def upload(self, repo_id: str, folder: Path, *, private: bool, message: str) -> None:
        with self._told():
            if not self._api.repo_exists(repo_id):
                self._api.create_repo(repo_id, private=private, exist_ok=True)
            self._api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        import httpx2
        from huggingface_hub import errors

        try:
            yield
        except (errors.GatedRepoError, errors.DisabledRepoError) as error:
            raise DeniedError(str(error)) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise GoneError(str(error)) from error
        except errors.HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise DeniedError(str(error)) from error
            raise
        except (httpx2.TransportError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
            raise UnreachableError(str(error)) from error


Client = ModelScope | HuggingFace


def connect(hub: HubName, token: str | None) -> Client:
    """Return the client of a hub."""
    return ModelScope(token) if hub == 'modelscope' else HuggingFace(token)

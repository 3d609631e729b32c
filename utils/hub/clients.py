"""One interface to both hubs: list a repository, download files, upload a folder.

The packages of the hubs are imported on first use.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.names import HubName, Kind

# (size of a file on a hub, digest that differs if its content differs). If the hub does not report them, the size is
# None, and the digest is ''.
Listed = tuple[int | None, str]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a repository, and the newest commit of its revision. The commit is '' if the hub names none."""

    files: dict[str, Listed]
    commit: str = ''


TOKEN_VARIABLES: dict[HubName, str] = {'modelscope': 'MODELSCOPE_API_TOKEN', 'huggingface': 'HF_TOKEN'}
_ADDRESSES: dict[HubName, tuple[str, str]] = {
    'modelscope': ('MODELSCOPE_ENDPOINT', 'https://www.modelscope.cn'),
    'huggingface': ('HF_ENDPOINT', 'https://huggingface.co'),
}


def ping(hub: HubName) -> tuple[str, bool]:
    """Return the address of a hub, and whether the hub answers within 5 seconds. Uses the proxy of the environment."""
    import urllib.error
    import urllib.request

    variable, default = _ADDRESSES[hub]
    address = os.environ.get(variable) or default
    try:
        with urllib.request.urlopen(address, timeout=5):
            return address, True
    except urllib.error.HTTPError:
        return address, True
    except (OSError, ValueError):
        return address, False


class GoneError(Exception):
    """The repository or revision does not exist, or is private and hidden from this account."""


class DeniedError(Exception):
    """The hub refuses this account, for example because the token is wrong, or terms must be accepted first."""


class UnreachableError(Exception):
    """The hub did not answer, or its package is set to work offline."""


@dataclass(frozen=True, kw_only=True)
class Repo:
    """The hub, id and revision of a repository. The repository need not exist."""

    hub: HubName
    id: str
    revision: str = 'master'

    def __str__(self) -> str:
        return f'{self.hub}:{self.id}@{self.revision}'


class ModelScope:
    """The client of ModelScope. It reads endpoint and cache from the environment when it is created.

    If `token` is None, the package uses the token of the environment or of a stored login, if there is one. Methods
    raise GoneError, DeniedError and UnreachableError. Any other exception of the package is not caught.
    """

    def __init__(self, token: str | None) -> None:
        from modelscope_hub import HubApi
        from modelscope_hub.config import HubConfig
        from modelscope_hub.utils.logger import get_logger

        get_logger().setLevel('ERROR')  # otherwise the package logs every file and retry
        self._api = HubApi(HubConfig(token=token))
        self._listed: dict[str, dict[str, Any]] = {}

    def list_files(self, repo: Repo, kind: Kind) -> Listing:
        """Return the size and digest of every file in a repository, by file name, and the newest commit.

        The hub gives only the last commit of each file, so the newest of these commits is returned. A later commit that
        only removed files is not seen.
        """
        with self._translated_errors():
            entries = self._api.legacy.list_repo_files(repo.id, kind, revision=repo.revision)
        self._listed = {entry['Path']: entry for entry in entries if entry.get('Type') != 'tree'}
        files = {name: (entry.get('Size'), entry.get('Sha256') or '') for name, entry in self._listed.items()}
        dated = [(entry.get('CommittedDate') or 0, entry.get('Revision') or '') for entry in self._listed.values()]
        return Listing(files=files, commit=max(dated, default=(0, ''))[1])

    def download(self, repo: Repo, kind: Kind, names: Sequence[str]) -> Path:
        """Download these files and return the folder that contains them. Call `list_files` first.

        The Python package of the hub verifies the files with the digests of the list.
        """
        listed = [self._listed[name] for name in names]
        with self._translated_errors():
            return Path(self._api.downloader.download_repo(repo.id, kind, revision=repo.revision, file_list=listed))

    def cached(self, repo: Repo, kind: Kind) -> Path:
        """Return the folder to which the Python package of the hub downloads a repository.

        The folder may not exist yet.
        """
        from modelscope_hub.errors import CacheNotFound

        manager = self._api.downloader
        try:
            return Path(manager.download_repo(repo.id, kind, revision=repo.revision, local_files_only=True))
        except CacheNotFound as error:
            return Path(str(error.cache_dir))

    def user(self) -> str:
        """Return the name of the account to which the token belongs."""
        with self._translated_errors():
            return str(self._api.whoami().username)

    def upload(self, repo_id: str, folder: Path, *, private: bool, message: str) -> None:
        """Upload a folder to a model repository. The repository is created if it does not exist.

        `private` decides only whether a new repository is private.
        """
        with self._translated_errors():
            if not self._api.repo_exists(repo_id, 'model'):
                self._api.create_repo(repo_id, 'model', visibility='private' if private else 'public')
            self._api.upload_folder(
                repo_id, 'model', folder, commit_message=message, use_cache=False, disable_tqdm=True
            )

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
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
            causes = list(error.failed_files.values())
            for client_error, own_error in (
                (errors.NetworkError, UnreachableError),
                ((errors.AuthenticationError, errors.PermissionDeniedError), DeniedError),
                (errors.NotExistError, GoneError),
            ):
                if causes and all(isinstance(cause, client_error) for cause in causes):
                    raise own_error(str(error)) from error
            raise


class HuggingFace:
    """The client of Hugging Face, with the same methods as ModelScope. The revision 'master' means 'main'.

    The package of this hub does not verify the content of files that are on this machine already.
    """

    def __init__(self, token: str | None) -> None:
        # The package sends usage statistics unless this variable is set. It reads the variable once, on import.
        os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
        from huggingface_hub import HfApi

        home = os.environ.get('HF_HOME') or Path.home() / '.cache' / 'huggingface'
        self._cache = Path(os.environ.get('HF_HUB_CACHE') or Path(home) / 'hub')
        self._api = HfApi(endpoint=os.environ.get('HF_ENDPOINT') or None, token=token)

    @staticmethod
    def _revision(repo: Repo) -> str:
        return 'main' if repo.revision == 'master' else repo.revision

    def list_files(self, repo: Repo, kind: Kind) -> Listing:
        with self._translated_errors():
            get_info = self._api.dataset_info if kind == 'dataset' else self._api.model_info
            info = get_info(repo.id, revision=self._revision(repo), files_metadata=True, timeout=30)
        files = {file.rfilename: (file.size, file.blob_id or '') for file in info.siblings or ()}
        return Listing(files=files, commit=info.sha or '')

    def download(self, repo: Repo, kind: Kind, names: Sequence[str]) -> Path:
        with self._translated_errors():
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
        with self._translated_errors():
            return str(self._api.whoami()['name'])

    def upload(self, repo_id: str, folder: Path, *, private: bool, message: str) -> None:
        with self._translated_errors():
            if not self._api.repo_exists(repo_id):
                self._api.create_repo(repo_id, private=private, exist_ok=True)
            self._api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
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
            cause = error.__cause__  # the package also raises LocalEntryNotFoundError if the hub refuses a file
            if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in (401, 403):
                raise DeniedError(str(cause)) from error
            raise UnreachableError(str(error)) from error


Client = ModelScope | HuggingFace


def connect(hub: HubName, token: str | None) -> Client:
    """Return a client of the hub that uses this token."""
    return ModelScope(token) if hub == 'modelscope' else HuggingFace(token)

"""The only module that talks to a model hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from utils.errors import ConfigError

TOKEN_VARIABLE = 'MODELSCOPE_API_TOKEN'


def find_token(typed: str | None) -> str | None:
    """Return the typed token, else the one in the environment. It is never logged or saved."""
    return typed or os.environ.get(TOKEN_VARIABLE)


def download_model(model_id: str, *, revision: str, ignore: Sequence[str] = ()) -> Path:
    """Return the local directory of a hub model, fetched or from the cache; no file of it is executed."""
    from modelscope.hub.snapshot_download import snapshot_download

    try:
        return Path(snapshot_download(model_id, revision=revision, ignore_file_pattern=list(ignore) or None))
    except Exception as error:  # the client raises many kinds; each means that the model is not here
        raise ConfigError(
            f"model '{model_id}' (revision {revision}) could not be fetched: {type(error).__name__}: {error}. "
            'Check the id and the network, or give a local directory with --model_id_or_path.'
        ) from error


# What a checkpoint holds beside the model: of use for resuming here, of none to who downloads it.
_NOT_PUSHED = ['*.pt', '*.pth', '*.bin', '*.pkl', 'global_step*', 'trainer_state.json', 'sft_args.json']


def push_folder(folder: Path, *, repo: str, token: str, private: bool, message: str, path_in_repo: str = '') -> None:
    """Upload a checkpoint to a ModelScope repository, made if it is not there. `repo` is name or user/name."""
    from modelscope_hub import HubApi

    api = HubApi(token=token)
    if '/' not in repo:
        repo = f'{api.whoami().username}/{repo}'
    if not api.repo_exists(repo, 'model'):
        api.create_repo(repo, 'model', visibility='private' if private else 'public')
    api.upload_folder(
        repo,
        'model',
        folder,
        path_in_repo=path_in_repo,
        commit_message=message,
        ignore_patterns=_NOT_PUSHED,
        use_cache=False,
        disable_tqdm=True,
    )

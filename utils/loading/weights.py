"""Finds the weights of a model in a folder, in a GGUF file, in a package, or on a hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from utils.base.names import HubName
from utils.hub import snapshot as hub
from utils.hub.clients import Repo
from utils.loading.fingerprint import Fingerprint, fingerprint
from utils.loading.gguf import find_packaged_file, is_gguf
from utils.loading.info import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The path of the base weights, the reason why these weights are used, and their fingerprint."""

    path: Path
    reason: str
    fingerprint: Fingerprint
    # The hub, id and revision of a download. None if the weights were not downloaded.
    served: str | None = None

    def record(self, info: ModelInfo) -> dict[str, str]:
        """Return the id, source and hash of the base model, for the record of a run.

        A local path is included only if the user named the model by this path.
        """
        return {
            'id': info.public_id,
            'source': self.served or self.path.name,
            'sha256': self.fingerprint.sha256,
            'covers': self.fingerprint.covers,
        }


def _repos(info: ModelInfo, hub_name: HubName, revision: str) -> list[Repo]:
    """Return the repositories in which to look for the model, in the order in which to try them.

    A registered entry can have an id on each hub. Any other id is looked up only on the hub `hub_name`.
    """
    ids: dict[HubName, Sequence[str]] = {hub_name: (info.model_id_or_path,)}

    if info.registered:
        ids = {'modelscope': (info.model_id_or_path,), 'huggingface': (info.hf_model_id,) if info.hf_model_id else ()}

    return hub.repos_of(hub_name, ids, revision=revision)


def find_on_hub(info: ModelInfo, *, revision: str, hub_name: HubName) -> tuple[hub.Snapshot, list[str]]:
    """Return the Snapshot of a model on a hub, and the names of the files to download.

    Files that match `info.ignore_file_pattern` are not among these names.
    """
    snapshot = hub.find(_repos(info, hub_name, revision), 'model')
    ignored = [re.compile(pattern) for pattern in info.ignore_file_pattern]
    return snapshot, [name for name in snapshot.files if not any(p.match(name) for p in ignored)]


def locate(info: ModelInfo, *, revision: str, hub_name: HubName = 'modelscope', skip: Sequence[str] = ()) -> Weights:
    """Return where the weights of a model are. If they are not on this machine, they are downloaded.

    Files whose names match a glob in `skip` are not downloaded. A GGUF file is converted later, when the model is
    opened. Raises ConfigError if the model is not found or cannot be downloaded.
    """
    local = Path(info.model_id_or_path)

    if info.embedded and (packaged := find_packaged_file(*info.embedded)):
        reason = f'the package {info.embedded[0]} contains it (4-bit GGUF; the weights on the hub are different)'
        return Weights(path=packaged, reason=reason, fingerprint=fingerprint(packaged))

    if local.is_dir():
        return Weights(path=local, reason='it is a local directory', fingerprint=fingerprint(local))

    if is_gguf(local):
        reason = 'it is a GGUF file, whose weights are dequantised to bf16'
        return Weights(path=local, reason=reason, fingerprint=fingerprint(local))

    snapshot, names = find_on_hub(info, revision=revision, hub_name=hub_name)
    path = snapshot.fetch([name for name in names if not any(fnmatchcase(name, glob) for glob in skip)])
    reason = f'{snapshot.repo} {"holds them" if snapshot.online else "is in the cache"}'

    return Weights(path=path, reason=reason, fingerprint=fingerprint(path), served=str(snapshot.repo))

"""Chooses the files of each split in the repository of a data set."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.formats.data_file import SUFFIXES
from utils.hub import snapshot as hub

if TYPE_CHECKING:
    from utils.formats.hub_dataset import HubDataset

_SPLITS = {'train': ('train', 'training'), 'test': ('test', 'testing')}
_VALIDATION = ('validation', 'valid', 'val', 'dev', 'eval')
_ALL_SPELLINGS = (*_SPLITS['train'], *_SPLITS['test'], *_VALIDATION)
_NO_DATA = ('dataset_infos.json', 'dataset_info.json', 'configuration.json', 'metadata.json')
# If a file exists in several formats, only the first format in this order is read.
_FORMATS = ('.parquet', '.jsonl', '.json', '.csv')
_MAX_LIST_BYTES = 1 << 20

# subset -> split -> file names
FileList = dict[str, dict[str, list[str]]]


def _spellings(split: str) -> tuple[str, ...]:
    return _VALIDATION if split in _VALIDATION else _SPLITS[split]


def _holds(name: str, word: str) -> bool:
    """Return whether a path contains a word between separators.

    For example, 'data/common_en_70k.jsonl' contains 'common-en'.
    """
    return f'-{_plain(word)}-' in f'-{_plain(name)}-'


@functools.cache
def _plain(text: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


def choose_files(snapshot: hub.Snapshot, entry: HubDataset) -> dict[str, list[str]]:
    """Return {split: file names}. If the repository has no list of files, the files are chosen by their names.

    A list of files says which files a split has. On ModelScope it is <name>.json ({subset: {split: {meta: file}}}), on
    Hugging Face it is `configs` in the README. Raises ConfigError if a subset or split is not found. The message names
    the existing subsets and splits.
    """
    listed = _listed_files(snapshot)
    chosen: dict[str, list[str]] = {}
    for split in (*entry.train, *entry.val):
        for subset in entry.subsets:
            names = _from_list(listed, subset, split) if listed else _from_names(snapshot.files, entry, subset, split)
            if not names or not snapshot.files.keys() >= set(names):
                existing = [f'{s} ({", ".join(parts)})' for s, parts in listed.items()] or sorted(snapshot.files)[:20]
                raise ConfigError(
                    f"data set {snapshot.repo}: split '{split}' of subset '{subset}' no longer exists. Found: "
                    f'{", ".join(existing)}. Adapt its entry in DATASET_MAPPING in utils/dataset.py.'
                )
            chosen.setdefault(split, []).extend(names)
    return chosen


def _listed_files(snapshot: hub.Snapshot) -> FileList:
    """Return the list of files in the repository. Returns {} if the repository has no such list."""
    modelscope_name = f'{snapshot.repo.id.rsplit("/", 1)[-1]}.json'
    for name, reader in ((modelscope_name, _read_modelscope_list), ('README.md', _read_readme_list)):
        # A data file can have the same name as a list of files, but a data file is larger.
        if name in snapshot.files and (snapshot.files[name][0] or 0) < _MAX_LIST_BYTES:
            text = (snapshot.fetch([name]) / name).read_text(encoding='utf-8', errors='replace')
            listed = reader(text, list(snapshot.files))
            if listed:
                return listed
    return {}


def _read_modelscope_list(text: str, _: Sequence[str]) -> FileList:
    listed: FileList = {}
    try:
        for subset, splits in json.loads(text).items():
            listed[subset] = {}
            for split, about in splits.items():
                if about.get('meta'):
                    # `file` names the archive with the images of the rows.
                    archives = _as_list(about['file']) if about.get('file') else []
                    listed[subset][split] = [*_as_list(about['meta']), *archives]
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):  # not a list of files
        return {}
    return listed


def _read_readme_list(text: str, files: Sequence[str]) -> FileList:
    import yaml  # type: ignore[import-untyped]

    match = re.match(r'---\s*\n(.*?)\n---\s*(?:\n|$)', text, flags=re.DOTALL)
    listed: FileList = {}
    try:
        head = yaml.safe_load(match[1]) if match else None
        configs = head.get('configs') if isinstance(head, dict) else None
        for config in configs or ():
            data = config.get('data_files')
            parts = data if isinstance(data, list) and data and isinstance(data[0], dict) else [{'path': data}]
            splits = listed.setdefault(config.get('config_name', 'default'), {})
            for part in parts:
                patterns = [pattern for pattern in _as_list(part.get('path')) if isinstance(pattern, str)]
                splits[part.get('split', 'train')] = [
                    name for pattern in patterns for name in files if fnmatch.fnmatchcase(name, pattern)
                ]
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError):  # not a list of files
        return {}
    return listed


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _from_list(listed: Mapping[str, Mapping[str, list[str]]], subset: str, split: str) -> list[str]:
    """Return the files of a split, from the list of files. Returns [] if the list does not contain the split."""
    splits = listed.get(subset)
    # An entry without subsets has the subset 'default'. The repository may use a different name for this subset.
    if not splits and subset == 'default' and len(listed) == 1:
        splits = next(iter(listed.values()))
    if not splits:
        return []
    return next((splits[name] for name in (split, *_spellings(split)) if splits.get(name)), [])


def _from_names(files: Iterable[str], entry: HubDataset, subset: str, split: str) -> list[str]:
    """Return the data files whose names match a subset and a split. Each file is returned in one format only."""
    data = [name for name in files if name.lower().endswith(SUFFIXES) and name.rsplit('/', 1)[-1] not in _NO_DATA]
    data = [name for name in data if not _holds_any(name, entry.not_named)]
    if subset != 'default':
        data = [name for name in data if _holds(name, subset)]

    wanted = [name for name in data if _holds_any(name, _spellings(split))]
    if not wanted and split == 'train':  # training files may have no split in their names
        wanted = [name for name in data if not _holds_any(name, _ALL_SPELLINGS)]

    by_stem: dict[str, str] = {}
    for name in sorted(wanted, key=_format_rank):
        by_stem.setdefault(name.rsplit('.', 1)[0], name)
    return sorted(by_stem.values())


def _holds_any(name: str, words: Iterable[str]) -> bool:
    return any(_holds(name, word) for word in words)


def _format_rank(name: str) -> int:
    """Return the position of a file's format in _FORMATS, or len(_FORMATS) if the format is not in it."""
    return next((rank for rank, suffix in enumerate(_FORMATS) if name.endswith(suffix)), len(_FORMATS))

"""Which files of a data set repository belong to a split."""

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
_NO_DATA = ('dataset_infos.json', 'dataset_info.json', 'configuration.json', 'metadata.json')
# Of the same file in several formats the first is read.
_FORMATS = ('.parquet', '.jsonl', '.json', '.csv')


def _spellings(split: str) -> tuple[str, ...]:
    return _VALIDATION if split in _VALIDATION else _SPLITS[split]


def _holds(name: str, word: str) -> bool:
    """Return whether a path holds a word between separators: 'common-en' in 'data/common_en_70k.jsonl'."""
    return f'-{_plain(word)}-' in f'-{_plain(name)}-'


@functools.cache
def _plain(text: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


def choose_files(snapshot: hub.Snapshot, entry: HubDataset) -> dict[str, list[str]]:
    """Return the files of each split. What the repository says of itself goes before the names of its files.

    That is ModelScope's <name>.json ({subset: {split: {meta: file}}}) or the `configs` of a Hugging Face README.
    Raises ConfigError naming the subsets and splits that are there where one is gone.
    """
    told = _told_files(snapshot)
    found: dict[str, list[str]] = {}
    for split in (*entry.train, *entry.val):
        for subset in entry.subsets:
            names = _from_told(told, subset, split) if told else _from_names(snapshot.files, entry, subset, split)
            if not names or not snapshot.files.keys() >= set(names):
                there = [f'{s} ({", ".join(parts)})' for s, parts in told.items()] or sorted(snapshot.files)[:20]
                raise ConfigError(
                    f"data set {snapshot.repo}: split '{split}' of subset '{subset}' is not there any more. "
                    f'What is there: {", ".join(there)}. Adapt its entry in DATASET_MAPPING in utils/dataset.py.'
                )
            found.setdefault(split, []).extend(names)
    return found


def _told_files(snapshot: hub.Snapshot) -> dict[str, dict[str, list[str]]]:
    """Return what the repository says of itself: subset -> split -> files; empty where it says nothing."""
    meta = f'{snapshot.repo.id.rsplit("/", 1)[-1]}.json'
    for name, reader in ((meta, _told_by_modelscope), ('README.md', _told_by_readme)):
        # A file of rows can have the name of the other too; that is never small.
        if name in snapshot.files and (snapshot.files[name][0] or 0) < 1 << 20:
            text = (snapshot.fetch([name]) / name).read_text(encoding='utf-8', errors='replace')
            if told := reader(text, list(snapshot.files)):
                return told
    return {}


def _told_by_modelscope(text: str, _: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    try:
        told = json.loads(text)
        return {
            subset: {
                # `file` is the archive of the pictures that the rows name.
                split: [*_as_list(about['meta']), *(_as_list(about['file']) if about.get('file') else ())]
                for split, about in splits.items()
                if about.get('meta')
            }
            for subset, splits in told.items()
        }
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return {}


def _told_by_readme(text: str, files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    import yaml  # type: ignore[import-untyped]

    match = re.match(r'---\s*\n(.*?)\n---\s*(?:\n|$)', text, flags=re.DOTALL)
    told: dict[str, dict[str, list[str]]] = {}
    try:
        head = yaml.safe_load(match[1]) if match else None
        for config in (head.get('configs') if isinstance(head, dict) else None) or ():
            data = config.get('data_files')
            parts = data if isinstance(data, list) and data and isinstance(data[0], dict) else [{'path': data}]
            for part in parts:
                patterns = [p for p in _as_list(part.get('path')) if isinstance(p, str)]
                names = [name for p in patterns for name in files if fnmatch.fnmatchcase(name, p)]
                told.setdefault(config.get('config_name', 'default'), {})[part.get('split', 'train')] = names
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError):  # as if it said nothing
        return {}
    return told


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _from_told(told: Mapping[str, Mapping[str, list[str]]], subset: str, split: str) -> list[str]:
    # 'default' is also what a data set without subsets is asked for.
    splits = told.get(subset) or (next(iter(told.values())) if subset == 'default' and len(told) == 1 else {})
    return next((splits[name] for name in (split, *_spellings(split)) if splits.get(name)), [])


def _from_names(files: Iterable[str], entry: HubDataset, subset: str, split: str) -> list[str]:
    data = [n for n in files if n.lower().endswith(SUFFIXES) and n.rsplit('/', 1)[-1] not in _NO_DATA]
    data = [n for n in data if not any(_holds(n, word) for word in entry.not_named)]
    if subset != 'default':
        data = [name for name in data if _holds(name, subset)]
    wanted = [name for name in data if any(_holds(name, word) for word in _spellings(split))]
    every = [word for words in (*_SPLITS.values(), _VALIDATION) for word in words]
    if not wanted and split == 'train':
        wanted = [name for name in data if not any(_holds(name, word) for word in every)]
    stems: dict[str, str] = {}
    for name in sorted(wanted, key=lambda n: next(i for i, f in enumerate((*_FORMATS, '')) if n.endswith(f))):
        stems.setdefault(name.rsplit('.', 1)[0], name)
    return sorted(stems.values())

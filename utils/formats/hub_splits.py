"""Chooses the files of each split in the repository of a data set.

Many repositories have a list of splits, which names the files of each split. The list is the file <name>.json (usual on
ModelScope) or the entry `configs` in README.md (usual on Hugging Face). If a repository has no list of splits, the
splits are found from the names of files and folders.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.formats.data_file import SUFFIXES
from utils.hub import snapshot as hub

if TYPE_CHECKING:
    from utils.formats.hub_dataset import HubDataset

_SPLITS = {'train': ('train', 'training'), 'test': ('test', 'testing')}
_VALIDATION = ('validation', 'valid', 'val', 'dev', 'eval')
_ALL_SPELLINGS = (*_SPLITS['train'], *_SPLITS['test'], *_VALIDATION)
VALIDATION_NAMES = ('validation', 'valid', 'val', 'dev')
# The words that name a split in a file name. The words of test sets come first, so that a file with several words is
# not trained on. Both hubs take `eval` for a test set.
_IN_NAMES = {
    'test': ('test', 'testing', 'eval', 'evaluation'),
    'validation': VALIDATION_NAMES,
    'train': ('train', 'training'),
}
# The name of a shard, e.g. train_sft-00000-of-00003-a09b74b3ef9c3b56.parquet.
_SHARD = re.compile(r'(\w[\w.]*)-\d{5}-of-\d{5}\b')
_NO_DATA = ('dataset_infos.json', 'dataset_info.json', 'configuration.json', 'metadata.json')
# If a file exists in several formats, only the first format in this order is read.
_FORMATS = ('.parquet', '.jsonl', '.json', '.csv')
_MAX_LIST_BYTES = 1 << 20

# subset -> split -> file names
FileList = dict[str, dict[str, list[str]]]


@dataclass(frozen=True, kw_only=True)
class CardList:
    """The list of splits of a repository, as read from <name>.json or README.md.

    `subsets` is {subset: {split: file names}}. `default` is the default subset, or '' if the list names none.
    """

    subsets: FileList = field(default_factory=dict)
    default: str = ''


def _spellings(split: str) -> tuple[str, ...]:
    return _VALIDATION if split in _VALIDATION else _SPLITS[split]


def _holds(name: str, word: str) -> bool:
    """Return whether a path contains a word, with no letter or digit directly before or after it.

    Case is ignored. Each sequence of characters other than English letters and digits counts as one hyphen. For
    example, 'data/common_en_70k.jsonl' contains the words 'common' and 'common-en'.
    """
    return f'-{_plain(word)}-' in f'-{_plain(name)}-'


@functools.cache
def _plain(text: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


def choose_files(snapshot: hub.Snapshot, entry: HubDataset) -> dict[str, list[str]]:
    """Return a dict from each split of `entry` to the names of its files in the repository, of all subsets of `entry`.

    If the repository has a list of splits (see `read_card_list`), this list names the files. Otherwise, the files are
    chosen by their names. Raises ConfigError if a subset, a split or one of its files is not found.
    """
    listed = read_card_list(snapshot).subsets
    chosen: dict[str, list[str]] = {}
    for split in (*entry.train, *entry.val):
        for subset in entry.subsets:
            names = _from_list(listed, subset, split) if listed else _from_names(snapshot.files, entry, subset, split)
            if not names or not snapshot.files.keys() >= set(names):
                existing = [f'{s} ({", ".join(parts)})' for s, parts in listed.items()] or sorted(snapshot.files)[:20]
                raise ConfigError(
                    f"data set {snapshot.repo}: split '{split}' of subset '{subset}' or one of its files is not found. "
                    f'Found: {", ".join(existing)}. Adapt its entry in DATASET_MAPPING in utils/dataset.py.'
                )
            chosen.setdefault(split, []).extend(names)
    return chosen


def read_card_list(snapshot: hub.Snapshot) -> CardList:
    """Return the list of splits of a repository. If the repository has no list of splits, the result is empty.

    The list is read from the file <name>.json, where <name> is the last part of the repository's id. If this file does
    not exist or has no list of splits, the list is read from README.md. The file that is read is downloaded.
    """
    modelscope_name = f'{snapshot.repo.id.rsplit("/", 1)[-1]}.json'
    for name, reader in ((modelscope_name, _read_modelscope_list), ('README.md', _read_readme_list)):
        # A data file can have the same name as a list of splits, but a data file is larger.
        if name in snapshot.files and (snapshot.files[name][0] or 0) < _MAX_LIST_BYTES:
            text = (snapshot.fetch([name]) / name).read_text(encoding='utf-8', errors='replace')
            listed = reader(text, list(snapshot.files))
            if listed.subsets:
                return listed
    return CardList()


def _read_modelscope_list(text: str, _: Sequence[str]) -> CardList:
    # The text is {subset: {split: {'meta': data file, 'file': archive with images}}}.
    listed: FileList = {}
    try:
        for subset, splits in json.loads(text).items():
            listed[subset] = {}
            for split, about in splits.items():
                if about.get('meta'):
                    # `file` names the archive with the images of the rows.
                    archives = _as_list(about['file']) if about.get('file') else []
                    listed[subset][split] = [*_as_list(about['meta']), *archives]
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):  # not a list of splits
        return CardList()
    return CardList(subsets=listed)


def _read_readme_list(text: str, files: Sequence[str]) -> CardList:
    import yaml  # type: ignore[import-untyped]

    match = re.match(r'---\s*\n(.*?)\n---\s*(?:\n|$)', text, flags=re.DOTALL)
    listed: FileList = {}
    default = ''
    try:
        head = yaml.safe_load(match[1]) if match else None
        configs = head.get('configs') if isinstance(head, dict) else None
        for config in configs or ():
            subset = str(config.get('config_name', 'default'))
            listed[subset] = _splits_of_config(config, files)
            if config.get('default') is True:
                default = subset
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError, re.error):  # not a list of splits
        return CardList()
    return CardList(subsets=listed, default=default)


def _splits_of_config(config: Mapping[str, Any], files: Sequence[str]) -> dict[str, list[str]]:
    """Return {split: file names} for a subset. `config` is the entry of the subset in README.md.

    If `config` has no `data_files`, the splits are found from the names of the files in its `data_dir`.
    """
    folder = str(config.get('data_dir') or '').strip('./')
    inside = [name for name in files if not folder or name.startswith(f'{folder}/')]
    data = config.get('data_files')
    if data is None:
        return splits_by_name(inside)

    parts = data if isinstance(data, list) and data and isinstance(data[0], dict) else [{'path': data}]
    splits: dict[str, list[str]] = {}
    for part in parts:
        patterns = [pattern for pattern in _as_list(part.get('path')) if isinstance(pattern, str)]
        expressions = [_pattern(f'{folder}/{pattern}' if folder else pattern) for pattern in patterns]
        found = [name for expression in expressions for name in sorted(inside) if expression.fullmatch(name)]
        splits[str(part.get('split', 'train'))] = list(dict.fromkeys(found))
    return splits


def _pattern(glob: str) -> re.Pattern[str]:
    """Return the regular expression for a glob pattern in a card. `*` matches inside a folder, `**` across folders."""
    wild = {'**/': '(?:.*/)?', '**': '.*', '*': '[^/]*', '?': '[^/]'}
    parts = re.split(r'(\*\*/|\*\*|\*|\?|\[[^]]+\])', glob.removeprefix('./'))
    return re.compile(''.join(p if p.startswith('[') else wild.get(p, re.escape(p)) for p in parts))


def data_files(files: Iterable[str]) -> list[str]:
    """Return the names of the data files among `files`, sorted. Text files are no data files.

    Hidden files and files with facts about the data set, such as dataset_infos.json, are skipped. If a file exists in
    several formats, for example as a.csv and a.parquet, only one of the names is returned.
    """
    data = [name for name in files if name.lower().endswith(SUFFIXES) and name.rsplit('/', 1)[-1] not in _NO_DATA]
    visible = [name for name in data if not any(part.startswith(('.', '__')) for part in name.split('/'))]
    return _in_one_format(visible)


def splits_by_name(files: Iterable[str]) -> dict[str, list[str]]:
    """Return {split: file names} of the data files among `files`, found from the names of files and folders.

    Files without a split in their names form the split `other`. If there is no split `train`, the split `other` is
    renamed to `train`.
    """
    splits: dict[str, list[str]] = {}
    for name in data_files(files):
        splits.setdefault(_split_of(name), []).append(name)
    if 'other' in splits and 'train' not in splits:
        splits['train'] = splits.pop('other')
    return splits


def _split_of(name: str) -> str:
    """Return the split that the name of a file or of one of its folders contains. Returns `other` if there is none.

    The split is train, validation or test. But the name of a shard tells its split exactly: the split of
    train_sft-00000-of-00003.parquet is train_sft.
    """
    *folders, file = name.split('/')
    if shard := _SHARD.match(file):
        return shard[1]
    for part in (file, *reversed(folders)):
        words = _plain(part).split('-')
        for split, spellings in _IN_NAMES.items():
            if set(spellings) & set(words):
                return split
    return 'other'


def is_held_back(split: str) -> bool:
    """Return whether a word in the name of a split says that the split is for validation or tests."""
    words = set(_plain(split).split('-'))
    return bool(words & {*_IN_NAMES['test'], *_IN_NAMES['validation']})


def subset_of(name: str) -> str:
    """Return the subset to which a file belongs, found from the names of its folders.

    For example, 'data/en/train.csv' belongs to the subset 'en'. Folders that are named `data` or like a split are
    ignored. If no folder remains, the subset is 'default'.
    """
    names = {'data', *(spelling for spellings in _IN_NAMES.values() for spelling in spellings)}
    folders = [folder for folder in name.split('/')[:-1] if folder.lower() not in names]
    return '/'.join(folders) or 'default'


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _from_list(listed: Mapping[str, Mapping[str, list[str]]], subset: str, split: str) -> list[str]:
    """Return the files of a split, from the list of splits. Returns [] if the list does not contain the split.

    The list may use another usual name for the split, such as dev for validation.
    """
    splits = listed.get(subset)
    # An entry without subsets has the subset 'default'. The repository may use a different name for this subset.
    if not splits and subset == 'default' and len(listed) == 1:
        splits = next(iter(listed.values()))
    if not splits:
        return []
    return next((splits[name] for name in (split, *_spellings(split)) if splits.get(name)), [])


def _from_names(files: Iterable[str], entry: HubDataset, subset: str, split: str) -> list[str]:
    """Return the data files whose names match a subset and a split, sorted.

    If no name contains the split `train`, the training files are those without any split in their names. If a file
    exists in several formats (for example parquet and csv), only one of them is returned.
    """
    data = [name for name in files if name.lower().endswith(SUFFIXES) and name.rsplit('/', 1)[-1] not in _NO_DATA]
    data = [name for name in data if not _holds_any(name, entry.not_named)]
    if subset != 'default':
        data = [name for name in data if _holds(name, subset)]

    wanted = [name for name in data if _holds_any(name, _spellings(split))]
    if not wanted and split == 'train':  # training files may have no split in their names
        wanted = [name for name in data if not _holds_any(name, _ALL_SPELLINGS)]

    return _in_one_format(wanted)


def _in_one_format(names: Iterable[str]) -> list[str]:
    """Return the names, sorted. If a file exists as a.csv and a.parquet, only one of the two names is returned."""
    by_stem: dict[str, str] = {}
    for name in sorted(names, key=_format_rank):
        by_stem.setdefault(name.removesuffix('.gz').rpartition('.')[0], name)
    return sorted(by_stem.values())


def _holds_any(name: str, words: Iterable[str]) -> bool:
    return any(_holds(name, word) for word in words)


def _format_rank(name: str) -> int:
    """Return the position of a file's format in _FORMATS, or len(_FORMATS) if the format is not in it."""
    return next((rank for rank, suffix in enumerate(_FORMATS) if name.endswith(suffix)), len(_FORMATS))

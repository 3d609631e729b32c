"""Data sets that are named by their ids on a hub. Chooses the subset and the splits, and downloads the files.

No script of a data set is run. The format of the rows is recognised by the columns, as in local files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.base.errors import ConfigError, did_you_mean
from utils.base.names import HubName
from utils.formats.data_file import SUFFIXES
from utils.formats.hub_splits import (
    VALIDATION_NAMES,
    data_files,
    is_held_back,
    read_card_list,
    splits_by_name,
    subset_of,
)
from utils.hub.clients import Repo
from utils.hub.snapshot import Snapshot, find

# What stands in front of an id to choose a hub.
HUB_PREFIXES: dict[str, HubName] = {'ms': 'modelscope', 'hf': 'huggingface'}
# The names of training splits, the most usual one first. Of several, train_sft is for supervised fine-tuning.
_USUAL = ('train', 'training', 'train_sft')
_MANY = 12


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The names of the files of a repository that a run reads. `train` and `val` are those of the two splits.

    `about` is a text for the log. It names the used and the unused splits, or the single file that was typed.
    """

    train: Sequence[str]
    val: Sequence[str]
    about: str


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """The downloaded files of a data set: their folder, their names (`chosen`), and the repository and its commit."""

    folder: Path
    chosen: Chosen
    served: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """A data set on a hub, named as [hf:|ms:]owner/name[:subset][:split][@revision].

    `word` is the whole name, as the user typed it. `chosen_hub` is None if the name has no prefix hf: or ms:.
    `part` is the first word after owner/name. It can be the name of a subset, of a file, or of a split of the default
    subset.
    """

    word: str
    id: str
    chosen_hub: HubName | None = None
    part: str | None = None
    split: str | None = None
    revision: str = 'master'

    def repos(self, hub_name: HubName) -> list[Repo]:
        """Return the repository, as a list with one item."""
        return [Repo(hub=self.chosen_hub or hub_name, id=self.id, revision=self.revision)]

    def key(self, hub_name: HubName) -> tuple[str, ...]:
        """Return a key to find a data set that the user named twice. `hub_name` is the value of --hub.

        The key consists of the repository, `part` and `split`. For example, with --hub modelscope, ms:owner/name and
        owner/name have the same key. But owner/name and owner/name:train have different keys, even if both mean the
        same split.
        """
        return (str(self.repos(hub_name)[0]), self.part or '', self.split or '')

    def load(self, hub_name: HubName, *, remedy: str = '') -> Fetched:
        """Download the files and return them.

        Raises ConfigError if the repository is not found, if its splits cannot be chosen, or if the download fails.
        `remedy` is appended to the message if the repository is not found.
        """
        snapshot = find(self.repos(hub_name), 'dataset', remedy=remedy)
        chosen = self.choose(snapshot)
        folder = snapshot.fetch([*chosen.train, *chosen.val])
        return Fetched(folder=folder, chosen=chosen, served=str(snapshot.repo), commit=snapshot.commit)

    def names(self, snapshot: Snapshot) -> list[str]:
        """Return the names of the files that a run reads. The rows are not downloaded.

        Raises ConfigError if the files cannot be chosen (see `choose`).
        """
        chosen = self.choose(snapshot)
        return [*chosen.train, *chosen.val]

    def choose(self, snapshot: Snapshot) -> Chosen:
        """Choose the files of the training split and of the validation split. The rows are not downloaded.

        If the user typed the name of a file, only this file is chosen. If the user typed a split, it is the training
        split, and there is no validation split. Raises ConfigError if the subset or the training split cannot be
        chosen, or if its files have no format that is read.
        """
        if self.part in snapshot.files:
            self._check_suffixes([str(self.part)])
            return Chosen(train=[str(self.part)], val=(), about=f'file {self.part}')

        subsets, default = self._subsets(snapshot)
        subset, split = self._choose_subset(subsets, default)
        splits = subsets[subset]
        train, val = self._choose_splits(splits, subset, split)
        files = {name: _with_rows(splits[name]) for name in (train, val) if name}
        unread = [name for split in files for name in splits[split] if name not in files[split]]
        if not files[train]:
            self._check_suffixes(unread)

        about = f'subset {subset}, ' if len(subsets) > 1 else ''
        about += f'training rows from split {train} ({_count(files[train])})'
        about += f', validation rows from split {val} ({_count(files[val])})' if val else ''
        others = [name for name in splits if name not in (train, val)]
        about += f'; splits not used: {", ".join(others)}' if others else ''
        about += f'; files not read: {_listed(unread)}' if unread else ''
        return Chosen(train=files[train], val=files[val] if val else (), about=about)

    def _subsets(self, snapshot: Snapshot) -> tuple[Mapping[str, Mapping[str, list[str]]], str]:
        """Return {subset: {split: file names}} and the name of the default subset.

        If the repository states its subsets and splits, for example in README.md, they are returned. Otherwise they are
        found from the names of files and folders. The default subset may be absent from the dict. Raises ConfigError if
        the repository has no data file.
        """
        card = read_card_list(snapshot)
        subsets = {subset: splits for subset, splits in card.subsets.items() if any(splits.values())}
        if subsets:
            return subsets, card.default or 'default'

        grouped: dict[str, list[str]] = {}
        for name in data_files(snapshot.files):
            grouped.setdefault(subset_of(name), []).append(name)
        if not grouped:
            raise ConfigError(self._no_data(snapshot))
        return {subset: splits_by_name(names) for subset, names in grouped.items()}, 'default'

    def _no_data(self, snapshot: Snapshot) -> str:
        supported = ', '.join(SUFFIXES[:5])
        scripts = sorted(name for name in snapshot.files if name.endswith('.py') and '/' not in name)
        if not scripts:
            shown = _listed(sorted(snapshot.files)) or 'no file'
            return (
                f"--dataset '{self.word}': {snapshot.repo} holds no file that is read ({supported}). Found: {shown}. "
                'Convert its rows to one of these formats and give the file.'
            )
        converted = ''
        if snapshot.repo.hub == 'huggingface':
            converted = f'try the copy in parquet that the hub makes: --dataset hf:{self.id}@refs/convert/parquet, or '
        return (
            f"--dataset '{self.word}': {snapshot.repo} brings a loading script ({scripts[0]}) and no data files, and a "
            f'script of a data set is never run. To use it, {converted}give a copy of its rows as a {supported} file.'
        )

    def _choose_subset(self, subsets: Mapping[str, Mapping[str, list[str]]], default: str) -> tuple[str, str | None]:
        """Return (subset, split). The split is None if the user typed no split.

        `self.part` is the subset or the split that the user typed. If no subset was typed, the subset `default` is
        used. If there is no subset `default`, the only subset is used. Raises ConfigError if no subset can be chosen,
        or if `self.part` is neither a subset nor a split.
        """
        names = list(subsets)
        usual = default if default in subsets else names[0] if len(names) == 1 else None
        if self.part is None and usual is None:
            raise ConfigError(
                f"--dataset '{self.word}': the data set has the subsets {_listed(names)}. Name one, e.g. "
                f'--dataset {self._typed(names[0])}'
            )
        if self.part is None or self.part in subsets:
            return str(self.part or usual), self.split
        if self.split is None and usual is not None and self.part in subsets[usual]:
            return usual, self.part

        splits = [] if usual is None else list(subsets[usual])
        raise ConfigError(
            f"--dataset '{self.word}': '{self.part}' is neither a subset nor a split nor a file of the data set"
            f'{did_you_mean(str(self.part), [*names, *splits])} Subsets: {_listed(names)}'
            + (f'; splits of {usual}: {_listed(splits)}' if usual else '')
            + f'. Name one of them, e.g. --dataset {self._typed(names[0])}'
        )

    def _choose_splits(self, splits: Mapping[str, list[str]], subset: str, named: str | None) -> tuple[str, str | None]:
        """Return (training split, validation split). The second name is None if there is no validation split.

        `named` is the split that the user typed, or None. A typed split becomes the training split. Then no validation
        split is chosen. Raises ConfigError if the typed split has no files, or if no split is typed and the names do
        not show which split is for training.
        """
        filled = [name for name, files in splits.items() if files]
        if named in filled:
            return str(named), None
        if named is not None:
            raise ConfigError(
                f"--dataset '{self.word}': subset '{subset}' has no split '{named}'{did_you_mean(named, filled)} Its "
                f'splits with files are {_listed(filled)}. Name one, e.g. --dataset {self._typed(subset, filled[0])}'
            )

        candidates = [name for name in filled if not is_held_back(name)]
        by_name = [name for name in candidates if name.lower().startswith('train')] or candidates
        train = next((name for usual in _USUAL for name in by_name if name.lower() == usual), None)
        if train is None and len(by_name) == 1:
            train = by_name[0]
        if train is None:
            raise ConfigError(
                f"--dataset '{self.word}': subset '{subset}' has the splits {_listed(filled)}, and their names do not "
                f'tell which one to train on. Name it, e.g. --dataset {self._typed(subset, (by_name or filled)[0])}'
            )

        # The validation split of train_sft is validation_sft.
        end = train[len('train') :] if train.lower().startswith('train_') else ''
        return train, next((name for name in filled if name.lower() in {f'{v}{end}' for v in VALIDATION_NAMES}), None)

    def _check_suffixes(self, names: Sequence[str]) -> None:
        if other := [name for name in names if not name.lower().endswith(SUFFIXES)]:
            raise ConfigError(
                f"--dataset '{self.word}': {other[0]} cannot be read: the name of a data file must end in one of "
                f'{", ".join(SUFFIXES)}. Name a subset with such files, or convert the file and type '
                '--dataset PATH with the path of the converted file.'
            )

    def _typed(self, *parts: str) -> str:
        """Return the value of --dataset for this data set with the subset and, optionally, the split in `parts`.

        For example, ('en', 'train') gives 'hf:owner/name:en:train'. The prefix and the revision stay as the user typed
        them.
        """
        prefix = self.word[: self.word.index(self.id)]
        revision = '' if self.revision == 'master' else f'@{self.revision}'
        return ':'.join((prefix + self.id, *parts)) + revision


def _with_rows(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(SUFFIXES)]


def _count(names: Sequence[str]) -> str:
    return f'{len(names)} file' + 's' * (len(names) != 1)


def _listed(names: Sequence[str]) -> str:
    more = f' and {len(names) - _MANY} more' if len(names) > _MANY else ''
    return ', '.join(names[:_MANY]) + more

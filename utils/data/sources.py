"""Reads the values of --dataset and --val_dataset. One value is called a word.

A word is a registered name, a file, a folder, a glob, or the id of a data set on a hub. A number of rows (name#500) or
a share of the training rows (name%0.3) may follow.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from utils.base.errors import ConfigError, close_names, did_you_mean
from utils.dataset import DATASET_MAPPING
from utils.formats.data_file import KINDS, SUFFIXES, TEXT_SUFFIXES
from utils.formats.hub_dataset import HubDataset
from utils.formats.hub_files import HUB_PREFIXES, HubFiles

_ALL_SUFFIXES = (*SUFFIXES, *TEXT_SUFFIXES)
_HUB_FORM = '[hf:|ms:]owner/name[:subset][:split][@revision]'
_HUB_WORD = re.compile(
    r'(?:(?P<hub>hf|ms):)?(?P<id>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)'
    r'(?::(?P<part>[^:@]+))?(?::(?P<split>[^:@]+))?(?:@(?P<revision>[\w./-]+))?',
    flags=re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data set that one value of --dataset or --val_dataset names, and how many of its rows are used.

    `path` is set for a file, folder or glob, and `hub` for the id of a data set on a hub. For a registered name, both
    are None.
    """

    name: str
    # The number of rows to draw (name#500).
    sample: int | None
    path: Path | None = None
    hub: HubFiles | None = None
    # The share of the training rows (name%0.3).
    share: Fraction | None = None

    @property
    def entry(self) -> HubDataset | HubFiles | None:
        """Return the description of a data set on a hub. Returns None for local files and for functions."""
        registered = None if self.path is not None else DATASET_MAPPING.get(self.name)
        return registered if isinstance(registered, HubDataset) else self.hub

    @property
    def is_users_function(self) -> bool:
        """Return whether the rows come from a function of DATASET_MAPPING that is not part of this toolkit."""
        if self.path is not None or self.entry is not None:
            return False
        return not DATASET_MAPPING[self.name].__module__.startswith('utils.formats.')


def parse_source(word: str) -> Source:
    """Return the data set that a value of --dataset names. No file is opened, and the network is not used.

    `word` is the value, for example 'sql-demo#500'. Raises ConfigError if the value is not valid. For an unknown name,
    the message suggests similar names.
    """
    whole, share = _split_share(word)
    return replace(_parse_without_share(whole), share=share)


def _split_share(word: str) -> tuple[str, Fraction | None]:
    """Split a word such as name%0.3 into its name and its share, here ('name', Fraction(3, 10)).

    Returns (word, None) if the word has no share. A % is part of the name in three cases: a / follows it (a%b/c), the
    word ends in the suffix of a data file (a%b.jsonl), or a # follows it and no number is between them (a%b#5).

    Raises ConfigError if the share is not between 0 and 1, or if the word has both a share and a number of rows
    (name%0.3#5).
    """
    name, mark, share = word.rpartition('%')
    number, counted, _ = share.partition('#')
    is_number = number.replace('.', '').isdecimal()
    if not mark or '/' in share or word.lower().endswith(_ALL_SUFFIXES) or (counted and not is_number):
        return word, None

    if counted or re.search(r'#\d+$', name):
        raise ConfigError(
            f"--dataset '{word}': # and % both say how many rows are used. Keep one of them: # for a number of rows, % "
            'for a share of the training rows.'
        )
    if not re.fullmatch(r'0*\.\d+', share) or not Fraction(share):
        raise ConfigError(
            f"--dataset '{word}': the share after % must be above 0 and below 1, got '{share}'. Write for example "
            'sql-demo%0.3 for 30 % of the training rows.'
        )
    return name, Fraction(share)


def _parse_without_share(word: str) -> Source:
    """Return the data set that `word` names, for example 'sql-demo#500'. `word` must not contain a share (%0.3)."""
    if '://' in word:
        raise ConfigError(
            f"--dataset '{word}': this is a URL, and rows are not fetched from the web. Download the file and give its "
            'path.'
        )

    name, mark, count = word.rpartition('#')
    if not mark:
        name = word
    elif not count.isdecimal() and word.lower().endswith(_ALL_SUFFIXES):
        # The # is part of a file name.
        name, mark, count = word, '', ''
    if mark and not (count.isdecimal() and len(count) < 19 and int(count) > 0):
        raise ConfigError(
            f"--dataset '{word}': the number of rows after # must be 1 or more, got '{count}'. Write for example "
            'sql-demo#500.'
        )
    sample = int(count) if mark else None

    if name in DATASET_MAPPING:
        return Source(name=name, sample=sample)
    if (found := _hub_files(name)) is not None:
        return Source(name=name, sample=sample, hub=found)

    is_folder = name.endswith('/') or ('/' in name and ('.' not in Path(name).name or Path(name).is_dir()))
    if name.lower().endswith(_ALL_SUFFIXES) or is_folder or glob.has_magic(name):
        return Source(name=name, sample=sample, path=Path(name))

    if '/' in name or '.' in name:
        raise ConfigError(
            f"--dataset '{name}': this is neither a registered data set nor a {KINDS} file. Write a folder as "
            f'{name}/, and a data set of a hub as {_HUB_FORM}.'
        )
    raise ConfigError(
        f"--dataset '{name}' is not registered{did_you_mean(name, DATASET_MAPPING)} "
        f'Give a {KINDS} file. If {name} is a folder of such files, type ./{name}. To register {name}, add it to '
        'DATASET_MAPPING in utils/dataset.py.'
    )


def _hub_files(name: str) -> HubFiles | None:
    """Return the data set with the id `name` on a hub. Returns None if `name` is not such an id.

    Without the prefix hf: or ms:, a name is not an id if a local path has this name, or if it is the name of a data
    file.
    """
    match = _HUB_WORD.fullmatch(name)
    if match is None:
        return None

    prefix = match['hub']
    has_owner = '/' in match['id']
    # The first data sets of Hugging Face have no owner.
    if not has_owner and prefix != 'hf':
        return None
    if prefix is None and (Path(name).exists() or (name.lower().endswith(_ALL_SUFFIXES) and not match['part'])):
        return None
    return HubFiles(
        word=name,
        id=match['id'],
        chosen_hub=HUB_PREFIXES[prefix] if prefix else None,
        part=match['part'],
        split=match['split'],
        revision=match['revision'] or 'master',
    )


def shadowed_id(source: Source) -> str | None:
    """Return the name of a local data set if the name could also be the id of a data set on a hub, else None."""
    match = _HUB_WORD.fullmatch(source.name)
    is_id = source.path is not None and match is not None and '/' in match['id'] and source.path.exists()
    return source.name if is_id and not source.name.lower().endswith(_ALL_SUFFIXES) else None


def not_found_remedy(source: Source) -> str:
    """Return the remedy for the message that a hub does not have the data set.

    The remedy names similar ids, if there are any. If the user named no hub, it also says how to name one.
    """
    assert source.hub is not None, 'only a data set of a hub can be missing on it'
    known = [
        repo_id
        for entry in DATASET_MAPPING.values()
        if isinstance(entry, HubDataset)
        for repo_id in (entry.id, *entry.moved, entry.hf_id or entry.id)
    ]
    close = [repo_id for repo_id in close_names(source.hub.id, known) if repo_id != source.hub.id]
    remedy = f' Ids close to it: {", ".join(close)}.' if close else ''
    if source.hub.chosen_hub is None:
        remedy += f' A data set of Hugging Face is hf:{source.hub.id}, one of ModelScope ms:{source.hub.id}.'
        remedy += f' A local folder of this name is not there either (looked in {Path.cwd()}).'
    return remedy


def find_files(source: Source) -> list[Path]:
    """Return the data files of a path, folder or glob, sorted. Raises ConfigError if there are no data files.

    If a glob matches anything but data files, or both files with rows and files of plain text, also raises ConfigError.
    Also raises ConfigError if a file name is not UTF-8, because logs and records name the file of a row.
    """
    files = _matching_files(source)
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            shown = os.fsencode(file).decode('utf-8', 'backslashreplace')
            raise ConfigError(
                f"--dataset '{source.name}': the file name '{shown}' is not UTF-8. Rename the file, or unpack its "
                'archive with the encoding it was made in.'
            ) from None
    return files


def _matching_files(source: Source) -> list[Path]:
    path = source.path
    assert path is not None, 'a registered data set has no files of its own here'
    if path.is_file():
        if not path.name.lower().endswith(_ALL_SUFFIXES):
            raise ConfigError(
                f"--dataset '{source.name}': {path} is not a {KINDS} file. Give a file of one of these kinds."
            )
        return [path]

    if path.is_dir():
        files = _in_folder(path)
        if not files:
            raise ConfigError(
                f"--dataset '{source.name}': folder {path} holds no {KINDS} file, and the folders in it are not "
                f'searched. Give files, or a glob such as {path}/**/*.jsonl in quotes.'
            )
        return files

    if not glob.has_magic(source.name):
        if path.exists():
            raise ConfigError(
                f"--dataset '{source.name}': {path} is a pipe or a device, which can be read only once. Write its rows "
                'to a file and give that file.'
            )
        is_file = source.name.lower().endswith(_ALL_SUFFIXES)
        kind = 'data file' if is_file else 'data folder'
        similar = did_you_mean(path.name, _names_next_to(path, files=is_file))
        raise ConfigError(f'{kind} {path} is not there (looked in {path.absolute().parent}){similar} Correct the path.')

    files = sorted(map(Path, glob.glob(source.name, recursive=True)))  # noqa: PTH207 (Path.glob: no absolute pattern)
    if not files:
        raise ConfigError(
            f"--dataset '{source.name}': the pattern matches no file (looked from {Path.cwd()}). Correct the pattern, "
            'or start the command in another folder.'
        )
    for file in files:
        if not file.is_file() or not file.name.lower().endswith(_ALL_SUFFIXES):
            raise ConfigError(
                f"--dataset '{source.name}': the pattern matches {file}, which is not a {KINDS} file. Use a pattern "
                'that matches only data files.'
            )
    if other := next((file for file in files if is_text_file(file) != is_text_file(files[0])), None):
        raise ConfigError(
            f"--dataset '{source.name}': the pattern matches {files[0]} and {other}. A pattern must not match both "
            'files with rows and files of plain text. Give one pattern for each kind of file.'
        )
    return files


def _names_next_to(path: Path, *, files: bool) -> list[str]:
    """Return the names of the data files in the folder of `path`, or of the folders in it if `files` is False."""
    try:
        found = sorted(path.absolute().parent.iterdir())
    except OSError:
        return []
    is_data = [f.name.lower().endswith(_ALL_SUFFIXES) and f.is_file() if files else f.is_dir() for f in found]
    return [f.name for f, wanted in zip(found, is_data, strict=True) if wanted and f.name.isprintable()]


def is_text_file(file: Path) -> bool:
    """Return whether a data file holds plain text, by its name."""
    return file.name.lower().endswith(TEXT_SUFFIXES)


def _in_folder(folder: Path) -> list[Path]:
    """Return the data files directly in a folder, sorted. Files whose names begin with a dot are left out.

    Files of plain text (.txt, .md) are returned only if the folder has no other data files. So a README.md next to
    data files is not read as data.
    """
    found = sorted(f for f in folder.iterdir() if f.name.lower().endswith(_ALL_SUFFIXES) and not f.name.startswith('.'))
    return [file for file in found if not is_text_file(file)] or found


def _is_gone(source: Source | None, started_in: str | None) -> bool:
    """Return whether a relative path matches no file, and the earlier run was started in a different folder.

    `started_in` is the folder in which the earlier run was started. It is None if there is no earlier run.
    """
    path = None if source is None else source.path
    if started_in in (None, abbreviated(Path.cwd())) or path is None or path.is_absolute():
        return False
    return not path.exists() and not glob.glob(str(path), recursive=True)  # noqa: PTH207


def _check_not_moved(source: Source, started_in: str | None) -> None:
    """Raise ConfigError if the earlier run read a local path, but this command would read the same name from a hub.

    `started_in` is the folder in which the earlier run was started. It is None if there is no earlier run. For example,
    the earlier run read the local folder owner/name. If the current folder has no such path, owner/name is read as the
    id of a data set on a hub.
    """
    if started_in is None:
        return
    there = Path(started_in).expanduser() / source.name
    if there.exists():
        raise ConfigError(
            f"--dataset '{source.name}': the earlier run read {there}. In this folder, the same name is the id of a "
            f'data set on a hub. Start the command in {started_in}, where the earlier run was started.'
        )


def abbreviated(path: Path) -> str:
    """Return the path as text, with ~ for the home folder, because records must not contain a user name."""
    home = Path.home()
    if path.is_relative_to(home) and home != home.parent:
        return f'~/{path.relative_to(home)}'
    return str(path)


def of_flag(problem: str, flag: str) -> str:
    """Return the message `problem` with --`flag` in place of the --dataset at its beginning.

    A message that does not begin with --dataset is returned unchanged.
    """
    rest = problem.removeprefix('--dataset ')
    return problem if rest == problem else f'--{flag} {rest}'


def check_sources(words: Sequence[str], started_in: str | None = None, *, val_words: Sequence[str] = ()) -> list[str]:
    """Return an error message for each value that is not valid, each missing file, and each file named twice.

    `words` are the values of --dataset, and `val_words` are the values of --val_dataset. If they come from the record
    of an earlier run, `started_in` is the folder in which that run was started.
    """
    problems: list[str] = []
    named: dict[Path, str] = {}
    typed = [*(('dataset', word) for word in words), *(('val_dataset', word) for word in val_words)]
    for flag, word in typed:
        source: Source | None = None
        try:
            source = parse_source(word)
            files = find_files(source) if source.path is not None else []
            if source.hub is not None and source.hub.chosen_hub is None:
                _check_not_moved(source, started_in)
        except ConfigError as error:
            hint = ''
            if _is_gone(source, started_in):
                hint = f' The run was started in {started_in}: run the command there.'
            problems += [of_flag(problem, flag) + hint for problem in error.problems]
            continue

        for file in files:
            if file.resolve() in named:
                problems.append(
                    f"--{flag} '{word}': {named[file.resolve()]} already names {file}, so its rows would be used "
                    'twice. Remove one of the two.'
                )
            named.setdefault(file.resolve(), f"--{flag} '{word}'")
    return problems


def val_set_names(words: Sequence[str]) -> list[str]:
    """Return the names that metrics use for the data sets of --val_dataset, e.g. ['math'] for val/math.jsonl.

    `words` are the values of --val_dataset. Any characters but letters, digits, '.', '_' and '-' become one '_'. A name
    that is taken gets a number: math_2.
    """
    names: list[str] = []
    for word in words:
        source = parse_source(word)
        parts = (
            [source.name] if source.path is None else [_without_suffix(source.path.name), *source.path.parts[-2::-1]]
        )
        safe = (re.sub(r'[^\w.-]+', '_', part).strip('._-') for part in parts)
        base = next((name for name in safe if name), 'set')
        numbered = (base if number == 1 else f'{base}_{number}' for number in itertools.count(1))
        taken = {name.casefold() for name in names}
        names.append(next(name for name in numbered if name.casefold() not in taken))
    return names


def _without_suffix(name: str) -> str:
    longest_first = sorted(_ALL_SUFFIXES, key=len, reverse=True)
    suffix = next((suffix for suffix in longest_first if name.lower().endswith(suffix)), '')
    return name[: len(name) - len(suffix)]

"""Reads the words of --dataset and --val_dataset: names of registered data sets, files, folders and globs of files."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from utils.base.errors import ConfigError, did_you_mean
from utils.dataset import DATASET_MAPPING
from utils.formats.data_file import SUFFIXES

_KINDS = '.json, .jsonl, .csv (each also .gz) or .parquet'


@dataclass(frozen=True, kw_only=True)
class Source:
    """One word of --dataset: a registered name, file, folder or glob, and how many of its rows are used."""

    name: str
    # The number of rows to draw (name#500).
    sample: int | None
    path: Path | None
    # The share of the training rows (name%0.3).
    share: Fraction | None = None


def parse_source(word: str) -> Source:
    """Return the source that a word of --dataset names. No file is opened.

    Raises ConfigError if the word is not a valid source. For an unknown name, the message suggests similar names.
    """
    whole, share = _split_share(word)
    return replace(_parse_unshared(whole), share=share)


def _split_share(word: str) -> tuple[str, Fraction | None]:
    """Return the word without `%` and its share, and the share. Returns (word, None) if the word has no share.

    A % is part of the name if a / follows it, or if the word ends in the suffix of a data file.
    """
    name, mark, share = word.rpartition('%')
    number, counted, _ = share.partition('#')
    is_number = number.replace('.', '').isdecimal()
    if not mark or '/' in share or word.lower().endswith(SUFFIXES) or (counted and not is_number):
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


def _parse_unshared(word: str) -> Source:
    """Return the source of a word that has no share."""
    if '://' in word:
        raise ConfigError(
            f"--dataset '{word}': this is a URL, and rows are not fetched from the web. Download the file and give its "
            'path.'
        )

    name, mark, count = word.rpartition('#')
    if not mark:
        name = word
    elif not count.isdecimal() and word.lower().endswith(SUFFIXES):
        # The # is part of a file name.
        name, mark, count = word, '', ''
    if mark and not (count.isdecimal() and len(count) < 19 and int(count) > 0):
        raise ConfigError(
            f"--dataset '{word}': the number of rows after # must be 1 or more, got '{count}'. Write for example "
            'sql-demo#500.'
        )
    sample = int(count) if mark else None

    if name in DATASET_MAPPING:
        return Source(name=name, sample=sample, path=None)

    is_folder = name.endswith('/') or ('/' in name and '.' not in Path(name).name)
    if name.lower().endswith(SUFFIXES) or is_folder or glob.has_magic(name):
        return Source(name=name, sample=sample, path=Path(name))

    if '/' in name or '.' in name:
        raise ConfigError(
            f"--dataset '{name}': this is neither a registered data set nor a {_KINDS} file. Write a folder as {name}/."
            + _hub_remedy(name)
        )
    raise ConfigError(
        f"--dataset '{name}' is not registered{did_you_mean(name, DATASET_MAPPING)} "
        f'Give a {_KINDS} file, a folder of them (./{name}), or add an entry to DATASET_MAPPING in utils/dataset.py.'
    )


def _hub_remedy(name: str) -> str:
    """Return a remedy for a name that may be the id of a data set on a hub. Returns '' for all other names."""
    if not re.fullmatch(r'[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*', name):
        return ''
    return (
        ' Only registered data sets are fetched from a hub. Download any other one and give its files, e.g. '
        f'hf download {name} --repo-type dataset --local-dir rows'
    )


def find_files(source: Source) -> list[Path]:
    """Return the data files of a path, folder or glob, sorted. Raises ConfigError if there are no data files.

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
        return [path]

    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.lower().endswith(SUFFIXES) and not f.name.startswith('.'))
        if not files:
            raise ConfigError(
                f"--dataset '{source.name}': folder {path} holds no {_KINDS} file, and the folders in it are not "
                f'searched. Give files, or a glob such as {path}/**/*.jsonl in quotes.'
            )
        return files

    if not glob.has_magic(source.name):
        if path.exists():
            raise ConfigError(
                f"--dataset '{source.name}': {path} is a pipe or a device, which can be read only once. Write its rows "
                'to a file and give that file.'
            )
        kind = 'data file' if source.name.lower().endswith(SUFFIXES) else 'data folder'
        missing = f'{kind} {path} is not there (looked in {path.absolute().parent}).'
        raise ConfigError(missing + _hub_remedy(source.name))

    files = sorted(map(Path, glob.glob(source.name, recursive=True)))  # noqa: PTH207 (Path.glob: no absolute pattern)
    if not files:
        raise ConfigError(
            f"--dataset '{source.name}': the pattern matches no file (looked from {Path.cwd()}). Correct the pattern, "
            'or start the command in another folder.'
        )
    for file in files:
        if not file.is_file() or not file.name.lower().endswith(SUFFIXES):
            raise ConfigError(
                f"--dataset '{source.name}': the pattern matches {file}, which is not a {_KINDS} file. Use a pattern "
                'that matches only data files.'
            )
    return files


def _is_gone(source: Source | None, started_in: str | None) -> bool:
    """Return True if a relative path matches no file and its run was started in a different folder."""
    path = None if source is None else source.path
    if started_in in (None, abbreviated(Path.cwd())) or path is None or path.is_absolute():
        return False
    return not path.exists() and not glob.glob(str(path), recursive=True)  # noqa: PTH207


def abbreviated(path: Path) -> str:
    """Return the path as text, with ~ for the home folder, because records must not contain a user name."""
    home = Path.home()
    if path.is_relative_to(home) and home != home.parent:
        return f'~/{path.relative_to(home)}'
    return str(path)


def of_flag(problem: str, flag: str) -> str:
    """Return a message about a word of --dataset as a message about a word of the flag."""
    rest = problem.removeprefix('--dataset ')
    return problem if rest == problem else f'--{flag} {rest}'


def check_sources(words: Sequence[str], started_in: str | None = None, *, val_words: Sequence[str] = ()) -> list[str]:
    """Return an error message for each word that is not a valid source, each missing file and each file named twice.

    `words` are the words of --dataset, `val_words` the words of --val_dataset. If they come from the record of a run,
    `started_in` is the folder in which they were typed.
    """
    problems: list[str] = []
    named: dict[Path, str] = {}
    typed = [*(('dataset', word) for word in words), *(('val_dataset', word) for word in val_words)]
    for flag, word in typed:
        source: Source | None = None
        try:
            source = parse_source(word)
            files = find_files(source) if source.path is not None else []
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
    """Return the name of each validation set in metrics, e.g. math for the file val/math.jsonl.

    Only letters, digits, '.', '_' and '-' are kept. A name that is taken gets a number: math_2.
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
    longest_first = sorted(SUFFIXES, key=len, reverse=True)
    suffix = next((suffix for suffix in longest_first if name.lower().endswith(suffix)), '')
    return name[: len(name) - len(suffix)]

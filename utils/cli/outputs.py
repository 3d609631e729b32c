"""Checks that the files and folders a command will write can be created, and that nothing is replaced."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import tempfile
from pathlib import Path

from utils.base.errors import ConfigError, Problems
from utils.base.names import CONVERTER, LLAMA_CPP
from utils.cli.arguments import InferArguments, SftArguments
from utils.data.sources import Source, find_files, parse_source


def check_writable(flag: str, given: str, target: Path, problems: Problems) -> None:
    """Add a problem if `target` cannot be created, for example because its folder is not writable.

    The message names the flag (`flag`, without --) and the value that was typed for the flag (`given`).
    """
    try:
        existing = next(p for p in target.absolute().parents if p.exists())
        if not existing.is_dir():
            problems.add(f'--{flag} {given} cannot be created: {existing} is a file. Give another path.')
        elif not os.access(existing, os.W_OK | os.X_OK):
            problems.add(
                f'--{flag} {given} cannot be written: you have no write permission for {existing}. Give another path.'
            )
        else:
            # Try it, because the permissions do not show a full quota or a file system without new folders (/proc).
            tempfile.TemporaryDirectory(prefix='.assay-', dir=existing).cleanup()
    except OSError as error:  # `exists` also raises OSError, if a name is too long
        problems.add(f'--{flag} {given} cannot be created: {error.strerror}. Give another path.')


def check_clean_copy(target: Path, args: SftArguments, problems: Problems) -> None:
    """Add a problem if the file of --write_clean exists or cannot be written.

    Also add a problem if --dataset or --val_dataset names a folder or a pattern that would include the file. The next
    run would read the rows twice: from the old files and from this file.
    """
    given = f'--write_clean {target}'
    sources = [source for word in itertools.chain(*args.datasets_read()) for source in _local_source(word)]
    if target.resolve() in [file.resolve() for source in sources for file in _files_of(source)]:
        problems.add(f'{given} is one of the data files, which are never changed. Name a new file.')
    elif target.exists() or target.is_symlink():
        problems.add(f'{given} exists already and is not replaced. Name a new file.')
    elif any(_will_name(source, target) for source in sources):
        problems.add(
            f'{given}: --dataset or --val_dataset names a folder or a pattern that includes this new file, so the next '
            'run would read the rows twice, from the old files and from the new file. Name a file in another folder.'
        )
    else:
        check_writable('write_clean', str(target), target, problems)


def _local_source(word: str) -> list[Source]:
    """Return [source] if a word of --dataset names local files, else []. Invalid words are reported elsewhere."""
    try:
        source = parse_source(word)
    except ConfigError:
        return []
    return [] if source.path is None else [source]


def _files_of(source: Source) -> list[Path]:
    """Return the files of a source. Returns [] if the source has no files; a different check reports this."""
    try:
        return find_files(source)
    except ConfigError:
        return []


def _will_name(source: Source, target: Path) -> bool:
    """Return whether the folder or pattern of a data set would include the file `target` if the file existed."""
    assert source.path is not None, 'it is local'
    if source.path.is_dir():
        return target.absolute().parent.resolve() == source.path.resolve()
    return glob.has_magic(source.name) and fnmatch.fnmatch(str(target.absolute()), str(source.path.absolute()))


def check_gguf(args: InferArguments, gguf: str, problems: Problems) -> None:
    """Add a problem if the file of --gguf exists or cannot be written, or if --llama_cpp has no converter."""
    target = Path(gguf)
    if target.exists():
        problems.add(f'--gguf {gguf} exists already and is not replaced. Name a new file.')
    else:
        check_writable('gguf', gguf, target, problems)

    if args.llama_cpp is not None and not (Path(args.llama_cpp) / CONVERTER).is_file():
        problems.add(
            f'--llama_cpp {args.llama_cpp} has no {CONVERTER}. Name the folder of a checkout: git clone --depth 1 '
            f'{LLAMA_CPP}'
        )

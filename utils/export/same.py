"""Compares a merged folder with its base, byte for byte: python -m utils.export.same MERGED BASE

This module imports only the standard library and light modules, so that a comparison needs little memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.base.checkpoint import MANIFEST, PICKLE_SUFFIXES, sha256_of
from utils.base.errors import ConfigError
from utils.base.files import read_json
from utils.base.logger import logger, set_up_logging
from utils.base.names import SFT_ARGS
from utils.loading.tensor_ranges import SUFFIX, TensorRange, tensor_ranges

# Merging writes this file: the sha256 of each tensor and each file that it changed.
MERGE_JSON = 'merge.json'
# Files that belong to a run and not to a model, and the card of the base, which does not describe a merged model.
_NOT_OF_MODEL = {MERGE_JSON, MANIFEST, SFT_ARGS, 'trainer_state.json', 'README.md'}
# The beginnings of the names of files that llm_infer.py writes into a folder: answers, and comparisons with a server.
_WRITTEN_LATER = ('infer_result', 'check_server')
# Weights in other formats, Modelfiles, and code, which is never passed on.
_NOT_CARRIED = (SUFFIX, *PICKLE_SUFFIXES, '.py', '.gguf', '.onnx', '.h5', '.msgpack', '.ot', '.tflite', '.npz',
                '.modelfile', '.old')  # fmt: skip


@dataclass(kw_only=True)
class Comparison:
    """The result of comparing a merged folder with its base.

    `changed` and `changed_files` list the changes that merging made according to merge.json. `differences` lists all
    other differences.
    """

    changed: list[str] = field(default_factory=list)
    identical: int = 0
    changed_files: list[str] = field(default_factory=list)
    identical_files: int = 0
    differences: list[str] = field(default_factory=list)

    def says(self) -> str:
        """Return a sentence with the numbers of changed and identical tensors and files."""
        files = f'{self.identical_files} files identical'
        if self.changed_files:
            files += f', {", ".join(self.changed_files)} written by merging'
        return f'{len(self.changed)} tensors changed, {self.identical} identical to the byte; {files}'


def carried_files(folder: Path) -> list[str]:
    """Return the sorted names of the files in `folder` that belong to the model, without weights and code.

    Merging copies these files from the base model.
    """
    top = [path for path in folder.iterdir() if path.is_file()]
    further = folder.glob('additional_chat_templates/*.jinja')
    return sorted(
        path.relative_to(folder).as_posix()
        for path in [*top, *further]
        if not path.name.startswith(('.', *_WRITTEN_LATER))
        and path.name not in _NOT_OF_MODEL
        and path.suffix.lower() not in _NOT_CARRIED
    )


def file_changes(merged: Path, base: Path) -> dict[str, str | None]:
    """Return {name: sha256 of the file in `merged`} for each file that differs between the two folders.

    Only the files that `carried_files` returns are compared. If only `base` has a file, its value is None.
    """
    hashes = [{name: sha256_of(folder / name) for name in carried_files(folder)} for folder in (merged, base)]
    return {
        name: hashes[0].get(name)
        for name in sorted({*hashes[0], *hashes[1]})
        if hashes[0].get(name) != hashes[1].get(name)
    }


def compare(merged: Path, base: Path) -> Comparison:
    """Compare two folders: all tensors, and the files that `carried_files` returns. Returns the Comparison.

    A changed tensor or file is not a difference if merge.json in `merged` lists the sha256 of its new content. Raises
    ConfigError if a folder cannot be read.
    """
    stated: Mapping[str, Any] = {'tensors': {}, 'files': {}}
    if (merged / MERGE_JSON).is_file():
        keys = {'tensors': {'*': str}, 'files': {'*': str | None}}
        stated = read_json(merged / MERGE_JSON, keys=keys)

    made = Comparison()
    _compare_tensors(made, tensor_ranges(merged), tensor_ranges(base), stated['tensors'])
    changes = file_changes(merged, base)
    for name, digest in changes.items():
        if name in stated['files'] and stated['files'][name] == digest:
            made.changed_files.append(name)
        else:
            made.differences.append(f'file {name}: {_what_differs(merged / name, base / name)}')
    made.identical_files = len(set(carried_files(merged)) - set(changes))
    return made


def _compare_tensors(
    made: Comparison, found: Mapping[str, TensorRange], wanted: Mapping[str, TensorRange], stated: Mapping[str, str]
) -> None:
    for name in sorted({*found, *wanted}):
        if name not in found or name not in wanted:
            where = 'the base' if name in wanted else 'the merged folder'
            made.differences.append(f'tensor {name}: only {where} has it')
        elif problem := _misplaced(found[name], wanted[name]):
            made.differences.append(f'tensor {name}: {problem}')
        elif all(one == other for one, other in zip(found[name].blocks(), wanted[name].blocks(), strict=True)):
            made.identical += 1
        elif stated.get(name) == found[name].sha256():
            made.changed.append(name)
        else:
            listed = 'are not those that merging wrote' if name in stated else 'differ from the base'
            made.differences.append(f'tensor {name}: its bytes {listed}')


def _misplaced(found: TensorRange, wanted: TensorRange) -> str | None:
    """Return how the file, dtype, shape or size of a tensor differs from that in the base, or None if all are equal."""
    for what, one, other in (
        ('file', found.file.name, wanted.file.name),
        ('dtype', found.dtype, wanted.dtype),
        ('shape', found.shape, wanted.shape),
        ('size', found.end - found.start, wanted.end - wanted.start),
    ):
        if one != other:
            return f'its {what} is {one}, in the base {other}'
    return None


def _what_differs(found: Path, wanted: Path) -> str:
    """Return how two files differ. For JSON files, the keys with different values are named."""
    if not found.is_file() or not wanted.is_file():
        return f'only {"the merged folder" if found.is_file() else "the base"} has it'
    try:
        one, other = read_json(found), read_json(wanted)
    except ConfigError:  # no JSON object
        return 'its bytes differ from the base'
    keys = [key for key in sorted({*one, *other}) if key not in one or key not in other or one[key] != other[key]]
    return f'its keys {", ".join(keys[:5])} differ from the base' if keys else 'its bytes differ from the base'


def main(argv: Sequence[str]) -> int:
    """Compare two folders (argv: MERGED BASE), and print what differs.

    Returns the exit code: 0 if merging explains all differences, 1 if not, or 2 if a folder cannot be compared.
    """
    set_up_logging()
    if len(argv) != 2 or argv[0].startswith('-'):
        print('usage: python -m utils.export.same MERGED BASE', file=sys.stderr)
        return 2
    merged, base = map(Path, argv)
    try:
        if missing := [folder for folder in (merged, base) if not folder.is_dir()]:
            raise ConfigError(f'{missing[0]}: is not a folder. Give the merged folder and the folder of its base.')
        made = compare(merged, base)
    except ConfigError as error:
        logger.error('\n'.join(error.problems))
        return 2

    for line in made.differences:
        print(line)
    print(f'{"differs" if made.differences else "same"}: {made.says()}')
    return 1 if made.differences else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

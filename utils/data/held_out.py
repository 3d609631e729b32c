"""Stores which rows a run held out for validation, so that they can be found without reading the training rows."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.base.names import HubName
from utils.data.converted_rows import AS_WRITTEN
from utils.data.open_parts import open_parts, read_rows_at
from utils.data.parts import VAL, VALIDATION, Part
from utils.data.plan import Plan
from utils.data.sources import parse_source
from utils.formats.conversation import Row
from utils.formats.reading import Reading


def held_out(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return which rows of each data set are held out for validation.

    For example, {'a.jsonl': {'files_sha256': 'e3b0...', 'rows': [4, 17]}}. `rows` has the positions of the held-out
    rows among all rows of the data set, counted from 0. `files_sha256` is a hash of the files of the data set. If a
    data set has a validation split, this split has its own entry.

    If there is --val_dataset, only the data sets of --val_dataset have an entry.

    If the files alone do not decide the rows, `files_sha256` is None. This applies to registered data sets, and to data
    sets with images.
    """
    sets = [part for part in plan.parts if part.val_set]
    return {
        part.name: {
            'files_sha256': files_sha256(part) if part.files and not part.has_images else None,
            'rows': list(_positions(part)),
        }
        for part in sets or plan.parts
    }


def _positions(part: Part) -> Iterator[int]:
    # For each unusable row, the number of usable rows before it.
    usable_before = [position - index for index, position in enumerate(part.unusable)]
    index = part.uses.find(VAL)
    while index >= 0:
        yield index + bisect_right(usable_before, index)
        index = part.uses.find(VAL, index + 1)


def files_sha256(part: Part) -> str:
    """Return a hash of the names and the content of the files of a part. A part is a data set or one of its splits."""
    digest = hashlib.sha256()
    # The folder of a download differs between machines, so its names on the hub are used.
    names = part.hub_files or [str(file) for file, _ in part.files]
    for name, (file, _) in zip(names, part.files, strict=True):
        digest.update(f'{name}\n'.encode())
        with file.open('rb') as stream:
            digest.update(hashlib.file_digest(stream, 'sha256').digest())
    return digest.hexdigest()


def read_held_out(
    kept: Mapping[str, Mapping[str, Any]],
    words: Sequence[str],
    reading: Reading = AS_WRITTEN,
    hub: HubName = 'modelscope',
) -> list[Row] | None:
    """Return the rows that an earlier run held out for validation, in the order of the data, or None.

    `kept` is what `held_out` returned in the earlier run. `words` are the values of --dataset or --val_dataset of this
    command. Returns None if `words` name other data sets than `kept` or name them in another order, or if a file has
    changed. Also returns None if a data set is registered or has images. Raises ConfigError if a data set cannot be
    opened.
    """
    sources = [parse_source(word) for word in words]
    if any(source.path is None and source.hub is None for source in sources):
        return None  # opening a registered data set may read all its rows

    named = {name.removesuffix(VALIDATION) for name in kept}
    if named != {source.name for source in sources} or any(entry['files_sha256'] is None for entry in kept.values()):
        return None

    parts = [part for source in sources for part in open_parts(source, hub=hub, reading=reading)]
    if [part.name for part in parts] != list(kept):
        return None

    found: list[Row] = []
    for part in parts:
        entry = kept[part.name]
        if files_sha256(part) != entry['files_sha256']:
            return None
        rows = read_rows_at(part.files, frozenset(entry['rows']), reading)
        usable = [row for row in rows if isinstance(row, Row)]
        if len(usable) != len(entry['rows']):
            return None  # a different version of this toolkit wrote the positions, and it accepted different rows
        found += usable
    return found

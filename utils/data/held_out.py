"""Stores which rows a run held out, so that they can be read again without reading the whole training set."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.base.names import HubName
from utils.data.parts import AS_WRITTEN, VAL, VALIDATION, Part, open_parts, read_rows_at
from utils.data.plan import Plan
from utils.data.sources import parse_source
from utils.formats.conversation import Row
from utils.formats.reading import Reading


def held_out(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return {name of part: {'files_sha256': hash, 'rows': positions}} for the parts of the data sets of a run.

    The positions are the indices of the held-out rows among all rows of the part. If there are validation sets, only
    their parts are returned, because no other part has held-out rows. The hash covers the files of the part. The
    hash is None if the rows depend on more than the files. This is so for registered data sets of a hub, functions of
    the user, and rows with images.
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
    """Return a hash over the names and the content of a part's files."""
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
    """Return the held-out rows of an earlier run. `kept` is what `held_out` returned in that run.

    `words` are the words of --dataset. Returns None if `words` name other data sets than the earlier run read, or if
    the files of a data set have changed.
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

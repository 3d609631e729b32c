"""Opens the data sets of --dataset and --val_dataset: local files, files of a hub, and entries of DATASET_MAPPING."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.base.logger import logger
from utils.base.names import HubName
from utils.data.converted_rows import AS_WRITTEN, ReadRow, converted
from utils.data.own_rows import halves_of, located_rows
from utils.data.parts import VALIDATION, Part
from utils.data.sources import Source, find_files, not_found_remedy, shadowed_id
from utils.dataset import DATASET_MAPPING
from utils.formats.conversation import BadRow, Row
from utils.formats.data_file import Signature, read_rows, signature
from utils.formats.file_bytes import OnBad, UnreadableRow, refuse
from utils.formats.hub_dataset import HubDataset, RowStream
from utils.formats.hub_files import HubFiles
from utils.formats.reading import Reading


def open_parts(
    source: Source, bad: OnBad = refuse, hub: HubName = 'modelscope', reading: Reading = AS_WRITTEN
) -> list[Part]:
    """Open a data set, and return [training part, validation part], or [part] if it has no validation split.

    `reading` has the flags that say how files are read, such as --columns. When a part is read, `bad` is called for
    each row of a file that cannot be read. Registered data sets ignore `bad` and `reading`, because DATASET_MAPPING
    says how their rows are read. Raises ConfigError if the data set cannot be opened.
    """
    if source.hub is not None:
        return _hub_parts(source, source.hub, bad, hub, reading)
    if source.path is None:
        entry = DATASET_MAPPING[source.name]
        if isinstance(entry, HubDataset):
            return _registered_parts(source.name, entry, hub)
        return _function_parts(source.name)

    if shadowed_id(source):
        logger.info(
            f'{source.name}: the local path {source.path.absolute()} is read. To read a data set of a hub with this '
            f'id, give hf:{source.name} or ms:{source.name}'
        )
    files = [(file, signature(file)) for file in find_files(source)]
    columns: dict[str, None] = {}
    remarks: dict[str, None] = {}
    read = _reader(files, [str(file) for file, _ in files], bad, reading, columns, remarks)
    return [Part(name=source.name, read=read, files=files, columns=columns, remarks=remarks)]


def _reader(
    files: Sequence[tuple[Path, Signature]],
    names: Sequence[str],
    bad: OnBad,
    reading: Reading,
    columns: dict[str, None],
    remarks: dict[str, None],
) -> Callable[[Any], Iterator[ReadRow]]:
    """Return a function that reads the files from the start. Its argument is a hash object.

    `names` has one name for each file. The function updates the hash with the names and with the content of the files.
    It adds the names of the columns to `columns`, and remarks on how the files are read to `remarks` (see Part).
    """

    def remark(text: str) -> None:
        remarks[text] = None

    def read(digest: Any) -> Iterator[ReadRow]:
        for (file, known), name in zip(files, names, strict=True):
            digest.update(f'{name}\n'.encode())
            try:
                rows = read_rows(file, bad=bad, known=known, digest=digest, text_rows=reading.text_rows, remark=remark)
                folder = str(file.absolute().parent)
                yield from converted(rows, str(file), folder=folder, reading=reading, seen=columns, remark=remark)
            except UnreadableRow as error:
                rest = '' if bad is refuse else ' The rest of the file is not read.'
                bad(error.location, error.problem + rest)

    return read


def _hub_parts(source: Source, files: HubFiles, bad: OnBad, hub: HubName, reading: Reading) -> list[Part]:
    """Return [training part, validation part] of a data set of a hub. Its files are downloaded once per machine.

    If there is no validation split, the list has only the training part.
    """
    fetched = files.load(hub, remedy=not_found_remedy(source))
    at_commit = f' at commit {fetched.commit[:12]}' if fetched.commit else ''
    logger.info(f'{source.name} is read from {fetched.served}{at_commit}. Its rows: {fetched.chosen.about}')
    parts: list[Part] = []
    for names, is_val in ((fetched.chosen.train, False), (fetched.chosen.val, True)):
        if not names:
            continue
        # The hash covers the names in the repository, because the folder of the cache differs between machines.
        stored = [(path, signature(path)) for path in (fetched.folder / name for name in names)]
        columns: dict[str, None] = {}
        remarks: dict[str, None] = {}
        part = Part(
            name=_shown(source.name, is_val),
            read=_reader(stored, names, bad, reading, columns, remarks),
            files=stored,
            columns=columns,
            remarks=remarks,
            is_val=is_val,
            served=fetched.served,
            commit=fetched.commit,
            hub_files=[f'{fetched.served}/{name}' for name in names],
        )
        parts.append(part)
    return parts


def _shown(name: str, is_val: bool) -> str:
    return name + VALIDATION if is_val else name


def _registered_parts(name: str, entry: HubDataset, hub: HubName) -> list[Part]:
    """Return [training part, validation part] of a registered data set. Its files are downloaded from a hub.

    If there is no validation split, the list has only the training part.
    """
    train, val, snapshot = entry.load(hub)
    logger.info(f'{name}: {snapshot.repo}')

    def part(rows: RowStream, is_val: bool) -> Part:
        shown = _shown(name, is_val)
        remarks: dict[str, None] = {}

        def read(digest: Any) -> Iterator[ReadRow]:
            located = _hashed(rows.with_locations(), digest)
            yield from converted(located, shown, remark=remarks.setdefault, of_function=True)

        return Part(
            name=shown,
            read=read,
            is_val=is_val,
            served=str(snapshot.repo),
            commit=snapshot.commit,
            remarks=remarks,
        )

    return [part(rows, is_val) for rows, is_val in ((train, False), (val, True)) if rows is not None]


def _function_parts(name: str) -> list[Part]:
    """Return [training part, validation part] of a data set whose rows a function in DATASET_MAPPING returns.

    If the function returns no validation rows, the list has only the training part.
    """

    def part(half: int, rows: Any) -> Part:
        shown = _shown(name, half == 1)
        remarks: dict[str, None] = {}

        def read(digest: Any) -> Iterator[ReadRow]:
            located = located_rows(name, half, rows, shown)
            yield from converted(_hashed(located, digest), shown, remark=remarks.setdefault, of_function=True)

        return Part(name=shown, read=read, is_val=half == 1, remarks=remarks)

    return [part(half, rows) for half, rows in enumerate(halves_of(name, logs=True)) if rows is not None]


def _hashed(
    located: Iterable[tuple[str, dict[str, Any] | BadRow]], digest: Any
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Yield each (location, row) unchanged, and update the hash object `digest` with the content of each row."""
    for location, row in located:
        # Only text, numbers, lists and objects can get into a conversation. Of other values, only the type is hashed.
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
        yield location, row


def read_rows_at(
    files: Sequence[tuple[Path, Signature]], positions: Collection[int], reading: Reading = AS_WRITTEN
) -> list[Row | BadRow]:
    """Return the rows at these positions, in the order of the files. Rows of all files are counted together, from 0.

    A row that cannot be trained on is returned as a BadRow. Only the returned rows and the first row of each file are
    converted and checked. Raises ConfigError if a file has changed since its signature was taken.
    """
    found: list[Row | BadRow] = []
    start = 0
    for file, known in files:
        is_wanted = start in positions
        placed: list[tuple[str, dict[str, Any] | BadRow]] = []
        count = 0
        for place, raw in read_rows(file, known=known, text_rows=reading.text_rows):
            # The first row of a file is always kept: the conversion of all other rows of the file depends on it.
            if count == 0 or start + count in positions:
                placed.append((place, raw))
            count += 1

        folder = str(file.absolute().parent)
        rows = [row for _, _, row in converted(placed, str(file), folder=folder, reading=reading)]
        found += rows if is_wanted else rows[1:]
        start += count
    return found

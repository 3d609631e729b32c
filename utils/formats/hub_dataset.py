"""A data set of a hub: its files, its streams of rows, its images."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.base.cache import cache_dir
from utils.base.errors import ConfigError
from utils.base.names import HubName
from utils.formats.conversation import BadRow, Filtered
from utils.formats.converters import PlainRow, SourceRow, ToRow, Unwanted
from utils.formats.data_file import read_objects, read_rows
from utils.formats.hub_splits import choose_files
from utils.formats.images import BadImage, place_image
from utils.hub import snapshot as hub
from utils.hub.clients import Repo


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """One data set on the hubs: data, and a callable without arguments that returns (train, validation or None)."""

    # ModelScope: the id of 2023, and where it moved.
    id: str
    moved: tuple[str, ...] = ()
    # The same data on Hugging Face.
    hf_id: str | None = None
    # Columns that must be there.
    columns: tuple[str, ...]
    to_row: ToRow
    # Why to_row drops a row, in words.
    drops: str
    subsets: tuple[str, ...] = ('default',)
    # Words in the names of files that are of other subsets.
    not_named: tuple[str, ...] = ()
    train: tuple[str, ...] = ('train',)
    val: tuple[str, ...] = ()
    # The files hold JSON objects one after the other, with or without anything between them.
    concatenated: bool = False
    # Column of an image: rows get the path of a file.
    image: str | None = None
    # Training rows drawn once and for all, with the seed 42.
    take: int | None = None

    def repos(self, hub_name: HubName) -> list[Repo]:
        """Return the places where it may lie, those on the chosen hub first."""
        ids: dict[HubName, Sequence[str]] = {
            'modelscope': (self.id, *self.moved),
            'huggingface': (self.hf_id,) if self.hf_id else (),
        }
        return hub.repos_of(hub_name, ids)

    def load(self, hub_name: HubName) -> tuple[RowStream, RowStream | None, str]:
        """Return (train, validation or None, where it came from); fetches only the files that are read."""
        snapshot = hub.find(self.repos(hub_name), 'dataset')
        chosen = choose_files(snapshot, self)
        folder = snapshot.fetch([name for names in chosen.values() for name in names])

        def stream(splits: Sequence[str], take: int | None = None) -> RowStream:
            files = tuple(folder / name for split in splits for name in chosen[split])
            return RowStream(entry=self, files=files, take=take)

        return stream(self.train, self.take), stream(self.val) if self.val else None, str(snapshot.repo)

    def __call__(self) -> tuple[RowStream, RowStream | None]:
        """Return (train, validation or None) from the default hub."""
        train, val, _ = self.load('modelscope')
        return train, val


@dataclass(frozen=True, kw_only=True)
class RowStream:
    """The rows of some files, read anew at each iteration and never held together."""

    entry: HubDataset
    files: tuple[Path, ...]
    take: int | None = None

    def __iter__(self) -> Iterator[PlainRow]:
        return (row for _, row in self.placed() if not isinstance(row, BadRow))

    def placed(self) -> Iterator[tuple[str, PlainRow | BadRow]]:
        """Yield each row with file and line, or why it is dropped."""
        if self.take is None:
            yield from self._all()
            return
        count = sum(not isinstance(row, BadRow) for _, row in self._all())
        drawn = set(random.Random(42).sample(range(count), min(self.take, count)))
        position = 0
        for place, row in self._all():
            if isinstance(row, BadRow):
                yield place, row
                continue
            if position in drawn:
                yield place, row
            position += 1

    def _all(self) -> Iterator[tuple[str, PlainRow | BadRow]]:
        archives = [file for file in self.files if file.suffix == '.zip']
        for file in self.files:
            if file in archives:
                continue
            base = _unpack_images(archives[0]) if archives else file.parent
            checked = False
            for place, raw in (read_objects if self.entry.concatenated else read_rows)(file):
                try:
                    row = _image_by_path(raw, self.entry.image, base) if self.entry.image else raw
                except BadRow as problem:
                    yield place, problem
                    continue
                if not checked and (absent := [c for c in self.entry.columns if c not in row]):
                    raise ConfigError(
                        f'{place}: the columns are {", ".join(row)}; {", ".join(absent)} is missing, expected are '
                        f'{", ".join(self.entry.columns)}. The data set changed on the hub: adapt its entry in '
                        'DATASET_MAPPING in utils/dataset.py.'
                    )
                checked = True
                yield place, self._made(row)

    def _made(self, row: SourceRow) -> PlainRow | BadRow:
        """Return a row as its entry makes it, or why it is dropped."""
        try:
            return self.entry.to_row(row) or BadRow(self.entry.drops)
        except Unwanted:
            return Filtered(self.entry.drops)


_IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp')
# Pictures hardly shrink: an archive that grows more than this is no archive of pictures.
_UNPACKED_TIMES = 50


def _unpack_images(archive: Path) -> Path:
    """Return the folder with the pictures of an archive, unpacked once per machine."""
    import zipfile

    about = archive.stat()
    digest = hashlib.sha256(f'{archive.resolve()} {about.st_size} {about.st_mtime_ns}'.encode()).hexdigest()[:24]
    target = cache_dir() / 'images' / digest
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened, tempfile.TemporaryDirectory(dir=target.parent) as aside:
            pictures = [i for i in opened.infolist() if i.filename.lower().endswith(_IMAGES)]
            if sum(i.file_size for i in pictures) > max(about.st_size, 1 << 20) * _UNPACKED_TIMES:
                raise ConfigError(
                    f'{archive}: unpacked it would be over {_UNPACKED_TIMES} times its size, as no '
                    'archive of pictures is. Not opened: unpack it by hand if it is meant.'
                )
            opened.extractall(Path(aside) / 'whole', pictures)
            with contextlib.suppress(FileExistsError):  # another process may have been first
                (Path(aside) / 'whole').rename(target)
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:  # RuntimeError: it wants a password
        raise ConfigError(f'{archive} is no whole zip file: {error}. Remove it: it is fetched again.') from None
    return target


def _image_by_path(row: SourceRow, column: str, base: Path) -> PlainRow:
    """Return the row with its image as the path of a file; bytes of a parquet cell are written to the cache.

    Raises BadRow for a path that is not one in the folder of the data.
    """
    found = {name.removesuffix(':FILE'): value for name, value in row.items()}
    image = found.get(column)
    if isinstance(image, Mapping):
        data, path = image.get('bytes'), str(image.get('path') or '')
        if data is not None:
            suffix = Path(path).suffix.lower()
            kept = cache_dir() / 'images' / 'bytes' / (hashlib.sha256(data).hexdigest() + (suffix or '.jpg'))
            if not kept.is_file():
                kept.parent.mkdir(parents=True, exist_ok=True)
                aside = kept.with_name(f'{kept.name}.{os.getpid()}')
                aside.write_bytes(data)
                aside.replace(kept)
            return {**found, column: str(kept)}
        image = path
    if image in (None, ''):
        return {**found, column: None}
    if Path(str(image)).is_absolute() or 'img>' in str(image):
        raise BadRow('an image has an absolute path, or a tag in it', column)
    try:
        return {**found, column: place_image(str(image), str(base))}
    except BadImage as error:
        raise BadRow(f'an image {error.reason}', column) from None

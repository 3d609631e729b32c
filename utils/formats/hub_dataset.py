"""Registered data sets on hubs: downloads the files, reads and converts the rows, and unpacks the images."""

from __future__ import annotations

import contextlib
import hashlib
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
from utils.formats.images import BadImage, cached_image, place_image
from utils.hub import snapshot as hub
from utils.hub.clients import Repo

# The seed with which `take` rows are drawn. Never change the seed: other rows would be drawn.
_TAKE_SEED = 42


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """The description of a data set on the hubs. Calling it returns (training rows, validation rows or None)."""

    # The id on ModelScope in 2023, and the later ids if the data set got a new id.
    id: str
    moved: tuple[str, ...] = ()
    # The id of the same data on Hugging Face.
    hf_id: str | None = None
    # The columns that the first row of each file must have.
    columns: tuple[str, ...]
    to_row: ToRow
    # The reason why to_row drops or skips rows. It is shown in the report.
    drops: str
    subsets: tuple[str, ...] = ('default',)
    # Words that occur only in the file names of subsets that are not read. They are used only if the repository has no
    # list of splits.
    not_named: tuple[str, ...] = ()
    train: tuple[str, ...] = ('train',)
    val: tuple[str, ...] = ()
    # Whether the files contain JSON objects in sequence, with or without separators.
    concatenated: bool = False
    # The column with the image. In this column, the converter receives the path of an image file.
    image: str | None = None
    # The number of training rows to draw, or all if there are fewer. The same rows are drawn every time.
    take: int | None = None

    def repos(self, hub_name: HubName) -> list[Repo]:
        """Return the repositories that may contain the data set. Repositories on the chosen hub come first."""
        ids: dict[HubName, Sequence[str]] = {
            'modelscope': (self.id, *self.moved),
            'huggingface': (self.hf_id,) if self.hf_id else (),
        }
        return hub.repos_of(hub_name, ids)

    def names(self, snapshot: hub.Snapshot) -> list[str]:
        """Return the names of the needed files. Only the list of splits of the repository is downloaded.

        Raises ConfigError if the files of a split are not found.
        """
        return [name for names in choose_files(snapshot, self).values() for name in names]

    def load(self, hub_name: HubName) -> tuple[RowStream, RowStream | None, hub.Snapshot]:
        """Download the needed files, and return (training rows, validation rows or None, repository).

        The rows are read later. Raises ConfigError if the repository or a file is not found or cannot be downloaded.
        """
        snapshot = hub.find(self.repos(hub_name), 'dataset')
        chosen = choose_files(snapshot, self)
        folder = snapshot.fetch([name for names in chosen.values() for name in names])

        def stream(splits: Sequence[str], take: int | None = None) -> RowStream:
            files = tuple(folder / name for split in splits for name in chosen[split])
            return RowStream(entry=self, files=files, take=take)

        train = stream(self.train, self.take)
        validation = stream(self.val) if self.val else None
        return train, validation, snapshot

    def __call__(self) -> tuple[RowStream, RowStream | None]:
        """Download the files, and return (training rows, validation rows or None). ModelScope is tried first."""
        train, val, _ = self.load('modelscope')
        return train, val


@dataclass(frozen=True, kw_only=True)
class RowStream:
    """The converted rows of some files. Dropped and skipped rows are left out.

    Each iteration reads the files again, so the rows are not kept in memory.
    """

    entry: HubDataset
    files: tuple[Path, ...]
    take: int | None = None

    def __iter__(self) -> Iterator[PlainRow]:
        return (row for _, row in self.with_locations() if not isinstance(row, BadRow))

    def with_locations(self) -> Iterator[tuple[str, PlainRow | BadRow]]:
        """Yield (location, row) for each row, in the order of the files. A dropped or skipped row is a BadRow.

        If `take` is set, `take` of the other rows are drawn at random, the same rows every time. Rows that are not
        drawn are not yielded. All dropped and skipped rows are yielded. Raises ConfigError if a file cannot be read, or
        if its first row lacks a column.
        """
        if self.take is None:
            yield from self._all()
            return

        count = sum(not isinstance(row, BadRow) for _, row in self._all())
        drawn = set(random.Random(_TAKE_SEED).sample(range(count), min(self.take, count)))
        position = 0
        for location, row in self._all():
            if isinstance(row, BadRow):
                yield location, row
                continue
            if position in drawn:
                yield location, row
            position += 1

    def _all(self) -> Iterator[tuple[str, PlainRow | BadRow]]:
        archives = [file for file in self.files if file.suffix == '.zip']
        for file in self.files:
            if file in archives:
                continue
            image_folder = _unpack_images(archives[0]) if archives else file.parent
            read = read_objects if self.entry.concatenated else read_rows
            is_first = True
            for location, raw in read(file):
                try:
                    row = _image_by_path(raw, self.entry.image, image_folder) if self.entry.image else raw
                except BadRow as problem:
                    yield location, problem
                    continue

                if is_first:
                    self._check_columns(location, row)
                    is_first = False
                yield location, self._convert(row)

    def _check_columns(self, location: str, row: SourceRow) -> None:
        absent = [column for column in self.entry.columns if column not in row]
        if absent:
            raise ConfigError(
                f'{location}: missing columns: {", ".join(absent)}. The file has {", ".join(row)}, but the entry '
                f'in DATASET_MAPPING expects {", ".join(self.entry.columns)}. Adapt the entry in utils/dataset.py.'
            )

    def _convert(self, row: SourceRow) -> PlainRow | BadRow:
        """Return the converted row. A broken row is dropped: the result is a BadRow.

        A valid row that the entry does not want is skipped: the result is a Filtered, which is also a BadRow.
        """
        try:
            return self.entry.to_row(row) or BadRow(self.entry.drops)
        except Unwanted:
            return Filtered(self.entry.drops)


_IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp')
# Images are already compressed. So if an archive expands to more than this many times its size, it was probably made to
# fill the disk.
_MAX_EXPANSION = 50


def _unpack_images(archive: Path) -> Path:
    """Return a folder in the cache with the images of an archive. If the folder does not exist, unpacks the archive.

    An archive that was changed gets a new folder. Raises ConfigError if the archive cannot be unpacked, or if it
    expands to more than _MAX_EXPANSION times its size.
    """
    import zipfile

    about = archive.stat()
    digest = hashlib.sha256(f'{archive.resolve()} {about.st_size} {about.st_mtime_ns}'.encode()).hexdigest()[:24]
    target = cache_dir() / 'images' / digest
    if target.is_dir():
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened, tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            images = [member for member in opened.infolist() if member.filename.lower().endswith(_IMAGES)]
            total = sum(member.file_size for member in images)
            if total > max(about.st_size, 1 << 20) * _MAX_EXPANSION:
                raise ConfigError(
                    f'{archive}: the archive expands to more than {_MAX_EXPANSION} times its size, which images never '
                    f'do, so it was not unpacked. If this size is intended, unpack the images into {target}.'
                )

            unpacked = Path(temporary) / 'whole'
            opened.extractall(unpacked, images)
            with contextlib.suppress(FileExistsError):  # another process may have unpacked it
                unpacked.rename(target)
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:  # RuntimeError: a password is needed
        raise ConfigError(
            f'{archive}: the zip file is damaged or encrypted: {error}. If it is damaged, remove it and run the same '
            f'command again to download it. If it is encrypted, unpack its images into {target}.'
        ) from None
    return target


def _image_by_path(row: SourceRow, column: str, base: Path) -> PlainRow:
    """Return a copy of the row in which `column` has the path of an image file, or None if the row has no image.

    If the row has the bytes of the image, the bytes are written to a file in the cache. If the row has a path, the path
    starts in the folder `base`. Raises BadRow if this path is absolute or a URL, leads out of `base`, or contains an
    image tag. The ending :FILE of column names is removed.
    """
    found = {name.removesuffix(':FILE'): value for name, value in row.items()}
    image = found.get(column)
    if isinstance(image, Mapping):
        data = image.get('bytes')
        path = str(image.get('path') or '')
        if data is not None:
            return {**found, column: cached_image(data, path)}
        image = path

    if image in (None, ''):
        return {**found, column: None}
    if Path(str(image)).is_absolute() or 'img>' in str(image):
        raise BadRow('the path of an image is absolute or contains an image tag (<img>)', column)
    try:
        return {**found, column: place_image(str(image), str(base))}
    except BadImage as error:
        problem = error.reason.partition('. ')[0]  # its remedies are for data files of the user
        raise BadRow(f'an image {problem}', column) from None

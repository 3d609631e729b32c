"""Images of rows: finds the image tags in a text, checks the paths of the images, and opens the files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.cache import cache_dir
from utils.base.errors import ConfigError
from utils.formats.conversation import BadRow, Row

if TYPE_CHECKING:
    import torch

_TAG = re.compile(r'<img>(.*?)</img>')
_ADDRESS = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://|data:')
# Formats whose decoders execute no code of the file. EPS is not allowed: Pillow lets Ghostscript run the file.
_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP')
# 256 MiB as RGB, the limit above which Pillow warns. Without a limit, a small file could fill the memory.
_MAX_PIXELS = 2**28 // 3
# Mean and standard deviation with which CLIP normalises pixels.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class BadImage(ConfigError):
    """An image cannot be used. `reason` is the same text for all images with the same problem."""

    reason = ''
    path = ''

    def __init__(self, text: str) -> None:
        # If the error comes from a data-loader process, a traceback precedes the message. Keep only the message.
        super().__init__(text.rsplit('BadImage: ', 1)[-1].strip())


def bad_image(path: str, reason: str, more: str = '') -> BadImage:
    """Return the error for one image. The message is the path, `reason`, and `more` with the details of this image."""
    error = BadImage(f'image {path!r} {reason}{more}')
    error.reason = reason
    error.path = path
    return error


class ImageFiles(list[str]):
    """The paths of the images in a column whose cells are {bytes, path}, as the library `datasets` writes images."""

    def __init__(self, paths: Iterable[str], column: str) -> None:
        super().__init__(paths)
        self.column = column


def with_image_files(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row with its images replaced by their paths, in the column `images`.

    The images are read from the column `images` or `image`, where a cell is an object {bytes, path} or a list of such
    objects. The column `image` is read only if `images` is empty. Bytes are written to files in the cache. A row
    without such a cell is returned unchanged. Raises BadRow if an object has neither bytes nor a usable path. The image
    files are not opened.
    """
    for column in ('images', 'image'):
        cells = row.get(column)
        items = [cells] if isinstance(cells, Mapping) else cells
        if not isinstance(items, list) or not items or not all(map(_is_image_cell, items)):
            continue
        if column == 'image' and row.get('images'):
            return row  # `images` is read, and `image` is reported as not used
        files = ImageFiles((_image_path(cell, column) for cell in items), column)
        others = {name: value for name, value in row.items() if name != column}
        return {**others, 'images': files}
    return row


def _is_image_cell(cell: Any) -> bool:
    return isinstance(cell, Mapping) and bool(cell) and cell.keys() <= {'bytes', 'path'}


def _image_path(cell: Mapping[str, Any], column: str) -> str:
    """Return the path of the image in a cell. Image bytes in the cell are written to a file in the cache.

    Without bytes, the result is the `path` of the cell. Raises BadRow if this path is absolute, because the cell may
    come from a hub. Raises BadRow also if the path contains an image tag, or if the cell has neither bytes nor a path.
    """
    data = cell.get('bytes')
    path = str(cell.get('path') or '')
    if isinstance(data, bytes):
        return cached_image(data, path)
    if data is not None or not path:
        raise BadRow('an image has neither bytes nor a path', column)
    if Path(path).is_absolute() or 'img>' in path:
        raise BadRow('the path of an image is absolute or contains an image tag (<img>)', column)
    return path


def _bytes_folder() -> Path:
    return cache_dir() / 'images' / 'bytes'


def cached_image(data: bytes, path: str) -> str:
    """Return the path of a file in the cache with these image bytes. The file is written if it is absent.

    `path` is the path of the image at its origin. Only its suffix is used.
    """
    suffix = Path(path).suffix.lower() or '.jpg'
    file = _bytes_folder() / (hashlib.sha256(data).hexdigest() + suffix)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f'{file.name}.{os.getpid()}')
        temporary.write_bytes(data)
        temporary.replace(file)
    return str(file)


def is_untagged(row: Row) -> bool:
    """Return whether the row has images in a column of {bytes, path}, but no image tag in a user turn."""
    is_column = isinstance(row.images, ImageFiles) and bool(row.images)
    return is_column and not any('</img>' in turn['content'] for turn in row.messages if turn['role'] == 'user')


def find_images(text: str) -> list[str]:
    """Return the path of each `<img>path</img>` tag in a text, in order. The path of an empty tag is ''."""
    return _TAG.findall(text)


def replace_tags(text: str, mark: str) -> str:
    """Return the text with each image tag replaced by `mark`."""
    return _TAG.sub(lambda tag: mark, text)


def map_tags(text: str, change: Callable[[str], str]) -> str:
    """Return the text with `change` applied to the path in each image tag. For an empty tag, the path is ''."""
    return _TAG.sub(lambda tag: f'<img>{change(tag[1])}</img>', text)


def name_images(texts: Sequence[str], images: Iterable[str]) -> list[str]:
    """Return the texts of a row with the path of one image in each empty tag `<img></img>`, in order.

    An image whose path is already in a tag is not used again. Raises BadImage if the number of the remaining images
    differs from the number of empty tags.
    """
    named = {path for text in texts for path in find_images(text) if path}
    unnamed = [path for path in images if path not in named]
    empty_tags = sum(path == '' for text in texts for path in find_images(text))
    if len(unnamed) > empty_tags:
        raise bad_image(
            unnamed[empty_tags],
            'has no tag: the row has more images than tags. Write <img></img> in the query where each image belongs.',
        )
    if len(unnamed) < empty_tags:
        raise bad_image(
            '',
            'is missing: the row has fewer images than empty tags <img></img>. Add images, or remove the extra tags.',
        )

    next_images = iter(unnamed)
    return [_TAG.sub(lambda tag: tag[0] if tag[1] else f'<img>{next(next_images)}</img>', text) for text in texts]


def place_image(path: str, folder: str | None) -> str:
    """Return the path at which to open an image. `folder` is the folder of the data file, or None for a typed path.

    In a data file, a relative path starts in `folder`, and an absolute path may name any file. A typed path starts in
    the current folder, and ~ is the home folder. Raises BadImage if the path is a URL, or if a relative path in a data
    file leaves `folder`. Whether the image exists is not checked.
    """
    if _ADDRESS.match(path):
        raise bad_image(path, 'is a URL, and images are not downloaded. Download it yourself and write its path.')
    if folder is None:
        return str(Path(path).expanduser())
    inside = Path(os.path.normpath(path))
    if inside.parts[:1] == (os.pardir,):
        raise bad_image(
            path, 'leaves the folder of its data file (..). Write an absolute path, or move the image into the folder.'
        )
    return str(Path(folder) / inside)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open a file as a Pillow image and check its size.

    Raises BadImage if the file cannot be used. Pillow decodes the image later, in the with block of the caller. So an
    error in this block also becomes a BadImage.
    """
    from PIL import Image

    # Pipes and devices are refused too, because reading them may never end.
    if not path or not Path(path).is_file():
        more = f'. The current folder is {Path.cwd()}. Check the path.'
        raise bad_image(path, 'does not exist or is not a file', more)

    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                more = f': {width} x {height} pixels, but at most {_MAX_PIXELS:,} are decoded. Use a smaller copy.'
                raise bad_image(path, 'is too large', more)
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise bad_image(path, 'is too large', f' to decode: {error} Use a smaller copy.') from None
    except Exception as error:  # the decoders raise many types of exceptions for damaged files
        reason = f'cannot be read: it is damaged, or its format is not one of {", ".join(_FORMATS)}.'
        raise bad_image(path, reason, f' {error}') from error


def image_size(path: str) -> tuple[int, int]:
    """Return (width, height) of an image file without decoding it. The EXIF orientation is ignored.

    Raises BadImage if the file cannot be used.
    """
    with _opened(path) as image:
        width, height = image.size
        return width, height


def open_upright(path: str) -> Any:
    """Return a file as a Pillow image in RGB, rotated according to its EXIF orientation.

    Raises BadImage if the file cannot be used.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert('RGB')


def read_images(paths: Sequence[str], side: int) -> torch.Tensor:
    """Return the pixels of image files for the vision tower of Qwen-VL, as (images, 3, side, side) in fp32.

    Each image is converted to RGB, resized to a square without keeping its proportions, and normalised. The EXIF
    orientation is ignored. Raises BadImage if a path is missing or not an image, or if an image has too many pixels.
    """
    import torch

    if not paths:
        return torch.empty(0, 3, side, side)
    return torch.stack([_read_image(path, side) for path in paths])


def _read_image(path: str, side: int) -> torch.Tensor:
    import numpy
    import torch
    from PIL import Image

    with _opened(path) as image:
        square = numpy.array(image.convert('RGB').resize((side, side), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(square).permute(2, 0, 1).float().div(255)
    mean = torch.tensor(_MEAN)[:, None, None]
    std = torch.tensor(_STD)[:, None, None]
    return pixels.sub(mean).div(std)


def state_of_images(row: Row) -> bytes:
    """Return bytes that differ later if an image of the row was changed, replaced or removed.

    Without images, b'' is returned. The bytes are the paths, sizes and modification times of the images. For a file in
    the cache, only the name is used, because the name contains the hash of the content.
    """
    texts = [turn['content'] for turn in row.messages if turn['role'] == 'user']
    if not row.images and not any('</img>' in text for text in texts):
        return b''

    state: list[Any] = []
    try:
        paths = row.images
        if not isinstance(paths, ImageFiles):
            paths = [path for text in name_images(texts, row.images) for path in find_images(text)]
        for path in paths:
            if Path(path).is_relative_to(_bytes_folder()):
                state.append(Path(path).name)  # the file is named after its content
                continue
            about = Path(place_image(path, row.folder)).stat()
            state.append((path, about.st_size, about.st_mtime_ns))
    except (ValueError, OSError) as error:  # BadImage, or an invalid path
        state.append(str(error))
    return repr(state).encode()

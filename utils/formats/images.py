"""Images: the tags that name them in a text, which files they may name, and how a file is opened and checked."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.formats.conversation import Row

if TYPE_CHECKING:
    import torch

_TAG = re.compile(r'<img>(.*?)</img>')
_ADDRESS = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://|data:')
# Formats whose decoders only decode: Pillow hands EPS to Ghostscript, which runs it as a program.
_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP')
# 256 MiB as RGB, where Pillow itself begins to warn. A small file can unfold into far more than memory holds.
_MOST_PIXELS = 2**28 // 3
# Those of CLIP.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class BadImage(ConfigError):
    """An image that cannot be used. `reason` is the same for all images with that fault, `path` is this one's."""

    reason = path = ''

    def __init__(self, text: str) -> None:
        # A data-loader process hands the text on with its traceback before it.
        super().__init__(text.rsplit('BadImage: ', 1)[-1].strip())


def bad_image(path: str, reason: str, more: str = '') -> BadImage:
    """Return the error for one image; `more` is what only this one has."""
    error = BadImage(f'image {path!r} {reason}{more}')
    error.reason, error.path = reason, path
    return error


def find_images(text: str) -> list[str]:
    """Return the paths in the `<img>path</img>` tags of a text, in order; '' for a tag without one."""
    return _TAG.findall(text)


def replace_tags(text: str, mark: str) -> str:
    """Return the text with each image tag replaced by `mark`."""
    return _TAG.sub(lambda tag: mark, text)


def name_images(texts: Sequence[str], images: Iterable[str]) -> list[str]:
    """Return the texts of one row with each empty tag `<img></img>` given the next of the row's images.

    An image that a tag names already is not given to another. Raises BadImage for more images than tags, and for an
    empty tag that no image is left for.
    """
    named = {path for text in texts for path in find_images(text) if path}
    left = [path for path in images if path not in named]
    empty = sum(path == '' for text in texts for path in find_images(text))
    if len(left) > empty:
        raise bad_image(
            left[empty],
            'has no tag: the row has more images than tags. Write <img></img> in the query where each belongs.',
        )
    if len(left) < empty:
        raise bad_image('', 'is missing: the row has fewer images than empty tags <img></img>.')
    following = iter(left)
    return [_TAG.sub(lambda tag: tag[0] if tag[1] else f'<img>{next(following)}</img>', text) for text in texts]


def place_image(path: str, folder: str | None) -> str:
    """Return the path as it is opened: relative ones from `folder`, that of the data file, which they must not leave.

    Without a folder, for what a person typed, from here or from home. Raises BadImage for an address.
    """
    if _ADDRESS.match(path):
        raise bad_image(path, 'is an address: nothing is downloaded here. Get it and give its path.')
    if folder is None:
        return str(Path(path).expanduser())
    inside = Path(os.path.normpath(path))
    if inside.parts[:1] == (os.pardir,):
        raise bad_image(
            path, 'leaves the folder of its data file (..). Give an absolute path, or put it into the folder.'
        )
    return str(Path(folder) / inside)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Yield a file as an image of Pillow, its header read and its size checked; raises BadImage, also for the body."""
    from PIL import Image

    # Also keeps a pipe or a device from being read for ever.
    if not path or not Path(path).is_file():
        raise bad_image(path, 'is not there, or is not a file', f' (looked from {Path.cwd()}).')
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS:
                more = f': {width} x {height} pixels, at most {_MOST_PIXELS:,} are decoded. Give a smaller copy.'
                raise bad_image(path, 'is too large', more)
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise bad_image(path, 'is too large', f' to decode: {error} Give a smaller copy.') from None
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        reason = f'cannot be read: it is damaged or none of {", ".join(_FORMATS)}.'
        raise bad_image(path, reason, f' {error}') from error


def image_size(path: str) -> tuple[int, int]:
    """Return (width, height) from a file's header, nothing decoded; raises BadImage."""
    with _opened(path) as image:
        width, height = image.size
        return width, height


def open_upright(path: str) -> Any:
    """Return a file as an RGB image of Pillow, turned as its camera says; raises BadImage."""
    from PIL import ImageOps

    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert('RGB')


def read_images(paths: Sequence[str], side: int) -> torch.Tensor:
    """Return the pixels of image files as Qwen-VL's tower takes them: (images, 3, side, side), fp32.

    Each is made RGB, resized to the square whatever its shape was, and normalised. Raises BadImage for what is not
    there, not an image, or more pixels than are decoded.
    """
    import torch

    return torch.stack([_read_image(path, side) for path in paths]) if paths else torch.empty(0, 3, side, side)


def _read_image(path: str, side: int) -> torch.Tensor:
    import numpy
    import torch
    from PIL import Image

    with _opened(path) as image:
        square = numpy.array(image.convert('RGB').resize((side, side), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(square).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return pixels.sub(mean).div(std)


def state_of_images(row: Row) -> bytes:
    """Return what tells whether the files of a row's images are those of before: their sizes and times of change."""
    texts = [turn['content'] for turn in row.messages if turn['role'] == 'user']
    if not row.images and not any('</img>' in text for text in texts):
        return b''
    state: list[Any] = []
    try:
        for path in (path for text in name_images(texts, row.images) for path in find_images(text)):
            about = Path(place_image(path, row.folder)).stat()
            state.append((path, about.st_size, about.st_mtime_ns))
    except (ValueError, OSError) as error:  # BadImage, or a path that no file can have
        state.append(str(error))
    return repr(state).encode()

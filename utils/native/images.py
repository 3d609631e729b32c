"""Images of Qwen-VL: the tags that name them in a text, the token ids that hold their place, and their pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

_TAG = re.compile(r'<img>(.*?)</img>')
_URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://')
# Formats whose decoders only decode: Pillow hands EPS to Ghostscript, which runs it as a program.
_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP')
# 256 MiB as RGB, where Pillow itself begins to warn. A small file can unfold into far more than memory holds.
_MOST_PIXELS = 2**28 // 3
# Those of CLIP.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def find_images(text: str) -> list[str]:
    """Return the paths in the `<img>path</img>` tags of a text, in order; '' for a tag without one."""
    return _TAG.findall(text)


def name_images(texts: Sequence[str], images: Iterable[str]) -> list[str]:
    """Return the texts of one row with each empty tag `<img></img>` given the next of the row's images.

    An image that a tag names already is not given to another. Raises ConfigError for more images than tags, and for
    an empty tag that no image is left for.
    """
    named = {path for text in texts for path in find_images(text) if path}
    left = [path for path in images if path not in named]
    empty = sum(path == '' for text in texts for path in find_images(text))
    if len(left) > empty:
        raise ConfigError(
            f'the row has more images than tags: nothing in its text says where {left[empty]!r} belongs. '
            'Write <img></img> in the query for each image of the row.'
        )
    if len(left) < empty:
        raise ConfigError(
            f'the row has {empty} empty tags <img></img> and {len(left)} images for them. '
            'Write the path into each tag, or give the row as many images.'
        )
    following = iter(left)
    return [_TAG.sub(lambda tag: tag[0] if tag[1] else f'<img>{next(following)}</img>', text) for text in texts]


def slot_ids(visual: Mapping[str, Any]) -> list[int]:
    """Return the token ids that stand for one image: start, a pad for each feature, end; `visual` is of the config."""
    start: int = visual['image_start_id']
    return [start, *[start + 2] * visual['n_queries'], start + 1]


def put_image_slots(text: str, encode: Callable[[str], list[int]], slots: Sequence[int]) -> list[int]:
    """Return the token ids of a text whose image tags are `slots` (see `slot_ids`) and the rest is `encode`d.

    Slots need no path in them: their embeddings are overwritten by the image's features.
    """
    ids: list[int] = []
    end = 0
    for tag in _TAG.finditer(text):
        ids += [*_encoded(text[end : tag.start()], encode), *slots]
        end = tag.end()
    return ids + _encoded(text[end:], encode)


def _encoded(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    return encode(text) if text else []


def read_images(paths: Sequence[str | Path], side: int) -> torch.Tensor:
    """Return the pixels of image files as the tower takes them: (images, 3, side, side), fp32.

    Each is made RGB, resized to the square whatever its shape was, and normalised. Raises ConfigError, naming the
    file, for what is not there, not an image, or more pixels than are decoded.
    """
    import torch

    return torch.stack([_read_image(str(path), side) for path in paths]) if paths else torch.empty(0, 3, side, side)


def _read_image(path: str, side: int) -> torch.Tensor:
    import numpy
    import torch

    square = numpy.array(_decode(path, side))
    pixels = torch.from_numpy(square).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return pixels.sub(mean).div(std)


def _decode(path: str, side: int) -> Any:
    """Return a file as an RGB square of Pillow."""
    from PIL import Image

    if _URL.match(path):
        raise ConfigError(f'image {path!r} is an address: nothing is downloaded here. Get it and give its path.')
    # Also keeps a pipe or a device from being read for ever.
    if not path or not Path(path).is_file():
        raise ConfigError(f'image {path!r} is not there, or is not a file (looked from {Path.cwd()}).')
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check_size(path, *image.size)
            return image.convert('RGB').resize((side, side), Image.Resampling.BICUBIC)
    except ConfigError:
        raise
    except Image.DecompressionBombError as error:
        raise ConfigError(f'image {path!r} is too large to decode: {error} Give a smaller copy of it.') from None
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise ConfigError(
            f'image {path!r} cannot be read: {error}. It is damaged or none of {", ".join(_FORMATS)}.'
        ) from error


def _check_size(path: str, width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ConfigError(
            f'image {path!r} has {width} x {height} pixels, more than the {_MOST_PIXELS:,} that are decoded. '
            f'Give a smaller copy of it: the model sees a small square in any case.'
        )

"""The places of images among the token ids of a row."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from utils.encode.encoded import RowRefused
from utils.formats.conversation import Message, Row
from utils.formats.images import BadImage, find_images, name_images, place_image, replace_tags
from utils.loading.image_processors import Images

# The path of each image of a row and how many slots it takes.
FoundImages = list[tuple[str, int]]


def new_places(ids: list[int], found: FoundImages, slot: int) -> list[int]:
    """Return the new position of each position of the ids, the end included, once the slots are filled."""
    counts = iter(found)
    return [0, *accumulate(next(counts)[1] if token == slot else 1 for token in ids)]


def open_images_of(row: Row, images: Images | None, *, stand_in: str) -> tuple[Row, FoundImages]:
    """Return the row with a stand-in for each image tag of its user turns, and the images' paths and slots.

    Raises RowRefused for an image that cannot be used, and for a row with images where the model has no vision tower.
    """
    if images is None:
        if row.images:
            raise RowRefused('the row has images, and the model sees none', row.images[0])
        return row, []
    try:
        texts = name_images([turn['content'] for turn in row.messages if turn['role'] == 'user'], row.images)
        paths = [place_image(path, row.folder) for text in texts for path in find_images(text)]
        found = [(path, images.count(path)) for path in paths]
    except BadImage as error:
        raise RowRefused(f'an image {error.reason}', error.path) from error
    if not found:
        return row, []
    marked = iter(replace_tags(text, stand_in) for text in texts)
    turns = [Message(**{**m, 'content': next(marked)}) if m['role'] == 'user' else m for m in row.messages]
    return replace(row, messages=turns), found


def fill_slots(ids: list[int], found: FoundImages, slot: int, max_length: int) -> list[int]:
    """Return the ids with each image's slot repeated for its features. Raises RowRefused where a cut takes some."""
    if ids.count(slot) != len(found):
        raise RowRefused('the template does not print each image once')
    counts = iter(found)
    filled = [i for token in ids for i in ([token] * next(counts)[1] if token == slot else (token,))]
    if max_length > 0 and len(filled) - max_length >= filled.index(slot):
        raise RowRefused('longer than max_length, which would cut an image off: raise it, or lower --max_pixels')
    return filled

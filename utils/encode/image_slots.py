"""Finds the images of a row, and repeats the token of each image in the ids of the row.

An image slot is the token that the template prints for an image. It is repeated, so that there is one token for each
feature of the image.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from utils.encode.encoded import RowRefused
from utils.formats.conversation import Message, Row
from utils.formats.images import BadImage, find_images, is_untagged, name_images, place_image, replace_tags
from utils.loading.image_processors import Images

# (path, number of features) for each image of a row. Each feature takes the position of one token.
FoundImages = list[tuple[str, int]]


def new_places(ids: list[int], found: FoundImages, slot: int) -> list[int]:
    """Return the new position of each id after `fill_slots`. The last item is the new length.

    For example, ids [5, slot, 6] with an image of 3 features give [0, 1, 4, 5].
    """
    counts = iter(found)
    return [0, *accumulate(next(counts)[1] if token == slot else 1 for token in ids)]


def open_images_of(row: Row, images: Images | None, *, stand_in: str) -> tuple[Row, FoundImages]:
    """Return the row with each image tag replaced by `stand_in`, and its images as (path, number of features).

    Only tags in user turns are replaced. A row is untagged if it has images in a column of {bytes, path}, but no image
    tag in a user turn. The images of an untagged row are put before the text of the first user turn.

    Raises RowRefused if an image cannot be used, or if the empty tags (<img></img>) and the images without a tag of
    their own differ in number.

    If images are not supported for the model, `images` is None. Then a row is returned unchanged, with an empty list.
    But a row with `row.images` that is not untagged raises RowRefused.
    """
    if images is None:
        if row.images and not is_untagged(row):
            raise RowRefused('the row has images, but images are not supported for this model', row.images[0])
        return row, []
    try:
        texts = [turn['content'] for turn in row.messages if turn['role'] == 'user']
        if texts and is_untagged(row):
            texts[0] = '<img></img>' * len(row.images) + texts[0]
        texts = name_images(texts, row.images)
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
    """Return the ids with the token `slot` of each image repeated, so that there is one token for each feature.

    For example, ids [5, slot, 6] with an image of 3 features become [5, slot, slot, slot, 6]. The result is not cut.

    Raises RowRefused if `ids` does not have one slot for each image, or if a later cut to `max_length` would remove
    image tokens. If `max_length` is negative, there is no cut. `found` must not be empty.
    """
    if ids.count(slot) != len(found):
        raise RowRefused('the template does not print each image once')
    counts = iter(found)
    filled = [i for token in ids for i in ([token] * next(counts)[1] if token == slot else (token,))]
    if max_length > 0 and len(filled) - max_length >= filled.index(slot):
        raise RowRefused(
            'longer than max_length, which would cut an image off: raise --max_length, or lower --max_pixels'
        )
    return filled

"""The base class of the encoders, which convert rows to token ids.

The base class handles images and plain text, and cuts long rows to max_length. Its subclasses apply the template to
conversations.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import LossScope, Overlong
from utils.encode.encoded import CONTROL_TOKENS, TAGS_AS_TEXT, Encoded, cut_front, whole_text
from utils.encode.guarded_tokenizer import TextTokenizer
from utils.encode.image_slots import FoundImages, fill_slots, new_places, open_images_of
from utils.formats.conversation import Message, Row
from utils.formats.images import ImageFiles
from utils.loading.image_processors import Images
from utils.preprocess import TEMPLATE_MAPPING


def cut_row(row: Encoded, max_length: int, tokenizer: Any) -> Encoded:
    """Return the row with only its last `max_length` ids. Its field `cut` is the number of characters that were cut.

    If the row is not longer, or `max_length` is negative, the row is returned unchanged.
    """
    cut = cut_front(row, max_length)
    lost = len(row.input_ids) - len(cut.input_ids)
    if lost:
        text = tokenizer.decode(row.input_ids[:lost], clean_up_tokenization_spaces=False)
        cut.cut = min(len(text), sum(map(len, row.pieces)))
    return cut


def _beginning_of(row: Encoded) -> list[int]:
    return row.input_ids[: row.prompt_length]


class Encoder:
    """Converts batches of rows to token ids."""

    name: str
    # The system text for rows that have no system text. If it is None, the template chooses the text.
    system: str | None
    # None: the row decides which replies carry loss.
    loss_scope: LossScope | None = None
    # What happens to a row longer than max_length. Only under 'cut', `encode` itself shortens rows. Prompts for
    # inference are always cut.
    overlong: Overlong = 'cut'
    # Ids at which generation stops, in addition to the end of sequence of the tokenizer.
    stop_ids: list[int]
    # Used only if the reply is not known, as in inference: whether the prompt is rendered with the template's thinking
    # switch. If the reply is known, the switch is used if the reply has reasoning.
    asks_to_think = False
    # The number of rows of the model's embedding, if the tokenizer has more ids. An id of this number or above in a
    # row stops the run.
    embedding: int | None = None

    def __init__(
        self, tokenizer: Any, *, max_length: int, images: Images | None = None, template_text: str = ''
    ) -> None:
        """Keep the settings, and find the control tokens.

        `template_text` is the source of the template. A token is a control token if it is a special token, a think tag,
        or an added token like <|user|> that occurs in `template_text`. In data, control tokens are tokenised as plain
        text, except think tags in replies.
        """
        self.tokenizer = tokenizer
        self.text = TextTokenizer(tokenizer, template_text=template_text)
        self.max_length = max_length
        self.images = images

    @property
    def switch(self) -> str | None:
        """Return the template setting with which a reply with reasoning is encoded, e.g. 'enable_thinking=True'.

        Returns None if no setting is used.
        """
        return None

    @property
    def prompt_settings(self) -> Mapping[str, Any]:
        """Return the template settings for a prompt in inference, where the reply is not known yet."""
        return {}

    def identity(self) -> dict[str, Any]:
        """Return a dict of the settings that affect the ids of a row.

        It does not include the tokenizer with its chat template, nor the settings of the image processor.
        """
        # A chat template that prints the date may print a different prompt tomorrow.
        today = time.strftime('%Y-%m-%d') if 'strftime_now' in str(self.tokenizer.chat_template) else None
        template = repr(TEMPLATE_MAPPING[self.name])
        return {'template': template, 'system': self.system, 'scope': self.loss_scope, 'max_length': self.max_length,
                'overlong': self.overlong, 'today': today, 'embedding': self.embedding}  # fmt: skip

    def embed(self, embedding: int | None) -> None:
        """Set the number of rows of the model's embedding. None means that every id of the tokenizer has a row.

        End-of-turn tokens without a row are removed from `stop_ids`, with a warning. Raises ConfigError if all of them
        are removed.
        """
        self.embedding = embedding
        beyond = [end for end in self.stop_ids if embedding is not None and end >= embedding]
        if not beyond:
            return
        named = ', '.join(f'{self.tokenizer.decode([end])!r} (id {end})' for end in beyond)
        self.stop_ids = [end for end in self.stop_ids if end not in beyond]
        if not self.stop_ids:
            raise ConfigError(
                f"template '{self.name}': replies end with {named}, but the model's embedding has rows only for ids "
                f'below {embedding}. Choose another --template_type, or take model and tokenizer from the same '
                'repository or folder.'
            )
        logger.warning(
            f"template '{self.name}': a turn can end with {named}, but the model's embedding has rows only for ids "
            f'below {embedding}. Answers never end with such a token. If a row contains one, the run stops'
        )

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Return the rows encoded, in the same order. If `overlong` is 'cut', long rows lose ids at the start.

        A row is long if it has more than max_length ids and max_length is not negative. Raises RowRefused if one of the
        rows cannot be encoded; the error does not say which. Raises ConfigError if the template has no form for a
        conversation, for example because the template is single-turn.
        """
        opened = [self.open_images(row) for row in rows if not row.is_text]
        encoded = self._encode([row for row, _ in opened]) if opened else []
        chats = iter([self._finish(row, *filled) for row, filled in zip(encoded, opened, strict=True)])
        texts = iter(self._encode_texts([row for row in rows if row.is_text]))
        return [next(texts if row.is_text else chats) for row in rows]

    @functools.cached_property
    def beginning(self) -> list[int]:
        """Return the ids that the tokenizer itself puts before plain text, such as the begin-of-sequence token."""
        return self.text.beginning()

    def _whole_texts(self, rows: Sequence[Row]) -> list[Encoded]:
        """Return each row of plain text as token ids, without the cut to max_length.

        The ids of a row are `self.beginning`, then the ids of the text, then the end-of-sequence token.
        """
        texts = [row.messages[0]['content'] for row in rows]
        before = self.tokenizer.decode(self.beginning) if self.beginning else ''
        encoded = []
        for text, ids in zip(texts, self.text.ids(texts, inert=True), strict=True):
            row = whole_text([*self.beginning, *ids, self.tokenizer.eos_token_id])
            row.notes += [CONTROL_TOKENS] if self.text.has_control(text, reply=True) else []
            row.pieces = (before, text, '')
            encoded.append(row)
        return encoded

    def _encode_texts(self, rows: Sequence[Row]) -> list[Encoded]:
        return [self._shortened(row) for row in self._whole_texts(rows)]

    def _shortened(self, row: Encoded) -> Encoded:
        return cut_row(row, self.max_length, self.tokenizer) if self.overlong == 'cut' else row

    def pieces_of(self, row: Encoded, max_length: int) -> list[Encoded]:
        """Split a row of plain text into rows of at most `max_length` ids. Any other row is returned as the only item.

        If `max_length` is negative, no row is split. `max_length` must not be 1.

        With `max_length` 3, the ids 1 2 3 4 5 become the rows 1 2 3 and 3 4 5. The id 3 is repeated, because the model
        never predicts the first id of a row. Without the repetition, the model would not learn to predict 4.

        If the tokenizer puts ids before a text, such as a begin-of-sequence token, each row begins with these ids, and
        no id is repeated.
        """
        ids = row.input_ids
        if not row.is_text or not 0 < max_length < len(ids):
            return [row]
        pieces = [whole_text(ids[:max_length])]
        position = max_length
        while position < len(ids):
            lead = self.beginning[1 - max_length :] if self.beginning else ids[position - 1 : position]
            end = position + max_length - len(lead)
            pieces.append(whole_text([*lead, *ids[position:end]]))
            position = end
        return pieces

    def encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return the prompt of each row as token ids. The prompt is the row without its last reply.

        If a row is plain text (`row.is_text`), it has no reply. Its prompt is the first half of its ids, but at most 64
        ids.

        If a prompt is longer than max_length, ids are removed from its start, whatever `overlong` says. If max_length
        is negative, nothing is removed. Raises RowRefused and ConfigError as `encode` does.
        """
        chats = [row for row in rows if not row.is_text]
        opened = [self.open_images(dataclasses.replace(row, messages=row.messages[:-1])) for row in chats]
        shown = [
            dataclasses.replace(context, messages=[*context.messages, row.messages[-1]])
            for (context, _), row in zip(opened, chats, strict=True)
        ]
        encoded = self._encode_prompts(shown) if shown else []
        asked = iter(
            [self._fill_slots(ids, found, self.max_length) for ids, (_, found) in zip(encoded, opened, strict=True)]
        )
        texts = iter(self._whole_texts([row for row in rows if row.is_text]))
        prompts = [_beginning_of(next(texts)) if row.is_text else next(asked) for row in rows]
        return [ids[-self.max_length :] if self.max_length > 0 else ids for ids in prompts]

    def image_paths(self, row: Row) -> tuple[str, ...]:
        """Return the paths of a row's images, in the order of their positions in the ids.

        A relative path is joined to the folder of the row. If images are not supported for the model, the result is
        empty. Raises RowRefused as `open_images` does.
        """
        return tuple(path for path, _ in self.open_images(row)[1])

    def open_images(self, row: Row) -> tuple[Row, FoundImages]:
        """Return the row with the image tags of its user turns replaced, and its images.

        The images are a list of (path, number of features). Each of these tags is replaced by the placeholder
        `self.text.image`, a text that no data can contain.

        If the row is plain text, or images are not supported for the model (`self.images` is None), the row is returned
        unchanged, with an empty list. Raises RowRefused if the images of the row cannot be used (see open_images_of).
        """
        if row.is_text:
            return row, []
        return open_images_of(row, self.images, stand_in=self.text.image)

    def _fill_slots(self, ids: list[int], found: FoundImages, max_length: int) -> list[int]:
        return fill_slots(ids, found, self.images.slot, max_length) if self.images and found else ids

    def _finish(self, row: Encoded, source: Row, found: FoundImages) -> Encoded:
        """Return the row with its images inserted: one image token for each feature of an image.

        `source` is the same row before it was encoded. `found` are its images. If `overlong` is 'cut', a row longer
        than max_length loses ids at the start. Raises RowRefused if the cut would remove image tokens, or if the
        template does not print each image once.
        """
        if self.images is None and any('</img>' in turn['content'] for turn in source.messages):
            row.notes.append(TAGS_AS_TEXT)
        if self.images is None and isinstance(source.images, ImageFiles) and source.images:
            row.notes.append(f'column `{source.images.column}` is not used: images are not supported for this model')
        if found:
            filled = self._fill_slots(row.input_ids, found, self.max_length if self.overlong == 'cut' else -1)
            assert self.images is not None, 'it found them'
            places = new_places(row.input_ids, found, self.images.slot)
            row = dataclasses.replace(
                row,
                input_ids=filled,
                trained=(places[row.trained[0]], places[row.trained[1]]),
                prompt_length=places[row.prompt_length],
                earlier=[(places[start], places[end]) for start, end in row.earlier],
                images=tuple(path for path, _ in found),
            )
        return self._shortened(row)

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        raise NotImplementedError

    def _encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return the prompt of each row as token ids. The last message of a row is its reply, which is not encoded."""
        raise NotImplementedError

    def check_chat(self) -> None:
        """Raise ConfigError if this encoder cannot encode a conversation."""

    def carries_loss(self, turn: Message, row: Row) -> bool:
        """Return whether the model is trained on `turn`, which is a turn of `row` before the last reply.

        Only replies of the assistant can carry loss, and empty replies never do. For other replies, the key `loss` of
        the turn decides. Without this key, the reply carries loss if the loss scope is all_rounds. The loss scope is
        --loss_scope or, if this flag is not set, `row.loss_scope`.
        """
        is_empty = not (turn['content'].strip() or turn.keys() & {'tool_calls', 'reasoning'})
        is_reply = turn['role'] == 'assistant' and not is_empty
        scope = self.loss_scope or row.loss_scope
        return is_reply and turn.get('loss', scope == 'all_rounds')

"""Makes the encoder for a registered template, or for the chat template of the tokenizer."""

from __future__ import annotations

from typing import Any

from utils.base.names import LossScope, Overlong
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoder import Encoder
from utils.encode.template_encoder import TemplateEncoder
from utils.encode.text_encoder import TextEncoder
from utils.loading.image_processors import Images
from utils.preprocess import TEMPLATE_MAPPING


def make_encoder(
    tokenizer: Any,
    *,
    template_type: str,
    system: str,
    system_typed: bool,
    max_length: int,
    loss_scope: LossScope | None = None,
    overlong: Overlong = 'cut',
    images: Images | None = None,
    embedding: int | None = None,
) -> Encoder:
    """Return the encoder for the template `template_type`.

    If the template is `auto`, `system` is used only if `system_typed` is True, which means that the user set --system.
    If the template is `auto` and the tokenizer has no chat template, the encoder encodes only plain text.

    `embedding` is the number of rows of the model's embedding. Pass it only if the tokenizer has more ids than this
    number. If `max_length` is negative, no row is cut.

    Raises ConfigError if the template cannot be used with this tokenizer or this embedding.
    """
    template = TEMPLATE_MAPPING[template_type]
    options: dict[str, Any] = {'max_length': max_length, 'images': images}
    encoder: Encoder
    if template is not None:
        encoder = TemplateEncoder(tokenizer, template, name=template_type, system=system, **options)
    elif tokenizer.chat_template:
        encoder = AutoEncoder(tokenizer, system=system if system_typed else None, **options)
    else:
        encoder = TextEncoder(tokenizer, **options)
    encoder.loss_scope = loss_scope
    encoder.overlong = overlong
    encoder.embed(embedding)
    return encoder

"""Makes the encoder of a template: a registered template, or the chat template of the tokenizer."""

from __future__ import annotations

from typing import Any

from utils.base.names import LossScope
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoder import Encoder
from utils.encode.template_encoder import TemplateEncoder
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
    images: Images | None = None,
    embedding: int | None = None,
) -> Encoder:
    """Return the encoder of a template. For the template `auto`, `system` is used only if the user typed it.

    `embedding` is the number of rows of the model's embedding. Pass it only if the tokenizer has more ids.
    """
    template = TEMPLATE_MAPPING[template_type]
    options: dict[str, Any] = {'max_length': max_length, 'images': images}
    encoder: Encoder = (
        AutoEncoder(tokenizer, system=system if system_typed else None, **options) if template is None
        else TemplateEncoder(tokenizer, template, name=template_type, system=system, **options)
    )  # fmt: skip
    encoder.loss_scope = loss_scope
    encoder.embed(embedding)
    return encoder

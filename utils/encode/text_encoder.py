"""The encoder of template `auto` for a tokenizer without a chat template. It encodes only rows of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.base.errors import ConfigError
from utils.encode.encoded import Encoded
from utils.encode.encoder import Encoder
from utils.formats.conversation import Row
from utils.loading.image_processors import Images
from utils.preprocess import AUTO, TEMPLATE_MAPPING


class TextEncoder(Encoder):
    """Encodes rows of plain text. A base model often has no chat template, and plain text needs no template."""

    name = AUTO
    system = None

    def __init__(self, tokenizer: Any, *, max_length: int, images: Images | None = None) -> None:
        super().__init__(tokenizer, max_length=max_length, images=images)
        self.stop_ids = [tokenizer.eos_token_id]

    def check_chat(self) -> None:
        """Raise ConfigError, because a conversation cannot be encoded without a template."""
        raise ConfigError(
            'template auto needs a chat template, and this tokenizer has none. '
            f'Choose a --template_type: {", ".join(name for name in TEMPLATE_MAPPING if name != AUTO)}.'
        )

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        self.check_chat()
        return []

    def _encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        self.check_chat()
        return []

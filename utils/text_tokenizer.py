"""Text to token ids, with special tokens active in template text and inert in data."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return nested JSON data with `change` applied to every string in it, keys left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {key: map_strings(item, change) for key, item in value.items()}
    return value


def _is_backend_alone(tokenizer: Any) -> bool:
    """Return whether the tokenizer adds nothing of its own to its Rust backend, which alone needs no offsets."""
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    is_backend = issubclass(kind, TokenizersBackend)
    return is_backend and all(getattr(kind, n) is getattr(TokenizersBackend, n) for n in ('__call__', '_encode_plus'))


class TextTokenizer:
    """Tokenises text in batches, with special tokens active in template text and inert in data."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Threads that encode batches take turns: which tokens are special is a state of the one tokenizer.
        self._turn = threading.Lock()
        self._backend = tokenizer.backend_tokenizer if _is_backend_alone(tokenizer) else None
        self.special_ids: dict[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self._special = re.compile('|'.join(map(re.escape, longest_first)) or r'(?!)')
        # Stands for the n-th special token inside guarded data: no one can have typed it.
        self._nonce = secrets.token_hex(8)
        self._guarded = re.compile(f'{self._nonce}:([0-9]+);')
        self._by_number = list(self.special_ids)
        # Stands for an image in the text of a turn.
        self.image = f'{self._nonce}:image;'

    def ids(self, texts: Sequence[str], *, inert: bool = False) -> list[list[int]]:
        """Return the ids of each text, nothing added; `inert` reads special tokens as plain text."""
        if not texts:
            return []
        with self._turn:
            if self._backend is None:
                options = {'split_special_tokens': True} if inert else {}
                encoded: list[list[int]] = self.tokenizer(
                    list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **options
                )['input_ids']
                return encoded
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = inert or self.tokenizer.split_special_tokens
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    def has_special(self, text: str) -> bool:
        """Return whether the text spells a special token."""
        return self._special.search(text) is not None

    def last_special(self, text: str) -> tuple[int, int]:
        """Return how many special tokens the text spells and where the last one starts; (0, 0) without any."""
        starts = [match.start() for match in self._special.finditer(text)]
        return len(starts), starts[-1] if starts else 0

    def guard(self, data: str) -> str:
        """Return the data with each special token it spells replaced by a stand-in."""
        return self._special.sub(lambda m: f'{self._nonce}:{self._by_number.index(m[0])};', data)

    def unguard(self, text: str) -> str:
        """Return the text with every stand-in replaced by the special token's spelling."""
        return self._guarded.sub(lambda m: self._by_number[int(m[1])], text)

    def guarded_ids(self, text: str) -> list[int]:
        """Return the ids of template text that holds guarded data: its own special tokens act, the data's do not."""
        if self._nonce not in text:
            return self.ids([text])[0]
        ids: list[int] = []
        position = 0
        for match in [*self._special.finditer(text), None]:
            run = self.unguard(text[position : match.start() if match else len(text)])
            ids += self.ids([run], inert=True)[0] if run else []
            if match:
                ids.append(self.special_ids[match[0]])
                position = match.end()
        return ids

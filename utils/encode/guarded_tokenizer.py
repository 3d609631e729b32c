"""Converts text to token ids. A control token in data is tokenised as plain text, except a think tag in a reply.

A control token is a special token of the tokenizer, a think tag that is an added token, or an added token that the
template prints, such as `<｜User｜>` in DeepSeek's templates. If the template prints `<|im_end|>`, the text becomes the
id of this token. If the data of a user contains `<|im_end|>`, it must not end a turn. So it becomes several ids, like
any other text.

A text that consists of template and data is converted in three steps:
1. `guard` replaces each control token in the data by a stand-in, which is a random text.
2. The template is filled with this data. The result is called guarded text.
3. `guarded_ids` converts guarded text to ids. Each stand-in becomes the ids of the text that it replaced.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Tags around reasoning in released templates. Replies may contain such tags. So the tags are active in replies, and
# inert in all other data.
OPEN_TAG = r'<(?:\w+:)?think(?::\w+)?>|<\|START_THINKING\|>|\[THINK\]'
CLOSE_TAG = r'</(?:\w+:)?think(?::\w+)?>|<\|END_THINKING\|>|\[/THINK\]'
_THINK_TAG = re.compile(f'{OPEN_TAG}|{CLOSE_TAG}')


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of nested JSON data with `change` applied to every string. Keys stay unchanged."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {key: map_strings(item, change) for key, item in value.items()}
    return value


def _is_pure_backend(tokenizer: Any) -> bool:
    """Return whether the tokenizer contains a Rust tokenizer, and its class adds nothing when it tokenises text.

    If so, the Rust tokenizer is called directly, which is faster.
    """
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    is_backend = issubclass(kind, TokenizersBackend)
    return is_backend and all(getattr(kind, n) is getattr(TokenizersBackend, n) for n in ('__call__', '_encode_plus'))


def _any_of(spellings: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of these texts. If several match at a position, the longest is matched."""
    return re.compile('|'.join(map(re.escape, sorted(spellings, key=len, reverse=True))) or r'(?!)')


def _is_printed(spelling: str, printed: str) -> bool:
    """Return whether an added token is a marker such as <|user|>, and occurs in the template text `printed`.

    `spelling` is the text of the token. A word or whitespace is not a marker.
    """
    is_marker = len(spelling) > 2 and not (spelling[0].isalnum() or spelling[0].isspace() or spelling[0] == '▁')
    return is_marker and not spelling[-1].isalnum() and spelling in printed


class TextTokenizer:
    """Tokenises text in batches. If `guard` was applied to data, its control tokens are tokenised as plain text.

    A control token is a special token, a think tag, or a token such as <|user|> that the template prints.
    """

    def __init__(self, tokenizer: Any, *, template_text: str = '') -> None:
        """Find the control tokens. `template_text` is the source of the template.

        A token is a control token if it is a special token, a think tag, or an added token like <|user|> that occurs in
        `template_text`.
        """
        self.tokenizer = tokenizer
        # Threads use the shared tokenizer one at a time, because calls change how it reads special tokens.
        self._turn = threading.Lock()
        self._backend: Any = tokenizer.backend_tokenizer if _is_pure_backend(tokenizer) else None
        # The copy of the backend that tokenises guarded text. It is made when the first guarded text is tokenised.
        self._inert: Any = None
        # Each stand-in is this random text, which no data can contain, and the number of a control token.
        self._nonce = secrets.token_hex(8)
        self._guarded = re.compile(f'{self._nonce}:([0-9]+);')
        # The text that replaces an image tag in the text of a turn.
        self.image = f'{self._nonce}:image;'
        # All known texts of the template: its source, and renderings of probes.
        self.printed = template_text
        self._learn_control(template_text)

    def _learn_control(self, printed: str) -> None:
        added = self.tokenizer.added_tokens_decoder
        self.control_ids: dict[str, int] = {
            token.content: index
            for index, token in added.items()
            if token.special or _THINK_TAG.fullmatch(token.content) or _is_printed(token.content, printed)
        }
        self.control_set = frozenset(self.control_ids.values())
        think_tags = [spelling for spelling in self.control_ids if _THINK_TAG.fullmatch(spelling)]
        self.think_ids = frozenset(self.control_ids[tag] for tag in think_tags)
        self._active = _any_of(list(self.control_ids))
        self._inert_in_replies = _any_of([spelling for spelling in self.control_ids if spelling not in think_tags])
        self._by_number = list(self.control_ids)
        self._number = {spelling: number for number, spelling in enumerate(self._by_number)}

    def add_printed(self, printed: str) -> None:
        """Add text that the template rendered. Added tokens like <|user|> in this text become control tokens."""
        self.printed += printed
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        if any(spelling in printed and spelling not in self.control_ids for spelling in added):
            self._learn_control(printed + ''.join(self.control_ids))
            self._inert = None

    def ids(self, texts: Sequence[str], *, inert: bool = False) -> list[list[int]]:
        """Return the ids of each text, without start or end tokens.

        If `inert` is False, a control token in a text becomes its id. If `inert` is True, it is tokenised as plain
        text. A think tag, such as <think>, becomes its id in both cases.
        """
        if not texts:
            return []
        if inert:
            # A text without control tokens has the same ids in both modes, so such texts share one fast call.
            plain = iter(self.ids([text for text in texts if not self.has_control(text, reply=True)]))
            return [
                self.guarded_ids(self.guard(text, reply=True)) if self.has_control(text, reply=True) else next(plain)
                for text in texts
            ]
        with self._turn:
            if self._backend is None:
                encoded: list[list[int]] = self.tokenizer(
                    list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
                )['input_ids']
                return encoded
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = self.tokenizer.split_special_tokens
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    def beginning(self) -> list[int]:
        """Return the ids that the tokenizer itself puts before a text. Many tokenizers put none."""
        with self._turn:
            whole: list[int] = self.tokenizer(['a'], return_attention_mask=False, verbose=False)['input_ids'][0]
        plain = self.ids(['a'])[0]
        return next(whole[:at] for at in range(len(whole)) if whole[at : at + len(plain)] == plain)

    def has_control(self, text: str, *, reply: bool = False) -> bool:
        """Return whether the text contains a control token. If `reply` is True, think tags do not count."""
        return (self._inert_in_replies if reply else self._active).search(text) is not None

    def spells_control(self, messages: Iterable[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> bool:
        """Return whether these messages or tools contain the text of a control token, such as <|im_end|>.

        Think tags, such as <think>, do not count in replies.
        """
        for message in messages:
            is_reply = message['role'] == 'assistant'
            for key, value in message.items():
                if key != 'role' and self.has_control(str(value or ''), reply=is_reply):
                    return True
        return bool(tools) and self.has_control(str(tools))

    def last_control(self, text: str) -> tuple[int, int]:
        """Return (number of control tokens in the text, position of the last control token).

        Returns (0, 0) if there is none.
        """
        starts = [match.start() for match in self._active.finditer(text)]
        return len(starts), starts[-1] if starts else 0

    def find_control(self, text: str, start: int = 0) -> re.Match[str] | None:
        """Return the match of the first control token at or after `start`. Think tags do not count."""
        return self._inert_in_replies.search(text, start)

    def find_controls(self, text: str) -> list[re.Match[str]]:
        """Return the matches of all control tokens in the text. Think tags do not count."""
        return list(self._inert_in_replies.finditer(text))

    def find_all(self, text: str) -> list[re.Match[str]]:
        """Return the matches of all control tokens and think tags in the text."""
        return list(self._active.finditer(text))

    def without_control(self, text: str) -> str:
        """Return the text with control tokens and think tags removed."""
        return self._active.sub('', text)

    def guard(self, data: str, *, reply: bool = False) -> str:
        """Return the data with each control token replaced by a stand-in, which is a random text.

        If `reply` is True, think tags are not replaced.
        """
        pattern = self._inert_in_replies if reply else self._active
        return pattern.sub(lambda m: f'{self._nonce}:{self._number[m[0]]};', data)

    def unguard(self, text: str) -> str:
        """Return the text with each stand-in of `guard` replaced by the control token for which it stands."""
        return self._guarded.sub(lambda m: self._by_number[int(m[1])], text)

    def guarded_ids(self, text: str) -> list[int]:
        """Return the ids of template text that contains data. `guard` has replaced each control token in the data.

        A control token in the text comes from the template, so it becomes its id. A stand-in of `guard` becomes the ids
        of the text that it replaced. If it replaced `<|im_end|>`, these are the ids of `<`, `|`, `im` and so on.
        """
        if self._nonce not in text:
            return self.ids([text])[0]
        if self._backend is None:
            return self._guarded_ids_piecewise(text)
        with self._turn:
            if self._inert is None:
                self._inert = self._make_inert()
        backend, real_ids = self._inert
        # An alias is a random text for a control token, which data cannot contain. The control tokens of the template
        # become aliases. In the copy, only aliases are control tokens, so the control tokens of the data stay text.
        aliased = self._active.sub(lambda m: self._alias(self._number[m[0]]), text)
        found = backend.encode(self.unguard(aliased), add_special_tokens=False).ids
        return [real_ids.get(token, token) for token in found]

    def _alias(self, number: int) -> str:
        return f'{self._nonce}={number};'

    def _make_inert(self) -> tuple[Any, dict[int, int]]:
        """Return (copy of the Rust tokenizer, dict from ids in the copy to ids in the tokenizer).

        The copy reads control tokens as plain text. But a control token of the template must still become one id. So
        the caller first replaces the control token by an alias, which is a random text. In the copy, an alias is one
        token. The dict maps the id of the alias to the id of the control token.

        The dict also has all added tokens of the tokenizer itself, because their ids in the copy are different.
        """
        from tokenizers import AddedToken, Tokenizer

        # The two tokenizers share one vocabulary in memory.
        backend: Any = Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            backend.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            backend.pre_tokenizer = self._backend.pre_tokenizer
        tokens = self.tokenizer.added_tokens_decoder
        # An alias gets the options of its control token, such as lstrip, so that the text next to it gets the same ids.
        controls, others = [], []
        for token in tokens.values():
            options = {name: getattr(token, name) for name in ('lstrip', 'rstrip', 'single_word', 'normalized')}
            if token.content not in self.control_ids:
                others.append(AddedToken(token.content, special=token.special, **options))
                continue
            controls.append(AddedToken(token.content, special=True, **options))
            options['normalized'] = False
            others.append(AddedToken(self._alias(self._number[token.content]), special=False, **options))
        # The ids of added tokens in the copy differ from their ids in the tokenizer. `real_ids` maps them back.
        backend.add_special_tokens(controls)
        backend.add_tokens(others)
        backend.encode_special_tokens = True
        real_ids = {backend.token_to_id(token.content): index for index, token in tokens.items()}
        for spelling, index in self.control_ids.items():
            real_ids[backend.token_to_id(self._alias(self._number[spelling]))] = index
        return backend, real_ids

    def _guarded_ids_piecewise(self, text: str) -> list[int]:
        """Return the same ids as `guarded_ids`, for a tokenizer without a usable Rust backend.

        The text is split at its control tokens, and each part between them is tokenised as plain text.
        """
        ids: list[int] = []
        position = 0
        tokens = self.tokenizer.added_tokens_decoder
        for match in [*self._active.finditer(text), None]:
            run = text[position : match.start() if match else len(text)]
            if match and tokens[self.control_ids[match[0]]].lstrip:
                run = run.rstrip()
            ids += self._text_ids(run)
            if match:
                ids.append(self.control_ids[match[0]])
                position = match.end()
                if tokens[self.control_ids[match[0]]].rstrip:
                    position += len(text[position:]) - len(text[position:].lstrip())
        return ids

    def _text_ids(self, run: str) -> list[int]:
        """Return the ids of `run`, a text in which `guard` has replaced each control token by a stand-in.

        A stand-in is a random text. A stand-in for `<|im_end|>` becomes the ids of `<`, `|`, `im` and so on.
        """
        ids: list[int] = []
        # This tokenizer always finds added tokens that are not special. So the text of such a token is cut into two.
        cut = f'{self._nonce}/'
        for piece in self._guarded.sub(lambda m: self._as_text(self._by_number[int(m[1])], cut), run).split(cut):
            if piece:
                with self._turn:
                    encoded = self.tokenizer(
                        [piece], add_special_tokens=False, verbose=False, split_special_tokens=True
                    )['input_ids']
                ids += encoded[0]
        return ids

    def _as_text(self, spelling: str, cut: str) -> str:
        token = self.tokenizer.added_tokens_decoder[self.control_ids[spelling]]
        return spelling if token.special else f'{spelling[:1]}{cut}{spelling[1:]}'

    def ids_after_control(self, text: str) -> list[int]:
        """Return the ids of `text`, tokenised as if a control token stood directly before the text.

        Some tokenizers put a space before the first word of a text. This space is not added here. But if no control
        token of the tokenizer is suitable, the text is tokenised alone, and the space is added.

        `text` can contain stand-ins: random texts by which `guard` replaced control tokens. A stand-in for `<|im_end|>`
        becomes the ids of `<`, `|`, `im` and so on.
        """
        tokens = self.tokenizer.added_tokens_decoder
        before = next((s for s, index in self.control_ids.items() if not (tokens[index].rstrip or s in text)), None)
        return self.guarded_ids(text) if before is None else self.guarded_ids(before + text)[1:]

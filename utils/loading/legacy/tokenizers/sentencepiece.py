"""Builds the tokenizers of families with a sentencepiece model, as `tokenizers` objects, from its protobuf."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.base.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How sentencepiece writes a space inside a piece.
_SPACE = '▁'

# Values in sentencepiece_model.proto: ModelProto.SentencePiece.Type and TrainerSpec.ModelType.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2

_CHATGLM2_SPECIAL = ('[MASK]', '[gMASK]', '[sMASK]', 'sop', 'eop')


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The contents of a sentencepiece model: pieces as (text, score, type) by id, and how text is normalised."""

    pieces: list[tuple[str, float, int]]
    unigram: bool
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    strip_spaces: bool

    def of_type(self, *kinds: int) -> list[str]:
        """Return the texts of the pieces of these types, in the order of their ids."""
        return [text for text, _, kind in self.pieces if kind in kinds]

    @property
    def isolates_symbols(self) -> bool:
        """Return whether user-defined pieces are split off after the dummy prefix is added, unlike added tokens."""
        return self.dummy_prefix and bool(self.of_type(_USER_DEFINED))


def read_settings(model_dir: Path, name: str = 'tokenizer_config.json') -> dict[str, Any]:
    """Return the object in a JSON file of a folder, empty if there is no file. Raises ConfigError for bad content."""
    path = model_dir / name
    return read_json(path) if path.is_file() else {}


def common_options(settings: Mapping[str, Any], *, padding_side: str = 'right') -> dict[str, Any]:
    """Return the arguments that every tokenizer takes from tokenizer_config.json, without references to code."""
    return {
        'clean_up_tokenization_spaces': False,
        'model_max_length': settings.get('model_max_length'),
        'padding_side': settings.get('padding_side', padding_side),
        'chat_template': settings.get('chat_template'),
        'model_input_names': ['input_ids', 'attention_mask'],
    }


def added_token(value: Any, where: Path) -> Any:
    """Return the AddedToken of an entry of tokenizer_config.json, a string or an object; None stays None."""
    from tokenizers import AddedToken

    fields = {'content': value} if isinstance(value, str) else value
    if fields is None:
        return None

    if not isinstance(fields, dict) or not isinstance(fields.get('content'), str):
        raise ConfigError(
            f'{where}/tokenizer_config.json has the special token {value!r}, which has no text. '
            'Download or copy it again.'
        )

    flags = {flag: bool(fields.get(flag, False)) for flag in ('single_word', 'lstrip', 'rstrip')}

    # Found in the text before normalisation, which would add the dummy prefix to the token.
    return AddedToken(fields['content'], special=True, normalized=False, **flags)


def read_vocabulary(file: Path) -> Vocabulary:
    """Return the contents of a sentencepiece model. Raises ConfigError if it is corrupt or cannot be reproduced."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        model = ModelProto.FromString(file.read_bytes())
        trainer = model.trainer_spec
        normalizer = model.normalizer_spec

        vocabulary = Vocabulary(
            pieces=[(piece.piece, piece.score, piece.type) for piece in model.pieces],
            unigram=trainer.model_type == _UNIGRAM,
            byte_fallback=trainer.byte_fallback,
            charsmap=normalizer.precompiled_charsmap,
            dummy_prefix=normalizer.add_dummy_prefix,
            strip_spaces=normalizer.remove_extra_whitespaces,
        )

        if not (model.HasField('trainer_spec') and model.HasField('normalizer_spec')):
            raise ValueError('trainer_spec or normalizer_spec is missing')
        if not all(isinstance(text, str) for text, _, _ in vocabulary.pieces):
            raise ValueError('a piece is not UTF-8')
    except (OSError, DecodeError, ValueError) as error:
        why = f'{type(error).__name__}: {error}; it is missing, truncated or of another format'
        raise ConfigError(f'{file} cannot be read as a sentencepiece model: {why}. Download it again.') from None

    if problem := _problem(vocabulary, trainer, normalizer):
        raise ConfigError(f'{file}: {problem}. Tokens would differ from those the model was trained on.')

    return vocabulary


def _problem(vocabulary: Vocabulary, trainer: Any, normalizer: Any) -> str | None:
    """Return why a model cannot be reproduced with the same ids, None if it can."""
    texts = {text for text, _, _ in vocabulary.pieces}
    spaced = vocabulary.strip_spaces and any(_SPACE in text for text in vocabulary.of_type(_USER_DEFINED))
    bytes_missing = vocabulary.byte_fallback and len(vocabulary.of_type(_BYTE)) != 256

    reasons = {
        'a piece is empty or occurs twice, the file is corrupt': '' in texts or len(texts) != len(vocabulary.pieces),
        'it has not exactly one unknown piece, the file is corrupt': len(vocabulary.of_type(_UNKNOWN)) != 1,
        'it falls back on bytes without having all 256, the file is corrupt': bytes_missing,
        'it is neither a unigram nor a BPE model': trainer.model_type not in (_UNIGRAM, _BPE),
        'treat_whitespace_as_suffix is not supported': trainer.treat_whitespace_as_suffix,
        'escape_whitespaces = false is not supported': not normalizer.escape_whitespaces,
        'pieces marked unused are not supported': vocabulary.of_type(_UNUSED),
        'remove_extra_whitespaces with user-defined pieces that hold spaces is not supported': spaced,
    }

    return next((reason for reason, found in reasons.items() if found), None)


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return every pair of pieces whose union is a normal piece, in the order of sentencepiece: by score, not by id."""
    known = {text: (-score, i) for i, (text, score, kind) in enumerate(vocabulary.pieces) if kind == _NORMAL}

    ranked = sorted(
        (*order, cut, text)
        for text, order in known.items()
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    )

    return [(text[:cut], text[cut:]) for _, _, cut, text in ranked]


def _model(vocabulary: Vocabulary) -> Any:
    """Return the BPE or unigram model of `tokenizers` that gives the same ids."""
    from tokenizers import models

    unknown = vocabulary.of_type(_UNKNOWN)[0]
    ids = {text: i for i, (text, _, _) in enumerate(vocabulary.pieces)}

    if not vocabulary.unigram:
        flags = {'byte_fallback': vocabulary.byte_fallback, 'ignore_merges': vocabulary.isolates_symbols}
        return models.BPE(ids, _merges(vocabulary), unk_token=unknown, fuse_unk=True, **flags)

    # sentencepiece never finds control and byte pieces in a text; `tokenizers` would. They get a score that makes any
    # other segmentation better. An unknown character costs the same in every segmentation.
    lowest = min((score for _, score, kind in vocabulary.pieces if kind == _NORMAL), default=0.0)
    never = (lowest - 10.0) * max(len(text) + 1 for text in ids)
    in_text = (_NORMAL, _USER_DEFINED)
    scores = [(text, score if kind in in_text else never) for text, score, kind in vocabulary.pieces]

    return models.Unigram(scores, unk_id=ids[unknown], byte_fallback=vocabulary.byte_fallback)


def _cut_pattern(vocabulary: Vocabulary) -> str:
    """Return the regex at which normalised text is split before the model gets it, empty if it is not split.

    User-defined pieces are split off, longest first; the model keeps each whole (ignore_merges). The text of a control
    or byte piece must not become that piece. BPE would form it after a user-defined piece, and a unigram model would
    form it if it has a character that no normal piece has. There the regex splits the text.
    """
    literals = [t for t in vocabulary.of_type(_UNKNOWN, _CONTROL, _BYTE) if len(t) > 1]
    known = set(''.join(vocabulary.of_type(_NORMAL)))
    symbols = vocabulary.of_type(_USER_DEFINED) if vocabulary.isolates_symbols else []
    parts = sorted(map(re.escape, symbols), key=len, reverse=True)

    if vocabulary.unigram:
        for text in literals:
            if not known.issuperset(text):
                at = _split_point(text, known)
                parts.append(f'(?<={re.escape(text[:at])})(?={re.escape(text[at:])})')
        return '|'.join(parts)

    if not parts:
        return ''

    symbol = '|'.join(parts)
    literal = '|'.join(map(re.escape, literals))
    return f'{symbol}|(?={literal})(?<={symbol}).'


def _split_point(text: str, known: set[str]) -> int:
    """Return the first position between a known and an unknown character, 1 if there is none.

    A run of unknown characters is one token, so a split inside the run would change nothing.
    """
    for at in range(1, len(text)):
        if (text[at] in known) != (text[at - 1] in known):
            return at

    return 1


def _normalizer(vocabulary: Vocabulary) -> Any:
    """Return the normalizer of `tokenizers` that changes text as sentencepiece does."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []

    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))

    if vocabulary.strip_spaces:
        steps.append(normalizers.Replace(Regex(r'\A +'), ''))
        steps.append(normalizers.Replace(Regex(' {2,}'), ' '))

    if vocabulary.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))

    steps.append(normalizers.Replace(' ', _SPACE))

    if vocabulary.strip_spaces:
        steps.append(normalizers.Replace(Regex(rf'{_SPACE}+\z'), ''))

    return normalizers.Sequence(steps)


def build_backend(vocabulary: Vocabulary, special: Sequence[Any]) -> Any:
    """Return the `tokenizers.Tokenizer` of a vocabulary. New tokens in `special` get the ids after its last one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(_model(vocabulary))
    backend.normalizer = _normalizer(vocabulary)

    steps: list[Any] = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.dummy_prefix or vocabulary.strip_spaces:
        steps.append(decoders.Strip(' ', 1, 0))
    backend.decoder = decoders.Sequence(steps)

    backend.add_special_tokens(list(special))

    if pattern := _cut_pattern(vocabulary):
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), 'isolated')

    if not vocabulary.isolates_symbols:
        # A space in a user-defined piece is written as in normalised text.
        backend.add_tokens([AddedToken(s, normalized=_SPACE in s) for s in vocabulary.of_type(_USER_DEFINED)])

    return backend


def _set_template(backend: Any, first: Sequence[str], last: Sequence[str]) -> None:
    """Put fixed tokens before and after each encoded text."""
    from tokenizers import processors

    if not first and not last:
        return

    single = [*first, '$A', *last]
    second = [f'{part}:1' for part in (*first, '$B', *last)]

    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *second],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys((*first, *last))],
    )


def _build(model_dir: Path, *, pad: str | None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of tokenizer.model. Defaults are those of the original class; `pad` is its pad token."""
    from transformers import PreTrainedTokenizerFast

    settings = read_settings(model_dir)
    defaults = {'unk_token': '<unk>', 'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': pad}
    named = {name: added_token(settings.get(name, default), model_dir) for name, default in defaults.items()}
    tokens = {name: token for name, token in named.items() if token is not None}
    backend = build_backend(read_vocabulary(model_dir / 'tokenizer.model'), list(tokens.values()))

    around = {name: bool(settings.get(f'add_{name}', name == 'bos_token')) for name in ('bos_token', 'eos_token')}
    if lacking := [name for name, wanted in around.items() if wanted and name not in tokens]:
        raise ConfigError(
            f'{model_dir}/tokenizer_config.json asks to add {lacking[0]}, which it sets to null. '
            'Download or copy it again.'
        )

    first, last = ([tokens[name].content] if wanted else [] for name, wanted in around.items())
    _set_template(backend, first, last)

    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens, **common_options(settings))


def build_internlm_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of InternLM: starts with <s>, pads with </s>, unless tokenizer_config.json differs."""
    return _build(model_dir, pad='</s>')


def build_baichuan_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of Baichuan or Baichuan2: as that of InternLM, but pads with <unk>."""
    return _build(model_dir, pad='<unk>')


def build_polylm_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of PolyLM: starts with <s>, no pad token, unless tokenizer_config.json differs."""
    return _build(model_dir, pad=None)


def build_chatglm2_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of ChatGLM2: starts with [gMASK] sop, pads on the left, finds no special tokens in text."""
    from transformers import PreTrainedTokenizerFast

    special = [added_token(name, model_dir) for name in ('<unk>', '<s>', '</s>', *_CHATGLM2_SPECIAL)]
    backend = build_backend(read_vocabulary(model_dir / 'tokenizer.model'), special)
    _set_template(backend, ('[gMASK]', 'sop'), ())

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token='<unk>',
        eos_token='</s>',
        pad_token='<unk>',
        extra_special_tokens=list(_CHATGLM2_SPECIAL),
        split_special_tokens=True,
        **common_options(read_settings(model_dir), padding_side='left'),
    )

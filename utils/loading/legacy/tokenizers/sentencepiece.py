"""Builds the tokenizers of families with a sentencepiece model.

The protobuf of the sentencepiece model is converted to an object of the `tokenizers` library.
"""

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

# sentencepiece writes this character for a space inside a piece.
_SPACE = '▁'

# Values from sentencepiece_model.proto. The first line is ModelProto.SentencePiece.Type, the second line is
# TrainerSpec.ModelType.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2

_CHATGLM2_SPECIAL = ('[MASK]', '[gMASK]', '[sMASK]', 'sop', 'eop')


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The content of a sentencepiece model.

    `pieces` are (text, score, type) in the order of their ids. `charsmap`, `dummy_prefix` and `strip_spaces` tell how
    text is normalised. With `dummy_prefix`, a space is added before each text.
    """

    pieces: list[tuple[str, float, int]]
    unigram: bool
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    strip_spaces: bool

    def of_type(self, *kinds: int) -> list[str]:
        """Return the texts of all pieces that have one of these types, in the order of their ids."""
        return [text for text, _, kind in self.pieces if kind in kinds]

    @property
    def isolates_symbols(self) -> bool:
        """Return whether a regex must split a text before and after each user-defined piece.

        If not, the user-defined pieces are added tokens of the tokenizer, which need no regex.
        """
        # The regex is applied after the dummy prefix was added to the text.
        return self.dummy_prefix and bool(self.of_type(_USER_DEFINED))


def read_settings(model_dir: Path, name: str = 'tokenizer_config.json') -> dict[str, Any]:
    """Return the content of a JSON file of a folder. If the file does not exist, return an empty dict.

    Raises ConfigError if the content is not a JSON object.
    """
    path = model_dir / name
    return read_json(path) if path.is_file() else {}


def common_options(settings: Mapping[str, Any], *, padding_side: str = 'right') -> dict[str, Any]:
    """Return the constructor arguments that are the same for all tokenizers. `settings` is tokenizer_config.json.

    Only model_max_length, padding_side and chat_template are taken from `settings`. The parameter `padding_side` is
    used if `settings` does not state the side.
    """
    return {
        'clean_up_tokenization_spaces': False,
        'model_max_length': settings.get('model_max_length'),
        'padding_side': settings.get('padding_side', padding_side),
        'chat_template': settings.get('chat_template'),
        'model_input_names': ['input_ids', 'attention_mask'],
    }


def added_token(value: Any, where: Path) -> Any:
    """Return an AddedToken for a special token in a JSON file of a tokenizer. `value` is a string, an object or None.

    Returns None if `value` is None. Raises ConfigError if `value` has no text. `where` is the model folder, for the
    message of this error.
    """
    from tokenizers import AddedToken

    fields = {'content': value} if isinstance(value, str) else value
    if fields is None:
        return None

    if not isinstance(fields, dict) or not isinstance(fields.get('content'), str):
        raise ConfigError(
            f'{where}: its tokenizer has the special token {value!r}, which has no text. Download or copy the folder '
            'again.'
        )

    flags = {flag: bool(fields.get(flag, False)) for flag in ('single_word', 'lstrip', 'rstrip')}

    # With normalized=False, the token is found in the text before normalisation. Normalisation would put the dummy
    # prefix before the token.
    return AddedToken(fields['content'], special=True, normalized=False, **flags)


def read_vocabulary(file: Path) -> Vocabulary:
    """Return the content of a sentencepiece model.

    Raises ConfigError if the file is missing or corrupt, or if the `tokenizers` library cannot reproduce the model.
    """
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
        raise ConfigError(
            f'{file}: {problem}. The file is refused, because its tokens would differ from the tokens of the '
            "model's training. Download the original file of the model."
        )

    return vocabulary


def _problem(vocabulary: Vocabulary, trainer: Any, normalizer: Any) -> str | None:
    """Return the reason why the `tokenizers` library cannot give the same ids as a sentencepiece model.

    Returns None if the library can give the same ids.
    """
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
    """Return all BPE merges: all pairs of normal pieces whose concatenation is a normal piece.

    As in sentencepiece, the merges are in the order of the scores of their concatenations, not of the ids.
    """
    known = {text: (-score, i) for i, (text, score, kind) in enumerate(vocabulary.pieces) if kind == _NORMAL}

    ranked = sorted(
        (*order, cut, text)
        for text, order in known.items()
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    )

    return [(text[:cut], text[cut:]) for _, _, cut, text in ranked]


def _model(vocabulary: Vocabulary) -> Any:
    """Return a BPE or unigram model of `tokenizers` that gives the same ids as the sentencepiece model."""
    from tokenizers import models

    unknown = vocabulary.of_type(_UNKNOWN)[0]
    ids = {text: i for i, (text, _, _) in enumerate(vocabulary.pieces)}

    if not vocabulary.unigram:
        flags = {'byte_fallback': vocabulary.byte_fallback, 'ignore_merges': vocabulary.isolates_symbols}
        return models.BPE(ids, _merges(vocabulary), unk_token=unknown, fuse_unk=True, **flags)

    # sentencepiece never finds control and byte pieces in a text, but `tokenizers` would. So these pieces get a score
    # that makes every segmentation without them better. An unknown character costs the same in every segmentation.
    lowest = min((score for _, score, kind in vocabulary.pieces if kind == _NORMAL), default=0.0)
    never = (lowest - 10.0) * max(len(text) + 1 for text in ids)
    in_text = (_NORMAL, _USER_DEFINED)
    scores = [(text, score if kind in in_text else never) for text, score, kind in vocabulary.pieces]

    return models.Unigram(scores, unk_id=ids[unknown], byte_fallback=vocabulary.byte_fallback)


def _cut_pattern(vocabulary: Vocabulary) -> str:
    """Return a regex. Normalised text is split at its matches before the model encodes the text.

    The regex is empty if no text must be split. A text must be split for two reasons:

    First, each user-defined piece must stay whole. So the text is split before and after the piece. If several pieces
    match, the longest one counts.

    Second, ordinary text that looks like a control or byte piece, for example `<s>`, must not become this piece. So the
    text is split inside `<s>`.
    """
    literals = [t for t in vocabulary.of_type(_UNKNOWN, _CONTROL, _BYTE) if len(t) > 1]
    known = set(''.join(vocabulary.of_type(_NORMAL)))
    # The model keeps a user-defined piece whole (ignore_merges) if the text is split before and after it.
    symbols = vocabulary.of_type(_USER_DEFINED) if vocabulary.isolates_symbols else []
    parts = sorted(map(re.escape, symbols), key=len, reverse=True)

    if vocabulary.unigram:
        # A unigram model reads ordinary text `<s>` as the piece only if no normal piece contains one of its characters.
        for text in literals:
            if not known.issuperset(text):
                at = _split_point(text, known)
                parts.append(f'(?<={re.escape(text[:at])})(?={re.escape(text[at:])})')
        return '|'.join(parts)

    if not parts:
        return ''

    # A BPE model reads ordinary text `<s>` as the piece only right after a user-defined piece.
    symbol = '|'.join(parts)
    literal = '|'.join(map(re.escape, literals))
    return f'{symbol}|(?={literal})(?<={symbol}).'


def _split_point(text: str, known: set[str]) -> int:
    """Return the index at which to split `text`: the first index between a known and an unknown character.

    Returns 1 if there is no such index. `known` are the characters that normal pieces contain. Several unknown
    characters in a row are one token. So a split between two unknown characters would have no effect.
    """
    for at in range(1, len(text)):
        if (text[at] in known) != (text[at - 1] in known):
            return at

    return 1


def _normalizer(vocabulary: Vocabulary) -> Any:
    """Return a normalizer of `tokenizers` that normalises text in the same way as sentencepiece."""
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
    """Return a `tokenizers.Tokenizer` for a vocabulary.

    Tokens in `special` that are not in the vocabulary get the ids after the last id of the vocabulary.
    """
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
        # If a piece contains the character for a space, it can be found only in normalised text.
        backend.add_tokens([AddedToken(s, normalized=_SPACE in s) for s in vocabulary.of_type(_USER_DEFINED)])

    return backend


def _set_template(backend: Any, first: Sequence[str], last: Sequence[str]) -> None:
    """Change `backend` so that it adds the tokens `first` before each text and the tokens `last` after each text."""
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
    """Return the tokenizer for the tokenizer.model of a folder.

    If tokenizer_config.json does not state a setting, the default of the original class is used. `pad` is the default
    pad token.
    """
    from transformers import PreTrainedTokenizerFast

    settings = read_settings(model_dir)
    defaults = {'unk_token': '<unk>', 'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': pad}
    named = {name: added_token(settings.get(name, default), model_dir) for name, default in defaults.items()}
    tokens = {name: token for name, token in named.items() if token is not None}
    backend = build_backend(read_vocabulary(model_dir / 'tokenizer.model'), list(tokens.values()))

    around = {name: bool(settings.get(f'add_{name}', name == 'bos_token')) for name in ('bos_token', 'eos_token')}
    if lacking := [name for name, wanted in around.items() if wanted and name not in tokens]:
        raise ConfigError(
            f'{model_dir}/tokenizer_config.json: {lacking[0]} is to be added to each text, but its value is null. '
            'Download or copy this file again.'
        )

    first, last = ([tokens[name].content] if wanted else [] for name, wanted in around.items())
    _set_template(backend, first, last)

    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens, **common_options(settings))


def build_internlm_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of InternLM.

    Unless tokenizer_config.json states otherwise, <s> is added before each text, and </s> is used for padding.
    """
    return _build(model_dir, pad='</s>')


def build_baichuan_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of Baichuan or Baichuan2.

    Unless tokenizer_config.json states otherwise, <s> is added before each text, and <unk> is used for padding.
    """
    return _build(model_dir, pad='<unk>')


def build_polylm_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of PolyLM.

    Unless tokenizer_config.json states otherwise, <s> is added before each text, and there is no pad token.
    """
    return _build(model_dir, pad=None)


def build_chatglm2_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of ChatGLM2.

    It adds the tokens [gMASK] and sop before each text. Unless tokenizer_config.json states otherwise, it pads on the
    left. If a text contains the string of a special token, the string is encoded as ordinary text.
    """
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

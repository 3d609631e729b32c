"""Tokenizers of the 2023 models: the same ids as the original code and the sentencepiece library."""

from __future__ import annotations

import io
import json
import random
import shutil
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT
from tests.support.tiny_models import TEXTS
from utils.base.errors import ConfigError
from utils.loading.legacy.tokenizers.sentencepiece import (
    build_baichuan_tokenizer,
    build_chatglm2_tokenizer,
    build_internlm_tokenizer,
    build_polylm_tokenizer,
)
from utils.loading.legacy.tokenizers.tiktoken import build_qwen_tokenizer, build_qwen_vl_tokenizer, read_ranks
from utils.loading.legacy.tokenizers.xverse import build_xverse_tokenizer

GOLDENS = ROOT / 'tests' / 'goldens' / 'tokenizers'
SYMBOLS = ['<eoh>', '<eoa>', '<|User|>', '<eoh>x']
SPECIAL = ('<s>', '</s>', '<unk>')
# Trainer options by name. The model of each is trained here; the first three families are BPE.
FLAVOURS: dict[str, dict[str, Any]] = {
    'bpe': {'add_dummy_prefix': False, 'remove_extra_whitespaces': False, 'user_defined_symbols': SYMBOLS},
    'bpe_shuffled': {'add_dummy_prefix': False, 'remove_extra_whitespaces': False, 'user_defined_symbols': SYMBOLS},
    'bpe_prefix': {'remove_extra_whitespaces': False},
    'bpe_prefix_shuffled': {'remove_extra_whitespaces': False},
    'bpe_prefix_symbols': {'remove_extra_whitespaces': False, 'user_defined_symbols': SYMBOLS},
    'bpe_nfkc': {'normalization_rule_name': 'nmt_nfkc', 'user_defined_symbols': SYMBOLS},
    'bpe_no_bytes': {'byte_fallback': False, 'remove_extra_whitespaces': False},
    'unigram': {'model_type': 'unigram', 'remove_extra_whitespaces': False, 'user_defined_symbols': SYMBOLS},
    'unigram_nfkc': {'model_type': 'unigram', 'normalization_rule_name': 'nmt_nfkc'},
    'unigram_no_bytes': {'model_type': 'unigram', 'byte_fallback': False, 'add_dummy_prefix': False},
}


def train(flavour: str) -> bytes:
    """Return the bytes of a sentencepiece model of about 700 pieces."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    rng = random.Random(0)
    words = [word for text in TEXTS for word in text.split()]
    lines = [' '.join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(400)] + TEXTS
    options = {
        'model_type': 'bpe', 'vocab_size': 700, 'byte_fallback': True, 'normalization_rule_name': 'identity',
        'hard_vocab_limit': False, 'minloglevel': 2, 'allow_whitespace_only_pieces': True, **FLAVOURS[flavour],
    }  # fmt: skip
    if options['model_type'] == 'bpe':
        options['vocab_size'] = 560 if options['byte_fallback'] else 300
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=writer, **options)
    if not flavour.endswith('shuffled'):
        return writer.getvalue()
    proto = sentencepiece_model_pb2.ModelProto.FromString(writer.getvalue())
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    scores = [piece.score for piece in normal]
    rng.shuffle(scores)
    for piece, score in zip(normal, scores, strict=True):
        piece.score = score
    return bytes(proto.SerializeToString())


def hostile_texts(count: int = 700) -> list[str]:
    """Return fixed difficult texts, and random ones of words, symbols, spaces, CJK, combining marks and emoji."""
    rng = random.Random(1)
    parts = [word for text in TEXTS for word in text.split()]
    parts += [
        *SYMBOLS,
        '<0x0A>',
        '<0xE4>',
        '<eo',
        'h>',
        '<',
        '▁',
        ' ',
        '  ',
        '   ',
        '\n',
        '\t',
        '\r\n',
        '\u3000',
        '\xa0',
    ]
    parts += [
        'é',
        'e\u0301',
        '①',
        'ﬁ',
        '你好',
        '世界',
        '龘',
        '😀',
        '👩\u200d👩',
        '\u0338',
        '\ufeff',
        '0',
        '42',
        'ab',
        'İ',
    ]
    fixed = [
        '',
        ' ',
        '  ',
        '\n',
        '▁',
        '▁▁',
        'a ',
        ' a',
        *SYMBOLS,
        'a<eoh>b',
        '<eoh> b',
        '<eoh><0x0A>',
        '<0x0A>',
        'aaaaa',
    ]
    drawn = [
        ''.join(rng.choice(parts) + rng.choice(['', '', ' ']) for _ in range(rng.randint(1, 14))) for _ in range(count)
    ]
    return fixed + drawn


def reload(tokenizer: Any, folder: Path) -> Any:
    """Return the tokenizer that plain AutoTokenizer makes of the saved folder."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    assert not [file for file in folder.iterdir() if file.suffix not in ('.json', '.jinja')]
    assert 'auto_map' not in json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))
    return AutoTokenizer.from_pretrained(folder)


GOLDEN_CASES: list[tuple[str, str, str, Callable[[Path], Any]]] = [
    ('qwen', 'qwen.tiktoken', 'qwen.tiktoken', build_qwen_tokenizer),
    ('internlm:internlm', 'internlm.model', 'tokenizer.model', build_internlm_tokenizer),
    ('baichuan:baichuan', 'baichuan.model', 'tokenizer.model', build_baichuan_tokenizer),
]


@pytest.mark.parametrize(('key', 'golden', 'file', 'build'), GOLDEN_CASES)
def test_ids_and_texts_are_those_of_the_original_code(
    tmp_path: Path, key: str, golden: str, file: str, build: Callable[[Path], Any]
) -> None:
    expected = json.loads((GOLDENS / 'expected.json').read_text(encoding='utf-8'))
    rows = expected['expected'][key]
    shutil.copy(GOLDENS / golden, tmp_path / file)
    tokenizer = build(tmp_path)
    again = reload(tokenizer, tmp_path / 'saved')
    for text, ids, decoded in zip(expected['texts'], rows['ids'], rows['decode_skip_special'], strict=True):
        assert tokenizer(text)['input_ids'] == ids, text
        assert again(text)['input_ids'] == ids, text
        assert again.decode(ids, skip_special_tokens=True) == decoded, text
    assert len(expected['texts']) == 308
    assert (len(again), again.pad_token_id, again.eos_token_id, again.bos_token_id) == (
        len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id,
    )  # fmt: skip


@pytest.mark.parametrize('flavour', list(FLAVOURS))
def test_ids_are_those_of_the_sentencepiece_library(tmp_path: Path, flavour: str) -> None:
    import sentencepiece

    (tmp_path / 'tokenizer.model').write_bytes(train(flavour))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'tokenizer.model'))
    tokenizer = build_polylm_tokenizer(tmp_path)
    again = reload(tokenizer, tmp_path / 'saved')
    assert len(again) == reference.vocab_size()
    # `tokenizers` normalises a mark together with the character before it, sentencepiece each character alone.
    texts = [text for text in hostile_texts() if not (flavour.endswith('nfkc') and '\u0338' in text)]
    for text in texts:
        ids = reference.encode(text)
        assert tokenizer(text)['input_ids'] == [1, *ids], repr(text)
        assert again(text)['input_ids'] == [1, *ids], repr(text)
    assert len(texts) > 600
    assert [again.convert_ids_to_tokens(i) for i in range(len(again))] == [
        reference.id_to_piece(i) for i in range(len(again))
    ]


def test_control_tokens_cut_text_and_each_part_gets_the_dummy_prefix(tmp_path: Path) -> None:
    """The original classes encode the text between control tokens separately."""
    import sentencepiece

    (tmp_path / 'tokenizer.model').write_bytes(train('bpe_prefix_symbols'))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'tokenizer.model'))
    tokenizer = build_internlm_tokenizer(tmp_path)
    parts = ['the answer', '<eoh>is', ' you ']
    expected = [1, *reference.encode(parts[0]), 2, *reference.encode(parts[1]), 1, *reference.encode(parts[2])]
    assert tokenizer(f'{parts[0]}</s>{parts[1]}<s>{parts[2]}')['input_ids'] == expected
    # A user's text cannot produce one, not even directly after a user-defined piece.
    for text in ('a</s>', '<eoh></s>', '<eoh><s><unk>'):
        ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False)['input_ids']
        assert not {0, 1, 2} & set(ids) and tokenizer.decode(ids) == text


def test_text_comes_back_from_its_ids(tmp_path: Path) -> None:
    for flavour in ('bpe', 'bpe_prefix', 'bpe_prefix_symbols', 'unigram'):
        (tmp_path / 'tokenizer.model').write_bytes(train(flavour))
        tokenizer = build_baichuan_tokenizer(tmp_path)
        texts = [text for text in hostile_texts(200) if '▁' not in text]
        assert len(texts) > 100
        for text in texts:
            assert tokenizer.decode(tokenizer(text)['input_ids'], skip_special_tokens=True) == text


def test_chatglm2_has_a_prefix_and_never_finds_special_tokens_in_text(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / 'tokenizer.model').write_bytes(train('bpe_prefix'))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'tokenizer.model'))
    size = reference.vocab_size()
    built = build_chatglm2_tokenizer(tmp_path)
    for tokenizer in (built, reload(built, tmp_path / 'saved')):
        names = ['[MASK]', '[gMASK]', '[sMASK]', 'sop', 'eop']
        assert tokenizer.convert_tokens_to_ids(names) == list(range(size, size + 5))
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 2, None)
        texts = [*hostile_texts(200), 'a</s>b', '[gMASK]sop the', '<s>', '[MASK]']
        for text in texts:
            assert tokenizer(text)['input_ids'] == [size + 1, size + 3, *reference.encode(text)], repr(text)
        assert len(texts) > 200
        padded = tokenizer(['the', 'the answer is 42'], padding=True)
        assert padded['attention_mask'][0][0] == 0 and padded['input_ids'][0][0] == 0
        assert list(padded) == ['input_ids', 'attention_mask']


def test_tokenizer_config_decides_about_added_tokens_and_flags(tmp_path: Path) -> None:
    shutil.copy(GOLDENS / 'baichuan.model', tmp_path / 'tokenizer.model')
    words = {
        name: {'__type': 'AddedToken', 'content': text, 'single_word': True, 'normalized': True}
        for name, text in (('bos_token', '<s>'), ('eos_token', '</s>'), ('unk_token', '<unk>'), ('pad_token', '<unk>'))
    }
    settings = {
        **words,
        'add_bos_token': False,
        'add_eos_token': True,
        'model_max_length': 4096,
        'auto_map': {'A': 'b'},
    }
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings), encoding='utf-8')
    built = build_baichuan_tokenizer(tmp_path)
    again = reload(built, tmp_path / 'saved')
    for tokenizer in (built, again):
        assert tokenizer('')['input_ids'] == [2]
        assert tokenizer('a <s> b')['input_ids'].count(1) == 1
        assert 1 not in tokenizer('a<s>b')['input_ids']
        assert (tokenizer.pad_token_id, tokenizer.model_max_length, tokenizer.padding_side) == (0, 4096, 'right')
    (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": null}', encoding='utf-8')
    with pytest.raises(ConfigError, match='bos_token'):
        build_baichuan_tokenizer(tmp_path)


def qwen_reference(ranks: dict[bytes, int], text: str) -> list[int]:
    """Return tiktoken's ids the slow way: join the adjacent pair whose union has the lowest rank, leftmost first."""
    import regex

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r'|\s*[\r\n]+|\s+(?!\S)|\s+'
    )
    ids: list[int] = []
    for word in regex.findall(pattern, unicodedata.normalize('NFC', text)):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in ranks:
            parts = [word.encode()]
        while joinable := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            at = min(joinable)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_qwen_vl_joins_by_rank_and_has_its_tags_after_the_extra_tokens(tmp_path: Path) -> None:
    shutil.copy(GOLDENS / 'qwen.tiktoken', tmp_path / 'qwen.tiktoken')
    ranks = read_ranks(tmp_path / 'qwen.tiktoken')
    built = build_qwen_vl_tokenizer(tmp_path)
    for tokenizer in (built, reload(built, tmp_path / 'saved')):
        texts = hostile_texts()
        for text in texts:
            assert tokenizer(text)['input_ids'] == qwen_reference(ranks, text), repr(text)
            ids = tokenizer(text)['input_ids']
            assert tokenizer.decode(ids) == unicodedata.normalize('NFC', text)
        assert len(texts) > 700
        size = len(ranks)
        tags = [
            '<|endoftext|>',
            '<|im_start|>',
            '<|im_end|>',
            '<|extra_0|>',
            '<|extra_204|>',
            '<ref>',
            '<img>',
            '</img>',
        ]
        offsets = [0, 1, 2, 3, 207, 208, 214, 215]
        assert [tokenizer.convert_tokens_to_ids(tag) - size for tag in tags] == offsets
        assert tokenizer('<img>a</img><imgpad>')['input_ids'][-1] == size + 216 == len(tokenizer) - 1
    assert build_qwen_tokenizer(tmp_path)('<img>')['input_ids'] == qwen_reference(ranks, '<img>')


@pytest.mark.parametrize(
    ('generation', 'end'),
    [
        ({}, '<|endoftext|>'),
        ({'chat_format': 'raw', 'eos_token_id': 676}, '<|endoftext|>'),
        ({'chat_format': 'chatml', 'eos_token_id': 676}, '<|im_end|>'),
        ({'eos_token_id': [676, 678]}, '<|im_end|>'),
    ],
)
def test_a_qwen_chat_model_ends_with_im_end(tmp_path: Path, generation: dict[str, Any], end: str) -> None:
    shutil.copy(GOLDENS / 'qwen.tiktoken', tmp_path / 'qwen.tiktoken')
    (tmp_path / 'generation_config.json').write_text(json.dumps(generation), encoding='utf-8')
    tokenizer = build_qwen_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (end, '<|endoftext|>', None)
    assert reload(tokenizer, tmp_path / 'saved').eos_token == end


def xverse_content(prefixed: bool) -> tuple[Any, dict[str, Any]]:
    """Return a tokenizer with a Metaspace, and its tokenizer.json with the fields of 2023."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    scheme = 'always' if prefixed else 'never'
    backend = Tokenizer(models.BPE(unk_token='<unk>'))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace(prepend_scheme=scheme)]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ['<pad>', '<unk>', '<|startoftext|>', '<|endoftext|>']
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    content = json.loads(backend.to_str())
    for step in (content['pre_tokenizer']['pretokenizers'][1], content['decoder']):
        del step['prepend_scheme'], step['split']
        step.update(add_prefix_space=prefixed, str_rep='▁')
    return backend, content


@pytest.mark.parametrize('prefixed', [True, False])
def test_xverse_file_of_2023_is_repaired(tmp_path: Path, prefixed: bool) -> None:
    backend, content = xverse_content(prefixed)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    names = {'bos_token': '<|startoftext|>', 'eos_token': '<|endoftext|>', 'pad_token': {'content': '<pad>'}}
    (tmp_path / 'special_tokens_map.json').write_text(json.dumps(names), encoding='utf-8')
    built = build_xverse_tokenizer(tmp_path)
    for tokenizer in (built, reload(built, tmp_path / 'saved')):
        texts = [*hostile_texts(200), 'a<|endoftext|>b']
        for text in texts:
            assert tokenizer(text)['input_ids'] == backend.encode(text).ids, repr(text)
        assert len(texts) > 200
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3, 0)
        assert tokenizer.decode(tokenizer('the answer')['input_ids']) == 'the answer'


@pytest.mark.parametrize('content', [b'', b'[]', b'{}', b'{"model": {"type": "BPE"}}', b'\xff', b'{"version": "1.0"'])
def test_a_corrupt_xverse_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'tokenizer.json').write_bytes(content)
    with pytest.raises(ConfigError, match=r'tokenizer\.json'):
        build_xverse_tokenizer(tmp_path)


@pytest.mark.parametrize('name', ['internlm', 'baichuan'])
def test_a_model_cut_anywhere_is_an_error(tmp_path: Path, name: str) -> None:
    whole = (GOLDENS / f'{name}.model').read_bytes()
    cuts = [0, 1, 2, *range(97, len(whole), 97), len(whole) - 1]
    for cut in cuts:
        (tmp_path / 'tokenizer.model').write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r'tokenizer\.model'):
            build_internlm_tokenizer(tmp_path)
    assert len(cuts) > 130
    (tmp_path / 'tokenizer.model').unlink()
    with pytest.raises(ConfigError, match='missing'):
        build_internlm_tokenizer(tmp_path)


def test_noise_in_a_model_is_an_error_or_a_tokenizer(tmp_path: Path) -> None:
    """For any bytes, the only exception is ConfigError."""
    whole = (GOLDENS / 'internlm.model').read_bytes()
    rng = random.Random(2)
    refused = 0
    for _ in range(120):
        noisy = bytearray(whole)
        for _ in range(4):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        (tmp_path / 'tokenizer.model').write_bytes(noisy)
        try:
            build_internlm_tokenizer(tmp_path)
        except ConfigError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda proto: setattr(proto.trainer_spec, 'model_type', 3), 'neither a unigram nor a BPE model'),
        (lambda proto: setattr(proto.trainer_spec, 'treat_whitespace_as_suffix', True), 'treat_whitespace_as_suffix'),
        (lambda proto: setattr(proto.normalizer_spec, 'escape_whitespaces', False), 'escape_whitespaces'),
        (lambda proto: setattr(proto.pieces[-1], 'type', 5), 'unused'),
        (lambda proto: setattr(proto.pieces[-1], 'piece', '<s>'), 'twice'),
        (lambda proto: setattr(proto.pieces[0], 'type', 3), 'unknown piece'),
        (lambda proto: setattr(proto.pieces[20], 'type', 1), '256'),
    ],
)
def test_what_cannot_be_reproduced_is_refused_by_name(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((GOLDENS / 'internlm.model').read_bytes())
    change(proto)
    (tmp_path / 'tokenizer.model').write_bytes(proto.SerializeToString())
    with pytest.raises(ConfigError, match=message):
        build_internlm_tokenizer(tmp_path)


def test_a_corrupt_tiktoken_file_is_an_error(tmp_path: Path) -> None:
    whole = (GOLDENS / 'qwen.tiktoken').read_bytes()
    lines = whole.splitlines(keepends=True)
    broken = [
        b'', whole[:1000], whole[:-2], whole[: whole.rindex(b' ')], b''.join(lines[1:]),
        b''.join(lines[:-2] + lines[-1:]), b'\xff\xfe' + whole, whole + b'!!!! 676\n',
        whole + lines[300], whole + b'AAAA x\n', b'{}',
    ]  # fmt: skip
    for content in broken:
        (tmp_path / 'qwen.tiktoken').write_bytes(content)
        with pytest.raises(ConfigError, match=r'qwen\.tiktoken'):
            build_qwen_tokenizer(tmp_path)
    assert len(broken) == 11
    (tmp_path / 'qwen.tiktoken').unlink()
    with pytest.raises(ConfigError, match=r'qwen\.tiktoken'):
        build_qwen_tokenizer(tmp_path)


@pytest.mark.parametrize('content', ['[]', '{', '{"bos_token": 3}', '{"eos_token": {"lstrip": true}}'])
def test_a_corrupt_tokenizer_config_is_an_error(tmp_path: Path, content: str) -> None:
    shutil.copy(GOLDENS / 'internlm.model', tmp_path / 'tokenizer.model')
    (tmp_path / 'tokenizer_config.json').write_text(content, encoding='utf-8')
    with pytest.raises(ConfigError, match=r'tokenizer_config\.json|its tokenizer has the special token .* no text'):
        build_internlm_tokenizer(tmp_path)

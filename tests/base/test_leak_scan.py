"""Secrets and pickles are found wherever they hide, and nothing is found in the files of a run."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from utils.base.leak_scan import find_secrets, scan_tree

SECRET = 'canary/+secret-0123456789'
SECRETS = {'the variable X_TOKEN': SECRET}
HOLDS = 'the value of the variable X_TOKEN'


def zipped(name: str, data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def tarred(name: str, data: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def safetensors(metadata: dict[str, str]) -> bytes:
    header = json.dumps({'__metadata__': metadata, 'w': {'dtype': 'U8', 'shape': [4], 'data_offsets': [0, 4]}}).encode()
    return struct.pack('<Q', len(header)) + header + b'abcd'


def saved_by_torch() -> bytes:
    stream = io.BytesIO()
    torch.save({'w': torch.ones(2)}, stream)
    return stream.getvalue()


PLAIN = SECRET.encode()
PLANTED = {
    'README.md': (b'see ' + PLAIN, f'README.md: {HOLDS}'),
    'url.json': (b'?token=canary%2F%2Bsecret-0123456789', f'url.json: {HOLDS}'),
    'b64.json': (base64.b64encode(PLAIN), f'b64.json: {HOLDS}'),
    'wide.txt': (SECRET.encode('utf-16'), f'wide.txt: {HOLDS}'),
    'a.zip': (zipped('in.txt', PLAIN), f'a.zip/in.txt: {HOLDS}'),
    'b.zip': (zipped('a.zip', zipped('in.txt', PLAIN)), f'b.zip/a.zip/in.txt: {HOLDS}'),
    'c.gz': (gzip.compress(PLAIN), f'c.gz/unpacked: {HOLDS}'),
    'd.bz2': (bz2.compress(PLAIN), f'd.bz2/unpacked: {HOLDS}'),
    'e.xz': (lzma.compress(PLAIN), f'e.xz/unpacked: {HOLDS}'),
    'f.tar': (tarred('in.txt', gzip.compress(PLAIN)), f'f.tar/in.txt/unpacked: {HOLDS}'),
    'g.safetensors': (safetensors({'note': base64.b64encode(b'x' + PLAIN).decode()}), f'metadata note: {HOLDS}'),
    'h.safetensors': (safetensors({'note': base64.b64encode(pickle.dumps([1])).decode()}), 'metadata note: a pickle'),
    'i.bin': (pickle.dumps({'a': 1}), 'i.bin: a pickle'),
    'j.dat': (pickle.dumps(Path('x'), protocol=0), 'j.dat: a pickle'),
    'k.pt': (saved_by_torch(), 'data.pkl: a pickle'),
    'l.pkl': (b'anything', 'l.pkl: a pickle'),
    'm.txt': (b'-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA', 'm.txt: a private key'),
    'n.json': (b'"-----BEGIN PRIVATE KEY-----\\nMIIEvQIBADANBgkqhkiG9w0B"', 'n.json: a private key'),
    'o.txt': (b'hf_' + b'a1B2' * 9, 'o.txt: a Hugging Face token'),
    'p.txt': (b'ms-01234567-89ab-cdef-0123-456789abcdef', 'p.txt: a ModelScope token'),
    'q.txt': (b'ghp_' + b'0aZ9' * 9, 'q.txt: a GitHub token'),
    'overlapping.txt': (b'9gho_x_ghp_' + b'0aZ9' * 9, 'overlapping.txt: a GitHub token'),
    'r.txt': (b'AKIA' + b'ABCD2345' * 2, 'r.txt: an AWS key'),
    's.gz': (gzip.compress(b'b')[:10] + b'\xff' * 50, 's.gz: an archive that cannot be read'),
    's.zip': (zipped('a', b'b')[:-12], 's.zip: an archive that cannot be read'),
}  # fmt: skip


@pytest.mark.parametrize('name', PLANTED)
def test_it_is_found_and_not_repeated(name: str, tmp_path: Path) -> None:
    data, finding = PLANTED[name]
    (tmp_path / name).write_bytes(data)
    found = scan_tree(tmp_path, SECRETS)
    assert any(line.endswith(finding) for line in found), found
    assert SECRET not in ''.join(found)


def test_an_archive_nested_without_end_is_a_finding(tmp_path: Path) -> None:
    data = b'nothing'
    for _ in range(8):
        data = zipped('in.zip', data)
    (tmp_path / 'deep.zip').write_bytes(data)
    assert 'too deep or too large' in scan_tree(tmp_path, SECRETS)[0]


def test_the_name_of_a_file_counts(tmp_path: Path) -> None:
    (tmp_path / 'ms-01234567-89ab-cdef-0123-456789abcdef.txt').touch()
    assert scan_tree(tmp_path, {}) == ['the name of <secret>.txt: a ModelScope token']


def test_nothing_is_found_in_a_model(model_dir: Path, tmp_path: Path) -> None:
    assert scan_tree(model_dir, SECRETS) == []
    (tmp_path / 'plain.zip').write_bytes(zipped('a.txt', b'I1\n. see hf_short and -----BEGIN PRIVATE KEY----- alone.'))
    (tmp_path / 'text.md').write_text('A sentence that ends with a dot.\n')
    assert scan_tree(tmp_path, SECRETS) == []


def test_variables_are_known_by_their_names() -> None:
    names = ('HF_TOKEN', 'MY_API_KEY', 'AWS_SECRET_ACCESS_KEY', 'PGPASSWORD_X', 'TOKENIZERS_PARALLELISM', 'HOME')
    found = find_secrets({**dict.fromkeys(names, 'long-enough'), 'X_TOKEN': 'short'}, {'--hub_token': 'typed-in-full'})
    assert set(found) == {
        'the variable HF_TOKEN', 'the variable MY_API_KEY', 'the variable AWS_SECRET_ACCESS_KEY', '--hub_token',
    }  # fmt: skip


VOCABULARIES = {
    'tokenizer.json': json.dumps({'model': {'vocab': {'a': 0, 'Ġpassword': 1}, 'merges': [['Ġpass', 'word']]}}),
    'unigram/tokenizer.json': json.dumps({'model': {'vocab': [['a', 0.0], ['▁password', -1.5]]}}, ensure_ascii=False),
    'vocab.json': json.dumps({'a': 0, 'password': 1}),
    'vocab.txt': 'a\n##password\n',
}


@pytest.mark.parametrize('name', VOCABULARIES)
def test_a_password_that_is_a_word_of_the_vocabulary_is_no_leak(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(VOCABULARIES[name], encoding='utf-8')
    secrets = find_secrets({'POSTGRES_PASSWORD': 'password', 'OTHER_PASSWORD': 'password1'}, {})
    assert scan_tree(tmp_path, secrets) == []
    (tmp_path / 'sample.txt').write_text('the password is password')
    assert scan_tree(tmp_path, secrets) == ['sample.txt: the value of the variable POSTGRES_PASSWORD']


LEAKS_BESIDE_WORDS = {
    'in the settings of a tokenizer': (
        'tokenizer.json',
        {'model': {'vocab': {'password': 0}}, 'added_tokens': [{'content': 'password'}]},
    ),
    'inside a longer word': ('tokenizer.json', {'model': {'vocab': {'my_password_1': 0}}}),
    'as what a word stands for': ('vocab.json', {'password': 'password'}),
    'in a list that is no vocabulary': ('vocab.json', ['password', 1]),
    'in a file that is no tokenizer': ('notes.json', {'model': {'vocab': {'password': 0}}}),
    'in a tokenizer without a vocabulary': ('tokenizer.json', {'password': 0}),
}


@pytest.mark.parametrize('case', LEAKS_BESIDE_WORDS)
def test_a_password_beside_the_words_is_found(case: str, tmp_path: Path) -> None:
    name, content = LEAKS_BESIDE_WORDS[case]
    (tmp_path / name).write_text(json.dumps(content))
    secrets = find_secrets({'POSTGRES_PASSWORD': 'password'}, {})
    assert scan_tree(tmp_path, secrets) == [f'{name}: the value of the variable POSTGRES_PASSWORD']


def test_a_variable_that_is_no_utf_8_is_looked_for(tmp_path: Path) -> None:
    secrets = find_secrets({'X_TOKEN': b'\xff\xfe-canary-in-latin'.decode('utf-8', 'surrogateescape')}, {})
    (tmp_path / 'a.txt').write_bytes(b'x\xff\xfe-canary-in-latin')
    assert scan_tree(tmp_path, secrets) == ['a.txt: the value of the variable X_TOKEN']

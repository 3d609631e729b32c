"""What must not leave the machine: tokens, private keys and pickles, looked for in every byte of a folder.

Archives are opened, also inside each other; what cannot be looked into is a finding too.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import gzip
import io
import json
import lzma
import mmap
import os
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

_NAMES = re.compile(
    r'(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(?:$|_)', re.I
)
_SHORTEST_SECRET = 8
# What each begins with, and what follows: a search for a fixed beginning goes through gigabytes in seconds.
_PATTERNS: dict[str, tuple[tuple[bytes, ...], bytes]] = {
    'a private key': ((b'-----BEGIN ',), rb'[A-Z0-9 ]*PRIVATE KEY-----(?:\s|\\[nr])*[A-Za-z0-9+/]{16}'),
    'a Hugging Face token': ((b'hf_',), rb'[A-Za-z0-9]{30}'),
    'a ModelScope token': ((b'ms-',), rb'[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}'),
    'a GitHub token': ((b'ghp_', b'gho_', b'ghu_', b'ghs_', b'ghr_', b'github_pat_'), rb'[A-Za-z0-9_]{36}'),
    'a GitLab token': ((b'glpat-',), rb'[A-Za-z0-9_-]{20}'),
    'an AWS key': ((b'AKIA', b'ASIA'), rb'[0-9A-Z]{16}(?![A-Za-z0-9])'),
    'an API key': ((b'sk-',), rb'(?:proj-|ant-)?[A-Za-z0-9_]{32}'),
    'a Slack token': ((b'xoxb-', b'xoxp-', b'xoxa-', b'xoxr-', b'xoxs-'), rb'[0-9]{8,}-[A-Za-z0-9-]{10}'),
}
_DEEPEST = 4
_UNPACKED_BYTES = 1 << 30
# What stands for a blank, or for none, in front of a vocabulary's words: SentencePiece, byte-level BPE, WordPiece.
_WORD_MARKS = re.compile(r'^(?:▁|Ġ|##)')
_PICKLE_SUFFIXES = ('.pkl', '.pickle', '.joblib')
# Opcodes of the old text protocols that name something to be imported.
_IMPORTS = {'GLOBAL', 'INST', 'STACK_GLOBAL'}

Bytes = bytes | mmap.mmap


def find_secrets(environment: Mapping[str, str], typed: Mapping[str, str | None]) -> dict[str, str]:
    """Return secrets by what holds them: variables named like one, and what was typed."""
    named = {f'the variable {name}': value for name, value in environment.items() if _NAMES.search(name)}
    named |= {name: value for name, value in typed.items() if value}
    return {name: value for name, value in named.items() if len(value) >= _SHORTEST_SECRET}


def scan_tree(folder: Path, secrets: Mapping[str, str]) -> list[str]:
    """Return one line per finding, with the file and what it is, never its text."""
    scan = _Scan(secrets)
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
        name = path.relative_to(folder).as_posix()
        scan.text(f'the name of {name}', name.encode())
        if path.stat().st_size:
            with path.open('rb') as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                scan.file(name, data, depth=0)
    return scan.found


class _Scan:
    def __init__(self, secrets: Mapping[str, str]) -> None:
        self.found: list[str] = []
        self.unpacked = 0
        self.known = [(f'what {name} holds', value, s) for name, value in secrets.items() for s in _spellings(value)]
        self.patterns = [
            (what, re.compile(re.escape(start) + rest))
            for what, (starts, rest) in _PATTERNS.items()
            for start in starts
        ]

    def add(self, place: str, what: str) -> None:
        if f'{place}: {what}' not in self.found:
            self.found.append(f'{place}: {what}')

    def text(self, place: str, data: Bytes) -> None:
        held = [(what, value, spelled) for what, value, spelled in self.known if data.find(spelled) >= 0]
        words, rest = _vocabulary(place, data) if held else (set(), b'')
        for what, value, spelled in held:
            if value not in words or rest.find(spelled) >= 0:
                self.add(place, what)
        for what, pattern in self.patterns:
            if any(not bytes(data[max(m.start() - 1, 0) : m.start()]).isalnum() for m in pattern.finditer(data)):
                self.add(place, what)

    def file(self, place: str, data: Bytes, *, depth: int) -> None:
        self.text(place, data)
        if place.lower().endswith(_PICKLE_SUFFIXES) or _is_pickle(data):
            self.add(place, 'a pickle')
        for name, value in _metadata(data):
            decoded = value.encode('utf-8', 'surrogatepass')
            for text in (decoded, value.encode('latin-1', 'ignore'), _from_base64(decoded)):
                self.text(f'{place}, metadata {name}', text)
                if _is_pickle(text):
                    self.add(f'{place}, metadata {name}', 'a pickle')
        try:
            for name, content in self._members(data):
                if depth == _DEEPEST or content is None:
                    self.add(f'{place}/{name}', 'an archive too deep or too large to be looked into')
                else:
                    self.file(f'{place}/{name}', content, depth=depth + 1)
        except Exception:  # readers of damaged archives raise whatever they stumble over
            self.add(place, 'an archive that cannot be looked into')

    def _members(self, data: Bytes) -> Iterator[tuple[str, bytes | None]]:
        head = bytes(data[:6])
        openers: dict[bytes, Any] = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\x00': lzma.open}
        opener = next((o for magic, o in openers.items() if head.startswith(magic)), None)
        if opener is not None:
            yield 'unpacked', self._bounded(opener(io.BytesIO(data)))
        elif head.startswith(b'PK\x03\x04'):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for info in archive.infolist():
                    with archive.open(info) as stream:
                        yield info.filename, self._bounded(stream)
        elif bytes(data[257:262]) == b'ustar':
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    if (extracted := tar.extractfile(member)) is not None:
                        yield member.name, self._bounded(extracted)

    def _bounded(self, stream: Any) -> bytes | None:
        content: bytes = stream.read(_UNPACKED_BYTES - self.unpacked + 1)
        self.unpacked += len(content)
        return content if self.unpacked <= _UNPACKED_BYTES else None


def _spellings(secret: str) -> list[bytes]:
    plain = os.fsencode(secret)  # a variable may hold bytes that are no UTF-8
    # Whole groups of three bytes: what is the same in base64 whatever follows.
    encoded = base64.b64encode(plain[: len(plain) // 3 * 3])
    return [plain, quote(plain, safe='').encode(), secret.encode('utf-16-le', 'surrogatepass'), encoded]


def _vocabulary(place: str, data: Bytes) -> tuple[set[str], bytes]:
    """Return the words of a tokenizer's file, and the file without them; no words for another file.

    The base model brought them: a password that is a word among them is not told by them.
    """
    name = place.rpartition('/')[2]
    try:
        if name in ('vocab.txt', 'merges.txt'):
            entries, rest = bytes(data).decode().splitlines(), ''
        elif name == 'vocab.json':
            content = json.loads(bytes(data))
            entries, rest = list(content), json.dumps(list(content.values()), ensure_ascii=False)
        elif name == 'tokenizer.json':
            content = json.loads(bytes(data))
            vocabulary = content['model'].pop('vocab')
            content['model'].pop('merges', None)
            # Unigram has pairs of a word and its score.
            entries = [entry if isinstance(entry, str) else entry[0] for entry in vocabulary]
            rest = json.dumps(content, ensure_ascii=False)
        else:
            return set(), b''
    except (ValueError, LookupError, TypeError, AttributeError):  # not what the name says
        return set(), b''
    return {_WORD_MARKS.sub('', entry) for entry in entries if isinstance(entry, str)}, rest.encode(
        'utf-8', 'surrogatepass'
    )


def _is_pickle(data: Bytes) -> bool:
    """Return whether data is a pickle: by its first opcodes, or an old text one by naming an import and ending."""
    binary = bytes(data[:1]) == b'\x80' and bytes(data[1:2]) in (b'\x02', b'\x03', b'\x04', b'\x05')
    if not binary and bytes(data[-2:]).rstrip(b'\n')[-1:] != b'.':
        return False
    names: set[str] = set()
    try:
        for count, (opcode, _, _) in enumerate(pickletools.genops(bytes(data[: 1 << 20])), start=1):
            names.add(opcode.name)
            if binary and count == 3:
                return True
    except Exception:  # the first byte that is no opcode
        return False
    return binary or bool(names & _IMPORTS)


def _metadata(data: Bytes) -> Iterator[tuple[str, str]]:
    """Yield the free text in a safetensors header."""
    size = int.from_bytes(data[:8], 'little')
    if bytes(data[8:9]) != b'{' or not 0 < size <= len(data) - 8:
        return
    try:
        header = json.loads(bytes(data[8 : 8 + size]))
    except ValueError:
        return
    yield from ((str(k), str(v)) for k, v in (header.get('__metadata__') or {}).items())


def _from_base64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b''


def scan_for_push(folder: Path, token: str) -> list[str]:
    """Return what keeps a folder from leaving this machine, given the token of the push and the environment."""
    return scan_tree(folder, find_secrets(os.environ, {'the token of this push': token}))

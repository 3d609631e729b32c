"""Scan a folder for content that must not leave the machine: tokens, private keys and pickles.

Every byte is scanned. Archives (zip, tar, gzip, bzip2, xz), and archives inside archives, are unpacked. Such an archive
that cannot be scanned is reported too.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

_NAMES = re.compile(
    r'(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(?:$|_)', re.I
)
_SHORTEST_SECRET = 8
# For each kind of secret, pairs of a fixed beginning and a pattern for the rest. Searching for a fixed beginning is
# fast: 0.03 s in 100 MB.
_PATTERNS: dict[str, tuple[tuple[bytes, bytes], ...]] = {
    'a private key': ((b'-----BEGIN ', rb'[A-Z0-9 ]*PRIVATE KEY-----(?:\s|\\[nr])*[A-Za-z0-9+/]{16}'),),
    'a Hugging Face token': ((b'hf_', rb'[A-Za-z0-9]{30}'),),
    'a ModelScope token': ((b'ms-', rb'[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}'),),
    'a GitHub token': ((b'gh', rb'[pousr]_[A-Za-z0-9_]{36}'), (b'github_pat_', rb'[A-Za-z0-9_]{36}')),
    'a GitLab token': ((b'glpat-', rb'[A-Za-z0-9_-]{20}'),),
    'an AWS key': ((b'AKIA', rb'[0-9A-Z]{16}(?![A-Za-z0-9])'), (b'ASIA', rb'[0-9A-Z]{16}(?![A-Za-z0-9])')),
    'an API key': ((b'sk-', rb'(?:proj-|ant-)?[A-Za-z0-9_]{32}'),),
    'a Slack token': ((b'xox', rb'[bpars]-[0-9]{8,}-[A-Za-z0-9-]{10}'),),
}
_HIDDEN = b'<secret>'
_MAX_DEPTH = 4
_MAX_UNPACKED_BYTES = 1 << 30
# Markers before the words of a vocabulary. In SentencePiece and byte-level BPE the marker means a space before the
# word; in WordPiece it means that there is no space.
_WORD_MARKS = re.compile(r'^(?:▁|Ġ|##)')
_PICKLE_SUFFIXES = ('.pkl', '.pickle', '.joblib')
# Opcodes that import a name.
_IMPORT_OPCODES = {'GLOBAL', 'INST', 'STACK_GLOBAL'}

Bytes = bytes | mmap.mmap


def find_secrets(environment: Mapping[str, str], typed: Mapping[str, str | None]) -> dict[str, str]:
    """Return the secrets to search for, as a dict from a description of each secret to its value.

    For example, the result is {'the variable HF_TOKEN': 'hf_...', '--hub_token': 'ms-...'}.

    The secrets are the values of environment variables with secret-like names, and the values in `typed`. `typed` is a
    dict from flags to their values, for example {'--hub_token': 'ms-...'}. A value that is None or has fewer than 8
    characters is left out.
    """
    named = {f'the variable {name}': value for name, value in environment.items() if _NAMES.search(name)}
    named |= {name: value for name, value in typed.items() if value}
    return {name: value for name, value in named.items() if len(value) >= _SHORTEST_SECRET}


def hide_secrets(text: str, secrets: Mapping[str, str]) -> str:
    """Return the text with each secret replaced by <secret>.

    `secrets` is a dict from a description of each secret to its value, for example {'--hub_token': 'ms-...'}. Private
    keys and tokens of well-known services (for example hf_...) are replaced even if `secrets` does not contain them.
    """
    data = text.encode('utf-8', 'surrogatepass')
    for encoded in sorted({e for secret in secrets.values() for e in _encodings(secret)}, key=len, reverse=True):
        data = data.replace(encoded, _HIDDEN)
    for pairs in _PATTERNS.values():
        for start, rest in pairs:
            data = re.sub(rb'(?<![A-Za-z0-9])' + re.escape(start) + rest + rb'[\w-]*', _HIDDEN, data)
    return data.decode('utf-8', 'surrogatepass')


def scan_tree(folder: Path, secrets: Mapping[str, str]) -> list[str]:
    """Search all files of a folder for secrets and pickles. Return one line for each finding.

    A line is `<file>: <what was found>`. It does not show a secret, even if the name of the file contains it. `secrets`
    is a dict from a description of each secret to its value, for example {'--hub_token': 'ms-...'}. Private keys and
    tokens of well-known services (for example hf_...) are found even if `secrets` does not contain them.
    """
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
        self.secrets = secrets
        # (kind of finding, secret, one encoding of the secret)
        self.known = [
            (f'the value of {name}', secret, encoded)
            for name, secret in secrets.items()
            for encoded in _encodings(secret)
        ]
        # The rest is a lookahead, so that a beginning inside the rest of another match is found too.
        self.patterns = [
            (kind, re.compile(re.escape(start) + b'(?=' + rest + b')'))
            for kind, pairs in _PATTERNS.items()
            for start, rest in pairs
        ]

    def add(self, location: str, kind: str) -> None:
        finding = f'{hide_secrets(location, self.secrets)}: {kind}'  # the name of a file may contain a secret
        if finding not in self.found:
            self.found.append(finding)

    def text(self, location: str, data: Bytes) -> None:
        present = [(kind, secret, encoded) for kind, secret, encoded in self.known if data.find(encoded) >= 0]
        words, rest = _vocabulary(location, data) if present else (set(), b'')
        for kind, secret, encoded in present:
            if secret not in words or rest.find(encoded) >= 0:
                self.add(location, kind)

        for kind, pattern in self.patterns:
            if any(_starts_word(data, match.start()) for match in pattern.finditer(data)):
                self.add(location, kind)

    def file(self, location: str, data: Bytes, *, depth: int) -> None:
        self.text(location, data)
        if location.lower().endswith(_PICKLE_SUFFIXES) or _is_pickle(data):
            self.add(location, 'a pickle')

        for name, value in _metadata(data):
            self._metadata_value(f'{location}, metadata {name}', value)

        try:
            for name, content in self._members(data):
                member = f'{location}/{name}'
                if depth == _MAX_DEPTH or content is None:
                    self.add(member, 'an archive that is nested too deep or too large to scan')
                else:
                    self.file(member, content, depth=depth + 1)
        except Exception:  # the readers raise many kinds of exceptions for damaged archives
            self.add(location, 'an archive that cannot be read')

    def _metadata_value(self, location: str, value: str) -> None:
        encoded = value.encode('utf-8', 'surrogatepass')
        for text in (encoded, value.encode('latin-1', 'ignore'), _from_base64(encoded)):
            self.text(location, text)
            if _is_pickle(text):
                self.add(location, 'a pickle')

    def _members(self, data: Bytes) -> Iterator[tuple[str, bytes | None]]:
        """Yield (name, content) for each file in an archive. Yield nothing if `data` is not an archive.

        If a file is too large to unpack, its content is None.
        """
        import bz2
        import gzip
        import lzma

        head = bytes(data[:6])
        openers: dict[bytes, Any] = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\x00': lzma.open}
        opener = next((o for magic, o in openers.items() if head.startswith(magic)), None)

        if opener is not None:
            yield 'unpacked', self._bounded(opener(io.BytesIO(data)))
        elif head.startswith(b'PK\x03\x04'):
            import zipfile

            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for info in archive.infolist():
                    with archive.open(info) as stream:
                        yield info.filename, self._bounded(stream)
        elif bytes(data[257:262]) == b'ustar':
            import tarfile

            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    if (extracted := tar.extractfile(member)) is not None:
                        yield member.name, self._bounded(extracted)

    def _bounded(self, stream: Any) -> bytes | None:
        content: bytes = stream.read(_MAX_UNPACKED_BYTES - self.unpacked + 1)
        self.unpacked += len(content)
        return content if self.unpacked <= _MAX_UNPACKED_BYTES else None


def _starts_word(data: Bytes, start: int) -> bool:
    """Return whether the byte at `start` is the first of a word: no letter or digit is directly before it."""
    return not bytes(data[max(start - 1, 0) : start]).isalnum()


def _encodings(secret: str) -> list[bytes]:
    plain = os.fsencode(secret)  # a variable may hold bytes that are not UTF-8
    # Only complete groups of three bytes: the base64 of a group does not depend on the bytes after it.
    in_base64 = base64.b64encode(plain[: len(plain) // 3 * 3])
    return [plain, quote(plain, safe='').encode(), secret.encode('utf-16-le', 'surrogatepass'), in_base64]


def _vocabulary(location: str, data: Bytes) -> tuple[set[str], bytes]:
    """Return the words in the vocabulary of a tokenizer file, and the rest of its content as bytes.

    The vocabulary comes from the base model. So if a word of the vocabulary equals a password, the password was not
    leaked. `location` is the path of the file. If the file is not a tokenizer file, (set(), b'') is returned.
    """
    name = location.rpartition('/')[2]
    try:
        if name in ('vocab.txt', 'merges.txt'):
            entries = bytes(data).decode().splitlines()
            rest = ''
        elif name == 'vocab.json':
            content = json.loads(bytes(data))
            entries = list(content)
            rest = json.dumps(list(content.values()), ensure_ascii=False)
        elif name == 'tokenizer.json':
            content = json.loads(bytes(data))
            vocabulary = content['model'].pop('vocab')
            content['model'].pop('merges', None)
            # A Unigram vocabulary contains (word, score) pairs.
            entries = [entry if isinstance(entry, str) else entry[0] for entry in vocabulary]
            rest = json.dumps(content, ensure_ascii=False)
        else:
            return set(), b''
    except (ValueError, LookupError, TypeError, AttributeError):  # the content does not match the file name
        return set(), b''

    words = {_WORD_MARKS.sub('', entry) for entry in entries if isinstance(entry, str)}
    return words, rest.encode('utf-8', 'surrogatepass')


def _is_pickle(data: Bytes) -> bool:
    """Return whether data is a pickle.

    A pickle of protocol 2 or higher is recognised by its first opcodes. A pickle of an older protocol is recognised by
    an opcode that imports a name, and by the stop opcode at the end.
    """
    binary = bytes(data[:1]) == b'\x80' and bytes(data[1:2]) in (b'\x02', b'\x03', b'\x04', b'\x05')
    if not binary and bytes(data[-2:]).rstrip(b'\n')[-1:] != b'.':
        return False

    import pickletools

    names: set[str] = set()
    try:
        for count, (opcode, _, _) in enumerate(pickletools.genops(bytes(data[: 1 << 20])), start=1):
            names.add(opcode.name)
            if binary and count == 3:
                return True
    except Exception:  # a byte that is not an opcode
        return False
    return binary or bool(names & _IMPORT_OPCODES)


def _metadata(data: Bytes) -> Iterator[tuple[str, str]]:
    """Yield the (key, value) pairs of the metadata in a safetensors header."""
    size = int.from_bytes(data[:8], 'little')
    if bytes(data[8:9]) != b'{' or not 0 < size <= len(data) - 8:
        return

    try:
        header = json.loads(bytes(data[8 : 8 + size]))
    except ValueError:
        return

    for key, value in (header.get('__metadata__') or {}).items():
        yield str(key), str(value)


def _from_base64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b''


def scan_for_push(folder: Path, token: str) -> list[str]:
    """Search a folder for secrets and pickles before it is pushed to a hub. Return one line for each finding.

    If the list is empty, the folder may be pushed. The scan searches for `token`, for the values of environment
    variables with secret-like names, for private keys, and for tokens of well-known services.
    """
    return scan_tree(folder, find_secrets(os.environ, {'the token of this push': token}))

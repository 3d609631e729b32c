"""Reads the header of a GGUF file: its metadata, and the type and shape of each tensor. Nothing heavy is imported.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from utils.base.errors import ConfigError

_VERSIONS = (2, 3)
# The type code of a value -> its format for struct. Code 8 is a text and code 9 is a list.
_NUMBERS = {
    0: '<B', 1: '<b', 2: '<H', 3: '<h', 4: '<I', 5: '<i', 6: '<f', 7: '<?', 10: '<Q', 11: '<q', 12: '<d',
}  # fmt: skip
_TEXT = 8
_LIST = 9
# The names of the types of tensors, by type code.
TENSOR_TYPES = {
    0: 'F32', 1: 'F16', 2: 'Q4_0', 3: 'Q4_1', 6: 'Q5_0', 7: 'Q5_1', 8: 'Q8_0', 9: 'Q8_1', 10: 'Q2_K', 11: 'Q3_K',
    12: 'Q4_K', 13: 'Q5_K', 14: 'Q6_K', 15: 'Q8_K', 16: 'IQ2_XXS', 17: 'IQ2_XS', 18: 'IQ3_XXS', 19: 'IQ1_S',
    20: 'IQ4_NL', 21: 'IQ3_S', 22: 'IQ2_S', 23: 'IQ4_XS', 24: 'I8', 25: 'I16', 26: 'I32', 27: 'I64', 28: 'F64',
    29: 'IQ1_M', 30: 'BF16', 34: 'TQ1_0', 35: 'TQ2_0', 39: 'MXFP4', 40: 'NVFP4', 41: 'Q1_0',
}  # fmt: skip
_REMEDY = 'Download or copy the file again, or use another file of this model.'


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """The metadata of a GGUF file, and a dictionary from the name of each tensor to (name of its type, its shape).

    The last dimension of a shape is the one whose elements are next to each other in memory, as in torch.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def architecture(self) -> str:
        """Return the name of the architecture, for example 'llama'. Returns '' if the file does not name it."""
        return str(self.metadata.get('general.architecture', ''))

    @property
    def chat_template(self) -> str | None:
        """Return the chat template in the file. Returns None if the file has none."""
        found = self.metadata.get('tokenizer.chat_template')
        return None if found is None else str(found)

    def setting(self, name: str) -> Any:
        """Return a setting of the architecture, e.g. rope.freq_base. Returns None if the file lacks the setting."""
        return self.metadata.get(f'{self.architecture}.{name}')

    def parameters(self) -> int:
        """Return the number of elements of all tensors."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())


def read_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file.

    Raises ConfigError if the file cannot be read, is damaged, or has an unknown version or type.
    """
    try:
        with path.open('rb') as stream:
            return _Reader(stream, path.stat().st_size).header()
    except OSError as error:
        raise ConfigError(f'{path} cannot be read: {error.strerror}. Correct the path or the permissions.') from None
    except (ValueError, struct.error, KeyError, RecursionError) as error:  # ValueError: also a text that is not UTF-8
        why = f'unknown type code {error}' if isinstance(error, KeyError) else error
        raise ConfigError(f'{path} cannot be read as a GGUF file: {why}. {_REMEDY}') from None


class _Reader:
    """Reads the header from the start of a file. Raises ValueError, struct.error or KeyError if it is damaged."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream = stream
        self.size = size

    def header(self) -> GgufHeader:
        if self.stream.read(4) != b'GGUF':
            raise ValueError('it does not begin with the letters GGUF')
        version = self.number('<I')
        if version not in _VERSIONS:
            raise ValueError(f'its version is {version}, and only versions 2 and 3 are known')

        tensor_count = self.number('<Q')
        value_count = self.number('<Q')
        metadata = dict(self.entry() for _ in range(value_count))
        tensors = dict(self.tensor() for _ in range(tensor_count))
        return GgufHeader(metadata=metadata, tensors=tensors)

    def bytes(self, count: int) -> bytes:
        """Return the next bytes. A count that is larger than the file is refused, so that no memory is wasted."""
        if count > self.size:
            raise ValueError('it is damaged or cut off')
        found = self.stream.read(count)
        if len(found) < count:
            raise ValueError('it is cut off')
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.bytes(self.number('<Q')).decode('utf-8')

    def entry(self) -> tuple[str, Any]:
        return self.text(), self.value(self.number('<I'))

    def value(self, code: int) -> Any:
        if code == _TEXT:
            return self.text()
        if code != _LIST:
            return self.number(_NUMBERS[code])

        kind = self.number('<I')
        count = self.number('<Q')
        if kind in (_TEXT, _LIST):
            return [self.value(kind) for _ in range(count)]
        form = _NUMBERS[kind]
        return list(struct.unpack(f'<{count}{form[1]}', self.bytes(count * struct.calcsize(form))))

    def tensor(self) -> tuple[str, tuple[str, tuple[int, ...]]]:
        name = self.text()
        shape = tuple(self.number('<Q') for _ in range(self.number('<I')))
        kind = TENSOR_TYPES[self.number('<I')]
        self.number('<Q')  # the position of the data
        return name, (kind, shape[::-1])

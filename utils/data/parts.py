"""The rows of a data set, which are read in two passes: the first decides the use of each row, the second returns it.

The use of a row is TRAIN, VAL (validation) or UNUSED. Memory holds the use of each row, but not the rows themselves. So
rows can be drawn from the whole data set even if the data is larger than memory.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.names import LossScope
from utils.data.converted_rows import ReadRow, open_replies, row_notes
from utils.data.tally import Tally
from utils.formats.conversation import BadRow
from utils.formats.data_file import Signature
from utils.formats.images import state_of_images
from utils.formats.reading import Reading

# The values for the use of a row.
UNUSED, TRAIN, VAL = range(3)
# Follows the name of a data set in the name of its validation part.
VALIDATION = ' (validation)'
_DATASET_PY = 'utils/dataset.py'


@dataclass(kw_only=True)
class Part:
    """The training rows, the validation rows, or all rows of a data set. They can be read several times.

    `uses` has one byte for each row that can be trained on: TRAIN, VAL or UNUSED. It is empty until `count` is called.
    """

    name: str
    # Reads the rows from the start, and updates the given hash object with the content that it reads.
    read: Callable[[Any], Iterator[ReadRow]]
    is_val: bool = False
    # The hub, id and revision of the download, and its commit if the hub names it. Empty if the data is not from a hub.
    served: str = ''
    commit: str = ''
    # The files of the download, as <hub>:<id>@<revision>/<file>. Empty for other parts.
    hub_files: Sequence[str] = ()
    uses: bytearray = field(default_factory=bytearray)
    # The files of the part on this machine, each with its signature when the part was opened. A registered data set has
    # none.
    files: Sequence[tuple[Path, Signature]] = ()
    # Whether a row that can be trained on has images. Set by `count`.
    has_images: bool = False
    # The positions of the rows that cannot be trained on, among all rows that were read.
    unusable: array[int] = field(default_factory=lambda: array('Q'))
    # Remarks on how the files are read, as keys. They are added while the files are read.
    remarks: dict[str, None] = field(default_factory=dict)
    # Hash of the content that the first pass read.
    content: str = ''
    # The number of replies before the last reply whose message has no key `loss`, and the number of rows with such a
    # reply. The keys say which replies carry loss if --loss_scope is not typed.
    earlier_replies: Counter[LossScope] = field(default_factory=Counter)
    rows_with_earlier: Counter[LossScope] = field(default_factory=Counter)
    # The name in metrics, for a set of --val_dataset. Empty for all other parts.
    val_set: str = ''
    # How often an epoch trains each training row. A row that has 1 in `once_more` is trained once more than this.
    passes: int = 1
    once_more: bytearray = field(default_factory=bytearray)

    # The number of rows of plain text.
    text_rows: int = 0
    # The names of the columns in the files: those of first rows, and those that --columns renames. Empty for a
    # registered data set, whose columns are not renamed.
    columns: dict[str, None] = field(default_factory=dict)

    def source(self) -> dict[str, str]:
        """Return {'served': repository on the hub, 'commit': its commit} for lock.json. Unknown values are left out."""
        found = {'served': self.served, 'commit': self.commit}
        return {name: value for name, value in found.items() if value}

    def count(self, left_out: Tally, noted: Tally, digest: Any) -> None:
        """Read all rows once, and set the use of each row that can be trained on.

        The use is VAL in a validation part, and TRAIN in any other part. Counts skipped rows in `left_out` and notes in
        `noted`. Updates the hash object `digest` with the content of the rows.
        """
        use = VAL if self.is_val else TRAIN
        content = hashlib.sha256()
        for position, (location, _, row) in enumerate(self.read(content)):
            if isinstance(row, BadRow):
                left_out.add(str(row), location)
                self.unusable.append(position)
                continue

            self.uses.append(use)
            for note in row_notes(row):
                noted.add(note, location)

            if earlier := open_replies(row):
                self.earlier_replies[row.loss_scope] += earlier
                self.rows_with_earlier[row.loss_scope] += 1
            images = state_of_images(row)
            self.has_images |= bool(images)
            self.text_rows += row.is_text
            content.update(images)

        self.content = content.hexdigest()
        digest.update(content.digest())

    def times(self, position: int) -> int:
        """Return how many times one epoch trains a row.

        `position` is the index of the row in `self.uses`. The value at this index must be TRAIN.
        """
        return self.passes + (self.once_more[position] if self.once_more else 0)

    def trained_rows(self) -> int:
        """Return the number of rows that an epoch trains. A row that is trained twice counts twice.

        Rows that are skipped later, when they are encoded, count too.
        """
        return self.passes * self.uses.count(TRAIN) + self.once_more.count(1)

    def uses_digest(self) -> bytes:
        """Return bytes, for a hash, that say how each row is used and how many times an epoch trains it."""
        repeats = b'' if self.passes == 1 and not any(self.once_more) else f'x{self.passes}'.encode() + self.once_more
        return bytes(self.uses) + repeats

    def used(self) -> Iterator[tuple[int, ReadRow]]:
        """Read the rows again, and yield (use, row) for each row. The use is TRAIN, VAL or UNUSED.

        A row is the tuple (location, columns, conversation). If it cannot be trained on, its use is UNUSED, and its
        third item is a BadRow. Raises ConfigError if the number of all other rows has changed since `count` read them.
        """
        position = 0
        for read in self.read(hashlib.sha256()):
            _, _, row = read
            if isinstance(row, BadRow):
                yield UNUSED, read
            elif position < len(self.uses):
                yield self.uses[position], read
                position += 1
            else:
                position = -1
                break

        if position != len(self.uses):
            raise ConfigError(
                f"data set '{self.name}': the second read returned different rows. Make its function in "
                f'{_DATASET_PY} deterministic: the same rows in the same order.'
            )


def draw_uses(parts: Sequence[Part], old: int, count: int, seed: int, *, drawn: int, rest: int) -> None:
    """Draw up to `count` rows at random, and change their use. The use of a row is TRAIN, VAL or UNUSED.

    Rows are drawn from all rows with the use `old`. A drawn row gets the use `drawn`. A row with the use `old` that is
    not drawn gets the use `rest`. For example, old=TRAIN, drawn=VAL, rest=TRAIN turns up to `count` training rows into
    validation rows.
    """
    total = sum(part.uses.count(old) for part in parts)
    chosen = bytearray(total)
    for index in random.Random(seed).sample(range(total), min(count, total)):
        chosen[index] = 1

    index = 0
    for part in parts:
        position = part.uses.find(old)
        while position >= 0:
            part.uses[position] = drawn if chosen[index] else rest
            index += 1
            position = part.uses.find(old, position + 1)


def check_read_once(parts: Iterable[Part]) -> None:
    """Raise ConfigError if two parts read the same file of a hub. Parts of registered data sets are not compared."""
    # `check_sources` compares local files.
    readers: dict[str, str] = {}
    for part in parts:
        for file in part.hub_files:
            if file in readers:
                flag = 'val_dataset' if part.val_set else 'dataset'
                raise ConfigError(
                    f"--{flag}: '{readers[file]}' and '{part.name}' both read {file}, so its rows would be used "
                    'twice. Remove one of the two, or name other subsets or splits.'
                )
            readers[file] = part.name


def check_columns(parts: Iterable[Part], reading: Reading) -> None:
    """Raise ConfigError if --columns names a column that was in none of the rows read so far.

    The rows of registered data sets do not count, because --columns does not rename their columns. Does nothing if no
    other rows were read, or if `reading.complete` is False.
    """
    from_files = [part for part in parts if part.files]
    if not from_files:
        return
    seen = dict.fromkeys(itertools.chain.from_iterable(part.columns for part in from_files))
    if not seen:
        return  # no row could be read, and each problem is reported
    if missing := reading.missing(seen, ', '.join(part.name for part in from_files)):
        raise ConfigError(*missing)


def remarks_of(sources: Iterable[Sequence[Part]]) -> list[str]:
    """Return all remarks on how the files were read so far, e.g. that a column is read by another name.

    `sources` has one list for each data set: the parts of the data set.
    """
    return [remark for part in itertools.chain.from_iterable(sources) for remark in part.remarks]

"""Encodes rows to token ids, in batches, and stores the ids in flat files.

Every row that is skipped or altered is counted by reason, and the locations of the first such rows are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from utils.base import dist
from utils.base.cache import cached_folder
from utils.base.errors import ConfigError
from utils.data.encoded_rows import EncodedRows, length_statistics
from utils.data.encoding_report import EncodingReport, log_report
from utils.data.parts import TRAIN, UNUSED, VAL
from utils.data.plan import Plan, served_by
from utils.data.tally import Tally
from utils.encode.account import LEFT_OUT, NOT_DRAWN, Account
from utils.encode.encoded import DROPPED, NOTHING_TRAINED, SPLIT, Encoded, RowRefused, trains_nothing
from utils.encode.encoder import Encoder
from utils.encode.show import show_samples
from utils.formats.columns import check_row, find_converter
from utils.formats.conversation import BadRow, Row

if TYPE_CHECKING:
    from utils.data.stream import TrainingStream

BATCH_ROWS = 1024
# Number of batches that are encoded at the same time. The tokenizer releases Python's lock, so the template can render
# the next batch in the meantime.
_THREADS = 2
_REPORT = 'report.json'
# The source files that decide which ids a row gets, as globs relative to utils/.
_DECIDES_IDS = ('preprocess.py', 'formats/*.py', 'encode/*.py', 'data/*.py', 'loading/image_processors.py')
# (use, row) for each row of a batch.
_Batch = list[tuple[int, Row]]
T = TypeVar('T')


class EncodedAgain:
    """Encodes a row again with some of its data changed.

    The account needs this if the text alone does not show how the data is used.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @property
    def printed(self) -> str:
        """Return the text that the template adds to the texts of a row."""
        return self.encoder.text.printed + (self.encoder.system or '')

    def convert(self, written: Mapping[str, Any]) -> Row:
        """Convert these columns to a row, and return the row. Raises BadRow if the columns cannot be converted."""
        converter = find_converter(written)
        if converter is None:
            raise BadRow('unknown columns')
        return check_row(converter(written))

    def encode(self, row: Row, written: Mapping[str, Any]) -> Encoded | None:
        """Encode the row with these columns instead of its own columns.

        Returns None if the row with these columns cannot be trained on.
        """
        try:
            other = dataclasses.replace(self.convert(written), origin=row.origin, folder=row.folder)
            return self.encoder.encode([other])[0]
        except (BadRow, RowRefused, ConfigError):
            return None


def encode_batch(
    encoder: Encoder,
    rows: Sequence[Row],
    report: EncodingReport,
    result: Callable[[], list[Encoded]] | None = None,
) -> Iterator[tuple[Row, Encoded]]:
    """Yield (row, encoded row) for each row that can be trained on.

    Skipped rows and rows with notes are added to the report. If a different thread already encodes these rows, `result`
    waits for the encoded rows and returns them, or raises the error of that thread.
    """
    try:
        encoded = result() if result else encoder.encode(rows)
    except RowRefused as error:
        if len(rows) == 1:
            detail = f' [{error.detail}]' if error.detail else ''
            report.left_out.add(error.reason, rows[0].origin + detail)
            report.account.skip(rows[0].written, LEFT_OUT)
            return

        # The error does not say which row of the batch was refused: halve the batch until that row is alone.
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            yield from encode_batch(encoder, half, report)
        return

    for row, ids in zip(rows, encoded, strict=True):
        if trains_nothing([*ids.earlier, ids.trained]):
            report.left_out.add(NOTHING_TRAINED, row.origin)
            report.account.skip(row.written, LEFT_OUT)
            continue
        _check_embedded(encoder, row, ids)
        if 0 < encoder.max_length < len(ids.input_ids) and not _keeps_long(encoder, ids, row, report):
            report.account.skip(row.written, LEFT_OUT)
            continue
        for note in ids.notes:
            report.noted.add(note, row.origin)
        yield row, ids


def _keeps_long(encoder: Encoder, ids: Encoded, row: Row, report: EncodingReport) -> bool:
    """Return whether a row is used although it is longer than the limit. Else it is added to the report.

    The caller splits a row that is used. A row that is cut is not longer than the limit.
    """
    if encoder.overlong == 'split' and ids.is_text:
        ids.notes.append(SPLIT)
        return True
    if encoder.overlong == 'drop':
        report.left_out.add(DROPPED, row.origin)
    else:
        report.refused.add(row.origin, len(ids.input_ids))
    return False


def _check_embedded(encoder: Encoder, row: Row, ids: Encoded) -> None:
    """Raise ConfigError if a row contains an id that is not in the model's embedding."""
    if encoder.embedding is None:
        return

    largest = max(ids.input_ids)
    if largest >= encoder.embedding:
        raise ConfigError(
            f'{row.origin}: the token {encoder.tokenizer.decode([largest])!r} has the id {largest}, and the model '
            f'embeds only {encoder.embedding} ids. Remove the text of this token from the row, or take model and '
            'tokenizer from the same repository or folder.'
        )


def encode_rows(encoder: Encoder, rows: Sequence[Row], report: EncodingReport) -> tuple[EncodedRows, list[Row]]:
    """Return the encoded rows, and the list of the rows that were encoded.

    Skipped rows and rows with notes are added to the report. Raises ConfigError if a row is too long and refused.
    """
    encoded = EncodedRows()
    kept_rows = []
    again = EncodedAgain(encoder)
    for start in range(0, len(rows), BATCH_ROWS):
        for row, ids in encode_batch(encoder, rows[start : start + BATCH_ROWS], report):
            for piece in encoder.pieces_of(ids, encoder.max_length):
                encoded.append(piece, row.origin)
            report.account.add(row, ids, again)
            kept_rows.append(row)

    report.refused.raise_if_any(encoder.overlong, encoder.max_length)
    return encoded, kept_rows


def batches(rows: Iterable[T], size: int = BATCH_ROWS) -> Iterator[list[T]]:
    """Yield the items in lists of `size` items. The last list may be shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _encode_ahead(encoder: Encoder, batches: Iterable[_Batch]) -> Iterator[tuple[_Batch, Callable[[], list[Encoded]]]]:
    """Yield each batch with a function that waits for the encoded rows and returns them.

    Meanwhile, threads encode the next batches.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        submitted: deque[tuple[_Batch, Callable[[], list[Encoded]]]] = deque()
        for batch in batches:
            future = pool.submit(encoder.encode, [row for _, row in batch])
            submitted.append((batch, future.result))
            if len(submitted) > _THREADS:
                yield submitted.popleft()

        yield from submitted


def _used_rows(plan: Plan, account: Account) -> Iterator[tuple[int, Row]]:
    """Yield (use, row) for each training or validation row. All other rows are marked as skipped in the account."""
    for use, (_, raw, row) in plan.used():
        if isinstance(row, BadRow):
            account.skip(raw, LEFT_OUT)
        elif use == UNUSED:
            account.skip(raw, NOT_DRAWN)
        else:
            yield use, row


def encode_to_files(encoder: Encoder, plan: Plan, folder: Path) -> None:
    """Encode the rows of a plan in batches, and write the encoded rows and the report to a folder.

    Raises ConfigError if no training row is left.
    """
    report = EncodingReport()
    again = EncodedAgain(encoder)
    files = {TRAIN: ('train', EncodedRows()), VAL: ('val', EncodedRows())}
    for batch, result in _encode_ahead(encoder, batches(_used_rows(plan, report.account))):
        uses = {id(row): use for use, row in batch}
        for row, ids in encode_batch(encoder, [row for _, row in batch], report, result):
            for piece in encoder.pieces_of(ids, encoder.max_length):
                files[uses[id(row)]][1].append(piece, row.origin)
            report.account.add(row, ids, again)
        for name, rows in files.values():
            rows.spill(folder, name)

    report.refused.raise_if_any(encoder.overlong, encoder.max_length)
    if not (folder / 'train.ids').stat().st_size:
        raise ConfigError(
            f'--dataset: every training row was skipped: {"; ".join(report.lines())}. Correct the rows, or name other '
            'data with --dataset.'
        )
    (folder / _REPORT).write_text(json.dumps(dataclasses.asdict(report)), encoding='utf-8')


def _key(encoder: Encoder, plan: Plan) -> str:
    """Return a hash of everything that decides the ids.

    The hash covers the rows and their uses, the tokenizer, the template, the flags, the code and the library versions.
    """
    digest = hashlib.sha256(plan.digest.encode())
    digest.update(json.dumps(encoder.identity(), sort_keys=True).encode())

    with tempfile.TemporaryDirectory() as name:
        encoder.tokenizer.save_pretrained(name)
        if encoder.images is not None:
            encoder.images.save(Path(name))
        files = sorted(Path(name).rglob('*'))
        utils = Path(__file__).parents[1]
        code = [file for part in _DECIDES_IDS for file in sorted(utils.glob(part))]
        for file in (f for f in [*files, *code] if f.is_file()):
            digest.update(f'{file.name}:{file.stat().st_size}\n'.encode())
            digest.update(file.read_bytes())

    for library in ('transformers', 'tokenizers', 'jinja2'):
        digest.update(f'{library} {version(library)}\n'.encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The training and validation rows of a run, and the facts about them for run.json."""

    train: EncodedRows | TrainingStream
    val: EncodedRows
    summary: dict[str, Any]
    # (number of rows rendered with the template's thinking switch, number of all rows). For a stream, only its first
    # rows are counted.
    switched: tuple[int, int] = (0, 0)
    # Returns the facts that are known only after training: the counts of a stream.
    at_end: Callable[[], dict[str, Any]] = dict

    def final(self) -> dict[str, Any]:
        """Return all facts about the rows for run.json, after training. Every process must call this method."""
        return {**self.summary, **self.at_end()}

    def spread(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` training rows at equal distances. For a stream, return its first `count` rows."""
        if not isinstance(self.train, EncodedRows):
            return self.train.first(count)
        count = min(count, len(self.train))
        return [self.train[i * len(self.train) // count] for i in range(count)]


def encode_plan(encoder: Encoder, plan: Plan) -> tuple[EncodedRows, EncodedRows, EncodingReport]:
    """Return the encoded training rows, the encoded validation rows, and the encoding report.

    If the cache has the encoded rows, they are read from the cache.
    """
    name = f'data-{_key(encoder, plan)[:40]}'
    with dist.local_main_first():
        folder = cached_folder(name, lambda unfinished: encode_to_files(encoder, plan, unfinished))
    train = EncodedRows.map(folder, 'train')
    val = EncodedRows.map(folder, 'val')

    stored = json.loads((folder / _REPORT).read_text(encoding='utf-8'))
    report = EncodingReport(
        left_out=Tally(**stored['left_out']),
        noted=Tally(**stored['noted']),
        account=Account(**stored['account']),
    )
    report.left_out.merge(plan.left_out)
    return train, val, report


def prepare_data(encoder: Encoder, plan: Plan, run_dir: Path, *, samples: int = 1) -> PreparedData:
    """Return the encoded rows of a run.

    Logs how many rows were skipped or noted and why, and shows the first `samples` training rows (sample.txt).
    """
    train, val, report = encode_plan(encoder, plan)
    statistics = {'train': length_statistics(train), 'validation': length_statistics(val)}
    log_report(report, statistics)
    show_samples(encoder.tokenizer, [train[index] for index in range(min(samples, len(train)))], run_dir)

    summary = {**statistics, **report.counts(), 'served': served_by(plan.parts)}
    switched = (report.switched, len(train) + len(val))
    return PreparedData(train=train, val=val, summary=summary, switched=switched)

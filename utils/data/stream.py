"""Streaming for data larger than memory or disk: rows are read and encoded while the model trains."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import IterableDataset

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.data.converted_rows import row_notes
from utils.data.encode_plan import (
    EncodedAgain,
    PreparedData,
    encode_batch,
    encode_rows,
    encode_used,
    names_of_sets,
    rows_of_sets,
)
from utils.data.encoded_rows import EncodedRows, length_statistics
from utils.data.encoding_report import EncodingReport, log_report
from utils.data.mixture import take_turns
from utils.data.parts import remarks_of
from utils.data.plan import served_by
from utils.data.stream_parts import Streams, first_rows
from utils.data.tally import Tally
from utils.encode.account import LEFT_OUT, Account
from utils.encode.encoded import Encoded
from utils.encode.encoder import Encoder
from utils.encode.show import show_samples
from utils.formats.conversation import BadRow, Row

# Number of rows in the shuffle buffer.
SHUFFLE_ROWS = 10_000
# Number of rows that are encoded together.
_BATCH_ROWS = 64
# Number of first rows that are read before training, to estimate lengths.
_FIRST_ROWS = 256
# Number of yielded rows that are kept in memory, so that an error can name the row.
_REMEMBERED_ROWS = 16_384


T = TypeVar('T')


class LoggedTally(Tally):
    """A tally that also logs the 1st, 10th, 100th ... row of each reason, while the stream runs."""

    def add(self, reason: str, place: str) -> None:
        """Count one row under `reason`. Log the row if it is the 1st, 10th, 100th and so on with this reason."""
        super().add(reason, place)
        count = self.counts[self.known(reason)]
        if count == 10 ** (len(str(count)) - 1):
            logger.warning(f'{count} rows so far: {reason} ({place})')


def shuffled(rows: Iterable[T], size: int, rng: random.Random) -> Iterator[T]:
    """Yield every row once, in random order. Each row is drawn from a buffer of `size` rows."""
    held: list[T] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        index = rng.randrange(size)
        yield held[index]
        held[index] = row
    rng.shuffle(held)
    yield from held


class TrainingStream(IterableDataset[dict[str, Any]]):
    """Yields the training rows in endless passes, each in a different order.

    Each process yields different rows. If --dataset gives shares (name%0.3), the rows are taken from the data sets in
    these proportions, and each data set has its own passes. For the same data, the order depends only on seed, rank and
    world size. So a resumed run skips exactly the rows that were trained.
    """

    def __init__(self, encoder: Encoder, sources: Streams, *, val_rows: int, seed: int) -> None:
        # (training part, number of its first rows that are held out). The number is 0 if there is a validation part.
        self.parts = [(parts[0], val_rows if len(parts) == 1 else 0) for parts in sources.sources]
        # The remarks that are logged already. A file gets others when its end is read.
        self._remarks = set(remarks_of(sources.sources))
        self.shares = sources.shares
        self.encoder = encoder
        self.seed = seed
        # Counts of the skipped rows, of the notes, and of the characters of the skipped rows. Every process reads all
        # rows, so these three counts are the same in each process.
        self.unread = LoggedTally()
        self.row_noted = LoggedTally()
        self.unread_text = Account()
        # The report of the rows that this process encodes.
        self.report = EncodingReport(left_out=LoggedTally(), noted=Tally())
        # The number of training rows that were read for the first time. Every process reads the rows of all processes.
        self.rows_read = 0
        # The report of the held-out rows. Every process encodes all held-out rows.
        self.held_out = EncodingReport()
        # The last rows and their origins, by index, so that a row with a bad loss can be named.
        self._recent: dict[int, tuple[dict[str, Any], str]] = {}
        self._yielded = 0

    def _read(self, number: int, *, counts: bool) -> Iterator[Row]:
        """Yield the training rows of one data set in one pass. `number` is the index of the data set.

        If `counts` is True, skipped rows and notes are counted.
        """
        part, held_out = self.parts[number]
        for location, raw, row in part.read(hashlib.sha256()):
            if isinstance(row, BadRow):
                if counts:
                    self.unread.add(str(row), location)
                    self.unread_text.skip(raw, LEFT_OUT)
                continue

            for note in row_notes(row) if counts else ():
                self.row_noted.add(note, location)
            if held_out:
                held_out -= 1
            else:
                yield row

    def _in_turn(self, *, counts: bool) -> Iterator[Row]:
        """Yield the rows of one pass over all data sets, one row from each data set in turn."""
        readers = [self._read(number, counts=counts) for number in range(len(self.parts))]
        while readers:
            for reader in list(readers):
                row = next(reader, None)
                if row is None:
                    readers.remove(reader)
                else:
                    self.rows_read += counts
                    yield row

    def _passes(self, number: int, *, counts: bool) -> Iterator[tuple[Row, bool]]:
        """Yield the rows of one data set in endless passes, each as (row, whether it is read for the first time).

        `number` is the index of the data set. Raises ConfigError if the data set has no training row.
        """
        name = self.parts[number][0].name
        for done in itertools.count():
            rows = 0
            for row in self._read(number, counts=counts and done == 0):
                rows += 1
                yield row, done == 0

            if not rows:
                raise ConfigError(
                    f'--dataset {name}: this data set has no row left for training. All its rows are skipped or held '
                    f'out for validation. Lower --stream_val_rows, or remove {name} from --dataset.'
                )
            if counts and done == 0:
                logger.info(f'{name}: all {rows} training rows are read. They are now read again.')

    def _mixed(self, *, counts: bool) -> Iterator[tuple[Row, bool]]:
        """Yield rows without end, each as (row, whether it is read for the first time).

        The rows are taken from the data sets in proportion to their shares.
        """
        readers = [self._passes(number, counts=counts) for number in range(len(self.parts))]
        for number in take_turns(self.shares):
            row, is_new = next(readers[number])
            self.rows_read += counts and is_new
            yield row, is_new

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the encoded rows of this process. Skipped rows and notes are counted only in the first pass.

        Raises ConfigError if the data has no training row. If --dataset gives shares, raises ConfigError if one of the
        data sets has no training row.
        """
        if self.shares:
            yield from self._of_process(shuffled(self._mixed(counts=True), SHUFFLE_ROWS, self._order(0)), 0)
            return

        index = 0
        for number in itertools.count():
            rows = shuffled(self._in_turn(counts=number == 0), SHUFFLE_ROWS, self._order(number))
            first = index
            index = yield from self._of_process(zip(rows, itertools.repeat(number == 0)), first)
            if index == first:
                raise ConfigError(
                    '--streaming true: no training row is left. All rows are skipped or held out for validation. Lower '
                    '--stream_val_rows, or name more data with --dataset.'
                )
            if number == 0:
                logger.info(f'the first pass over the stream is done: {index} rows')
                for remark in remarks_of([[part for part, _ in self.parts]]):
                    if remark not in self._remarks:
                        logger.info(remark)

    def _order(self, number: int) -> random.Random:
        """Return the random generator that shuffles the rows of one pass. The first pass has the number 0."""
        return random.Random(f'{self.seed}/{number}')

    def _of_process(self, rows: Iterable[tuple[Row, bool]], index: int) -> Generator[dict[str, Any], None, int]:
        """Yield the encoded rows of this process. `rows` has the rows of all processes.

        An item of `rows` is (row, whether it is read for the first time), and `index` is the index of the first item.
        Returns the index that follows the last item.
        """
        mine: list[tuple[Row, bool]] = []
        for row in rows:
            if index % dist.world_size() == dist.rank():
                mine.append(row)
            index += 1
            if len(mine) == _BATCH_ROWS:
                yield from self._encoded(mine)
                mine = []
        yield from self._encoded(mine)
        return index

    def _encoded(self, rows: Sequence[tuple[Row, bool]]) -> Iterator[dict[str, Any]]:
        """Encode rows, and yield each encoded row as a dict.

        The key 'row' has the number of rows that this process yielded before. An item of `rows` is (row, whether it is
        read for the first time). Skipped rows and notes are counted in the report only when a row is read for the first
        time. The rows that were yielded last are kept in memory, so that the methods `self.row` and `self.origin` can
        find them.
        """
        again = EncodedAgain(self.encoder)
        found: dict[int, Encoded] = {}
        for is_new, report in ((True, self.report), (False, EncodingReport())):
            of_report = [row for row, row_is_new in rows if row_is_new is is_new]
            for row, ids in encode_batch(self.encoder, of_report, report) if of_report else ():
                found[id(row)] = ids
                if is_new:
                    report.account.add(row, ids, again)
            report.refused.raise_if_any(self.encoder.overlong, self.encoder.max_length)

        for row, _ in rows:
            if id(row) not in found:
                continue
            for piece in self.encoder.pieces_of(found[id(row)], self.encoder.max_length):
                item = {**piece.as_item(), 'row': self._yielded}
                self._recent[self._yielded] = (item, row.origin)
                self._recent.pop(self._yielded - _REMEMBERED_ROWS, None)
                self._yielded += 1
                yield item

    def origin(self, index: int) -> str:
        """Return where a row came from. For a row that is not in memory, returns 'an earlier row of the stream'."""
        if index not in self._recent:
            return 'an earlier row of the stream'
        return self._recent[index][1]

    def row(self, index: int) -> dict[str, Any]:
        """Return one row as a dict. It must be one of the rows yielded last: only these are kept in memory."""
        return self._recent[index][0]

    def first(self, count: int, report: EncodingReport | None = None) -> list[dict[str, Any]]:
        """Read the first `count` training rows, and return them encoded and not shuffled.

        A row that is skipped when it is encoded is missing in the result. It is counted in `report` if there is one. A
        row that cannot be read is not one of the `count` rows, and is not counted. With --overlong split, one row can
        give several items. Raises ConfigError if a row is longer than --max_length and --overlong neither cuts, drops
        nor splits it.
        """
        rows = (row for row, _ in self._mixed(counts=False)) if self.shares else self._in_turn(counts=False)
        report = report or EncodingReport()
        limit = self.encoder.max_length
        encoded = [row for _, row in encode_batch(self.encoder, list(itertools.islice(rows, count)), report)]
        report.refused.raise_if_any(self.encoder.overlong, limit)
        return [piece.as_item() for row in encoded for piece in self.encoder.pieces_of(row, limit)]

    def lengths(self) -> list[int]:
        """Return some row lengths in tokens. They are an estimate, because most rows of a stream are not read yet.

        If --max_length is set, the list is [--max_length]. If --max_length is -1 (no limit), the list has the lengths
        of the first rows. So the list does not have the length of the stream.
        """
        limit = self.encoder.max_length
        if limit > 0:
            return [limit]
        return [len(item['input_ids']) for item in self.first(_FIRST_ROWS)]

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return a list with one batch: the `count` longest of the first rows. Later rows are not read yet."""
        return [heapq.nlargest(count, self.first(_FIRST_ROWS), key=lambda item: len(item['input_ids']))]

    def summary(self) -> dict[str, Any]:
        """Log the counts of rows and characters, and return them for run.json.

        The counts include the rows of all processes. Every process must call this method exactly once.
        """
        for other in dist.from_all(self.report)[1:]:
            self.report.left_out.merge(other.left_out)
            self.report.noted.merge(other.noted)
            self.report.account.merge(other.account)

        self.report.left_out.merge(self.unread)
        self.report.noted.merge(self.row_noted)
        self.report.account.merge(self.unread_text)

        self.report.left_out.merge(self.held_out.left_out)
        self.report.noted.merge(self.held_out.noted)
        self.report.account.merge(self.held_out.account)

        log_report(self.report, {})
        return {'train': {'rows_read': self.rows_read}, **self.report.counts()}


def _held_out(sources: Streams, count: int, report: EncodingReport) -> list[Row]:
    """Return the validation rows of a stream: the first `count` rows of the validation split of each data set.

    If a data set has no validation split, its first `count` rows are returned. Rows that cannot be trained on are
    skipped. Skipped rows and notes are counted in `report` only for validation splits.
    """
    for parts in sources.sources:
        if len(parts) == 1:
            continue  # training reads this part from the beginning, and counts skipped rows and notes then
        rows = 0
        for location, raw, row in parts[-1].read(hashlib.sha256()):
            if rows == count:
                break
            if isinstance(row, BadRow):
                report.left_out.add(str(row), location)
                report.account.skip(raw, LEFT_OUT)
                continue

            rows += 1
            for note in row_notes(row):
                report.noted.add(note, location)

    return first_rows(sources.sources, count)


def _validation(
    encoder: Encoder, sources: Streams, val_rows: int, report: EncodingReport
) -> tuple[EncodedRows, dict[str, Any]]:
    """Return the encoded validation rows, and a dict for run.json.

    The dict has the number of rows of each data set of --val_dataset. It is empty if there is no --val_dataset.
    """
    if sources.val is None:
        val, _ = encode_rows(encoder, _held_out(sources, val_rows, report), report)
        return val, {}

    val = EncodedRows()
    for batch in encode_used(encoder, sources.val, report):
        for one, ids in batch:
            val.append(ids, one.row.origin, part=one.part)
    report.left_out.merge(sources.val.left_out)
    report.noted.merge(sources.val.noted)
    return val, rows_of_sets(sources.val, val)


def prepare_stream(
    encoder: Encoder, sources: Streams, run_dir: Path, *, val_rows: int, seed: int, samples: int
) -> PreparedData:
    """Return the training stream and the encoded validation rows.

    Logs the first `samples` training rows, and writes them to sample.txt.

    With --val_dataset, `sources.val` has the validation rows. Otherwise, each data set gives up to `val_rows`
    validation rows: the first rows of its validation split. If a data set has no validation split, its first rows are
    the validation rows, and are not trained on.

    Raises ConfigError if the rows that are read before training contain no row to train on.
    """
    report = EncodingReport()
    val, sets = _validation(encoder, sources, val_rows, report)
    statistics = {'validation': length_statistics(val)}
    log_report(report, statistics)
    val_parts = sources.val.parts if sources.val else []
    served = {'served': served_by([*(parts[0] for parts in sources.sources), *val_parts])}

    stream = TrainingStream(encoder, sources, val_rows=0 if sources.val else val_rows, seed=seed)
    stream.held_out = report
    report_of_first = EncodingReport()
    first = stream.first(_FIRST_ROWS, report_of_first)
    if not first:
        raise ConfigError(
            '--streaming true: no training row is left. All rows read so far are skipped or held out for validation. '
            'Lower --stream_val_rows, correct the first rows, or name other data with --dataset.'
        )

    show_samples(encoder.tokenizer, first[:samples], run_dir)
    return PreparedData(
        train=stream,
        val=val,
        summary={**statistics, **sets, **served},
        switched=(report_of_first.switched, len(first)),
        val_sets=names_of_sets(sources.val) if sources.val else {},
        at_end=stream.summary,
    )

"""Streaming for data larger than memory or disk: rows are read and encoded while the model trains."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.data.encode_plan import EncodedAgain, PreparedData, encode_batch, encode_rows
from utils.data.encoded_rows import length_statistics
from utils.data.encoding_report import EncodingReport, log_report
from utils.data.parts import Part, Streams, first_rows, remarks_of, row_notes
from utils.data.plan import served_by
from utils.data.tally import Tally
from utils.encode.account import LEFT_OUT, Account
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


class LoggedTally(Tally):
    """A tally that also logs the 1st, 10th, 100th ... row of each reason, while the stream runs."""

    def add(self, reason: str, place: str) -> None:
        """Count one row under `reason`, and log it if the count is a power of ten."""
        super().add(reason, place)
        count = self.counts[self.known(reason)]
        if count == 10 ** (len(str(count)) - 1):
            logger.warning(f'{count} rows so far: {reason} ({place})')


def shuffled(rows: Iterable[Row], size: int, rng: random.Random) -> Iterator[Row]:
    """Yield every row once, in random order. Each row is drawn from a buffer of `size` rows."""
    held: list[Row] = []
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

    Each process yields a different share of the rows. The order depends only on seed, rank and world size. So a
    resumed run skips exactly the rows that were trained.
    """

    def __init__(self, encoder: Encoder, sources: Streams, *, val_rows: int, seed: int) -> None:
        # (training part, number of its first rows that are held out). The number is 0 if there is a validation part.
        self.parts = [(parts[0], val_rows if len(parts) == 1 else 0) for parts in sources]
        # The remarks that are logged already. A file gets others when its end is read.
        self._remarks = set(remarks_of(sources))
        self.encoder = encoder
        self.seed = seed
        # Counts of the skipped rows, of the notes, and of the characters of the skipped rows. Every process reads all
        # rows, so these three counts are the same in each process.
        self.unread = LoggedTally()
        self.row_noted = LoggedTally()
        self.unread_text = Account()
        # The report of the rows that this process encodes.
        self.report = EncodingReport(left_out=LoggedTally(), noted=Tally())
        self.rows_read = 0
        # The report of the held-out rows. Every process encodes all held-out rows.
        self.held_out = EncodingReport()
        # The last rows and their origins, by index, so that a row with a bad loss can be named.
        self._recent: dict[int, tuple[dict[str, Any], str]] = {}
        self._yielded = 0

    def _rows(self, unread: Tally, noted: Tally, account: Account) -> Iterator[Row]:
        """Yield the rows of one pass, one row from each data set in turn. Counts the skipped rows and the notes."""

        def rows_of(part: Part, held_out: int) -> Iterator[Row]:
            for location, raw, row in part.read(hashlib.sha256()):
                if isinstance(row, BadRow):
                    unread.add(str(row), location)
                    account.skip(raw, LEFT_OUT)
                    continue

                for note in row_notes(row):
                    noted.add(note, location)
                if held_out:
                    held_out -= 1
                else:
                    yield row

        readers = [rows_of(part, held_out) for part, held_out in self.parts]
        while readers:
            for reader in list(readers):
                row = next(reader, None)
                if row is None:
                    readers.remove(reader)
                else:
                    yield row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the encoded rows of this process. Skipped rows and notes are counted only in the first pass."""
        index = 0
        for number in itertools.count():
            if number == 0:
                rows = self._rows(self.unread, self.row_noted, self.unread_text)
                report = self.report
            else:
                rows = self._rows(Tally(), Tally(), Account())
                report = EncodingReport()

            first = index
            mine: list[Row] = []
            for row in shuffled(rows, SHUFFLE_ROWS, random.Random(f'{self.seed}/{number}')):
                if index % dist.world_size() == dist.rank():
                    mine.append(row)
                index += 1
                if len(mine) == _BATCH_ROWS:
                    yield from self._encoded(mine, report)
                    mine = []
            yield from self._encoded(mine, report)

            if index == first:
                raise ConfigError(
                    f'--streaming true: no training row is left, {len(self.unread)} rows were skipped and the first '
                    'rows are held out. Lower --stream_val_rows, or name more data with --dataset.'
                )
            if number == 0:
                self.rows_read = index
                logger.info(f'a pass over the stream is done: {index} rows')
                for remark in remarks_of([[part for part, _ in self.parts]]):
                    if remark not in self._remarks:
                        logger.info(remark)

    def _encoded(self, rows: Sequence[Row], report: EncodingReport) -> Iterator[dict[str, Any]]:
        """Encode the rows, and yield each encoded row with its index. The last rows are kept in memory."""
        again = EncodedAgain(self.encoder)
        for source, row in encode_batch(self.encoder, rows, report):
            report.account.add(source, row, again)
            item = {**row.as_item(), 'row': self._yielded}
            self._recent[self._yielded] = (item, source.origin)
            self._recent.pop(self._yielded - _REMEMBERED_ROWS, None)
            self._yielded += 1
            yield item

    def origin(self, index: int) -> str:
        """Return where a row came from. For a row that is not in memory, returns 'an earlier row of the stream'."""
        if index not in self._recent:
            return 'an earlier row of the stream'
        return self._recent[index][1]

    def row(self, index: int) -> dict[str, Any]:
        """Return the row with this index. It must be one of the last rows, which are kept in memory."""
        return self._recent[index][0]

    def first(self, count: int, report: EncodingReport | None = None) -> list[dict[str, Any]]:
        """Return the first rows of the stream, encoded and not shuffled. Skipped rows are counted only in `report`."""
        rows = itertools.islice(self._rows(Tally(), Tally(), Account()), count)
        return [row.as_item() for _, row in encode_batch(self.encoder, list(rows), report or EncodingReport())]

    def lengths(self) -> list[int]:
        """Return a list with only --max_length. Without a limit, return the numbers of tokens of the first rows."""
        limit = self.encoder.max_length
        if limit > 0:
            return [limit]
        return [len(item['input_ids']) for item in self.first(_FIRST_ROWS)]

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return one batch with the longest of the first rows. Later rows are not known yet."""
        return [heapq.nlargest(count, self.first(_FIRST_ROWS), key=lambda item: len(item['input_ids']))]

    def summary(self) -> dict[str, Any]:
        """Log and return the counts of all processes for run.json. Every process must call this method."""
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
    """Return the first `count` rows of each data set, or of its validation part if it has one.

    The report counts the skipped rows and notes of validation parts only. Training reads all other parts from the
    beginning and counts their skipped rows and notes.
    """
    for parts in sources:
        if len(parts) == 1:
            continue
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

    return first_rows(sources, count)


def prepare_stream(
    encoder: Encoder, sources: Streams, run_dir: Path, *, val_rows: int, seed: int, samples: int
) -> PreparedData:
    """Return the training stream and the encoded held-out rows. Shows `samples` training rows (sample.txt).

    Raises ConfigError if no training row is left.
    """
    report = EncodingReport()
    val, _ = encode_rows(encoder, _held_out(sources, val_rows, report), report)
    statistics = {'validation': length_statistics(val)}
    log_report(report, statistics)
    served = {'served': served_by(parts[0] for parts in sources)}

    stream = TrainingStream(encoder, sources, val_rows=val_rows, seed=seed)
    stream.held_out = report
    report_of_first = EncodingReport()
    first = stream.first(_FIRST_ROWS, report_of_first)
    if not first:
        raise ConfigError(
            '--streaming true: no training row is left, all rows are skipped or held out for validation. Lower '
            '--stream_val_rows, or name more data with --dataset.'
        )

    show_samples(encoder.tokenizer, first[:samples], run_dir)
    return PreparedData(
        train=stream,
        val=val,
        summary={**statistics, **served},
        switched=(report_of_first.switched, len(first)),
        at_end=stream.summary,
    )

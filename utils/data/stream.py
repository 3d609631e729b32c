"""Rows read, encoded and fed as they come, for data larger than memory or disk."""

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
from utils.data.parts import Part, Streams, first_rows, row_notes
from utils.data.plan import served_by
from utils.data.tally import EncodingReport, Tally, log_report
from utils.encode.account import LEFT_OUT, Account
from utils.encode.encoder import Encoder
from utils.encode.show import show_samples
from utils.formats.conversation import BadRow, Row

SHUFFLE_ROWS = 10_000
_BATCH_ROWS, _LOOKED_AT_ROWS, _REMEMBERED_ROWS = 64, 256, 16_384


class Announced(Tally):
    """A tally that says the 1st, 10th, 100th ... row of each reason while the stream runs."""

    def add(self, reason: str, place: str) -> None:
        """Count one row."""
        super().add(reason, place)
        count = self.counts[reason]
        if count == 10 ** (len(str(count)) - 1):
            logger.warning(f'{count} rows so far: {reason} ({place})')


def shuffled(rows: Iterable[Row], size: int, rng: random.Random) -> Iterator[Row]:
    """Yield every row once, each drawn from the `size` rows that are held."""
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
    """Endless passes over the training rows, each pass shuffled anew; the processes of a run share its rows out.

    What is yielded depends on seed, rank and world size alone, so a resumed run skips exactly what was trained.
    """

    def __init__(self, encoder: Encoder, sources: Streams, *, val_rows: int, seed: int) -> None:
        # The first rows of a data set without a validation part of its own are held out.
        self.parts = [(parts[0], val_rows if len(parts) == 1 else 0) for parts in sources]
        self.encoder, self.seed = encoder, seed
        self.unread, self.row_noted = Announced(), Announced()
        # Every process reads all rows, so that this is the same in each.
        self.unread_text = Account()
        self.report = EncodingReport(left_out=Announced(), noted=Tally())
        self.rows_read = 0
        # What became of the held-out rows, which every process encodes.
        self.held_out = EncodingReport()
        # The rows of the last steps, to be named when something is wrong with one.
        self._recent: dict[int, tuple[dict[str, Any], str]] = {}
        self._given = 0

    def _rows(self, unread: Tally, noted: Tally, account: Account) -> Iterator[Row]:
        """Yield the rows of one pass, the data sets taking turns."""

        def of(part: Part, held_out: int) -> Iterator[Row]:
            for place, raw, row in part.read(hashlib.sha256()):
                if isinstance(row, BadRow):
                    unread.add(str(row), place)
                    account.skip(raw, LEFT_OUT)
                    continue
                for note in row_notes(row):
                    noted.add(note, place)
                if held_out:
                    held_out -= 1
                else:
                    yield row

        readers = [of(part, held_out) for part, held_out in self.parts]
        while readers:
            for reader in list(readers):
                if (row := next(reader, None)) is not None:
                    yield row
                else:
                    readers.remove(reader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of this process; what is left out is counted on the first pass."""
        index = 0
        for number in itertools.count():
            unread, noted = (self.unread, self.row_noted) if number == 0 else (Tally(), Tally())
            account = self.unread_text if number == 0 else Account()
            report = self.report if number == 0 else EncodingReport()
            before = index
            mine: list[Row] = []
            rows = self._rows(unread, noted, account)
            for row in shuffled(rows, SHUFFLE_ROWS, random.Random(f'{self.seed}/{number}')):
                if index % dist.world_size() == dist.rank():
                    mine.append(row)
                index += 1
                if len(mine) == _BATCH_ROWS:
                    yield from self._encoded(mine, report)
                    mine = []
            yield from self._encoded(mine, report)
            if index == before:
                raise ConfigError(f'no training row is left: {len(unread)} left out and the first held out.')
            if number == 0:
                self.rows_read = index
                logger.info(f'a pass over the stream is done: {index} rows')

    def _encoded(self, rows: Sequence[Row], report: EncodingReport) -> Iterator[dict[str, Any]]:
        again = EncodedAgain(self.encoder)
        for source, row in encode_batch(self.encoder, rows, report):
            report.account.add(source, row, again)
            item = {**row.as_item(), 'row': self._given}
            self._recent[self._given] = (item, source.origin)
            self._recent.pop(self._given - _REMEMBERED_ROWS, None)
            self._given += 1
            yield item

    def origin(self, index: int) -> str:
        """Return where a row of the last steps came from."""
        return self._recent[index][1] if index in self._recent else 'an earlier row of the stream'

    def row(self, index: int) -> dict[str, Any]:
        """Return a row of the last steps by the index that it carries."""
        return self._recent[index][0]

    def first(self, count: int, report: EncodingReport | None = None) -> list[dict[str, Any]]:
        """Return the first rows of the stream, not shuffled; what happens to them is told to `report` alone."""
        rows = itertools.islice(self._rows(Tally(), Tally(), Account()), count)
        return [row.as_item() for _, row in encode_batch(self.encoder, list(rows), report or EncodingReport())]

    def lengths(self) -> list[int]:
        """Return the most tokens that a row can have, or where nothing limits them, those of the first rows."""
        limit = self.encoder.max_length
        return [limit] if limit > 0 else [len(item['input_ids']) for item in self.first(_LOOKED_AT_ROWS)]

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return one batch: the longest of the first rows, for no one knows what is to come."""
        return [heapq.nlargest(count, self.first(_LOOKED_AT_ROWS), key=lambda item: len(item['input_ids']))]

    def summary(self) -> dict[str, Any]:
        """Return what was left out or noted by all processes; logs it. Every process must call it."""
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
    """Return the first rows of each data set; what is left out of validation parts goes to the report.

    Training reads all other parts from their beginning, and counts theirs.
    """
    for parts in sources:
        if len(parts) == 1:
            continue
        rows = 0
        for place, raw, row in parts[-1].read(hashlib.sha256()):
            if rows == count:
                break
            if isinstance(row, BadRow):
                report.left_out.add(str(row), place)
                report.account.skip(raw, LEFT_OUT)
                continue
            rows += 1
            for note in row_notes(row):
                report.noted.add(note, place)
    return first_rows(sources, count)


def prepare_stream(
    encoder: Encoder, sources: Streams, run_dir: Path, *, val_rows: int, seed: int, samples: int
) -> PreparedData:
    """Return the training stream and the held-out rows, encoded; shows some (sample.txt)."""
    report = EncodingReport()
    val, _ = encode_rows(encoder, _held_out(sources, val_rows, report), report)
    statistics = {'validation': length_statistics(val)}
    log_report(report, statistics)
    served = {'served': served_by(parts[0] for parts in sources)}
    stream = TrainingStream(encoder, sources, val_rows=val_rows, seed=seed)
    stream.held_out = report
    looked_at = EncodingReport()
    if not (first := stream.first(_LOOKED_AT_ROWS, looked_at)):
        raise ConfigError('no training row is left: all are left out, or held out for validation (--stream_val_rows).')
    show_samples(encoder.tokenizer, first[:samples], run_dir)
    return PreparedData(
        train=stream,
        val=val,
        summary={**statistics, **served},
        switched=(looked_at.switched, len(first)),
        at_end=stream.summary,
    )

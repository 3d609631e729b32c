"""Rows to token ids: in batches, compactly kept, with every row that is left out or altered counted and named."""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import dist
from utils.dataset import Rows
from utils.encoder import Encoder
from utils.errors import ConfigError
from utils.logger import logger
from utils.preprocess import CUT_PROMPT, CUT_REPLY, Encoded, Row, RowRefused

_BATCH_ROWS = 1024
_NAMED_PER_REASON = 3


@dataclass(kw_only=True)
class EncodedRows:
    """Rows of ids laid end to end in flat arrays: a torch map-style data set that costs 4 bytes per token."""

    ids: array[int] = field(default_factory=lambda: array('i'))
    ends: array[int] = field(default_factory=lambda: array('q'))
    trained: list[tuple[int, int]] = field(default_factory=list)
    prompt_lengths: array[int] = field(default_factory=lambda: array('i'))
    # Paths of the rows that have images; a file is opened where a batch is made.
    images: dict[int, tuple[str, ...]] = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)

    def append(self, row: Encoded, origin: str = '') -> None:
        """Add one row and where it came from."""
        self.origins.append(origin)
        if row.images:
            self.images[len(self)] = row.images
        self.ids.extend(row.input_ids)
        self.ends.append(len(self.ids))
        self.trained.append(row.trained)
        self.prompt_lengths.append(row.prompt_length)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row: input_ids, the half-open trained span, the prompt's length, its index, and any images."""
        start = self.ends[index - 1] if index else 0
        return {
            'input_ids': self.ids[start : self.ends[index]].tolist(),
            'trained': self.trained[index],
            'prompt_length': self.prompt_lengths[index],
            'row': index,
            **({'images': self.images[index]} if index in self.images else {}),
        }

    def origin(self, index: int) -> str:
        """Return where a row came from: file and line, or data set and row."""
        return self.origins[index]

    def row(self, index: int) -> dict[str, Any]:
        """Return one row by the index that it carries."""
        return self[index]

    def heaviest(self, count: int) -> list[list[dict[str, Any]]]:
        """Return the batches of `count` rows that ask for most memory: the longest, and those with most loss."""
        lengths = self.lengths()
        by_length = heapq.nlargest(count, range(len(self)), key=lengths.__getitem__)
        by_loss = heapq.nlargest(count, range(len(self)), key=lambda i: self.trained[i][1] - self.trained[i][0])
        batches = [by_length, by_loss] if set(by_length) != set(by_loss) else [by_length]
        return [[self[index] for index in batch] for batch in batches]

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        return [end - start for start, end in zip([0, *self.ends], self.ends, strict=False)]

    def trained_tokens(self) -> int:
        """Return the number of tokens that carry loss."""
        return sum(end - start for start, end in self.trained)

    def longest_first(self) -> EncodedRows:
        """Return the same rows sorted by length, the longest first."""
        lengths = self.lengths()
        rows = EncodedRows()
        for index in sorted(range(len(self)), key=lambda i: -lengths[i]):
            row = self[index]
            del row['row']
            rows.append(Encoded(**row), self.origins[index])
        return rows


@dataclass(kw_only=True)
class EncodingReport:
    """What happened to rows on the way: `left_out` are gone, `noted` are trained."""

    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    noted: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def lines(self) -> list[str]:
        """Return one line per reason: how many rows, and where the first stand."""
        return [
            f'{len(places)} rows {verb}: {reason} ({", ".join(places[:_NAMED_PER_REASON])}'
            f'{", ..." if len(places) > _NAMED_PER_REASON else ""})'
            for verb, reasons in (('left out', self.left_out), ('noted', self.noted))
            for reason, places in reasons.items()
        ]

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the same as numbers, for files."""
        return {
            'left_out': {reason: len(places) for reason, places in self.left_out.items()},
            'noted': {reason: len(places) for reason, places in self.noted.items()},
        }


def _encode_batch(encoder: Encoder, rows: Sequence[Row], report: EncodingReport) -> Iterator[tuple[Row, Encoded]]:
    try:
        encoded = encoder.encode(rows)
    except RowRefused as error:
        if len(rows) == 1:
            detail = f' [{error.detail}]' if error.detail else ''
            report.left_out[error.reason].append(rows[0].origin + detail)
            return
        for row in rows:
            yield from _encode_batch(encoder, [row], report)
        return
    yield from zip(rows, encoded, strict=True)


def encode_rows(encoder: Encoder, rows: Sequence[Row], report: EncodingReport) -> tuple[EncodedRows, list[Row]]:
    """Return the encoded rows and the rows they came from; what was left out or noted is added to the report."""
    encoded, kept = EncodedRows(), []
    for start in range(0, len(rows), _BATCH_ROWS):
        for row, ids in _encode_batch(encoder, rows[start : start + _BATCH_ROWS], report):
            for note in ids.notes:
                report.noted[note].append(row.origin)
            encoded.append(ids, row.origin)
            kept.append(row)
    return encoded, kept


def encode_split(
    encoder: Encoder, train: Sequence[Row], val: Sequence[Row], left_out: Sequence[tuple[str, str]]
) -> tuple[EncodedRows, EncodedRows, list[Row], EncodingReport]:
    """Return (train, validation, validation rows kept, report); raises ConfigError where no training row is left."""
    report = EncodingReport()
    for place, reason in left_out:
        report.left_out[reason].append(place)
    encoded_train, _ = encode_rows(encoder, train, report)
    encoded_val, kept_val = encode_rows(encoder, val, report)
    if not len(encoded_train):
        raise ConfigError('every training row is left out: ' + '; '.join(report.lines()))
    return encoded_train, encoded_val, kept_val, report


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What a run trains on and validates on, and what run.json says about it."""

    train: EncodedRows
    val: EncodedRows
    summary: dict[str, Any]


def prepare_data(encoder: Encoder, rows: Rows, run_dir: Path) -> PreparedData:
    """Return the rows encoded; logs what happened to them and shows one with its trained span (sample.txt)."""
    train, val, _, report = encode_split(encoder, rows.train, rows.val, rows.left_out)
    statistics = {'train': length_statistics(train), 'validation': length_statistics(val)}
    log_report(report, statistics)
    sample = show_sample(encoder.tokenizer, train[0])
    logger.info(f'one row, the trained part between ⟦ and ⟧:\n{sample}')
    if dist.is_main():
        (run_dir / 'sample.txt').write_text(sample + '\n', encoding='utf-8')
    return PreparedData(train=train, val=val, summary={**statistics, **report.counts()})


def length_statistics(rows: EncodedRows) -> dict[str, float]:
    """Return tokens per row (min, median, mean, p95, max), in all, and the share of them that is trained."""
    lengths = sorted(rows.lengths())
    if not lengths:
        return {'rows': 0}
    return {
        'rows': len(lengths),
        'min': lengths[0],
        'median': lengths[len(lengths) // 2],
        'mean': round(sum(lengths) / len(lengths), 1),
        'p95': lengths[int(0.95 * (len(lengths) - 1))],
        'max': lengths[-1],
        'tokens': sum(lengths),
        'trained_share': round(rows.trained_tokens() / sum(lengths), 4),
    }


def show_sample(tokenizer: Any, row: dict[str, Any]) -> str:
    """Return the row decoded, the trained span between ⟦ and ⟧."""
    ids, (start, end) = row['input_ids'], row['trained']
    parts = [tokenizer.decode(part) if part else '' for part in (ids[:start], ids[start:end], ids[end:])]
    return f'{parts[0]}⟦{parts[1]}⟧{parts[2]}'


def log_report(report: EncodingReport, statistics: dict[str, dict[str, float]]) -> None:
    """Log what the data is and what happened to it."""
    for name, numbers in statistics.items():
        logger.info(f'{name}: ' + ', '.join(f'{key} {value}' for key, value in numbers.items()))
    for line in report.lines():
        logger.warning(line)
    lost = len(report.noted[CUT_REPLY]) if CUT_REPLY in report.noted else 0
    if lost or CUT_PROMPT in report.noted:
        logger.warning('a larger --max_length (-1: no limit) keeps these rows whole')

"""Counts the rows that were skipped or altered, by reason, and logs the counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from utils.base.logger import logger
from utils.encode.account import Account
from utils.encode.encoded import CUT_PROMPT, CUT_REPLY, THINKING_SWITCH

_NAMED_PER_REASON = 3


@dataclass(kw_only=True)
class Tally:
    """Counts rows by reason, and keeps the locations of the first rows of each reason."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one row under `reason`. `place` is the location of the row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= _NAMED_PER_REASON:
            self.places.setdefault(reason, []).append(place)

    def merge(self, other: Tally) -> None:
        """Add the counts and locations of the tally `other` to this tally."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.places[reason] = [*self.places.get(reason, ()), *other.places[reason]][:_NAMED_PER_REASON]

    def __len__(self) -> int:
        return sum(self.counts.values())

    def lines(self, verb: str) -> list[str]:
        """Return one line per reason, with the number of rows and the locations of the first rows."""
        lines = []
        for reason, count in self.counts.items():
            more = ', ...' if count > _NAMED_PER_REASON else ''
            lines.append(f'{count} rows {verb}: {reason} ({", ".join(self.places[reason])}{more})')
        return lines


@dataclass(kw_only=True)
class EncodingReport:
    """Counts of encoded rows: `left_out` counts the skipped rows, `noted` counts the used rows with a remark."""

    left_out: Tally = field(default_factory=Tally)
    noted: Tally = field(default_factory=Tally)
    # How every character of the source rows was used.
    account: Account = field(default_factory=Account)

    def lines(self) -> list[str]:
        """Return one line per reason, with the number of rows and the locations of the first rows."""
        return [*self.left_out.lines('skipped'), *self.noted.lines('noted')]

    @property
    def switched(self) -> int:
        """Return the number of rows that were rendered with the template's thinking switch."""
        note_start = THINKING_SWITCH.partition('{')[0]
        return sum(count for note, count in self.noted.counts.items() if note.startswith(note_start))

    def counts(self) -> dict[str, dict[str, Any]]:
        """Return the counts without locations, for run.json."""
        return {
            'left_out': dict(self.left_out.counts),
            'noted': dict(self.noted.counts),
            'account': self.account.record(),
        }


def log_report(report: EncodingReport, statistics: dict[str, dict[str, float]]) -> None:
    """Log the length statistics of each part of the data, and the counts of the report."""
    for name, numbers in statistics.items():
        logger.info(f'{name}: ' + ', '.join(f'{key} {value}' for key, value in numbers.items()))
    for line in report.account.lines():
        logger.info(line)
    for line in report.lines():
        logger.warning(line)

    if CUT_REPLY in report.noted.counts or CUT_PROMPT in report.noted.counts:
        logger.warning('a larger --max_length (-1: no limit) keeps these rows whole')

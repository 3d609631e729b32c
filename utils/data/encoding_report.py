"""Counts rows of a run: how many were skipped for each reason, and how many have each note."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import Overlong
from utils.data.tally import Tally, counted
from utils.encode.account import Account
from utils.encode.encoded import CUTS, THINKING_SWITCH

# The number of rows that are too long and are named.
_NAMED = 20


@dataclass(kw_only=True)
class RefusedRows:
    """Counts the rows that are longer than --max_length, if --overlong does not allow them.

    The locations of the first of these rows are kept.
    """

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, length: int) -> None:
        """Count one row. `place` is its location, and `length` its number of tokens."""
        self.count += 1
        if self.count <= _NAMED:
            self.places.append(f'{place} ({length} tokens)')

    def raise_if_any(self, overlong: Overlong, max_length: int) -> None:
        """Raise ConfigError if any row was counted. The message names the locations of the first counted rows."""
        if not self.count:
            return
        more = f', and {self.count - _NAMED} more' if self.count > _NAMED else ''
        what = counted(self.count, 'conversation' if overlong == 'split' else 'row')
        are = 'is' if self.count == 1 else 'are'
        why = ', and only plain text is split' if overlong == 'split' else ''
        raise ConfigError(
            f'--overlong {overlong}: {what} {are} longer than --max_length {max_length}{why}: '
            f'{", ".join(self.places)}{more}. Give a larger --max_length, or add --overlong cut or --overlong drop. '
            '--check_dataset true writes the list of all these rows.'
        )


@dataclass(kw_only=True)
class EncodingReport:
    """Counts what happened to the rows of a run, for each reason.

    `left_out` counts the skipped rows. `noted` counts the notes on the used rows, e.g. that the beginning of a row was
    cut.
    """

    left_out: Tally = field(default_factory=Tally)
    noted: Tally = field(default_factory=Tally)
    # The rows that end the run because of their length.
    refused: RefusedRows = field(default_factory=RefusedRows)
    # How every character of the source rows was used.
    account: Account = field(default_factory=Account)

    def lines(self) -> list[str]:
        """Return one log line for each reason: how many rows have this reason, and where the first of them are."""
        return [*self.left_out.lines('skipped'), *self.noted.lines('noted')]

    @property
    def switched(self) -> int:
        """Return how many rows needed a variable of the template (e.g. enable_thinking) to keep their reasoning."""
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
    """Log the report, and the statistics of the rows.

    `statistics` is a dict from a name to numbers, for example {'train': {'rows': 900}, 'validation': {'rows': 100}}.
    """
    for name, numbers in statistics.items():
        logger.info(f'{name}: ' + ', '.join(f'{key} {value}' for key, value in numbers.items()))
    for line in report.account.lines():
        logger.info(line)
    for line in report.lines():
        logger.warning(line)

    if not report.noted.counts.keys().isdisjoint(CUTS):
        logger.warning(
            'a larger --max_length (-1: no limit) keeps these rows whole; --overlong split divides a row of plain text '
            'into several rows, so that nothing is cut'
        )

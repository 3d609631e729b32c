"""What happened to the rows of a run while they were encoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from utils.base.logger import logger
from utils.data.tally import Tally
from utils.encode.account import Account
from utils.encode.encoded import CUTS, THINKING_SWITCH


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

    if not report.noted.counts.keys().isdisjoint(CUTS):
        logger.warning('a larger --max_length (-1: no limit) keeps these rows whole')

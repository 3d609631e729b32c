"""Counts the rows that were skipped or altered, for each reason."""

from __future__ import annotations

from dataclasses import dataclass, field

_NAMED_PER_REASON = 3
# Reasons can contain text of the data, such as the name of a column. Beyond this number of different reasons, and
# beyond this length of a reason, the tally must not grow with the data.
_MOST_REASONS = 500
_LONGEST_REASON = 1000
OTHER_REASONS = f'another reason than the first {_MOST_REASONS}'


@dataclass(kw_only=True)
class Tally:
    """Counts rows that were skipped or altered, for each reason, and keeps the locations of the first of them.

    A reason is a text for messages, for example 'the row is None'.
    """

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one row under `reason`. `place` is the location of the row.

        If there are too many different reasons, a new reason is counted under OTHER_REASONS.
        """
        reason = self.known(reason)
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= _NAMED_PER_REASON:
            self.places.setdefault(reason, []).append(place)

    def known(self, reason: str) -> str:
        """Return the reason under which a row is counted: `reason`, cut to a maximum length, or OTHER_REASONS.

        It is OTHER_REASONS if `reason` is new and too many different reasons are counted already.
        """
        if len(reason) > _LONGEST_REASON:
            reason = f'{reason[:_LONGEST_REASON]} ...'
        return reason if reason in self.counts or len(self.counts) < _MOST_REASONS else OTHER_REASONS

    def merge(self, other: Tally) -> None:
        """Add the counts and locations of the tally `other` to this tally."""
        for named, count in other.counts.items():
            reason = self.known(named)
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.places[reason] = [*self.places.get(reason, ()), *other.places[named]][:_NAMED_PER_REASON]

    def __len__(self) -> int:
        return sum(self.counts.values())

    def lines(self, verb: str) -> list[str]:
        """Return one log line for each reason: how many rows have this reason, and where the first of them are.

        `verb` says in each line what happened to the rows, e.g. 'skipped'.
        """
        lines = []
        for reason, count in self.counts.items():
            more = ', ...' if count > _NAMED_PER_REASON else ''
            lines.append(f'{counted(count, "row")} {verb}: {reason} ({", ".join(self.places[reason])}{more})')
        return lines


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, for example '1 row' or '2 rows'."""
    return f'{count} {noun}{"s" * (count != 1)}'

"""The lengths of the rows in the data check."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from utils.base.names import Overlong
from utils.encode.encoded import Encoded
from utils.encode.encoder import cut_row


@dataclass(kw_only=True)
class Lengths:
    """Counts tokens per row, tokens that --max_length cuts, and the trained share of the remaining tokens."""

    max_length: int
    tokenizer: Any
    overlong: Overlong = 'cut'
    longest: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    histogram: Counter[int] = field(default_factory=Counter)

    def add(self, row: Encoded) -> Encoded:
        """Count the tokens of an encoded row. With --overlong cut, returns the row cut to --max_length, else `row`."""
        length = len(row.input_ids)
        cut = row if self.overlong != 'cut' else cut_row(row, self.max_length, self.tokenizer)
        lost = length - len(cut.input_ids)
        trained = sum(end - start for start, end in (*cut.earlier, cut.trained))

        self.counts.update(rows=1, tokens=length, rows_cut=int(lost > 0), tokens_lost=lost, trained=trained)
        self.longest = max(self.longest, length)
        self.histogram[(length - 1).bit_length()] += 1
        return cut

    def record(self) -> dict[str, Any]:
        """Return the numbers for the report.

        `rows_up_to` is a histogram of the lengths. Its keys are powers of two. A row of 5 to 8 tokens is counted
        under the key 8.
        """
        counts = self.counts
        return {
            'mean': round(counts['tokens'] / max(counts['rows'], 1), 1),
            'max': self.longest,
            'rows_up_to': {str(2**bits): count for bits, count in sorted(self.histogram.items())},
            'max_length': self.max_length,
            **{name: counts[name] for name in ('tokens', 'rows_cut', 'tokens_lost')},
            'trained_share': round(counts['trained'] / max(counts['tokens'] - counts['tokens_lost'], 1), 4),
        }

"""Opens the data sets of a streamed run, and reads the first rows of a run."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from utils.base.names import HubName, LossScope
from utils.data.converted_rows import AS_WRITTEN, open_replies
from utils.data.open_parts import open_parts
from utils.data.parts import VAL, Part, check_columns, check_read_once, remarks_of
from utils.data.plan import Plan, loss_decisions, part_not_used, plan_validation
from utils.data.sources import parse_source
from utils.formats.conversation import Row
from utils.formats.reading import Reading

# The number of rows of each stream in which the columns of --columns are looked for.
_COLUMN_ROWS = 1000
# The number of rows of each stream that are read before training to see which replies carry loss.
_FIRST_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The opened data sets of a streamed run.

    `sources` has one list for each data set of --dataset. `shares` has the share of each data set (name%0.3). If
    --dataset gives no shares, `shares` is empty, and a row is taken from each data set in turn.

    Without --val_dataset, a list in `sources` is [training part, validation part], or [training part] if the data set
    has no validation split. The validation rows are taken from `sources`, and `val` is None.

    With --val_dataset, a list in `sources` is always [training part], and all its rows are for training. `val` is the
    plan of the rows of --val_dataset. These rows are not streamed.

    `decisions` has log lines about the data sets.
    """

    sources: list[list[Part]]
    shares: Sequence[Fraction] = ()
    val: Plan | None = None
    decisions: Sequence[str] = ()


def open_streams(
    words: Sequence[str],
    *,
    hub: HubName,
    val_words: Sequence[str] = (),
    seed: int = 42,
    reading: Reading = AS_WRITTEN,
) -> Streams:
    """Open the data sets of a streamed run. The rows of --val_dataset are not streamed.

    `words` are the values of --dataset, and `val_words` are the values of --val_dataset. Raises ConfigError if a data
    set cannot be opened, if its first row cannot be read, or if no row of a data set of --val_dataset can be used.

    With --columns, up to 1000 rows of each data set are read. Raises ConfigError if one of them cannot be read, or if
    --columns names a column that all of them lack.
    """
    named = [parse_source(word) for word in words]
    sources = [open_parts(source, hub=hub, reading=reading) for source in named]
    val: Plan | None = None
    decisions: list[str] = []
    if val_words:
        decisions = [part_not_used(parts[1]) for parts in sources if len(parts) > 1]
        sources = [parts[:1] for parts in sources]
        val = plan_validation(
            val_words, trained={parts[0].name for parts in sources}, seed=seed, hub=hub, reading=reading
        )
        decisions += val.drawn

    check_read_once([*itertools.chain.from_iterable(sources), *(val.parts if val else ())])
    opened = list(itertools.chain.from_iterable(sources))
    for part in opened:
        for _ in itertools.islice(part.read(hashlib.sha256()), _COLUMN_ROWS if reading.columns else 1):
            pass
    check_columns([*opened, *(val.parts if val else ())], reading)
    decisions = [*remarks_of([*sources, val.parts if val else ()]), *decisions]
    shares = [source.share for source in named if source.share is not None]
    return Streams(sources=sources, shares=shares, val=val, decisions=decisions)


def first_rows(sources: Sequence[Sequence[Part]], count: int) -> list[Row]:
    """Return the validation rows of a stream: the first `count` rows of each data set that can be trained on.

    `sources` has one list for each data set: [training part, validation part], or [training part] if the data set has
    no validation split. The rows are taken from the last part of each list.
    """
    found: list[Row] = []
    for parts in sources:
        readable = (row for _, _, row in parts[-1].read(hashlib.sha256()) if isinstance(row, Row))
        found += itertools.islice(readable, count)
    return found


def stream_decisions(typed: LossScope | None, streams: Streams) -> list[str]:
    """Return log lines that say which replies carry loss in the first rows of each training stream."""
    replies: Counter[LossScope] = Counter()
    rows: Counter[LossScope] = Counter()
    read = 0
    for parts in streams.sources:
        usable = (row for _, _, row in parts[0].read(hashlib.sha256()) if isinstance(row, Row))
        for row in itertools.islice(usable, _FIRST_ROWS):
            read += 1
            if earlier := open_replies(row):
                replies[row.loss_scope] += earlier
                rows[row.loss_scope] += 1
    return loss_decisions(typed, replies, rows, f'of the first {read} rows')


def some_rows(rows: Plan | Streams, use: int, count: int) -> list[Row]:
    """Return up to `count` training rows (`use` is TRAIN) or validation rows (`use` is VAL).

    They are the first rows of the data sets, about the same number from each. For Streams without --val_dataset, `use`
    is ignored, and the rows are those of `first_rows`.
    """
    if isinstance(rows, Streams):
        if rows.val is None or use != VAL:
            return first_rows(rows.sources, -(-count // len(rows.sources)))[:count]
        rows = rows.val

    parts = [part for part in rows.parts if use in part.uses]
    share = -(-count // max(len(parts), 1))
    found: list[Row] = []
    for part in parts:
        of_this_use = (row for u, (_, _, row) in part.used() if u == use and isinstance(row, Row))
        found += itertools.islice(of_this_use, share)
    return found[:count]

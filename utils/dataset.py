"""Data sets: the registry, and rows drawn, split and counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import demo_sql
from utils.convert import KNOWN_SHAPES, BadRow, Converter, check_row, find_converter
from utils.data_file import SUFFIXES, PlacedRow, read_rows
from utils.errors import ConfigError, did_you_mean
from utils.preprocess import Row

RawRows = Iterable[Mapping[str, Any]]
# A function without arguments that returns one data set, or a pair (train, validation).
DatasetFunction = Callable[[], 'RawRows | tuple[RawRows, RawRows]']

DATASET_MAPPING: dict[str, DatasetFunction] = {
    # Question and table definition -> SQL; made by this project, scored by running the SQL.
    'sql-demo': lambda: (demo_sql.train_rows(), demo_sql.held_out_rows()),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One word of --dataset: a registered name or the path of a data file, and how many rows to draw from it."""

    name: str
    sample: int | None
    path: Path | None


@dataclass(kw_only=True)
class Rows:
    """What was read: the rows of both parts, and every row left out with its place and reason."""

    train: list[Row] = field(default_factory=list)
    val: list[Row] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def parse_source(word: str) -> Source:
    """Return what a word of --dataset names; raises ConfigError with the closest names. Reads no file."""
    name, mark, count = word.rpartition('#')
    if not mark:
        name, count = word, ''
    if mark and not (count.isdigit() and int(count) > 0):
        raise ConfigError(f"--dataset '{word}': after # comes how many rows to draw, 1 or more, got '{count}'.")
    sample = int(count) if mark else None
    if name in DATASET_MAPPING:
        return Source(name=name, sample=sample, path=None)
    if name.lower().endswith(SUFFIXES):
        return Source(name=name, sample=sample, path=Path(name))
    if '/' in name or '.' in name:
        raise ConfigError(f"--dataset '{name}' is neither registered nor a {', '.join(SUFFIXES)} file.")
    raise ConfigError(
        f"dataset '{name}' is not registered{did_you_mean(name, DATASET_MAPPING)} "
        f'Give a {", ".join(SUFFIXES)} file, or add an entry to DATASET_MAPPING in utils/dataset.py.'
    )


def check_source(source: Source) -> str | None:
    """Return what keeps a data file from being opened, or None."""
    if source.path is None:
        return None
    if not source.path.is_file():
        kind = 'a folder' if source.path.is_dir() else 'not there'
        return f'data file {source.path} is {kind} (looked in {source.path.absolute().parent}).'
    return None


def _placed(name: str, rows: RawRows) -> Iterator[PlacedRow]:
    for number, row in enumerate(rows, start=1):
        yield f'{name}: row {number}', dict(row)


def _convert(placed: Iterable[PlacedRow], *, name: str, left_out: list[tuple[str, str]]) -> list[Row]:
    """Return the rows as conversations; the shape is found from the first row's columns."""
    converter: Converter | None = None
    needed: frozenset[str] = frozenset()
    rows: list[Row] = []
    for place, raw in placed:
        if converter is None:
            converter = find_converter(raw)
            if converter is None:
                raise ConfigError(
                    f'{place}: columns {", ".join(map(str, raw))} are no known shape. Known: {KNOWN_SHAPES}. '
                    f"Rename the columns of '{name}', or register a function in DATASET_MAPPING in utils/dataset.py."
                )
            needed = frozenset(raw)
        try:
            if find_converter(raw) is not converter:
                raise BadRow(f'columns are missing that the first row has: {", ".join(sorted(needed - set(raw)))}')
            row = check_row(converter(raw))
        except BadRow as problem:
            left_out.append((place, str(problem)))
            continue
        row.origin = place
        rows.append(row)
    return rows


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return `count` rows drawn from all of them, in their order; all where there are not more."""
    if count < 0 or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def _split(rows: list[Row], test_ratio: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (train, validation); at least one row on each side where the ratio is above 0 and there are two."""
    count = min(max(1, round(len(rows) * test_ratio)), len(rows) - 1) if test_ratio > 0 else 0
    chosen = set(random.Random(seed).sample(range(len(rows)), max(count, 0)))
    return [r for i, r in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _read(source: Source, left_out: list[tuple[str, str]]) -> tuple[list[Row], list[Row] | None]:
    if source.path is not None:
        return _convert(read_rows(source.path), name=source.name, left_out=left_out), None
    loaded = DATASET_MAPPING[source.name]()
    if isinstance(loaded, tuple):
        train, val = loaded
        return (
            _convert(_placed(source.name, train), name=source.name, left_out=left_out),
            _convert(_placed(f'{source.name} (validation)', val), name=source.name, left_out=left_out),
        )
    return _convert(_placed(source.name, loaded), name=source.name, left_out=left_out), None


def get_dataset(words: Sequence[str], *, seed: int = 42, test_ratio: float = 0.01, train_sample: int = -1) -> Rows:
    """Return the rows of all data sets: each sampled (#n) and split by itself, then joined, then drawn from.

    The validation part is capped to max(1, train_sample * test_ratio). Raises ConfigError for what cannot be read and
    where no row is left.
    """
    result = Rows()
    for word in words:
        source = parse_source(word)
        train, val = _read(source, result.left_out)
        if source.sample is not None:
            train = draw(train, source.sample, seed)
        if val is None:
            train, val = _split(train, test_ratio, seed)
        result.train += train
        result.val += val
    if not result.train:
        reasons = sorted({reason for _, reason in result.left_out})
        raise ConfigError(
            f'no training row is left of {", ".join(words)}: '
            f'{len(result.left_out)} rows left out ({"; ".join(reasons)}).'
        )
    if train_sample >= 0:
        result.train = draw(result.train, train_sample, seed)
        result.val = draw(result.val, max(1, int(train_sample * test_ratio)), seed)
    return result

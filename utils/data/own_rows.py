"""Reads the rows that the user's own functions in DATASET_MAPPING return.

A function returns a list, a generator, a `datasets.Dataset`, or two of these: training rows and validation rows. It can
also return a dictionary of splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.dataset import DATASET_MAPPING
from utils.formats.conversation import BadRow
from utils.formats.data_file import without_null_keys
from utils.formats.hub_splits import VALIDATION_NAMES

_RETURN = (
    'Return a list, a generator, a datasets.Dataset, or a pair (train, validation) of them from the function in '
    'utils/dataset.py.'
)


def halves_of(name: str, *, logs: bool = False) -> tuple[Any, Any]:
    """Call the function of the data set `name`, and return (training rows, validation rows or None).

    If the function returns a dictionary of splits (e.g. a `datasets.DatasetDict`), its split `train` is used, and its
    first split that is named `validation`, `valid`, `val` or `dev`. If `logs` is True, the names of its other splits
    are logged.

    Raises ConfigError if the function returns something else than rows, two sets of rows, or a dictionary of splits
    with the split `train`.
    """
    returned: Any = DATASET_MAPPING[name]()
    if isinstance(returned, Mapping):
        returned = _of_splits(name, returned, logs=logs)
    halves = returned if isinstance(returned, tuple) else (returned, None)
    if len(halves) != 2:
        raise ConfigError(f"data set '{name}': its function returned {len(halves)} items, not two. {_RETURN}")

    train, val = halves
    for rows in (train,) if val is None else halves:
        if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
            raise ConfigError(f"data set '{name}': its function returned {_named(rows)}, which is not rows. {_RETURN}")
    return train, val


def _of_splits(name: str, splits: Mapping[Any, Any], *, logs: bool) -> tuple[Any, Any]:
    if 'train' not in splits:
        raise ConfigError(
            f"data set '{name}': its function returned a dictionary without the split train; its keys are "
            f'{", ".join(map(str, splits)) or "none"}. {_RETURN}'
        )
    val = next((split for split in VALIDATION_NAMES if split in splits), None)
    others = [str(split) for split in splits if split not in ('train', val)]
    if others and logs:
        logger.info(f'{name}: splits not used: {", ".join(others)}')
    return splits['train'], None if val is None else splits[val]


def located_rows(name: str, half: int, rows: Any, shown: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Yield (location, row) for each row in `rows`. The location is a text for messages, '<shown>: row 1'.

    `rows` are rows of the data set `name`: its training rows if `half` is 0, its validation rows if `half` is 1.

    If a row is None, a BadRow is yielded instead of it. Raises ConfigError if a row is not a dictionary.
    """
    if iter(rows) is rows:  # a generator can be read only once: call the function again
        rows = halves_of(name)[half]
    # A column of a `datasets.Dataset` has the same keys in every row, as in a parquet file.
    fills_keys = type(rows).__module__.partition('.')[0] == 'datasets'
    for number, row in enumerate(rows, start=1):
        location = f'{shown}: row {number}'
        if row is None:
            yield location, BadRow('the row is None')
            continue
        if not isinstance(row, Mapping):
            raise ConfigError(
                f'{location}: a row must be a dict with named columns, got {_named(row)}. Change the function of '
                f"'{name}' in utils/dataset.py."
            )
        cells = {column: _plain(value) for column, value in row.items()}
        yield location, {c: without_null_keys(v) for c, v in cells.items()} if fills_keys else cells


def _plain(value: Any) -> Any:
    """Return the value with arrays and numbers of numpy converted to lists and numbers of Python.

    Values in lists and dictionaries are converted too.
    """
    if type(value).__module__ == 'numpy':
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _named(value: Any) -> str:
    return 'None' if value is None else f'a value of type {type(value).__name__}'

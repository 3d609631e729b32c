"""Rows of the user's own functions in DATASET_MAPPING: lists, generators, `datasets.Dataset`, and pairs of them."""

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
    """Call the function of a data set, and return (training rows, validation rows or None).

    A dictionary of splits, for example a `datasets.DatasetDict`, gives `train` and `validation`. With `logs`, the names
    of all other splits are logged. Raises ConfigError if the function returns anything else than rows, two sets of
    rows, or such a dictionary.
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
    """Yield (location, row) for each row of the data set `name`. A location is, for example, '<shown>: row 1'.

    `half` is 0 for the training rows, 1 for the validation rows.

    For a row that is None, the second item is a BadRow. Raises ConfigError if a row is not a dictionary.
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
    """Return a value in which values of numpy are converted to the types of Python."""
    if type(value).__module__ == 'numpy':
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _named(value: Any) -> str:
    return 'None' if value is None else f'a value of type {type(value).__name__}'

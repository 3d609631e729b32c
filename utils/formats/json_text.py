"""JSON that keeps the spelling of the source. Numbers keep their text, and repeated keys of an object are recorded."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class WrittenNumber(float):
    """A JSON number that keeps its spelling: 1.10 stays 1.10, and 1e22 does not become 1e+22."""

    def __new__(cls, written: str) -> WrittenNumber:
        """Parse the number `written`, and keep its spelling."""
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        """Return the number as it is spelled in the file, for example '1.10'."""
        return self.written

    def __reduce__(self) -> tuple[type[WrittenNumber], tuple[str]]:
        """Keep the spelling when the number is copied or pickled."""
        return WrittenNumber, (self.written,)


def _read_integer(written: str) -> int | WrittenNumber:
    """Return an integer. The integer -0 becomes a WrittenNumber, because an int has no sign for 0."""
    return WrittenNumber(written) if written == '-0' else int(written)


class RowWithRepeatedKeys(dict[str, Any]):
    """A row in which a JSON object has a key twice. `repeated_keys` has these keys. The last value of a key is used."""

    def __init__(self, row: dict[str, Any], keys: Iterable[str]) -> None:
        super().__init__(row)
        self.repeated_keys = tuple(dict.fromkeys(keys))


def with_columns(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a copy of a row with its columns renamed. `names` maps old names to new names."""
    made = {names.get(column, column): value for column, value in row.items()}
    return RowWithRepeatedKeys(made, row.repeated_keys) if isinstance(row, RowWithRepeatedKeys) else made


def repeated_key(key: str) -> str:
    """Return a note for the report: an object in a row has the key `key` twice."""
    return f'the JSON key `{key}` occurs twice in an object: the last value is used'


class JsonParser:
    """Parses JSON text. Numbers keep their spelling (see WrittenNumber).

    If an object has a key twice, its last value is used, and the key is added to the list `repeated`.
    """

    def __init__(self) -> None:
        self.repeated: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_float=WrittenNumber, parse_int=_read_integer
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            self.repeated += [name for name in made if names.count(name) > 1]
        return made

    def parse(self, text: str) -> Any:
        """Return the value of a JSON text. Raises ValueError or RecursionError if it cannot be parsed."""
        return self._decoder.decode(text)

    def parse_start(self, text: str, position: int) -> tuple[Any, int]:
        """Return the JSON value that starts at a position of a text, and the position after its end.

        Raises ValueError or RecursionError if the value cannot be parsed.
        """
        return self._decoder.raw_decode(text, position)

    def row(self, value: Any) -> Any:
        """Return the row `value`, the result of the previous call of `parse` or `parse_start`.

        A dict in which any object has a key twice becomes a RowWithRepeatedKeys. Any other value is returned unchanged.
        The list `repeated` is cleared for the next row.
        """
        if self.repeated and isinstance(value, dict):
            value = RowWithRepeatedKeys(value, self.repeated)
        self.repeated.clear()
        return value


# Every stand-in for a number begins with these digits, which no data can contain.
_NONCE = f'{secrets.randbelow(9) + 1}.{secrets.randbelow(10**8):08d}'
_STAND_IN = re.compile(rf'{re.escape(_NONCE)}\d{{5}}1e\+\d{{3}}')


class Spelling:
    """Makes a JSON writer print numbers with the spelling of the source.

    A JSON writer prints a WrittenNumber like any float: 1.10 as 1.1. So before printing, `hide` replaces the number by
    a unique float. After printing, `show` replaces this float by 1.10.
    """

    def __init__(self) -> None:
        self._written: dict[str, str] = {}

    def hide(self, value: Any) -> Any:
        """Return nested JSON data in which a unique float replaces each number that a JSON writer would change.

        For example, a JSON writer would change 1.10 to 1.1. If there is no number like 1.10, `value` itself is
        returned.
        """
        if isinstance(value, WrittenNumber):
            return value if repr(value) == value.written else self._stand_in(value.written)
        if isinstance(value, dict):
            made = {key: self.hide(item) for key, item in value.items()}
            return made if any(made[key] is not item for key, item in value.items()) else value
        if isinstance(value, list | tuple):
            items = [self.hide(item) for item in value]
            return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
        return value

    def _stand_in(self, written: str) -> float:
        # 15 digits, the last of which is not 0: every float with so few digits is printed with exactly these digits.
        rounds, count = divmod(len(self._written), 100_000)
        number = float(f'{_NONCE}{count:05d}1e{187 + rounds}')
        self._written[repr(number)] = written
        return number

    def show(self, printed: str) -> str:
        """Return the JSON text `printed` with all numbers as they are written in the source, for example 1.10.

        `printed` has unique floats that `hide` has put in the place of numbers. Each unique float is replaced by the
        number of the source.
        """
        if not self._written:
            return printed
        return re.sub(_STAND_IN, lambda match: self._written.get(match[0], match[0]), printed)


def json_as_written(
    value: Any,
    *,
    default: Callable[[Any], Any] | None = None,
    sort_keys: bool = False,
    allow_nan: bool = True,
) -> str:
    """Return a value as JSON text in which numbers have the spelling of the source.

    Characters beyond ASCII are not escaped. The options are those of json.dumps, and so are the errors that are raised.
    """
    spelling = Spelling()
    text = json.dumps(
        spelling.hide(value), ensure_ascii=False, default=default, sort_keys=sort_keys, allow_nan=allow_nan
    )
    return spelling.show(text)

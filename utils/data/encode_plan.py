"""Encodes rows to token ids, in batches, and stores the ids in flat files.

Rows that are skipped or altered are counted, separately for each reason. The locations of the first of them are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from utils.base import dist
from utils.base.cache import cached_folder
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.data.encoded_rows import EncodedRows, length_statistics
from utils.data.encoding_report import EncodingReport, log_report
from utils.data.parts import TRAIN, UNUSED, VAL
from utils.data.plan import Plan, served_by
from utils.data.tally import Tally
from utils.encode.account import LEFT_OUT, NOT_DRAWN, Account
from utils.encode.encoded import DROPPED, NOTHING_TRAINED, SPLIT, Encoded, RowRefused, trains_nothing
from utils.encode.encoder import Encoder
from utils.encode.show import show_samples
from utils.formats.columns import find_converter
from utils.formats.conversation import BadRow, Row
from utils.formats.row_check import check_row

if TYPE_CHECKING:
    from utils.data.stream import TrainingStream

BATCH_ROWS = 1024
# Number of batches that are encoded at the same time. The tokenizer releases Python's global lock. So while one batch
# is tokenised, the template can render the next batch.
_THREADS = 4
_REPORT = 'report.json'
# The source files that decide which ids a row gets, as globs relative to utils/.
_DECIDES_IDS = ('preprocess.py', 'formats/*.py', 'encode/*.py', 'data/*.py', 'loading/image_processors.py')
T = TypeVar('T')


class UsedRow(NamedTuple):
    """A training or validation row of a data set.

    `use` is TRAIN or VAL. `part` is the index of the row's data set in Plan.parts. `times` is the number of times that
    one epoch trains the row. It is 1 for a validation row.
    """

    row: Row
    use: int
    part: int
    times: int


class EncodedAgain:
    """Converts and encodes a row a second time, with other values in some columns.

    utils/encode/marker_search.py compares both results, to find the texts whose position is not certain.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @property
    def printed(self) -> str:
        """Return the fixed text of the prompts: what the template writes around messages, and the system text."""
        return self.encoder.text.printed + (self.encoder.system or '')

    def convert(self, written: Mapping[str, Any]) -> Row:
        """Return the row made from the columns `written`. Raises BadRow if they cannot be converted."""
        converter = find_converter(written)
        if converter is None:
            raise BadRow('unknown columns')
        return check_row(converter(written))

    def encode(self, row: Row, written: Mapping[str, Any]) -> Encoded | None:
        """Encode `row` with the columns `written` instead of its own columns.

        Returns None if the row with these columns cannot be converted or encoded.
        """
        try:
            other = dataclasses.replace(self.convert(written), origin=row.origin, folder=row.folder)
            return self.encoder.encode([other])[0]
        except (BadRow, RowRefused, ConfigError):
            return None


def encode_batch(
    encoder: Encoder,
    rows: Sequence[Row],
    report: EncodingReport,
    result: Callable[[], list[Encoded]] | None = None,
) -> Iterator[tuple[Row, Encoded]]:
    """Encode rows, and yield (row, encoded row) for each row that can be trained on.

    Skipped rows, and notes on the other rows, are counted in `report`. If a row is longer than --max_length, --overlong
    decides: the row is yielded cut, yielded whole to be split by the caller, skipped, or counted in `report.refused`.
    Raises ConfigError if the embedding of the model has no row for a token id.

    If another thread is encoding the rows already, `result` is a function that waits for that thread. It returns the
    encoded rows, or raises the error of that thread. If `result` is None, the rows are encoded in the current thread.
    """
    try:
        encoded = result() if result else encoder.encode(rows)
    except RowRefused as error:
        if len(rows) == 1:
            detail = f' [{error.detail}]' if error.detail else ''
            report.left_out.add(error.reason, rows[0].origin + detail)
            report.account.skip(rows[0].written, LEFT_OUT)
            return

        # The error does not say which row of the batch was refused: halve the batch until it contains only this row.
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            yield from encode_batch(encoder, half, report)
        return

    for row, ids in zip(rows, encoded, strict=True):
        if trains_nothing([*ids.earlier, ids.trained]):
            report.left_out.add(NOTHING_TRAINED, row.origin)
            report.account.skip(row.written, LEFT_OUT)
            continue
        _check_embedded(encoder, row, ids)
        if 0 < encoder.max_length < len(ids.input_ids) and not _keeps_long(encoder, ids, row, report):
            report.account.skip(row.written, LEFT_OUT)
            continue
        for note in ids.notes:
            report.noted.add(note, row.origin)
        yield row, ids


def _keeps_long(encoder: Encoder, ids: Encoded, row: Row, report: EncodingReport) -> bool:
    """Return whether a row that is longer than --max_length is kept. If the row is not kept, count it in `report`.

    With the flag `--overlong split`, a row of plain text is kept, and the caller splits the row. No other row is kept.
    """
    # With --overlong cut, the encoder has cut the row already.
    if encoder.overlong == 'split' and ids.is_text:
        ids.notes.append(SPLIT)
        return True
    if encoder.overlong == 'drop':
        report.left_out.add(DROPPED, row.origin)
    else:
        report.refused.add(row.origin, len(ids.input_ids))
    return False


def _check_embedded(encoder: Encoder, row: Row, ids: Encoded) -> None:
    """Raise ConfigError if a token id of the row is too large for the embedding of the model."""
    if encoder.embedding is None:
        return

    largest = max(ids.input_ids)
    if largest >= encoder.embedding:
        raise ConfigError(
            f'{row.origin}: the token {encoder.tokenizer.decode([largest])!r} has the id {largest}, and the '
            f"model's embedding has only {encoder.embedding} rows. Remove the text of this token from the row, or take "
            'model and tokenizer from the same repository or folder.'
        )


def encode_rows(encoder: Encoder, rows: Sequence[Row], report: EncodingReport) -> tuple[EncodedRows, list[Row]]:
    """Encode rows, and return (encoded rows, rows that were encoded). The second list lacks the skipped rows.

    Skipped rows, and notes on the other rows, are counted in `report`. Raises ConfigError if a row is longer than
    --max_length and --overlong neither cuts, drops nor splits it.
    """
    encoded = EncodedRows()
    kept_rows = []
    again = EncodedAgain(encoder)
    for batch, result in _encode_ahead(encoder, batches(rows), lambda row: row):
        for row, ids in encode_batch(encoder, batch, report, result):
            for piece in encoder.pieces_of(ids, encoder.max_length):
                encoded.append(piece, row.origin)
            report.account.add(row, ids, again)
            kept_rows.append(row)

    report.refused.raise_if_any(encoder.overlong, encoder.max_length)
    return encoded, kept_rows


def batches(rows: Iterable[T], size: int = BATCH_ROWS) -> Iterator[list[T]]:
    """Yield the items in lists of `size` items. The last list may be shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _encode_ahead(
    encoder: Encoder, batches: Iterable[list[T]], row_of: Callable[[T], Row]
) -> Iterator[tuple[list[T], Callable[[], list[Encoded]]]]:
    """Yield (batch, function) for each batch. The function waits for the encoded rows of the batch and returns them.

    While the caller works on a batch, threads encode the next batches. `row_of` is a function that returns the row of
    an item of a batch.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        submitted: deque[tuple[list[T], Callable[[], list[Encoded]]]] = deque()
        for batch in batches:
            future = pool.submit(encoder.encode, [row_of(item) for item in batch])
            submitted.append((batch, future.result))
            if len(submitted) > _THREADS:
                yield submitted.popleft()

        yield from submitted


def _used_rows(plan: Plan, account: Account) -> Iterator[UsedRow]:
    """Yield each training row and each validation row once. Count the characters of all other rows in `account`."""
    for number, part in enumerate(plan.parts):
        position = -1
        for use, (_, raw, row) in part.used():
            if isinstance(row, BadRow):
                account.skip(raw, LEFT_OUT)
                continue

            position += 1
            if use == UNUSED:
                account.skip(raw, NOT_DRAWN)
            else:
                yield UsedRow(row, use, number, part.times(position) if use == TRAIN else 1)


def encode_used(encoder: Encoder, plan: Plan, report: EncodingReport) -> Iterator[list[tuple[UsedRow, Encoded]]]:
    """Encode the training and validation rows of a plan, and yield lists of (row, encoded row).

    Skipped rows, and notes on the other rows, are counted in `report`. With --overlong split, a long row of plain text
    gives several encoded rows.

    Raises ConfigError if a row is longer than --max_length and --overlong neither cuts, drops nor splits it. Also
    raises ConfigError if all rows of a data set of --val_dataset are skipped.
    """
    again = EncodedAgain(encoder)
    kept: Counter[int] = Counter()
    used_rows = batches(_used_rows(plan, report.account))
    for batch, result in _encode_ahead(encoder, used_rows, lambda one: one.row):
        used = {id(one.row): one for one in batch}
        encoded: list[tuple[UsedRow, Encoded]] = []
        for row, ids in encode_batch(encoder, [one.row for one in batch], report, result):
            encoded += [(used[id(row)], piece) for piece in encoder.pieces_of(ids, encoder.max_length)]
            report.account.add(row, ids, again)
        kept.update(one.part for one, _ in encoded)
        yield encoded

    report.refused.raise_if_any(encoder.overlong, encoder.max_length)
    for number in plan.val_sets():
        if not kept[number]:
            raise ConfigError(
                f'--val_dataset {plan.parts[number].name}: every row was skipped: {"; ".join(report.lines())}. Correct '
                'the rows, or name other data.'
            )


def encode_to_files(encoder: Encoder, plan: Plan, folder: Path) -> None:
    """Encode the training and validation rows of a plan, and write the encoded rows and the report to a folder.

    Raises ConfigError if no training row is left.
    """
    report = EncodingReport()
    files = {TRAIN: ('train', EncodedRows()), VAL: ('val', EncodedRows())}
    for batch in encode_used(encoder, plan, report):
        for one, ids in batch:
            files[one.use][1].append(ids, one.row.origin, part=one.part, times=one.times)
        for name, rows in files.values():
            rows.spill(folder, name)

    if not (folder / 'train.ids').stat().st_size:
        raise ConfigError(
            f'--dataset: every training row was skipped: {"; ".join(report.lines())}. Correct the rows, or name other '
            'data with --dataset.'
        )
    (folder / _REPORT).write_text(json.dumps(dataclasses.asdict(report)), encoding='utf-8')


def _cache_key(encoder: Encoder, plan: Plan) -> str:
    """Return the cache key of the encoded rows: a hash of everything that decides their token ids.

    The hash covers the rows, the tokenizer, the template, the flags, the code and the library versions. It also covers
    which rows are for training and which are for validation.
    """
    digest = hashlib.sha256(plan.digest.encode())
    digest.update(json.dumps(encoder.identity(), sort_keys=True).encode())

    with tempfile.TemporaryDirectory() as name:
        encoder.tokenizer.save_pretrained(name)
        if encoder.images is not None:
            encoder.images.save(Path(name))
        files = sorted(Path(name).rglob('*'))
        utils = Path(__file__).parents[1]
        code = [file for part in _DECIDES_IDS for file in sorted(utils.glob(part))]
        for file in (f for f in [*files, *code] if f.is_file()):
            digest.update(f'{file.name}:{file.stat().st_size}\n'.encode())
            digest.update(file.read_bytes())

    for library in ('transformers', 'tokenizers', 'jinja2'):
        digest.update(f'{library} {version(library)}\n'.encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The training and validation rows of a run, and the facts about them for run.json."""

    train: EncodedRows | TrainingStream
    val: EncodedRows
    summary: dict[str, Any]
    # (number of rows rendered with the template's thinking switch, number of all rows). For a stream, only its first
    # rows are counted.
    switched: tuple[int, int] = (0, 0)
    # The names of the sets of --val_dataset, by the number of their part. Empty if there are fewer than two.
    val_sets: Mapping[int, str] = field(default_factory=dict)
    # Returns the facts that are known only after training: the counts of a stream.
    at_end: Callable[[], dict[str, Any]] = dict

    def final(self) -> dict[str, Any]:
        """Return all facts about the rows for run.json, after training. Every process must call this method."""
        return {**self.summary, **self.at_end()}

    def spread(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` training rows, evenly spaced. For a stream, return `self.train.first(count)`."""
        if not isinstance(self.train, EncodedRows):
            return self.train.first(count)
        count = min(count, len(self.train))
        return [self.train[i * len(self.train) // count] for i in range(count)]


def encode_plan(encoder: Encoder, plan: Plan) -> tuple[EncodedRows, EncodedRows, EncodingReport]:
    """Return the encoded training rows, the encoded validation rows, and the encoding report.

    The report also counts the rows that `plan` left out. If the same rows were encoded before, the encoded rows and the
    report are read from the cache.
    """
    name = f'data-{_cache_key(encoder, plan)[:40]}'
    with dist.local_main_first():
        folder = cached_folder(name, lambda unfinished: encode_to_files(encoder, plan, unfinished))
    train = EncodedRows.map(folder, 'train')
    val = EncodedRows.map(folder, 'val')

    stored = json.loads((folder / _REPORT).read_text(encoding='utf-8'))
    report = EncodingReport(
        left_out=Tally(**stored['left_out']),
        noted=Tally(**stored['noted']),
        account=Account(**stored['account']),
    )
    report.left_out.merge(plan.left_out)
    return train, val, report


def prepare_data(encoder: Encoder, plan: Plan, run_dir: Path, *, samples: int = 1) -> PreparedData:
    """Return the encoded rows of a run.

    Logs how many rows were skipped, how many got a note when they were encoded, and why. Logs the first `samples`
    training rows, and writes them to sample.txt.
    """
    train, val, report = encode_plan(encoder, plan)
    statistics = {'train': length_statistics(train), 'validation': length_statistics(val)}
    log_report(report, statistics)
    mixture = _trained_of_each_part(plan, train) if plan.mixed else {}
    sets = rows_of_sets(plan, val)
    show_samples(encoder.tokenizer, [train[index] for index in range(min(samples, len(train)))], run_dir)

    summary = {**statistics, **mixture, **sets, **report.counts(), 'served': served_by(plan.parts)}
    switched = (report.switched, train.stored + val.stored)
    return PreparedData(train=train, val=val, summary=summary, switched=switched, val_sets=names_of_sets(plan))


def names_of_sets(plan: Plan) -> dict[int, str]:
    """Return the names that metrics use for the data sets of --val_dataset, for example {2: 'math', 3: 'code'}.

    Each key is the index of a data set in `plan.parts`. Returns {} if --val_dataset names fewer than two data sets.
    """
    names = plan.val_sets()
    return names if len(names) > 1 else {}


def rows_of_sets(plan: Plan, val: EncodedRows) -> dict[str, Any]:
    """Log how many encoded rows each data set of --val_dataset has, and return these numbers for run.json.

    For example, {'validation_sets': {'math': 100, 'code': 50}}. Returns {} if there is no --val_dataset.
    """
    counts = Counter(val.parts().tolist())
    rows = {name: counts[number] for number, name in plan.val_sets().items()}
    if not rows:
        return {}
    logger.info('validation sets: ' + ', '.join(f'{name} {count} rows' for name, count in rows.items()))
    return {'validation_sets': rows}


def _trained_of_each_part(plan: Plan, train: EncodedRows) -> dict[str, Any]:
    """Return for run.json how many rows of each data set an epoch trains.

    For example, {'mixture': {'a.jsonl': 700, 'b.jsonl': 300}}. A row that is trained twice in an epoch counts twice. If
    skipped rows make the number of a data set smaller than planned, logs a warning.
    """
    counts = Counter(train.parts().tolist())
    trained: dict[str, int] = {}
    for number, part in enumerate(plan.parts):
        if part.is_val:
            continue
        trained[part.name] = counts[number]
        if counts[number] < part.trained_rows():
            logger.warning(
                f'mixture: {part.name} gives {counts[number]} rows instead of {part.trained_rows()}, because some of '
                'its rows were skipped'
            )
    if train.stored != len(train):
        logger.info(
            'mixture: an epoch trains some rows several times. The numbers of characters, notes and skipped rows above '
            'count each row once.'
        )
    return {'mixture': trained}

"""Rows to token ids: in batches, kept in flat files, with every row that is left out or altered counted and named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.cache import cached_folder
from utils.base.errors import ConfigError
from utils.data.encoded_rows import EncodedRows, length_statistics
from utils.data.parts import TRAIN, UNUSED, VAL
from utils.data.plan import Plan, served_by
from utils.data.tally import EncodingReport, Tally, log_report
from utils.encode.account import LEFT_OUT, NOT_DRAWN, Account
from utils.encode.encoded import (
    NOTHING_TRAINED,
    Encoded,
    RowRefused,
    trains_nothing,
)
from utils.encode.encoder import Encoder
from utils.encode.show import show_samples
from utils.formats.columns import check_row, find_converter
from utils.formats.conversation import BadRow, Row

BATCH_ROWS = 1024
# Batches in work at once: while the tokenizer, which needs no Python, has one, the next is rendered.
_AT_ONCE = 2
_REPORT = 'report.json'
# The code that decides which ids a row becomes, as globs in utils/.
_DECIDES_IDS = ('preprocess.py', 'formats/*.py', 'encode/*.py', 'data/*.py', 'loading/image_processors.py')


class EncodedAgain:
    """Encodes rows once more with other data in them, which the account asks for where words alone cannot tell."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @property
    def printed(self) -> str:
        """Return the text that the template prints by itself."""
        return self.encoder.text.printed + (self.encoder.system or '')

    def convert(self, written: Mapping[str, Any]) -> Row:
        """Return the row of what was written; raises BadRow where it is none."""
        converter = find_converter(written)
        if converter is None:
            raise BadRow('no known shape')
        return check_row(converter(written))

    def encode(self, row: Row, written: Mapping[str, Any]) -> Encoded | None:
        """Return a row encoded as if this had been written; None where it could not be trained then."""
        try:
            other = dataclasses.replace(self.convert(written), origin=row.origin, folder=row.folder)
            return self.encoder.encode([other])[0]
        except (BadRow, RowRefused, ConfigError):
            return None


def encode_batch(
    encoder: Encoder, rows: Sequence[Row], report: EncodingReport, result: Callable[[], list[Encoded]] | None = None
) -> Iterator[tuple[Row, Encoded]]:
    """Yield the rows that the template does not refuse, encoded; what is left out or noted goes to the report.

    `result` waits for what encoding these rows gave or raised, where it was begun already.
    """
    try:
        encoded = result() if result else encoder.encode(rows)
    except RowRefused as error:
        if len(rows) == 1:
            detail = f' [{error.detail}]' if error.detail else ''
            report.left_out.add(error.reason, rows[0].origin + detail)
            report.account.skip(rows[0].written, LEFT_OUT)
            return
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            yield from encode_batch(encoder, half, report)
        return
    for row, ids in zip(rows, encoded, strict=True):
        if trains_nothing([*ids.earlier, ids.trained]):
            report.left_out.add(NOTHING_TRAINED, row.origin)
            report.account.skip(row.written, LEFT_OUT)
            continue
        _check_embedded(encoder, row, ids)
        for note in ids.notes:
            report.noted.add(note, row.origin)
        yield row, ids


def _check_embedded(encoder: Encoder, row: Row, ids: Encoded) -> None:
    """Raise ConfigError where a row holds an id that the model does not embed."""
    if encoder.embedding is not None and (largest := max(ids.input_ids)) >= encoder.embedding:
        raise ConfigError(
            f'{row.origin}: the row holds {encoder.tokenizer.decode([largest])!r}, a token of id {largest}; the model '
            f'embeds {encoder.embedding}. Leave out what spells this token, or take model and tokenizer from the same '
            'place.'
        )


def encode_rows(encoder: Encoder, rows: Sequence[Row], report: EncodingReport) -> tuple[EncodedRows, list[Row]]:
    """Return the encoded rows and the rows they came from; what was left out or noted is added to the report."""
    encoded, kept_rows, again = EncodedRows(), [], EncodedAgain(encoder)
    for start in range(0, len(rows), BATCH_ROWS):
        for row, ids in encode_batch(encoder, rows[start : start + BATCH_ROWS], report):
            encoded.append(ids, row.origin)
            report.account.add(row, ids, again)
            kept_rows.append(row)
    return encoded, kept_rows


def batches(rows: Iterable[Any], size: int = BATCH_ROWS) -> Iterator[list[Any]]:
    """Yield the items in lists of `size`, the last one shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _begun(
    encoder: Encoder, batches: Iterable[list[tuple[int, Row]]]
) -> Iterator[tuple[list[tuple[int, Row]], Callable[[], list[Encoded]]]]:
    """Yield each batch with what waits for its ids; the next ones are in work meanwhile."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        begun = deque[Any]()
        for batch in batches:
            begun.append((batch, pool.submit(encoder.encode, [row for _, row in batch]).result))
            if len(begun) > _AT_ONCE:
                yield begun.popleft()
        yield from begun


def _drawn(plan: Plan, account: Account) -> Iterator[tuple[int, Row]]:
    """Yield the rows that are encoded, each with its use; the others go to the account."""
    for use, (_, raw, row) in plan.used():
        if isinstance(row, BadRow):
            account.skip(raw, LEFT_OUT)
        elif use == UNUSED:
            account.skip(raw, NOT_DRAWN)
        else:
            yield use, row


def encode_to_files(encoder: Encoder, plan: Plan, folder: Path) -> None:
    """Encode the rows of a plan into files of a folder, a batch at a time, and write the report beside them."""
    report, again = EncodingReport(), EncodedAgain(encoder)
    files = {TRAIN: ('train', EncodedRows()), VAL: ('val', EncodedRows())}
    for batch, result in _begun(encoder, batches(_drawn(plan, report.account))):
        uses = {id(row): use for use, row in batch}
        for row, ids in encode_batch(encoder, [row for _, row in batch], report, result):
            files[uses[id(row)]][1].append(ids, row.origin)
            report.account.add(row, ids, again)
        for name, rows in files.values():
            rows.spill(folder, name)
    if not (folder / 'train.ids').stat().st_size:
        raise ConfigError('every training row is left out: ' + '; '.join(report.lines()))
    (folder / _REPORT).write_text(json.dumps(dataclasses.asdict(report)), encoding='utf-8')


def _key(encoder: Encoder, plan: Plan) -> str:
    """Return a hash of all that decides the ids: rows and uses, tokenizer, template, flags, code and libraries."""
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
    """What a run trains on (EncodedRows, or a stream) and validates on, and what run.json says about it."""

    train: Any
    val: EncodedRows
    summary: dict[str, Any]
    # How many rows were rendered with the template's thinking switch, of how many; of a stream, of its first ones.
    switched: tuple[int, int] = (0, 0)
    # What is known of a stream at its end alone.
    at_end: Callable[[], dict[str, Any]] = dict

    def final(self) -> dict[str, Any]:
        """Return all that run.json says, after training. Every process must call it."""
        return {**self.summary, **self.at_end()}

    def spread(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` training rows, evenly from all of them; of a stream, the first ones."""
        if not isinstance(self.train, EncodedRows):
            rows: list[dict[str, Any]] = self.train.first(count)
            return rows
        count = min(count, len(self.train))
        return [self.train[i * len(self.train) // count] for i in range(count)]


def encode_plan(encoder: Encoder, plan: Plan) -> tuple[EncodedRows, EncodedRows, EncodingReport]:
    """Return the rows of training and validation encoded, from the cache where they are, and what happened to rows."""
    name = f'data-{_key(encoder, plan)[:40]}'
    with dist.local_main_first():
        folder = cached_folder(name, lambda aside: encode_to_files(encoder, plan, aside))
    train, val = EncodedRows.map(folder, 'train'), EncodedRows.map(folder, 'val')
    stored = json.loads((folder / _REPORT).read_text(encoding='utf-8'))
    report = EncodingReport(
        left_out=Tally(**stored['left_out']), noted=Tally(**stored['noted']), account=Account(**stored['account'])
    )
    report.left_out.merge(plan.left_out)
    return train, val, report


def prepare_data(encoder: Encoder, plan: Plan, run_dir: Path, *, samples: int = 1) -> PreparedData:
    """Return the rows encoded; logs what happened, shows some (sample.txt)."""
    train, val, report = encode_plan(encoder, plan)
    statistics = {'train': length_statistics(train), 'validation': length_statistics(val)}
    log_report(report, statistics)
    show_samples(encoder.tokenizer, [train[index] for index in range(min(samples, len(train)))], run_dir)
    summary = {**statistics, **report.counts(), 'served': served_by(plan.parts)}
    switched = (report.switched, len(train) + len(val))
    return PreparedData(train=train, val=val, summary=summary, switched=switched)

"""The data check (--check_dataset true): find all problems in the data of a run. No weights are loaded.

Memory use does not grow with the size of the data.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from utils.base.errors import ConfigError
from utils.base.files import write_json
from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Ready, run_name
from utils.data.encode_plan import EncodedAgain, batches, encode_batch
from utils.data.encoding_report import EncodingReport
from utils.data.parts import TRAIN, UNUSED, VAL, ReadRow, row_notes
from utils.data.plan import Plan
from utils.data.tally import Tally
from utils.encode.account import LEFT_OUT, NOT_DRAWN, Account
from utils.encode.encoded import CONTROL_TOKENS, CUT_PROMPT, CUT_REPLY, Encoded
from utils.encode.encoder import Encoder, cut_row
from utils.formats.conversation import BadRow, Filtered, Message, Row
from utils.loading.folder import read_config
from utils.loading.gguf import dense_directory
from utils.loading.new_tokens import add_to_tokenizer
from utils.loading.weights import locate
from utils.model import load_tokenizer
from utils.run.lineage import find_new_tokens
from utils.run.open_model import open_encoder
from utils.run.rows import plan_of

DUPLICATE = 'duplicate row'
CONFLICT = 'same prompt, different answer'
LEAKED = 'validation row that is in the training set'
EMPTY_EARLIER = 'empty earlier reply'
PAST_POSITIONS = 'longer than the {} positions that config.json of the model states'
MOJIBAKE = 'mojibake: UTF-8 that was read as another encoding'

_WEIGHTS = ('*.safetensors', '*.bin', '*.pt', '*.pth', '*.gguf', '*.onnx', '*.msgpack', '*.h5')
_REPLY_COLUMNS = ('messages', 'conversations', 'response', 'output')
_TEXT_COLUMNS = (*_REPLY_COLUMNS, 'system', 'history', 'query', 'instruction', 'input', 'tools')
_CONTROL = re.compile(r'<\|[A-Za-z_]{2,}\|>')
# The second and later bytes of a UTF-8 character are 80 to BF. _LATER matches the characters that these bytes are in
# Latin-1 and in Windows-1252.
_LATER = '[\x80-\xbf' + bytes(i for i in range(0x80, 0xA0) if i not in b'\x81\x8d\x8f\x90\x9d').decode('cp1252') + ']'
_MOJIBAKE = re.compile(f'[ÂÃ]{_LATER}|(?:[ÐÑ]{_LATER}){{2}}|[à-ï]{_LATER}{{2}}|ð{_LATER}{{3}}|\ufffd|锟斤拷|烫烫烫')
# The role of the previous turn ('' at the start), and the roles that may follow it.
_MAY_FOLLOW = {'': ('user',), 'user': ('assistant',), 'assistant': ('user', 'tool'), 'tool': ('assistant', 'tool')}


class Findings(Tally):
    """A tally that also writes each counted row to a file of JSON lines."""

    def __init__(self, kind: str, stream: TextIO, skip: Sequence[str] = ()) -> None:
        """Set up an empty tally. Rows with a reason in `skip` are neither counted nor written."""
        super().__init__()
        self.kind = kind
        self.stream = stream
        self.skip = skip

    def add(self, reason: str, place: str, column: str = '', of: str = '') -> None:
        """Count one row, and write its location and column to the file.

        If the row has the same content as a second row, `of` is the location of the second row.
        """
        if reason in self.skip:
            return
        super().add(reason, f'{place} {column}'.strip() + (f' of {of}' if of else ''))

        match = re.fullmatch(r'(.*?):(?: row | object )?(\d+)', place)
        file, line = (match[1], int(match[2])) if match else (place, None)
        record = {'kind': self.kind, 'reason': reason, 'file': file, 'line': line, 'column': column}
        if of:
            record['of'] = of
        self.stream.write(json.dumps(record, ensure_ascii=False) + '\n')


class Seen:
    """Finds rows and prompts that occurred earlier. Hash and location of each are in a file, not in memory."""

    def __init__(self, file: Path) -> None:
        self._database = sqlite3.connect(file, isolation_level=None)
        for statement in ('pragma journal_mode=off', 'pragma synchronous=off', 'begin',
                          'create table seen (hash integer primary key, place text, use integer)'):  # fmt: skip
            self._database.execute(statement)

    def find_earlier(self, content: Any, place: str, use: int) -> tuple[str, int] | None:
        """Return (location, use) of the earlier row that has the same content.

        If no earlier row has the same content, this content is stored, and None is returned.
        """
        digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).digest()
        key = int.from_bytes(digest, 'big', signed=True)
        is_new = self._database.execute('insert or ignore into seen values (?, ?, ?)', (key, place, use)).rowcount
        if is_new:
            return None

        earlier: tuple[str, int]
        earlier = self._database.execute('select place, use from seen where hash = ?', (key,)).fetchone()
        return earlier


@dataclass(kw_only=True)
class Lengths:
    """Counts tokens per row, tokens that --max_length cuts, and the trained share of the remaining tokens."""

    max_length: int
    tokenizer: Any
    longest: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    histogram: Counter[int] = field(default_factory=Counter)

    def add(self, row: Encoded) -> Encoded:
        """Add a row that is not cut yet to the counts. Returns the row, cut to --max_length as in training."""
        length = len(row.input_ids)
        cut = cut_row(row, self.max_length, self.tokenizer)
        lost = length - len(cut.input_ids)
        trained = sum(end - start for start, end in (*cut.earlier, cut.trained))

        self.counts.update(rows=1, tokens=length, rows_cut=int(lost > 0), tokens_lost=lost, trained=trained)
        self.longest = max(self.longest, length)
        self.histogram[(length - 1).bit_length()] += 1
        return cut

    def record(self) -> dict[str, Any]:
        """Return the numbers for the report.

        `rows_up_to` is a histogram of the lengths. Each key is a power of two, and its value counts the rows with at
        most this many tokens that are not counted under a smaller key.
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


def wrong_order(messages: Sequence[Message]) -> str | None:
    """Return a text that says what is wrong with the order of the roles. Returns None if the order is correct."""
    turns = messages[1:] if messages[0]['role'] == 'system' else messages
    before = ''
    called = False
    for turn in turns:
        role = turn['role']
        if role not in _MAY_FOLLOW[before]:
            return f'wrong role order: {role} ' + (f'after {before}' if before else 'at the start')
        if role == 'tool' and before == 'assistant' and not called:
            return 'wrong role order: tool without a call before it'
        before = role
        called = 'tool_calls' in turn
    return None


def _reply_column(raw: dict[str, Any]) -> str:
    return next((column for column in _REPLY_COLUMNS if column in raw), '')


class DataCheck:
    """Examines rows, one batch at a time, and collects the findings."""

    def __init__(
        self, encoder: Encoder, max_length: int, stream: TextIO, seen: Seen, positions: int | None = None
    ) -> None:
        """`positions` is the number of positions in the model's config.json, or None if it has no such number."""
        self.encoder = encoder
        self.seen = seen
        self.positions = positions
        self.left_out = Findings('left_out', stream)
        self.defects = Findings('defect', stream)
        self.noted = Findings('noted', stream, skip=[CONTROL_TOKENS])
        self.filtered = Findings('filtered', stream)
        self.lengths = Lengths(max_length=max_length, tokenizer=encoder.tokenizer)
        self.account = Account()
        # Log lines that describe what is excluded from training on purpose.
        self.decisions: list[str] = []
        self.rows: Counter[str] = Counter(dict.fromkeys(('read', 'kept', 'train', 'validation', 'not_drawn'), 0))

    def bad_line(self, place: str, problem: str) -> None:
        """Count a line or a file that cannot be read, and write it to the file of findings."""
        self.rows['read'] += 1
        self.left_out.add(problem, place)

    def examine(self, batch: Sequence[tuple[int, ReadRow]]) -> None:
        """Check each (use, row) pair for problems. Rows that are used for training or validation are also encoded."""
        encoded: list[Row] = []
        columns: dict[str, str] = {}
        for use, (place, raw, row) in batch:
            self.rows['read'] += 1
            if isinstance(row, BadRow):
                found = self.filtered if isinstance(row, Filtered) else self.left_out
                found.add(str(row), place, row.column or _reply_column(raw))
                self.account.skip(raw, LEFT_OUT)
                continue

            self.rows['kept'] += 1
            self.rows[{UNUSED: 'not_drawn', TRAIN: 'train', VAL: 'validation'}[use]] += 1
            columns[place] = _reply_column(raw)
            for note in row_notes(row):
                self.noted.add(note, place, columns[place])
            self._check_text(place, raw)
            self._check_repetition(use, row, columns[place])

            if problem := wrong_order(row.messages):
                self.defects.add(problem, place, columns[place])
                self.account.skip(raw, LEFT_OUT)
            elif use != UNUSED:
                encoded.append(row)
            else:
                self.account.skip(raw, NOT_DRAWN)

            earlier_replies = (m for m in row.messages[:-1] if m['role'] == 'assistant' and 'tool_calls' not in m)
            if any(not message['content'].strip() for message in earlier_replies):
                self.defects.add(EMPTY_EARLIER, place, 'history' if raw.get('history') else columns[place])

        self._measure(encoded, columns)

    def _check_text(self, place: str, raw: dict[str, Any]) -> None:
        for column in _TEXT_COLUMNS:
            value = raw.get(column)
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            if _MOJIBAKE.search(text):
                self.defects.add(MOJIBAKE, place, column)
            if _CONTROL.search(text) or self.encoder.text.has_control(text):
                self.defects.add(CONTROL_TOKENS, place, column)

    def _check_repetition(self, use: int, row: Row, column: str) -> None:
        same_row = self.seen.find_earlier([row.messages, row.tools, row.images], row.origin, use)
        if same_row:
            earlier, earlier_use = same_row
            if {use, earlier_use} != {TRAIN, VAL}:
                self.defects.add(DUPLICATE, row.origin, column, of=earlier)
            elif use == VAL:
                self.defects.add(LEAKED, row.origin, column, of=earlier)
            else:
                self.defects.add(LEAKED, earlier, column, of=row.origin)
            return

        same_prompt = self.seen.find_earlier([row.messages[:-1], row.tools, row.images], row.origin, use)
        if same_prompt:
            self.defects.add(CONFLICT, row.origin, column, of=same_prompt[0])

    def _measure(self, rows: Sequence[Row], columns: dict[str, str]) -> None:
        """Encode rows and count their lengths, cuts and notes.

        If a batch cannot be encoded, it is split in halves until the bad row is the only row of a batch.
        """
        report = EncodingReport(left_out=self.left_out, noted=self.noted, account=self.account)
        again = EncodedAgain(self.encoder)
        try:
            for row, ids in encode_batch(self.encoder, rows, report):
                cut = self.lengths.add(ids)
                self.account.add(row, cut, again)
                if self.positions is not None and len(cut.input_ids) > self.positions:
                    self.noted.add(PAST_POSITIONS.format(self.positions), row.origin, columns[row.origin])
                for note in {CUT_PROMPT, CUT_REPLY}.intersection(cut.notes):
                    self.defects.add(note, row.origin, columns[row.origin])
        except ConfigError as error:
            if len(rows) == 1:
                row = rows[0]
                reason = str(error).replace(row.origin, '').lstrip(': ')
                self.left_out.add(reason, row.origin, columns[row.origin])
                self.account.skip(row.written, LEFT_OUT)
                return

            middle = len(rows) // 2
            self._measure(rows[:middle], columns)
            self._measure(rows[middle:], columns)

    def record(self, args: SftArguments) -> dict[str, Any]:
        """Return the content of dataset_report.json."""
        return {
            'dataset': args.dataset,
            'clean': bool(self.rows['kept']) and not (self.left_out or self.defects),
            'rows': {**self.rows, 'filtered': len(self.filtered), 'left_out': len(self.left_out)},
            'left_out': _by_reason(self.left_out),
            'defects': _by_reason(self.defects),
            'noted': _by_reason(self.noted),
            'filtered': _by_reason(self.filtered),
            'decisions': self.decisions,
            'lengths': self.lengths.record(),
            'account': self.account.record(),
        }

    def lines(self, record: dict[str, Any]) -> list[str]:
        """Return the report as lines of text. `record` is the result of `record()`."""
        lengths = {name: value for name, value in record['lengths'].items() if name != 'rows_up_to'}
        return [
            'rows: ' + ', '.join(f'{name} {count}' for name, count in record['rows'].items()),
            *self.filtered.lines('skipped on purpose'),
            *self.left_out.lines('skipped'),
            *self.defects.lines('suspect'),
            *self.noted.lines('noted'),
            *self.decisions,
            'tokens per row: ' + ', '.join(f'up to {n}: {c}' for n, c in record['lengths']['rows_up_to'].items()),
            'lengths: ' + ', '.join(f'{name} {value}' for name, value in lengths.items()),
            *self.account.lines(),
        ]


def _by_reason(findings: Findings) -> dict[str, dict[str, Any]]:
    """Return {reason: {'rows': number of rows, 'first': locations of the first rows}}."""
    return {reason: {'rows': n, 'first': findings.places[reason]} for reason, n in findings.counts.items()}


def check_dataset(done: Ready[SftArguments]) -> int:
    """Read the data that the run would read, and print its problems. Returns 0 if there are no problems, else 1.

    Writes <output_dir>/<model>/dataset_report.json, and each finding as one line of dataset_report.jsonl.
    """
    args = done.args
    weights = locate(done.info, revision=args.model_revision, hub_name=args.hub, skip=_WEIGHTS)
    folder = dense_directory(weights.path) if weights.path.is_file() else weights.path
    tokenizer = load_tokenizer(folder, model_type=args.model_type)
    if tokens := find_new_tokens(args):
        add_to_tokenizer(tokenizer, tokens)
    encoder = open_encoder(args, tokenizer, system_typed='system' in done.typed, cuts=False)

    report = Path(args.output_dir) / run_name(args) / 'dataset_report.json'
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.with_suffix('.jsonl').open('w', encoding='utf-8') as stream, tempfile.TemporaryDirectory() as scratch:
        seen = Seen(Path(scratch) / 'seen.db')
        check = DataCheck(encoder, args.max_length, stream, seen, _positions(folder))
        for batch in batches(_plan(args, check).used()):
            check.examine(batch)

    record = check.record(args)
    write_json(report, record)
    print('\n'.join(check.lines(record)))
    logger.info(f'report: {report}, every finding with its location: {report.with_suffix(".jsonl")}')
    return 0 if record['clean'] else 1


def _positions(folder: Path) -> int | None:
    """Return the number of positions in the config.json of a folder. Returns None if it has no such number."""
    config = read_config(folder) if (folder / 'config.json').is_file() else {}
    config = config.get('text_config') or config
    stated = config.get('max_position_embeddings') or config.get('n_positions')
    return stated if isinstance(stated, int) else None


def _plan(args: SftArguments, check: DataCheck) -> Plan:
    """Return the plan of the run, and count the lines that cannot be read.

    The check reads the rows a second time, and then it does not count these lines again.
    """
    planning = True

    def bad_line(place: str, problem: str) -> None:
        if planning:
            check.bad_line(place, problem)

    plan = plan_of(args, args.train_dataset_sample, bad=bad_line)
    planning = False
    check.decisions = plan.decisions(args.loss_scope)
    return plan

"""The data check (--check_dataset true): finds problems in the data of a run, without running the model.

Memory does not hold the rows, only a few bytes for each row.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from utils.base.errors import ConfigError
from utils.base.files import write_json
from utils.base.logger import logger
from utils.base.names import Overlong
from utils.checks import clean_copy
from utils.checks.clean_copy import NOT_DRAWN_ROW, OF_VALIDATION, CleanCopy
from utils.checks.repetition import Seen, SeenRow, content_of
from utils.cli.arguments import SftArguments, without_amount
from utils.cli.resolution import Ready, run_name
from utils.data.encode_plan import EncodedAgain, batches, encode_batch
from utils.data.encoding_report import EncodingReport
from utils.data.parts import TRAIN, UNUSED, VAL, ReadRow, row_notes
from utils.data.plan import Plan
from utils.data.tally import Tally, counted
from utils.encode.account import LEFT_OUT, NOT_DRAWN, Account
from utils.encode.encoded import (
    CONTROL_TOKENS,
    CUTS,
    DROPPED,
    REASONING_LEFT_OUT,
    REFUSED,
    SPLIT,
    SYSTEM_IGNORED,
    TOOLS_IGNORED,
    Encoded,
    RowRefused,
)
from utils.encode.encoder import Encoder, cut_row
from utils.formats.columns import EMPTY_REPLY, NO_USER_TURN, SAME_ROLE_TWICE
from utils.formats.conversation import BadRow, Filtered, Message, Row
from utils.formats.images import replace_tags
from utils.loading.folder import read_config
from utils.loading.gguf import dense_directory
from utils.loading.image_processors import open_images_of_folder
from utils.loading.new_tokens import add_to_tokenizer
from utils.loading.weights import locate
from utils.model import load_tokenizer
from utils.run.new_tokens import find_new_tokens
from utils.run.open_model import open_encoder
from utils.run.processes import leave_out_unused
from utils.run.rows import plan_of

DUPLICATE = 'duplicate row'
CONFLICT = 'same prompt, different answer'
LEAKED = 'validation row that is in the training set'
EMPTY_EARLIER = 'empty earlier reply'
PAST_POSITIONS = 'longer than the {} positions that config.json of the model states'
MOJIBAKE = 'mojibake: UTF-8 that was read as another encoding'

# Notes about a field of the conversation that the template never prints, so the model never gets it.
LOST = (REASONING_LEFT_OUT, TOOLS_IGNORED, SYSTEM_IGNORED)
# Notes about a row for which the check has a finding of its own.
_FOUND_ANYWAY = (CONTROL_TOKENS, EMPTY_REPLY, NO_USER_TURN, *SAME_ROLE_TWICE.values())
# The end of a note about a column or key that is not used.
_NOT_USED = ' is not used'
# The verdict names at most this number of columns and keys.
_NAMED = 5

_WEIGHTS = ('*.safetensors', '*.bin', '*.pt', '*.pth', '*.gguf', '*.onnx', '*.msgpack', '*.h5')
_REPLY_COLUMNS = ('messages', 'conversations', 'response', 'output', 'completion', 'answer', 'text')
_ASKED_COLUMNS = ('query', 'instruction', 'input', 'prompt', 'question')
_TEXT_COLUMNS = (*_REPLY_COLUMNS, 'system', 'history', *_ASKED_COLUMNS, 'tools')
_CONTROL = re.compile(r'<\|[A-Za-z_]{2,}\|>')
# The second and later bytes of a UTF-8 character are 80 to BF. _LATER matches the characters that these bytes are in
# Latin-1 and in Windows-1252.
_LATER = '[\x80-\xbf' + bytes(i for i in range(0x80, 0xA0) if i not in b'\x81\x8d\x8f\x90\x9d').decode('cp1252') + ']'
_MOJIBAKE = re.compile(f'[ÂÃ]{_LATER}|(?:[ÐÑ]{_LATER}){{2}}|[à-ï]{_LATER}{{2}}|ð{_LATER}{{3}}|\ufffd|锟斤拷|烫烫烫')
# The role of the previous turn ('' at the start), and the roles that may follow it.
_MAY_FOLLOW = {'': ('user',), 'user': ('assistant',), 'assistant': ('user', 'tool'), 'tool': ('assistant', 'tool')}


class Findings(Tally):
    """Counts rows by reason, and writes the reason and the location of each row to a file of JSON lines.

    A row that has the same problem in two columns is counted and written twice.
    """

    def __init__(
        self,
        kind: str,
        stream: TextIO,
        *,
        found: set[str] | None = None,
        instead: Mapping[str, Findings | None] | None = None,
    ) -> None:
        """Set up an empty tally.

        `kind` is written with each row, e.g. 'defect'. `stream` is the open file of findings (dataset_report.jsonl).
        The location of each row is added to the set `found`, if it is given.

        `instead` maps a reason to the findings that get the rows with this reason. If they are None, the rows are
        neither counted nor written.
        """
        super().__init__()
        self.kind = kind
        self.stream = stream
        self.found = found
        self.instead = instead or {}

    def add(self, reason: str, place: str, column: str = '', of: str = '', row: str = '') -> None:
        """Count one row, and write its location and `column` to the file of findings.

        `column` is the column with the problem, or '' for the whole row. If another row has the same content or the
        same prompt, `of` is the location of the other row. `row` is the location of the row that is examined now, if it
        is not `place`.
        """
        if reason in self.instead:
            other = self.instead[reason]
            if other is not None:
                other.add(reason, place, column)
            return

        super().add(reason, f'{place} {column}'.strip() + (f' of {of}' if of else ''))
        if self.found is not None:
            examined = row or place  # the path of an image may follow it in brackets
            self.found.add(examined.rpartition(' [')[0] if examined.endswith(']') else examined)

        # A row can have a detail, for example the image that cannot be read: rows.jsonl:3 [x.png].
        match = re.fullmatch(r'(.*?):(?: row | object )?(\d+)(?: \[(.*)\])?', place, flags=re.DOTALL)
        file, line = (match[1], int(match[2])) if match else (place, None)
        record = {'kind': self.kind, 'reason': reason, 'file': file, 'line': line, 'column': column}
        if match and match[3]:
            record['detail'] = match[3]
        if of:
            record['of'] = of
        self.stream.write(json.dumps(record, ensure_ascii=False) + '\n')


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
        self,
        encoder: Encoder,
        max_length: int,
        stream: TextIO,
        seen: Seen,
        positions: int | None = None,
        copy: CleanCopy | None = None,
    ) -> None:
        """Set up a check that has examined no rows. It writes its findings to the open file `stream`.

        `seen` stores the rows that were examined. `positions` is the maximum number of tokens per row in the model's
        config.json, or None if the config has no such number. `copy` is the file of --write_clean. It gets the
        rows that can be trained on, except rows that are not drawn, rows of validation sets, and repeated rows.
        """
        self.encoder = encoder
        self.copy = copy
        self.seen = seen
        self.positions = positions
        # The rows of the current batch that have a problem, and the number of all earlier ones.
        self._found: set[str] = set()
        self._rows_found = 0
        self.stops = Findings('stops', stream, found=self._found)
        self.left_out = Findings('left_out', stream, found=self._found)
        self.lost = Findings('lost', stream, found=self._found)
        self.defects = Findings('defect', stream, found=self._found)
        self.noted = Findings(
            'noted', stream, instead={**dict.fromkeys(_FOUND_ANYWAY), **dict.fromkeys(LOST, self.lost)}
        )
        self.filtered = Findings('filtered', stream)
        self.lengths = Lengths(max_length=max_length, tokenizer=encoder.tokenizer, overlong=encoder.overlong)
        self.account = Account()
        # Log lines that describe what is excluded from training on purpose.
        self.decisions: list[str] = []
        self.rows: Counter[str] = Counter(dict.fromkeys(('read', 'kept', 'train', 'validation', 'not_drawn'), 0))

    def bad_line(self, place: str, problem: str) -> None:
        """Count a line or a file that cannot be read, and write it to the file of findings."""
        self.rows['read'] += 1
        self.stops.add(problem, place)
        self._count_found()

    def _count_found(self) -> None:
        self._rows_found += len(self._found)
        self._found.clear()

    def examine(self, batch: Sequence[tuple[int, ReadRow]], *, is_val: bool = False) -> None:
        """Check each (use, row) pair for problems. `use` is TRAIN, VAL or UNUSED.

        Rows with the use TRAIN or VAL are also encoded. A BadRow, which cannot be trained on, is only counted.

        `is_val` says whether the rows are from a validation split or from --val_dataset. Such rows are not written to
        the file of --write_clean.
        """
        encoded: list[Row] = []
        # {id(row): the reason why the row is not written to the file of --write_clean}
        not_copied: dict[int, str] = {}
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
            repeats = self._check_repetition(SeenRow(place, use, use != UNUSED and not is_val), row, columns[place])
            if reason := OF_VALIDATION if is_val else repeats:
                not_copied[id(row)] = reason

            if not row.is_text and (problem := wrong_order(row.messages)):
                self.defects.add(problem, place, columns[place])
            if use != UNUSED:
                encoded.append(row)
            else:
                self.account.skip(raw, NOT_DRAWN)
                self._copy([row], {id(row): NOT_DRAWN_ROW})

            earlier_replies = (m for m in row.messages[:-1] if m['role'] == 'assistant' and 'tool_calls' not in m)
            if any(not message['content'].strip() for message in earlier_replies):
                self.defects.add(EMPTY_EARLIER, place, 'history' if raw.get('history') else columns[place])

        self._copy(self._measure(encoded, columns), not_copied)
        self._count_found()

    def _copy(self, rows: Sequence[Row], not_copied: Mapping[int, str]) -> None:
        """Write rows to the file of --write_clean. `not_copied` is {id(row): reason}: these rows are only counted."""
        if self.copy is None:
            return
        for row in rows:
            if reason := not_copied.get(id(row)):
                self.copy.skip(reason)
            else:
                self.copy.add(row)

    def _check_text(self, place: str, raw: dict[str, Any]) -> None:
        for column in _TEXT_COLUMNS:
            value = raw.get(column)
            if not value:
                continue
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            if self.encoder.images is not None:
                text = replace_tags(text, '')  # the tags are control tokens in the tokenizer of Qwen-VL
            if _MOJIBAKE.search(text):
                self.defects.add(MOJIBAKE, place, column)
            if _CONTROL.search(text) or self.encoder.text.has_control(text):
                self.defects.add(CONTROL_TOKENS, place, column)

    def _check_repetition(self, facts: SeenRow, row: Row, column: str) -> str | None:
        """Report `row` if the same row or the same prompt occurred earlier.

        `facts` describes `row`, and `column` is the column of its reply.

        Returns the reason to leave `row` out of the file of --write_clean, or None. The reason is that the file already
        gets an earlier row with the same content.
        """
        earlier = self.seen.find_earlier(content_of(row.messages, row), facts)
        if earlier is None and row.is_text:
            return None  # plain text has no prompt
        if earlier is None:
            same_prompt = self.seen.find_earlier(content_of(row.messages[:-1], row), facts)
            if same_prompt:
                self.defects.add(CONFLICT, row.origin, column, of=same_prompt.place)
            return None

        reason = LEAKED if {facts.use, earlier.use} == {TRAIN, VAL} else DUPLICATE
        repeated, of = row.origin, earlier.place
        if reason == LEAKED and earlier.use == VAL:
            repeated, of = of, repeated
        self.defects.add(reason, repeated, column, of=of, row=row.origin)
        return reason if earlier.can_copy else None

    def _measure(self, rows: Sequence[Row], columns: dict[str, str]) -> list[Row]:
        """Encode rows and count their lengths, cuts and notes. Returns the rows that can be trained on.

        `columns` is {location of a row: column of its reply}. If the rows cannot be encoded together, each half is
        encoded separately. This is repeated until the row with the problem is alone.
        """
        try:
            encoded = self.encoder.encode(rows)
        except (ConfigError, RowRefused) as error:
            if len(rows) > 1:
                middle = len(rows) // 2
                return [*self._measure(rows[:middle], columns), *self._measure(rows[middle:], columns)]
            self._refuse(rows[0], error, columns[rows[0].origin])
            return []

        report = EncodingReport(left_out=self.left_out, noted=self.noted, account=self.account)
        again = EncodedAgain(self.encoder)
        measured: list[Row] = []
        for row, ids in encode_batch(self.encoder, rows, report, lambda: encoded):
            cut = self.lengths.add(ids)
            length = len(cut.input_ids)
            if 0 < self.lengths.max_length < length:
                if not self._keeps_long(cut, row, columns[row.origin]):
                    self.account.skip(row.written, LEFT_OUT)
                    continue
                length = self.lengths.max_length  # of the longest piece
            self.account.add(row, cut, again)
            if self.positions is not None and length > self.positions:
                self.noted.add(PAST_POSITIONS.format(self.positions), row.origin, columns[row.origin])
            for note in set(CUTS).intersection(cut.notes):
                self.defects.add(note, row.origin, columns[row.origin])
            measured.append(row)
        return measured

    def _refuse(self, row: Row, error: ConfigError | RowRefused, column: str) -> None:
        """Count a row that cannot be encoded because of `error`. `column` is the column of its reply."""
        if isinstance(error, RowRefused):
            detail = f' [{error.detail}]' if error.detail else ''
            self.left_out.add(error.reason, row.origin + detail)
        else:
            self.stops.add(str(error).replace(row.origin, '').lstrip(': '), row.origin, column)
        self.account.skip(row.written, LEFT_OUT)

    def _keeps_long(self, ids: Encoded, row: Row, column: str) -> bool:
        """Count a row that is longer than --max_length as split, dropped or refused.

        Returns whether the row is used. It is used only if it is split.
        """
        overlong = self.encoder.overlong
        if overlong == 'split' and ids.is_text:
            self.noted.add(SPLIT, row.origin, column)
            return True
        if overlong == 'drop':
            self.left_out.add(DROPPED, row.origin, column)
        else:
            self.stops.add(REFUSED.format(overlong), row.origin, column)
        return False

    def record(self, args: SftArguments) -> dict[str, Any]:
        """Return the content of dataset_report.json."""
        return {
            'dataset': args.dataset,
            **({'val_dataset': args.val_dataset} if args.val_dataset else {}),
            'clean': bool(self.rows['kept']) and not any(self._problems),
            'problems': sum(len(found.counts) for found in self._problems),
            'rows_with_problems': self._rows_found,
            'rows': {
                **self.rows,
                'filtered': len(self.filtered),
                'left_out': len(self.left_out),
                'stops': len(self.stops),
            },
            'stops': _by_reason(self.stops),
            'left_out': _by_reason(self.left_out),
            'lost': _by_reason(self.lost),
            'defects': _by_reason(self.defects),
            'noted': _by_reason(self.noted),
            'filtered': _by_reason(self.filtered),
            'decisions': self.decisions,
            'lengths': self.lengths.record(),
            'account': self.account.record(),
            **({'clean_copy': self.copy.record(self._not_trained())} if self.copy else {}),
        }

    @property
    def _problems(self) -> tuple[Findings, ...]:
        """Return the findings for which the exit code is 1."""
        return self.stops, self.left_out, self.lost, self.defects

    def _not_trained(self) -> Counter[str]:
        """Return the numbers of rows that cannot be trained on, by reason."""
        return Counter(self.stops.counts) + Counter(self.left_out.counts) + Counter(self.filtered.counts)

    def _unused(self) -> list[str]:
        """Return the columns and keys that are never used, for example ['column `id`']."""
        return [reason.partition(_NOT_USED)[0] for reason in self.noted.counts if _NOT_USED in reason]

    def lines(self, record: dict[str, Any]) -> list[str]:
        """Return the report as lines of text. `record` is the result of `record()`. The last line is the verdict."""
        lengths = {name: value for name, value in record['lengths'].items() if name != 'rows_up_to'}
        return [
            'rows: ' + ', '.join(f'{name} {count}' for name, count in record['rows'].items()),
            *self.stops.lines('at which a run stops'),
            *self.left_out.lines('skipped'),
            *self.lost.lines('with a lost field'),
            *self.defects.lines('suspect'),
            *self.noted.lines('noted'),
            *self.filtered.lines('skipped on purpose'),
            *self.decisions,
            'tokens per row: ' + ', '.join(f'up to {n}: {c}' for n, c in record['lengths']['rows_up_to'].items()),
            'lengths: ' + ', '.join(f'{name} {value}' for name, value in lengths.items()),
            *self.account.lines(without=self._unused()),
            *(clean_copy.lines(record['clean_copy'], self.rows['read']) if self.copy else ()),
            self.verdict(record),
        ]

    def verdict(self, record: dict[str, Any]) -> str:
        """Return the last line of the report: what was found, and the exit code that follows from it."""
        said = 'nothing wrong: exit code 0'
        if problems := record['problems']:
            of = f'{record["rows_with_problems"]} of {counted(self.rows["read"], "row")}'
            said = f'{counted(problems, "problem")} in {of}: exit code 1'
        elif not record['clean']:
            said = 'no row can be trained on: exit code 1'

        unused = self._unused()
        notes = len(self.noted.counts) - len(unused)
        more = f' and {len(unused) - _NAMED} more' if len(unused) > _NAMED else ''
        return '; '.join(
            [
                said,
                *([counted(notes, 'note')] if notes else []),
                *([f'not used: {", ".join(unused[:_NAMED])}{more}'] if unused else []),
            ]
        )


def _by_reason(findings: Findings) -> dict[str, dict[str, Any]]:
    """Return {reason: {'rows': number of rows, 'first': locations of the first rows}}."""
    return {reason: {'rows': n, 'first': findings.places[reason]} for reason, n in findings.counts.items()}


def check_dataset(done: Ready[SftArguments]) -> int:
    """Read the data that the run would read, and print its problems.

    Returns 1 if a row would stop the run, would be skipped, would lose its reasoning, tools or system text, or is
    suspect, or if no row can be trained on, else 0. Rows that an entry of DATASET_MAPPING skips on purpose do not
    count, and neither do notes. The last line that is printed says which code is returned, and why.

    Writes <output_dir>/<model>/dataset_report.json, and each finding as one line of dataset_report.jsonl.
    """
    args = done.args
    for warning in done.warnings:
        logger.warning(warning)
    weights = locate(done.info, revision=args.model_revision, hub_name=args.hub, skip=_WEIGHTS)
    leave_out_unused(args, done.info, weights.path)
    folder = dense_directory(weights.path) if weights.path.is_file() else weights.path
    config = read_config(folder) if (folder / 'config.json').is_file() else {}
    tokenizer = load_tokenizer(folder, model_type=args.model_type)
    new = add_to_tokenizer(tokenizer, find_new_tokens(args))
    images = open_images_of_folder(config, tokenizer, folder, max_pixels=args.max_pixels)
    encoder = open_encoder(
        args, tokenizer, system_typed='system' in done.typed, images=images, cuts=False, new_ids=new.ids
    )

    report = Path(args.output_dir) / run_name(args) / 'dataset_report.json'
    report.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(report.with_suffix('.jsonl').open('w', encoding='utf-8'))
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        copy = stack.enter_context(_open_copy(args, encoder)) if args.write_clean else None
        check = DataCheck(encoder, args.max_length, stream, Seen(Path(scratch) / 'seen.db'), _positions(config), copy)
        check.decisions += [line for line in done.decisions if line.startswith('train_dataset_sample = ')]
        for part in _plan(args, check).parts:
            for batch in batches(part.used()):
                check.examine(batch, is_val=part.is_val)
        if copy is not None:
            copy.finish()

    record = check.record(args)
    write_json(report, record)
    logger.info(f'report: {report}, every finding with its location: {report.with_suffix(".jsonl")}')
    print('\n'.join(check.lines(record)))
    return 0 if record['clean'] else 1


def _open_copy(args: SftArguments, encoder: Encoder) -> CleanCopy:
    return CleanCopy(
        Path(str(args.write_clean)), marks_loss=args.loss_scope is None, sees_images=encoder.images is not None
    )


def _positions(config: Mapping[str, Any]) -> int | None:
    """Return the maximum number of tokens per row (max_position_embeddings) that the config of a model states.

    Returns None if the config states no such number.
    """
    config = config.get('text_config') or config
    stated = config.get('max_position_embeddings') or config.get('n_positions')
    return stated if isinstance(stated, int) else None


def _plan(args: SftArguments, check: DataCheck) -> Plan:
    """Return the plan of the run, and count the lines that cannot be read.

    Later, the check reads the data a second time. Then these lines are not counted again.
    """
    planning = True

    def bad_line(place: str, problem: str) -> None:
        if planning:
            check.bad_line(place, problem)

    sample = args.train_dataset_sample
    if args.streaming:  # a stream trains every row, in each pass, and a share says only how often
        args = replace(args, dataset=[without_amount(word) for word in args.dataset])
        sample = -1
    plan = plan_of(args, sample, bad=bad_line)
    planning = False
    check.decisions += plan.decisions(args.loss_scope)
    return plan

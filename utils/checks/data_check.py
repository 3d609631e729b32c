"""Examines the rows of a data set without running the model. Finds unusable rows, lost fields and suspect rows.

Memory does not hold the rows, only a few bytes for each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from utils.base.errors import ConfigError
from utils.checks import clean_copy
from utils.checks.clean_copy import NOT_DRAWN_ROW, OF_VALIDATION, CleanCopy
from utils.checks.findings import Findings, by_reason
from utils.checks.lengths import Lengths
from utils.checks.repetition import Seen, SeenRow, content_of
from utils.checks.suspect import (
    EMPTY_EARLIER,
    MOJIBAKE,
    has_control_word,
    has_empty_earlier_reply,
    is_mojibake,
    text_columns,
    wrong_order,
)
from utils.cli.arguments import SftArguments
from utils.data.converted_rows import ReadRow, unused_note
from utils.data.encode_plan import EncodedAgain, encode_batch
from utils.data.encoding_report import EncodingReport
from utils.data.parts import TRAIN, UNUSED, VAL
from utils.data.tally import counted
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
from utils.encode.encoder import Encoder
from utils.formats.columns import REPLY_COLUMNS
from utils.formats.conversation import BadRow, Filtered, Row
from utils.formats.images import replace_tags
from utils.formats.row_check import EMPTY_REPLY, NO_USER_TURN, SAME_ROLE_TWICE

DUPLICATE = 'duplicate row'
CONFLICT = 'same prompt, different answer'
LEAKED = 'validation row that is in the training set'
PAST_POSITIONS = 'longer than the {} positions that config.json of the model states'

# Notes about a field of the conversation that the template never prints, so the model never gets it.
LOST = (REASONING_LEFT_OUT, TOOLS_IGNORED, SYSTEM_IGNORED)
# Notes about a row for which the check has a finding of its own.
_FOUND_ANYWAY = (CONTROL_TOKENS, EMPTY_REPLY, NO_USER_TURN, *SAME_ROLE_TWICE.values())
# The verdict names at most this number of columns and keys.
_NAMED = 5


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
        # The columns and keys that are not used, for example 'column `id`'. It does not grow with the data.
        self.unused: dict[str, None] = {}
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
            self._note(row, place, columns[place])
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

            if has_empty_earlier_reply(row):
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

    def _note(self, row: Row, place: str, column: str) -> None:
        """Count the notes of a row, and its columns and keys that are not used."""
        for note in row.notes:
            self.noted.add(note, place, column)
        for name in row.unused:
            note = unused_note(name)
            self.noted.add(note, place, column)
            if note in self.noted.counts:  # not so if there are too many notes, or if the name is very long
                self.unused[name] = None

    def _check_text(self, place: str, raw: dict[str, Any]) -> None:
        for column, written in text_columns(raw):
            # The tags of images are control tokens in the tokenizer of Qwen-VL.
            text = written if self.encoder.images is None else replace_tags(written, '')
            if is_mojibake(text):
                self.defects.add(MOJIBAKE, place, column)
            if has_control_word(text) or self.encoder.text.has_control(text):
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
            column = ''  # the column of the earlier row is not stored, and the two rows may have different formats
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
            'stops': by_reason(self.stops),
            'left_out': by_reason(self.left_out),
            'lost': by_reason(self.lost),
            'defects': by_reason(self.defects),
            'noted': by_reason(self.noted),
            'filtered': by_reason(self.filtered),
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
            *self.account.lines(without=self.unused),
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

        unused = list(self.unused)
        notes = len(self.noted.counts) - len(unused)
        more = f' and {len(unused) - _NAMED} more' if len(unused) > _NAMED else ''
        return '; '.join(
            [
                said,
                *([counted(notes, 'note')] if notes else []),
                *([f'not used: {", ".join(unused[:_NAMED])}{more}'] if unused else []),
            ]
        )


def _reply_column(raw: dict[str, Any]) -> str:
    return next((column for column in REPLY_COLUMNS if column in raw), '')

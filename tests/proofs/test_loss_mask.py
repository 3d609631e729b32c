"""The loss mask: rows without a trained token are skipped, and a batch that trains other tokens stops the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import make_tokenizer
from utils.base.errors import ConfigError
from utils.data.collator import Collator
from utils.data.encode_plan import encode_rows
from utils.data.encoded_rows import EncodedRows
from utils.data.encoding_report import EncodingReport
from utils.encode.encoded import IGNORE_INDEX, NOTHING_TRAINED, Encoded
from utils.encode.make import make_encoder
from utils.encode.show import show_samples
from utils.formats.conversation import Row
from utils.proofs.loss_mask import prove_mask

Run = Callable[..., Path]
ENCODER = make_encoder(make_tokenizer(), template_type='auto', system='', system_typed=False, max_length=-1)
ROWS = [
    Row(
        messages=[
            {'role': 'user', 'content': f'what is {i}?'},
            {'role': 'assistant', 'content': f'the answer is {i}.' + ' yes yes yes' * (i == 1)},
        ]
    )
    for i in range(3)
]
SUMMARY = {'train': {'rows': 3, 'tokens': 60, 'trained_share': 0.4}, 'left_out': {NOTHING_TRAINED: 2}}


def prove(collate: Callable[..., Any], tmp_path: Path) -> dict[str, Any]:
    rows, _ = encode_rows(ENCODER, ROWS, EncodingReport())
    try:
        prove_mask(rows, SUMMARY, collate, ENCODER, tmp_path)
    finally:
        proof: dict[str, Any] = json.loads((tmp_path / 'proofs.json').read_text())['loss']
    return proof


def test_labels_of_batches_are_what_is_trained(tmp_path: Path) -> None:
    proof = prove(Collator(5), tmp_path)
    assert proof['passed'] and proof['rows_checked'] == 3
    assert proof['says'] == (
        '3 rows train 40 % of 60 tokens; in 3 rows, in batches of 4, exactly the marked tokens carry loss, each end of '
        'turn among them; 2 rows were skipped because none of their tokens carries loss'
    )


def test_skipped_rows_of_a_stream_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SUMMARY, 'train')
    assert prove(Collator(5), tmp_path)['says'] == (
        'the rows of a stream are not counted before training; in 3 rows, in batches of 4, exactly the marked tokens '
        'carry loss, each end of turn among them'
    )


class Mutated(Collator):
    """A collator that makes batches as training does, then changes their labels."""

    def __init__(self, change: Callable[[torch.Tensor], None]) -> None:
        super().__init__(5)
        self.change = change

    def __call__(self, rows: Any) -> Any:
        batch = super().__call__(rows)
        self.change(batch['labels'])
        return batch


def drop_end(labels: torch.Tensor) -> None:
    labels[0, int((labels[0] != IGNORE_INDEX).nonzero()[-1])] = IGNORE_INDEX


def train_prompt(labels: torch.Tensor) -> None:
    labels[0, 1] = 40


def change_token(labels: torch.Tensor) -> None:
    labels[0, int((labels[0] != IGNORE_INDEX).nonzero()[0])] += 1


def shift_by_one(labels: torch.Tensor) -> None:
    """Shift the trained tokens by one position: their values and order stay as the row states."""
    labels.copy_(labels.roll(1, dims=1))


def swap_rows(labels: torch.Tensor) -> None:
    """Exchange the labels of two rows. A row alone in its batch would keep its own."""
    if len(labels) > 1:
        labels[[0, 1]] = labels[[1, 0]]


def train_padding(labels: torch.Tensor) -> None:
    """Train a token after the end of the shorter row."""
    short = int((labels[:, -2:] == IGNORE_INDEX).all(dim=1).nonzero()[0]) if len(labels) > 1 else 0
    labels[short, -1] = 5


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (drop_end, "the end of turn '<|im_end|>' carries no loss in a batch: the model would never learn to stop."),
        (train_prompt, 'a batch trains other tokens than its row marks'),
        (change_token, 'a batch trains other tokens than its row marks'),
        (shift_by_one, 'a batch trains the tokens of its row at other positions'),
        (swap_rows, 'a batch trains'),
        (train_padding, 'a batch trains other tokens than its row marks'),
    ],
)
def test_a_batch_that_trains_other_tokens_stops_the_run(
    change: Callable[[torch.Tensor], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message.replace('|', '[|]').split(':')[0]):
        prove(Mutated(change), tmp_path)
    proof = json.loads((tmp_path / 'proofs.json').read_text())['loss']
    assert proof['passed'] is False and message in proof['says']


@pytest.mark.parametrize('pads', [True, False])
def test_rows_in_one_batch_are_compared_each_with_its_own(pads: bool, tmp_path: Path) -> None:
    class Joins(Collator):
        """An encoder that gives the ids of the first row to all rows of its length."""

        def __call__(self, rows: Any) -> Any:
            same = [row if len(row['input_ids']) != len(rows[0]['input_ids']) else rows[0] for row in rows]
            return super().__call__(same)

    assert prove(Collator(5, pads=pads), tmp_path)['passed']
    with pytest.raises(ConfigError, match='a batch'):
        prove(Joins(5, pads=pads), tmp_path)


def test_the_share_that_trains_is_the_share_of_labels() -> None:
    """The first token of a row has no loss, although a row without a prompt is trained from there on."""
    encoded = EncodedRows()
    for trained, earlier in (((0, 9), []), ((1, 9), []), ((6, 8), [(0, 3)]), ((0, 1), []), ((4, 9), [])):
        encoded.append(Encoded(input_ids=list(range(10, 19)), trained=trained, prompt_length=0, earlier=earlier))
    labels = Collator(5)(list(encoded))['labels']
    assert encoded.trained_tokens() == int((labels != IGNORE_INDEX).sum()) == 8 + 8 + 4 + 0 + 5


def test_a_row_in_which_nothing_is_trained_is_left_out_and_named() -> None:
    encoder = make_encoder(
        make_tokenizer(), template_type='default-generation', system='', system_typed=False, max_length=-1
    )
    # Only the end token: it is the first token, which nothing predicts.
    empty = Row(messages=[{'role': 'user', 'content': ''}, {'role': 'assistant', 'content': ''}], origin='qa.jsonl:7')
    report = EncodingReport()
    encoded, kept = encode_rows(encoder, [empty, ROWS[0]], report)
    assert len(encoded) == 1 and kept == [ROWS[0]]
    assert report.lines() == [f'1 row skipped: {NOTHING_TRAINED} (qa.jsonl:7)']


def test_rows_are_shown_with_colour_in_a_terminal_and_with_marks_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = encode_rows(ENCODER, ROWS, EncodingReport())
    show_samples(ENCODER.tokenizer, [rows[0], rows[2]], tmp_path)
    shown = (tmp_path / 'sample.txt').read_text(encoding='utf-8')
    assert shown.count('⟦the answer is') == 2 and '⟦the answer is 2.<|im_end|>⟧' in shown
    assert '⟦the answer is 2.<|im_end|>⟧' in caplog.text
    caplog.clear()
    monkeypatch.setattr('utils.encode.show.sys.stderr.isatty', lambda: True, raising=False)
    monkeypatch.delenv('NO_COLOR', raising=False)
    show_samples(ENCODER.tokenizer, [rows[0]], tmp_path)
    assert '\x1b[30;42mthe answer is 0.<|im_end|>\x1b[0m' in caplog.messages[-1]
    assert '\x1b' not in (tmp_path / 'sample.txt').read_text(encoding='utf-8')


@pytest.mark.slow
def test_the_number_of_samples_is_the_users(run_sft: Run) -> None:
    run = run_sft('--show_samples', '3', '--max_steps', '1')
    assert (run / 'sample.txt').read_text(encoding='utf-8').count('⟦') == 3
    assert json.loads((run / 'proofs.json').read_text())['loss']['passed'] is True

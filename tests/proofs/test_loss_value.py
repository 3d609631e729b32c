"""The loss of the trainer equals that of the rows one by one, or the run stops before its first step."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.support.tiny_models import make_model, make_tokenizer
from utils.data import collator
from utils.data.collator import Collator
from utils.encode.encoded import IGNORE_INDEX
from utils.fast import chunked_loss
from utils.fast.rows import concatenated_rows
from utils.fast.scoring import Scorer
from utils.proofs.loss_value import LossProof, _comparison, allowed_share, choose_rows, trained_positions
from utils.train import trainer
from utils.train.trainer import SftTrainer

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
SHARPER = 4


@pytest.fixture(scope='module')
def sharp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose loss differs from token to token, as in a trained model."""
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'norm' not in name:
                parameter.mul_(SHARPER)
    folder = tmp_path_factory.mktemp('models') / 'sharp'
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


LAYOUTS = {
    'joined': [],
    'laid': ['--group_by_length', 'false'],
    'packed': ['--packing', 'true', '--max_length', '80'],
    'padded': ['--padding_free', 'false', '--chunked_loss', 'false'],
    'all weights': ['--sft_type', 'full', '--only_save_model', 'true'],
    'bf16': ['--dtype', 'bf16'],
    'stream': ['--streaming', 'true', '--stream_val_rows', '4'],
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_loss_of_batches_is_that_of_rows(layout: str, sharp_model: Path, run_sft: Run) -> None:
    run = run_sft('--model_id_or_path', str(sharp_model), '--max_steps', '1', *LAYOUTS[layout])
    proof = json.loads((run / 'proofs.json').read_text())['loss_value']
    assert proof['passed'] is True and proof['rows_checked'] == 4
    dtype = 'bf16' if layout == 'bf16' else 'fp32'
    assert re.fullmatch(
        r'the loss of 4 rows in batches, [\d.]+ over \d+ tokens, (equals|differs by [\d.e-]+ from) that of the same '
        rf'rows one by one in the plain forward pass, [\d.]+ over \d+; rounding in {dtype} '
        r'may move it by up to [\d.]+',
        proof['says'],
    )


@pytest.mark.parametrize(
    ('found', 'wanted', 'said'),
    [
        (3.50809, 3.52991, 'differs by 0.022 from'),
        (3.508091, 3.508093, 'equals'),
        (3.50809, 3.50811, 'differs by 2e-05 from'),
    ],
)
def test_losses_with_different_digits_are_not_called_equal(found: float, wanted: float, said: str) -> None:
    assert _comparison(found, wanted) == said


def test_the_mean_of_many_rounded_losses_may_differ_less() -> None:
    shares = [allowed_share('bf16', tokens) for tokens in (1, 25, 100, 625, 5000)]
    assert shares == pytest.approx([0.05, 0.05, 0.025, 0.02, 0.02])
    assert allowed_share('fp32', 1) == allowed_share('fp32', 5000) == 0.001


def roll_labels(patch: pytest.MonkeyPatch) -> None:
    """Let each position be scored on the token it read, not on the next one."""
    plain = Scorer.loss

    def shifted(self: Scorer, model: Any, batch: dict[str, torch.Tensor], divisor: float) -> Any:
        read = batch['input_ids'].flatten()[batch['positions']]
        return plain(self, model, {**batch, 'targets': read}, divisor)

    patch.setattr(Scorer, 'loss', shifted)


def scale_loss(patch: pytest.MonkeyPatch) -> None:
    plain = Scorer.loss
    patch.setattr(Scorer, 'loss', lambda self, model, batch, divisor: plain(self, model, batch, divisor / 2))


def lose_a_chunk(patch: pytest.MonkeyPatch) -> None:
    """Omit the last positions of a batch from the sum."""
    plain = chunked_loss.summed_loss
    cut = lambda hidden, targets, head, divisor: plain(hidden[:-3], targets[:-3], head, divisor)  # noqa: E731
    patch.setattr('utils.fast.scoring.summed_loss', cut)


def go_on_counting_positions(patch: pytest.MonkeyPatch) -> None:
    call = Collator.__call__

    def counted(self: Collator, items: Any) -> Any:
        batch = call(self, items)
        return {**batch, 'position_ids': torch.arange(batch['input_ids'].shape[1])[None] ** 2}

    patch.setattr(Collator, '__call__', counted)


def let_rows_see_each_other(patch: pytest.MonkeyPatch) -> None:
    from utils.fast import scoring

    patch.setattr(scoring, 'concatenated_rows', lambda lengths, _: concatenated_rows([sum(lengths)]))


def lose_a_row_of_a_joined_batch(patch: pytest.MonkeyPatch) -> None:
    pack_evenly = collator.pack_evenly
    patch.setattr(collator, 'pack_evenly', lambda *args: [pack[: max(1, len(pack) - 1)] for pack in pack_evenly(*args)])


def count_too_many_tokens(patch: pytest.MonkeyPatch) -> None:
    """Divide by the number of all tokens."""
    count = SftTrainer._get_num_items_in_batch
    patch.setattr(
        SftTrainer,
        '_get_num_items_in_batch',
        lambda self, batches, device: count(self, batches, device) * 0 + sum(b['labels'].numel() for b in batches),
    )


def train_the_prompt(patch: pytest.MonkeyPatch) -> None:
    """Change labels of later batches than those that the loss-mask check reads."""
    loss_of = SftTrainer.compute_loss

    def changed(self: SftTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids = inputs['input_ids']
        changed = {**inputs, 'labels': torch.where(ids > 8, ids, IGNORE_INDEX).index_fill(1, torch.tensor([0]), -100)}
        return loss_of(self, model, collator.with_plan(changed), *args, **kwargs)

    patch.setattr(trainer.SftTrainer, 'compute_loss', changed)


FAULTS = [
    roll_labels, scale_loss, lose_a_chunk, go_on_counting_positions, let_rows_see_each_other,
    lose_a_row_of_a_joined_batch, count_too_many_tokens, train_the_prompt,
]  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_a_trainer_that_computes_another_loss_stops_before_its_first_step(
    fault: Callable[[pytest.MonkeyPatch], None],
    sharp_model: Path,
    run_sft: Run,
    problems: Problems,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    # Batches of four: two of two rows are joined.
    run = run_sft('--model_id_or_path', str(sharp_model), '--batch_size', '4', expect=2)
    (message,) = problems()
    assert message.startswith('--padding_free, --chunked_loss: the trainer computes a loss of ')
    assert 'the plain forward pass of one row at a time' in message
    assert json.loads((run / 'proofs.json').read_text())['loss_value']['passed'] is False
    assert not list(run.glob('checkpoint-*'))


@pytest.mark.parametrize('backend', ['is_deepspeed_enabled', 'is_distributed_loading_by_transformers'])
def test_a_sharded_model_is_not_compared(backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A forward pass before the first step crashes FSDP, so the proof only logs why it is skipped."""
    flags = {'is_deepspeed_enabled': False, 'is_distributed_loading_by_transformers': False}
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    # The stand-in has no model: any use of it raises AttributeError.
    sharded: Any = SimpleNamespace(**{**flags, backend: True})
    whole: Any = SimpleNamespace(**flags)
    rows = [row(9, (6, 8))]

    with caplog.at_level('INFO'):
        LossProof(sharded, rows).on_train_begin(args, TrainerState(), TrainerControl())
    assert 'loss value: the loss of a batch is not compared with the losses of its rows, because' in caplog.text
    assert not list(tmp_path.iterdir()), 'no outcome is recorded'
    with pytest.raises(AttributeError, match='model_wrapped'):
        LossProof(whole, rows).on_train_begin(args, TrainerState(), TrainerControl())


def row(length: int, trained: tuple[int, int], earlier: list[tuple[int, int]] | None = None) -> dict[str, Any]:
    return {
        'input_ids': list(range(length)),
        'trained': trained,
        'prompt_length': trained[0],
        'earlier': earlier or [],
        'row': 7,
    }


def test_rows_are_cut_to_their_last_tokens_and_spread_over_lengths() -> None:
    rows = [row(n, (n // 2, n)) for n in (300, 5, 40, 1000, 9, 20)]
    chosen = choose_rows(rows)
    assert [len(item['input_ids']) for item in chosen] == [5, 9, 40, 256]
    assert chosen[-1]['input_ids'] == list(range(44, 300)) and trained_positions(chosen[-1]) == list(range(106, 256))
    behind = row(1000, (10, 20))  # its trained tokens are cut off
    assert choose_rows([behind]) == [] and choose_rows([]) == []
    assert trained_positions(row(9, (6, 8), [(0, 3)])) == [1, 2, 6, 7]

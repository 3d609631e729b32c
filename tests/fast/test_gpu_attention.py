"""The attention of GPUs, checked without one: which kernel is chosen, and what is given to torch's operators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from tests.support.exactness import LENGTHS, make_rows, open_tiny
from tests.support.flash_stand_in import flash_operators
from utils.cli.arguments import SftArguments
from utils.data.collator import Collator
from utils.fast import attention
from utils.fast.attention import Inputs, RowAttention, attend_in_groups
from utils.fast.attention_choice import AttentionCase, candidates, flash_width, repeats_keys
from utils.fast.flex_rows import flex_rows_attention, row_block_mask
from utils.fast.layout import use_padding_free
from utils.fast.rows import RowMask, concatenated_rows, rows_of_batch

BF16 = AttentionCase('cuda', (9, 0), torch.bfloat16, heads=8, key_heads=2, query_width=128, value_width=128)
# What differs from BF16 on an H100, and the kernels that may serve, the best one first.
CHOICES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ('flash', 'groups')),
    ({'dtype': torch.float16}, ('flash', 'groups')),
    ({'dtype': torch.float32}, ('groups',)),
    ({'window': True}, ('flash', 'groups')),
    ({'sinks': True}, ('flash', 'rows')),
    ({'sinks': True, 'dtype': torch.float32}, ('rows',)),
    ({'softcap': True}, ('flex', 'rows')),
    ({'softcap': True, 'window': True}, ('flex', 'rows')),
    ({'softcap': True, 'sinks': True}, ('rows',)),
    ({'dropout': True}, ('groups',)),
    ({'query_width': 192}, ('flash', 'groups')),  # multi-head latent attention: wide queries and keys
    ({'query_width': 80, 'value_width': 80}, ('flash', 'groups')),
    ({'query_width': 256, 'value_width': 256}, ('flash', 'groups')),
    ({'query_width': 264, 'value_width': 128}, ('groups',)),
    ({'capability': (8, 0)}, ('flash', 'groups')),
    ({'capability': (8, 6), 'query_width': 192}, ('flash', 'groups')),
    ({'capability': (8, 6), 'query_width': 256}, ('groups',)),
    ({'capability': (8, 9), 'query_width': 200}, ('groups',)),
    ({'capability': (12, 0), 'query_width': 256}, ('groups',)),
    ({'capability': (10, 0), 'query_width': 256}, ('flash', 'groups')),
    ({'capability': (7, 5), 'dtype': torch.float16}, ('groups',)),
    ({'capability': (7, 5), 'softcap': True}, ('rows',)),
    ({'kind': 'rocm', 'capability': (0, 0)}, ('groups',)),
    ({'kind': 'rocm', 'capability': (0, 0), 'sinks': True}, ('rows',)),
    ({'kind': 'xpu', 'capability': (0, 0)}, ('groups',)),
    ({'kind': 'cpu', 'capability': (0, 0)}, ('rows',)),
    ({'kind': 'cpu', 'capability': (0, 0), 'softcap': True}, ('rows',)),
    ({'kind': 'cpu', 'capability': (0, 0), 'dropout': True}, ('groups',)),
]


@pytest.mark.parametrize(('changed', 'kernels'), CHOICES, ids=lambda value: ','.join(map(str, value)) or 'H100')
def test_the_kernels_for_a_case(changed: dict[str, Any], kernels: tuple[str, ...]) -> None:
    assert candidates(BF16._replace(**changed)) == kernels


def test_keys_are_repeated_where_torch_would_keep_all_scores() -> None:
    assert not repeats_keys(BF16, masked=False), 'flash shares key heads'
    assert repeats_keys(BF16, masked=True), 'flash takes no mask'
    for changed in ({'dtype': torch.float32}, {'capability': (7, 5)}, {'query_width': 192}):
        assert repeats_keys(BF16._replace(**changed), masked=False), changed
    assert not repeats_keys(BF16._replace(key_heads=8, dtype=torch.float32), masked=True), 'there is nothing to repeat'
    assert not repeats_keys(BF16._replace(kind='xpu', capability=(0, 0)), masked=True)


def test_heads_are_padded_to_a_multiple_of_eight() -> None:
    assert [flash_width(*widths) for widths in ((64, 64), (5, 3), (192, 128), (80, 96))] == [64, 8, 192, 96]


ROWS = (5, 1, 11, 8)


@pytest.mark.parametrize('window', [None, 3, 7])
@pytest.mark.parametrize('sinks', [False, True])
@pytest.mark.parametrize('kernel', ['flash', 'groups'])
def test_kernels_compute_attention_and_its_gradients(window: int | None, sinks: bool, kernel: Any) -> None:
    if kernel == 'groups' and sinks:
        return  # candidates never offers it
    torch.manual_seed(0)
    # As a class gives them: heads of queries and keys are wider than heads of values, and tokens come first in memory.
    shapes = [(25, 6, 12), (25, 2, 12), (25, 2, 5)]
    given = [torch.randn(shape, dtype=torch.double).transpose(0, 1).requires_grad_() for shape in shapes]
    sink = torch.randn(6, dtype=torch.double, requires_grad=True) if sinks else None
    inputs = Inputs(*given, sink, RowMask(ROWS, window), 0.3)
    wanted = [*given, *([sink] if sink is not None else [])]
    direction = torch.randn(25, 6, 5, dtype=torch.double)
    expected = RowAttention.apply(*given, sink, inputs.rows, 0.3, None)
    gradients = torch.autograd.grad(expected, wanted, direction)
    with flash_operators() as calls:
        found = inputs.attend_by(kernel)
        ours = torch.autograd.grad(found, wanted, direction)
    assert calls == ([(25, 6, 16)] if kernel == 'flash' else [])
    assert (found - expected).abs().max() < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, gradients, strict=True))


@pytest.mark.parametrize('window', [None, 40, 200])
def test_flex_attention_gets_the_cap_and_the_rows(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end inside of blocks of 128, and one row has several blocks."""
    # torch refuses gradients on a CPU. Its formulas do not depend on the device.
    monkeypatch.setattr(torch_flex, '_validate_device', lambda *tensors: None)
    torch.manual_seed(0)
    rows = RowMask((100, 1, 300, 59), window)
    given = [torch.randn(heads, 460, 8, requires_grad=True) for heads in (4, 2, 2)]
    direction = torch.randn(460, 4, 8)
    expected = RowAttention.apply(*given, None, rows, 0.9, 2.0)
    gradients = torch.autograd.grad(expected, given, direction)
    mask = row_block_mask(rows.lengths, window, torch.device('cpu'))
    found = flex_rows_attention(*given, mask, softcap=2.0, scaling=0.9)
    assert (found - expected).abs().max() < 1e-5
    for ours, theirs in zip(torch.autograd.grad(found, given, direction), gradients, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize('window', [None, 40, 200])
def test_blocks_without_a_visible_key_are_skipped(window: int | None) -> None:
    """The uncompiled function ignores the list of blocks. So the list is compared with the mask of each token."""
    lengths = (100, 1, 300, 59)
    mask = row_block_mask(lengths, window, torch.device('cpu'))
    row = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    place = torch.arange(460)
    seen = (row[:, None] == row) & (place <= place[:, None])
    if window is not None:
        seen &= place[:, None] - place < window
    padded = torch.nn.functional.pad(seen, (0, 52, 0, 52)).view(4, 128, 4, 128)
    assert torch.equal(mask.to_dense()[0, 0].bool(), padded.any(3).any(1))
    assert torch.equal(mask.mask_mod(0, 0, place[:, None], place), seen)


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offer the flash kernel on the CPU, where `flash_operators` makes it."""
    attention.kernel_for.cache_clear()
    monkeypatch.setattr(attention, 'candidates', lambda case: ('flash', 'rows'))
    yield
    attention.kernel_for.cache_clear()


# Llama, sinks and windows, multi-head latent attention.
@pytest.mark.parametrize('key', ['llama3.2-1b-instruct', 'gpt-oss-20b', 'glm-4.7-flash'])
def test_models_attend_by_the_flash_kernel(key: str, tmp_path: Path, flash_on_cpu: None, caplog: Any) -> None:
    model = open_tiny(key, tmp_path / 'model').eval()
    rows = make_rows(model.get_input_embeddings().weight.shape[0])
    batch = Collator(5, pads=False)(rows)
    inputs = {'input_ids': batch['input_ids'], 'position_ids': batch['position_ids'], 'use_cache': False}
    attention.attend_by_rows(model)
    with concatenated_rows(LENGTHS), torch.no_grad(), flash_operators() as calls, caplog.at_level('INFO'):
        found = model(**inputs).logits
    assert 'attention kernel = flash because it passed its trial on this device' in caplog.text
    assert [shape[0] for shape in calls].count(sum(LENGTHS)) == model.config.num_hidden_layers
    attention.kernel_for.cache_clear()
    with concatenated_rows(LENGTHS), torch.no_grad():
        expected = model(**inputs).logits  # the operators are gone, so the trial fails
    assert 'the attention kernel flash is not used: NotImplementedError' in caplog.text
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_wrong_kernel_is_not_used(flash_on_cpu: None, caplog: pytest.LogCaptureFixture) -> None:
    case = BF16._replace(kind='cpu', capability=(0, 0))
    with flash_operators(factor=1.05):
        assert attention.kernel_for(case, torch.device('cpu')) == 'rows'
    assert 'the attention kernel flash is not used: its values are off by 0.05. Another kernel is used.' in caplog.text
    attention.kernel_for.cache_clear()
    with flash_operators():
        assert attention.kernel_for(case._replace(sinks=True, window=True), torch.device('cpu')) == 'flash'
    with flash_operators(factor=float('nan')):
        assert attention.kernel_for(case, torch.device('cpu')) == 'rows'


def test_positions_of_rows_are_copied_to_a_device_once_per_batch(tmp_path: Path, monkeypatch: Any) -> None:
    """All layers share the tensors, and those that the collator already made are taken."""
    model = open_tiny('llama3.2-1b-instruct', tmp_path / 'model').eval()
    assert use_padding_free(model, SftArguments(), longest=max(LENGTHS))
    batch = Collator(5, pads=False)(make_rows(model.get_input_embeddings().weight.shape[0]))
    monkeypatch.setattr(attention, 'candidates', lambda case: ('groups',))
    attention.kernel_for.cache_clear()
    made: list[Any] = []
    whole = RowMask.groups
    monkeypatch.setattr(RowMask, 'groups', lambda self: made.append(self) or whole(self))
    with concatenated_rows(LENGTHS), torch.no_grad():
        model(input_ids=batch['input_ids'], position_ids=batch['position_ids'], use_cache=False)
    attention.kernel_for.cache_clear()
    assert len(made) == 1 < model.config.num_hidden_layers

    ends = torch.tensor([0, 5, 6, 17, 25], dtype=torch.int32)
    with concatenated_rows(ROWS, ends):
        assert rows_of_batch().cu_seqlens(torch.device('cpu')) is ends
    with concatenated_rows(ROWS):
        assert torch.equal(rows_of_batch().cu_seqlens(torch.device('cpu')), ends)
    assert rows_of_batch() is None


def test_groups_need_no_answer_of_the_device() -> None:
    """Boolean indexing would wait for a GPU. A fake tensor has no values, so whatever needs them raises an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = RowMask(ROWS, 3)
    groups, place = rows.group_indices(torch.device('cpu'))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        rows.tensors._made['group_indices', torch.device('cpu')] = (
            [mode.from_tensor(index) for index in groups],
            mode.from_tensor(place),
        )
        query, key = torch.empty(6, 25, 8), torch.empty(2, 25, 8)
        assert attend_in_groups(query, key, key, rows, scaling=0.3, dropout=0.0).shape == (25, 6, 8)

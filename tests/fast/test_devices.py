"""The fast path on devices that are not here: several GPUs in one process, and kernels that a GPU does not have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from tests.support.exactness import make_rows
from tests.support.tiny_models import make_model
from tests.support.waits import Device
from utils.cli.arguments import SftArguments
from utils.data.collator import Collator, on_device
from utils.estimate.memory import Batch, Mode, _head
from utils.fast import attention, chunked_loss, layout, scoring
from utils.fast.attention import attend_in_groups
from utils.fast.chunked_loss import Head, head_input, head_logits, scored, summed_loss
from utils.fast.layout import use_padding_free
from utils.fast.rows import RowMask
from utils.fast.scoring import Scorer, _log_probabilities
from utils.train.trainer import SftTrainer

FIRST = torch.device('cuda:0')
# The device without memory stands for a second one: what is there cannot have come from the CPU by itself.
OTHER = torch.device('meta')


def test_the_loss_is_computed_where_the_head_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tied weights the head is on the first GPU, and the hidden states that it gets are on the last one."""
    monkeypatch.setattr(chunked_loss, '_compute_dtype', lambda head, weight: weight.dtype)
    head = Head(torch.nn.Linear(8, 40, device=OTHER).requires_grad_(False))
    hidden = torch.randn(5, 8, requires_grad=True)
    targets = torch.arange(5)
    found: list[torch.Tensor] = [*scored(hidden, targets, head), head_logits(hidden.detach(), head)]
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        chunked_loss._SummedLoss,
        'apply',
        lambda hidden, weight, bias, values, rows, targets, *_: seen.extend([hidden, targets]),
    )
    summed_loss(hidden, targets, head, 2.0)
    assert len(found) == 3 and len(seen) == 2 and {x.device for x in [*found, *seen]} == {OTHER}


def test_hidden_states_are_selected_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is on the first GPU, and the last layer may be on another one."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(chunked_loss._Selected, 'apply', lambda *given: seen.extend(given))
    head = Head(torch.nn.Linear(8, 40, device=OTHER))
    with head_input(head, torch.tensor([1, 3])) as collected:
        head.linear(torch.zeros(2, 3, 8, device=OTHER))
    assert len(collected) == 1 and [x.device for x in seen] == [OTHER, OTHER]


def test_the_trainer_gets_its_numbers_on_its_own_device() -> None:
    """Its base class refuses a loss on another GPU, and gathers results of several processes from this one."""
    batch = Collator(5, pads=False)(make_rows(390))
    trainer: Any = SimpleNamespace(
        scorer=SimpleNamespace(loss=lambda *_: torch.tensor(1.0), by_row=lambda *_: torch.zeros(4, 3)),
        args=SimpleNamespace(device=OTHER, predict_with_generate=False),
        accelerator=SimpleNamespace(num_processes=1, autocast=torch.no_grad),
        speedometer=SimpleNamespace(count=lambda inputs: None),
        _prepare_inputs=lambda inputs: on_device(inputs, OTHER),
    )
    assert SftTrainer.compute_loss(trainer, None, batch, num_items_in_batch=10).device == OTHER
    _, sums, indices = SftTrainer.prediction_step(trainer, None, batch, False)
    assert (sums.device, indices.device) == (OTHER, OTHER)
    sent = on_device(batch, OTHER)
    on_cpu = [name for name, x in sent.items() if x.device.type == 'cpu']
    assert on_cpu == ['row_lengths', 'prompt_lengths', 'rows', 'labels']
    assert sent['cu_seqlens'].dtype == torch.int32 and sent['input_ids'].shape == batch['input_ids'].shape


def test_a_device_without_float64_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, 'sum_dtype', lambda device: torch.float32)  # MPS
    assert _log_probabilities(torch.zeros(1, 4), None).dtype == torch.float32


def test_the_columns_of_logits_are_selected_on_the_cpu() -> None:
    """An index on the CPU is accepted by hidden states on any device, and one on the first GPU only there."""
    model = make_model()
    asked: list[torch.Tensor] = []

    def forward(**inputs: Any) -> Any:
        asked.append(inputs['logits_to_keep'])
        return SimpleNamespace(logits=torch.zeros(4, len(inputs['logits_to_keep']), 400))

    batch = Collator(5, pads=True)(make_rows(390))
    scorer = Scorer(model, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        sent = {**batch, 'input_ids': torch.zeros(4, 30, device=FIRST, dtype=torch.long)}
    scorer.by_row(forward, sent)
    assert [columns.device.type for columns in asked] == ['cpu'] and asked[0].tolist() == list(range(29))


def test_key_heads_are_repeated_where_flash_attention_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(heads, 25, 8, requires_grad=True) for heads in (6, 2, 2)]
    rows = RowMask((5, 1, 11, 8), 4)
    seen: list[tuple[int, int, bool]] = []
    plain = F.scaled_dot_product_attention

    def noted(query: Any, key: Any, value: Any, **settings: Any) -> torch.Tensor:
        seen.append((query.shape[1], key.shape[1], settings['enable_gqa']))
        return plain(query, key, value, **settings)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', noted)
    found = []
    for takes in (True, False):
        monkeypatch.setattr(attention, 'repeats_keys', lambda case, masked, takes=takes: not takes)
        out = attend_in_groups(*inputs, rows, scaling=0.3, dropout=0.0)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert seen == [(6, 2, True)] * 3 + [(6, 6, False)] * 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_groups_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Device()
    sends: list[int] = []

    def sent(tensors: Any, device: torch.device) -> dict[str, torch.Tensor]:
        copies = {name: x.clone() for name, x in tensors.items()}
        found.mark(*copies.values())
        sends.append(len(copies))
        return copies

    monkeypatch.setattr('utils.fast.rows.send', sent)
    torch.manual_seed(0)
    inputs = [torch.randn(heads, 25, 8, requires_grad=True) for heads in (6, 2, 2)]
    found.mark(*inputs)
    rows = RowMask((5, 1, 11, 8), 4)
    with found.refusing_to_wait():
        for _ in range(2):  # two layers
            out = attend_in_groups(*inputs, rows, scaling=0.3, dropout=0.0)
        out.sum().backward()
    assert found.has(out) and out.shape == (25, 6, 8) and sends == [4], 'the indices are sent once'


def test_kernels_of_cudnn_are_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[Any] = []

    def sdpa(query: Any, key: Any, value: Any, **settings: Any) -> torch.Tensor:
        kernels.append(torch.nn.attention._cur_sdpa_kernel_backends())
        return query + key.sum() + value.sum()

    monkeypatch.setattr(F, 'scaled_dot_product_attention', sdpa)
    rows = RowMask((5, 1, 11, 8), None)
    indices, found_tokens = rows.group_indices(torch.device('cpu'))
    assert [index.shape for index in indices] == [(2, 11), (1, 5), (1, 1)]
    with FakeTensorMode() as mode:
        rows.tensors._made['group_indices', FIRST] = (
            [mode.from_tensor(x).to(FIRST) for x in indices],
            mode.from_tensor(found_tokens).to(FIRST),
        )
        inputs = [torch.empty(6, 25, 64, dtype=torch.bfloat16, device=FIRST) for _ in range(3)]
        out = attend_in_groups(*inputs, rows, scaling=0.3, dropout=0.0)
        assert out.shape == (25, 6, 64) and out.device == FIRST
    assert len(kernels) == 3
    assert all(SDPBackend.CUDNN_ATTENTION not in found and SDPBackend.FLASH_ATTENTION in found for found in kernels)


def rounds(model: Any, factor: float) -> Any:
    """Let the logits of long batches be rounded differently: they are `factor` times what they were."""
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) * (factor if x.shape[1] > 9 else 1.0)
    return model


def test_isolation_is_proven_to_the_bit_and_not_spoilt_by_rounding(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    args = SftArguments()
    assert use_padding_free(rounds(make_model().bfloat16(), 1.1), args, longest=30), '10 % of rounding, as in 80 layers'
    assert not use_padding_free(rounds(make_model().bfloat16(), 1.3), args, longest=30)
    assert not use_padding_free(rounds(make_model(), 1.1), args, longest=30), 'fp32 does not round like that'

    logits_beside = layout._logits_beside

    def leaking(model: Any, row: torch.Tensor, number: int) -> torch.Tensor:
        return logits_beside(model, row, number) * (1 + 1e-6 * number)

    monkeypatch.setattr(layout, '_logits_beside', leaking)
    with caplog.at_level('INFO'):
        assert not use_padding_free(make_model(), args, longest=30), 'a millionth is not the same'
    assert 'change by up to' in caplog.text and 'beside other rows' in caplog.text
    assert layout.rounding_depends_on_batch(SimpleNamespace(config=Config(num_local_experts=4)))
    assert layout.rounding_depends_on_batch(SimpleNamespace(config=Config(quantization_config={'load_in_8bit': True})))
    assert not layout.rounding_depends_on_batch(SimpleNamespace(config=Config(num_experts=0, quantization_config=None)))


class Config:
    """A config with these fields."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return self.fields

    def get_text_config(self) -> Config:
        return self


def test_chunks_of_logits_suit_the_device_and_the_estimate_counts_them() -> None:
    from utils.fast.constants import chunk_memory, chunk_rows, part_rows

    assert [chunk_rows(size, 4, on_gpu=False) for size in (400, 49152, 10**7)] == [20971, 170, 16]
    assert [chunk_rows(size, 2, on_gpu=False) for size in (400, 49152, 10**7)] == [41943, 341, 16]
    assert [chunk_rows(size, 2, on_gpu=True) for size in (49152, 152064, 10**8)] == [5376, 1664, 128]
    assert [part_rows(size, on_gpu=False) for size in (400, 49152, 10**7)] == [2621, 21, 1]
    assert Head(torch.nn.Linear(2, 152064, device=OTHER)).chunk(torch.bfloat16) == 1664
    assert Head(torch.nn.Linear(2, 49152)).chunk(torch.bfloat16) == 341
    assert chunk_memory(341, 49152, 2, on_gpu=False) == 341 * 49152 * 2 + 21 * 49152 * 4
    assert chunk_memory(10, 49152, 2, on_gpu=False) == 10 * 49152 * (2 + 4)
    assert chunk_memory(341, 49152, 4, on_gpu=False) == chunk_memory(341, 49152, 4, on_gpu=True) == 341 * 49152 * 4

    sizes = {'layers': 2, 'hidden': 64, 'vocabulary': 152064}
    shape: Any = SimpleNamespace(**sizes, head=0, embedding=152064 * 64)
    for tokens, rows in ((100, 100), (4000, 1664)):
        batch = Batch(tokens=tokens, longest=tokens, trained=tokens)
        logits, _ = _head(shape, Mode(full=False, compute=2), batch)
        assert logits == rows * 152064 * 2 + 3 * tokens * 64 * 2
        on_cpu, _ = _head(shape, Mode(full=False, compute=2, gpu=False), batch)
        assert on_cpu == min(tokens, 110) * 152064 * 2 + 6 * 152064 * 4 + 3 * tokens * 64 * 2
        logits, gradient = _head(shape, Mode(full=True, compute=2, trained=2), batch)
        adding = 4 * 152064 * 64 if tokens > rows else 0
        assert logits - gradient == rows * 152064 * 2 + 3 * tokens * 64 * 2 + adding
        on_cpu, gradient = _head(shape, Mode(full=True, compute=2, trained=2, gpu=False), batch)
        adding = (6 if tokens > 110 else 2) * 152064 * 64  # the part in bf16, and after the first chunk in fp32 too
        assert on_cpu - gradient == min(tokens, 110) * 152064 * 2 + 6 * 152064 * 4 + 3 * tokens * 64 * 2 + adding


def test_the_gradient_of_the_head_is_not_rounded_on_cuda() -> None:
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    assert chunked_loss._product_in_fp32(x, x.t()).dtype == torch.bfloat16
    with FakeTensorMode():
        fake = torch.empty(3, 4, dtype=torch.bfloat16, device=FIRST)
        found = chunked_loss._product_in_fp32(fake, torch.empty(4, 3, dtype=torch.bfloat16, device=FIRST))
        assert (found.dtype, found.device, found.shape) == (torch.float32, FIRST, (3, 3))

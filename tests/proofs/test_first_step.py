"""The first-step gate finds what would fail later, and does not change the results of the run."""

from __future__ import annotations

import json
import re
import resource
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import assert_equal, write_jsonl
from tests.support.tiny_models import make_model
from utils.data.encode_plan import EncodedRows
from utils.encode.encoded import Encoded

Run = Callable[..., Path]
MODES = {
    'lora': ('--lora_dropout_p', '0.1', '--dataloader_num_workers', '1'),
    'full': ('--sft_type', 'full', '--only_save_model', 'false'),
    'generate': ('--predict_with_generate', 'true', '--max_new_tokens', '12'),
    'adafactor': ('--optim', 'adafactor', '--lora_dropout_p', '0.1'),
}


@pytest.mark.slow
@pytest.mark.parametrize('mode', MODES)
def test_a_run_is_the_same_bits_with_and_without_it(mode: str, run_sft: Run) -> None:
    tried, plain = (run_sft(*MODES[mode], '--preflight', value) for value in ('true', 'false'))
    assert_equal(tried / 'checkpoint-6', plain / 'checkpoint-6')
    proof = json.loads((tried / 'proofs.json').read_text())['first_step']
    assert proof['heaviest_batch'] == {'rows': 2, 'longest_row_tokens': 36} and proof['checkpoint_bytes'] > 10_000
    assert 0 < proof['seconds'] == json.loads((tried / 'run.json').read_text())['preflight_seconds']
    assert not (tried / '.preflight').exists() and 'first_step' not in json.loads((plain / 'proofs.json').read_text())
    assert json.loads((plain / 'run.json').read_text())['preflight_seconds'] is None


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (('1', '--dataset_test_ratio', '0'), 'up to 2 '),
        (('1',), 'up to 3 '),
        (('3',), 'up to 4 '),
        (('-1',), '2 or more '),
    ],
)
def test_the_checkpoints_that_must_fit_on_the_disk_are_counted(
    flags: tuple[str, ...], said: str, run_sft: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple('usage', 'free')
    monkeypatch.setattr('utils.proofs.first_step.shutil.disk_usage', lambda _: usage(free=0))
    run_sft('--max_steps', '1', '--save_total_limit', *flags)
    assert f'--save_total_limit: {said}checkpoints of ' in caplog.text


def test_the_heaviest_batches_are_the_longest_rows_and_those_with_most_loss() -> None:
    rows = EncodedRows()
    for length, trained in ((9, 2), (3, 3), (8, 7), (5, 4)):
        rows.append(Encoded(input_ids=[7] * length, trained=(length - trained, length), prompt_length=0))
    assert [[row['row'] for row in batch] for batch in rows.heaviest(2)] == [[0, 2], [2, 3]]
    assert [[row['row'] for row in batch] for batch in rows.heaviest(9)] == [[0, 2, 3, 1]]


@pytest.mark.parametrize(
    ('step', 'said'),
    [
        (
            'training_step',
            'tokens) does not fit into memory: MemoryError Tried just now: --batch_size 1: does not fit;',
        ),
        ('prediction_step', 'rows) does not fit into memory: MemoryError Lower --eval_batch_size or --max_length.'),
    ],
)
def test_a_memory_error_without_a_word_is_told_too(
    step: str, said: str, run_sft: Run, problems: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.train.trainer import SftTrainer

    def full(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(SftTrainer, step, full)
    run_sft(expect=2)
    (message,) = problems()
    assert said in message


def test_the_batch_that_does_not_fit_is_described(
    run_sft: Run, tmp_path: Path, problems: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch with the most loss fails, and not that of the longest rows."""
    from utils.proofs.first_step import FirstStepGate

    rows = [{'query': 'q', 'response': 'a'} for _ in range(8)]
    rows[0:2] = [{'query': f'{i} ' + 'long ' * 60, 'response': 'a'} for i in range(2)]
    rows[2:4] = [{'query': f'{i}', 'response': 'a ' * 20} for i in range(2)]
    tried = FirstStepGate._forward_backward

    def limited(self: FirstStepGate, rows: list[dict[str, Any]], *, exchanges: bool) -> str | None:
        has_much_loss = len(rows) > 1 and all(row['trained'][1] - row['trained'][0] > 15 for row in rows)
        return 'no memory.' if has_much_loss else tried(self, rows, exchanges=exchanges)

    monkeypatch.setattr(FirstStepGate, '_forward_backward', limited)
    data = write_jsonl(tmp_path / 'rows.jsonl', rows)
    run_sft('--dataset', str(data), '--dataset_test_ratio', '0', expect=2)
    (message,) = problems()
    found = re.search(r'the heaviest batch \(2 rows of up to (\d+) tokens\) does not fit', message)
    assert found is not None and 20 < int(found[1]) < 60, message
    assert (
        f'--batch_size 1: fits; --gradient_checkpointing true: does not fit; --max_length {int(found[1]) // 2}: '
        in (message)
    )


@pytest.mark.slow
def test_memory_that_does_not_suffice_shows_at_once_with_what_would(
    run_sft: Run,
    tmp_path: Path,
    tokenizer: Any,
    problems: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two rows of 400 tokens need more than 1.1 GiB here, and one row or half of the tokens fits into 0.8 GiB.

    With less, it depends on where freed memory lies whether one row fits.
    """
    from utils.proofs.first_step import FirstStepGate

    make_model(intermediate_size=32768).save_pretrained(tmp_path / 'wide')
    tokenizer.save_pretrained(tmp_path / 'wide')
    rows = [{'query': f'what is {i}?', 'response': 'yes'} for i in range(20)]
    rows[3] = rows[9] = {'query': 'q', 'response': 'a ' * 390}
    data = write_jsonl(tmp_path / 'rows.jsonl', rows)
    begin, unlimited = FirstStepGate.on_train_begin, resource.getrlimit(resource.RLIMIT_AS)

    def limited(self: FirstStepGate, *args: Any, **kwargs: Any) -> None:
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(0.95 * 2**30), unlimited[1]))
        try:
            begin(self, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)

    monkeypatch.setattr(FirstStepGate, 'on_train_begin', limited)
    flags = ('--model_id_or_path', str(tmp_path / 'wide'), '--dataset', str(data), '--dataset_test_ratio', '0')
    run = run_sft(*flags, expect=2)
    (message,) = problems()
    found = re.match(
        r'--batch_size: the heaviest batch \(2 rows of up to (\d+) tokens\) does not fit into memory: .*allocate.* '
        # Whether gradient checkpointing is enough here depends on the memory that the allocator keeps.
        r'Tried just now: --batch_size 1: fits; --gradient_checkpointing true: (?:fits|does not fit); '
        r'--max_length (\d+): fits\. '
        r'A smaller --batch_size with more --gradient_accumulation_steps trains the same\.$',
        message,
    )
    assert found is not None, message
    assert 390 < int(found[1]) < 420 and int(found[2]) == int(found[1]) // 2
    assert not list(run.glob('checkpoint-*')) and not (run / '.preflight').exists()


@pytest.mark.parametrize(
    ('error', 'is_memory'),
    [
        (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\nmore'), True),
        (RuntimeError('CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`'), True),
        (RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB.'), True),
        (RuntimeError('CUDA error: CUBLAS_STATUS_EXECUTION_FAILED'), False),
        (ValueError('CUBLAS_STATUS_ALLOC_FAILED'), False),
    ],
)
def test_cublas_without_memory_for_its_workspace_is_a_memory_error(error: Exception, is_memory: bool) -> None:
    from utils.proofs.first_step import _tried

    def work() -> None:
        raise error

    if is_memory:
        assert _tried(work) == (None, str(error).splitlines()[0])
    else:
        with pytest.raises(type(error)):
            _tried(work)


@pytest.mark.optional
@pytest.mark.parametrize('optim', ['PagedAdamW8bit', 'PagedAdamW32bit', 'PagedAdEMAMix8bit', 'PagedLion32bit'])
def test_the_state_of_a_paged_optimizer_is_kept_and_begins_anew(optim: str) -> None:
    """bitsandbytes never releases its memory, so a second state would be held beside the first one."""
    import bitsandbytes
    import torch
    from accelerate.optimizer import AcceleratedOptimizer

    from utils.proofs.first_step import _forget

    def made() -> tuple[torch.nn.Parameter, Any]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(80, 80))
        return weight, getattr(bitsandbytes.optim, optim)([weight], lr=0.1)

    def steps(weight: torch.nn.Parameter, optimizer: Any) -> None:
        for factor in (1.0, 2.0):
            weight.grad = weight.detach().sin() * factor
            optimizer.step()

    weight, optimizer = made()
    steps(weight, optimizer)
    before = {name: x for name, x in optimizer.state[weight].items() if isinstance(x, torch.Tensor)}
    assert before['state1'].any()
    wrapped = AcceleratedOptimizer.__new__(AcceleratedOptimizer)
    wrapped.optimizer = optimizer
    _forget(wrapped)
    assert all(optimizer.state[weight][name] is x for name, x in before.items())

    fresh, other = made()
    with torch.no_grad():
        weight.copy_(fresh)
    steps(weight, optimizer)
    steps(fresh, other)
    assert torch.equal(weight, fresh)
    wrapped.optimizer = torch.optim.AdamW([fresh])
    wrapped.optimizer.step()
    _forget(wrapped)
    assert not wrapped.optimizer.state


def test_micro_batches_are_joined_up_to_what_fits_and_a_resumed_run_joins_alike(
    run_sft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """500 and 250 tokens do not fit here, 150 do. Without the trial a batch has at most as many as the longest row."""
    from utils.proofs import first_step
    from utils.train.trainer import SftTrainer

    rows = [{'query': 'x' * n, 'response': 'yes ' * (n % 7 + 1)} for n in (30, 3, 12, 9, 4, 20, 7, 31) * 3]
    flags = (
        '--dataset', str(write_jsonl(tmp_path / 'rows.jsonl', rows)), '--dataset_test_ratio', '0', '--batch_size', '1',
        '--gradient_accumulation_steps', '8', '--max_steps', '4', '--save_steps', '2', '--save_total_limit', '-1',
    )  # fmt: skip
    tried: list[tuple[int, int]] = []
    joined: list[int] = []
    step = SftTrainer.training_step
    tries = True
    most = 200

    def limited(self: SftTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = inputs['input_ids'].shape[1] if inputs else 0
        if self.in_preflight:
            tried.append((tokens, len(inputs['targets'])))
        elif tokens:
            joined.append(tokens)
        if tokens > most:
            raise MemoryError
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SftTrainer, 'training_step', limited)
    monkeypatch.setattr(first_step, '_JOINED', (500, 250, 150))
    monkeypatch.setattr(first_step, 'joins_more', lambda: tries)
    with caplog.at_level('INFO'):
        run = run_sft(*flags)
    longest = max(tokens for tokens, _ in tried[:2])
    wide = [(tokens, trained) for tokens, trained in tried if tokens > longest]
    assert len(wide) == 3 and wide[0][0] > 250 >= wide[1][0] > 200 >= 150 >= wide[2][0], 'the most that can be filled'
    assert all(tokens - trained in range(1, 9) for tokens, trained in wide), 'all but the first token of each row'
    fits = wide[2][0]
    assert f'joined_tokens = {fits} because micro-batches of a step are joined up to so many tokens' in caplog.text
    assert longest < max(joined) <= fits and len(joined) < 4 * 8, 'no joined batch has more tokens than were tried'

    tries = False
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-2'))
    assert_equal(resumed / 'checkpoint-4', run / 'checkpoint-4')
    assert 'does not fit into the memory of this machine' not in caplog.text

    most = longest
    joined.clear()
    run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-2'), '--output_dir', str(tmp_path / 'small'))
    assert max(joined) == longest
    assert f'a batch of up to {fits} tokens. Such a batch does not fit into the memory of this machine' in caplog.text

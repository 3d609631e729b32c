"""The first-step gate finds what would fail later, and does not change the results of the run."""

from __future__ import annotations

import json
import re
import resource
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


@pytest.mark.slow
def test_memory_that_does_not_suffice_shows_at_once_with_what_would(
    run_sft: Run,
    tmp_path: Path,
    tokenizer: Any,
    problems: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two rows of 400 tokens take 0.9 GiB in this model; one row or half the tokens at most 0.6."""
    from utils.proofs.first_step import FirstStepGate

    make_model(intermediate_size=32768).save_pretrained(tmp_path / 'wide')
    tokenizer.save_pretrained(tmp_path / 'wide')
    rows = [{'query': f'what is {i}?', 'response': 'yes'} for i in range(20)]
    rows[3] = rows[9] = {'query': 'q', 'response': 'a ' * 390}
    data = write_jsonl(tmp_path / 'rows.jsonl', rows)
    begin, unlimited = FirstStepGate.on_train_begin, resource.getrlimit(resource.RLIMIT_AS)

    def limited(self: FirstStepGate, *args: Any, **kwargs: Any) -> None:
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(0.675 * 2**30), unlimited[1]))
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

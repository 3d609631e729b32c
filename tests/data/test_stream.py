"""Streaming: each row once per pass, divided among processes; a resumed run continues where the other stopped."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import ROOT, history, small_flags, weights, write_jsonl
from tests.support.tiny_models import make_tokenizer
from utils import dataset
from utils.base.errors import ConfigError
from utils.data import stream
from utils.data.stream import TrainingStream, shuffled
from utils.data.stream_parts import open_streams
from utils.encode.make import make_encoder

Run = Callable[..., Path]
TOKENIZER = make_tokenizer()


def numbered(path: Path, count: int, name: str = 'q') -> str:
    return str(write_jsonl(path, [{'query': f'{name}{i}', 'response': f'the answer is {i}.'} for i in range(count)]))


def make(words: list[str], *, val_rows: int = 0, seed: int = 1) -> TrainingStream:
    encoder = make_encoder(TOKENIZER, template_type='auto', system='', system_typed=False, max_length=-1)
    return TrainingStream(encoder, open_streams(words, hub='modelscope'), val_rows=val_rows, seed=seed)


def names(rows: Iterator[dict[str, Any]], count: int) -> list[str]:
    """Return the questions of the first rows."""
    taken = (TOKENIZER.decode(row['input_ids']) for row in islice(rows, count))
    return [text.split('user\n')[1].split('<|im_end|>')[0] for text in taken]


def test_every_pass_gives_each_row_once_in_another_order(tmp_path: Path) -> None:
    rows = iter(make([numbered(tmp_path / 'a.jsonl', 150)]))
    passes = [names(rows, 150) for _ in range(3)]
    for one in passes:
        assert sorted(one) == sorted(f'q{i}' for i in range(150))
    assert passes[0] != passes[1] != passes[2] != [f'q{i}' for i in range(150)]


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    word = numbered(tmp_path / 'a.jsonl', 50)
    assert names(iter(make([word])), 120) == names(iter(make([word])), 120)
    assert names(iter(make([word])), 50) != names(iter(make([word], seed=2)), 50)


def test_processes_share_the_rows_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [numbered(tmp_path / 'a.jsonl', 75)]
    alone = names(iter(make(words)), 150)
    monkeypatch.setenv('WORLD_SIZE', '2')
    shares = []
    for rank in ('0', '1'):
        monkeypatch.setenv('RANK', rank)
        shares.append(names(iter(make(words)), 75))
    # 75 rows are odd: in the second pass the processes swap rows, and no row is repeated or missed.
    first = shares[0][:38] + shares[1][:37]
    assert sorted(first) == sorted(f'q{i}' for i in range(75))
    assert sorted(shares[0][38:] + shares[1][37:]) == sorted(first)
    assert sorted(alone[:75]) == sorted(first)


def test_the_buffer_is_bounded_and_mixes() -> None:
    seen = 0

    def rows() -> Iterator[Any]:
        nonlocal seen
        for i in range(1000):
            seen += 1
            yield i

    drawn = shuffled(rows(), 100, random.Random(0))
    first = next(drawn)
    assert seen == 101
    order = [first, *drawn]
    assert sorted(order) == list(range(1000)) and order != list(range(1000))
    assert max(i - position for position, i in enumerate(order)) <= 100


def test_data_sets_take_turns_and_each_holds_its_first_rows_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, 'SHUFFLE_ROWS', 1)
    halves = ([{'query': f'p{i}', 'response': 'x'} for i in range(6)], [{'query': 'v', 'response': 'x'}])
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'pair', lambda: halves)
    words = [numbered(tmp_path / 'a.jsonl', 8, 'a'), numbered(tmp_path / 'b.jsonl', 4, 'b'), 'pair']
    order = names(iter(make(words, val_rows=2)), 14)
    assert order == ['a2', 'b2', 'p0', 'a3', 'b3', 'p1', 'a4', 'p2', 'a5', 'p3', 'a6', 'p4', 'a7', 'p5']


def test_what_is_left_out_is_counted_once_and_said_while_running(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{'query': f'q{i}', 'response': None if i % 4 == 1 else 'r'} for i in range(80)]
    streamed = make([str(write_jsonl(tmp_path / 'a.jsonl', rows))])
    feed = iter(streamed)
    names(feed, 60)
    assert f'1 rows so far: null response ({tmp_path}/a.jsonl:2)' in caplog.text
    assert f'10 rows so far: null response ({tmp_path}/a.jsonl:38)' in caplog.text
    names(feed, 100)
    summary = streamed.summary()
    account = summary.pop('account')
    assert summary == {'train': {'rows_read': 60}, 'left_out': {'null response': 20}, 'noted': {}}
    # q1, q5, q9 and 17 questions of three characters belong to the rows without a response.
    left_out = 3 * 2 + 17 * 3
    kept = 7 * 2 + 53 * 3
    assert account['fields'] == {'reply text': {'trained': 60}, 'user text': {'context': kept, 'left out': left_out}}
    assert account['unused'] == {}
    assert '20 rows skipped: null response' in caplog.text


@pytest.mark.slow
def test_held_out_rows_of_a_stream_are_in_the_account_of_the_run(run_sft: Run, tmp_path: Path) -> None:
    rows = [{'query': f'what is {i}?', 'response': f'the answer is {i}.'} for i in range(12)]
    rows[1] = {'query': 'what is 1?', 'response': ''}
    data = write_jsonl(tmp_path / 'a.jsonl', [{**row, 'note': 'unread'} for row in rows])
    run = run_sft('--dataset', str(data), '--streaming', 'true', '--stream_val_rows', '3', '--max_steps', '4')
    told = json.loads((run / 'run.json').read_text())['data']
    assert told['validation']['rows'] == 3 and told['train']['rows_read'] == 8
    # 0, 2 and 3 are held out, 1 is skipped, the others are trained: each once per pass.
    sizes = [len(f'what is {i}?') for i in range(12)]
    assert told['account']['fields']['user text'] == {'context': sum(sizes) - sizes[1], 'left out': sizes[1]}
    assert told['account']['unused'] == {'column `note`': 11}
    assert told['left_out'] == {'empty response': 1}


@pytest.mark.slow
def test_rows_left_out_of_a_validation_part_are_counted(run_sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [{'query': f'what is {i}?', 'response': 'yes'} for i in range(8)]
    held_out = [{'query': 'b', 'response': None}, {'query': 'v', 'response': 'no', 'note': 'n'}]
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'pair', lambda: (train, held_out))
    run = run_sft('--dataset', 'pair', '--streaming', 'true', '--stream_val_rows', '3', '--max_steps', '2')
    told = json.loads((run / 'run.json').read_text())['data']
    assert told['validation']['rows'] == 1
    assert told['left_out'] == {'null response': 1}
    assert told['noted'] == {'column `note` is not used': 1}
    assert told['account']['fields']['user text']['left out'] == 1
    assert told['account']['unused'] == {'column `note`': 1}


def test_rows_are_counted_before_the_first_pass_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, 'SHUFFLE_ROWS', 1)
    streamed = make([numbered(tmp_path / 'a.jsonl', 500)], val_rows=2)
    names(iter(streamed), 3)
    read = streamed.summary()['train']['rows_read']
    assert 3 <= read < 498


def test_a_stream_without_training_rows_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='no training row is left'):
        next(iter(make([numbered(tmp_path / 'a.jsonl', 5)], val_rows=5)))


STREAM = ('--streaming', 'true', '--stream_val_rows', '4')


@pytest.mark.slow
def test_a_streamed_run_learns_and_its_validation_rows_are_the_first(run_sft: Run) -> None:
    import llm_infer

    run = run_sft(*STREAM)
    record = json.loads((run / 'run.json').read_text())
    assert record['steps'] == 6 and record['data']['validation']['rows'] == 4
    losses = [e['loss'] for e in history(run, 6) if 'loss' in e]
    assert losses[-1] < losses[0]
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-6'), '--max_new_tokens', '2']) == 0
    answered = [json.loads(line) for line in (run / 'checkpoint-6' / 'infer_result.jsonl').read_text().splitlines()]
    assert [row['messages'][-1]['content'] for row in answered] == [f'what is {i} and {i}?' for i in range(4)]


@pytest.mark.slow
def test_a_resumed_stream_equals_the_uninterrupted_one(run_sft: Run) -> None:
    flags = (*STREAM, '--max_steps', '14', '--eval_steps', '7', '--lora_dropout_p', '0.1')
    whole = run_sft(*flags)  # 14 steps of 4 rows: the second pass over 36 rows has begun
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-7'))
    assert history(resumed, 14) == history(whole, 14)
    expected = weights(whole, 14)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(resumed, 14).items())


RULES = {
    ('--max_steps', '-1'): '--streaming true needs --max_steps',
    ('--test_oom_error', 'true'): '--test_oom_error true sorts all rows',
    ('--stream_val_rows', '-1'): '--stream_val_rows takes 0 or more, got -1.',
}


@pytest.mark.parametrize('words', RULES, ids=' '.join)
def test_what_a_stream_cannot_do(words: tuple[str, ...], run_sft: Run, problems: Callable[[], list[str]]) -> None:
    run_sft(*STREAM, *words, expect=2)
    assert len(problems()) == 1 and RULES[words] in problems()[0]


@pytest.mark.slow
def test_drawing_from_a_stream_is_refused_and_flags_without_effect_are_named(
    run_sft: Run, data_file: Path, problems: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    run_sft(*STREAM, '--dataset', f'{data_file}#5', expect=2)
    assert 'the number after # draws from all rows, but --streaming true never has all rows in memory.' in problems()[0]
    run_sft(*STREAM, '--max_steps', '1', '--train_dataset_sample', '5')
    for name in ('train_dataset_sample', 'dataset_test_ratio', 'dataloader_num_workers'):
        assert f'--{name} has no effect' in caplog.text


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_train_on_the_rows_of_one(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    runs = []
    for processes, accumulation in ((1, 2), (2, 1)):
        words = small_flags(model_dir, data_file, tmp_path / str(processes))
        words += [*STREAM, '--gradient_accumulation_steps', str(accumulation)]
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        done = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), 'llm_sft.py', *words],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(history(next((tmp_path / str(processes)).glob('tiny-llama/*')), 6))
    for one, two in zip(*runs, strict=True):
        for key, value in one.items():
            assert two[key] == pytest.approx(value, abs=1e-5), key

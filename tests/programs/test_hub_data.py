"""Data sets of the hubs in both programs: trained by one command, repeated, resumed, streamed, answered, checked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.support.loopback_hub import Files, LoopbackHub
from tests.support.runs import ROOT, run_program, small_flags

NEWER = 'd' * 40
GREEDY = ['--do_sample', 'false', '--max_new_tokens', '4']
Sft = Callable[..., Path]


def as_lines(rows: list[Any]) -> bytes:
    return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode()


def as_parquet(rows: list[Any]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def qa(count: int, name: str = 'q') -> list[dict[str, str]]:
    return [{'query': f'{name} {i}', 'response': f'the answer is {i}'} for i in range(count)]


@pytest.fixture
def offline(loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which no hub can be reached."""

    def cut() -> None:
        for name in ('MODELSCOPE_ENDPOINT', 'HF_ENDPOINT'):
            monkeypatch.setenv(name, 'http://127.0.0.1:9')
        monkeypatch.setattr('modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS', 1)

    return cut


def lock(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / 'lock.json').read_text())['data']
    return found


# Five public data sets under their own ids: their cards, the names of their files, and the columns of their rows.
CARDS = {
    'alpaca': """---
license: cc-by-nc-4.0
language:
- en
task_categories:
- text-generation
dataset_info:
  features:
  - name: instruction
    dtype: string
  splits:
  - name: train
    num_examples: 52002
---
# Dataset Card for Alpaca
""",
    'ultrachat': """---
language:
- en
license: mit
pretty_name: UltraChat 200k
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test_sft
    path: data/test_sft-*
  - split: train_gen
    path: data/train_gen-*
  - split: test_gen
    path: data/test_gen-*
---
""",
    'gsm8k': """---
license:
- mit
dataset_info:
- config_name: main
- config_name: socratic
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
  - split: test
    path: socratic/test-*
---
""",
}


def turns(*texts: str, names: tuple[str, str] = ('role', 'content')) -> list[dict[str, str]]:
    roles = ('user', 'assistant') if names[0] == 'role' else ('human', 'gpt')
    return [{names[0]: roles[i % 2], names[1]: text} for i, text in enumerate(texts)]


def ultrachat(split: str) -> bytes:
    return as_parquet(
        [
            {'prompt': f'{split} {i}', 'prompt_id': f'{i:064x}', 'messages': turns(f'{split} {i}', 'a', 'more', 'b')}
            for i in range(12)
        ]
    )


def slim_orca(index: int) -> dict[str, Any]:
    weights = zip(
        ('system', 'human', 'gpt'), (None, 0.0, 1.0), ('You help.', f'ask {index}', f'told {index}'), strict=True
    )
    return {'conversations': [{'from': who, 'value': text, 'weight': weight} for who, weight, text in weights]}


PUBLIC: dict[str, tuple[str, Files, int, int]] = {
    # id, files, training rows, validation rows
    'tatsu-lab/alpaca': (
        'tatsu-lab/alpaca',
        {
            'README.md': CARDS['alpaca'].encode(),
            'data/train-00000-of-00001-a09b74b3ef9c3b56.parquet': as_parquet(
                [
                    {'instruction': f'Add {i}.', 'input': '1 2' * (i % 2), 'output': f'{i}', 'text': f'Below {i}'}
                    for i in range(20)
                ]
            ),
        },
        18,
        2,
    ),
    'HuggingFaceH4/ultrachat_200k': (
        'HuggingFaceH4/ultrachat_200k',
        {
            'README.md': CARDS['ultrachat'].encode(),
            **{
                f'data/{split}-{shard:05d}-of-00002-0123456789abcdef.parquet': ultrachat(split)
                for split in ('train_sft', 'test_sft', 'train_gen', 'test_gen')
                for shard in range(2)
            },
        },
        22,
        2,
    ),
    'openai/gsm8k': (
        'openai/gsm8k:main',
        {
            'README.md': CARDS['gsm8k'].encode(),
            **{
                f'{subset}/{split}-00000-of-00001.parquet': as_parquet(
                    [{'question': f'{subset} {split} {i}', 'answer': f'#### {i}'} for i in range(20)]
                )
                for subset in ('main', 'socratic')
                for split in ('train', 'test')
            },
        },
        18,
        2,
    ),
    'databricks/databricks-dolly-15k': (
        'databricks/databricks-dolly-15k',
        {
            'README.md': b'---\nlicense: cc-by-sa-3.0\n---\n',
            'databricks-dolly-15k.jsonl': as_lines(
                [
                    {'instruction': f'Name {i}.', 'context': '1 2' * (i % 2), 'response': f'{i}', 'category': 'open_qa'}
                    for i in range(20)
                ]
            ),
        },
        18,
        2,
    ),
    'Open-Orca/SlimOrca': (
        'Open-Orca/SlimOrca',
        {
            'README.md': b'---\nlicense: mit\n---\n',
            'oo-labeled_correct.gpt4.sharegpt.jsonl': as_lines([slim_orca(i) for i in range(20)]),
        },
        18,
        2,
    ),
    'teknium/OpenHermes-2.5': (
        'teknium/OpenHermes-2.5',
        {
            'README.md': b'---\nlanguage:\n- eng\n---\n',
            'openhermes2_5.json': json.dumps(
                [
                    {
                        'custom_instruction': None, 'source': 'airoboros2.2', 'skip_prompt_formatting': False,
                        'conversations': turns(f'ask {i}', f'told {i}', names=('from', 'value')), 'idx': None,
                    }
                    for i in range(20)
                ]
            ).encode(),
        },
        18,
        2,
    ),
}  # fmt: skip


# What a command says about a data set whose columns have names of their own.
MORE = {'databricks/databricks-dolly-15k': ['--columns', 'context=input,response=output']}


@pytest.mark.slow
@pytest.mark.parametrize('public_id', PUBLIC)
def test_a_public_data_set_is_trained_on_by_one_command(public_id: str, loopback: LoopbackHub, run_sft: Sft) -> None:
    word, files, train, val = PUBLIC[public_id]
    loopback.add('dataset', public_id, files, commit=NEWER)
    run = run_sft('--hub', 'huggingface', '--dataset', word, '--max_steps', '2', *MORE.get(public_id, ()))
    record = json.loads((run / 'run.json').read_text())
    assert record['steps'] == 2 and record['data']['left_out'] == {}
    assert (record['data']['train']['rows'], record['data']['validation']['rows']) == (train, val)
    assert record['data']['served'] == {word: f'huggingface:{public_id}@master'}
    assert lock(run)[word]['commit'] == NEWER
    assert not any('test' in request or 'gen-' in request or 'socratic' in request for request in loopback.fetched())


def refuse_to_plan(*_: object, **__: object) -> None:
    """Stand for planning, where the rows of held_out.json must suffice."""
    raise AssertionError('all data were read')


@pytest.mark.slow
def test_a_run_is_repeated_and_answered_without_network_and_refused_at_another_commit(
    loopback: LoopbackHub,
    run_sft: Sft,
    offline: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {'train.jsonl': as_lines(qa(20)), 'README.md': b'# rows\n'}
    loopback.add('dataset', 'owner/name', files, commit=NEWER)
    run = run_sft('--hub', 'huggingface', '--dataset', 'owner/name')
    loopback.requests.clear()
    assert llm_sft.main(['--from_run', str(run)]) == 0
    assert loopback.fetched() == []
    answers = run / 'answers.jsonl'
    asked = ['--ckpt_dir', str(run / 'checkpoint-6'), '--result_path', str(answers), *GREEDY]
    with monkeypatch.context() as patch:
        patch.setattr('utils.run.rows.plan_of', refuse_to_plan)
        assert llm_infer.main(asked) == 0
    held_out = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(held_out) == json.loads((run / 'run.json').read_text())['data']['validation']['rows'] == 2

    loopback.add('dataset', 'owner/name', {**files, 'train.jsonl': as_lines(qa(21))}, commit='e' * 40)
    caplog.clear()
    assert llm_sft.main(['--from_run', str(run)]) == 2
    pinned = f'The hub served commit {NEWER[:12]} then. Its rows are --dataset owner/name@{NEWER}.'
    assert pinned in caplog.text and 'the rows of owner/name have changed since that run' in caplog.text
    caplog.clear()
    assert llm_infer.main(asked) == 2
    assert pinned in caplog.text
    assert llm_sft.main(['--from_run', str(run), '--dataset', f'owner/name@{NEWER}']) == 2, (
        'the test hub has no history'
    )
    loopback.add_revision('owner/name', 'old', files, commit=NEWER)
    assert llm_sft.main(['--from_run', str(run), '--dataset', f'owner/name@{NEWER}']) == 0

    loopback.add('dataset', 'owner/name', files, commit=NEWER)
    assert llm_sft.main(['--from_run', str(run)]) == 0
    offline()
    caplog.clear()
    assert llm_sft.main(['--from_run', str(run)]) == 0
    assert llm_infer.main(asked) == 0
    assert 'dataset huggingface:owner/name@master is taken from' in caplog.text
    resumed = ['--resume_from_checkpoint', str(run / 'checkpoint-3')]
    again = run_sft('--hub', 'huggingface', '--dataset', 'owner/name', *resumed)
    assert lock(again) == lock(run)


@pytest.mark.slow
def test_a_validation_split_is_answered_and_a_whole_data_set_if_it_is_typed(
    loopback: LoopbackHub, run_sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        'train.jsonl': as_lines(qa(20)),
        'validation.jsonl': as_lines(qa(3, 'held')),
        'test.jsonl': as_lines(qa(5, 't')),
    }
    loopback.add('dataset', 'owner/name', files)
    run = run_sft('--dataset', 'owner/name', '--max_steps', '2', '--eval_steps', '2')

    def answered(*flags: str) -> list[str]:
        target = tmp_path / f'{len(flags)}{flags[-1:]}.jsonl'.replace('/', '-')
        words = ['--ckpt_dir', str(run / 'checkpoint-2'), '--result_path', str(target), *GREEDY]
        assert llm_infer.main([*words, *flags]) == 0
        return [json.loads(line)['messages'][0]['content'] for line in target.read_text().splitlines()]

    held = [row['query'] for row in qa(3, 'held')]
    with monkeypatch.context() as patch:
        patch.setattr('utils.run.rows.plan_of', refuse_to_plan)
        assert answered() == held
    assert answered('--dataset', 'owner/name') == held
    assert answered('--dataset', 'owner/name:test') == [row['query'] for row in qa(5, 't')]


@pytest.mark.slow
def test_a_data_set_of_a_hub_is_streamed(loopback: LoopbackHub, run_sft: Sft) -> None:
    files = {'train.jsonl': as_lines(qa(30)), 'dev.jsonl': as_lines(qa(4, 'held'))}
    loopback.add('dataset', 'owner/name', files, commit=NEWER)
    streamed = ['--streaming', 'true', '--dataset', 'owner/name']
    run = run_sft(*streamed)
    record = json.loads((run / 'run.json').read_text())
    assert record['steps'] == 6 and record['data']['validation']['rows'] == 4
    assert record['data']['served'] == {'owner/name': 'modelscope:owner/name@master'}
    assert lock(run)['owner/name']['commit'] == NEWER
    run_sft(*streamed[:2], '--dataset', 'owner/name#5', expect=2)


def test_the_data_check_names_rows_of_a_hub_by_file_and_row(
    loopback: LoopbackHub, run_sft: Sft, tmp_path: Path
) -> None:
    bad = b'{"query": "x", "response": null}\n{"query"\n'
    loopback.add('dataset', 'owner/name', {'train.jsonl': as_lines(qa(5)) + bad})
    run_sft('--check_dataset', 'true', '--dataset', 'owner/name', expect=1)
    (report,) = tmp_path.glob('output/*/dataset_report.jsonl')
    findings = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(found['file'].rsplit('/', 1)[-1], found['line']) for found in findings] == [
        ('train.jsonl', 7),
        ('train.jsonl', 6),
    ]


def test_a_dry_run_fetches_only_the_card(
    loopback: LoopbackHub, run_sft: Sft, capsys: pytest.CaptureFixture[str]
) -> None:
    word, files, _, _ = PUBLIC['openai/gsm8k']
    loopback.add('dataset', 'openai/gsm8k', files)
    flags = ['--dry_run', 'true', '--hub', 'huggingface']
    run_sft(*flags, '--dataset', word)
    assert 'data set openai/gsm8k:main: huggingface:openai/gsm8k@master, 1 files, ' in capsys.readouterr().out
    assert [request.rsplit('/', 1)[-1] for request in loopback.fetched()] == ['README.md']
    run_sft(*flags, '--dataset', 'openai/gsm8k')
    said = capsys.readouterr().out
    assert (
        "data set openai/gsm8k: huggingface:openai/gsm8k@master, files unknown: --dataset 'openai/gsm8k': the data"
        in said
    )


def test_the_same_data_set_twice_and_a_hub_without_effect_are_said(
    loopback: LoopbackHub, run_sft: Sft, problems: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    loopback.add('dataset', 'owner/name', {'train.jsonl': as_lines(qa(5))})
    run_sft('--dataset', 'owner/name', 'ms:owner/name', expect=2)
    assert problems() == ["--dataset: 'ms:owner/name' is named twice, so its rows would be used twice. Name it once."]
    run_sft('--dry_run', 'true', '--hub', 'huggingface', '--dataset', 'ms:owner/name')
    assert '--hub has no effect' in capsys.readouterr().out
    run_sft('--dry_run', 'true', '--hub', 'huggingface', '--dataset', 'owner/name')
    assert '--hub has no effect' not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_fetch_once_and_train_on_the_same_rows(
    loopback: LoopbackHub, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    loopback.add('dataset', 'owner/name', {'train.jsonl': as_lines(qa(20)), 'README.md': b'# rows\n'})
    words = [*small_flags(model_dir, data_file, tmp_path / 'out'), '--dataset', 'owner/name', '--max_steps', '2']
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', str(port)]
    done = subprocess.run(
        [*launcher, str(ROOT / 'llm_sft.py'), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ('train.jsonl', 'README.md'):
        assert sum(name in request for request in loopback.fetched()) == 1, name
    (run,) = (tmp_path / 'out').glob('*/*')
    assert lock(run)['owner/name']['rows'] == 20


@pytest.mark.slow
def test_a_refused_data_set_ends_the_program_with_one_message(
    loopback: LoopbackHub, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    ran = tmp_path / 'ran'
    loopback.add('dataset', 'owner/name', {'name.py': f'open({str(ran)!r}, "w")'.encode()})
    done = run_program('llm_sft.py', *small_flags(model_dir, data_file, tmp_path / 'out'), '--dataset', 'owner/name')
    assert done.returncode == 2 and 'a script of a data set is never run' in done.stderr
    assert 'Traceback' not in done.stderr and not ran.exists() and not (tmp_path / 'out').exists()

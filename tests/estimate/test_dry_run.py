"""--dry_run: it makes no folder, downloads nothing, and what it prints is what the run then does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_sft
from tests.support.loopback_hub import LoopbackHub
from tests.support.runs import small_flags, write_jsonl
from utils.estimate.gpus import known_gpus

Run = Callable[..., Path]
QLORA = ['--model_type', 'qwen-7b-chat', '--quantization_bit', '4', '--gradient_checkpointing', 'true']


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    """Return what a dry run prints, line by line under its titles."""
    capsys.readouterr()
    assert llm_sft.main([*words, '--dry_run', 'true']) == 0
    printed: dict[str, list[str]] = {}
    title = ''
    for line in capsys.readouterr().out.splitlines():
        if line.startswith('  '):
            printed[title].append(line.strip())
        else:
            title = line
            printed[title] = []
    return printed


@pytest.mark.slow
def test_a_dry_run_says_what_the_run_then_does(
    model_dir: Path, data_file: Path, tmp_path: Path, run_sft: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ['--max_steps', '-1', '--num_train_epochs', '2', '--gradient_accumulation_steps', '3']
    said = dry(capsys, *small_flags(model_dir, data_file, tmp_path / 'output'), *flags)
    assert not (tmp_path / 'output').exists(), 'no run folder'
    assert said['would download'] == ['nothing: all files are here']
    assert 'learning_rate = 0.0001 because sft_type is lora' not in said['decisions'], 'it was typed'
    run = run_sft(*flags)
    (state,) = run.glob('checkpoint-12/trainer_state.json')
    assert json.loads(state.read_text())['global_step'] == 12
    data = json.loads((run / 'run.json').read_text())['data']
    train = data['train']
    longest = train['max']
    trained = round(train['trained_share'] * train['tokens'])
    assert said['data'][:4] == [
        f'{train["rows"]} training rows, {data["validation"]["rows"]} validation, 0 skipped',
        f'{train["tokens"]:,} training tokens an epoch, {trained:,} of them trained; the longest row has {longest}',
        '12 optimizer steps of 6 rows (batch 2 x accumulation 3 x processes 1)',
        '1 of 12 steps are warm-up, evaluations every 3 steps and at the end, checkpoints every 3 steps and at the end',
    ]
    assert said['model'][1] == 'LlamaForCausalLM, 44,192 parameters'
    adapter = int(said['model'][2].split()[1].replace(',', ''))
    stored = json.loads((run / 'checkpoint-12' / 'adapter_config.json').read_text())
    assert len(stored['target_modules']) == 7
    attention = 2 * (32 + 32) + 2 * (32 + 16)  # q and o, and k and v of half the width
    assert adapter == 2 * 8 * (attention + 3 * (32 + 64)), 'two layers, rank 8'
    (memory,) = (lines for title, lines in said.items() if title.startswith('memory of this CPU'))
    assert [line.split()[0] for line in memory[1:8]] == [
        'weights', 'adapter', 'gradients', 'optimizer', 'activations', 'logits', 'peak',
    ]  # fmt: skip
    assert 'without (as asked)' in memory[0]
    (fits,) = (lines for title, lines in said.items() if title.startswith('GPUs'))
    assert fits[0].endswith(', '.join(name for name, _, _ in known_gpus())), 'a tiny model fits on each'


def test_a_model_that_is_not_here_is_planned_without_network(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(Path.home().rglob('*.safetensors'))
    said = dry(capsys, *QLORA, '--dataset', str(data_file), '--max_length', '1024')
    adapter = 32 * 8 * (3 * (4096 + 4096))
    rest = 32 * 8 * ((4096 + 4096) + 3 * (4096 + 11008))
    assert (
        f'lora_target_modules all-linear would add 128 linear layers: {adapter + rest:,} trainable parameters instead '
        f'of {adapter:,}'
    ) in said['decisions']
    assert said['model'][:2] == ['qwen-7b-chat: not on this machine', 'Qwen2ForCausalLM, 7,721,324,544 parameters']
    assert said['data'] == [
        '39 training rows, 1 validation; tokens are not counted: the tokenizer is not here',
        'at most 3 optimizer steps of 16 rows (batch 1 x accumulation 16 x processes 1); at most 39,936 tokens',
        '1 of 3 steps are warm-up, evaluations every 50 steps and at the end, '
        'checkpoints every 50 steps and at the end',
        'memory is counted for rows of 1024 tokens, each token trained',
    ]
    (download,) = said['would download']
    assert download.startswith('model modelscope:qwen/Qwen-7B-Chat, files unknown: ')
    (memory,) = (lines for title, lines in said.items() if title.startswith('memory'))
    assert re.split(r' +', memory[1])[:2] == ['weights', '5.43'] and 'with (as asked)' in memory[0]
    assert said['time, an estimate'][0].endswith('floating-point operations for at most 39,936 tokens')
    assert not list(tmp_path.iterdir()) and sorted(Path.home().rglob('*.safetensors')) == before


def test_a_time_under_a_second_on_every_gpu_is_said_once(
    data_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llm_sft.main([*small_flags(model_dir, data_file, tmp_path), '--dry_run', 'true']) == 0
    assert capsys.readouterr().out.rstrip().endswith('not measured: under 1 s on each GPU that this fits on')


def test_what_would_be_downloaded_is_named_and_not_fetched(
    loopback: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loopback.add('model', 'qwen/Qwen-7B-Chat', {'config.json': b'{}', 'model.safetensors': bytes(2**20)})
    loopback.add('dataset', 'AI-ModelScope/blossom-math-v2', {'train.jsonl': b'{}' * 100, 'README.md': b'x'})
    said = dry(capsys, *QLORA, '--dataset', 'blossom-math-zh', '--output_dir', str(tmp_path / 'output'))
    model, data = said['would download']
    assert model.startswith('model modelscope:qwen/Qwen-7B-Chat@master, 2 files, 0.00 GiB: ')
    assert set(model.split(': ')[1].split(', ')) == {'config.json', 'model.safetensors'}
    assert (
        data
        == 'data set blossom-math-zh: modelscope:AI-ModelScope/blossom-math-v2@master, 1 files, 0.00 GiB: train.jsonl'
    )
    assert [path.rpartition('=')[2] for path in loopback.fetched()] == ['README.md'], (
        'only the card, which says what is read'
    )
    assert not (tmp_path / 'output').exists()
    assert said['data'][0] == 'at most 20000 training rows: data that is not here cannot be counted'
    assert said['data'][1].startswith('at most 1250 optimizer steps of 16 rows')


def test_what_is_planned_without_a_tokenizer_has_the_evaluations_and_the_most_tokens_of_the_run(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*QLORA, '--dataset', str(data_file), '--dataset_test_ratio', '0', '--max_length', '1024']
    said = dry(capsys, *flags, '--num_train_epochs', '1.5')
    # 3 steps for the 40 rows of the first epoch, and 2 whole steps in the second one.
    assert said['data'][1].startswith('at most 5 optimizer steps of 16 rows')
    assert said['data'][1].endswith(f'; at most {80 * 1024:,} tokens')
    assert 'evaluations' not in said['data'][2]
    rows: list[Any] = [{'query': 'a', 'response': 'b'}]
    said = dry(capsys, *flags, '--val_dataset', str(write_jsonl(tmp_path / 'val.jsonl', rows)))
    assert said['data'][0].startswith('40 training rows, 1 validation; ')
    assert 'evaluations every 50 steps and at the end' in said['data'][2]


def test_a_model_of_unknown_size_is_called_so(
    tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = dry(capsys, '--model_type', 'ziya2-13b', '--dataset', str(data_file))
    assert said['model'][1].startswith('its size is not known')
    assert set(said) == {'decisions', 'model', 'data', 'would download'}


def test_gpus_that_are_named_are_planned_for(
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1')
    said = dry(capsys, *small_flags(model_dir, data_file, tmp_path / 'output'))
    assert any(title.startswith('memory of a GPU of 2 that share the layers') for title in said)
    (fits,) = (lines for title, lines in said.items() if title.startswith('GPUs'))
    assert fits[0].startswith('2 x, without gradient checkpointing, ')


def test_padding_and_packs_are_counted(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [{'query': 'a', 'response': 'b ' * n} for n in (2, 3, 40, 4, 5, 6, 7, 8, 9, 10)]
    flags = small_flags(model_dir, write_jsonl(tmp_path / 'rows.jsonl', rows), tmp_path / 'output')
    concatenated = dry(capsys, *flags)['data'][-1]
    padded = dry(capsys, *flags, '--padding_free', 'false')['data'][-1]
    packed = dry(capsys, *flags, '--packing', 'true', '--max_length', '200')['data']
    first, second = (int(line.split()[3]) for line in (concatenated, padded))
    assert second > first and second % 2 == 0 and ' with padding' in padded
    assert re.search(r', in \d packs$', packed[0]) and int(packed[-1].split()[3]) > second


@pytest.mark.slow
def test_the_schedule_is_shown_as_the_run_uses_it(
    model_dir: Path, data_file: Path, tmp_path: Path, run_sft: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ['--max_steps', '-1', '--num_train_epochs', '0.7', '--warmup_steps', '9', '--eval_steps', '0.3']
    flags += ['--lr_scheduler_type', 'warmup_stable_decay', '--decay_ratio', '0.4']
    said = dry(capsys, *small_flags(model_dir, data_file, tmp_path / 'output'), *flags)
    assert said['data'][2].startswith('7 optimizer steps of 4 rows')
    assert said['data'][3] == (
        '3 of 7 steps are warm-up, 3 at the end are decay, evaluations every 3 steps and at the end, '
        'checkpoints every 3 steps and at the end'
    )
    limited = '--warmup_steps 9: the run has 7 steps, and at most half of them can be warm-up'
    assert any(limited in line for line in said['decisions'])
    limited_time = dry(capsys, *small_flags(model_dir, data_file, tmp_path / 'output'), *flags, '--max_minutes', '30')
    assert limited_time['data'][2].endswith(
        ', fewer if --max_minutes 30 needs it: a trial on this machine measures a step first'
    )

    run = run_sft(*flags)
    record = json.loads((run / 'sft_args.json').read_text())
    assert (record['warmup_steps'], record['eval_steps'], record['save_steps']) == (3, 3, 3)
    assert json.loads((run / 'run.json').read_text())['steps'] == 7


def test_a_dry_run_says_which_rows_are_skipped_and_what_is_noted(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{'query': f'q{i}', 'response': 'say <|im_end|>' if i == 2 else f'r{i}'} for i in range(12)]
    file = write_jsonl(tmp_path / 'a.jsonl', [*rows, {'query': 'a', 'response': None}])
    said = dry(capsys, *small_flags(model_dir, file, tmp_path / 'output'))
    assert f'warning: 1 row skipped: null response ({file}:13)' in said['decisions']
    control = 'control tokens typed inside the text: kept as plain text'
    assert f'warning: 1 row noted: {control} ({file}:3)' in said['decisions']

"""The record of a run, and what is compared with it when the run is resumed or served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_infer
import llm_sft
from tests.support.runs import ROOT, small_flags, write_jsonl
from tests.support.tiny_models import make_tokenizer
from utils.base.errors import ConfigError
from utils.base.errors import Problems as CollectedProblems
from utils.base.version import VERSION
from utils.cli.arguments import SftArguments
from utils.cli.machine import check_environment
from utils.cli.parser import parse
from utils.data.sources import find_files, parse_source
from utils.run.folder import make_run_dir
from utils.run.lock import flag_words
from utils.run.open_model import open_model
from utils.train.guard import check_positions

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
GREEDY = ('--do_sample', 'false', '--max_new_tokens', '2')


def made_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{'query': f'what is {i}?', 'response': f'it is {i}.'} for i in range(first, first + count)]


def answered(path: Path) -> list[str]:
    return [json.loads(line)['label'] for line in path.read_text(encoding='utf-8').splitlines()]


EVERY = 'down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj'


@pytest.mark.slow
def test_arguments_are_recorded_as_used_and_served_so(
    model_dir: Path, data_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is trained on a machine with bf16 and served on one without."""
    words = small_flags(model_dir, data_file, tmp_path / 'out')
    at = words.index('--dtype')
    del words[at : at + 2]
    best = {'type': (torch.bfloat16, 'the CPU multiplies it natively')}
    names = {'bf16': torch.bfloat16, 'fp32': torch.float32}
    monkeypatch.setattr(
        'utils.run.open_model.pick_dtype', lambda name: (names[name], 'it was asked for') if name else best['type']
    )
    assert llm_sft.main([*words, '--max_steps', '1']) == 0
    (run,) = (tmp_path / 'out').glob('*/*')
    outcome = json.loads((run / 'run.json').read_text())
    record = json.loads((run / 'checkpoint-1' / 'sft_args.json').read_text())
    used = {
        'dtype': 'bf16', 'use_flash_attn': False, 'padding_free': True,
        'lora_target_modules': ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj'],
    }  # fmt: skip
    asked = {'lora_target_modules': ['all-linear']}
    for name, value in used.items():
        assert record[name] == value
        assert record['asked'][name] == asked.get(name)
        assert any(line.startswith(f'{name} = ') for line in outcome['decisions']), outcome['decisions']
    assert not [name for name in ('dtype', 'use_flash_attn', 'padding_free') if record[name] is None]
    assert json.loads((run / 'lock.json').read_text())['toolkit'] == outcome['toolkit']
    assert outcome['toolkit']['version'] == VERSION
    assert 'this toolkit' in (run / 'report.html').read_text(encoding='utf-8')

    best['type'] = (torch.float32, 'the CPU has no native bf16')
    opened: list[Any] = []
    real = open_model
    monkeypatch.setattr('utils.run.open_model.open_model', lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-1'), *GREEDY]) == 0
    assert opened[-1][2] == torch.bfloat16
    assert 'dtype = bf16 because the run was trained in it' in caplog.text
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-1'), *GREEDY, '--dtype', 'fp32']) == 0
    assert opened[-1][2] == torch.float32
    assert '--dtype fp32 is not what the run was trained with (bf16).' in caplog.text


@pytest.mark.slow
def test_decisions_are_told_before_anything_is_fetched(
    model_dir: Path, data_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: Any, **__: Any) -> Any:
        raise ConfigError('fetched')

    for name in ('utils.run.rows.rows_of', 'utils.run.rows.rows_to_answer'):
        monkeypatch.setattr(name, fetch)
    words = small_flags(model_dir, data_file, tmp_path / 'out')
    assert llm_sft.main(words) == 2
    assert caplog.text.index('save_steps = 3 because it follows --eval_steps') < caplog.text.index('fetched')
    caplog.clear()
    assert llm_infer.main(['--model_id_or_path', str(model_dir), '--dataset', str(data_file), '--top_k', '5']) == 2
    assert caplog.text.index('template_type = auto because') < caplog.text.index('fetched')


@pytest.mark.slow
def test_data_that_changed_are_refused_on_serving_and_on_resuming(
    run_sft: Run, tmp_path: Path, problems: Problems, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_jsonl(tmp_path / 'mine.jsonl', made_rows(20))
    flags = ('--dataset', str(data), '--max_steps', '2', '--eval_steps', '1')
    run = run_sft(*flags)
    serve = ['--ckpt_dir', str(run / 'checkpoint-2'), *GREEDY]
    assert llm_infer.main(serve) == 0
    held_out = answered(run / 'checkpoint-2' / 'infer_result.jsonl')

    write_jsonl(data, [{'query': 'new', 'response': 'one more'}, *made_rows(20)])
    assert llm_infer.main(serve) == 2
    assert problems()[-1].startswith(f'--dataset {data}: the rows have changed since checkpoint-2 was trained')
    assert ': 20 rows then (sha256 ' in problems()[-1]
    assert ', 21 rows now (sha256 ' in problems()[-1]
    assert 'Put the data back, or type --dataset to answer all rows' in problems()[-1]
    run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-1'), expect=2)
    assert problems()[-1].startswith(f'--dataset {data}: the rows have changed since checkpoint-1 was trained')
    assert problems()[-1].endswith('or leave --resume_from_checkpoint out to start a new run.')

    write_jsonl(data, made_rows(20))
    assert llm_infer.main(serve) == 0
    assert answered(run / 'checkpoint-2' / 'infer_result-2.jsonl') == held_out
    (run / 'lock.json').unlink()
    (run / 'held_out.json').unlink()
    assert llm_infer.main(serve) == 0
    assert 'lock.json is missing, so the data cannot be compared with the data of the run.' in caplog.text


def test_held_out_rows_are_found_without_planning(
    run_sft: Run, tmp_path: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / 'mine.jsonl', made_rows(30))
    run = run_sft('--dataset', str(data), '--max_steps', '1', '--dataset_test_ratio', '0.2')
    serve = ['--ckpt_dir', str(run / 'checkpoint-1'), *GREEDY]

    def plan_of(*_: Any, **__: Any) -> Any:
        raise ConfigError('planned')

    with monkeypatch.context() as patched:
        patched.setattr('utils.run.rows.plan_of', plan_of)
        assert llm_infer.main(serve) == 0
        assert llm_infer.main([*serve, '--dataset_test_ratio', '0.3']) == 2
        assert problems()[-1] == 'planned', 'other flags hold out other rows'
    quick = answered(run / 'checkpoint-1' / 'infer_result.jsonl')
    assert len(quick) == 6

    kept = run / 'held_out.json'
    content = kept.read_text(encoding='utf-8')
    kept.unlink()  # as in the folder of an older run
    assert llm_infer.main(serve) == 0
    assert answered(run / 'checkpoint-1' / 'infer_result-2.jsonl') == quick

    kept.write_text(content, encoding='utf-8')
    write_jsonl(data, made_rows(30, first=1))
    assert llm_infer.main(serve) == 2
    assert 'the rows have changed since checkpoint-1 was trained' in problems()[-1]


@pytest.mark.slow
def test_streamed_rows_that_changed_are_refused(run_sft: Run, tmp_path: Path, problems: Problems) -> None:
    data = write_jsonl(tmp_path / 'mine.jsonl', made_rows(20))
    flags = ('--dataset', str(data), '--max_steps', '1', '--streaming', 'true', '--stream_val_rows', '3')
    run = run_sft(*flags)
    serve = ['--ckpt_dir', str(run / 'checkpoint-1'), *GREEDY]
    assert llm_infer.main(serve) == 0
    write_jsonl(data, made_rows(20, first=1))
    assert llm_infer.main(serve) == 2
    assert 'the rows have changed since checkpoint-1 was trained' in problems()[-1]


@pytest.mark.slow
def test_a_typed_data_set_is_answered_whole(
    run_sft: Run, data_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_sft('--max_steps', '1')
    serve = ['--ckpt_dir', str(run / 'checkpoint-1'), *GREEDY]
    for count in (1, 30):
        data = write_jsonl(tmp_path / f'test{count}.jsonl', made_rows(count))
        target = tmp_path / f'{count}.out'
        assert llm_infer.main([*serve, '--dataset', str(data), '--result_path', str(target)]) == 0
        assert answered(target) == [row['response'] for row in made_rows(count)]
    assert 'exists and will be replaced' not in caplog.text
    words = [*serve, '--dataset', str(data), '--result_path', str(target), '--show_dataset_sample', '4']
    assert llm_infer.main(words) == 0
    assert len(answered(target)) == 4
    assert '4 of 30 rows are drawn to be answered; --show_dataset_sample -1 answers all' in caplog.text
    assert f'--result_path {target} exists and will be replaced.' in caplog.text
    assert 'also the rows that the run was trained on' not in caplog.text
    assert llm_infer.main([*serve, '--dataset', str(data_file), '--show_dataset_sample', '1']) == 0
    assert '--dataset: the run was trained on one of these data sets, so trained rows may be answered' in caplog.text


@pytest.mark.slow
def test_another_chat_template_or_adapter_is_refused_on_resuming(
    run_sft: Run, tmp_path: Path, model_dir: Path, problems: Problems
) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / 'model'))
    flags = ('--model_id_or_path', str(model), '--eval_steps', '1', '--max_steps', '2')
    run = run_sft(*flags)
    resumed = (*flags, '--resume_from_checkpoint', str(run / 'checkpoint-1'))
    run_sft(*resumed, '--lora_rank', '4', expect=2)
    assert problems()[-1] == (
        f'--lora_rank 4: the adapter in {run / "checkpoint-1"} was trained with --lora_rank 8. '
        'Use --lora_rank 8, or remove --resume_from_checkpoint to start a new run.'
    )
    run_sft(*resumed, '--lora_target_modules', 'q_proj', expect=2)
    assert problems()[-1] == (
        f'--lora_target_modules q_proj: the adapter in {run / "checkpoint-1"} is on {EVERY}. Use '
        f'--lora_target_modules {EVERY}, or remove --resume_from_checkpoint to start a new run.'
    )
    template = model / 'chat_template.jinja'
    template.write_text(template.read_text().replace("{{ '\n' }}", "{{ '\n\n' }}"))
    run_sft(*resumed, expect=2)
    assert problems()[-1].startswith(
        f'--resume_from_checkpoint {run / "checkpoint-1"}: the template has changed since that run (its sha256 '
    )


@pytest.mark.slow
def test_rows_past_learnt_positions_are_refused_before_training(
    run_sft: Run, tmp_path: Path, problems: Problems
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {'vocab_size': 400, 'n_positions': 64, 'n_embd': 32, 'n_layer': 1, 'n_head': 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / 'gpt2')
    make_tokenizer().save_pretrained(tmp_path / 'gpt2')
    row = {'query': 'what is it? ' * 60, 'response': 'the answer.'}
    data = write_jsonl(tmp_path / 'long.jsonl', [*made_rows(9), row])
    flags = ('--model_id_or_path', str(tmp_path / 'gpt2'), '--dataset', str(data), '--max_steps', '1')
    run_sft(*flags, expect=2)
    assert len(problems()) == 1
    assert problems()[0].startswith('--max_length: GPT2LMHeadModel has positions for 64 tokens (')
    assert (run_sft(*flags, '--max_length', '64') / 'run.json').is_file()


def test_rows_past_the_length_of_rotary_positions_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    from tests.support.tiny_models import make_model

    model = make_model()
    check_positions(model, 512)
    assert not caplog.text
    check_positions(model, 513)
    assert 'the longest row has 513 tokens, but LlamaForCausalLM was made for at most 512' in caplog.text


def test_output_folders_that_cannot_be_made_are_one_message(
    model_dir: Path, data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    for folder in (tmp_path / ('n' * 300), tmp_path / ('n' * 300) / 'x', Path('/proc/nothing')):
        assert llm_sft.main([*small_flags(model_dir, data_file, tmp_path), '--output_dir', str(folder)]) == 2
        assert problems()[-1].startswith(f'--output_dir {folder} cannot be ')
    assert len(problems()) == 3
    with pytest.raises(ConfigError, match='--output_dir .* cannot be created or written: File name too long. Give'):
        make_run_dir(tmp_path, 'n' * 300)
    assert not list(tmp_path.iterdir())


def test_a_file_name_that_is_not_utf_8_is_one_message(tmp_path: Path) -> None:
    folder = tmp_path / 'data'
    folder.mkdir()
    with open(os.fsencode(folder) + b'/\xd6\xd0.jsonl', 'w') as stream:  # noqa: PTH123 (no text path)
        stream.write('{"query": "a", "response": "b"}\n')
    with pytest.raises(ConfigError, match=r"the file name '.*\\xd6\\xd0.jsonl' is not UTF-8. Rename the file"):
        find_files(parse_source(f'{folder}/'))


def test_a_secret_that_is_not_utf_8_is_one_message() -> None:
    problems = CollectedProblems()
    check_environment({'MY_TOKEN': 'abcdefgh\udcff', 'OTHER_TOKEN': 'abcdefgh'}, problems)
    assert problems.found == [
        'the value of the variable MY_TOKEN is not UTF-8. After training, the run folder is searched for secrets of '
        'the environment, and this search needs UTF-8. Set the variable to UTF-8 text, or unset it.'
    ]


@pytest.mark.slow
def test_a_report_is_shown_on_a_terminal_of_another_encoding(model_dir: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / '数据.jsonl', [{'query': '你好', 'response': '世界'}] * 4)
    words = [*small_flags(model_dir, data, tmp_path / 'out'), '--check_dataset', 'true']
    done = subprocess.run(
        [sys.executable, str(ROOT / 'llm_sft.py'), *words],
        cwd=ROOT, capture_output=True, check=False, timeout=300, env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
    )  # fmt: skip
    assert b'Traceback' not in done.stderr and done.returncode in (0, 1)
    assert b'??.jsonl' in done.stdout


@pytest.mark.parametrize('value', ['-short', '-', '', 'a b', '--system'])
def test_values_that_begin_with_a_dash_survive(value: str) -> None:
    words = [*flag_words('system', value), *flag_words('dataset', ['-x.jsonl', 'b.jsonl']), *flag_words('seed', 3)]
    parsed = parse(SftArguments, words, program='', about='')
    assert not parsed.problems.found
    assert parsed.args.system == value and parsed.args.dataset == ['-x.jsonl', 'b.jsonl'] and parsed.args.seed == 3


def test_a_resume_command_survives_a_dash() -> None:
    from utils.cli.resolution import Resolution
    from utils.report.finish import resume_command

    done: Any = Resolution(args=SftArguments(system='-short'), typed=frozenset({'system'}))
    command = resume_command(done, Path('-out/checkpoint-3'))
    assert command == 'python llm_sft.py --system=-short --resume_from_checkpoint=-out/checkpoint-3'


def test_a_checkout_names_its_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.base import packages
    from utils.run.lock import described

    monkeypatch.setattr(packages, '__file__', str(tmp_path / 'utils' / 'base' / 'packages.py'))
    assert packages.toolkit() == {'version': VERSION}
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b']
    for words in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'x']):
        (tmp_path / 'file').write_text('a')
        subprocess.run([*git, *words], check=True)
    clean = packages.toolkit()
    assert len(clean['commit']) == 40 and clean['changed_since'] is False
    (tmp_path / 'file').write_text('b')
    assert packages.toolkit() == {**clean, 'changed_since': True}
    assert described(packages.toolkit()) == f'{VERSION} at {clean["commit"][:12]} with changes'

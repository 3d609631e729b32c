"""Mistakes of users: one clear message each, exit code 2 or a counted report, no lost data, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import llm_infer
import llm_sft
from tests.support.runs import ROOT, run_program, small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base import dist
from utils.base.checkpoint import damage, last_checkpoint

Problems = Callable[[], list[str]]
Run = Callable[..., Path]
GOOD = {'query': 'what is the answer?', 'response': 'the answer is 42.'}


def sft(model: Path, data: Path, output: Path, *flags: str) -> int:
    return llm_sft.main([*small_flags(model, data, output), *flags])


def test_no_such_model_directory(data_file: Path, tmp_path: Path, problems: Problems) -> None:
    assert sft(tmp_path / 'nowhere', data_file, tmp_path / 'out') == 2
    assert problems() == [f'model directory {tmp_path}/nowhere is not there (looked in {tmp_path}).']
    assert not (tmp_path / 'out').exists()


def test_model_directory_without_config(data_file: Path, tmp_path: Path, problems: Problems) -> None:
    (tmp_path / 'empty').mkdir()
    assert sft(tmp_path / 'empty', data_file, tmp_path / 'out', '--template_type', 'default') == 2
    assert problems() == [f'model directory {tmp_path}/empty has no config.json, so its architecture is unknown.']


def test_remote_code_class_that_is_not_native(data_file: Path, tmp_path: Path, problems: Problems) -> None:
    folder = tmp_path / 'remote'
    folder.mkdir()
    make_tokenizer().save_pretrained(folder)
    config = {'model_type': 'homemade', 'auto_map': {'AutoModelForCausalLM': 'modeling_homemade.Homemade'}}
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'modeling_homemade.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\n')
    assert sft(folder, data_file, tmp_path / 'out') == 2
    assert len(problems()) == 1
    assert "model_type 'homemade' is not a native class of transformers. It asks for code of its own" in problems()[0]
    assert not (tmp_path / 'ran').exists()


DATA = {
    'empty.jsonl': (b'', 'is empty (0 bytes)'),
    'blank.jsonl': (b'\n\n', 'holds no rows'),
    'none.json': (b'[]', 'holds no rows'),
    'truncated.json': (b'[\n{"query": "a", "response": "b"},\n{"query": "c', 'truncated.json:3: the JSON is broken'),
    'unclosed.json': (b'[\n{"query": "a", "response": "b"}\n', 'expected , or ], found the end of the file'),
    'latin.jsonl': (b'{"query": "a", "response": "b"}\n{"query": "\xe9"}\n', 'latin.jsonl:2: byte 0xe9 is not UTF-8'),
    'broken.jsonl': (b'{"query": "a", "response": "b"}\n{"query": "c", \n', 'broken.jsonl:2: this line is not JSON'),
    'list.jsonl': (b'[1, 2]\n', 'list.jsonl:1: a row must be an object with named columns, got list'),
    'columns.jsonl': (b'{"title": "a", "body": "b"}\n', 'unknown columns title, body.'),
    'columns.csv': (b'title,body\na,b\n', 'unknown columns title, body.'),
    'cells.csv': (b'query,response\na,b\nc\n', 'cells.csv:3: the number of cells in this row is 1'),
    'broken.parquet': (b'PAR1 nothing', 'the parquet file cannot be read'),
    'empties.jsonl': (b'{"query": "a", "response": ""}\n', 'no training row is left'),
    'nulls.jsonl': (b'{"query": "a", "response": null}\n', 'no training row is left'),
}  # fmt: skip


@pytest.mark.parametrize('name', DATA)
def test_data_files_that_cannot_be_read(name: str, model_dir: Path, tmp_path: Path, problems: Problems) -> None:
    content, message = DATA[name]
    (tmp_path / name).write_bytes(content)
    assert sft(model_dir, tmp_path / name, tmp_path / 'out') == 2
    assert len(problems()) == 1 and message in problems()[0] and name in problems()[0]
    assert not (tmp_path / 'out').exists()


def test_data_file_that_is_not_there(model_dir: Path, tmp_path: Path, problems: Problems) -> None:
    assert sft(model_dir, tmp_path / 'gone.jsonl', tmp_path / 'out') == 2
    assert problems() == [f'data file {tmp_path}/gone.jsonl is not there (looked in {tmp_path}). Correct the path.']


@pytest.mark.slow
def test_bad_rows_are_left_out_counted_and_named(
    run_sft: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        {'query': 'a', 'response': None}, {'query': 'a', 'response': '  '}, {'query': None, 'response': 'b'},
        {'query': 'a'}, {'query': 'a', 'response': ['b']}, {'query': 'a', 'response': 'b', 'history': 'x'},
        {'query': 'a', 'response': ''},
    ]  # fmt: skip
    data = write_jsonl(tmp_path / 'mixed.jsonl', [GOOD] * 10 + bad)
    run = run_sft('--dataset', str(data), '--max_steps', '1')
    counted = json.loads((run / 'run.json').read_text())['data']
    assert counted['left_out'] == {
        'null response': 1, 'empty response': 2, 'null query': 1, 'response is a list, not text': 1,
        'columns are missing that the first row has: response': 1, 'history is text that is not JSON': 1,
    }  # fmt: skip
    assert counted['train']['rows'] + counted['validation']['rows'] == 10
    assert f'2 rows skipped: empty response ({data}:12, {data}:17)' in caplog.text


def test_history_with_a_single_turn_template(model_dir: Path, tmp_path: Path, problems: Problems) -> None:
    data = write_jsonl(tmp_path / 'h.jsonl', [{**GOOD, 'history': [['a', 'b']]}] * 3)
    assert sft(model_dir, data, tmp_path / 'out', '--template_type', 'default-generation') == 2
    assert "h.jsonl:1: the row has history, and template 'default-generation' is single-turn" in problems()[0]


@pytest.mark.slow
def test_reply_that_loses_its_beginning_is_kept_counted_and_named(
    run_sft: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_jsonl(tmp_path / 'long.jsonl', [GOOD] * 5 + [{'query': 'a', 'response': 'z ' * 60}])
    run = run_sft('--dataset', str(data), '--max_length', '40', '--max_steps', '1', '--dataset_test_ratio', '0')
    counted = json.loads((run / 'run.json').read_text())['data']
    assert counted['noted'] == {'longer than max_length: lost the beginning of its reply': 1}
    assert counted['train']['rows'] == 6 and counted['train']['max'] == 40
    assert f'lost the beginning of its reply ({data}:6)' in caplog.text


def test_every_sample_left_out_by_the_template(tmp_path: Path, data_file: Path, problems: Problems) -> None:
    folder = tmp_path / 'picky'
    make_model().save_pretrained(folder)
    picky = (
        "{% for m in messages %}{% if 'what' in m['content'] %}{{ raise_exception('no questions') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    make_tokenizer(chat_template=picky).save_pretrained(folder)
    assert sft(folder, data_file, tmp_path / 'out') == 2
    assert (
        'every training row was skipped: 40 rows skipped: the chat template refuses it: no questions' in problems()[0]
    )


@pytest.mark.parametrize(('missing', 'trains'), [('pad_token', True), ('eos_token', False)])
def test_tokenizer_without_pad_or_eos(
    missing: str, trains: bool, tmp_path: Path, data_file: Path, problems: Problems
) -> None:
    folder = tmp_path / 'bare'
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    del config[missing]
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    assert sft(folder, data_file, tmp_path / 'out', '--max_steps', '1') == (0 if trains else 2)
    assert trains or 'has no eos_token' in problems()[0]


def test_output_dir_under_a_file(model_dir: Path, data_file: Path, tmp_path: Path, problems: Problems) -> None:
    (tmp_path / 'file').write_text('')
    assert sft(model_dir, data_file, tmp_path / 'file' / 'out') == 2
    assert problems() == [
        f'--output_dir {tmp_path}/file/out cannot be created: {tmp_path}/file is a file. Give another path.'
    ]


@pytest.mark.slow
def test_checkpoints_that_are_none(tmp_path: Path, run_sft: Run, problems: Problems) -> None:
    assert llm_infer.main(['--ckpt_dir', str(tmp_path / 'gone')]) == 2
    assert llm_infer.main(['--ckpt_dir', str(tmp_path)]) == 2
    run = run_sft('--max_steps', '1')
    assert llm_infer.main(['--ckpt_dir', str(run)]) == 2
    for name in ('checkpoint-9', 'checkpoint-10', 'checkpoint-10-merged'):
        (run / name).mkdir()
    assert llm_infer.main(['--ckpt_dir', str(run)]) == 2
    (run / 'sft_args.json').unlink()
    (run / 'checkpoint-1' / 'sft_args.json').unlink()
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-1')]) == 2
    said = problems()
    assert len(said) == 5
    assert 'is not a directory' in said[0]
    assert (
        'is not a checkpoint: it holds neither adapter_config.json nor config.json. Give a folder checkpoint-N'
        in said[1]
    )
    assert f'It is a run folder: give {run}/checkpoint-1.' in said[2]
    assert f'It is a run folder: give {run}/checkpoint-10.' in said[3]
    assert 'neither it nor its parent folder has an sft_args.json with content' in said[4]


def test_truncated_weights(tmp_path: Path, model_dir: Path, data_file: Path, problems: Problems) -> None:
    folder = tmp_path / 'cut'
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert sft(folder, data_file, tmp_path / 'out') == 2
    assert f'the model in {folder} cannot be opened' in problems()[0]


def test_all_problems_come_together() -> None:
    flags = [
        '--model_type', 'llama2-7b-caht', '--template_type', 'chatlm', '--dataset', 'sql-dmeo', '--lora_r', '4',
        '--quantization_bit', '4', '--sft_type', 'full', '--max_length', '1', '--batch_size', '0', '--optim',
        'adam_torch', '--bnb_4bit_quant_type', 'nf5', '--use_streamer', 'maybe',
    ]  # fmt: skip
    done = run_program('llm_sft.py', *flags)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    for part in (
        "'llama2-7b-chat'", "template_type 'chatlm' is not registered", "did you mean 'sql-demo'",
        "did you mean 'lora_rank'", '4-bit weights cannot be trained', '--max_length 1 leaves no room',
        '--batch_size takes 1 or more, got 0', "'adamw_torch'", "takes nf4, fp4, got 'nf5'",
        "flag '--use_streamer' is not known",
    ):  # fmt: skip
        assert part in done.stderr, part


@pytest.mark.slow
def test_help_and_errors_never_import_torch() -> None:
    code = (
        'import sys, {0}\n'
        'try: code = {0}.main({1})\n'
        'except SystemExit as exit: code = exit.code\n'
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'datasets', 'peft') if m in sys.modules]\n"
        'sys.exit(str(heavy) if heavy or code != {2} else 0)'
    )
    checked = 0
    for program in ('llm_sft', 'llm_infer'):
        for argv, expected in ((['--help'], 0), (['--nope', '1'], 2), (['--model_type', 'x'], 2)):
            done = subprocess.run(
                [sys.executable, '-c', code.format(program, argv, expected)],
                capture_output=True, text=True, cwd=ROOT, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            checked += 1
    assert checked == 6


RULES = {
    ('--model_type', 'llama2-7b', '--model_id_or_path', 'x/y'): 'both name a model. Remove --model_type or --model_id',
    ('--quantization_bit', '4', '--sft_type', 'full', '--model_type', 'llama2-7b'): '4-bit weights cannot be trained',
    ('--quantization_bit', '5'): "takes 0, 4, 8, got '5'",
    ('--max_length', '1'): '--max_length 1 leaves no room',
    ('--max_steps', '0'): '--max_steps 0 trains nothing',
    ('--max_steps', 'ten'): "--max_steps takes a whole number, got 'ten'",
    ('--learning_rate', 'nan'): '--learning_rate takes a number above 0, got nan',
    ('--dataset_test_ratio', '1'): 'a share from 0 to below 1',
    ('--dataset', 'sql-demo', 'sql-demo'): "'sql-demo' is named twice",
    ('--dataset', 'sql-demo#0'): 'the number of rows after # must be 1 or more',
    ('--dataset', 'data.doc'): 'is neither a registered data set nor a .json',
    ('--lr_scheduler_type', 'cosin'): "did you mean 'cosine'",
    ('--train_dataset_sample', '0'): '1 or more, or -1 for all',
    ('--temperature', '0', '--predict_with_generate', 'true'): 'for greedy decoding use --do_sample false',
    ('--push_to_hub', 'true'): 'needs a token: set the environment variable MODELSCOPE_API_TOKEN',
    ('--push_to_hub', 'true', '--hub', 'huggingface'): 'needs a token: set the environment variable HF_TOKEN',
    ('--hub', 'hugingface'): "takes modelscope, huggingface, got 'hugingface'",
    ('--push_to_hub', 'true', '--hub_model_id', 'a/b/c'): 'takes repo or user/repo',
    ('--ddp_backend', 'nccl'): 'needs a GPU of NVIDIA or AMD, and this machine has none',
    ('--use_flash_attn', 'true'): 'needs flash-attn',
    ('--deepspeed_config_path', 'nowhere.json'): 'is not a file',
    ('--resume_from_checkpoint', 'nowhere'): 'is not a directory',
    ('--batch_size', '1', '2'): 'takes one value, got 2: 1 2',
    ('stray',): "the word 'stray' belongs to no flag",
    ('--tuner_backend', 'unsloth'): 'takes swift, peft',
    ('--warmup_steps', '5', '--warmup_ratio', '0.1'): '--warmup_steps 5 and --warmup_ratio 0.1 both give the length',
    ('--warmup_steps', '-1'): '--warmup_steps takes 0 or more, got -1',
    ('--min_lr_ratio', '0.1', '--lr_scheduler_type', 'constant'): 'or set --lr_scheduler_type to one of cosine, linear',
    ('--min_lr_ratio', '0.1', '--lr_scheduler_type', 'inverse_sqrt'): 'scheduler_type inverse_sqrt has no minimum',
    ('--min_lr_ratio', '1'): '--min_lr_ratio takes a share from 0 to below 1, got 1.0',
    ('--decay_ratio', '0.2'): '--decay_ratio 0.2 is for --lr_scheduler_type warmup_stable_decay, got cosine. Remove',
    ('--decay_ratio', '0', '--lr_scheduler_type', 'warmup_stable_decay'): 'decay_ratio takes a share above 0, up to 1',
    ('--lr_scheduler_type', 'warmup_stable_dekay'): "did you mean 'warmup_stable_decay'",
    ('--adam_beta1', '1'): '--adam_beta1 takes a share from 0 to below 1, got 1.0',
    ('--adam_epsilon', '0'): '--adam_epsilon takes a number above 0, got 0.0',
    ('--eval_steps', '1.5'): '--eval_steps takes 1 or more whole steps, or a share of the run between 0 and 1, got 1.5',
    ('--eval_steps', 'inf'): '--eval_steps takes 1 or more whole steps, or a share of the run between 0 and 1, got inf',
    ('--save_steps', '0'): '--save_steps takes 1 or more whole steps, or a share of the run between 0 and 1, got 0',
    ('--num_train_epochs', '0'): '--num_train_epochs takes a number above 0, got 0',
    ('--report_to', 'wnadb'): "--report_to 'wnadb' is not known: did you mean 'wandb'? Use tensorboard, wandb, swanlab",
    ('--report_to', 'none', 'wandb'): "'none' cannot be combined with a tracker. Use --report_to wandb to",
    ('--report_to', 'wandb,comet', 'mlflow'): 'wandb comet mlflow: not installed. Run: pip install wandb comet-ml',
    ('--num_train_epochs', 'half'): "--num_train_epochs takes a number, got 'half'",
}  # fmt: skip


@pytest.mark.parametrize('words', RULES, ids=' '.join)
def test_rules_across_flags(words: tuple[str, ...], problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('utils.base.dist.has_gpu_device', lambda: False)
    monkeypatch.setattr('utils.cli.machine.has_package', lambda name: False)
    assert llm_sft.main(list(words)) == 2
    assert any(RULES[words] in line for line in problems()), problems()


def test_unknown_words_can_be_ignored(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    run_sft('--ignore_args_error', 'true', '--max_steps', '1', '-f', 'kernel.json')
    assert "flag '-f' is not known" in caplog.text


@pytest.mark.slow
def test_typed_flags_without_effect_are_warned_about(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    flags = ('--bnb_4bit_quant_type', 'fp4', '--hub_private_repo', 'false', '--top_k', '5', '--hub', 'modelscope')
    flags += ('--optim', 'sgd', '--adam_beta1', '0.8', '--adam_beta2', '0.9', '--adam_epsilon', '1e-6')
    flags += ('--fused_rotary', 'false')
    run_sft('--max_steps', '1', *flags, '--lr_scheduler_type', 'constant', '--warmup_ratio', '0.1')
    for name in (
        'bnb_4bit_quant_type', 'hub_private_repo', 'top_k', 'hub', 'warmup_ratio', 'adam_beta1', 'adam_beta2',
        'adam_epsilon',
    ):  # fmt: skip
        assert f'--{name} has no effect' in caplog.text
    assert ('--fused_rotary has no effect' in caplog.text) is (dist.visible_kind() != 'cuda')


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_names_the_checkpoint(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """Like a terminal, send the signal to every process of the group, also to the data worker."""
    words = small_flags(model_dir, data_file, tmp_path / 'out')
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'llm_sft.py'), *words, '--max_steps', '100000', '--save_steps', '3',
         '--dataloader_num_workers', '1'],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ),
        start_new_session=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not list((tmp_path / 'out').glob('*/*/checkpoint-*')):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and 'Traceback' not in stderr, stderr[-3000:]
    (run,) = (tmp_path / 'out').glob('*/*')
    last = last_checkpoint(run)
    assert last is not None and damage(last) is None
    assert f'stopped by SIGINT after step {last.name.split("-")[1]} of 100000; {last} is complete.' in stderr
    assert f'--resume_from_checkpoint {last}' in stderr


@pytest.mark.parametrize('program', ['llm_sft.py', 'llm_infer.py'])
def test_a_missing_library_is_one_line_with_the_interpreter(
    program: str, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    words = ['--model_id_or_path', str(model_dir), '--dataset', str(data_file)]
    if program == 'llm_sft.py':
        words = small_flags(model_dir, data_file, tmp_path / 'out')
    # -S: only the standard library, like an interpreter whose environment is not activated.
    done = subprocess.run(
        [sys.executable, '-S', str(ROOT / program), *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f'not installed for {sys.executable}. To fix it, ' in last
    assert f'{sys.executable} -m pip install -r requirements.txt' in last


@pytest.mark.parametrize('words', [['llm_sft.py'], ['llm_infer.py'], ['-m', 'utils.migrate'], ['-m', 'utils.report']])
def test_ctrl_c_while_a_command_starts_is_one_line(words: list[str], tmp_path: Path) -> None:
    """A module of this test sends the signal, while the command imports its modules."""
    sends = 'import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n'
    (tmp_path / 'difflib.py').write_text(sends, encoding='utf-8')
    done = subprocess.run(
        [sys.executable, *words, 'nothing'], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, 'error: stopped by Ctrl-C\n')

"""--chat_template and --template_settings through the programs: trained, answered, merged, repeated and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.support.runs import run_program, small_flags, write_jsonl
from tests.support.templates import SWITCHED
from tests.support.tiny_models import CHATML, make_model, make_tokenizer
from utils.base.errors import Problems
from utils.cli.arguments import InferArguments
from utils.cli.parser import parse
from utils.export.model_card import model_card
from utils.loading.template_settings import add_settings
from utils.run.record import RunRecord

SftRun = Callable[..., Path]
Found = Callable[[], list[str]]
OFF = '{%- set enable_thinking = false -%}\n'
ON = '{%- set enable_thinking = true -%}\n'
ROW = [{'role': 'user', 'content': 'is it 1?'}, {'role': 'assistant', 'content': 'yes 1'}]
pytestmark = pytest.mark.slow


def saved_model(folder: Path, template: str | None) -> Path:
    make_model().save_pretrained(folder)
    make_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose tokenizer has no chat template."""
    return saved_model(tmp_path_factory.mktemp('models') / 'base', None)


@pytest.fixture(scope='module')
def switched_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose template reads enable_thinking."""
    return saved_model(tmp_path_factory.mktemp('models') / 'switched', SWITCHED)


@pytest.fixture
def chatml(tmp_path: Path) -> Path:
    file = tmp_path / 'chatml.jinja'
    file.write_text(CHATML)
    return file


@pytest.fixture
def train(run_sft: SftRun) -> SftRun:
    """Return a function that trains two steps with a checkpoint after each."""

    def train_two(model: Path, *flags: str, expect: int = 0) -> Path:
        words = ('--model_id_or_path', str(model), '--max_steps', '2', '--eval_steps', '1')
        return run_sft(*words, *flags, expect=expect)

    return train_two


def answered(checkpoint: Path, *flags: str) -> list[dict[str, Any]]:
    target = checkpoint / 'answers.jsonl'
    words = ['--ckpt_dir', str(checkpoint), '--result_path', str(target), '--max_new_tokens', '1', *flags]
    assert llm_infer.main(words) == 0
    return [json.loads(line) for line in target.read_text().splitlines()]


def prompts_of(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> set[str]:
    """Return the ends of the prompts with which llm_infer.py asks for the answers of rows."""
    asked: list[str] = []
    tokenizer = make_tokenizer()

    def generate(model: Any, prompts: Any, *rest: Any, **options: Any) -> list[list[int]]:
        asked.extend(map(tokenizer.decode, prompts))
        return [[7] for _ in prompts]

    monkeypatch.setattr('utils.infer.answers.generate_rows', generate)
    answered(checkpoint, *flags)
    assert asked
    return {text[text.index('<|im_start|>assistant') :] for text in asked}


def test_a_base_model_is_trained_answered_merged_and_reopened(
    train: SftRun, base_dir: Path, chatml: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    run = train(base_dir, '--chat_template', str(chatml))
    assert 'template_type = auto because --chat_template names the chat template' in caplog.text
    proof = json.loads((run / 'proofs.json').read_text())['template']
    assert proof['passed'] and proof['equal'] > 10 and proof.get('different', 0) == 0
    lock = json.loads((run / 'lock.json').read_text())
    assert lock['chat_template']['path'] == str(chatml) and len(lock['chat_template']['sha256']) == 64
    assert json.loads((run / 'sft_args.json').read_text())['chat_template'] == str(chatml)

    chatml.unlink()
    moved = tmp_path / 'moved'
    shutil.move(run / 'checkpoint-2', moved / 'checkpoint-2')
    caplog.clear()
    assert answered(moved / 'checkpoint-2', '--dataset', json.loads((run / 'sft_args.json').read_text())['dataset'][0])
    assert f'chat_template = {moved}/checkpoint-2 because the checkpoint holds the one of its run' in caplog.text

    assert llm_infer.main(['--ckpt_dir', str(moved / 'checkpoint-2'), '--merge_lora_and_save', 'true']) == 0
    merged = moved / 'checkpoint-2-merged'
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == CHATML
    wanted = make_tokenizer().apply_chat_template(ROW)['input_ids']
    assert tokenizer.apply_chat_template(ROW)['input_ids'] == wanted
    assert answered(merged, '--dataset', json.loads((run / 'sft_args.json').read_text())['dataset'][0])


def test_settings_are_kept_with_the_checkpoint_and_used_again(
    train: SftRun, switched_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(switched_dir, '--template_settings', 'enable_thinking=true')
    for folder in (run, run / 'checkpoint-2'):
        assert (folder / 'chat_template.jinja').read_text() == ON + SWITCHED
    opened = '<|im_start|>assistant\n<think>\n'
    assert prompts_of(run / 'checkpoint-2', monkeypatch) == {opened}
    card = model_card('a/b', RunRecord.read(run), {'step': 1, 'log_history': []}, [])
    assert 'Its chat template sets `enable_thinking=true`' in card and '| `--template_settings` |' in card

    assert 'was trained with another template' not in caplog.text
    other = ['--template_settings', 'enable_thinking=false']
    assert prompts_of(run / 'checkpoint-2', monkeypatch, *other) == {f'{opened}</think>\n\n'}
    assert '--template_settings: checkpoint-2 was trained with another template (sha256' in caplog.text

    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-2'), '--merge_lora_and_save', 'true']) == 0
    merged = run / 'checkpoint-2-merged'
    assert (merged / 'chat_template.jinja').read_text() == ON + SWITCHED
    assert prompts_of(merged, monkeypatch) == {opened}


def test_a_checkpoint_of_the_own_template_takes_typed_ones_with_a_warning(
    train: SftRun, switched_dir: Path, chatml: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = train(switched_dir) / 'checkpoint-2'
    assert prompts_of(checkpoint, monkeypatch, '--chat_template', str(chatml)) == {'<|im_start|>assistant\n'}
    assert '--chat_template: checkpoint-2 was trained with another template (sha256' in caplog.text
    caplog.clear()
    chatml.write_text(SWITCHED)
    prompts_of(checkpoint, monkeypatch, '--chat_template', str(chatml))
    assert 'was trained with another template' not in caplog.text, 'the same text at another path'


def test_a_changed_copy_in_the_checkpoint_is_refused(
    train: SftRun, base_dir: Path, chatml: Path, problems: Found
) -> None:
    run = train(base_dir, '--chat_template', str(chatml))
    copy = run / 'checkpoint-2' / 'chat_template.jinja'
    copy.write_text(CHATML + 'x')
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-2')]) == 2
    assert 'Restore the chat_template.jinja that the run wrote, or' in problems()[-1]
    copy.unlink()
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-2')]) == 2
    assert f'--chat_template {run}/checkpoint-2 has no chat template.' in problems()[-1]
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-2'), '--chat_template', str(chatml)]) == 0


def test_a_run_is_repeated_with_its_own_copy(train: SftRun, base_dir: Path, tmp_path: Path, problems: Found) -> None:
    file = tmp_path / 'switched.jinja'
    file.write_text(SWITCHED)
    flags = ('--chat_template', str(file), '--template_settings', 'enable_thinking=false')
    first = train(base_dir, *flags, '--max_steps', '1')
    assert (first / 'chat_template.jinja').read_text() == OFF + SWITCHED
    file.unlink()
    assert llm_sft.main(['--from_run', str(first)]) == 0, problems()
    second = max(first.parent.iterdir(), key=lambda path: path.name)
    assert second != first
    for name in ('template_sha256',):
        assert (
            json.loads((second / 'lock.json').read_text())[name] == json.loads((first / 'lock.json').read_text())[name]
        )
    assert json.loads((second / 'sft_args.json').read_text())['chat_template'] == str(first)

    # A setting that is typed now replaces the one in the copy; another template needs no copy.
    assert llm_sft.main(['--from_run', str(second), '--template_settings', 'enable_thinking=true']) == 0, problems()
    third = max(first.parent.iterdir(), key=lambda path: path.name)
    assert (third / 'chat_template.jinja').read_text() == ON + SWITCHED
    assert llm_sft.main(['--from_run', str(first), '--template_type', 'default']) == 0, problems()
    fourth = max(first.parent.iterdir(), key=lambda path: path.name)
    assert not (fourth / 'chat_template.jinja').exists()
    assert json.loads((fourth / 'sft_args.json').read_text())['template_settings'] is None


def test_a_run_without_its_copy_is_repeated_with_the_file(train: SftRun, base_dir: Path, chatml: Path) -> None:
    run = train(base_dir, '--chat_template', str(chatml), '--max_steps', '1')
    (run / 'chat_template.jinja').unlink()
    assert llm_sft.main(['--from_run', str(run)]) == 0
    (run / 'chat_template.jinja').write_text(CHATML + 'x')
    assert llm_sft.main(['--from_run', str(run)]) == 2


def test_resuming_refuses_another_template_and_takes_the_same_from_another_path(
    train: SftRun, base_dir: Path, tmp_path: Path, problems: Found, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / 'switched.jinja'
    file.write_text(SWITCHED)
    flags = ('--chat_template', str(file), '--template_settings', 'enable_thinking=false')
    run = train(base_dir, *flags)
    resume = ('--resume_from_checkpoint', str(run / 'checkpoint-1'))

    moved = tmp_path / 'moved.jinja'
    shutil.copy(file, moved)
    caplog.clear()
    train(base_dir, '--chat_template', str(moved), *flags[2:], *resume)
    assert '--chat_template is' not in caplog.text and '--template_settings is' not in caplog.text
    train(base_dir, '--chat_template', str(run / 'checkpoint-1'), *resume)

    train(base_dir, '--chat_template', str(file), '--template_settings', 'enable_thinking=true', *resume, expect=2)
    assert (
        f'--resume_from_checkpoint {run}/checkpoint-1: the template has changed since that run (its sha256 '
        in problems()[-1]
    )
    assert 'Type --template_settings enable_thinking=false, or leave --resume' in problems()[-1]
    file.write_text(SWITCHED + 'x')
    train(base_dir, *flags, *resume, expect=2)
    assert 'Put the template back, or leave --resume' in problems()[-1]


def test_resuming_without_the_flags_says_which_to_type_or_leave_out(
    train: SftRun, switched_dir: Path, problems: Found
) -> None:
    run = train(switched_dir, '--template_settings', 'enable_thinking=false')
    train(switched_dir, '--resume_from_checkpoint', str(run / 'checkpoint-1'), expect=2)
    assert 'Type --template_settings enable_thinking=false, or leave' in problems()[-1]
    plain = train(switched_dir)
    resume = ('--resume_from_checkpoint', str(plain / 'checkpoint-1'))
    train(switched_dir, '--template_settings', 'enable_thinking=false', *resume, expect=2)
    assert 'Leave --template_settings out, or leave' in problems()[-1]


def test_rows_with_reasoning_are_counted_under_the_setting(
    train: SftRun, switched_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = [ROW[0], {**ROW[1], 'reasoning_content': 'count'}]
    data = write_jsonl(tmp_path / 'rows.jsonl', [{'messages': ROW}] * 6 + [{'messages': reasons}] * 2)
    flags = ('--dataset', str(data), '--template_settings', 'enable_thinking=false')
    reason = 'the reply has reasoning, but the template setting enable_thinking=false closes the think block'
    run = train(switched_dir, *flags, '--dataset_test_ratio', '0', '--max_steps', '1')
    counts = json.loads((run / 'run.json').read_text())['data']['left_out']
    assert counts == {reason: 2}
    streamed = train(
        switched_dir, *flags, '--streaming', 'true', '--max_steps', '1', '--stream_val_rows', '0',
        '--dataset_test_ratio', '0',
    )  # fmt: skip
    assert (streamed / 'checkpoint-1' / 'chat_template.jinja').read_text() == OFF + SWITCHED
    packed = train(switched_dir, *flags, '--packing', 'true', '--max_length', '128', '--max_steps', '1')
    assert (packed / 'chat_template.jinja').read_text() == OFF + SWITCHED

    train(switched_dir, *flags, '--check_dataset', 'true', expect=1)
    report = json.loads((tmp_path / 'output' / 'switched' / 'dataset_report.json').read_text())
    assert report['left_out'][reason]['rows'] == 2
    capsys.readouterr()
    train(switched_dir, *flags, '--dry_run', 'true')
    assert '2 skipped' in capsys.readouterr().out


WRONG = {
    'near': (
        ['--template_settings', 'enable_thinkin=false', 'no-value'],
        "the chat template has no variable 'enable_thinkin': did you mean 'enable_thinking'? It reads enable_thinking.",
    ),
    'form': (['--template_settings', 'thinking'], "takes name=value, got 'thinking'"),
    'supplied': (['--template_settings', 'messages=1'], "'messages' is filled for each chat and cannot be set."),
    'gone': (['--chat_template', 'gone.jinja'], '--chat_template gone.jinja is not there (looked in '),
    'typed': (
        ['--chat_template', 'gone.jinja', '--template_type', 'chatml'],
        '--chat_template gone.jinja has no effect with --template_type chatml, which has its own format. Leave '
        '--template_type out to apply --chat_template.',
    ),
    'fixed': (
        ['--template_type', 'chatml', '--template_settings', 'a=1'],
        '--template_settings: --template_type chatml is fixed text without variables. Leave --template_settings out, '
        "or use --template_type auto to apply them to the model's own template.",
    ),
}


@pytest.mark.parametrize('program', ['sft', 'infer'])
@pytest.mark.parametrize('name', WRONG)
def test_wrong_flags_are_named_before_anything_is_loaded(
    name: str, program: str, switched_dir: Path, data_file: Path, tmp_path: Path, problems: Found
) -> None:
    flags, says = WRONG[name]
    words = [*small_flags(switched_dir, data_file, tmp_path / 'output'), '--max_stepps', '1', *flags]
    if program == 'infer':
        words = ['--model_id_or_path', str(switched_dir), '--eval_human', 'true', '--max_stepps', '1', *flags]
    main = {'sft': llm_sft.main, 'infer': llm_infer.main}[program]
    assert main(words) == 2
    found = problems()
    assert any(says in line for line in found) and any('max_stepps' in line for line in found)
    assert not (tmp_path / 'output').exists()


def test_a_base_model_without_a_template_is_told_of_the_flag(base_dir: Path, problems: Found) -> None:
    assert llm_infer.main(['--model_id_or_path', str(base_dir), '--eval_human', 'true']) == 2
    assert 'has no chat template. Name a file with --chat_template, or choose a --template_type: ' in problems()[-1]


def test_a_template_of_null_is_none_and_one_in_the_folder_of_further_templates_counts(
    base_dir: Path, data_file: Path, tmp_path: Path, problems: Found
) -> None:
    folder = Path(shutil.copytree(base_dir, tmp_path / 'model'))
    settings = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))
    settings = json.dumps({**settings, 'chat_template': None})
    (folder / 'tokenizer_config.json').write_text(settings, encoding='utf-8')
    words = ['--model_id_or_path', str(folder), '--dataset', str(data_file), '--show_dataset_sample', '1']
    words += ['--max_new_tokens', '1', '--result_path', str(tmp_path / 'answers.jsonl')]
    assert llm_infer.main(words) == 2
    assert 'has no chat template. Name a file with --chat_template' in problems()[-1]

    (folder / 'additional_chat_templates').mkdir()
    (folder / 'additional_chat_templates' / 'default.jinja').write_text(CHATML, encoding='utf-8')
    assert llm_infer.main(words) == 0


def test_a_wrong_template_ends_both_programs_without_torch(switched_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / 'bad.jinja'
    file.write_text('{{ messages }}\n{% if %}')
    blocked = tmp_path / 'blocked'
    for name in ('torch', 'transformers', 'numpy'):
        (blocked / name).mkdir(parents=True)
        (blocked / name / '__init__.py').write_text('raise RuntimeError("imported")')
    words = ('--model_id_or_path', str(switched_dir), '--chat_template', str(file), '--template_settings', 'x=1')
    for program in ('llm_sft.py', 'llm_infer.py'):
        done = run_program(program, *words, PYTHONPATH=str(blocked))
        assert done.returncode == 2 and 'imported' not in done.stderr
        assert f'--chat_template {file}: line 2 is not valid Jinja: Expected an expression' in done.stderr


def test_an_untuned_model_is_asked_and_exported_with_the_flags(switched_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / 'exported'
    words = ['--model_id_or_path', str(switched_dir), '--template_settings', 'enable_thinking=true']
    assert llm_infer.main([*words, '--export_native', 'true', '--output_dir', str(target)]) == 0
    assert (target / 'chat_template.jinja').read_text() == ON + SWITCHED


def test_a_setting_of_a_trained_folder_is_replaced_in_the_next_run(train: SftRun, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / 'tuned', add_settings(SWITCHED, {'enable_thinking': False}))
    run = train(folder, '--template_settings', 'enable_thinking=true', '--max_steps', '1')
    assert (run / 'checkpoint-1' / 'chat_template.jinja').read_text() == ON + SWITCHED


def test_all_weights_are_answered_with_the_template_of_their_run(
    train: SftRun, base_dir: Path, chatml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(base_dir, '--chat_template', str(chatml), '--sft_type', 'full', '--max_steps', '1')
    chatml.unlink()
    assert prompts_of(run / 'checkpoint-1', monkeypatch) == {'<|im_start|>assistant\n'}


def test_settings_are_split_at_commas_before_a_name() -> None:
    def settings(*words: str) -> list[str] | None:
        return parse(InferArguments, ['--template_settings', *words], program='', about='').args.template_settings

    assert settings('a=1,b=2', 'c=x,y') == ['a=1', 'b=2', 'c=x,y']
    assert settings('a=[1,2]', 'b={"k":1,"l":2}') == ['a=[1,2]', 'b={"k":1,"l":2}']
    assert settings('a=1', '--template_settings', 'b="x,c=2"') == ['a=1', 'b="x,c=2"']
    assert parse(InferArguments, ['--template_settings'], program='', about='').problems == Problems(
        ['--template_settings needs at least one value.']
    )

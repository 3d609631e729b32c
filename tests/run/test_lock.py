"""lock.json and --from_run: a repeated run is bitwise identical, and whatever changed in between is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import llm_sft
from tests.support.runs import small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer

Problems = Callable[[], list[str]]


@pytest.fixture(scope='module')
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose model and data may be changed; its folder has a separate parent folder."""
    folder = tmp_path_factory.mktemp('lock')
    make_model().save_pretrained(folder / 'model')
    make_tokenizer().save_pretrained(folder / 'model')
    data = write_jsonl(folder / 'qa.jsonl', [{'query': f'what is {i}?', 'response': f'it is {i}.'} for i in range(20)])
    words = [*small_flags(folder / 'model', data, folder / 'out'), '--max_steps', '3', '--lora_rank', '4']
    assert llm_sft.main([*words, '--hub_token', 'ms-never-in-a-lock']) == 0
    return next((folder / 'out').glob('*/*'))


def again(run: Path, *words: str) -> tuple[int, Path]:
    before = set(run.parent.iterdir())
    code = llm_sft.main(['--from_run', str(run), *words])
    made = set(run.parent.iterdir()) - before
    return code, made.pop() if made else run


@pytest.mark.slow
def test_a_run_is_repeated_to_the_bit(first: Path) -> None:
    lock = json.loads((first / 'lock.json').read_text())
    assert 'ms-never-in-a-lock' not in json.dumps(lock) and '--lora_rank' in lock['command']
    (source,) = lock['data']
    assert source.endswith('qa.jsonl') and lock['data'][source]['rows'] == 20
    assert len(lock['template_sha256']) == 64 and lock['versions']['torch'] and lock['processes'] == 1
    code, second = again(first)
    assert code == 0
    assert json.loads((second / 'lock.json').read_text()) == lock
    weights = [load_file(run / 'checkpoint-3' / 'adapter_model.safetensors') for run in (first, second)]
    assert all(bool((weights[0][name] == tensor).all()) for name, tensor in weights[1].items())


def test_what_is_typed_now_wins(first: Path) -> None:
    code, second = again(first, '--lora_rank', '2', '--max_steps', '1')
    assert code == 0
    args = json.loads((second / 'sft_args.json').read_text())
    assert (args['lora_rank'], args['max_steps'], args['learning_rate']) == (2, 1, 0.01)


def test_other_data_is_refused_unless_it_is_typed(first: Path, problems: Problems) -> None:
    data = first.parents[2] / 'qa.jsonl'
    before = data.read_text()
    try:
        data.write_text(before.replace('it is 7.', 'it is 8.'))
        assert again(first)[0] == 2
        assert problems()[0].startswith(f'--from_run: the rows of {data} have changed since that run (sha256 ')
        assert problems()[0].endswith(
            '20 then and 20 now). Restore the earlier ones, or type --dataset to use the present ones.'
        )
        assert again(first, '--dataset', str(data), '--max_steps', '1')[0] == 0
    finally:
        data.write_text(before)


def test_other_weights_are_refused(first: Path, problems: Problems) -> None:
    weights = first.parents[2] / 'model' / 'model.safetensors'
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert again(first)[0] == 2
        assert problems()[0].startswith('--from_run: the base weights have changed since that run (sha256 ')
    finally:
        weights.write_bytes(before)


def test_another_template_is_refused(first: Path, problems: Problems) -> None:
    template = first.parents[2] / 'model' / 'chat_template.jinja'
    before = template.read_text()
    try:
        template.write_text(before.replace("{{ '\n' }}", "{{ '\n\n' }}"))
        assert again(first)[0] == 2
        assert problems()[0].startswith(f'--from_run {first}: the template has changed since that run (its sha256 was ')
        assert again(first, '--template_type', 'auto', '--max_steps', '1')[0] == 0
    finally:
        template.write_text(before)


def test_other_versions_are_told(first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = tmp_path / 'copy'
    copy.mkdir()
    shutil.copy(first / 'lock.json', copy)
    lock = json.loads((copy / 'lock.json').read_text())
    lock['versions'] |= {'torch': '1.0', 'gone': '2.0'}
    (copy / 'lock.json').write_text(json.dumps({**lock, 'processes': 2}))
    assert again(copy, '--max_steps', '1', '--output_dir', str(tmp_path))[0] == 0
    assert 'the repeated run had 1.0: the numbers may differ.' in caplog.text
    assert 'gone is None, the repeated run had 2.0' in caplog.text
    assert '1 processes train, the repeated run had 2: the total batch size may differ.' in caplog.text


@pytest.mark.slow
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, problems: Problems) -> None:
    assert llm_sft.main(['--from_run', str(tmp_path)]) == 2
    assert (
        f'{tmp_path}/lock.json cannot be read as JSON: No such file or directory. Give --from_run a run'
        in problems()[0]
    )
    (tmp_path / 'lock.json').write_text('{')
    assert llm_sft.main(['--from_run', str(tmp_path)]) == 2
    assert 'lock.json cannot be read as JSON' in problems()[-1]


@pytest.mark.slow
def test_relative_names_are_told_where_they_start_without_the_name_of_a_user(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problems: Problems
) -> None:
    import llm_infer

    home = tmp_path / 'someone'
    rows = [{'query': f'what is {i}?', 'response': f'it is {i}.'} for i in range(8)]
    (home / 'work').mkdir(parents=True)
    write_jsonl(home / 'work' / 'rows.jsonl', rows)
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.chdir(home / 'work')
    words = small_flags(first.parent.parent.parent / 'model', Path('rows.jsonl'), Path('out'))
    assert llm_sft.main([*words, '--max_steps', '2']) == 0
    run = next((home / 'work' / 'out').glob('*/*'))
    lock = json.loads((run / 'lock.json').read_text())
    assert lock['directory'] == '~/work' and 'rows.jsonl' in lock['command']
    for name in ('lock.json', 'sft_args.json', 'run.json', 'report.html', 'answers.json'):
        assert not (run / name).exists() or 'someone' not in (run / name).read_text(), name
    monkeypatch.chdir(tmp_path)
    told = 'The run was started in ~/work: run the command there.'
    assert llm_sft.main(['--from_run', str(run)]) == 2
    assert len(problems()) == 1 and 'rows.jsonl is not there' in problems()[0] and problems()[0].endswith(told)
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-2')]) == 2
    assert len(problems()) == 2 and problems()[1].endswith(told)
    monkeypatch.chdir(home / 'work')
    assert llm_sft.main(['--from_run', str(run)]) == 0

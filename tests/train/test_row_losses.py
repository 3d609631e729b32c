"""rows.jsonl: the loss of each validation row before and after training, and what the report says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.support.runs import hashes, history, write_jsonl
from utils.data.encoded_rows import EncodedRows
from utils.encode.encoded import Encoded
from utils.encode.make import make_encoder
from utils.formats.conversation import Row
from utils.model import load_model, load_tokenizer
from utils.report.rows import kinds
from utils.run.read_back import read_rows

Run = Callable[..., Path]
ALL = ('--compare_rows', '-1')


def loss_by_hand(model: Any, tokenizer: Any, query: str, response: str) -> float:
    """Return the loss per trained token of one row, from the logits of the plain forward pass."""
    encoder = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=-1)
    messages: Any = [{'role': 'user', 'content': query}, {'role': 'assistant', 'content': response}]
    row = encoder.encode([Row(messages=messages)])[0]
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    start, end = row.trained
    return -float(sum(logs[i - 1, row.input_ids[i]] for i in range(start, end))) / (end - start)


@pytest.mark.slow
@pytest.mark.parametrize('sft_type', ['lora', 'full'])
def test_the_losses_are_those_of_base_and_tuned_model(
    run_sft: Run, model_dir: Path, data_file: Path, sft_type: str
) -> None:
    run = run_sft('--sft_type', sft_type, *ALL)
    rows = read_rows(run)
    texts = [json.loads(line) for line in data_file.read_text().splitlines()]
    tokenizer = load_tokenizer(model_dir)
    base: Any = load_model(model_dir, torch_dtype=torch.float32).eval()
    if sft_type == 'lora':
        opened: Any = load_model(model_dir, torch_dtype=torch.float32)
        tuned: Any = PeftModel.from_pretrained(opened, run / 'checkpoint-6').eval()
    else:
        tuned = load_model(run / 'checkpoint-6', torch_dtype=torch.float32).eval()
    assert len(rows) == 4
    for row in rows:
        file, _, line = row['origin'].rpartition(':')
        assert file == str(data_file)
        text = texts[int(line) - 1]
        pair = (text['query'], text['response'])
        assert row['loss_before'] == pytest.approx(loss_by_hand(base, tokenizer, *pair), rel=1e-4)
        assert row['loss_after'] == pytest.approx(loss_by_hand(tuned, tokenizer, *pair), rel=1e-4)
    last = [entry for entry in history(run, 6) if 'eval_loss' in entry][-1]
    tokens = sum(row['trained_tokens'] for row in rows)
    mean = sum(row['loss_after'] * row['trained_tokens'] for row in rows) / tokens
    assert last['eval_loss'] == pytest.approx(mean, rel=1e-6)
    report = (run / 'report.html').read_text(encoding='utf-8')
    assert 'Loss per token of 4 of 4 validation rows' in report and rows[0]['origin'] in report


@pytest.mark.slow
@pytest.mark.parametrize('sft_type', ['lora', 'full'])
def test_comparing_rows_changes_nothing_else_and_survives_resuming(run_sft: Run, sft_type: str) -> None:
    flags = ('--sft_type', sft_type, '--only_save_model', 'false', '--lora_dropout_p', '0.1')
    flags = flags if sft_type == 'lora' else flags[:4]
    compared = run_sft(*flags, *ALL)
    plain = run_sft(*flags, '--compare_rows', '0')
    assert hashes(compared / 'checkpoint-6') == hashes(plain / 'checkpoint-6')
    assert {row['loss_before'] for row in read_rows(plain)} == {None}
    assert all(row['loss_after'] > 0 for row in read_rows(plain))
    assert 'Loss per token of' not in (plain / 'report.html').read_text(encoding='utf-8')
    resumed = run_sft(*flags, *ALL, '--resume_from_checkpoint', str(compared / 'checkpoint-3'))
    assert hashes(resumed / 'checkpoint-6') == hashes(compared / 'checkpoint-6')
    assert sorted(map(str, read_rows(resumed))) == sorted(map(str, read_rows(compared)))


@pytest.mark.slow
def test_a_resumed_full_run_says_that_the_losses_before_are_lost(
    run_sft: Run, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ('--sft_type', 'full', '--only_save_model', 'false')
    run = run_sft(*flags, '--compare_rows', '0')
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-3'))
    assert 'the losses before training are missing, because the run that wrote the checkpoint did' in caplog.text
    assert all(row['loss_before'] is None and row['loss_after'] > 0 for row in read_rows(resumed))


@pytest.mark.slow
def test_the_losses_before_a_second_run_are_those_of_its_adapter(
    run_sft: Run, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = run_sft(*ALL) / 'checkpoint-6'
    after = {row['origin']: row['loss_after'] for row in read_rows(adapter.parent)}
    flags = ('--adapter', str(adapter), '--only_save_model', 'false', '--save_total_limit', '-1')
    second = run_sft(*flags, *ALL)
    before = {row['origin']: row['loss_before'] for row in read_rows(second)}
    assert before == pytest.approx(after, rel=1e-5)
    plain = run_sft(*flags, '--compare_rows', '0')
    assert hashes(second / 'checkpoint-6') == hashes(plain / 'checkpoint-6')
    resumed = run_sft('--only_save_model', 'false', *ALL, '--resume_from_checkpoint', str(second / 'checkpoint-3'))
    assert {row['origin']: row['loss_before'] for row in read_rows(resumed)} == before


def test_some_rows_are_spread_evenly_over_all() -> None:
    rows = EncodedRows()
    for length in range(2, 12):
        rows.append(Encoded(input_ids=[1] * length, trained=(1, length), prompt_length=1), f'a.jsonl:{length}')
    longest_first = rows.longest_first()
    assert longest_first.evenly(4).lengths() == [11, 9, 6, 4]
    assert longest_first.evenly(4).origin(1) == 'a.jsonl:9'
    assert longest_first.evenly(-1).lengths() == longest_first.evenly(99).lengths() == list(range(11, 1, -1))


def test_rows_are_sorted_by_what_training_did_to_them() -> None:
    losses = [(2.0, 1.0), (2.0, 1.9), (2.0, 2.3), (0.05, 0.01), (0.05, 0.09), (0.05, 0.2), (None, 1.0), (1.0, None)]
    rows = [{'origin': f'a:{i}', 'loss_before': a, 'loss_after': b} for i, (a, b) in enumerate(losses)]
    found = {kind: [row['origin'] for row in of_kind] for kind, of_kind in kinds(rows).items()}
    assert found == {
        'got worse': ['a:2', 'a:5'], 'the base knew': ['a:3', 'a:4'], 'learnt': ['a:0'], 'not learnt': ['a:1'],
    }  # fmt: skip


def test_rows_are_not_compared_if_answers_are_generated(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    generating = ('--predict_with_generate', 'true', '--max_new_tokens', '2', '--max_steps', '1')
    run = run_sft(*generating, '--compare_rows', '3')
    assert '--compare_rows has no effect: evaluation is by generated answers' in caplog.text
    assert not (run / 'rows.jsonl').exists()


def test_a_number_of_rows_below_all_is_refused(run_sft: Run, problems: Callable[[], list[str]]) -> None:
    run_sft('--compare_rows', '-2', expect=2)
    assert [line for line in problems() if line.startswith('--compare_rows')]


def test_a_damaged_file_of_rows_is_one_error(run_sft: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from utils.report.__main__ import main

    run = run_sft('--max_steps', '1')
    (run / 'rows.jsonl').write_text('{"origin": \n')
    assert main([str(run)]) == 2
    assert f'{run}/rows.jsonl: the file is not JSON lines (' in capsys.readouterr().err


def answers(path: Path, scores: dict[str, float], name: str = 'exact') -> Path:
    rows = [{'origin': o, 'answer': f'<{path.stem}>', 'scores': {name: value}} for o, value in scores.items()]
    return write_jsonl(path, rows)


def test_two_files_of_answers_are_compared_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from utils.report.__main__ import main

    before = answers(tmp_path / 'before.jsonl', {'a:1': 0, 'a:2': 100, 'a:3': 0, 'a:4': 0, 'a:5': 1})
    after = answers(tmp_path / 'after.jsonl', {'a:1': 100, 'a:2': 0, 'a:3': 0, 'a:4': 50, 'b:1': 1})
    target = tmp_path / 'page.html'
    assert main([str(before), str(after), '--html', str(target)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        'exact of 4 rows, 2 rows are only in one of the files: 2 won, 1 lost, 1 same',
        '  won: a:1: 0 -> 100',
        '  won: a:4: 0 -> 50',
        '  lost: a:2: 100 -> 0',
        f'answers: {target}',
    ]
    shown = target.read_text(encoding='utf-8')
    assert '2 rows won' in shown and '1 rows lost' in shown and '&lt;after&gt;' in shown

    other = answers(tmp_path / 'other.jsonl', {'a:1': 1}, name='rouge-l')
    assert main([str(before), str(other)]) == 2
    assert 'no row has the same kind of score in both' in capsys.readouterr().err
    broken = write_jsonl(tmp_path / 'broken.jsonl', [{'query': 'a'}])
    assert main([str(before), str(broken)]) == 2
    assert (
        'broken.jsonl:1: origin is missing or has the wrong type. Give a file that llm_infer.py wrote'
        in capsys.readouterr().err
    )
    assert main([str(before), str(tmp_path / 'gone.jsonl')]) == 2
    assert f'{tmp_path}/gone.jsonl: the answers in this file cannot be read' in capsys.readouterr().err
    assert main([str(before), str(after), '--html', str(tmp_path)]) == 2
    assert f'--html: {tmp_path} cannot be written' in capsys.readouterr().err

"""--val_dataset from training to answers: exact losses of each set, in every layout, and the same rows everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_infer
import llm_sft
from tests.support.runs import ROOT, get_dataset, history, small_flags, weights, write_jsonl
from utils import dataset
from utils.data.encode_plan import encode_rows
from utils.data.encoding_report import EncodingReport
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import IGNORE_INDEX, row_labels
from utils.loading.adapter import load_adapter
from utils.model import load_model, load_tokenizer
from utils.run.read_back import read_rows

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
pytestmark = pytest.mark.slow
GREEDY = ('--do_sample', 'false', '--max_new_tokens', '2')


@pytest.fixture
def sets(tmp_path: Path) -> tuple[str, str]:
    """Return two validation sets of different sizes, lengths and difficulty."""
    short = [{'query': f'what is {i}?', 'response': 'yes'} for i in range(5)]
    long = [{'query': f'why is {i} so?', 'response': f'it is {i}, because' + ' no' * (i % 7)} for i in range(11)]
    return str(write_jsonl(tmp_path / 'short.jsonl', short)), str(write_jsonl(tmp_path / 'long.jsonl', long))


def evaluations(run: Path) -> list[dict[str, Any]]:
    entries = json.loads((run / 'history.json').read_text())
    return [
        {k: v for k, v in e.items() if 'second' not in k and 'runtime' not in k} for e in entries if 'eval_loss' in e
    ]


def sums(model: Any, encoder: AutoEncoder, file: str) -> torch.Tensor:
    """Return summed loss, hits and trained tokens of a file, computed from the logits of each row alone."""
    rows, _ = encode_rows(encoder, get_dataset([file], test_ratio=0).train, EncodingReport())
    found = torch.zeros(3, dtype=torch.float64)
    for row in (rows[i] for i in range(len(rows))):
        labels = torch.tensor(row_labels(row))[1:]
        kept = labels != IGNORE_INDEX
        with torch.no_grad():
            logits = model(torch.tensor([row['input_ids']])).logits[0, :-1][kept].double()
        loss = torch.nn.functional.cross_entropy(logits, labels[kept], reduction='sum')
        hits = (logits.argmax(dim=-1) == labels[kept]).sum()
        found += torch.stack([loss, hits.double(), kept.sum().double()])
    return found


@pytest.mark.parametrize('padding_free', ['true', 'false'])
def test_the_losses_are_those_of_each_row_alone(
    padding_free: str, run_sft: Run, sets: tuple[str, str], model_dir: Path
) -> None:
    run = run_sft('--val_dataset', *sets, '--padding_free', padding_free, '--eval_batch_size', '4')
    model = load_adapter(load_model(model_dir, torch_dtype=torch.float32), run / 'checkpoint-6').eval()
    encoder = AutoEncoder(load_tokenizer(model_dir), system=None, max_length=-1)
    of_short, of_long = (sums(model, encoder, file) for file in sets)
    last = evaluations(run)[-1]
    assert last['step'] == 6
    for prefix, found in (('', of_short + of_long), ('short_', of_short), ('long_', of_long)):
        assert last[f'eval_{prefix}loss'] == pytest.approx(float(found[0] / found[2]), rel=1e-6)
        assert last[f'eval_{prefix}acc'] == pytest.approx(float(found[1] / found[2]), abs=1e-12)
    assert abs(last['eval_short_loss'] - last['eval_long_loss']) > 0.01, 'two different sets'


def test_the_run_trains_every_row_and_tells_of_each_set_everywhere(
    run_sft: Run, sets: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = ('--val_dataset', *sets, '--dataset_test_ratio', '0.5', '--stream_val_rows', '3', '--report_samples', '2')
    run = run_sft(*flags)
    told = json.loads((run / 'run.json').read_text())
    assert told['data']['train']['rows'] == 40 and told['data']['validation']['rows'] == 16
    assert told['data']['validation_sets'] == {'short': 5, 'long': 11}
    assert {'eval_loss', 'eval_short_loss', 'eval_long_loss', 'eval_long_acc'} < told['last_evaluation'].keys()
    for name in ('dataset_test_ratio', 'stream_val_rows'):
        assert caplog.text.count(f'--{name} has no effect') == 1
        assert f'--{name} has no effect: --val_dataset names the validation rows.' in caplog.text
    assert 'validation sets: short 5 rows, long 11 rows' in caplog.text
    assert told['decisions'].count(
        f'validation rows = all rows of --val_dataset {",".join(sets)} because it is typed: no row of --dataset is '
        'held out'
    ) == 1  # fmt: skip

    best = min(evaluations(run), key=lambda entry: entry['eval_loss'])
    assert told['best_checkpoint'].endswith(f'checkpoint-{best["step"]}')
    assert [a['split'] for a in json.loads((run / 'answers.json').read_text())] == ['validation'] * 2
    page = (run / 'report.html').read_text()
    assert (
        'Validation sets at the last evaluation' in page and f'<td>{told["last_evaluation"]["eval_long_loss"]}' in page
    )
    assert 'validation loss: short' in page and (run / 'images' / 'eval_short_loss.png').is_file()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / 'runs'))
    events.Reload()
    assert {'eval/loss', 'eval/short_loss', 'eval/long_loss'} < set(events.Tags()['scalars'])


def test_one_set_has_only_the_loss_of_the_whole(run_sft: Run, sets: tuple[str, str]) -> None:
    both = evaluations(run_sft('--val_dataset', *sets))
    alone = evaluations(run_sft('--val_dataset', sets[1]))
    assert 'eval_long_loss' not in alone[0]
    for one, other in zip(both, alone, strict=True):
        assert one['eval_long_loss'] == pytest.approx(other['eval_loss'], abs=1e-6)


def test_generated_answers_are_scored_for_each_set(run_sft: Run, sets: tuple[str, str]) -> None:
    flags = ('--predict_with_generate', 'true', '--max_new_tokens', '4', '--do_sample', 'false')
    both = json.loads((run_sft('--val_dataset', *sets, *flags) / 'run.json').read_text())['last_evaluation']
    for file, name, rows in ((sets[0], 'short', 5), (sets[1], 'long', 11)):
        alone = json.loads((run_sft('--val_dataset', file, *flags) / 'run.json').read_text())['last_evaluation']
        for score in ('rouge-1', 'rouge-l', 'bleu-4'):
            assert both[f'eval_{name}_{score}'] == alone[f'eval_{score}'], (name, score, rows)
    whole = (5 * both['eval_short_rouge-1'] + 11 * both['eval_long_rouge-1']) / 16
    assert both['eval_rouge-1'] == pytest.approx(whole, abs=1e-3)


@pytest.mark.processes
@pytest.mark.parametrize('streaming', ['false', 'true'])
def test_two_processes_evaluate_as_one(
    streaming: str, model_dir: Path, data_file: Path, tmp_path: Path, sets: tuple[str, str]
) -> None:
    runs = []
    for processes, accumulation in ((1, 2), (2, 1)):
        words = small_flags(model_dir, data_file, tmp_path / str(processes))
        words += ['--val_dataset', *sets, '--gradient_accumulation_steps', str(accumulation), '--streaming', streaming]
        words += ['--group_by_length', 'false'] if streaming == 'false' else []
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        done = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), 'llm_sft.py', *words],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(evaluations(next((tmp_path / str(processes)).glob('tiny-llama/*'))))
    assert len(runs[0]) == 2
    for one, two in zip(*runs, strict=True):
        assert {'eval_loss', 'eval_short_loss', 'eval_long_loss', 'eval_long_acc'} < one.keys()
        for key, value in one.items():
            assert two[key] == pytest.approx(value, abs=1e-5), key


def answered(file: Path) -> list[str]:
    return [json.loads(line)['messages'][-1]['content'] for line in file.read_text().splitlines()]


WHOLE = [f'what is {i}?' for i in range(5)] + [f'why is {i} so?' for i in range(11)]


@pytest.mark.parametrize('streaming', ['false', 'true'])
def test_inference_answers_the_sets_of_the_run(
    streaming: str, run_sft: Run, sets: tuple[str, str], tmp_path: Path, problems: Problems
) -> None:
    data = write_jsonl(tmp_path / 'mine.jsonl', [{'query': f'q{i}', 'response': 'r'} for i in range(9)])
    run = run_sft('--dataset', str(data), '--val_dataset', *sets, '--max_steps', '1', '--streaming', streaming)
    checkpoint = run / 'checkpoint-1'
    serve = ['--ckpt_dir', str(checkpoint), *GREEDY]
    data.unlink()  # the training rows are not needed
    assert llm_infer.main(serve) == 0
    assert answered(checkpoint / 'infer_result.jsonl') == WHOLE

    (run / 'held_out.json').unlink()  # then the sets are read as in training, and compared with the lock
    assert llm_infer.main(serve) == 0
    assert answered(checkpoint / 'infer_result-2.jsonl') == WHOLE

    write_jsonl(Path(sets[0]), [{'query': 'what is 0?', 'response': 'no'}])
    assert llm_infer.main(serve) == 2
    assert problems()[-1].startswith(f'--val_dataset {sets[0]}: the rows have changed since checkpoint-1 was')
    assert len(problems()) == 1

    typed = str(write_jsonl(tmp_path / 'typed.jsonl', [{'query': f't{i}', 'response': 'r'} for i in range(30)]))
    assert llm_infer.main([*serve, '--dataset', typed]) == 0
    assert answered(checkpoint / 'infer_result-3.jsonl') == [f't{i}' for i in range(30)]


def test_typed_sets_are_answered_whole(
    run_sft: Run, sets: tuple[str, str], tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_sft('--val_dataset', sets[0], '--max_steps', '1')
    typed = str(write_jsonl(tmp_path / 'typed.jsonl', [{'query': f't{i}', 'response': 'r'} for i in range(30)]))
    checkpoint = run / 'checkpoint-1'
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--dataset', sets[1], '--val_dataset', typed, *GREEDY]) == 0
    assert len(answered(checkpoint / 'infer_result.jsonl')) == 30
    assert '--dataset has no effect: --val_dataset names the rows to answer.' in caplog.text
    target = tmp_path / 'untuned.jsonl'
    words = ['--model_id_or_path', str(model_dir), '--val_dataset', *sets, '--result_path', str(target), *GREEDY]
    assert llm_infer.main(words) == 0
    assert answered(target) == WHOLE


def test_sets_that_were_trained_on_are_warned_about(
    run_sft: Run, sets: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    run = run_sft('--dataset', sets[1], '--max_steps', '1')
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-1'), '--val_dataset', sets[1], *GREEDY]) == 0
    assert f'--val_dataset {sets[1]}: the run was trained on rows of it.' in caplog.text


def test_a_registered_name_in_both_flags_validates_on_its_validation_part(
    run_sft: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problems: Problems
) -> None:
    train = [{'query': f'p{i}', 'response': 'x'} for i in range(8)]
    val = [{'query': f'v{i}', 'response': 'x'} for i in range(2)]
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'pair', lambda: (train, val))
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'other', lambda: (train, train))
    run = run_sft('--dataset', 'pair', 'other', '--val_dataset', 'pair', '--max_steps', '1')
    told = json.loads((run / 'run.json').read_text())
    assert told['data']['train']['rows'] == 16 and told['data']['validation']['rows'] == 2
    line = 'other (validation) is not used because --val_dataset names the validation rows'
    assert told['decisions'].count(line) == 1 and caplog.text.count(line) == 1
    serve = ['--ckpt_dir', str(run / 'checkpoint-1'), *GREEDY]
    assert llm_infer.main(serve) == 0
    assert answered(run / 'checkpoint-1' / 'infer_result.jsonl') == ['v0', 'v1']
    assert 'the run was trained on rows of it' not in caplog.text
    monkeypatch.setitem(dataset.DATASET_MAPPING, 'pair', lambda: (train, train))
    assert llm_infer.main(serve) == 2
    assert problems()[-1].startswith('--val_dataset pair (validation): the rows have changed since checkpoint-1 was')


@pytest.mark.parametrize('streaming', [(), ('--streaming', 'true')], ids=str)
def test_repeating_and_resuming_compare_the_sets(
    streaming: tuple[str, ...], run_sft: Run, sets: tuple[str, str], problems: Problems
) -> None:
    flags = ('--val_dataset', *sets, *streaming)
    run = run_sft(*flags)
    assert evaluations(run_sft('--from_run', str(run))) == evaluations(run)
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-3'))
    assert history(resumed, 6) == history(run, 6)
    expected = weights(run, 6)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(resumed, 6).items())

    write_jsonl(Path(sets[0]), [{'query': 'what is 0?', 'response': 'no'}])
    assert llm_sft.main(['--from_run', str(run)]) == 2
    assert problems()[-1].startswith(f'--from_run: the rows of {sets[0]} have changed since that run')
    assert problems()[-1].endswith(
        '5 then and 1 now). Restore the earlier ones, or type --val_dataset to use the present ones.'
    )
    run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-3'), expect=2)
    assert problems()[-1].startswith(f'--val_dataset {sets[0]}: the rows have changed since checkpoint-3 was')


def test_a_stream_trains_every_row_and_reads_the_sets_whole(
    run_sft: Run, sets: tuple[str, str], tmp_path: Path
) -> None:
    rows = [{'query': f'q{i}', 'response': 'r'} for i in range(12)]
    bad = str(write_jsonl(tmp_path / 'bad.jsonl', [{'query': 'b', 'response': None}, {**rows[0], 'note': 'n'}]))
    data = str(write_jsonl(tmp_path / 'mine.jsonl', rows))
    run = run_sft('--dataset', data, '--val_dataset', sets[0], bad, '--streaming', 'true', '--max_steps', '6')
    told = json.loads((run / 'run.json').read_text())['data']
    assert told['train']['rows_read'] == 12 and told['validation']['rows'] == 6
    assert told['validation_sets'] == {'short': 5, 'bad': 1}
    assert told['left_out'] == {'null response': 1} and told['noted'] == {'column `note` is not used': 1}
    assert 'eval_bad_loss' in evaluations(run)[-1]


def test_every_row_of_a_set_skipped_is_an_error(run_sft: Run, tmp_path: Path, problems: Problems) -> None:
    row = {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'r', 'loss': False}]}
    unmarked = str(write_jsonl(tmp_path / 'unmarked.jsonl', [row]))
    run_sft('--val_dataset', unmarked, expect=2)
    start = f'--val_dataset {unmarked}: every row was skipped: 1 row skipped: the last reply is marked to carry no loss'
    assert problems()[0].startswith(start)


REPORT = 'output/tiny-llama/dataset_report.json'


def test_the_data_check_finds_validation_rows_in_the_training_set(
    run_sft: Run, data_file: Path, tmp_path: Path, sets: tuple[str, str]
) -> None:
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    # Row 7 comes twice in the training set: whichever copy is drawn, the validation row is found.
    data = str(write_jsonl(tmp_path / 'train.jsonl', [rows[7], *rows]))
    leaky = str(write_jsonl(tmp_path / 'leaky.jsonl', [{'query': 'new', 'response': 'n'}, rows[7], rows[30]]))
    run_sft('--dataset', data, '--val_dataset', leaky, sets[0], '--check_dataset', 'true', expect=1)
    told = json.loads((tmp_path / REPORT).read_text())
    assert told['rows'] == {
        'read': 49, 'kept': 49, 'train': 41, 'validation': 8, 'not_drawn': 0, 'filtered': 0, 'left_out': 0,
        'stops': 0,
    }  # fmt: skip
    assert told['val_dataset'] == [leaky, sets[0]]
    leaked = told['defects']['validation row that is in the training set']
    assert leaked == {'rows': 2, 'first': [f'{leaky}:2 response of {data}:1', f'{leaky}:3 response of {data}:32']}

    sampled = ('--val_dataset', leaky, '--check_dataset', 'true', '--train_dataset_sample', '40')
    run_sft('--dataset', data, *sampled, expect=1)
    told = json.loads((tmp_path / REPORT).read_text())
    assert told['rows']['not_drawn'] == 1 and told['rows']['validation'] == 3
    assert told['defects']['validation row that is in the training set']['rows'] == 2


def test_a_copy_that_is_not_drawn_does_not_hide_one_that_is_trained(run_sft: Run, tmp_path: Path) -> None:
    """Of two copies of a row only one is drawn; for each seed, the row is found as leaked from the drawn copy."""
    row = {'query': 'twice', 'response': 'the same'}
    data = str(write_jsonl(tmp_path / 'train.jsonl', [row, row]))
    leaky = str(write_jsonl(tmp_path / 'leaky.jsonl', [row]))
    found = set()
    for seed in range(4):
        flags = ('--val_dataset', leaky, '--check_dataset', 'true', '--train_dataset_sample', '1')
        run_sft('--dataset', data, *flags, '--dataset_seed', str(seed), expect=1)
        told = json.loads((tmp_path / REPORT).read_text())['defects']
        (place,) = told['validation row that is in the training set']['first']
        found.add(place.removeprefix(f'{leaky}:1 response of {data}:'))
    assert found == {'1', '2'}


def test_a_dry_run_shows_the_sets(
    model_dir: Path, data_file: Path, tmp_path: Path, sets: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*small_flags(model_dir, data_file, tmp_path / 'out'), '--dry_run', 'true', '--val_dataset', *sets]
    assert llm_sft.main(words) == 0
    printed = capsys.readouterr().out
    assert '40 training rows, 16 validation, 0 skipped' in printed
    assert 'validation sets: short 5 rows, long 11 rows' in printed
    assert f'validation rows = all rows of --val_dataset {",".join(sets)}' in printed


OWN = """
def length(answer, label, row):
    return {'query': len(row['query']), 'label': len(label)}


def short_exact(answer, label, row):
    return 1
"""
GENERATING = ('--predict_with_generate', 'true', *GREEDY, '--eval_batch_size', '4')


@pytest.mark.parametrize('streaming', ['false', 'true'])
def test_own_scores_are_given_for_each_set_with_its_own_rows(
    run_sft: Run, sets: tuple[str, str], tmp_path: Path, streaming: str
) -> None:
    own = tmp_path / 'own.py'
    own.write_text(OWN)
    flags = (*GENERATING, '--val_dataset', *sets, '--score', f'{own}:length', 'exact')
    run = run_sft(*flags, '--max_steps', '2', '--eval_steps', '1', '--streaming', streaming)
    last = json.loads((run / 'run.json').read_text())['last_evaluation']
    read = [[json.loads(line) for line in Path(file).read_text().splitlines()] for file in sets]
    for prefix, rows in (('', [*read[0], *read[1]]), ('short_', read[0]), ('long_', read[1])):
        query = sum(len(row['query']) for row in rows) / len(rows)
        label = sum(len(row['response']) for row in rows) / len(rows)
        assert last[f'eval_{prefix}length'] == last[f'eval_{prefix}length-query'] == pytest.approx(query, abs=1e-4)
        assert last[f'eval_{prefix}length-label'] == pytest.approx(label, abs=1e-4)
        assert f'eval_{prefix}exact' in last
    drawn = {f'eval_{name}{score}.png' for name in ('', 'short_', 'long_') for score in ('length', 'exact')}
    assert drawn <= {path.name for path in (run / 'images').iterdir()}
    page = (run / 'report.html').read_text()
    for title in ('validation length', 'validation length: short', 'validation exact: long'):
        assert f'{title}<' in page or f'"{title}"' in page, title
    table = page[page.index('Validation sets at the last evaluation') :]
    assert re.findall(r'<th[^>]*>([^<]+)</th>', table)[:4] == ['validation set', 'rows', 'length', 'exact']


def test_two_values_with_one_name_are_refused(
    run_sft: Run, sets: tuple[str, str], tmp_path: Path, problems: Problems
) -> None:
    own = tmp_path / 'own.py'
    own.write_text(OWN)
    words = (*GENERATING, '--score', f'{own}:short_exact', 'exact')
    run_sft(*words, '--val_dataset', *sets, expect=2)
    assert problems() == [
        "--score 'exact': the score of the validation set 'short' would be logged as 'short_exact', but another value "
        'is logged under this name. Rename a score function or the file of the validation set.'
    ]
    run_sft(*words, '--val_dataset', sets[0], '--max_steps', '1')


@pytest.mark.parametrize('streaming', ['false', 'true'])
def test_the_rows_of_sets_count_for_early_stop(run_sft: Run, sets: tuple[str, str], streaming: str) -> None:
    flags = ('--learning_rate', '5', '--max_steps', '9', '--eval_steps', '1', '--early_stop', '1')
    run = run_sft(*flags, '--val_dataset', *sets, '--stream_val_rows', '0', '--streaming', streaming)
    told = json.loads((run / 'run.json').read_text())
    assert told['steps'] < 9
    assert told['ended_early'].startswith(f'training ended at step {told["steps"]} of 9 because of --early_stop 1')


def test_the_losses_of_the_rows_are_those_of_their_sets(run_sft: Run, sets: tuple[str, str]) -> None:
    run = run_sft('--val_dataset', *sets, '--compare_rows', '-1')
    rows = read_rows(run)
    assert len(rows) == 16 and all(row['loss_before'] for row in rows)
    last = evaluations(run)[-1]
    for name, file in zip(('short', 'long'), sets, strict=True):
        of_set = [row for row in rows if row['origin'].startswith(f'{file}:')]
        tokens = sum(row['trained_tokens'] for row in of_set)
        mean = sum(row['loss_after'] * row['trained_tokens'] for row in of_set) / tokens
        assert last[f'eval_{name}_loss'] == pytest.approx(mean, rel=1e-6)


def test_the_pieces_of_a_split_text_are_one_row(run_sft: Run, tmp_path: Path) -> None:
    files = [tmp_path / 'long.txt', tmp_path / 'short.txt']
    files[0].write_text(' '.join(f'sentence {i} of a long text.' for i in range(20)))
    files[1].write_text('A short text.')
    run = run_sft(
        '--val_dataset', *map(str, files), '--overlong', 'split', '--max_length', '64', '--compare_rows', '1',
    )  # fmt: skip
    told = json.loads((run / 'run.json').read_text())
    assert told['data']['validation_sets'] == {'long': 7, 'short': 1}
    rows = {Path(row['origin'].partition(':')[0]).stem: row for row in read_rows(run)}
    last = evaluations(run)[-1]
    assert {'long', 'short'} == rows.keys()
    for name, row in rows.items():
        assert last[f'eval_{name}_loss'] == pytest.approx(row['loss_after'], rel=1e-6)
    assert rows['long']['loss_before'] is not None and rows['short']['loss_before'] is None
    assert rows['long']['loss_after'] == pytest.approx(rows['long']['loss_before'], rel=0.2)

"""Shares of a mixture: exact counts, rows repeated in whole passes, and streams that keep the shares."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_infer
from tests.support.runs import history, weights, write_jsonl
from tests.support.tiny_models import make_tokenizer
from utils import dataset
from utils.base.errors import ConfigError
from utils.data import stream
from utils.data.encode_plan import PreparedData, prepare_data
from utils.data.encoded_rows import EncodedRows
from utils.data.mixture import split_size, take_turns
from utils.data.parts import TRAIN, VAL
from utils.data.plan import Plan, plan_rows
from utils.data.sources import parse_source
from utils.data.stream import TrainingStream
from utils.data.stream_parts import open_streams
from utils.encode.make import make_encoder
from utils.run.rows import streams_lock

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
TOKENIZER = make_tokenizer()


def numbered(folder: Path, name: str, count: int) -> str:
    rows = [{'query': f'{name}{i}', 'response': f'the answer is {i}.'} for i in range(count)]
    return str(write_jsonl(folder / f'{name}.jsonl', rows))


def questions(plan: Plan, use: int) -> list[str]:
    return [row.messages[-2]['content'] for _, row in plan.rows(use)]


def prepared(plan: Plan, folder: Path, **settings: Any) -> PreparedData:
    encoder = make_encoder(
        TOKENIZER, template_type='auto', system='', system_typed=False, **{'max_length': -1, **settings}
    )
    return prepare_data(encoder, plan, folder)


def trained(data: PreparedData) -> Counter[str]:
    """Return how often an epoch trains each question."""
    assert isinstance(data.train, EncodedRows)
    texts = (TOKENIZER.decode(data.train[i]['input_ids']) for i in range(len(data.train)))
    return Counter(text.split('user\n')[1].split('<|im_end|>')[0] for text in texts)


WORDS = {
    'a.jsonl%0.3': ('a.jsonl', None, Fraction(3, 10)),
    'rows/%.25': ('rows/', None, Fraction(1, 4)),
    'sql-demo%0.5': ('sql-demo', None, Fraction(1, 2)),
    '50%.jsonl': ('50%.jsonl', None, None),
    '50%.txt': ('50%.txt', None, None),
    '50%0.5.jsonl': ('50%0.5.jsonl', None, None),
    '50%.jsonl#7': ('50%.jsonl', 7, None),
    '50%.jsonl%0.5': ('50%.jsonl', None, Fraction(1, 2)),
    'of%20/rows/': ('of%20/rows/', None, None),
}


@pytest.mark.parametrize('word', WORDS)
def test_a_share_follows_the_name_and_a_percent_sign_in_a_path_stays(word: str) -> None:
    source = parse_source(word)
    assert (source.name, source.sample, source.share) == WORDS[word]


@pytest.mark.parametrize('share', ['', '0', '0.0', '1', '1.5', '30', '-0.5', '1e-1', 'x'])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    with pytest.raises(ConfigError, match='the share after % must be above 0 and below 1, got') as raised:
        parse_source(f'a.jsonl%{share}')
    assert f"got '{share}'. Write for example sql-demo%0.3 for 30 % of the training rows." in str(raised.value)


@pytest.mark.parametrize('word', ['a.jsonl#5%0.5', 'a.jsonl%0.5#5'])
def test_a_number_and_a_share_together_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match='# and % both say how many rows are used. Keep one of them'):
        parse_source(word)


def test_counts_sum_to_the_size() -> None:
    assert split_size(10, [Fraction(1, 3)] * 3) == [4, 3, 3]
    assert split_size(7, [Fraction('0.5'), Fraction('0.25'), Fraction('0.25')]) == [3, 2, 2]
    assert split_size(1000, [Fraction('0.333333')] * 3) == [334, 333, 333]
    rng = random.Random(1)
    for _ in range(200):
        parts = [rng.randint(1, 50) for _ in range(rng.randint(1, 8))]
        shares = [Fraction(part, sum(parts)) for part in parts]
        size = rng.randint(0, 500)
        counts = split_size(size, shares)
        assert sum(counts) == size
        assert all(abs(count - size * share) < 1 for count, share in zip(counts, shares, strict=True))


def test_turns_stay_less_than_one_row_from_the_shares() -> None:
    rng = random.Random(2)
    cases = [[Fraction('0.3'), Fraction('0.7')], [Fraction(1)], [Fraction('0.9'), *[Fraction('0.01')] * 10]]
    for _ in range(60):
        parts = [rng.choice([1, 1, 2, 3, 17, 250, 999]) for _ in range(rng.randint(2, 9))]
        cases.append([Fraction(part, sum(parts)) for part in parts])
    for shares in cases:
        counts = [0] * len(shares)
        for step, chosen in enumerate(islice(take_turns(shares), 2500), start=1):
            counts[chosen] += 1
            assert all(abs(count - step * share) < 1 for count, share in zip(counts, shares, strict=True)), shares


def test_a_small_set_is_repeated_in_whole_passes_and_a_large_one_is_drawn_from(tmp_path: Path) -> None:
    words = [f'{numbered(tmp_path, "a", 10)}%0.3', f'{numbered(tmp_path, "b", 90)}%0.7']
    plan = plan_rows(words, test_ratio=0, train_sample=50)
    assert plan.drawn == [
        f'mixture = 50 training rows because --dataset gives shares: {tmp_path}/a.jsonl 15 rows (30 % of 50, 1.5 '
        f'passes of its 10 rows), {tmp_path}/b.jsonl 35 rows (70 % of 50, drawn from its 90 rows)'
    ]
    data = prepared(plan, tmp_path)
    times = trained(data)
    of_a = {question: count for question, count in times.items() if question.startswith('a')}
    assert sorted(of_a.values()) == [1] * 5 + [2] * 5
    assert set(times.values()) == {1, 2} and sum(times.values()) == 50
    assert data.summary['train']['rows'] == 50 and data.summary['train']['distinct_rows'] == 45
    assert data.summary['mixture'] == {f'{tmp_path}/a.jsonl': 15, f'{tmp_path}/b.jsonl': 35}
    assert trained(prepared(plan_rows(words, test_ratio=0, train_sample=50), tmp_path)) == times
    other = trained(prepared(plan_rows(words, test_ratio=0, train_sample=50, seed=7), tmp_path))
    assert other != times, 'another seed repeats and draws other rows'


def test_without_a_typed_size_it_is_the_number_of_all_rows(tmp_path: Path) -> None:
    words = [f'{numbered(tmp_path, "a", 10)}%0.75', f'{numbered(tmp_path, "b", 30)}%0.25']
    plan = plan_rows(words, test_ratio=0)
    assert '30 rows (75 % of 40, 3 passes of its 10 rows)' in plan.drawn[0]
    assert '10 rows (25 % of 40, drawn from its 30 rows)' in plan.drawn[0]
    assert set(trained(prepared(plan, tmp_path)).values()) == {1, 3}


def test_sets_without_a_share_give_all_their_rows(tmp_path: Path) -> None:
    words = [f'{numbered(tmp_path, "a", 10)}%0.5', numbered(tmp_path, 'b', 12), f'{numbered(tmp_path, "c", 40)}#18']
    plan = plan_rows(words, test_ratio=0)
    assert plan.drawn[1:] == [
        f'mixture = 60 training rows because --dataset gives shares: {tmp_path}/a.jsonl 30 rows (50 % of 60, 3 passes '
        f'of its 10 rows), {tmp_path}/b.jsonl 12 rows (no share, all its rows), {tmp_path}/c.jsonl 18 rows (no share, '
        'all its rows)'
    ]
    limited = plan_rows(words, test_ratio=0, train_sample=20)
    assert '10 rows (50 % of 20, all its rows)' in limited.drawn[1]
    assert len(questions(limited, TRAIN)) == 20


def test_no_validation_row_is_trained_and_the_split_does_not_depend_on_the_shares(tmp_path: Path) -> None:
    a, b = numbered(tmp_path, 'a', 20), numbered(tmp_path, 'b', 40)
    plain = plan_rows([a, b], test_ratio=0.25)
    mixed = plan_rows([f'{a}%0.8', f'{b}%0.2'], test_ratio=0.25)
    held_out = questions(mixed, VAL)
    assert held_out == questions(plain, VAL) and len(held_out) == 15
    times = trained(prepared(mixed, tmp_path))
    assert not set(held_out) & set(times) and sum(times.values()) == 45
    assert sum(count for question, count in times.items() if question.startswith('a')) == 36


def test_shares_are_part_of_the_key_and_of_the_lock(tmp_path: Path) -> None:
    a, b = numbered(tmp_path, 'a', 10), numbered(tmp_path, 'b', 10)
    plans = [
        plan_rows(words, test_ratio=0, train_sample=train_sample)
        for words, train_sample in (
            ([a, b], -1), ([f'{a}%0.5', f'{b}%0.5'], -1), ([f'{a}%0.5', f'{b}%0.5'], 40),
            ([f'{a}%0.6', f'{b}%0.4'], 40),
        )
    ]  # fmt: skip
    digests = [plan.digest for plan in plans]
    assert digests[0] == digests[1], 'the same rows, once each'
    assert len(set(digests)) == 3
    assert [plan.lock()[a]['rows'] for plan in plans] == [10, 10, 20, 24]
    assert plans[0].lock() == plans[1].lock() and len({plan.lock()[a]['sha256'] for plan in plans}) == 3


def test_repeated_rows_are_counted_once_in_the_account_and_a_skipped_row_is_missing_in_every_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = numbered(tmp_path, 'a', 4)
    bad = {'query': '</s>' * 3, 'response': '<|im_end|>'}
    rows = [{'query': f'b{i}', 'response': f'it is {i}.'} for i in range(3)]
    b = str(write_jsonl(tmp_path / 'b.jsonl', [*rows, {'query': 'b3', 'response': ' '}, bad]))
    plan = plan_rows([f'{a}%0.5', f'{b}%0.5'], test_ratio=0, train_sample=16)
    usable = plan.parts[1].uses.count(TRAIN)
    data = prepared(plan, tmp_path)
    told = data.summary['account']['fields']['user text']['context']
    stored = data.summary['train']['distinct_rows']
    assert stored == 4 + usable and told == 2 * (stored - 1) + len(bad['query'])
    assert 'an epoch trains some rows several times' in caplog.text


def test_rows_that_the_template_skips_are_said_to_be_missing_from_the_mixture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = numbered(tmp_path, 'a', 4)
    rows: list[Any] = [
        {'messages': [{'role': 'user', 'content': f'b{i}'}, {'role': 'assistant', 'content': 'x'}]} for i in range(4)
    ]
    rows[2]['messages'][1]['loss'] = False
    b = str(write_jsonl(tmp_path / 'b.jsonl', rows))
    data = prepared(plan_rows([f'{a}%0.5', f'{b}%0.5'], test_ratio=0, train_sample=16), tmp_path)
    assert trained(data) == {**{f'a{i}': 2 for i in range(4)}, 'b0': 2, 'b1': 2, 'b3': 2}
    assert data.summary['mixture'][b] == 6
    assert f'mixture: {b} gives 6 rows instead of 8, because some of its rows were skipped' in caplog.text


def test_a_share_that_gives_no_row_is_refused(tmp_path: Path) -> None:
    a = numbered(tmp_path, 'a', 10)
    empty = str(write_jsonl(tmp_path / 'empty.jsonl', [{'query': 'x', 'response': ''}]))
    with pytest.raises(ConfigError, match='its share of a mixture of 20 rows is less than one row. Raise the share'):
        plan_rows([f'{a}%0.001', f'{numbered(tmp_path, "b", 10)}%0.999'], test_ratio=0)
    with pytest.raises(ConfigError, match='it has a share, but no row can be trained on'):
        plan_rows([f'{a}%0.5', f'{empty}%0.5'], test_ratio=0)


def test_rows_are_repeated_by_index(tmp_path: Path) -> None:
    plan = plan_rows([f'{numbered(tmp_path, "a", 3)}%0.9', f'{numbered(tmp_path, "b", 7)}%0.1'], test_ratio=0)
    rows = prepared(plan, tmp_path).train
    assert isinstance(rows, EncodedRows)
    assert (len(rows), rows.stored) == (10, 4) and len(rows.arrays['prompt_lengths']) == 4
    assert len(rows.lengths()) == 10 and sum(rows.lengths()) > len(rows.ids)
    assert [rows.origin(i).rpartition(':')[2] for i in range(10)][:3] == ['1', '2', '3'], 'whole passes come first'
    assert Counter(rows.origin(i) for i in range(10)) == {
        **{f'{tmp_path}/a.jsonl:{i}': 3 for i in (1, 2, 3)},
        rows.origin(3): 1,
    }
    assert rows.trained_tokens() == sum(row['trained'][1] - row['trained'][0] for row in (rows[i] for i in range(10)))
    sorted_rows = rows.longest_first()
    assert sorted_rows.lengths() == sorted(rows.lengths(), reverse=True) and len(sorted_rows) == 10
    assert Counter(rows.parts().tolist()) == {0: 9, 1: 1}


# Rules of a command line, each with a part of its message.
RULES = {
    ('A%0.5', 'B%0.4'): '(the number after %), but the shares sum to 0.9 instead of 1. Change the shares',
    ('A%0.5', 'B%0.6'): '(the number after %), but the shares sum to 1.1 instead of 1. Change the shares',
    ('A%0.7', 'B%0.3', 'C'): 'sum to 1, so nothing is left for the data sets that have no share (',
    (
        'A%0.7',
        'C',
        '--streaming',
        'true',
    ): 'but --streaming true does not know this number. Give every data set a share',
    ('A', '--val_dataset', 'C%0.7'): 'a share (the number after %) is possible only in --dataset. Write ',
}


@pytest.mark.parametrize('words', RULES, ids=' '.join)
def test_shares_that_do_not_fit_are_one_message(
    words: tuple[str, ...], run_sft: Run, problems: Problems, tmp_path: Path
) -> None:
    files = {name: numbered(tmp_path, name, 4) for name in 'ABC'}
    run_sft('--dataset', *(files[word[0]] + word[1:] if word[0] in files else word for word in words), expect=2)
    assert len(problems()) == 1 and RULES[words] in problems()[0]


def test_a_share_has_no_meaning_where_all_rows_are_answered(
    model_dir: Path, data_file: Path, problems: Problems
) -> None:
    assert llm_infer.main(['--model_id_or_path', str(model_dir), '--dataset', f'{data_file}%0.5']) == 2
    assert 'a share (the number after %) can be used only in training. Write ' in problems()[0]


@pytest.mark.slow
def test_a_run_trains_its_mixture_and_its_held_out_rows_are_found_again(run_sft: Run, tmp_path: Path) -> None:
    a, b = numbered(tmp_path, 'a', 8), numbered(tmp_path, 'b', 30)
    flags = ['--dataset', f'{a}%0.6', f'{b}%0.4', '--dataset_test_ratio', '0.2', '--max_steps', '-1']
    run = run_sft(*flags)
    told = json.loads((run / 'run.json').read_text())
    assert told['steps'] == 8 and told['data']['train']['rows'] == 30, '30 rows, 4 in a step'
    assert told['data']['mixture'] == {a: 18, b: 12}
    reasons = [line for line in told['decisions'] if line.startswith(('mixture', 'train_dataset_sample'))]
    assert reasons == [
        'train_dataset_sample = -1 because the shares (%) of --dataset decide the number of training rows',
        f'mixture = 30 training rows because --dataset gives shares: {a} 18 rows (60 % of 30, 3 passes of its 6 rows), '
        f'{b} 12 rows (40 % of 30, drawn from its 24 rows)',
    ]
    assert 'Rows that are repeated count each time' in (run / 'report.html').read_text()
    checkpoint = run / 'checkpoint-8'
    for step in range(2):
        assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--max_new_tokens', '2']) == 0
        (run / 'held_out.json').unlink(missing_ok=True)  # the second time, by planning
        name = f'infer_result{"-2" * step}.jsonl'
        answered = [json.loads(line) for line in (checkpoint / name).read_text().splitlines()]
        assert [row['messages'][-1]['content'] for row in answered] == questions(plan_rows([a, b], test_ratio=0.2), VAL)


@pytest.mark.slow
@pytest.mark.parametrize('layout', [('--packing', 'true', '--max_length', '80'), ('--test_oom_error', 'true')], ids=str)
def test_repeated_rows_are_packed_and_sorted(run_sft: Run, tmp_path: Path, layout: tuple[str, ...]) -> None:
    words = [f'{numbered(tmp_path, "a", 6)}%0.6', f'{numbered(tmp_path, "b", 30)}%0.4']
    run = run_sft('--dataset', *words, '--max_steps', '3', *layout)
    assert json.loads((run / 'run.json').read_text())['data']['train']['distinct_rows'] < 34


def make(words: list[str], **options: Any) -> TrainingStream:
    encoder = make_encoder(TOKENIZER, template_type='auto', system='', system_typed=False, max_length=-1)
    return TrainingStream(encoder, open_streams(words, hub='modelscope'), **{'val_rows': 0, 'seed': 1, **options})


def names(rows: Any, count: int) -> list[str]:
    taken = (TOKENIZER.decode(row['input_ids']) for row in islice(rows, count))
    return [text.split('user\n')[1].split('<|im_end|>')[0] for text in taken]


def test_a_stream_keeps_the_shares_and_each_source_has_its_own_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, 'SHUFFLE_ROWS', 1)
    words = [f'{numbered(tmp_path, "a", 3)}%0.25', f'{numbered(tmp_path, "b", 200)}%0.75']
    streamed = make(words)
    order = names(iter(streamed), 100)
    for step in range(1, 101):
        assert abs(sum(name[0] == 'a' for name in order[:step]) - step / 4) < 1
    assert [name for name in order if name[0] == 'a'] == [f'a{i % 3}' for i in range(25)]
    assert [name for name in order if name[0] == 'b'] == [f'b{i}' for i in range(75)]
    assert caplog.text.count(f'{tmp_path}/a.jsonl: all 3 training rows are read. They are now read again.') == 1
    account = streamed.summary()['account']['fields']['user text']
    # Rows are encoded in batches of 64. In the first 128 rows, 3 rows of a and 96 rows of b are new.
    assert account == {'context': 3 * 2 + sum(len(f'b{i}') for i in range(96))}


def test_processes_divide_a_mixed_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f'{numbered(tmp_path, "a", 5)}%0.5', f'{numbered(tmp_path, "b", 40)}%0.5']
    alone = names(iter(make(words)), 120)
    monkeypatch.setenv('WORLD_SIZE', '2')
    shares = []
    for rank in ('0', '1'):
        monkeypatch.setenv('RANK', rank)
        shares.append(names(iter(make(words)), 60))
    assert [name for pair in zip(*shares, strict=True) for name in pair] == alone


def test_a_mixed_stream_without_rows_of_a_source_ends_with_an_error(tmp_path: Path) -> None:
    words = [f'{numbered(tmp_path, "a", 3)}%0.5', f'{numbered(tmp_path, "b", 40)}%0.5']
    with pytest.raises(
        ConfigError, match='a.jsonl: this data set has no row left for training. All its rows are skipped or'
    ):
        next(iter(make(words, val_rows=3)))


def test_the_lock_of_a_stream_covers_its_share(tmp_path: Path) -> None:
    a = numbered(tmp_path, 'a', 5)
    locks = [
        streams_lock(open_streams([word], hub='modelscope'), 3)[a] for word in (a, f'{a}%0.5', f'{a}%0.50', f'{a}%0.6')
    ]
    assert locks[1] == locks[2] and len({lock['sha256'] for lock in locks}) == 3


@pytest.mark.slow
def test_a_resumed_mixed_stream_equals_the_uninterrupted_one(run_sft: Run, tmp_path: Path) -> None:
    words = [f'{numbered(tmp_path, "a", 5)}%0.4', f'{numbered(tmp_path, "b", 30)}%0.6']
    flags = ('--dataset', *words, '--streaming', 'true', '--stream_val_rows', '2', '--max_steps', '14',
             '--eval_steps', '7', '--lora_dropout_p', '0.1')  # fmt: skip
    whole = run_sft(*flags)
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-7'))
    assert history(resumed, 14) == history(whole, 14)
    expected = weights(whole, 14)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(resumed, 14).items())


@pytest.mark.slow
def test_the_data_check_of_a_mixed_stream_reads_every_row_once(run_sft: Run, tmp_path: Path) -> None:
    words = [f'{numbered(tmp_path, "a", 5)}%0.4', f'{numbered(tmp_path, "b", 30)}%0.6']
    flags = ('--streaming', 'true', '--max_steps', '2', '--check_dataset', 'true', '--train_dataset_sample', '3')
    run_sft('--dataset', *words, *flags, '--dataset_test_ratio', '0')
    told = json.loads((tmp_path / 'output' / 'tiny-llama' / 'dataset_report.json').read_text())
    assert told['rows']['train'] == 35 and told['decisions'] == []
    assert told['dataset'] == words


def test_a_generator_of_the_registry_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        dataset.DATASET_MAPPING, 'mine', lambda: ({'query': f'm{i}', 'response': 'x'} for i in range(4))
    )
    plan = plan_rows(['mine%0.5', f'{numbered(tmp_path, "b", 12)}%0.5'], test_ratio=0)
    times = trained(prepared(plan, tmp_path))
    assert {name: count for name, count in times.items() if name[0] == 'm'} == {f'm{i}': 2 for i in range(4)}

"""Data sets of the hubs named by their ids: subsets, splits, revisions, files, and what is refused."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.loopback_hub import Fault, Files, LoopbackHub
from tests.support.runs import get_dataset, write_jsonl
from utils.base.errors import ConfigError
from utils.base.names import HubName
from utils.data.plan import plan_rows
from utils.data.sources import check_sources, parse_source
from utils.data.stream_parts import open_streams
from utils.formats.hub_splits import CardList, _read_readme_list

HUBS: tuple[HubName, ...] = ('modelscope', 'huggingface')
NEWER = 'd' * 40


def rows(name: str, count: int = 4) -> list[dict[str, Any]]:
    return [{'query': f'{name} {i}', 'response': f'reply {i}'} for i in range(count)]


def lines(name: str, count: int = 4) -> bytes:
    return ''.join(json.dumps(row) + '\n' for row in rows(name, count)).encode()


def card(**subsets: dict[str, str]) -> bytes:
    """Return a card whose subsets have these patterns for each split."""
    text = ['---', 'license: mit', 'configs:']
    for subset, splits in subsets.items():
        text += [f'- config_name: {subset}', '  data_files:']
        for split, pattern in splits.items():
            text += [f'  - split: {split}', f'    path: {pattern}']
    return '\n'.join([*text, '---', '# rows']).encode()


def queries(word: str, hub: HubName = 'modelscope', **options: Any) -> tuple[list[str], list[str]]:
    """Return the queries of the training rows and of the validation rows that a word gives."""
    found = get_dataset([word], hub=hub, test_ratio=options.pop('test_ratio', 0.0), **options)
    train, val = ([row.messages[0]['content'] for row in part] for part in (found.train, found.val))
    return train, val


def refused(word: str, hub: HubName = 'modelscope') -> str:
    with pytest.raises(ConfigError) as caught:
        plan_rows([word], hub=hub)
    (problem,) = caught.value.problems
    return problem


def names(name: str, count: int = 4) -> list[str]:
    return [row['query'] for row in rows(name, count)]


@pytest.mark.parametrize('hub', HUBS)
def test_a_data_set_with_a_training_split_alone_is_split_by_the_run(hub: HubName, loopback: LoopbackHub) -> None:
    loopback.add('dataset', 'owner/name', {'train.jsonl': lines('a', 20), 'README.md': b'# rows\n'})
    found = get_dataset(['owner/name'], hub=hub, test_ratio=0.1)
    assert (len(found.train), len(found.val)) == (18, 2)
    assert found.served == {'owner/name': f'{hub}:owner/name@master'}


@pytest.mark.parametrize('hub', HUBS)
@pytest.mark.parametrize('validation', ['validation', 'valid', 'val', 'dev'])
def test_training_and_validation_splits_are_used_and_test_splits_never(
    validation: str, hub: HubName, loopback: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    files = {'train.jsonl': lines('a'), f'{validation}.jsonl': lines('b'), 'test.jsonl': lines('c'),
             'eval.jsonl': lines('d')}  # fmt: skip
    loopback.add('dataset', 'owner/name', files)
    assert queries('owner/name', hub) == (names('a'), names('b'))
    assert not any('test.jsonl' in request or 'eval.jsonl' in request for request in loopback.fetched())
    with caplog.at_level(logging.INFO):
        queries('owner/name', hub)
    assert 'training rows from split train (1 file), validation rows from split validation (1 file)' in caplog.text
    assert '; splits not used: test' in caplog.text


def test_splits_and_subsets_of_the_card_come_before_the_names_of_files(loopback: LoopbackHub) -> None:
    files = {
        'README.md': card(default={'train': 'one/*.jsonl', 'dev': '"**/held.jsonl"'}, other={'train': '"*.jsonl"'}),
        'one/test.jsonl': lines('a'), 'two/deep/held.jsonl': lines('b'), 'top.jsonl': lines('c'),
    }  # fmt: skip
    loopback.add('dataset', 'owner/name', files)
    assert queries('owner/name') == (names('a'), names('b'))
    assert queries('owner/name:other') == (names('c'), []), 'a star stays inside a folder'


def test_a_subset_is_chosen_by_its_name_in_the_card_or_by_its_folder(loopback: LoopbackHub) -> None:
    listed = {
        'README.md': card(main={'train': 'main/train-*', 'test': 'main/test-*'}, socratic={'train': 'socratic/*'}),
        'main/train-00000-of-00001.jsonl': lines('a'), 'main/test-00000-of-00001.jsonl': lines('b'),
        'socratic/train-00000-of-00001.jsonl': lines('c'),
    }  # fmt: skip
    loopback.add('dataset', 'owner/listed', listed)
    loopback.add('dataset', 'owner/folders', {name: data for name, data in listed.items() if name != 'README.md'})
    for repo in ('owner/listed', 'owner/folders'):
        assert queries(f'{repo}:main') == (names('a'), [])
        assert queries(f'{repo}:socratic') == (names('c'), [])
        assert queries(f'{repo}:main:test') == (names('b'), []), 'a split that is named is used'
        assert refused(repo) == (
            f"--dataset '{repo}': the data set has the subsets main, socratic. Name one, e.g. --dataset {repo}:main"
        )
        assert refused(f'{repo}:socratc').startswith(
            f"--dataset '{repo}:socratc': 'socratc' is neither a subset nor a split nor a file of the data set: did "
            "you mean 'socratic'? Subsets: main, socratic. Name one of them, e.g. --dataset "
        )
    assert "has no split 'tset': did you mean 'test'? Its splits with files are" in refused('owner/listed:main:tset')
    assert refused('owner/listed:main:tset').endswith('train, test. Name one, e.g. --dataset owner/listed:main:train')


def test_the_default_subset_is_used_if_none_is_named(loopback: LoopbackHub) -> None:
    marked = card(en={'train': 'en.jsonl'}, zh={'train': 'zh.jsonl'}).replace(
        b'- config_name: zh', b'- config_name: zh\n  default: true'
    )
    files = {'en.jsonl': lines('a'), 'zh.jsonl': lines('b')}
    loopback.add('dataset', 'owner/marked', {'README.md': marked, **files})
    loopback.add(
        'dataset', 'owner/named', {'README.md': card(en={'train': 'en.jsonl'}, default={'train': 'zh.jsonl'}), **files}
    )
    loopback.add('dataset', 'owner/only', {'README.md': card(en={'train': 'en.jsonl'}), **files})
    loopback.add('dataset', 'owner/folder', {'data/train.jsonl': lines('c')})
    assert queries('owner/marked') == queries('owner/named') == (names('b'), [])
    assert queries('owner/only') == (names('a'), [])
    assert queries('owner/folder') == (names('c'), [])


def test_a_file_of_the_repository_can_be_named(loopback: LoopbackHub) -> None:
    loopback.add('dataset', 'owner/name', {'v1/rows.jsonl': lines('a'), 'v2/rows.jsonl': lines('b'), 'x.md': b'x'})
    assert queries('owner/name:v2/rows.jsonl') == (names('b'), [])
    assert 'x.md cannot be read: the name of a data file must end in one of .json, .jsonl' in refused('owner/name:x.md')


SPLITS = {
    ('train_sft', 'test_sft', 'train_gen', 'test_gen'): ('train_sft', None),
    ('train_gen', 'train', 'validation'): ('train', 'validation'),
    ('train_sft', 'validation_sft', 'validation'): ('train_sft', 'validation_sft'),
    ('training', 'dev'): ('training', 'dev'),
    ('train_prefs', 'test_prefs'): ('train_prefs', None),
    ('rows', 'test'): ('rows', None),
    ('code', 'math'): 'the splits code, math, and their names do not tell which one to train on. Name it, e.g. --d',
    ('code', 'train_a', 'train_b'): 'has the splits code, train_a, train_b, and their names do not tell which one',
    ('test', 'validation'): "subset 'default' has the splits test, validation, and their names do not tell which one",
}


@pytest.mark.parametrize('splits', SPLITS, ids='-'.join)
def test_splits_of_other_names(splits: tuple[str, ...], loopback: LoopbackHub) -> None:
    files = {f'data/{split}-00000-of-00001.jsonl': lines(split) for split in splits}
    readme = {'README.md': card(default={split: f'data/{split}-*' for split in splits})}
    loopback.add('dataset', 'owner/listed', {**readme, **files})
    loopback.add('dataset', 'owner/files', files)
    for repo in ('owner/listed', 'owner/files'):
        wanted = SPLITS[splits]
        if isinstance(wanted, str):
            assert wanted in refused(repo)
            assert refused(repo).endswith(f'--dataset {repo}:default:{"train_a" if "train_a" in splits else splits[0]}')
        else:
            train, val = wanted
            assert queries(repo) == (names(train), names(val) if val else [])
        assert queries(f'{repo}:{splits[1]}') == queries(f'{repo}:default:{splits[1]}') == (names(splits[1]), [])


def test_each_file_is_read_once_and_shards_in_order(loopback: LoopbackHub) -> None:
    files = {'b.jsonl': lines('b'), 'a.jsonl': lines('a'), 'a.csv': b'query,response\nx,y\n', 'a.jsonl.gz': b'',
             'dataset_infos.json': b'{}', '.hidden/c.jsonl': lines('c')}  # fmt: skip
    loopback.add('dataset', 'owner/name', files)
    assert queries('owner/name') == (names('a') + names('b'), [])


def test_a_card_of_modelscope_lists_subsets_and_splits(loopback: LoopbackHub) -> None:
    told = {'en': {'train': {'meta': 'x.csv'}, 'test': {'meta': 'y.csv'}}, 'zh': {'train': {'meta': 'z.csv'}}}
    files: Files = {f'{name}.csv': f'query,response\n{name},r\n'.encode() for name in 'xyz'}
    loopback.add('dataset', 'owner/name', {'name.json': json.dumps(told).encode(), **files})
    assert queries('owner/name:en') == (['x'], [])
    assert 'has the subsets en, zh. Name one, e.g. --dataset owner/name:en' in refused('owner/name')


@pytest.mark.parametrize('hub', HUBS)
def test_a_revision_is_a_branch_a_tag_or_a_commit_and_its_commit_is_recorded(
    hub: HubName, loopback: LoopbackHub
) -> None:
    loopback.add('dataset', 'owner/name', {'train.jsonl': lines('new', 5)}, commit='e' * 40)
    loopback.add_revision('owner/name', 'v1.0', {'train.jsonl': lines('old', 3)}, commit=NEWER)
    for word, wanted, commit in (
        ('owner/name', names('new', 5), 'e' * 40),
        ('owner/name@v1.0', names('old', 3), NEWER),
        (f'owner/name@{NEWER}', names('old', 3), NEWER),
        (f'owner/name:default:train@{NEWER}#2', names('old', 3)[:0], NEWER),
    ):
        plan = plan_rows([word], hub=hub, test_ratio=0.0)
        lock = plan.lock()[word.split('#')[0]]
        revision = word.split('#')[0].partition('@')[2] or 'master'
        assert (lock['served'], lock['commit']) == (f'{hub}:owner/name@{revision}', commit)
        used = [row.messages[0]['content'] for _, row in plan.rows(1)]
        assert used == wanted or ('#2' in word and len(used) == lock['rows'] == 2)
    assert f'{hub}:owner/name@v9: not found (404)' in refused('owner/name@v9', hub)


def test_a_prefix_chooses_the_hub(loopback: LoopbackHub) -> None:
    loopback.add('dataset', 'owner/name', {'train.jsonl': lines('a')})
    loopback.add('dataset', 'squad', {'train.jsonl': lines('b')})
    for word, hub in (('hf:owner/name', 'huggingface'), ('ms:owner/name', 'modelscope')):
        for default in HUBS:
            assert get_dataset([word], hub=default).served == {word: f'{hub}:owner/name@master'}
    assert queries('hf:squad') == (names('b'), [])
    with pytest.raises(ConfigError, match="'ms:squad' is not registered"):
        parse_source('ms:squad')


@pytest.mark.parametrize(
    ('word', 'problem'),
    [
        (
            'owner/name.x:a:b:c',
            'neither a registered data set nor a .json, .jsonl, .csv, .tsv, .txt, .md (each also .gz) or .parquet',
        ),
        ('owner/a.b@', 'and a data set of a hub as [hf:|ms:]owner/name[:subset][:split][@revision].'),
    ],
)
def test_words_that_are_no_ids(word: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_source(word)
    assert problem in str(caught.value)


@pytest.mark.parametrize('hub', HUBS)
def test_an_id_that_is_not_there_names_close_ids_the_other_hub_and_the_token(
    hub: HubName, loopback: LoopbackHub
) -> None:
    problem = refused('AI-ModelScope/alpaca-gpt4-data-zn', hub)
    variable = {'modelscope': 'MODELSCOPE_API_TOKEN', 'huggingface': 'HF_TOKEN'}[hub]
    assert problem.startswith(
        f'dataset {hub}:AI-ModelScope/alpaca-gpt4-data-zn@master: not found (404). It does not exist, or it is '
        f'private. Check the id and the revision. If it is private, set the environment variable {variable} to a token '
        'that may read it. Ids close to it: AI-ModelScope/alpaca-gpt4-data-'
    )
    assert 'A data set of Hugging Face is hf:AI-ModelScope/alpaca-gpt4-data-zn, one of ModelScope ms:AI-' in problem
    assert problem.endswith(f'A local folder of this name is not there either (looked in {Path.cwd()}).')
    assert 'ms:' not in refused('hf:owner/name', hub)


@pytest.mark.parametrize('hub', HUBS)
def test_a_private_data_set_names_the_token(
    hub: HubName, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.add('dataset', 'owner/name', {'train.jsonl': lines('a'), 'README.md': b'# rows\n'})
    loopback.token = 'right-token'
    variable = {'modelscope': 'MODELSCOPE_API_TOKEN', 'huggingface': 'HF_TOKEN'}[hub]
    problem = refused('owner/name', hub)
    assert f'the environment variable {variable} to a token' in problem or f'without a token ({variable})' in problem
    monkeypatch.setenv(variable, 'right-token')
    assert queries('owner/name', hub) == (names('a'), [])


@pytest.mark.parametrize('hub', HUBS)
def test_a_gated_data_set_is_listed_and_its_files_name_the_token(hub: HubName, loopback: LoopbackHub) -> None:
    loopback.add('dataset', 'owner/name', {'train.jsonl': lines('a')})
    loopback.faults = [Fault('train.jsonl', 403, 99)]
    variable = {'modelscope': 'MODELSCOPE_API_TOKEN', 'huggingface': 'HF_TOKEN'}[hub]
    problem = refused('owner/name', hub)
    assert 'the download stopped: ' in problem and f'Set the environment variable {variable} to a token' in problem
    assert 'If its page asks to accept terms, accept them first.' in problem


@pytest.mark.parametrize('hub', HUBS)
def test_without_network_the_cache_serves_the_same_rows_and_commit(
    hub: HubName, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {'README.md': card(a={'train': 'a.jsonl'}, b={'train': 'b.jsonl'}), 'a.jsonl': lines('a'), 'b.jsonl': b'x'}
    loopback.add('dataset', 'owner/name', files, commit=NEWER)
    first = plan_rows(['owner/name:a'], hub=hub).lock()
    for name in ('MODELSCOPE_ENDPOINT', 'HF_ENDPOINT'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setattr('modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS', 1)
    assert plan_rows(['owner/name:a'], hub=hub).lock() == first
    assert first['owner/name:a']['commit'] == NEWER
    assert '1 files of dataset owner/name are missing or incomplete' in refused('owner/name:b', hub)
    problem = refused('owner/other', hub)
    assert f'{hub} cannot be reached (' in problem
    assert 'dataset owner/other is not in the cache. Run once with network' in problem
    assert problem.endswith(f'A local folder of this name is not there either (looked in {Path.cwd()}).')


@pytest.mark.parametrize('hub', HUBS)
def test_a_data_set_with_a_loading_script_alone_is_refused_and_nothing_runs(
    hub: HubName, loopback: LoopbackHub, tmp_path: Path
) -> None:
    script = f'open({str(tmp_path / "ran")!r}, "w").write("x")'
    loopback.add('dataset', 'owner/name', {'name.py': script.encode(), 'README.md': b'# rows\n'})
    problem = refused('owner/name', hub)
    assert problem.startswith(
        f"--dataset 'owner/name': {hub}:owner/name@master brings a loading script (name.py) and no data files, and a "
        'script of a data set is never run. To use it, '
    )
    assert ('--dataset hf:owner/name@refs/convert/parquet' in problem) == (hub == 'huggingface')
    assert not any('.py' in request for request in loopback.fetched())
    assert not (tmp_path / 'ran').exists()

    loopback.add_revision('owner/name', 'refs/convert/parquet', {'name/train/0000.jsonl': lines('a')}, commit=NEWER)
    assert queries('hf:owner/name@refs/convert/parquet') == (names('a'), [])


def test_a_script_beside_data_files_is_ignored(loopback: LoopbackHub) -> None:
    loopback.add('dataset', 'owner/name', {'name.py': b'raise SystemExit', 'train.jsonl': lines('a')})
    assert queries('owner/name') == (names('a'), [])
    assert not any('.py' in request for request in loopback.fetched())


def test_a_data_set_without_rows_that_are_read_says_what_it_holds(loopback: LoopbackHub) -> None:
    loopback.add('dataset', 'owner/name', {'rows.arrow': b'x', 'README.md': b'# rows\n'})
    assert refused('owner/name') == (
        "--dataset 'owner/name': modelscope:owner/name@master holds no file that is read (.json, .jsonl, .csv, .tsv, "
        '.parquet). Found: README.md, rows.arrow. Convert its rows to one of these formats and give the file.'
    )
    loopback.add('dataset', 'owner/listed', {'rows.arrow': b'x', 'README.md': card(default={'train': 'rows.arrow'})})
    assert 'rows.arrow cannot be read: the name of a data file must end in one of .json,' in refused('owner/listed')


def test_a_local_folder_or_file_of_the_same_name_wins_and_is_said(
    loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ('name', 'name-v1.5'):
        (tmp_path / 'owner' / name).mkdir(parents=True)
        write_jsonl(tmp_path / 'owner' / name / 'rows.jsonl', rows('local'))
        loopback.add('dataset', f'owner/{name}', {'train.jsonl': lines('hub')})
        with caplog.at_level(logging.INFO):
            assert queries(f'owner/{name}') == (names('local'), [])
        assert (
            f'owner/{name}: the local path {tmp_path}/owner/{name} is read. To read a data set of a hub with this id, '
            f'give hf:owner/{name} or ms:owner/{name}'
        ) in caplog.messages
        assert loopback.requests == []
        assert queries(f'ms:owner/{name}') == (names('hub'), [])
        loopback.requests.clear()
    caplog.clear()
    assert queries('owner/name/') == queries('./owner/name') == (names('local'), [])
    assert 'is read. To read a data set of a hub' not in caplog.text


def test_a_run_that_read_a_local_folder_is_not_repeated_with_a_data_set_of_a_hub(tmp_path: Path) -> None:
    (tmp_path / 'owner' / 'name').mkdir(parents=True)
    (problem,) = check_sources(['owner/name'], str(tmp_path))
    assert f'the earlier run read {tmp_path}/owner/name. In this folder, the same name is the id of' in problem
    assert problem.endswith(f'Start the command in {tmp_path}, where the earlier run was started.')
    assert check_sources(['owner/other'], str(tmp_path)) == []


@pytest.mark.parametrize('hub', HUBS)
def test_words_of_all_kinds_are_mixed(hub: HubName, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.add('dataset', 'owner/name', {'train.jsonl': lines('hub', 8), 'test.jsonl': lines('held', 2)})
    local = write_jsonl(tmp_path / 'a.jsonl', rows('local', 3))
    found = get_dataset(['owner/name#5', str(local), 'hf:owner/name:test', 'sql-demo#2'], hub=hub, test_ratio=0.0)
    texts = [row.messages[0]['content'].split()[0] for row in found.train]
    assert texts[:-2] == ['hub'] * 5 + ['local'] * 3 + ['held'] * 2
    assert set(found.served) == {'owner/name', 'hf:owner/name:test'}


def test_a_file_that_two_words_read_is_refused(loopback: LoopbackHub) -> None:
    files = {'train.jsonl': lines('a'), 'validation.jsonl': lines('b'), 'test.jsonl': lines('c')}
    loopback.add('dataset', 'owner/name', files)
    for other in ('owner/name:validation', 'owner/name:default', 'owner/name:train.jsonl'):
        with pytest.raises(ConfigError) as caught:
            plan_rows(['owner/name', other])
        assert 'both read modelscope:owner/name@master/' in str(caught.value)
        assert '.jsonl, so its rows would be used twice. Remove one of the two, or name other subs' in str(caught.value)
        with pytest.raises(ConfigError, match='both read'):
            open_streams(['owner/name', other], hub='modelscope')
    with pytest.raises(
        ConfigError, match="^--val_dataset: 'owner/name .validation.' and 'owner/name:validation' both read"
    ):
        plan_rows(['sql-demo'], val_words=['owner/name', 'owner/name:validation'])
    with pytest.raises(ConfigError, match="^--val_dataset 'owner/name:gone': "):
        plan_rows(['sql-demo'], val_words=['owner/name:gone'])
    assert len(get_dataset(['owner/name', 'owner/name:test'], test_ratio=0.0).train) == 8


def test_an_archive_of_a_split_is_not_read_and_said(loopback: LoopbackHub, caplog: pytest.LogCaptureFixture) -> None:
    told = {'default': {'train': {'meta': 'a.csv', 'file': 'pictures.zip'}}}
    files = {'name.json': json.dumps(told).encode(), 'a.csv': b'query,response,image:FILE\nq,r,1.jpg\n'}
    loopback.add('dataset', 'owner/name', {**files, 'pictures.zip': b'PK'})
    with caplog.at_level(logging.INFO):
        assert queries('owner/name') == (['q'], [])
    assert 'training rows from split train (1 file); files not read: pictures.zip' in caplog.text
    assert not any('pictures.zip' in request for request in loopback.fetched())


def test_rows_that_cannot_be_used_are_named_with_file_and_row(loopback: LoopbackHub) -> None:
    good = rows('a', 3)
    data = [good[0], {'query': 'x', 'response': None}, good[1], {'query': 'x'}, good[2]]
    loopback.add('dataset', 'owner/name', {'train.jsonl': ''.join(json.dumps(r) + '\n' for r in data).encode()})
    left_out = get_dataset(['owner/name'], test_ratio=0.0).left_out
    assert left_out.counts == {'null response': 1, 'columns are missing that the first row has: response': 1}
    (place,) = left_out.places['null response']
    assert place.startswith(os.environ['HOME']) and place.endswith('train.jsonl:2')
    loopback.add('dataset', 'owner/broken', {'train.jsonl': b'{"query": "a", "response": "b"}\n{"query"\n'})
    assert '/train.jsonl:2: this line is not JSON' in refused('owner/broken')
    loopback.add('dataset', 'owner/unknown', {'train.csv': b'a,b\n1,2\n'})
    assert '/train.csv:2: unknown columns a, b. ' in refused('owner/unknown')


def test_the_lock_of_a_data_set_does_not_depend_on_the_folder_of_the_cache(
    loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.add('dataset', 'owner/name', {'train.jsonl': lines('a')})
    locks = []
    for home in ('one', 'two'):
        monkeypatch.setenv('MODELSCOPE_CACHE', str(tmp_path / home))
        monkeypatch.setenv('ASSAY_CACHE', str(tmp_path / home / 'assay'))
        locks.append(plan_rows(['owner/name']).lock())
    assert locks[0] == locks[1]


def test_patterns_of_a_card() -> None:
    files = ['a.csv', 'b.csv', 'data/a.csv', 'data/x/a.csv', 'data/[1].csv', 'data/a1.csv']

    def matched(config: str) -> CardList:
        return _read_readme_list(f'---\nconfigs:\n- config_name: c\n{config}\n---\n', files)

    for config, wanted in {
        '  data_files: a.csv': {'train': ['a.csv']},
        '  data_files: [b.csv, a.csv]': {'train': ['b.csv', 'a.csv']},
        '  data_files: ["*.csv", a.csv]': {'train': ['a.csv', 'b.csv']},
        '  data_files: "**/a.csv"': {'train': ['a.csv', 'data/a.csv', 'data/x/a.csv']},
        '  data_files: "data/**"': {'train': ['data/[1].csv', 'data/a.csv', 'data/a1.csv', 'data/x/a.csv']},
        '  data_files: "data/a[0-9].csv"': {'train': ['data/a1.csv']},
        '  data_files: "data/?.csv"': {'train': ['data/a.csv']},
        '  data_dir: data/x': {'train': ['data/x/a.csv']},
        '  data_dir: data\n  data_files: a*.csv': {'train': ['data/a.csv', 'data/a1.csv']},
        '  data_files:\n  - split: x\n    path: ./a.csv': {'x': ['a.csv']},
    }.items():
        assert matched(config).subsets == {'c': wanted}, config
    assert matched('  data_files: "[z-a].csv"') == CardList()

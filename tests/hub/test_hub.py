"""Models and data from both hubs, with the real clients: complete, downloaded once, resumed, with clear errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.loopback_hub import Fault, LoopbackHub
from tests.support.runs import ROOT, run_program, small_flags
from utils.base.errors import ConfigError
from utils.base.names import HubName, Kind
from utils.hub import snapshot as hub
from utils.hub.clients import Repo
from utils.loading.weights import locate
from utils.model import get_model_info

HUBS: tuple[HubName, ...] = ('modelscope', 'huggingface')
FILES = {
    'config.json': b'{}', 'model.safetensors': bytes(range(256)) * 12_000, 'folder/a file [1].txt': b'x',
    'pytorch_model.bin': b'twice', 'README.md': b'---\nlicense: x\n---\n',
}  # fmt: skip
Problems = Callable[[], list[str]]


def fetched(hub_name: HubName, repo_id: str = 'owner/name', kind: Kind = 'model') -> tuple[Path, hub.Snapshot]:
    snapshot = hub.find([Repo(hub=hub_name, id=repo_id)], kind)
    return snapshot.fetch(list(snapshot.files)), snapshot


def there(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('kind', ['model', 'dataset'])
@pytest.mark.parametrize('hub_name', HUBS)
def test_a_repository_comes_whole_and_once(hub_name: HubName, kind: Kind, loopback: LoopbackHub) -> None:
    loopback.add(kind, 'owner/name', FILES)
    folder, snapshot = fetched(hub_name, kind=kind)
    assert there(folder) == FILES
    assert str(snapshot.repo) == f'{hub_name}:owner/name@master' and snapshot.online
    assert folder.is_relative_to(Path(os.environ['HOME'])), 'in the cache of the client'
    loopback.requests.clear()
    assert fetched(hub_name, kind=kind)[0] == folder
    assert loopback.fetched() == []


@pytest.mark.parametrize('hub_name', HUBS)
def test_a_model_entry_leaves_files_out_and_names_what_served(hub_name: HubName, loopback: LoopbackHub) -> None:
    ids = {'modelscope': 'modelscope/Llama-2-7b-ms', 'huggingface': 'meta-llama/Llama-2-7b-hf'}
    loopback.add('model', ids[hub_name], FILES)
    weights = locate(get_model_info('llama2-7b'), revision='master', hub_name=hub_name)
    assert set(there(weights.path)) == set(FILES) - {'pytorch_model.bin'}
    assert weights.record(get_model_info('llama2-7b'))['source'] == f'{hub_name}:{ids[hub_name]}@master'


def test_a_model_that_is_gone_comes_from_the_other_hub_but_never_under_another_id(
    loopback: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    loopback.add('model', 'meta-llama/Llama-2-7b-hf', FILES)
    weights = locate(get_model_info('llama2-7b'), revision='master')
    assert weights.served == 'huggingface:meta-llama/Llama-2-7b-hf@master'
    assert 'modelscope:modelscope/Llama-2-7b-ms@master is not found (404): trying huggingface:' in caplog.text
    own = get_model_info('llama2-7b', 'someone/Llama-2-7b-hf')
    with pytest.raises(
        ConfigError, match=r'modelscope:someone/Llama-2-7b-hf@master: not found \(404\)\. It does not exist, or it is'
    ):
        locate(own, revision='master')


@pytest.mark.parametrize('hub_name', HUBS)
def test_a_connection_cut_in_the_middle_of_a_file_is_resumed(hub_name: HubName, loopback: LoopbackHub) -> None:
    # Hugging Face's client keeps what it received in blocks of 10 MB.
    files = {**FILES, 'model.safetensors': bytes(range(256)) * 96_000}
    loopback.add('model', 'owner/name', files)
    loopback.faults = [Fault('model.safetensors', 'cut')]
    folder, _ = fetched(hub_name)
    assert there(folder) == files
    assert loopback.faults[0].times == 0 and loopback.resumed >= 1, 'it went on from where it broke off'


@pytest.mark.parametrize('hub_name', HUBS)
def test_a_server_error_is_tried_again(
    hub_name: HubName, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('utils.hub.snapshot._WAITS', (0.0, 0.0))
    loopback.add('model', 'owner/name', FILES)
    loopback.faults = [Fault('owner/name', 500), Fault('config.json', 500)]
    assert there(fetched(hub_name)[0]) == FILES
    assert [fault.times for fault in loopback.faults] == [0, 0]


@pytest.mark.parametrize(('status', 'said'), [(401, 'refuses this account'), (403, 'refuses this account')])
@pytest.mark.parametrize('hub_name', HUBS)
def test_a_hub_that_refuses_names_the_variable(
    hub_name: HubName, status: int, said: str, loopback: LoopbackHub
) -> None:
    loopback.add('dataset', 'owner/name', FILES)
    loopback.faults = [Fault('owner/name', status, 99)]
    with pytest.raises(ConfigError, match=said) as caught:
        fetched(hub_name, kind='dataset')
    assert f'environment variable {hub.TOKEN_VARIABLES[hub_name]} to a token' in str(caught.value)


@pytest.mark.parametrize('hub_name', HUBS)
def test_a_hub_that_refuses_one_file_ends_the_download(hub_name: HubName, loopback: LoopbackHub) -> None:
    loopback.add('model', 'owner/name', FILES)
    loopback.faults = [Fault('model.safetensors', 403, 99)]
    with pytest.raises(
        ConfigError, match=f'model {hub_name}:owner/name@(master|main): the download stopped: '
    ) as caught:
        fetched(hub_name)
    assert str(caught.value).endswith('Downloaded files are kept: run the same command again to continue.')


@pytest.mark.parametrize('hub_name', HUBS)
def test_a_file_that_goes_between_listing_and_download_is_named(hub_name: HubName, loopback: LoopbackHub) -> None:
    loopback.add('dataset', 'owner/name', FILES)
    snapshot = hub.find([Repo(hub=hub_name, id='owner/name')], 'dataset')
    loopback.add('dataset', 'owner/name', {name: data for name, data in FILES.items() if name != 'config.json'})
    with pytest.raises(
        ConfigError, match=r'config\.json(: .*404| is missing or differs from .* \(number of such files: 1\))'
    ):
        snapshot.fetch(list(snapshot.files))


@pytest.mark.parametrize('hub_name', HUBS)
def test_a_token_of_the_environment_is_let_in(
    hub_name: HubName, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.add('model', 'owner/name', FILES)
    loopback.token = 'right-token'
    with pytest.raises(ConfigError):
        fetched(hub_name)
    monkeypatch.setenv(hub.TOKEN_VARIABLES[hub_name], 'right-token')
    assert there(fetched(hub_name)[0]) == FILES


@pytest.mark.parametrize('hub_name', HUBS)
def test_a_revision_that_is_gone(hub_name: HubName, loopback: LoopbackHub) -> None:
    loopback.add('model', 'owner/name', FILES)
    with pytest.raises(ConfigError, match=f'{hub_name}:owner/name@v9: not found'):
        hub.find([Repo(hub=hub_name, id='owner/name', revision='v9')], 'model')


def test_the_hub_that_cannot_be_reached_is_named(
    loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loopback.add('dataset', 'owner/name', FILES)
    folder, _ = fetched('huggingface', kind='dataset')
    monkeypatch.setenv('MODELSCOPE_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS', 1)
    repos = [Repo(hub=name, id='owner/name') for name in HUBS]
    assert hub.find(repos, 'dataset').repo.hub == 'huggingface'
    assert 'modelscope cannot be reached (' in caplog.text and f'is taken from {folder}' in caplog.text


@pytest.mark.parametrize('hub_name', HUBS)
def test_without_network_the_cache_serves_or_one_error_says_what_to_do(
    hub_name: HubName, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loopback.add('dataset', 'owner/name', FILES)
    folder, _ = fetched(hub_name, kind='dataset')
    for name in ('MODELSCOPE_ENDPOINT', 'HF_ENDPOINT'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setattr('modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS', 1)
    again, snapshot = fetched(hub_name, kind='dataset')
    assert again == folder and not snapshot.online
    assert f'{hub_name} cannot be reached ([Errno 111] Connection refused): dataset {hub_name}:owner' in caplog.text
    (folder / 'model.safetensors').unlink()
    with pytest.raises(
        ConfigError, match=r'1 files of dataset owner/name are missing or incomplete in .*first is model\.safetens'
    ):
        fetched(hub_name, kind='dataset')
    with pytest.raises(ConfigError) as caught:
        fetched(hub_name, 'owner/other', kind='dataset')
    said = str(caught.value)
    assert 'dataset owner/other is not in the cache. ' in said and os.environ['HOME'] in said
    assert 'Run once with network' in said


@pytest.mark.parametrize('hub_name', HUBS)
def test_what_would_be_fetched_is_told_beforehand(hub_name: HubName, loopback: LoopbackHub) -> None:
    def told() -> list[str]:
        return hub.find([Repo(hub=hub_name, id='owner/name')], 'model').to_fetch(['config.json'])

    loopback.add('model', 'owner/name', FILES)
    assert told() == ['config.json']
    fetched(hub_name)
    assert told() == []
    loopback.add('model', 'owner/name', {**FILES, 'config.json': FILES['config.json'][::-1]})
    assert told() == ['config.json'], 'of the same size and other content'


@pytest.mark.parametrize('content', ['{', '[]', '{"files": {"a": 3}, "whole": []}'])
def test_a_damaged_record_of_what_was_fetched_is_as_none(content: str, loopback: LoopbackHub) -> None:
    loopback.add('model', 'owner/name', FILES)
    fetched('modelscope')
    (record,) = Path(os.environ['ASSAY_CACHE']).glob('hub/*.json')
    record.write_text(content)
    assert there(fetched('modelscope')[0]) == FILES


def test_shards_fetched_by_another_program_are_counted(loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f'model-{n:05d}-of-00003.safetensors': b'x' for n in (1, 2, 3)}
    loopback.add('model', 'owner/name', files)
    folder, _ = fetched('modelscope')
    shutil.rmtree(os.environ['ASSAY_CACHE'])
    monkeypatch.setenv('MODELSCOPE_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS', 1)
    assert there(fetched('modelscope')[0]) == files
    (folder / 'model-00003-of-00003.safetensors').unlink()
    with pytest.raises(ConfigError, match=r'first is model-00003-of-00003\.safetensors'):
        fetched('modelscope')


@pytest.mark.slow
@pytest.mark.parametrize('hub_name', HUBS)
def test_processes_of_one_machine_fetch_once(hub_name: HubName, loopback: LoopbackHub) -> None:
    loopback.add('model', 'owner/name', FILES)
    code = (
        'from utils.hub import snapshot as hub; from utils.hub.clients import Repo\n'
        f'found = hub.find([Repo(hub={hub_name!r}, id="owner/name")], "model"); found.fetch(list(found.files))'
    )
    started = [subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    for name in FILES:
        assert sum(name in request for request in loopback.fetched()) == 1, name


def agent_row(number: int) -> dict[str, str]:
    system = '1. {"plugin_name": "weather"}\n2. {"plugin_name": "maps"}'
    said = [('system', system), ('user', f'question {number}'), ('assistant', f'answer {number}')]
    return {'conversations': str([{'from': who, 'value': text} for who, text in said])}


@pytest.mark.slow
def test_data_sets_of_the_hub_are_mixed_trained_on_and_fetched_once(
    tmp_path: Path, loopback: LoopbackHub, data_file: Path, model_dir: Path
) -> None:
    alpaca = [{'instruction': f'翻译 {i}', 'input': '输入：x', 'output': f'reply {i}'} for i in range(60)]
    lines = {name: ''.join(json.dumps(row) + '\n' for row in rows).encode() for name, rows in {
        'alpaca.jsonl': alpaca, 'train.jsonl': [agent_row(i) for i in range(300)],
        'validation.jsonl': [agent_row(i) for i in range(5)]}.items()}  # fmt: skip
    loopback.add('dataset', 'AI-ModelScope/alpaca-gpt4-data-zh', {'alpaca.jsonl': lines.pop('alpaca.jsonl')})
    loopback.add('dataset', 'damo/MSAgent-Bench', {**lines, 'MSAgent-Bench.py': b'raise SystemExit'})
    loopback.add('model', 'owner/tiny', {p.name: p.read_bytes() for p in model_dir.iterdir()})
    words = small_flags(Path('owner/tiny'), data_file, tmp_path / 'out')
    words += ['--dataset', 'alpaca-zh,damo-agent-mini-zh#200', '--max_steps', '5', '--max_length', '256']
    for first in (True, False):
        loopback.requests.clear()
        done = run_program('llm_sft.py', *words)
        assert done.returncode == 0, done.stderr
        assert bool(loopback.fetched()) == first
    assert not any('.py' in request for request in loopback.requests)
    runs = sorted((tmp_path / 'out').glob('*/*'))
    record = json.loads((runs[0] / 'run.json').read_text())
    assert record['steps'] == 5 and record['data']['left_out'] == {}
    assert record['data']['train']['rows'] == 60 - 6 + 200 and record['data']['validation']['rows'] == 6 + 5
    assert record['data']['served'] == {
        'alpaca-zh': 'modelscope:AI-ModelScope/alpaca-gpt4-data-zh@master',
        'damo-agent-mini-zh': 'modelscope:damo/MSAgent-Bench@master',
    }
    assert json.loads((runs[0] / 'sft_args.json').read_text())['base_model']['source'] == 'modelscope:owner/tiny@master'


def test_a_hub_that_cannot_be_reached_is_one_error(
    model_dir: Path, tmp_path: Path, problems: Problems, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llm_sft

    monkeypatch.setattr('modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS', 1)
    words = small_flags(model_dir, data_file, tmp_path / 'out')
    assert llm_sft.main([*words, '--dataset', 'jd-zh']) == 2
    assert len(problems()) == 1 and 'modelscope cannot be reached' in problems()[0]
    assert 'dataset DAMO_NLP/jd is not in the cache. Run once with network' in problems()[0]
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('hub_name', HUBS)
def test_data_is_checked_with_the_tokenizer_of_a_hub_and_without_its_weights(
    hub_name: HubName, loopback: LoopbackHub, tmp_path: Path, data_file: Path, model_dir: Path
) -> None:
    import llm_sft

    ids = {'modelscope': 'modelscope/Llama-2-7b-ms', 'huggingface': 'meta-llama/Llama-2-7b-hf'}
    loopback.add('model', ids[hub_name], {p.name: p.read_bytes() for p in model_dir.iterdir()})
    words = ['--model_type', 'llama2-7b', '--hub', hub_name, '--template_type', 'default', '--dataset', str(data_file)]
    code = llm_sft.main([*words, '--output_dir', str(tmp_path / 'out'), '--check_dataset', 'true'])
    report = json.loads(next((tmp_path / 'out').glob('*/dataset_report.json')).read_text())
    assert code == (0 if report['clean'] else 1) and report['rows']['kept'] > 0
    fetched = loopback.fetched()
    assert any('tokenizer.json' in request for request in fetched)
    assert not any('.safetensors' in request for request in fetched)

"""Pushing while training, with the real ModelScope client against a hub on the loopback interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.loopback_hub import LoopbackHub

Run = Callable[..., Path]
TOKEN = 'ms-canary-0123456789'


@pytest.fixture(scope='module')
def server() -> Iterator[LoopbackHub]:
    """Return one server for the module: the client keeps the first address it reads."""
    hub = LoopbackHub()
    yield hub
    hub.close()


@pytest.fixture
def loopback(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    server.reset(token=TOKEN)
    monkeypatch.setenv('MODELSCOPE_ENDPOINT', server.url)
    monkeypatch.setenv('MODELSCOPE_API_TOKEN', TOKEN)
    return server


PUSHED = ('README.md', 'adapter_config.json', 'adapter_model.safetensors', 'chat_template.jinja', 'tokenizer.json',
          'tokenizer_config.json')  # fmt: skip
EXPECTED = {
    'push_best': (PUSHED, None),
    'push_last': (PUSHED, 2),
    'end': (PUSHED, 1),
    'checkpoint': (tuple(f'last-checkpoint/{name}' for name in PUSHED), 2),
    'all_checkpoints': (tuple(f'checkpoint-{n}/{name}' for n in (3, 6) for name in PUSHED), 2),
}


@pytest.mark.parametrize('strategy', EXPECTED)
def test_each_strategy_leaves_its_files_and_no_token(strategy: str, run_sft: Run, loopback: LoopbackHub) -> None:
    run = run_sft('--push_to_hub', 'true', '--push_hub_strategy', strategy)
    files, commits = EXPECTED[strategy]
    assert list(loopback.repos) == ['someone/tiny-llama-lora']
    repo = loopback.repos['someone/tiny-llama-lora']
    assert tuple(sorted(repo['files'])) == tuple(sorted(files))
    assert commits is None or len(loopback.commits) == commits
    weights = next(name for name in sorted(files, reverse=True) if name.endswith('adapter_model.safetensors'))
    pushed = {path.read_bytes() for path in run.glob('checkpoint-*/adapter_model.safetensors')}
    assert repo['files'][weights] in pushed
    for path in run.rglob('*'):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    assert not list(run.rglob('.ms_upload_cache'))


def test_an_existing_repository_is_reused_and_a_private_one_is_made(run_sft: Run, loopback: LoopbackHub) -> None:
    for _ in range(2):
        run_sft('--push_to_hub', 'true', '--hub_model_id', 'team/mine', '--max_steps', '1')
    assert list(loopback.repos) == ['team/mine']
    assert loopback.repos['team/mine']['visibility'] == 1, 'private'


def test_a_hub_that_fails_never_stops_the_training(
    run_sft: Run, loopback: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    loopback.token = 'another'
    run = run_sft('--push_to_hub', 'true', '--max_steps', '1')
    assert (run / 'run.json').is_file()
    assert 'could not be pushed to tiny-llama-lora' in caplog.text
    assert TOKEN not in caplog.text

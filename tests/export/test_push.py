"""Pushing with the real clients of both hubs to a server on the loopback interface."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.loopback_hub import Fault, LoopbackHub
from tests.support.pictures import REAL_DRAW
from tests.support.runs import run_program, small_flags
from utils.base.names import HubName
from utils.export import push, push_queue
from utils.hub.clients import TOKEN_VARIABLES
from utils.loading.chat_template import folder_templates, write_templates
from utils.run import curves

Run = Callable[..., Path]
TOKEN = 'ms-canary-0123456789'
REPO = 'someone/tiny-llama-lora'
# The files of a checkpoint that open the model.
MODEL = ('adapter_config.json', 'adapter_model.safetensors', 'chat_template.jinja', 'tokenizer.json',
         'tokenizer_config.json')  # fmt: skip
CARD = ('README.md', 'images/eval_loss.png', 'images/loss.png')
STRATEGIES = {
    'end': {'': 6},
    'push_last': {'': 6},
    'push_best': {'': 6},
    'checkpoint': {'last-checkpoint/': 6},
    'all_checkpoints': {'checkpoint-3/': 3, 'checkpoint-6/': 6},
}


@pytest.fixture(scope='module', autouse=True)
def _real_pictures() -> Iterator[None]:
    """Draw real curves: pushing draws them again in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, 'draw', REAL_DRAW)
        yield


@pytest.fixture(autouse=True)
def _tokens(loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    loopback.token = TOKEN
    for name in TOKEN_VARIABLES.values():
        monkeypatch.setenv(name, TOKEN)


def check_hub(loopback: LoopbackHub, run: Path, strategy: str) -> None:
    """Assert that the hub holds what the strategy promises, byte for byte, and nothing else."""
    files = loopback.repos[REPO]['files']
    wanted = {f'{top}{name}': run / f'checkpoint-{step}' / name
              for top, step in STRATEGIES[strategy].items() for name in MODEL}  # fmt: skip
    assert set(files) == {*wanted, *CARD}
    for name, path in wanted.items():
        assert files[name] == path.read_bytes(), name
    assert files['README.md'] == (run / 'README.md').read_bytes()
    for name in CARD[1:]:
        assert files[name] == (run / name).read_bytes(), name
    assert not list((run / '.push').iterdir()), 'what arrived is not kept twice'
    assert not list(run.rglob('.ms_upload_cache'))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('strategy', 'hub'),
    [
        ('end', 'modelscope'),
        ('push_last', 'huggingface'),
        ('push_best', 'modelscope'),
        ('checkpoint', 'huggingface'),
        ('all_checkpoints', 'modelscope'),
    ],
)
def test_each_strategy_leaves_exactly_its_files(
    strategy: str, hub: HubName, run_sft: Run, loopback: LoopbackHub
) -> None:
    run = run_sft('--push_to_hub', 'true', '--push_hub_strategy', strategy, '--hub', hub)
    assert list(loopback.repos) == [REPO], 'the user name comes from the token'
    assert loopback.repos[REPO]['visibility'] == 1, 'private'
    assert json.loads((run / 'run.json').read_text())['best_checkpoint'].endswith('checkpoint-6')
    check_hub(loopback, run, strategy)


@pytest.fixture(scope='module')
def trained(model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with two checkpoints that was not pushed yet; each test copies it."""
    import llm_sft

    out = tmp_path_factory.mktemp('trained')
    assert llm_sft.main(small_flags(model_dir, data_file, out)) == 0
    return next(out.glob('*/*'))


def copied(trained: Path, tmp_path: Path, **record: Any) -> Path:
    run = tmp_path / 'run'
    shutil.copytree(trained, run)
    path = run / 'sft_args.json'
    wanted = {'hub_model_id': 'tiny-llama-lora', 'push_to_hub': True, **record}
    path.write_text(json.dumps({**json.loads(path.read_text()), **wanted}))
    return run


@pytest.mark.parametrize('hub', ['modelscope', 'huggingface'])
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_one_command_pushes_again(
    strategy: str, hub: HubName, trained: Path, tmp_path: Path, loopback: LoopbackHub
) -> None:
    run = copied(trained, tmp_path, hub=hub, push_hub_strategy=strategy)
    loopback.repos[REPO] = {'visibility': 5, 'files': {}}
    assert push.main([str(run)]) == 0
    assert list(loopback.repos) == [REPO], 'what is there is used'
    check_hub(loopback, run, strategy)


def test_the_card_says_what_the_run_was(trained: Path, tmp_path: Path, loopback: LoopbackHub) -> None:
    run = copied(trained, tmp_path, push_hub_strategy='push_last', hub_private_repo=False)
    assert push.main([str(run)]) == 0
    assert loopback.repos[REPO]['visibility'] == 5, 'public, as asked for'
    card = loopback.repos[REPO]['files']['README.md'].decode()
    record = json.loads((run / 'sft_args.json').read_text())
    history = json.loads((run / 'checkpoint-6' / 'trainer_state.json').read_text())['log_history']
    for part in (
        'base_model: tiny-llama\nlibrary_name: peft\n', record['base_model']['sha256'], '6 steps',
        'qa.jsonl: train 36 rows, validation 4 rows.', '| `--learning_rate` | 0.01 |', '![loss](images/loss.png)',
        *(f'| {e["step"]} | {e["loss"]:.4g} |' for e in history if 'loss' in e),
        *(f'| {e["step"]} | {e["eval_loss"]:.4g} |' for e in history if 'eval_loss' in e),
    ):  # fmt: skip
        assert part in card, part
    assert str(run.parent) not in card and '/tmp' not in card and '`--dtype` | fp32' in card


@pytest.mark.parametrize('hub', ['modelscope', 'huggingface'])
def test_a_server_error_is_tried_again(hub: HubName, trained: Path, tmp_path: Path, loopback: LoopbackHub) -> None:
    run = copied(trained, tmp_path, hub=hub, push_hub_strategy='push_last', hub_model_id=REPO)
    loopback.faults = [Fault('/blob/', 500), Fault('/commit/', 500)]
    assert push.main([str(run)]) == 0
    assert [fault.times for fault in loopback.faults] == [0, 0]
    check_hub(loopback, run, 'push_last')


@pytest.mark.slow
def test_a_hub_that_refuses_never_stops_the_training(
    run_sft: Run, loopback: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    loopback.token = 'another'
    run = run_sft('--push_to_hub', 'true', '--max_steps', '1')
    assert (run / 'run.json').is_file()
    assert 'checkpoint-1 could not be pushed, and the run goes on: checkpoint-1: DeniedError' in caplog.text
    assert (
        f'not all checkpoints were pushed. Run python -m utils.export.push {run}' in caplog.text
        and TOKEN not in caplog.text
    )
    loopback.token = TOKEN
    assert push.main([str(run)]) == 0
    assert set(loopback.repos[REPO]['files']) >= {*MODEL, *CARD}


@pytest.mark.slow
def test_a_hub_that_hangs_never_stops_the_training(
    run_sft: Run, loopback: LoopbackHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_queue, 'PUSH_SECONDS', 4.0)
    loopback.hang_seconds = 60.0
    loopback.faults = [Fault('/', 'hang', 99)]
    run = run_sft('--push_to_hub', 'true', '--max_steps', '1')
    assert (run / 'run.json').is_file()
    assert 'checkpoint-1 could not be pushed in 4 s, so this push was stopped' in caplog.text
    assert f'not all checkpoints were pushed. Run python -m utils.export.push {run}' in caplog.text


@pytest.mark.parametrize('says', ["b'\\xff no text\\n'", "b''"])
def test_a_push_that_says_nothing_readable_never_stops_the_training(
    says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / 'python'
    program.write_text(f'#!{sys.executable}\nimport sys\nsys.stderr.buffer.write({says})\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(program))
    folder = tmp_path / '.push' / 'checkpoint-1'
    folder.mkdir(parents=True)
    pusher = push_queue.Pusher(tmp_path, dict(os.environ), keeps_all=False)
    pusher.add(folder)
    finishing = threading.Thread(target=pusher.finish, daemon=True)
    finishing.start()
    finishing.join(20)
    assert not finishing.is_alive()
    assert 'pushed checkpoint-1' in caplog.text


@pytest.mark.parametrize(
    ('planted', 'finding'),
    [
        (f'{{"note": "{TOKEN}"}}', 'the value of the token of this push'),
        ('-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA0123', 'a private key'),
    ],
)
def test_a_secret_in_the_tree_stops_the_push(
    planted: str, finding: str, trained: Path, tmp_path: Path, loopback: LoopbackHub, problems: Callable[[], list[str]]
) -> None:
    run = copied(trained, tmp_path, push_hub_strategy='push_last')
    (run / 'checkpoint-6' / 'added_tokens.json').write_text(planted)
    assert push.main([str(run)]) == 2
    assert f'added_tokens.json: {finding}' in problems()[0] and TOKEN not in problems()[0]
    assert not loopback.requests, 'not even the name of a repository has left'


def everything_in(data: bytes) -> bytes:
    """Return data, and for a zip file also its unpacked content."""
    if not data.startswith(b'PK\x03\x04'):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return data + b''.join(everything_in(archive.read(name)) for name in archive.namelist())


@pytest.mark.slow
def test_canaries_are_found_nowhere(
    model_dir: Path, data_file: Path, tmp_path: Path, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = ('MODELSCOPE_API_TOKEN', 'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY',
                 'GITHUB_TOKEN', 'HTTP_PASSWORD')  # fmt: skip
    canaries = {name: f'canary-{name}-13579' for name in variables}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    loopback.token = canaries['--hub_token'] = 'canary-typed-97531'
    done = run_program(
        'llm_sft.py',
        *small_flags(model_dir, data_file, tmp_path / 'out'),
        *('--push_to_hub', 'true', '--push_hub_strategy', 'all_checkpoints'),
        *('--hub_token', canaries['--hub_token'], '--only_save_model', 'false'),
    )
    assert done.returncode == 0, done.stderr
    files = loopback.repos[REPO]['files']
    assert {'checkpoint-6/adapter_model.safetensors', 'checkpoint-3/tokenizer.json', 'README.md'} <= set(files)
    places = {'the log': (done.stdout + done.stderr).encode(), **files}
    for root in (tmp_path, Path(os.environ['HOME'])):
        places.update({str(p): p.read_bytes() for p in root.rglob('*') if p.is_file()})
    assert not [place for place, data in places.items() if data.startswith(b'PK')], 'no archive, so no pickle in one'
    for place, data in places.items():
        content = everything_in(data)
        assert b'canary-' not in content and TOKEN.encode() not in content, place


def test_named_templates_are_staged_in_their_folder(tmp_path: Path) -> None:
    checkpoint = tmp_path / 'checkpoint-1'
    checkpoint.mkdir()
    write_templates(checkpoint, {'default': 'a', 'tool_use': 'b'})
    inside = push.stage(tmp_path, checkpoint, strategy='push_best', progress={})
    assert folder_templates(inside) == {'default': 'a', 'tool_use': 'b'}

"""Fixtures made in-process: a toy tokenizer, tiny models, small data. No network, GPU or home folder."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.error_sites import Recorder
from tests.support.loopback_hub import LoopbackHub
from tests.support.pictures import write_pixel
from tests.support.runs import small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.errors import ConfigError, Problems
from utils.base.logger import set_up_logging
from utils.run import curves


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--record-errors', action='store_true', help='record which test reaches which message for users')
    parser.addoption('--device', default='cpu', help='the device of tests with the marker on_device, for example cuda')


def pytest_configure(config: pytest.Config) -> None:
    """Refuse --record-errors in several processes, which would overwrite each other's table."""
    if config.getoption('--record-errors') and config.getoption('numprocesses', None):
        raise pytest.UsageError('--record-errors: add -n 0, because only one process can write the table')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests with the marker gpu if torch finds no GPU. torch is imported only if there is such a test."""
    needing = [item for item in items if item.get_closest_marker('gpu')]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason='torch finds no GPU'))


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make tests with the marker on_device create their tensors and models on the device of --device."""
    name = request.config.getoption('--device')
    if name == 'cpu' or not request.node.get_closest_marker('on_device'):
        yield
        return
    import torch

    with torch.device(name):
        yield


RECORDER = pytest.StashKey[Recorder]()


@pytest.fixture(scope='session', autouse=True)
def messages_reached(pytestconfig: pytest.Config) -> Iterator[None]:
    """Record the messages for users that tests reach. Write them to the table with --record-errors, else compare."""
    recorder = pytestconfig.stash[RECORDER] = Recorder()
    recorder.watch(ConfigError, '__init__')
    recorder.watch(Problems, 'add')
    yield
    if pytestconfig.getoption('--record-errors'):
        recorder.write()
    untrue = recorder.untrue()
    assert not untrue, 'these passed without reaching the message; run them with --record-errors:\n' + '\n'.join(untrue)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Tell the recorder which tests passed."""
    report = yield
    if call.when == 'call' and report.passed:
        item.config.stash[RECORDER].passed.add(item.nodeid)
    return report


@pytest.fixture(scope='session', autouse=True)
def small_pictures() -> Iterator[None]:
    """Write pictures of one pixel, because drawing curves takes as long as training a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, 'draw', write_pixel)
        yield


@pytest.fixture(scope='module', autouse=True)
def frozen_heap() -> Iterator[None]:
    """Keep the objects of imported libraries out of garbage collection. The first-step trial of each run collects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def hermetic(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give each test an empty home and cache, no hub and no token, and make the log visible to caplog."""
    home = tmp_path_factory.mktemp('home')
    for name, value in {
        'HOME': str(home),
        'ASSAY_CACHE': str(home / 'assay'),
        'HF_HOME': str(home / 'hf'),
        'HF_HUB_OFFLINE': '1',
        'MODELSCOPE_CACHE': str(home / 'modelscope'),
        'MODELSCOPE_ENDPOINT': 'http://127.0.0.1:9',
        'HF_ENDPOINT': 'http://127.0.0.1:9',
    }.items():
        monkeypatch.setenv(name, value)
    set_up_logging()
    monkeypatch.setattr(logging.getLogger('assay'), 'propagate', True)
    for name in ('MODELSCOPE_API_TOKEN', 'HF_TOKEN', 'HF_HUB_CACHE', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope='session')
def loopback_server() -> Iterator[LoopbackHub]:
    """Return the server that stands for both hubs."""
    server = LoopbackHub()
    yield server
    server.close()


@pytest.fixture
def loopback(loopback_server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """Return both hubs, empty, reachable from this process and its children."""
    import huggingface_hub.constants

    loopback_server.reset(token='')
    for name, value in {
        'MODELSCOPE_ENDPOINT': loopback_server.url,
        'HF_ENDPOINT': loopback_server.url,
        'HF_HUB_OFFLINE': '0',
        'HF_HUB_DISABLE_XET': '1',  # the server does not implement its protocol
    }.items():
        monkeypatch.setenv(name, value)
    # The library reads these only once, when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True)
    return loopback_server


@pytest.fixture(scope='session')
def tokenizer() -> Any:
    """Return the toy tokenizer with a ChatML template."""
    return make_tokenizer()


@pytest.fixture(scope='session')
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Return a saved tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp('models') / 'tiny-llama'
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 40 question/answer rows of different lengths."""
    rows = [
        {'query': f'what is {i} and {i % 7}?', 'response': f'the answer is {i}.' + ' yes' * (i % 5)} for i in range(40)
    ]
    return write_jsonl(tmp_path_factory.mktemp('data') / 'qa.jsonl', rows)


@pytest.fixture
def run_sft(model_dir: Path, data_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that trains in this process with small settings and returns the run folder."""

    def run(*flags: str, expect: int = 0) -> Path:
        import llm_sft

        output = tmp_path / 'output'
        before = set(output.glob('*/*'))
        words = small_flags(model_dir, data_file, output)
        assert llm_sft.main([*words, *flags]) == expect
        made = set(output.glob('*/*')) - before
        return made.pop() if made else output

    return run


@pytest.fixture
def problems() -> Iterator[Callable[[], list[str]]]:
    """Return a function that returns the error lines logged so far."""
    logger = logging.getLogger('assay')

    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                lines.append(record.getMessage())

    handler = Keep()
    logger.addHandler(handler)
    yield lambda: lines
    logger.removeHandler(handler)

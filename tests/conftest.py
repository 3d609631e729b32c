"""Fixtures made in-process: a toy tokenizer, tiny models, small data. No network, GPU or home folder."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.error_sites import Recorder  # noqa: E402
from tests.support.loopback_hub import LoopbackHub  # noqa: E402
from utils.base.errors import ConfigError, Problems  # noqa: E402
from utils.base.logger import set_up_logging  # noqa: E402
from utils.data.parts import TRAIN, VAL  # noqa: E402
from utils.data.plan import plan_rows, served_by  # noqa: E402
from utils.data.tally import Tally  # noqa: E402
from utils.formats.conversation import Row  # noqa: E402

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ['<unk>', '<s>', '</s>', '<|im_start|>', '<|im_end|>', '<|endoftext|>', '<eoh>', '<eoa>']
TEXTS = [
    'you are a helpful assistant!\n\n### Human:\nwhat is the answer?\n\n### Assistant:\nthe answer is 42.',
    '[INST] <<SYS>>\nsystem\n<</SYS>>\n\nuser question [/INST] assistant reply',
    'User: hello there\nAssistant: hi, how can I help you today? 你好，世界。今天的天气很好。问：答：',
    '<human>:name a colour\n<bot>:blue, green, red and yellow {"key": [1, 2, 3]}',
    'count 0 1 2 3 4 5 6 7 8 9 and a b c d e f g h i j k l m n o p q r s t u v w x y z',
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--record-errors', action='store_true', help='write down which test reaches which message for users'
    )


RECORDER = pytest.StashKey[Recorder]()


@pytest.fixture(scope='session', autouse=True)
def messages_reached(pytestconfig: pytest.Config) -> Iterator[None]:
    """Note the messages for users that tests reach: into the table where that was asked for, else held against it."""
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


@pytest.fixture(autouse=True)
def hermetic(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give each test an empty home and cache, no hub and no token, and let caplog see the log."""
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
    """Return the one server of both hubs."""
    server = LoopbackHub()
    yield server
    server.close()


@pytest.fixture
def loopback(loopback_server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """Return both hubs, empty, reached by this process and those it starts."""
    import huggingface_hub.constants

    loopback_server.reset(token='')
    for name, value in {
        'MODELSCOPE_ENDPOINT': loopback_server.url,
        'HF_ENDPOINT': loopback_server.url,
        'HF_HUB_OFFLINE': '0',
        'HF_HUB_DISABLE_XET': '1',  # its protocol is not spoken here
    }.items():
        monkeypatch.setenv(name, value)
    # Read once, when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True)
    return loopback_server


def make_tokenizer(*, chat_template: str | None = CHATML, vocab_size: int = 400, metaspace: str | None = None) -> Any:
    """Return a BPE tokenizer trained on a few sentences, with the control tokens of several templates.

    Byte-level as GPT-2's; with `metaspace` ('first', 'always') blanks become ▁ as Llama's do, one put before the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token='<unk>'))
    if metaspace is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
        backend.decoder = decoders.Metaspace(prepend_scheme=metaspace)
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token='<unk>', bos_token='<s>', eos_token='</s>', pad_token='<|endoftext|>'
    )
    tokenizer.add_special_tokens({'additional_special_tokens': SPECIAL[3:]})
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(*, seed: int = 0, vocab_size: int = 400, layers: int = 2, intermediate_size: int = 64) -> Any:
    """Return a 2-layer Llama of random weights, fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=5,
        )
    )


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


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines; returns the path."""
    path.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')
    return path


@dataclass(kw_only=True)
class Rows:
    """The rows that a plan chooses, how many were left out, and what served each data set of a hub."""

    train: list[Row]
    val: list[Row]
    left_out: Tally
    served: dict[str, str]


def get_dataset(words: list[str], **options: Any) -> Rows:
    """Return the rows that plan_rows chooses with these options, held in memory."""
    plan = plan_rows(words, **options)
    chosen = {use: [row for _, row in plan.rows(use)] for use in (TRAIN, VAL)}
    return Rows(train=chosen[TRAIN], val=chosen[VAL], left_out=plan.left_out, served=served_by(plan.parts))


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


def small_flags(model_dir: Path, data_file: Path, output: Path) -> list[str]:
    """Return flags of a run that takes about a second; later ones win over them."""
    flags = {
        'model_id_or_path': model_dir, 'dataset': data_file, 'output_dir': output, 'dtype': 'fp32',
        'dataset_test_ratio': 0.1, 'batch_size': 2, 'gradient_accumulation_steps': 2, 'learning_rate': 0.01,
        'max_steps': 6, 'eval_steps': 3, 'logging_steps': 1, 'dataloader_num_workers': 0, 'report_samples': 0,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f'--{name}', str(value))]
    return [*words, '--']


def run_program(name: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one of the two programs as users do; returns what it printed and its exit code."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        timeout=300,
        check=False,
    )


@pytest.fixture
def problems() -> Iterator[Callable[[], list[str]]]:
    """Return a function that gives the error lines logged so far."""
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

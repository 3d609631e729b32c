"""--check_server against real `transformers serve` processes. It needs packages that no other test needs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import llm_infer
import llm_sft
from tests.support.runs import small_flags, write_jsonl

pytestmark = [pytest.mark.optional, pytest.mark.slow]
_PATIENCE_SECONDS = 120


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """Serve a folder until the context ends. Returns the address."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    words = ['serve', str(folder), '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']
    command = [sys.executable, '-m', 'transformers.cli.transformers', *words]
    with log.open('w') as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    try:
        address = f'http://127.0.0.1:{port}'
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while not _answers(address):
            assert process.poll() is None and time.monotonic() < give_up, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f'{address}/health', timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def test_the_three_cases_are_told_apart(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ('openai', 'fastapi', 'uvicorn'):
        pytest.importorskip(package, reason='needs pip install "transformers[serving]"')
    data = write_jsonl(
        tmp_path / 'qa.jsonl', [{'query': f'what is {i}?', 'response': f'hi {i % 3}'} for i in range(30)]
    )
    flags = ('--lora_modules_to_save', 'embed_tokens', 'lm_head', '--max_steps', '40', '--eval_steps', '40')
    assert llm_sft.main([*small_flags(model_dir, data, tmp_path / 'out'), *flags, '--preflight', 'false']) == 0
    checkpoint = next((tmp_path / 'out').glob('*/*')) / 'checkpoint-40'
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    merged = checkpoint.with_name('checkpoint-40-merged')
    blank = shutil.copytree(merged, tmp_path / 'blank')
    template = blank / 'chat_template.jinja'
    written = template.read_text(encoding='utf-8')
    template.write_text(written.replace('assistant\\n', 'assistant \\n').replace('assistant\n', 'assistant \n'))
    assert template.read_text(encoding='utf-8') != written

    found = []
    for folder, code in ((merged, 0), (model_dir, 1), (blank, 1)):
        with served(folder, tmp_path / 'log') as address:
            words = ['--ckpt_dir', str(checkpoint), '--check_server', address, '--served_model', str(folder)]
            capsys.readouterr()
            assert llm_infer.main([*words, '--max_new_tokens', '8']) == code, (tmp_path / 'log').read_text()
            found.append([line[:48] for line in capsys.readouterr().out.splitlines() if not line.startswith('  ')])
    right, base, changed = found
    assert right == [
        'ok   prompts: number of tokens equal in 3 of 3 r',
        'ok   adapter: active: 3 of the 3 rows that the b',
        'ok   answers: answers equal 3 of 3',
        'note first log probabilities: not compared: the ',
        'the server answers as the run: 3 of 3 rows compa',
    ]
    assert base[1] == 'FAIL adapter: the adapter is not active: answers'
    assert changed[0] == 'FAIL prompts: template differs: the prompt has 1'
    assert (checkpoint / 'check_server.json').is_file() and (checkpoint / 'check_server-3.json').is_file()

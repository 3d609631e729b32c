"""A merged model becomes a GGUF file that is compared before it gets its name, and a Modelfile with its template."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.support.runs import ROOT, small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.errors import ConfigError
from utils.export.gguf import _convert, _template_fault
from utils.export.ollama import NotExpressible, Turns
from utils.loading.folder import stored_dtype
from utils.loading.gguf_header import GgufHeader, read_header

Problems = Callable[[], list[str]]
pytestmark = pytest.mark.slow

MODELFILE = '''\
# ollama create tuned -f tuned.Modelfile
FROM ./tuned.gguf
TEMPLATE """{{- $asked := false }}{{ $role := "" }}
{{- range .Messages }}
{{- if eq .Role "user" }}
{{- if $asked }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}{{ else }}\
{{ if $.System }}{{ "<|im_start|>system\\n" }}{{ $.System }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}{{ else }}\
{{ "<|im_start|>user\\n" }}{{ end }}{{ end }}
{{- .Content }}{{ $asked = true }}
{{- else if eq .Role "assistant" }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}{{ .Content }}
{{- end }}{{ $role = .Role }}
{{- end }}
{{- if ne $role "assistant" }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}{{ end }}"""
SYSTEM """be brief"""
PARAMETER stop "</s>"
PARAMETER stop "<|im_end|>"
PARAMETER temperature 0
PARAMETER repeat_penalty 1.0
PARAMETER num_predict 2048
'''


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with an adapter, of a run that answered three rows for its report."""
    folder = tmp_path_factory.mktemp('gguf')
    make_model().save_pretrained(folder / 'tiny-llama')
    make_tokenizer().save_pretrained(folder / 'tiny-llama')
    rows = [{'query': f'what is {i}?', 'response': f'it is {i}.' + ' yes' * (i % 5)} for i in range(40)]
    data = write_jsonl(folder / 'qa.jsonl', rows)
    words = small_flags(folder / 'tiny-llama', data, folder / 'out')
    assert llm_sft.main([*words, '--max_steps', '2', '--report_samples', '3', '--system', 'be brief']) == 0
    return next((folder / 'out').glob('*/*/checkpoint-2'))


@pytest.fixture(scope='module')
def merged(trained: Path) -> Path:
    """Return the folder of the merged model."""
    assert llm_infer.main(['--ckpt_dir', str(trained), '--merge_lora_and_save', 'true']) == 0
    return trained.with_name('checkpoint-2-merged')


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with the stand-in for the converter of llama.cpp."""
    folder = tmp_path / 'llama.cpp'
    folder.mkdir()
    shutil.copy(ROOT / 'tests' / 'support' / 'convert_hf_to_gguf.py', folder)
    return folder


def proof(checkpoint: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((checkpoint.parent / 'proofs.json').read_text())['gguf']
    return found


def test_merging_writes_a_file_that_is_proven_and_a_modelfile(
    trained: Path, checkout: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / 'files' / 'tuned.gguf'
    words = ['--ckpt_dir', str(trained), '--merge_lora_and_save', 'true', '--gguf', str(file)]
    assert llm_infer.main([*words, '--llama_cpp', str(checkout), '--do_sample', 'false']) == 0
    assert file.with_suffix('.Modelfile').read_text() == MODELFILE
    assert sorted(f.name for f in file.parent.iterdir()) == ['tuned.Modelfile', 'tuned.gguf']
    says = str(proof(trained)['says'])
    assert proof(trained)['passed'] and says.startswith(
        'tuned.gguf (f32) has the chat template and the tokens of the merged model, and answers 3 of 3 prompts with '
        'the same 32 greedy tokens (largest difference of the logits 0)'
    )
    assert 'tuned.Modelfile: its TEMPLATE gives the text of the chat template on 11 conversations' in says
    assert f'llama-server -m {file} --jinja' in caplog.text and f'ollama create tuned -f {file.parent}' in caplog.text


def test_a_rounded_file_is_compared_with_what_its_type_explains(merged: Path, checkout: Path, tmp_path: Path) -> None:
    file, kind = tmp_path / 'tuned.gguf', 'q8_0'
    words = ['--ckpt_dir', str(merged), '--gguf', str(file), '--gguf_type', kind, '--llama_cpp', str(checkout)]
    assert llm_infer.main(words) == 0
    assert {kind.upper(), 'F32'} == {found for found, _ in read_header(file).tensors.values()}
    assert f'tuned.gguf ({kind}) has the chat template' in str(proof(merged)['says'])


FAULTS = {
    'fails': r'convert_hf_to_gguf.py failed with exit code 1\. .*NotImplementedError: Architecture is not supported',
    'writes nothing': 'ended without an error, but wrote no file. Update the checkout.',
    'template': 'its chat template and the chat template of the merged model differ from character',
    'weights': r'its logits differ by up to [\d.]+\. Rounding explains only 0\.00\d+\.',
    'tokens': "its tokenizer gives other tokens for 'what is",
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_wrong_file_gets_no_name(
    fault: str, merged: Path, checkout: Path, tmp_path: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / 'fault').write_text(fault)
    secret = 'hf_' + 'a1B2' * 9
    monkeypatch.setenv('HF_TOKEN', secret)
    file = tmp_path / 'tuned.gguf'
    assert llm_infer.main(['--ckpt_dir', str(merged), '--gguf', str(file), '--llama_cpp', str(checkout)]) == 2
    said = ' '.join(problems()[0].split())
    assert re.search(FAULTS[fault], said), said
    assert not file.exists() and not file.with_suffix('.Modelfile').exists()
    assert not proof(merged)['passed']
    if fault == 'fails':
        assert 'token None of ~' in said, 'the converter gets no token, and the home folder is not shown'


def test_weights_that_are_not_read_are_said_not_to_be_compared(merged: Path, checkout: Path, tmp_path: Path) -> None:
    (checkout / 'fault').write_text('architecture')
    file = tmp_path / 'tuned.gguf'
    assert llm_infer.main(['--ckpt_dir', str(merged), '--gguf', str(file), '--llama_cpp', str(checkout)]) == 0
    says = str(proof(merged)['says'])
    assert 'has the chat template of the merged model; its weights were not compared: ' in says
    assert "GGUF files of architecture 'mamba' are not supported, only llama, qwen2, qwen3, gemma3." in says


@pytest.mark.parametrize('system_place', [True, False])
def test_a_system_message_that_no_line_can_hold_is_named(
    merged: Path, tmp_path: Path, system_place: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turns(*_: Any, **__: Any) -> tuple[Turns, str]:
        if system_place:
            raise NotExpressible('it is odd')
        return Turns(opening='', before_reply='', after_reply='', before_answer=''), 'says'

    monkeypatch.setattr('utils.export.gguf._ollama_turns', turns)
    words = ['--ckpt_dir', str(merged), '--gguf', str(tmp_path / 'a.gguf'), '--system', 'say """hi"""']
    assert llm_infer.main([*words, '--do_sample', 'false']) == 0
    why = 'the Modelfile has no TEMPLATE, and SYSTEM cannot hold its quotation marks'
    if not system_place:
        why = 'the chat template has no place for it'
    assert f'a.Modelfile has no system message, because {why}: ' in caplog.text
    assert 'SYSTEM' not in (tmp_path / 'a.Modelfile').read_text()


def test_without_a_checkout_the_commands_and_the_modelfile_are_given(
    merged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / 'tuned.gguf'
    file.with_suffix('.Modelfile').write_text('FROM mine\n')
    assert llm_infer.main(['--ckpt_dir', str(merged), '--gguf', str(file), '--do_sample', 'false']) == 0
    assert not file.exists() and file.with_suffix('.Modelfile').read_text() == MODELFILE
    assert (tmp_path / 'tuned.Modelfile.old').read_text() == 'FROM mine\n'
    assert [record.getMessage() for record in caplog.records if record.levelname == 'WARNING'][-1] == (
        f'--gguf {file}: this file is not written, because --llama_cpp is not given. Add --llama_cpp FOLDER to this '
        'command, and the file is written and compared.'
    )
    assert f'gguf: only {file.with_suffix(".Modelfile")} is written. tuned.Modelfile: its TEMPLATE gives' in caplog.text
    assert 'get llama.cpp: git clone --depth 1 https://github.com/ggml-org/llama.cpp' in caplog.text
    assert f'convert_hf_to_gguf.py {merged} --outtype f32 --outfile {file}' in caplog.text


def test_flags_that_cannot_work_are_said_together(
    trained: Path, merged: Path, tmp_path: Path, problems: Problems, data_file: Path
) -> None:
    taken = tmp_path / 'taken.gguf'
    taken.touch()
    assert llm_infer.main(['--ckpt_dir', str(trained), '--gguf', str(taken), '--llama_cpp', str(tmp_path)]) == 2
    said = '\n'.join(problems())
    assert f'--gguf {taken}: a GGUF file holds a merged model, and this checkpoint holds an adapter.' in said
    assert f'--gguf {taken} exists already and is not replaced. Name a new file.' in said
    assert f'--llama_cpp {tmp_path} has no convert_hf_to_gguf.py. Name the folder of a checkout: git clone' in said

    assert llm_infer.main(['--ckpt_dir', str(merged), '--gguf', str(tmp_path / 'tuned')]) == 2
    assert 'the name of the file must end in .gguf. Use --gguf' in problems()[-1]
    assert llm_infer.main(['--model_id_or_path', str(merged), '--gguf', str(tmp_path / 'tuned.gguf')]) == 2
    assert 'there is nothing to write. Name the checkpoint with --ckpt_dir.' in '\n'.join(problems())


def test_a_missing_or_different_template_of_a_file_is_named() -> None:
    def fault(stored: str | None, wanted: object) -> str | None:
        metadata = {} if stored is None else {'tokenizer.chat_template': stored}
        return _template_fault(GgufHeader(metadata=metadata, tensors={}), SimpleNamespace(chat_template=wanted))

    assert fault('a{{ b }}', 'a{{ b }}') is fault(None, None) is fault('x', {'tool_use': 'y', 'default': 'x'}) is None
    assert fault(None, 'x') == 'it has no chat template, unlike the merged model.'
    assert fault('x', None) == 'it has a chat template, unlike the merged model.'
    differs = 'its chat template and the chat template of the merged model differ from character 3 on.'
    assert fault('abc', 'abd') == differs


def test_a_python_that_cannot_be_run_is_an_error_of_the_checkout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='convert_hf_to_gguf.py cannot be run: No such file or directory'):
        _convert([str(tmp_path / 'gone')], tmp_path, tmp_path / 'tuned.gguf')


@pytest.mark.parametrize(
    ('config', 'dtype'),
    [
        ({'dtype': 'bfloat16'}, 'bfloat16'),
        ({'torch_dtype': 'bfloat16'}, 'bfloat16'),
        ({'text_config': {'torch_dtype': 'float16'}}, 'float16'),
        ({}, None),
    ],
    ids=['version 5', 'version 4', 'of a part', 'none'],
)
def test_the_type_of_the_file_is_that_of_the_model(config: dict[str, Any], dtype: str | None, tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama', **config}))
    assert stored_dtype(tmp_path) == dtype

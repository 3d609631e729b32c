"""Training on a GGUF file: its weights and tokens are those of the model it was made from, or the reason is said."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import llm_infer
import llm_sft
from tests.support.runs import ROOT, small_flags
from tests.support.tiny_models import TEXTS
from utils.base.errors import ConfigError
from utils.loading.gguf import (
    _LLAMA3,
    _SPLITS,
    _TYPES,
    _complete_config,
    _factors_of,
    dense_directory,
    gguf_problem,
    open_gguf,
)
from utils.loading.gguf_header import TENSOR_TYPES, GgufHeader, read_header

Problems = Callable[[], list[str]]
CONVERTER = ROOT / 'tests' / 'support' / 'convert_hf_to_gguf.py'
FILE = Path('model.gguf')


@pytest.fixture(scope='module')
def converted(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Return a GGUF file in fp32 of the tiny model."""
    file = tmp_path_factory.mktemp('gguf') / 'tiny.gguf'
    subprocess.run([sys.executable, CONVERTER, model_dir, '--outtype', 'f32', '--outfile', file], check=True)
    return file


@pytest.mark.slow
def test_a_file_gives_the_weights_and_tokens_of_its_model(converted: Path, model_dir: Path, tokenizer: Any) -> None:
    header = read_header(converted)
    stored = load_file(model_dir / 'model.safetensors')
    assert header.architecture == 'llama' and header.chat_template == tokenizer.chat_template
    assert header.parameters() == sum(tensor.numel() for tensor in stored.values())
    assert header.tensors['token_embd.weight'] == ('F32', (400, 32)) and header.setting('rope.freq_base') == 10000.0
    model, found = open_gguf(converted, torch.float32)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert [found(text)['input_ids'] for text in TEXTS] == [tokenizer(text)['input_ids'] for text in TEXTS]
    assert found.chat_template == tokenizer.chat_template and found.eos_token == tokenizer.eos_token


@pytest.mark.slow
def test_a_run_trains_on_the_file_and_its_checkpoint_finds_it_again(
    converted: Path, data_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = small_flags(converted, data_file, tmp_path / 'out')
    assert llm_sft.main([*words, '--max_steps', '1']) == 0
    assert f'base weights = {converted} because it is a GGUF file, whose weights are dequantised to bf16' in caplog.text
    checkpoint = next((tmp_path / 'out').glob('*/*/checkpoint-1'))
    record = json.loads((checkpoint.parent / 'sft_args.json').read_text())
    assert record['base_model']['source'] == 'tiny.gguf' and record['base_model']['covers'] == 'whole'
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--max_new_tokens', '1']) == 0
    assert caplog.text.count('reading tiny.gguf into') == 1, 'the folder in the cache is used again'
    assert dense_directory(converted).name.startswith('gguf-')

    caplog.clear()
    assert llm_sft.main([*words, '--dry_run', 'true']) == 0
    bytes_ = bytearray(converted.read_bytes())
    bytes_[-1] ^= 1
    converted.with_name('changed.gguf').write_bytes(bytes_)
    assert dense_directory(converted.with_name('changed.gguf')) != dense_directory(converted)


def written(tmp_path: Path, *, arch: str = 'llama', kind: str = 'F32', pre: str = 'gpt-2', **settings: Any) -> Path:
    """Return a GGUF file with one tensor, and these settings of its architecture."""
    file = tmp_path / 'model.gguf'
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(512)
    for name, value in settings.items():
        key = name.replace('__', '.')
        writer.add_uint32(key if '.' in key and key.startswith('split') else f'{arch}.{key}', value)
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor('x.weight', np.zeros((4, 8), dtype=np.float32), raw_dtype=number if kind == 'F64' else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        ({'arch': 'mamba'}, "architecture 'mamba' are not supported, only llama, qwen2, qwen3, gemma3. Name"),
        (
            {'logit_scale': 2},
            'its setting llama.logit_scale is not known here, so the model might be computed',
        ),
        ({'pre': 'poro-chat'}, "its tokenizer (model 'gpt2', pre 'poro-chat') is not known here, so text might get"),
        ({'split__count': 3}, 'is one of 3 parts. Join them with llama-gguf-split --merge of llama.cpp.'),
        ({'kind': 'F64'}, 'its tensors have the type F64, which is not supported.'),
    ],
)
def test_files_that_are_not_read_are_refused_with_the_reason(
    options: dict[str, Any], reason: str, tmp_path: Path, data_file: Path, problems: Problems
) -> None:
    file = written(tmp_path, **options)
    assert llm_sft.main(small_flags(file, data_file, tmp_path / 'out')) == 2
    assert len(problems()) == 1 and reason in problems()[0], problems()
    assert gguf_problem(written(tmp_path)) is None


def test_a_damaged_file_is_refused_before_its_sizes_are_believed(tmp_path: Path) -> None:
    whole = written(tmp_path).read_bytes()
    file = tmp_path / 'damaged.gguf'
    huge = whole.replace(struct.pack('<Q', len('general.architecture')), struct.pack('<Q', 1 << 60), 1)
    damaged = {
        whole[:100]: 'it is cut off',
        b'GGML' + whole[4:]: 'it does not begin with the letters GGUF',
        b'GGUF' + struct.pack('<I', 9) + whole[8:]: 'its version is 9, and only versions 2 and 3 are known',
        huge: 'it is damaged or cut off',
        whole.replace(b'gpt-2', b'gpt\xff2'): "codec can't decode byte 0xff",
    }
    for content, reason in damaged.items():
        file.write_bytes(content)
        assert reason in str(gguf_problem(file)), reason
    with pytest.raises(ConfigError, match='damaged.gguf cannot be read as a GGUF file: '):
        open_gguf(file)
    with pytest.raises(ConfigError, match='gone.gguf cannot be read: No such file'):
        read_header(tmp_path / 'gone.gguf')


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('ASSAY_CACHE', str(tmp_path / 'file'))
    with pytest.raises(ConfigError, match='file: the cache folder cannot be written: .*Set the environment variable'):
        dense_directory(written(tmp_path))


def test_a_file_that_is_not_there_is_no_id_of_a_hub(tmp_path: Path, data_file: Path, problems: Problems) -> None:
    """A name with one slash, such as models/name.gguf, has the form of an id on a hub."""
    assert llm_sft.main(small_flags(Path('models/nowhere.gguf'), data_file, tmp_path / 'out')) == 2
    assert problems() == [
        f'--model_id_or_path models/nowhere.gguf: there is no such file (looked in {Path("models").absolute()}). '
        'Correct the path.'
    ]


def test_a_folder_with_only_a_file_asks_for_the_file(tmp_path: Path, data_file: Path, problems: Problems) -> None:
    file = written(tmp_path)
    assert llm_sft.main(small_flags(tmp_path, data_file, tmp_path / 'out')) == 2
    assert f'holds GGUF files and no config.json. Name the file: {file}.' in problems()[0]


def header(arch: str, tensors: tuple[str, ...] = (), **settings: Any) -> GgufHeader:
    values = {f'{arch}.{name.replace("__", ".")}': value for name, value in settings.items()}
    shapes = dict.fromkeys(tensors, ('F32', (4,)))
    return GgufHeader(metadata={'general.architecture': arch, **values}, tensors=shapes)


def test_settings_that_transformers_does_not_read_reach_the_configuration() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4)
    found = header('llama', attention__key_length=16, rope__scaling__type='linear', rope__scaling__factor=4)
    _complete_config(config, found, FILE)
    assert config.head_dim == 16
    assert config.rope_parameters == {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 10000.0}

    gemma = Gemma3TextConfig(num_hidden_layers=18, hidden_size=64, num_attention_heads=4, head_dim=8)
    _complete_config(gemma, header('gemma3', attention__sliding_window=16, rope__freq_base_swa=5.0), FILE)
    assert (gemma.sliding_window, gemma.query_pre_attn_scalar) == (16, 8)
    assert gemma.rope_parameters['sliding_attention']['rope_theta'] == 5.0
    large = Gemma3TextConfig(num_hidden_layers=62, hidden_size=64, num_attention_heads=4, head_dim=8)
    _complete_config(large, header('gemma3'), FILE)
    assert large.query_pre_attn_scalar == 16, 'the 27B model scales by the width, not by the size of a head'


@pytest.mark.parametrize(
    ('found', 'reason'),
    [
        (header('llama', rope__scaling__type='yarn'), "has the scaling 'yarn', which is not supported"),
        (header('llama', rope__dimension_count=4), 'its heads have the size 8, but rope.dimension_count or'),
        (header('llama', attention__sliding_window=4), 'llama with a sliding window is not supported'),
    ],
)
def test_settings_that_cannot_be_set_are_refused(found: GgufHeader, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _complete_config(LlamaConfig(hidden_size=32, num_attention_heads=4), found, FILE)


def test_the_scaling_of_llama_3_is_found_from_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    found = header('llama', ('rope_freqs.weight',))
    for scaling in _LLAMA3:
        wanted = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters={'rope_theta': 5e5, **scaling})
        factors = _factors_of(wanted)
        monkeypatch.setattr('utils.loading.gguf._rope_factors', lambda _, factors=factors: factors)
        config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters={'rope_theta': 5e5})
        _complete_config(config, found, FILE)
        assert config.rope_parameters == wanted.rope_parameters
        assert [float(factors.max()), float(factors.min())] == pytest.approx([scaling['factor'], 1])
    monkeypatch.setattr('utils.loading.gguf._rope_factors', lambda _: torch.ones(32))
    with pytest.raises(ConfigError, match='the factors of its rotary embedding are neither those of Llama 3.1 nor'):
        _complete_config(config, found, FILE)


@pytest.mark.slow
def test_a_tensor_that_the_model_does_not_have_is_refused(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_header(converted)
    more = GgufHeader(metadata=whole.metadata, tensors={**whole.tensors, 'blk.0.attn_q.bias': ('F32', (32,))})
    monkeypatch.setattr('utils.loading.gguf.read_header', lambda _: more)
    with pytest.raises(ConfigError, match='tiny.gguf has 22 tensors, and LlamaForCausalLM has 21: they do not match'):
        open_gguf(converted)
    monkeypatch.setattr('utils.loading.gguf._open_tokenizer', lambda *_: {}['gone'])
    with pytest.raises(ConfigError, match="cannot be read as a model: KeyError: 'gone'. Name the folder or hub id"):
        open_gguf(converted)


def test_the_tables_are_those_of_the_libraries() -> None:
    readable = {kind.name for kind in gguf.quants._type_traits} | {'F32', 'F16'}
    assert readable == _TYPES
    assert {kind.value: kind.name for kind in gguf.GGMLQuantizationType} == TENSOR_TYPES
    assert _SPLITS - {'gpt-2', 'smollm'} <= set(GGUF_PRE_TOKENIZER_SPLITS)

"""Model directories that are damaged, of another model, or unsuitable: one clear message, exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.support.old_models import change_config, original_folder
from tests.support.runs import small_flags
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.errors import ConfigError
from utils.loading.weights import locate
from utils.model import get_model_info, load_model

Problems = Callable[[], list[str]]


def shard(folder: Path, suffix: str) -> list[Path]:
    """Split the weights of a folder into two files with an index. Returns the files."""
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    stem = 'model' if suffix == 'safetensors' else 'pytorch_model'
    files = [folder / f'{stem}-0000{i}-of-00002.{suffix}' for i in (1, 2)]
    places = {key: files[i % 2].name for i, key in enumerate(sorted(state))}
    for file in files:
        content = {key: tensor for key, tensor in state.items() if places[key] == file.name}
        (save_file if suffix == 'safetensors' else torch.save)(content, file)
    (folder / f'{stem}.{suffix}.index.json').write_text(json.dumps({'weight_map': places}))
    return files


def replace_tensor(folder: Path, key: str, change: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / 'model.safetensors')
    save_file({**state, key: change(state[key]).contiguous()}, folder / 'model.safetensors')


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncated_safetensors(folder: Path) -> None:
    truncate(shard(folder, 'safetensors')[1])


def truncated_bin(folder: Path) -> None:
    truncate(shard(folder, 'bin')[1])


def missing_shard(folder: Path) -> None:
    shard(folder, 'safetensors')[1].unlink()


def shard_outside(folder: Path) -> None:
    index = folder / 'model.safetensors.index.json'
    shard(folder, 'safetensors')
    index.write_text(index.read_text().replace('model-00002', '../model-00002'))


def broken_index(folder: Path) -> None:
    shard(folder, 'bin')
    (folder / 'pytorch_model.bin.index.json').write_text('{"weight_map": ')


def index_without_map(folder: Path) -> None:
    shard(folder, 'bin')
    (folder / 'pytorch_model.bin.index.json').write_text('{"weight_map": [1]}')


def other_shape(folder: Path) -> None:
    replace_tensor(folder, 'transformer.h.0.mlp.w1.weight', lambda tensor: tensor[:-1])


def other_fused_shape(folder: Path) -> None:
    replace_tensor(folder, 'transformer.h.1.attn.c_attn.weight', lambda tensor: tensor[:-1])


def empty_bin(folder: Path) -> None:
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(b'')


def text_bin(folder: Path) -> None:
    empty_bin(folder)
    (folder / 'pytorch_model.bin').write_text('<html>404: this is a page, not a model</html>')


def list_bin(folder: Path) -> None:
    import torch

    empty_bin(folder)
    torch.save([torch.ones(3)], folder / 'pytorch_model.bin')


def number_bin(folder: Path) -> None:
    import torch

    empty_bin(folder)
    torch.save({'transformer.wte.weight': torch.ones(3, 4), 'epoch': 7}, folder / 'pytorch_model.bin')


def no_weights(folder: Path) -> None:
    (folder / 'model.safetensors').unlink()


def other_family(folder: Path) -> None:
    with change_config(folder) as config:
        config['model_type'] = 'baichuan'


def native_other_family(folder: Path) -> None:
    shutil.rmtree(folder)
    make_model().save_pretrained(folder)
    make_tokenizer(chat_template=None).save_pretrained(folder)


def qwen_audio(folder: Path) -> None:
    with change_config(folder) as config:
        config['audio'] = {'n_mels': 80}


def no_heads(folder: Path) -> None:
    with change_config(folder) as config:
        config['num_attention_heads'] = 0


def width_in_words(folder: Path) -> None:
    with change_config(folder) as config:
        config['hidden_size'] = 'sixty-four'


def config_of_another_size(folder: Path) -> None:
    with change_config(folder) as config:
        config['vocab_size'] += 8


def tokenizer_of_another_model(folder: Path) -> None:
    for key in ('transformer.wte.weight', 'lm_head.weight'):
        replace_tensor(folder, key, lambda tensor: tensor[:400])
    with change_config(folder) as config:
        config['vocab_size'] = 400


def truncated_vocabulary(folder: Path) -> None:
    truncate(folder / 'qwen.tiktoken')


DAMAGE: dict[Callable[[Path], None], str] = {
    truncated_safetensors: 'model-00002-of-00002.safetensors cannot be read as a tensor archive',
    truncated_bin: 'pytorch_model-00002-of-00002.bin cannot be read as a tensor archive',
    missing_shard: 'names model-00002-of-00002.safetensors, which is not there: the download is incomplete.',
    shard_outside: "names the file '../model-00002-of-00002.safetensors', which is outside the folder of the index.",
    broken_index: 'pytorch_model.bin.index.json cannot be read',
    index_without_map: 'pytorch_model.bin.index.json has no weight_map',
    other_shape: '1 mismatched tensors:',
    other_fused_shape: "tensor 'transformer.h.1.attn.c_attn.weight' of shape (191, 64) cannot be cut into 3",
    empty_bin: 'pytorch_model.bin cannot be read as a tensor archive',
    text_bin: 'pytorch_model.bin cannot be read as a tensor archive',
    list_bin: 'pytorch_model.bin holds a list, not tensors by name.',
    number_bin: "pytorch_model.bin holds a int as 'epoch', where a tensor must be.",
    no_weights: 'holds no weights: neither model.safetensors nor pytorch_model.bin',
    other_family: "has model_type 'baichuan', but the --model_type of this command is of the family qwen (qwen",
    native_other_family: "has model_type 'llama', but the --model_type of this command is of the family qwen (qwen",
    qwen_audio: 'so it is a Qwen-Audio, which is not supported',
    no_heads: 'config.json does not fit family qwen: ',
    width_in_words: 'config.json does not fit family qwen: ',
    config_of_another_size: '2 mismatched tensors:',
    tokenizer_of_another_model: 'tokens, but the model has only 400 embeddings: they do not belong together.',
    truncated_vocabulary: 'qwen.tiktoken',
}


@pytest.mark.parametrize('damage', DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_directory(damage: Callable[[Path], None], tmp_path: Path, data_file: Path, problems: Problems) -> None:
    folder = original_folder('qwen-7b', tmp_path)
    damage(folder)
    assert llm_sft.main(small_flags(folder, data_file, tmp_path / 'out')) == 2
    assert len(problems()) == 1 and DAMAGE[damage] in problems()[0], problems()
    assert '\n' not in problems()[0].strip()


def test_native_directory_of_other_shapes(tmp_path: Path, data_file: Path, problems: Problems) -> None:
    folder = tmp_path / 'my-own'
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    replace_tensor(folder, 'model.layers.0.mlp.up_proj.weight', lambda tensor: tensor[:-1])
    assert llm_sft.main(small_flags(folder, data_file, tmp_path / 'out')) == 2
    assert len(problems()) == 1
    assert f'{folder}, read as LlamaForCausalLM, has 1 mismatched tensors: ' in problems()[0]
    assert 'model.layers.0.mlp.up_proj.weight' in problems()[0]


def test_saved_directory_of_other_shapes(tmp_path: Path) -> None:
    """A folder that a class of this project saved."""
    from utils.loading.legacy.classes.alibi import AlibiLlamaConfig, AlibiLlamaForCausalLM

    sizes = {'hidden_size': 32, 'intermediate_size': 64, 'num_attention_heads': 2, 'vocab_size': 64}
    AlibiLlamaForCausalLM(AlibiLlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path)
    replace_tensor(tmp_path, 'model.norm.weight', lambda tensor: tensor[:-1])
    with pytest.raises(ConfigError, match='baichuan_13b, has 1 mismatched tensors: .*model.norm.weight'):
        load_model(tmp_path)


def test_noise_in_place_of_a_bin_file_is_called_damaged(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    (tmp_path / 'pytorch_model.bin').write_bytes(b'noise' * 500)
    with pytest.raises(ConfigError, match='a .bin file in it is damaged, or holds more than tensors'):
        load_model(tmp_path)


GPTQ = ' are stored quantised (gptq) and cannot be '
REFUSED = {
    ('--sft_type', 'full'): 'trained. Use --sft_type lora, or the same model without int4 or int8.',
    ('--quantization_bit', '4'): 'quantised again. Remove --quantization_bit: the weights stay quantised.',
}


@pytest.mark.parametrize('words', REFUSED, ids=' '.join)
@pytest.mark.parametrize('name', ['Qwen-7B-Chat-Int4', 'my-own'])
def test_quantised_weights_cannot_be_trained_or_quantised_again(
    name: str, words: tuple[str, ...], tmp_path: Path, data_file: Path, problems: Problems
) -> None:
    """The message comes before anything is loaded, if the entry knows it and if only config.json does."""
    folder = original_folder('qwen-7b-chat-int4', tmp_path).rename(tmp_path / name)
    flags = [*small_flags(folder, data_file, tmp_path / 'out'), '--template_type', 'default', *words]
    assert llm_sft.main(flags) == 2
    assert len(problems()) == 1 and GPTQ + REFUSED[words] in problems()[0]
    assert not (tmp_path / 'out').exists()


def test_quantised_weights_of_a_hub_are_found_once_they_are_there(
    tmp_path: Path, data_file: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = original_folder('qwen-7b-chat-int4', tmp_path)
    found = locate(get_model_info(None, str(folder)), revision='master')
    monkeypatch.setattr('utils.run.open_model.locate', lambda *_, **__: found)
    flags = [*small_flags(Path('me/gptq'), data_file, tmp_path / 'out'), '--template_type', 'default']
    assert llm_sft.main([*flags, '--sft_type', 'full']) == 2
    assert len(problems()) == 1 and "'gptq'" + GPTQ in problems()[0]


@pytest.mark.slow
@pytest.mark.optional
def test_quantised_model_without_its_library(
    tmp_path: Path, data_file: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    original = original_folder('qwen-7b-chat-int4', tmp_path)
    exported = tmp_path / 'packed'
    words = ['--model_id_or_path', str(original), '--export_native', 'true', '--output_dir', str(exported)]
    assert llm_infer.main(words) == 0
    flags = ['--template_type', 'default', '--max_steps', '2', '--max_length', '60']
    # A native layout stays packed and can be trained,
    assert llm_sft.main([*small_flags(exported, data_file, tmp_path / 'out'), *flags]) == 0
    monkeypatch.setattr('transformers.quantizers.quantizer_gptq.is_optimum_available', lambda: False)
    monkeypatch.setattr('utils.loading.legacy.families.qwen.packed_available', lambda: False)
    # or the message names what it needs; the original layout is unpacked.
    assert llm_sft.main([*small_flags(exported, data_file, tmp_path / 'out'), *flags]) == 2
    assert len(problems()) == 1 and 'requires optimum (`pip install optimum`)' in problems()[0]
    assert llm_sft.main([*small_flags(original, data_file, tmp_path / 'out'), *flags]) == 0
    assert 'the 4-bit GPTQ weights are unpacked while loading' in caplog.text


@pytest.mark.slow
def test_merging_into_quantised_weights_says_what_to_do_instead(
    tmp_path: Path, data_file: Path, problems: Problems
) -> None:
    folder = original_folder('qwen-7b-chat-int8', tmp_path).rename(tmp_path / 'my-own')
    flags = ['--template_type', 'default', '--max_steps', '1', '--max_length', '60']
    assert llm_sft.main([*small_flags(folder, data_file, tmp_path / 'out'), *flags]) == 0
    checkpoint = next((tmp_path / 'out').glob('*/*/checkpoint-1'))
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 2
    assert len(problems()) == 1
    assert (
        'Remove --merge_lora_and_save to serve base and adapter, or train on the same model without int4'
        in problems()[0]
    )

"""Checkpoints have the tokenizer files of the base, and the tensors of the base that its class does not load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.bases import EXTRA, equal, modes, stored, usual_mode, write_base
from tests.support.runs import assert_equal
from tests.support.tiny_models import CONTROL, make_model, make_tokenizer
from utils.loading.tokenizer_files import save_tokenizer
from utils.loading.unloaded import UNLOADED_FILE, unloaded_tensors, write_unloaded
from utils.model import load_model, load_tokenizer

Run = Callable[..., Path]


@pytest.mark.slow
def test_full_fine_tuning_keeps_what_the_class_does_not_load(
    run_sft: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_base(tmp_path / 'base', make_model())
    flags = ('--model_id_or_path', str(base), '--sft_type', 'full', '--max_steps', '2', '--eval_steps', '1',
             '--only_save_model', 'false')  # fmt: skip
    run = run_sft(*flags, '--save_total_limit', '-1')
    said = f'does not load 3 tensors of the base, for example {min(EXTRA)}. They are kept in {UNLOADED_FILE}'
    assert caplog.text.count(said) == 1
    checkpoint = run / 'checkpoint-2'

    kept = load_file(checkpoint / UNLOADED_FILE)
    assert set(kept) == set(EXTRA) and all(equal(kept[name], tensor) for name, tensor in EXTRA.items())
    index = json.loads((checkpoint / 'model.safetensors.index.json').read_text())
    assert index['weight_map'] == {name: file for name, (file, _) in stored(checkpoint).items()}
    assert index['metadata']['total_size'] == sum(tensor.nbytes for _, tensor in stored(checkpoint).values())

    model, loading = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not loading['missing_keys']
    trained = stored(checkpoint)
    assert all(torch.equal(tensor, trained[name][1]) for name, tensor in model.state_dict().items())
    assert set(unloaded_tensors(load_model(checkpoint), checkpoint, None)) == set(EXTRA)

    for name in ('tokenizer.json', 'tokenizer_config.json'):
        assert (checkpoint / name).read_bytes() == (base / name).read_bytes()
    assert not (checkpoint / 'chat_template.jinja').exists()
    assert modes(checkpoint) == {usual_mode()}

    resumed = run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-1'))
    assert_equal(resumed / 'checkpoint-2', checkpoint)


def test_tensors_that_are_not_loaded_join_the_index_of_shards(tmp_path: Path) -> None:
    base = write_base(tmp_path / 'base', make_model())
    model = load_model(base, torch_dtype=torch.float32)
    model.save_pretrained(tmp_path / 'saved', max_shard_size='60KB')
    write_unloaded(unloaded_tensors(model, base, None), tmp_path / 'saved')
    index = json.loads((tmp_path / 'saved' / 'model.safetensors.index.json').read_text())
    found = stored(tmp_path / 'saved')
    assert len(set(index['weight_map'].values())) > 2
    assert index['weight_map'] == {name: file for name, (file, _) in found.items()}
    assert all(equal(found[name][1], tensor) for name, tensor in EXTRA.items())


@pytest.mark.parametrize(
    ('name', 'content'),
    [('config.json', {'model_type': 'qwen'}), ('config.json', {'model_type': 'llama', 'quantization_config': {}})],
)
def test_other_layouts_have_no_tensors_to_keep(name: str, content: dict[str, object], tmp_path: Path) -> None:
    base = write_base(tmp_path / 'base', make_model())
    model = load_model(base)
    assert len(unloaded_tensors(model, base, None)) == 3
    (base / name).write_text(json.dumps(content))
    assert unloaded_tensors(model, base, None) == {}


def test_a_tokenizer_with_new_tokens_or_without_a_class_is_written_by_transformers(tmp_path: Path) -> None:
    base = write_base(tmp_path / 'base', make_model())
    tokenizer = load_tokenizer(base)
    for number, changes in enumerate((True, False)):
        if changes:
            tokenizer.add_tokens(['<new>'])
        else:
            tokenizer = load_tokenizer(base)
            settings = json.loads((base / 'tokenizer_config.json').read_text())
            del settings['tokenizer_class']
            (base / 'tokenizer_config.json').write_text(json.dumps(settings))
        folder = tmp_path / str(number)
        save_tokenizer(tokenizer, folder)
        assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
        assert json.loads((folder / 'tokenizer_config.json').read_text())['tokenizer_class']


def test_a_tokenizer_without_files_is_written_in_the_words_of_transformers_4(tmp_path: Path) -> None:
    made = make_tokenizer()
    save_tokenizer(made, tmp_path)
    settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    assert settings['tokenizer_class'] == 'PreTrainedTokenizerFast'
    assert settings['additional_special_tokens'] == CONTROL
    assert not {'backend', 'is_local', 'local_files_only', 'extra_special_tokens'} & set(settings)
    found = load_tokenizer(tmp_path)
    assert found.get_vocab() == made.get_vocab() and found.all_special_tokens == made.all_special_tokens

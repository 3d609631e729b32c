"""A merged folder has the files of its base. Only tensors of the adapter differ, and `same` finds all other changes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.support.bases import TOKENIZER_CONFIG, equal, modes, stored, usual_mode, write_base
from tests.support.modern_models import make_modern
from tests.support.tiny_models import CHATML, make_model, make_tokenizer
from utils.base.errors import ConfigError
from utils.export import same
from utils.export.merge import merge_and_save
from utils.export.patch import Patch, plan_patch, write_patched
from utils.export.write import Base
from utils.loading.info import LoadOptions
from utils.loading.opening import get_text_model_tokenizer
from utils.model import MODEL_MAPPING, load_model, load_tokenizer
from utils.run.record import RunRecord

CONFIG = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=[2, 4], pad_token_id=5, bos_token_id=1)
KINDS: dict[str, dict[str, Any]] = {
    'lora': {},
    'rslora': {'use_rslora': True},
    'dora': {'use_dora': True},
    'whole': {'modules_to_save': ['lm_head', 'input_layernorm']},
}


def write_adapter(folder: Path, base: Any, **config: Any) -> Path:
    """Write an adapter that changes every layer that it is on."""
    model = get_peft_model(base, LoraConfig(**{'r': 4, 'target_modules': ['q_proj', 'down_proj'], **config}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if 'lora_B' in name or 'modules_to_save' in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif 'magnitude' in name:
            parameter.data *= 1.1
    model.save_pretrained(folder)
    return folder


def opened(base: Path, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    return PeftModel.from_pretrained(load_model(base, torch_dtype=dtype), checkpoint).eval()


def source(base: Path, checkpoint: Path, **more: Any) -> Base:
    def reopen(folder: Path) -> tuple[Any, Any]:
        return load_model(folder, torch_dtype=torch.float32), load_tokenizer(folder)

    return Base(**{'folder': base, 'checkpoint': checkpoint, 'reopen': reopen, **more})


def merge(base: Path, checkpoint: Path, target: Path, tokenizer: Any = None, **more: Any) -> str:
    model = opened(base, checkpoint)
    tokenizer = tokenizer or load_tokenizer(base)
    made = source(base, checkpoint, **more)
    facts = merge_and_save(model, tokenizer, target, record=RunRecord(), config=copy.deepcopy(CONFIG), base=made)
    return '; '.join(facts)


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp('patch') / 'base', make_model())


@pytest.fixture(scope='module')
def checkpoint(base: Path) -> Path:
    return write_adapter(base.parent / 'lora' / 'checkpoint-1', make_model())


@pytest.fixture(scope='module')
def merged(base: Path, checkpoint: Path) -> Path:
    """Return a merged folder. Tests do not change it."""
    says = merge(base, checkpoint, base.parent / 'merged')
    assert '4 tensors changed, 20 identical to the byte; 5 files identical, generation_config.json written' in says
    return base.parent / 'merged'


@pytest.mark.parametrize('kind', KINDS)
def test_only_the_tensors_of_the_adapter_are_written_anew(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / 'checkpoint-1', make_model(), **KINDS[kind])
    merge(base, adapter, tmp_path / 'merged')
    before, after = stored(base), stored(tmp_path / 'merged')
    assert {name: file for name, (file, _) in after.items()} == {name: file for name, (file, _) in before.items()}
    changed = {name for name, (_, tensor) in after.items() if not equal(tensor, before[name][1])}
    whole = {'lm_head.weight', *(f'model.layers.{n}.input_layernorm.weight' for n in (0, 1))}
    layers = {f'model.layers.{n}.{name}.weight' for n in (0, 1) for name in ('self_attn.q_proj', 'mlp.down_proj')}
    assert changed == layers | (whole if kind == 'whole' else set())

    # The same arithmetic on the whole model in fp32.
    wanted = opened(base, adapter).merge_and_unload().state_dict()
    for name in changed:
        assert equal(after[name][1], wanted[name].to(torch.bfloat16)), name
    if kind == 'lora':
        pair = load_file(adapter / 'adapter_model.safetensors')
        name = 'model.layers.1.mlp.down_proj'
        a, b = (pair[f'base_model.model.{name}.lora_{part}.weight'] for part in 'AB')
        sums = before[f'{name}.weight'][1].float() + b @ a * 2
        assert equal(after[f'{name}.weight'][1], sums.to(torch.bfloat16))


def test_all_files_of_the_base_are_there_byte_for_byte(base: Path, merged: Path) -> None:
    equal_files = {'config.json', 'tokenizer.json', 'tokenizer_config.json', 'LICENSE', 'model.safetensors.index.json'}
    for name in equal_files:
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    shards = {file.name for file in base.glob('*.safetensors')}
    own = {'generation_config.json', 'sft_args.json', 'merge.json'}
    assert {file.name for file in merged.iterdir()} == equal_files | shards | own
    assert modes(merged) == {usual_mode()}


@pytest.mark.parametrize('kind', ['lora', 'whole'])
@pytest.mark.parametrize('both', [False, True])
def test_a_tied_head_is_changed_in_all_its_tensors(kind: str, both: bool, tmp_path: Path) -> None:
    """The files of a tied model may store the head too."""
    config = make_model().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    base = write_base(tmp_path / 'base', AutoModelForCausalLM.from_config(config))
    if both:
        file = base / 'model-00001-of-00003.safetensors'
        index = json.loads((base / 'model.safetensors.index.json').read_text())
        state = {**load_file(file), 'lm_head.weight': stored(base)['model.embed_tokens.weight'][1]}
        save_file(state, file, {'format': 'pt'})
        index['weight_map']['lm_head.weight'] = file.name
        (base / 'model.safetensors.index.json').write_text(json.dumps(index))
    more = {'modules_to_save': ['embed_tokens', 'lm_head'], 'ensure_weight_tying': True} if kind == 'whole' else {}
    adapter = write_adapter(tmp_path / 'checkpoint-1', AutoModelForCausalLM.from_config(config), **more)

    says = merge(base, adapter, tmp_path / 'merged')
    assert 'tied head' in says and 'tensors changed' in says
    before, after = stored(base), stored(tmp_path / 'merged')
    ends = [name for name in ('model.embed_tokens.weight', 'lm_head.weight') if name in before]
    assert len(ends) == 1 + both
    for name in ends:
        assert equal(after[name][1], before[name][1]) == (kind == 'lora')
        assert equal(after[name][1], after[ends[0]][1])


def test_a_base_without_shards_keeps_its_single_file_and_its_dtype(tmp_path: Path) -> None:
    base = tmp_path / 'base'
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    adapter = write_adapter(tmp_path / 'checkpoint-1', make_model())
    assert '4 tensors changed, 17 identical' in merge(base, adapter, tmp_path / 'merged')
    assert {tensor.dtype for _, tensor in stored(tmp_path / 'merged').values()} == {torch.float32}


def test_experts_and_other_renamed_tensors_keep_their_names(tmp_path: Path) -> None:
    """transformers stacks the experts on loading. The files keep one tensor for each."""
    base = write_base(tmp_path / 'base', make_modern('qwen3-30b-a3b'))
    adapter = write_adapter(
        tmp_path / 'checkpoint-1', make_modern('qwen3-30b-a3b'), target_modules=['q_proj', 'v_proj']
    )
    assert '4 tensors changed' in merge(base, adapter, tmp_path / 'merged')
    before = stored(base)
    assert any('experts.3.up_proj' in name for name in before)
    assert set(stored(tmp_path / 'merged')) == set(before)


def test_the_language_model_of_a_multimodal_base_is_merged_into_all_its_files(tmp_path: Path) -> None:
    info, options = MODEL_MAPPING['gemma3-4b-it'], LoadOptions(torch_dtype=torch.float32)
    base = write_base(tmp_path / 'base', make_modern('gemma3-4b-it'))
    text, tokenizer = get_text_model_tokenizer(base, info, options)
    adapter = write_adapter(tmp_path / 'checkpoint-1', text, target_modules=['q_proj'])
    text, tokenizer = get_text_model_tokenizer(base, info, options)
    reopen = source(base, adapter, reopen=lambda folder: get_text_model_tokenizer(folder, info, options))
    model = PeftModel.from_pretrained(text, adapter).eval()
    says = '; '.join(merge_and_save(model, tokenizer, tmp_path / 'merged', record=RunRecord(), base=reopen))
    assert '2 tensors changed' in says
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / 'merged')
    assert type(whole).__name__ == 'Gemma3ForConditionalGeneration'


def test_a_new_chat_template_replaces_that_of_the_base_everywhere(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHATML.replace('<|im_end|>', '<eoh>')
    says = merge(base, checkpoint, tmp_path / 'merged', tokenizer)
    assert 'chat_template.jinja, generation_config.json, tokenizer_config.json written by merging' in says
    settings = json.loads((tmp_path / 'merged' / 'tokenizer_config.json').read_text())
    assert settings == {**TOKENIZER_CONFIG, 'chat_template': tokenizer.chat_template}
    assert (tmp_path / 'merged' / 'chat_template.jinja').read_text() == tokenizer.chat_template
    assert same.main([str(tmp_path / 'merged'), str(base)]) == 0

    tokenizer.chat_template = None
    merge(base, checkpoint, tmp_path / 'plain', tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / 'plain').chat_template is None
    assert same.main([str(tmp_path / 'plain'), str(base)]) == 0


def quantised(base: Path) -> None:
    file = base / 'model-00001-of-00003.safetensors'
    state = {
        name: tensor.to(torch.float8_e4m3fn) if 'proj' in name else tensor for name, tensor in load_file(file).items()
    }
    save_file(state, file, {'format': 'pt'})


def as_bin(base: Path) -> None:
    torch.save({name: tensor for name, (_, tensor) in stored(base).items()}, base / 'pytorch_model.bin')
    for file in [*base.glob('*.safetensors'), base / 'model.safetensors.index.json']:
        file.unlink()


def lengthen_head(adapter: Path) -> None:
    state = load_file(adapter / 'adapter_model.safetensors')
    name = 'base_model.model.lm_head.weight'
    save_file({**state, name: torch.cat([state[name], state[name][:1]])}, adapter / 'adapter_model.safetensors')


def of_2023(base: Path) -> None:
    config = json.loads((base / 'config.json').read_text())
    (base / 'config.json').write_text(json.dumps({**config, 'model_type': 'qwen'}))


REASONS: dict[str, tuple[Callable[[Path], None], dict[str, Any], dict[str, Any], str]] = {
    'bin': (as_bin, {}, {}, 'the weights of the base are not in safetensors files'),
    '2023': (of_2023, {}, {}, 'the base has a layout of 2023'),
    'dtype': (lambda base: None, {}, {'dtype': 'float32'}, '--dtype asks for float32, and the base has bfloat16'),
    'quantised': (quantised, {}, {}, 'as F8_E4M3, and not as fp32, bf16 or fp16'),
    'shape': (lambda base: None, {'modules_to_save': ['lm_head']}, {}, 'lm_head.weight has another shape in the base'),
    'biases': (lambda base: None, {'bias': 'all'}, {}, 'the adapter sets bias'),
}


@pytest.mark.parametrize('name', REASONS)
def test_where_the_files_cannot_be_patched_the_reason_is_returned(name: str, base: Path, tmp_path: Path) -> None:
    change, config, more, reason = REASONS[name]
    adapter = write_adapter(tmp_path / 'checkpoint-1', make_model(), **config)
    model = opened(base, adapter)
    shutil.copytree(base, tmp_path / 'base')
    change(tmp_path / 'base')
    if name == 'shape':
        lengthen_head(adapter)
    plan = plan_patch(model, tmp_path / 'base', adapter, **{'family': None, 'dtype': None, **more})
    assert isinstance(plan, str) and reason in plan


def test_adapters_on_experts_and_on_a_tied_head_are_merged_whole(tmp_path: Path) -> None:
    base = write_base(tmp_path / 'moe', make_modern('qwen3-30b-a3b'))
    experts = {'target_modules': ['q_proj'], 'target_parameters': ['mlp.experts.down_proj']}
    adapter = write_adapter(tmp_path / 'checkpoint-1', load_model(base, torch_dtype=torch.float32), **experts)
    says = merge(base, adapter, tmp_path / 'merged')
    assert (
        'all files are written anew by Qwen3MoeForCausalLM: the files of the base do not store model.layers.0' in says
    )
    assert not (tmp_path / 'merged' / 'merge.json').exists()
    assert modes(tmp_path / 'merged') == {usual_mode()}

    config = make_model().config
    config.tie_word_embeddings = True
    base = write_base(tmp_path / 'tied', AutoModelForCausalLM.from_config(config))
    tied = load_model(base, torch_dtype=torch.float32)
    adapter = write_adapter(tmp_path / 'checkpoint-2', tied, target_modules=['lm_head'])
    plan = plan_patch(opened(base, adapter), base, adapter, family=None, dtype=None)
    assert plan == 'the adapter changes lm_head.weight, which is tied to another weight in the base'


def change_byte(folder: Path) -> None:
    file = folder / stored(folder)['vision_tower.count'][0]
    state = load_file(file)
    state['vision_tower.count'] ^= 1
    save_file(state, file, {'format': 'pt'})


def change_trained_tensor(folder: Path) -> None:
    for file in sorted(folder.glob('*.safetensors')):
        state = load_file(file)
        for name in state:
            if 'layers.0.self_attn.q_proj' in name:
                state[name][0, 0] += 1
        save_file(state, file, {'format': 'pt'})


def swap_shards(folder: Path) -> None:
    one, other = folder / 'model-00001-of-00003.safetensors', folder / 'model-00002-of-00003.safetensors'
    one.rename(folder / 'aside')
    other.rename(one)
    (folder / 'aside').rename(other)


def change_config(folder: Path) -> None:
    content = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**content, 'rms_norm_eps': 1e-5}))


def change_blank(folder: Path) -> None:
    with (folder / 'tokenizer_config.json').open('a') as stream:
        stream.write(' ')


def change_settings(folder: Path) -> None:
    content = json.loads((folder / 'generation_config.json').read_text())
    (folder / 'generation_config.json').write_text(json.dumps({**content, 'top_k': 3}))


def cast(folder: Path) -> None:
    for file in folder.glob('*.safetensors'):
        save_file({n: t.half() if 'norm' in n else t for n, t in load_file(file).items()}, file, {'format': 'pt'})


def drop_mtp(folder: Path) -> None:
    for file in folder.glob('*.safetensors'):
        save_file({n: t for n, t in load_file(file).items() if 'mtp' not in n}, file, {'format': 'pt'})


FOUND: dict[str, tuple[Callable[[Path], None], str]] = {
    'one byte of an untouched tensor': (change_byte, 'vision_tower.count: its bytes differ from the base'),
    'a trained tensor': (
        change_trained_tensor, 'tensor model.layers.0.self_attn.q_proj.weight: its bytes are not those'
    ),
    'a shard swapped': (swap_shards, 'its file is model-00002-of-00003.safetensors, in the base model-00001-of-00003'),
    'a config key': (change_config, 'file config.json: its keys rms_norm_eps differ from the base'),
    'a blank': (change_blank, 'file tokenizer_config.json: its bytes differ from the base'),
    'generation settings': (change_settings, 'file generation_config.json: its keys'),
    'a dtype': (cast, 'its dtype is F16, in the base BF16'),
    'a lost tensor': (drop_mtp, 'tensor mtp.layers.0.weight: only the base has it'),
    'a lost file': (lambda folder: (folder / 'LICENSE').unlink(), 'file LICENSE: only the base has it'),
    'a further file': (lambda folder: (folder / 'vocab.json').touch(), 'vocab.json: only the merged folder has it'),
}  # fmt: skip


@pytest.mark.parametrize('name', FOUND)
def test_each_difference_from_the_base_is_found_and_named(
    name: str, base: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FOUND[name]
    folder = tmp_path / 'merged'
    shutil.copytree(merged, folder)
    assert same.main([str(folder), str(base)]) == 0
    assert capsys.readouterr().out.startswith('same: 4 tensors changed, 20 identical to the byte; 5 files identical')
    change(folder)
    assert same.main([str(folder), str(base)]) == 1
    assert message in capsys.readouterr().out


def test_a_folder_without_a_record_of_merging_differs_in_its_trained_tensors(
    base: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(merged, tmp_path / 'merged')
    (tmp_path / 'merged' / 'merge.json').unlink()
    assert same.main([str(tmp_path / 'merged'), str(base)]) == 1
    out = capsys.readouterr().out
    assert out.count('q_proj.weight: its bytes differ from the base') == 2
    assert out.splitlines()[-1].startswith('differs: 0 tensors changed, 20 identical to the byte')


def test_comparing_needs_two_folders_of_safetensors(
    base: Path, tmp_path: Path, problems: Callable[[], list[str]]
) -> None:
    assert same.main([str(base)]) == same.main([str(base), str(tmp_path / 'none')]) == 2
    assert problems() == [f'{tmp_path / "none"}: is not a folder. Give the merged folder and the folder of its base.']
    shutil.copytree(base, tmp_path / 'cut')
    file = tmp_path / 'cut' / 'model-00002-of-00003.safetensors'
    file.write_bytes(file.read_bytes()[:-1])
    assert same.main([str(tmp_path / 'cut'), str(base)]) == 2
    assert f'{file} cannot be read as safetensors: it is shorter than its header says.' in problems()[-1]
    file.write_bytes(b'\xff' * 100)
    assert same.main([str(tmp_path / 'cut'), str(base)]) == 2
    assert f'{file} cannot be read as safetensors: its header is longer than the file.' in problems()[-1]


def test_a_merge_that_is_cut_off_leaves_nothing_half(
    base: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, half = tmp_path / 'merged', tmp_path / '.merged.aside'
    target.mkdir()
    (target / 'mark').touch()

    def cut_off(*_: Any) -> None:
        assert len(list(half.glob('*.safetensors'))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr('utils.export.patch._bytes_of', cut_off)
    with pytest.raises(KeyboardInterrupt):
        merge(base, checkpoint, target)
    assert [file.name for file in target.iterdir()] == ['mark'] and not half.exists()

    # A killed process cannot clean up. Its folder is hidden and replaced by the next merge.
    monkeypatch.undo()
    half.mkdir()
    (half / 'model-00001-of-00003.safetensors').write_bytes(b'half')
    merge(base, checkpoint, target)
    assert same.main([str(target), str(base)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ['merged']


def test_a_copy_that_differs_from_the_base_is_not_put_in_place(
    base: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_badly(patch: Patch, folder: Path) -> dict[str, str]:
        hashes = write_patched(patch, folder)
        change_byte(folder)
        return hashes

    monkeypatch.setattr('utils.export.write.write_patched', copy_badly)
    with pytest.raises(ConfigError, match='not copied correctly from .*vision_tower.count: its bytes differ'):
        merge(base, checkpoint, tmp_path / 'merged')
    assert not list(tmp_path.iterdir())

"""A merged folder is compared before it is renamed into place, and each mutation of it is refused with its message."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import llm_infer
from tests.support.templates import chat
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.errors import ConfigError
from utils.encode.jinja import serving_template
from utils.encode.make import make_encoder
from utils.export import same
from utils.export.merge import (
    Expected,
    _share_of_adapter,
    expect,
    merge_and_save,
    merge_checkpoint,
    probe_logits,
    put_in_place,
    verify_merged,
)
from utils.export.patch import Kept
from utils.export.write import Written, write_merged
from utils.model import load_model, load_tokenizer
from utils.preprocess import TEMPLATE_MAPPING
from utils.proofs.template import probes
from utils.run.record import RunRecord

Run = Callable[..., Path]
# A folder, what it must have, and how it was written.
Saved = tuple[Path, Expected, Written]
CONFIG = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=[2, 4], pad_token_id=5, bos_token_id=1)
TEXTS = [None, [3, 40, 41, 42, 4]]


def adapted() -> Any:
    """Return a tiny model with an adapter that changes it."""
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=['q_proj', 'v_proj', 'down_proj']))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Return a folder written by merging."""
    model, tokenizer = adapted(), make_tokenizer()
    expected = expect(model, tokenizer, TEXTS, CONFIG, None)
    assert float((expected.wanted[0] - probe_logits(make_model().eval(), tokenizer)).abs().max()) > 0.01
    written = write_merged(
        model,
        tmp_path / 'merged',
        tokenizer=tokenizer,
        images=None,
        settings=CONFIG,
        record=RunRecord(),
        base=None,
        probe=lambda merged: [probe_logits(merged, tokenizer, ids=ids) for ids in TEXTS],
    )
    return tmp_path / 'merged', expected, written


def fault(saved: Saved) -> str | None:
    return verify_merged(*saved)[2]


def swap_two_weights(folder: Path) -> None:
    file = folder / 'model.safetensors'
    weights = load_file(file)
    first, second = 'model.layers.0.self_attn.k_proj.weight', 'model.layers.1.self_attn.k_proj.weight'
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, file, metadata={'format': 'pt'})


def swap_two_numbers(folder: Path) -> None:
    file = folder / 'model.safetensors'
    weights = load_file(file)
    weight = weights['model.layers.0.self_attn.k_proj.weight']
    order = weight[0].argsort()
    small, great = int(order[len(order) // 2]), int(order[len(order) // 2 + 2])  # close in value
    weight[0, [small, great]] = weight[0, [great, small]]
    save_file(weights, file, metadata={'format': 'pt'})


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return change


def change_template(folder: Path) -> None:
    file = folder / 'chat_template.jinja'
    file.write_text(file.read_text().replace('<|im_end|>', ' <|im_end|>', 1))


def add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(['<new>'])
    tokenizer.save_pretrained(folder)


MUTATIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    'two weights swapped': (swap_two_weights, 'differ from those of base + adapter by up to'),
    'two numbers of a weight swapped': (swap_two_numbers, 'differ from those of the model that was written by up to'),
    'head tied': (
        change_json('config.json', tie_word_embeddings=True),
        'the output head is tied in the model or in the merged folder, but not in both',
    ),
    'no stop token': (change_json('generation_config.json', eos_token_id=2), 'has other generation settings'),
    'template': (change_template, 'has another chat template'),
    'added token': (add_token, 'has another vocabulary'),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('lost', [False, True])
def test_a_small_adapter_that_is_lost_is_noticed_below_rounding(
    dtype: torch.dtype, lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        scale = 1.0 if 'lora_B' not in name else 0.06 if dtype == torch.bfloat16 else 5e-4
        parameter.data = (parameter.data * scale).to(dtype)
    if lost:
        monkeypatch.setattr(LoraModel, 'merge_and_unload', lambda self, **_: self.unload())
        with pytest.raises(
            ConfigError, match='removed the effect of the adapter .remaining: 0%.. Merge with --dtype fp32'
        ):
            merge_and_save(model, make_tokenizer(), tmp_path / 'm', record=RunRecord())
        assert not (tmp_path / 'm').exists()
    else:
        merge_and_save(model, make_tokenizer(), tmp_path / 'm', record=RunRecord())
        assert (tmp_path / 'm').is_dir()


@pytest.mark.parametrize('held', [1.0, 0.8])
def test_what_rounding_takes_of_an_adapter_is_a_warning(
    held: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bare, noise = torch.zeros(100), torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert _share_of_adapter(bare, bare + 1, bare + 0.4) == pytest.approx(0.4)
    assert _share_of_adapter(bare, bare + 1e-3, noise) == _share_of_adapter(bare, bare, bare) == 1.0
    monkeypatch.setattr('utils.export.merge._share_of_adapter', lambda *_: held)
    says = '; '.join(merge_and_save(adapted(), make_tokenizer(), tmp_path / 'm', record=RunRecord()))
    assert re.search(
        r'its logits differ from those of base \+ adapter by up to [\d.e-]+ on a fixed text and 0 of', says
    )
    assert re.search(r'rounding explains up to [\d.e-]+ \(largest logit [\d.]+\); it has their vocabulary', says)
    part = 'removed a part of the adapter: 80% of its effect on the logits is kept'
    assert (f'rounding {part}' in says) == (held == 0.8)
    warned = f'{tmp_path / "m"}: rounding to float32 {part}. Merge with --dtype fp32, which keeps all of it.'
    assert [record.getMessage() for record in caplog.records if record.levelname == 'WARNING'] == [warned] * (
        held == 0.8
    )


@pytest.mark.slow
def test_changes_below_the_rounding_of_the_base_are_a_warning(
    run_sft: Run, model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / 'base'
    load_model(model_dir, torch_dtype=torch.bfloat16).save_pretrained(base)
    load_tokenizer(model_dir).save_pretrained(base)
    run = run_sft('--model_id_or_path', str(base), '--max_steps', '1', '--learning_rate', '1e-5', '--dtype', 'bf16')
    words = ['--ckpt_dir', str(run / 'checkpoint-1'), '--merge_lora_and_save', 'true']
    assert llm_infer.main(words) == 0
    found = re.search(
        r'checkpoint-1-merged: rounding to bfloat16 removed a part of the adapter: (\d+)% of the changes that it makes '
        r'to the weights is kept\. Merge with --dtype fp32, which keeps all of it\.',
        caplog.text,
    )
    assert found is not None and int(found[1]) < 95
    assert f'{found[1]}% of the changes' in json.loads((run / 'proofs.json').read_text())['merge']['says']
    caplog.clear()
    assert llm_infer.main([*words, '--dtype', 'fp32']) == 0
    assert 'removed a part' not in caplog.text
    assert max(map(len, caplog.text.splitlines())) < 300, 'one fact in a line'


def test_the_share_of_changes_that_rounding_keeps_is_exact() -> None:
    kept = Kept()
    kept.count(torch.zeros(3), torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]))
    assert kept.share() == pytest.approx(5 / 6)
    kept.count(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))
    assert kept.share() == pytest.approx(5 / 6) and Kept().share() == 1.0


def test_an_untouched_folder_passes(saved: Saved) -> None:
    assert fault(saved) is None


@pytest.mark.parametrize('name', MUTATIONS)
def test_a_changed_folder_is_refused(name: str, saved: Saved) -> None:
    change, message = MUTATIONS[name]
    change(saved[0])
    found = fault(saved)
    assert found is not None and message in found


def test_an_earlier_folder_stays_until_a_complete_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / 'checkpoint-1-merged'
    target.mkdir()
    (target / 'mark').touch()
    monkeypatch.setattr('utils.export.merge.verify_merged', lambda *_: (1.0, 1.0, 'it differs.'))
    with pytest.raises(ConfigError, match='-merged: not written, because it differs. The rejected model is kept in '):
        merge_and_save(adapted(), make_tokenizer(), target, record=RunRecord())
    assert [f.name for f in target.iterdir()] == ['mark']
    monkeypatch.undo()
    merge_and_save(adapted(), make_tokenizer(), target, record=RunRecord())
    assert (target / 'model.safetensors').is_file() and not (target / 'mark').exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ['checkpoint-1-merged'], 'no temporary folder remains'


def test_merging_again_keeps_what_the_user_wrote_into_the_folder(tmp_path: Path) -> None:
    target, made = tmp_path / 'm', tmp_path / 'new'
    theirs = ['infer_result.jsonl', 'check_server.json', 'q8.gguf', 'q8.Modelfile']
    for folder, names in (
        (target, ['config.json', 'model.safetensors', 'old.safetensors', *theirs]),
        (made, ['config.json']),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    assert same.carried_files(target) == ['config.json'], 'answers are no part of a model'
    put_in_place(made, target)
    assert sorted(file.name for file in target.iterdir()) == sorted(['config.json', *theirs])
    assert (target / 'config.json').read_text() == 'new'


def test_a_replacement_cut_off_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    target, earlier = tmp_path / 'm', tmp_path / '.m.replaced'
    earlier.mkdir()
    (earlier / 'mark').touch()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / 'gone', target)
    assert (target / 'mark').is_file(), 'the earlier folder has its name again'
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / 'gone', target)
    assert (target / 'mark').is_file()


@pytest.mark.slow
def test_merging_a_run_compares_its_own_rows_and_says_how_to_serve(
    run_sft: Run, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_sft('--max_steps', '2', '--report_samples', '3')
    checkpoint = run / 'checkpoint-2'
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    proof = json.loads((run / 'proofs.json').read_text())['merge']
    assert proof['passed'] and 'on a fixed text and 3 of your rows' in proof['says']
    assert f'vllm serve {checkpoint}-merged' in caplog.text and 'transformers serve' in caplog.text
    assert '14 tensors changed, 7 identical to the byte' in proof['says']
    assert f'python -m utils.export.same {checkpoint}-merged {model_dir}' in caplog.text
    assert same.main([f'{checkpoint}-merged', str(model_dir)]) == 0
    settings = json.loads((run / 'checkpoint-2-merged' / 'generation_config.json').read_text())
    assert settings['eos_token_id'] == [2, 4] and 'temperature' not in settings


BASE_SETTINGS = {'eos_token_id': [2, 5, 7], 'pad_token_id': 5, 'do_sample': True, 'temperature': 0.6, 'top_k': 64}


@pytest.mark.slow
@pytest.mark.parametrize(('typed', 'changed'), [((), {}), (('--temperature', '0.2'), {'temperature': 0.2})])
def test_a_merged_folder_keeps_the_ends_and_the_sampling_of_its_base(
    typed: tuple[str, ...], changed: dict[str, float], run_sft: Run, model_dir: Path, tmp_path: Path
) -> None:
    base = tmp_path / 'base'
    shutil.copytree(model_dir, base)
    (base / 'generation_config.json').write_text(json.dumps(BASE_SETTINGS))
    checkpoint = run_sft('--model_id_or_path', str(base), '--max_steps', '1') / 'checkpoint-1'
    words = ['--ckpt_dir', str(checkpoint), *typed]
    assert llm_infer.main([*words, '--merge_lora_and_save', 'true']) == 0
    settings = json.loads((checkpoint.with_name('checkpoint-1-merged') / 'generation_config.json').read_text())
    wanted = {**BASE_SETTINGS, 'eos_token_id': [2, 4, 5, 7], 'bos_token_id': 1, 'max_new_tokens': 2048, **changed}
    assert {name: settings[name] for name in wanted} == wanted and 'top_p' not in settings
    assert llm_infer.main([*words, '--max_new_tokens', '2']) == 0
    assert json.loads((checkpoint / 'generation_config.json').read_text())['eos_token_id'] == [2, 4, 5, 7]


@pytest.mark.slow
def test_a_base_that_does_not_sample_is_saved_as_such(run_sft: Run, model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / 'base'
    shutil.copytree(model_dir, base)
    (base / 'generation_config.json').write_text(
        json.dumps({'eos_token_id': 2, 'do_sample': False, 'temperature': 0.6})
    )
    run = run_sft('--model_id_or_path', str(base), '--max_steps', '1', '--sft_type', 'full')
    settings = json.loads((run / 'checkpoint-1' / 'generation_config.json').read_text())
    assert settings['do_sample'] is False and settings.get('temperature') is None


SERVED = [name for name, template in TEMPLATE_MAPPING.items() if template is not None and 'chatglm2' not in name]


@pytest.mark.parametrize('name', SERVED)
def test_a_registered_template_is_carried_in_jinja_with_the_same_ids(name: str) -> None:
    # Baichuan's template has ids 195 and 196, which are ordinary text in this tokenizer: Jinja cannot produce them.
    encoder = make_encoder(make_tokenizer(), template_type=name, system='be kind', system_typed=False, max_length=-1)
    jinja, how = serving_template(encoder, probes())
    if name == 'baichuan':
        assert jinja is None and 'in Jinja gives different ids (probe: one turn)' in how
        return
    conversations = 7 if TEMPLATE_MAPPING[name].chat_sep is None else 10
    assert how == f"template '{name}' was written into its chat template: the same ids on {conversations} conversations"


def test_a_prompt_longer_than_max_length_does_not_hide_that_the_jinja_template_is_the_same() -> None:
    encoder = make_encoder(make_tokenizer(), template_type='chatml', system='s', system_typed=False, max_length=8)
    jinja, how = serving_template(encoder, [chat('a long question ' * 9, 'yo')])
    assert jinja is not None and how.endswith('the same ids on 1 conversations')


def test_the_merged_folder_of_a_registered_template_carries_it(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    encoder = make_encoder(tokenizer, template_type='chatml', system='be kind', system_typed=False, max_length=-1)
    target, says = merge_checkpoint(adapted(), encoder, CONFIG, tmp_path / 'checkpoint-1', record=RunRecord())
    assert "template 'chatml' was written into its chat template" in says
    served = AutoTokenizer.from_pretrained(target)
    for row in (row for row in probes() if 'tool_calls' not in row.messages[-1]):
        ids = served.apply_chat_template(row.messages[:-1], add_generation_prompt=True, return_dict=False)
        assert ids == encoder.encode_prompts([row])[0]
    shutil.rmtree(target)

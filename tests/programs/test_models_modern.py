"""Models with their own chat template: every native class trains with its entry, every template is read correctly."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.modern_models import (
    ENDS,
    PLAIN,
    SEEING,
    make_modern,
    saved_model,
    template_folder,
    template_tokenizer,
)
from tests.support.runs import small_flags, write_jsonl
from tests.support.tiny_models import make_tokenizer
from tools import docs
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import ADDED_END, FULL_DIFFERS, RENDERED_DIFFERENTLY, Encoded
from utils.formats.conversation import Message, Row
from utils.loading.info import LoadOptions
from utils.loading.opening import get_text_model_tokenizer, open_entry
from utils.model import MODEL_MAPPING, infer_model_type
from utils.preprocess import AUTO
from utils.train.prepare import find_targets, prepare_model


def train_and_merge(key: str, folder: Path, data: Path, *more: str) -> tuple[str, dict[str, Any], list[str]]:
    """Train 5 steps and merge with the programs. Returns class, adapter config and names of its tensors.

    Checks that the loss falls and that the merged folder, opened by plain transformers, equals base + adapter.
    """
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    import llm_infer
    import llm_sft
    from utils.export.merge import probe_logits

    out = folder.parent / 'out'
    flags = ['--max_steps', '5', '--eval_steps', '2', '--save_steps', '5', '--learning_rate', '0.02']
    flags += ['--gradient_accumulation_steps', '1', *more]
    assert llm_sft.main([*small_flags(folder, data, out), *flags]) == 0, key
    checkpoint = next(out.glob(f'{key}/v0-*')) / 'checkpoint-5'
    state = json.loads((checkpoint / 'trainer_state.json').read_text())
    losses = [entry['eval_loss'] for entry in state['log_history'] if 'eval_loss' in entry]
    assert len(losses) == 3 and losses[-1] < losses[0], (key, losses)

    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0, key
    merged = AutoModelForCausalLM.from_pretrained(f'{checkpoint}-merged').eval()
    info, options = MODEL_MAPPING[key], LoadOptions(torch_dtype=torch.float32)
    base, tokenizer = open_entry(folder, info, options)
    before = probe_logits(base.eval(), tokenizer)
    trained = probe_logits(PeftModel.from_pretrained(base, checkpoint).eval(), tokenizer)
    after = probe_logits(merged, tokenizer)
    assert (after - trained).abs().max() < 1e-4 * trained.abs().max() < (trained - before).abs().max(), key
    with safe_open(checkpoint / 'adapter_model.safetensors', 'pt') as adapter:
        names = list(adapter.keys())
    config = json.loads((checkpoint / 'adapter_config.json').read_text())
    if not config['target_parameters']:
        stated = json.loads((checkpoint.with_name('checkpoint-5-merged') / 'merge.json').read_text())
        assert len(stated['tensors']) == len(names) // 2, 'only the adapted weights of the base were written anew'
    return type(base).__name__, config, names


@pytest.mark.slow
@pytest.mark.parametrize('key', [*PLAIN, *SEEING])
def test_every_class_trains_merges_and_reloads_with_its_entry(key: str, tmp_path: Path, data_file: Path) -> None:
    info = MODEL_MAPPING[key]
    found, config, names = train_and_merge(key, saved_model(key, tmp_path), data_file)
    assert found == info.model_class
    assert sorted(config['target_modules']) == sorted(info.lora_target_modules) and not config['target_parameters']
    adapted = {name.split('.lora_')[0].rsplit('.', 1)[1] for name in names}
    assert adapted == set(info.lora_target_modules), 'each name is that of a layer'
    layers = {int(re.findall(r'\.layers\.(\d+)\.', name)[0]) for name in names}
    assert layers == set(range(4 if key == 'gemma4-e2b-it' else 2)), 'no layer is left out'
    assert not [name for name in names if 'vision' in name or 'audio' in name], 'towers are left alone'


def packed_gpt_oss(parent: Path) -> tuple[Path, Any]:
    """Return a folder in the layout of the hub, experts packed as MXFP4, and the same model in bf16."""
    import torch
    from safetensors.torch import load_file, save_file

    key, file = 'gpt-oss-20b', 'model.safetensors'
    folder, model = saved_model(key, parent), make_modern(key).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([steps, -steps])
    state = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / file).items()}
    for name, parameter in model.named_parameters():
        if name in state and parameter.ndim == 3:
            experts, rows, columns = parameter.shape
            codes = torch.randint(0, 16, (experts, columns, rows // 32, 32), generator=generator)
            scales = torch.randint(121, 125, codes.shape[:3], generator=generator)
            weight = values[codes] * 2.0 ** (scales - 127)[..., None]
            parameter.data = weight.reshape(experts, columns, rows).transpose(1, 2).contiguous().to(torch.bfloat16)
            state[f'{name}_blocks'] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
            state[f'{name}_scales'] = scales.to(torch.uint8)
            del state[name]
    save_file(state, folder / file, {'format': 'pt'})
    config = json.loads((folder / 'config.json').read_text())
    plain = ['model.layers.*.self_attn', 'model.layers.*.mlp.router', 'model.embed_tokens', 'lm_head']
    config['quantization_config'] = {'quant_method': 'mxfp4', 'modules_to_not_convert': plain}
    (folder / 'config.json').write_text(json.dumps(config))
    return folder, model


@pytest.mark.slow
@pytest.mark.parametrize('key', ['qwen3-30b-a3b', 'gemma4-26b-a4b-it', 'gpt-oss-20b', 'qwen3-next-80b-a3b-instruct'])
def test_experts_train_merge_and_reload_as_parameters(key: str, tmp_path: Path, data_file: Path) -> None:
    folder = packed_gpt_oss(tmp_path)[0] if key == 'gpt-oss-20b' else saved_model(key, tmp_path)
    flags = ['--lora_target_modules', 'q_proj', 'experts.gate_up_proj', 'experts.down_proj']
    checkpointing = ['--gradient_checkpointing', 'true'] if key == 'qwen3-30b-a3b' else []
    _, config, names = train_and_merge(key, folder, data_file, *flags, *checkpointing)
    below = '' if key.startswith('gemma4') else 'mlp.'
    assert config['target_modules'] == ['q_proj']
    assert sorted(config['target_parameters']) == [f'{below}experts.down_proj', f'{below}experts.gate_up_proj']
    assert len([name for name in names if '.experts.' in name]) == 2 * 2 * 2, '2 layers, 2 parameters, A and B'


@pytest.mark.parametrize(('key', 'width'), [('qwen3-30b-a3b', 16), ('gpt-oss-20b', 64), ('gemma4-26b-a4b-it', 16)])
def test_adapters_of_experts_have_the_names_and_shapes_that_vllm_stacks(
    key: str, width: int, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from peft import get_peft_model_state_dict

    words = ['q_proj', 'experts.down_proj', 'experts.gate_up_proj']
    model = make_modern(key)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if '.experts.' in name}
    prepared = prepare_model(model, SftArguments(lora_target_modules=words, lora_rank=3, lora_alpha=6))
    assert 'the adapter of the experts has the names and shapes that vLLM loads' in caplog.text
    for name, parameter in prepared.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    stored = {n.removeprefix('base_model.model.'): t for n, t in get_peft_model_state_dict(prepared).items()}
    after = prepared.merge_and_unload().state_dict()

    experts = {name.rpartition('.')[0] for name in before}
    assert len(experts) == 2, 'one in each layer'
    for path in experts:
        # vLLM's layout: (experts x rank, in) and (out, rank x experts); the inner one is that of gate_up_proj.
        for place, name, shape in (('.base_layer', 'gate_up_proj', (2 * width, 32)), ('', 'down_proj', (32, width))):
            lora_a = stored[f'{path}{place}.lora_A.weight'].reshape(4, 3, -1)
            lora_b = stored[f'{path}{place}.lora_B.weight'].reshape(shape[0], 3, 4).permute(2, 0, 1)
            change = 2 * lora_b @ lora_a
            assert change.shape == (4, *shape)
            found = after[f'{path}.{name}'] - before[f'{path}.{name}']
            assert torch.allclose(found if key != 'gpt-oss-20b' else found.transpose(1, 2), change, atol=1e-5)


def test_an_adapter_of_experts_that_vllm_does_not_load_is_said(caplog: pytest.LogCaptureFixture) -> None:
    prepare_model(make_modern('qwen3-30b-a3b'), SftArguments(lora_target_modules=['experts.down_proj']))
    assert 'vLLM cannot load the adapter of this run' in caplog.text
    assert 'but LoRA is on mlp.experts.down_proj only. Name both' in caplog.text


def test_packed_experts_open_to_their_values(tmp_path: Path) -> None:
    import torch

    folder, expected = packed_gpt_oss(tmp_path)
    info, ids = MODEL_MAPPING['gpt-oss-20b'], torch.tensor([[1, 7, 9, 20, 33, 250]])
    options = LoadOptions(torch_dtype=torch.bfloat16)
    with torch.no_grad():
        model, tokenizer = open_entry(folder, info, options)
        assert torch.equal(model(ids).logits, expected(ids).logits)
        model.save_pretrained(tmp_path / 'unpacked')
        tokenizer.save_pretrained(tmp_path / 'unpacked')
        again = open_entry(tmp_path / 'unpacked', info, options)[0]
        assert torch.equal(again(ids).logits, expected(ids).logits), 'saved, it opens as any model does'
    with pytest.raises(ConfigError, match='packed in 4 bits already'):
        open_entry(folder, info, replace(options, quantization_config='any'))


def test_targets_are_found_by_name_experts_included() -> None:
    model = make_modern('qwen3-30b-a3b')
    attention, up, down = ['k_proj', 'o_proj', 'q_proj', 'v_proj'], 'mlp.experts.gate_up_proj', 'mlp.experts.down_proj'
    assert find_targets(model, ['ALL']) == (attention, []), 'experts are parameters, no linear layers'
    assert find_targets(model, ['ALL', down]) == (attention, [down])
    assert find_targets(model, ['gate_up_proj', 'q_proj']) == (['q_proj'], [up])
    with pytest.raises(ConfigError, match=f"'mlp.expert.gate_up_proj' matches no linear .* did you mean '{up}'"):
        find_targets(model, ['q_proj', 'mlp.expert.gate_up_proj'])
    args = SftArguments(lora_target_modules=[up], lora_dropout_p=0.1)
    with pytest.raises(ConfigError, match=rf'--lora_dropout_p 0.1 is not possible on expert parameters \({up}\)'):
        prepare_model(model, args)


def test_names_that_peft_would_put_on_the_experts_are_not_put_there(caplog: pytest.LogCaptureFixture) -> None:
    model, checked = make_modern('qwen3-next-80b-a3b-instruct'), 0
    modules, parameters = find_targets(model, ['ALL'])
    assert 'in_proj_ba' in modules and not parameters and not {'gate_proj', 'up_proj', 'down_proj'} & set(modules)
    assert 'ALL puts no LoRA on the linear layers down_proj, gate_proj, up_proj' in caplog.text
    with pytest.raises(ConfigError, match='up_proj: PEFT cannot put LoRA on these linear layers of Qwen3Next'):
        find_targets(model, ['q_proj', 'up_proj'])
    with pytest.raises(ConfigError, match='up_proj: PEFT cannot put LoRA on these linear layers of Qwen3Next'):
        find_targets(model, ['q_proj', r're:.*\.up_proj'])
    with pytest.raises(ConfigError, match='matches the whole path of no linear layer'):
        find_targets(model, ['q_proj', r're:.*\.up_projection'])
    for key in PLAIN:
        config = prepare_model(make_modern(key), SftArguments(lora_target_modules=['ALL'])).peft_config['default']
        assert not config.target_parameters, key
        checked += 1
    assert checked == 20


def test_entries_name_both_hubs_a_floor_and_their_template() -> None:
    modern = {key: info for key, info in MODEL_MAPPING.items() if info.requires}
    assert len(modern) >= 101 and set(PLAIN) | set(SEEING) <= set(modern)
    for key, info in modern.items():
        assert info.template == AUTO and key == key.lower(), key
        assert info.model_id_or_path.count('/') == 1 and str(info.hf_model_id).count('/') == 1, key
        assert [r.split('>=')[0] for r in info.requires] == ['transformers'], key
        assert infer_model_type(info.model_id_or_path) == infer_model_type(str(info.hf_model_id)) == key
        owner, name = info.public_id.split('/')
        for folder in (f'/models/{name}', f'/ms/models/{owner}/{name.replace(".", "___")}',
                       f'/hf/hub/models--{owner}--{name}/snapshots/0123abc'):  # fmt: skip
            assert infer_model_type(folder) == key, folder


def test_the_model_table_claims_what_the_tests_prove() -> None:
    from tests.support.old_models import GOLDENS, KEYS, NATIVE, SOURCES
    from tests.support.templates import GOLDEN
    from tests.support.vision_models import TEMPLATES

    trained = {MODEL_MAPPING[key].model_class for key in [*PLAIN, *SEEING, *TEMPLATES]}
    golden = {key.split('-')[0] for key in docs.GOLDEN_NATIVE}
    assert {name.split('-')[0] for name in NATIVE} == golden, 'Bloom and Llama with logits of the original code'
    claims: Counter[str] = Counter()
    for key, info in MODEL_MAPPING.items():
        claim = docs.proof(key, info)
        claims[claim] += 1
        if claim.startswith('golden'):
            assert (
                key in docs.GOLDEN_NATIVE or (GOLDENS / SOURCES[str(info.family)][0] / 'expected.safetensors').is_file()
            )
        elif info.requires:
            assert info.model_class in trained and claim == (
                'class and template' if info.chat_template else 'class only'
            )
            assert info.chat_template is None or info.chat_template in (*ENDS, *TEMPLATES.values()), key
        else:
            assert claim == 'class and template' and (key in KEYS or info.embedded), key
            assert info.template in GOLDEN
    assert claims == {'golden logits of the original code': 35, 'class and template': 70, 'class only': 44}
    assert len({docs.native_class(info) for info in MODEL_MAPPING.values() if info.requires}) == len(trained) == 25


@pytest.mark.parametrize('program', ['llm_sft', 'llm_infer'])
def test_an_old_transformers_is_refused_before_anything_is_fetched(
    program: str, monkeypatch: pytest.MonkeyPatch, problems: Callable[[], list[str]]
) -> None:
    import importlib

    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError('nothing may be fetched')

    installed = importlib.metadata.version
    monkeypatch.setattr(
        'importlib.metadata.version', lambda name: '4.57.1' if name == 'transformers' else installed(name)
    )
    monkeypatch.setattr('utils.hub.snapshot.find', fetched)
    main = importlib.import_module(program).main
    assert main(['--model_type', 'qwen3.5-4b', '--dataset', 'gone.jsonl']) == 2
    said = problems()
    assert (
        'this model needs transformers>=5.2.0, but 4.57.1 is installed. Run: pip install "transformers>=5.2.0"' in said
    )
    assert len(said) == 2, 'all problems at once'


@pytest.mark.parametrize('sharded', [False, True])
def test_the_language_model_alone_answers_as_the_whole_model(tmp_path: Path, sharded: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    ids, compared = torch.tensor([[1, 7, 9, 20, 33, 250]]), 0
    for key in ('gemma3-4b-it', 'gemma4-e2b-it', 'gemma4-26b-a4b-it', 'gemma4-12b-it'):
        whole = make_modern(key).eval()
        whole.generation_config = GenerationConfig(eos_token_id=[2, 4])
        whole.save_pretrained(tmp_path / key, max_shard_size='60KB' if sharded else '5GB')
        assert (tmp_path / key / 'model.safetensors.index.json').is_file() == sharded
        make_tokenizer().save_pretrained(tmp_path / key)
        info, options = MODEL_MAPPING[key], LoadOptions(torch_dtype=torch.float32)
        assert info.get_function is get_text_model_tokenizer
        alone = open_entry(tmp_path / key, info, options)[0].eval()
        assert type(alone).__name__ == type(whole).__name__.replace('ForConditionalGeneration', 'ForCausalLM')
        assert alone.generation_config.eos_token_id == [2, 4]

        alone.save_pretrained(tmp_path / f'{key}-alone')
        make_tokenizer().save_pretrained(tmp_path / f'{key}-alone')
        again = open_entry(tmp_path / f'{key}-alone', info, options)[0].eval()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f'{key}-alone').eval()
        with torch.no_grad():
            expected = whole(input_ids=ids).logits
            for model in (alone, again, plain):
                assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5 * expected.abs().max(), key
        compared += 1
    assert compared == 4


@pytest.mark.parametrize('kind', ['missing', 'mismatched'])
def test_a_checkpoint_without_its_language_model_is_refused(kind: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    key = 'gemma3-4b-it'
    make_modern(key).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    (name,) = (name for name in state if '.layers.1.self_attn.q_proj' in name)
    whole = state.pop(name)
    if kind == 'mismatched':
        state[name] = whole[:-1].contiguous()
    save_file(state, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(
        ConfigError, match=rf'Gemma3ForCausalLM, has 1 {kind} tensors: .*model.layers.1.self_attn.q_proj'
    ):
        get_text_model_tokenizer(tmp_path, MODEL_MAPPING[key], LoadOptions(torch_dtype=torch.float32))


# The text that is trained between the generation prompt and the reply: what the template prints there, or what closes
# the think block that its generation prompt opens.
LEADS = {
    'deepseek_r1_distill': '</think>\n\n', 'deepseekv3': '</think>\n\n', 'glm4moe': '\n<think></think>\n',
    'gptoss': '<|channel|>final<|message|>', 'muse_glimmer': ' to=user<|message|>',
    'nemotron_3_5_lightning': '</think>', 'nemotron_3_nano': '</think>', 'nemotron_3_super': '</think>',
    'nemotron_3_ultra': '</think>', 'qwen3': '<think>\n\n</think>\n\n', 'qwen3_5_think': '\n</think>\n\n',
    'qwen3_6': '\n</think>\n\n', 'qwen3_8': '\n</think>\n\n',
}  # fmt: skip
THINKING = [name for name, lead in LEADS.items() if 'think' in lead]
# These open a think block at inference but print none, or another, around a reply: the difference is noted.
UNLIKE_THEIR_PROMPT = {'deepseek_r1_distill', 'deepseekv3', *(name for name in LEADS if name.startswith('nemotron'))}
NOTES = {**{name: [FULL_DIFFERS] for name in UNLIKE_THEIR_PROMPT}, 'glm4moe': [ADDED_END]}
# Vision models whose content is always a list of parts, never a text.
NEED_PARTS = {'idefics3', 'llava_next', 'smolvlm'}
NO_SYSTEM = {'gemma'}
CHATS: list[list[str]] = [
    ['hi', 'yo'],
    ['what is 7 and 3?', 'the answer is 10.', '你好', '你好，世界'],
    ['a', 'b', 'name a colour', 'blue', 'and {"key": [1, 2]}?', 'red, green\n\n- yellow'],
]


def conversation(texts: list[str], system: str | None = None) -> list[Message]:
    """Return alternating turns of user and assistant."""
    turns: list[Message] = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]
    return [{'role': 'system', 'content': system}, *turns] if system else turns


def conversations(name: str) -> list[list[Message]]:
    """Return the chats for testing a template; some have a system text if the template supports it."""
    return [conversation(texts, s) for s in (None, *(['be brief'] if name not in NO_SYSTEM else [])) for texts in CHATS]


def ids_of(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Return what transformers renders for a chat; GLM's template prints no end, so the next turn's token is added."""
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)['input_ids']
    return ids + [tokenizer.convert_tokens_to_ids('<|user|>')] * ('[gMASK]' in tokenizer.chat_template)


def check_row(name: str, tokenizer: Any, messages: list[Message], said: str) -> Encoded:
    """Check that a row is the generation prompt, then `said` and the end, and that only these two are trained."""
    encoder = AutoEncoder(tokenizer, system=None, max_length=-1)
    row = Row(messages=messages, origin='test:1')
    encoded = encoder.encode([row])[0]
    start, stop = encoded.trained
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert encoded.input_ids[:start] == encoder.encode_prompts([row])[0]
    assert tokenizer.decode(encoded.input_ids[:start]) == prompt
    assert tokenizer.decode(encoded.input_ids[start:stop]) == said + ENDS[name]
    assert encoder.stop_ids[0] == tokenizer.convert_tokens_to_ids(ENDS[name])
    return encoded


def test_every_text_template_of_trl_is_tried() -> None:
    there = {path.stem for path in template_folder().glob('*.jinja') if not path.stem.endswith('_training')}
    assert there == set(ENDS) | NEED_PARTS and len(there) == 41


@pytest.mark.parametrize('name', ENDS)
def test_auto_gives_the_ids_of_the_models_own_template(name: str) -> None:
    tokenizer, checked = template_tokenizer(name), 0
    for messages in conversations(name):
        encoded = check_row(name, tokenizer, messages, LEADS.get(name, '') + messages[-1]['content'])
        whole = ids_of(tokenizer, messages)
        assert encoded.notes == NOTES.get(name, [])
        assert (encoded.input_ids == whole) == (name not in UNLIKE_THEIR_PROMPT)
        checked += 1
    assert checked == (3 if name in NO_SYSTEM else 6)


@pytest.mark.parametrize('name', THINKING)
def test_a_reply_that_reasons_takes_the_place_of_the_empty_think_block(name: str) -> None:
    tokenizer, checked = template_tokenizer(name), 0
    reasoning = '<think>because</think>\n' if name == 'glm4moe' else '<think>\nbecause\n</think>\n\n'
    for messages in conversations(name):
        answer = messages[-1]['content']
        thought: list[Message] = [*messages[:-1], {'role': 'assistant', 'content': reasoning + answer}]
        opened = '<think>\n' if name.startswith(('deepseek', 'nemotron', 'qwen3_')) else ''
        opening = '\n' if name == 'glm4moe' else ''
        encoded = check_row(name, tokenizer, thought, opening + (reasoning + answer).removeprefix(opened))
        # DeepSeek's template drops reasoning; Qwen3.8's reads it from a separate field.
        own: Any = [*messages[:-1], {'role': 'assistant', 'content': answer, 'reasoning_content': 'because'}]
        whole = ids_of(tokenizer, own if name == 'qwen3_8' else thought)
        assert (encoded.input_ids == whole) != name.startswith('deepseek')
        noted = {'deepseek_r1_distill': [FULL_DIFFERS], 'deepseekv3': [FULL_DIFFERS]}
        noted |= {'qwen3_8': [RENDERED_DIFFERENTLY], 'glm4moe': [ADDED_END]}
        assert encoded.notes == noted.get(name, [])
        checked += 1
    assert checked == 6


def test_a_call_is_trained_with_the_text_and_the_empty_think_block_before_it() -> None:
    tokenizer = template_tokenizer('qwen3')
    call = {'type': 'function', 'function': {'name': 'look', 'arguments': {'at': 'it'}}}
    last: Message = {'role': 'assistant', 'content': 'I look.', 'tool_calls': [call]}
    row = Row(messages=[{'role': 'user', 'content': 'hi'}, last], origin='test:1')
    encoder = AutoEncoder(tokenizer, system=None, max_length=-1)
    encoded = encoder.encode([row])[0]
    start, stop = encoded.trained
    assert encoded.input_ids[:start] == encoder.encode_prompts([row])[0]
    assert tokenizer.decode(encoded.input_ids[:start]).endswith('<|im_start|>assistant\n')
    trained = tokenizer.decode(encoded.input_ids[start:stop])
    said = 'I look.\n<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
    assert trained == f'<think>\n\n</think>\n\n{said}<|im_end|>'


@pytest.mark.parametrize('reasons', [False, True])
def test_inference_asks_as_the_template_does(tmp_path: Path, model_dir: Path, reasons: bool) -> None:
    import llm_infer
    import llm_sft

    folder = shutil.copytree(model_dir, tmp_path / 'model')
    source = (template_folder() / 'qwen3.jinja').read_text(encoding='utf-8')
    (folder / 'chat_template.jinja').write_text(source, encoding='utf-8')
    block = '<think>\nbecause\n</think>\n\n'
    rows = [{'query': f'{i}?', 'response': block * (reasons and i == 7) + str(i)} for i in range(20)]
    data = write_jsonl(tmp_path / 'rows.jsonl', rows)
    assert llm_sft.main([*small_flags(folder, data, tmp_path / 'out'), '--max_steps', '1', '--eval_steps', '1']) == 0
    checkpoint = next((tmp_path / 'out').glob('*/*')) / 'checkpoint-1'
    prompts: list[str] = []

    def seen(model: Any, tokenizer: Any, encoder: AutoEncoder, *_: Any, **__: Any) -> None:
        row = Row(messages=[*conversation(['hi']), {'role': 'assistant', 'content': ''}])
        prompts.append(tokenizer.decode(encoder.encode_prompts([row])[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('utils.infer.chat.chat', seen)
        for model in (['--ckpt_dir', str(checkpoint)], ['--model_id_or_path', str(folder)]):
            assert llm_infer.main([*model, '--eval_human', 'true', '--dtype', 'fp32']) == 0
    ask = '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'
    assert prompts == [ask, ask], 'the generation prompt, whatever was trained'

"""Llama-like and simple families of 2023: golden outputs of the original code, variants, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.old_models import NATIVE
from tests.support.runs import ROOT
from utils.base.errors import ConfigError
from utils.loading.legacy.families.baichuan import BAICHUAN2_7B, BAICHUAN_7B, normalise_rows
from utils.loading.legacy.families.internlm import INTERNLM
from utils.loading.legacy.families.polylm import POLYLM
from utils.loading.legacy.families.xverse import XVERSE
from utils.loading.legacy.family import Config, Family, State
from utils.loading.legacy.opening import open_original
from utils.model import load_model

GOLDENS = ROOT / 'tests' / 'goldens'
FAMILIES = {
    'internlm-a': INTERNLM, 'xverse-a': XVERSE, 'baichuan7b-a': BAICHUAN_7B, 'baichuan2_7b-a': BAICHUAN2_7B,
    'polylm-a': POLYLM,
}  # fmt: skip
NAMES = [*FAMILIES, *NATIVE]
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The outputs of the original code for a plain and a left-padded batch."""

    ids: Any
    logits: Any
    padded_ids: Any
    mask: Any
    padded_logits: Any
    prompt: int
    generated: Any
    padded_generated: Any


def expected(name: str) -> Expected:
    """Return the recorded outputs under common names; `generated` holds only the new tokens."""
    found = load_file(GOLDENS / name / 'expected.safetensors')
    old = 'logits_leftpad' in found
    prompt = 16 if old else found['input_ids'].shape[1]
    skipped = prompt if old else 0
    return Expected(
        ids=found['input_ids'],
        logits=found['logits'],
        padded_ids=found['input_ids_leftpad' if old else 'padded_input_ids'],
        mask=found['attention_mask_leftpad' if old else 'attention_mask'],
        padded_logits=found['logits_leftpad' if old else 'padded_logits'],
        prompt=prompt,
        generated=found['generated'][:, skipped:],
        padded_generated=found['generated_leftpad' if old else 'padded_generated'][:, skipped:],
    )


def open_folder(name: str, folder: Path | None = None, **options: Any) -> Any:
    """Return the model of a golden folder, or of a variant of it, in fp32 and eval mode."""
    folder = folder or GOLDENS / name
    if name in NATIVE:
        return load_model(folder, torch_dtype=torch.float32).eval()
    return open_original(FAMILIES[name], folder, **{'dtype': torch.float32, **options}).eval()


def read_golden(name: str) -> tuple[dict[str, Any], State]:
    config = json.loads((GOLDENS / name / 'config.json').read_text(encoding='utf-8'))
    return config, load_file(GOLDENS / name / 'model.safetensors')


def write_folder(folder: Path, config: Config, state: State) -> Path:
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / 'model.safetensors')
    return folder


def logits_of(model: Any, ids: Any, mask: Any | None = None) -> Any:
    # GPT-2 has a table of positions, so a left-padded row needs position_ids; generate() passes them itself.
    learnt = mask is not None and model.config.model_type == 'gpt2'
    positions = {'position_ids': (mask.cumsum(1) - 1).clamp_min(0)} if learnt and mask is not None else {}
    with torch.no_grad():
        return model(ids, attention_mask=mask, **positions).logits


@pytest.mark.parametrize('name', NAMES)
def test_logits_of_the_original_code(name: str) -> None:
    model, golden = open_folder(name), expected(name)
    assert type(model).__name__ == (NATIVE.get(name) or FAMILIES[name].model_class)
    assert (logits_of(model, golden.ids) - golden.logits).abs().max() <= TOLERANCE
    difference = (logits_of(model, golden.padded_ids, golden.mask) - golden.padded_logits)[golden.mask == 1]
    assert 0 < len(difference) < golden.mask.numel()
    assert difference.abs().max() <= TOLERANCE


@pytest.mark.parametrize('name', NAMES)
def test_greedy_tokens_of_the_original_code(name: str) -> None:
    model, golden = open_folder(name), expected(name)
    plain = torch.ones_like(golden.ids)
    for ids, mask, new in (
        (golden.ids, plain, golden.generated),
        (golden.padded_ids, golden.mask, golden.padded_generated),
    ):
        whole = model.generate(
            input_ids=ids[:, : golden.prompt], attention_mask=mask[:, : golden.prompt], do_sample=False,
            max_new_tokens=12, min_new_tokens=12, use_cache=True, pad_token_id=0,
        )  # fmt: skip
        assert new.shape == (2, 12)
        assert torch.equal(whole[:, golden.prompt :], new)


@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
@pytest.mark.parametrize('name', FAMILIES)
def test_three_shards_give_a_bit_equal_model(name: str, kind: str, tmp_path: Path) -> None:
    config, state = read_golden(name)
    (tmp_path / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    stem = {'safetensors': 'model', 'bin': 'pytorch_model'}[kind]
    files = [f'{stem}-0000{i}-of-00003.{kind}' for i in (1, 2, 3)]
    shards: dict[str, State] = {file: {} for file in files}
    for position, key in enumerate(sorted(state, key=lambda key: key[::-1])):  # layers are split across shards
        shards[files[position % 3]][key] = state[key]
    for file, content in shards.items():
        (save_file if kind == 'safetensors' else torch.save)(content, tmp_path / file)
    index = {'weight_map': {key: file for file, content in shards.items() for key in content}}
    (tmp_path / f'{stem}.{kind}.index.json').write_text(json.dumps(index), encoding='utf-8')

    whole, sharded = open_folder(name).state_dict(), open_folder(name, tmp_path).state_dict()
    assert whole.keys() == sharded.keys()
    assert len(whole) >= 21
    assert all(torch.equal(tensor, sharded[key]) for key, tensor in whole.items())


@pytest.mark.parametrize('name', FAMILIES)
def test_tensors_that_do_not_fit_are_named(name: str, tmp_path: Path) -> None:
    config, state = read_golden(name)
    down = 'transformer.h.1.mlp.c_proj.weight' if name == 'polylm-a' else 'model.layers.1.mlp.down_proj.weight'
    surplus = down.replace('weight', 'scale')
    damaged = {
        'missing': ({key: tensor for key, tensor in state.items() if key != down}, down),
        'unexpected': ({**state, surplus: torch.ones(3)}, surplus),
        'shape': ({**state, down: state[down][:, 1:]}, down),
    }
    for case, (content, named) in damaged.items():
        folder = write_folder(tmp_path / case, config, content)
        with pytest.raises(ConfigError) as error:
            open_folder(name, folder)
        assert named in str(error.value), case


def test_a_fused_tensor_that_cannot_be_cut_is_named(tmp_path: Path) -> None:
    config, state = read_golden('baichuan7b-a')
    fused = 'model.layers.0.self_attn.W_pack.weight'
    folder = write_folder(tmp_path / 'cut', config, {**state, fused: state[fused][:-1]})
    with pytest.raises(ConfigError, match=r'layers\.0\.self_attn\.W_pack\.weight.* has 191 rows, .* requires 192 rows'):
        open_folder('baichuan7b-a', folder)


def reference_logits(state: State, ids: Any, heads: int, inverse_frequencies: Any, *, norm_head: bool) -> Any:
    """Return the logits of an original-layout Llama in float64, written only from the formulas of the papers."""

    def norm(x: Any, weight: Any) -> Any:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    state = {key: tensor.double() for key, tensor in state.items()}
    x = state['model.embed_tokens.weight'][ids]
    batch, length, width = x.shape
    dim = width // heads
    angles = torch.outer(torch.arange(length).double(), inverse_frequencies.double()).repeat(1, 2)
    future = torch.ones(length, length).triu(1).bool()

    def turn(t: Any) -> Any:
        return t * angles.cos() + torch.cat([-t[..., dim // 2 :], t[..., : dim // 2]], -1) * angles.sin()

    for layer in range(sum(key.endswith('.input_layernorm.weight') for key in state)):
        at = f'model.layers.{layer}.'
        bias = {name: state.get(f'{at}self_attn.{name}_proj.bias', torch.zeros(width)) for name in 'qkvo'}
        hidden = norm(x, state[f'{at}input_layernorm.weight'])
        if (fused := state.get(f'{at}self_attn.W_pack.weight')) is not None:
            parts = [hidden @ fused[i * width : (i + 1) * width].T for i in range(3)]
        else:
            parts = [hidden @ state[f'{at}self_attn.{name}_proj.weight'].T + bias[name] for name in 'qkv']
        q, k, v = (part.view(batch, length, heads, dim).transpose(1, 2) for part in parts)
        scores = (turn(q) @ turn(k).transpose(-1, -2) / dim**0.5).masked_fill(future, float('-inf'))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + mixed @ state[f'{at}self_attn.o_proj.weight'].T + bias['o']
        hidden = norm(x, state[f'{at}post_attention_layernorm.weight'])
        gate, up = (hidden @ state[f'{at}mlp.{name}_proj.weight'].T for name in ('gate', 'up'))
        x = x + (gate * gate.sigmoid() * up) @ state[f'{at}mlp.down_proj.weight'].T
    head = state['lm_head.weight']
    if norm_head:
        head = head / head.square().sum(1, keepdim=True).sqrt()
    return norm(x, state['model.norm.weight']) @ head.T


def random_state(width: int, inner: int, *, fused: bool, bias: bool, layers: int = 3, vocab: int = 50) -> State:
    """Return random weights of an original-layout Llama."""
    random = torch.Generator().manual_seed(width)

    def matrix(*shape: int) -> Any:
        return torch.randn(*shape, generator=random) * shape[-1] ** -0.5

    state: State = {'model.embed_tokens.weight': matrix(vocab, width) * 8, 'lm_head.weight': matrix(vocab, width) * 3}
    state['model.norm.weight'] = 1 + matrix(width)
    for layer in range(layers):
        at = f'model.layers.{layer}.'
        attention = {'W_pack': 3 * width} if fused else dict.fromkeys(('q_proj', 'k_proj', 'v_proj'), width)
        for name, rows in {**attention, 'o_proj': width}.items():
            state[f'{at}self_attn.{name}.weight'] = matrix(rows, width)
            if bias:
                state[f'{at}self_attn.{name}.bias'] = matrix(rows)
        for name, shape in {'gate': (inner, width), 'up': (inner, width), 'down': (width, inner)}.items():
            state[f'{at}mlp.{name}_proj.weight'] = matrix(*shape)
        for name in ('input_layernorm', 'post_attention_layernorm'):
            state[f'{at}{name}.weight'] = 1 + matrix(width)
    return state


DYNAMIC = {'type': 'dynamic', 'base': 5000, 'scaling_factor': 2.0}
VARIANTS: list[tuple[str, int, int, dict[str, Any]]] = [
    ('internlm-a', 48, 3, {'bias': True}),
    ('internlm-a', 60, 5, {'bias': False}),
    ('internlm-a', 48, 6, {'bias': False, 'rotary': DYNAMIC}),
    ('internlm-a', 48, 6, {'rope_theta': 5000, 'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}),
    ('internlm-a', 48, 6, {'rotary': {'type': 'origin', 'base': 20000}}),
    ('xverse-a', 60, 5, {}),
    ('baichuan7b-a', 48, 3, {}),
    ('baichuan2_7b-a', 60, 5, {}),
]


@pytest.mark.parametrize(('name', 'width', 'heads', 'fields'), VARIANTS)
def test_other_sizes_against_a_small_computation(
    name: str, width: int, heads: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    """20 tokens with a limit of 16 positions: dynamic rotary embedding changes its base, static keeps it."""
    state = random_state(
        width, 70, fused=name.startswith('baichuan'), bias=name == 'internlm-a' and fields.get('bias', True)
    )
    config, _ = read_golden(name)
    del config['bias' if name == 'internlm-a' else 'use_cache']
    sizes = {
        'vocab_size': 50, 'hidden_size': width, 'intermediate_size': 70, 'num_attention_heads': heads,
        'num_hidden_layers': 3, 'max_position_embeddings': 16, **fields,
    }  # fmt: skip
    model = open_folder(name, write_folder(tmp_path / 'variant', {**config, **sizes}, state))

    dim, ids = width // heads, torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    base = float(fields.get('rotary', {}).get('base') or fields.get('rope_theta') or 10000)
    if fields.get('rotary') == DYNAMIC or 'rope_scaling' in fields:
        base *= (2.0 * 20 / 16 - 1.0) ** (dim / (dim - 2))
    frequencies = base ** -(torch.arange(0, dim, 2).double() / dim)
    wanted = reference_logits(state, ids, heads, frequencies, norm_head=name == 'baichuan2_7b-a')
    assert wanted.std() > 0.3
    assert (logits_of(model, ids) - wanted).abs().max() <= TOLERANCE


def test_internlm_rotary_spellings_and_defaults() -> None:
    static = {'rope_type': 'default', 'rope_theta': 10000.0}
    dynamic = {'rope_type': 'dynamic', 'rope_theta': 10000.0, 'factor': 1.0}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, static),
        ({'rope_scaling': None, 'rope_theta': 10000}, static),
        ({'rotary': {'base': 10000, 'type': 'origin'}}, static),
        ({'rotary': {'base': 10000, 'type': 'dynamic'}}, dynamic),
        ({'rope_theta': 10000.0, 'rope_scaling': {'type': 'dynamic', 'factor': 1.0}}, dynamic),
        ({'rope_scaling': {'type': 'dynamic', 'factor': 4}}, {**dynamic, 'factor': 4.0}),
    ]
    for given, rope in cases:
        assert INTERNLM.config(given)['rope_parameters'] == rope, given
    bare = INTERNLM.config({})
    assert (bare['attention_bias'], bare['mlp_bias'], bare['pad_token_id']) == (True, False, 0)
    assert (bare['vocab_size'], bare['max_position_embeddings'], bare['num_key_value_heads']) == (103168, 2048, 32)
    assert INTERNLM.config({'bias': False})['attention_bias'] is False


def test_defaults_of_the_original_classes() -> None:
    fields = ('vocab_size', 'hidden_size', 'max_position_embeddings', 'pad_token_id', 'eos_token_id')
    found = {f.name: tuple(f.config({})[name] for name in fields) for f in (XVERSE, BAICHUAN_7B, BAICHUAN2_7B)}
    assert found == {
        'xverse': (100278, 5120, 8192, None, 2),
        'baichuan_7b': (64000, 4096, 4096, 0, 2),
        'baichuan2_7b': (125696, 4096, 4096, 0, 2),
    }


@pytest.mark.parametrize(
    ('family', 'fields', 'named'),
    [
        (INTERNLM, {'rotary': {'type': 'linear', 'base': 10000}}, "rotary type = 'linear'"),
        (INTERNLM, {'rope_scaling': {'type': 'yarn', 'factor': 2.0}}, "rope_scaling type = 'yarn'"),
        (INTERNLM, {'num_attention_heads': 3}, 'num_attention_heads = 3'),
        (INTERNLM, {'quantization_config': {'bits': 4}}, 'quantization_config'),
        (XVERSE, {'num_experts': 64, 'moe_top_k': 6}, 'num_experts = 64'),
        (XVERSE, {'moe_top_k': 6}, 'moe_top_k = 6'),
        (XVERSE, {'quantization_bit': 8}, 'quantization_bit = 8'),
        (XVERSE, {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, 'rope_scaling'),
        (BAICHUAN_7B, {'architectures': ['BaichuanForCausalLM'], 'model_max_length': 4096}, 'a Baichuan of 13B'),
        (BAICHUAN_7B, {'architectures': ['BaichuanForCausalLM'], 'max_position_embeddings': 64}, 'baichuan2_7b'),
        (BAICHUAN2_7B, {'architectures': ['BaiChuanForCausalLM']}, 'baichuan_7b'),
        (BAICHUAN2_7B, {'quantization_config': {'load_in_4bit': True}}, 'quantization_config'),
        (BAICHUAN2_7B, {'tie_word_embeddings': True}, 'tie_word_embeddings'),
        (POLYLM, {'quantization_config': {'bits': 4}}, 'quantization_config'),
    ],
)
def test_what_no_native_class_does_is_refused_by_name(family: Family, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        family.config(fields)
    assert named in str(error.value)
    assert family.name in str(error.value)


def test_each_baichuan_is_told_by_its_config() -> None:
    v1, v2 = read_golden('baichuan7b-a')[0], read_golden('baichuan2_7b-a')[0]
    large = {key: value for key, value in v2.items() if key != 'max_position_embeddings'}
    unnamed = {'model_type': 'baichuan', 'max_position_embeddings': 4096}
    cases = [
        (v1, (True, False)),
        (v2, (False, True)),
        (large, (False, False)),
        ({**large, 'vocab_size': 125696}, (False, False)),
        ({**v2, 'quantization_config': {'load_in_4bit': True}}, (False, False)),
        ({**unnamed, 'vocab_size': 64000}, (True, False)),
        ({**unnamed, 'vocab_size': 125696}, (False, True)),
        (unnamed, (False, False)),
    ]
    for config, wanted in cases:
        assert (BAICHUAN_7B.matches(config), BAICHUAN2_7B.matches(config)) == wanted, config


def test_a_head_stored_in_half_precision_is_normalised_in_fp32(tmp_path: Path) -> None:
    config, state = read_golden('baichuan2_7b-a')
    half = {key: tensor.bfloat16() for key, tensor in state.items()}
    folder = write_folder(tmp_path / 'half', config, half)
    wanted = torch.nn.functional.normalize(half['lm_head.weight'].float())
    assert torch.equal(open_folder('baichuan2_7b-a', folder).lm_head.weight, wanted)
    in_half = open_folder('baichuan2_7b-a', folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in in_half.parameters()} == {torch.bfloat16}
    assert torch.equal(in_half.lm_head.weight, wanted.bfloat16())


def test_normalising_a_head_twice_changes_nothing_but_rounding() -> None:
    head = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    head[3] = 0  # a row that is never written stays zero
    once = normalise_rows(head)
    assert torch.allclose(once.norm(dim=1), torch.ones(40).index_fill(0, torch.tensor([3]), 0.0))
    assert (normalise_rows(once) - once).abs().max() <= 1e-7


def polylm_transposed(state: State) -> State:
    matrices = ('attn.c_attn.weight', 'c_proj.weight', 'mlp.c_fc.weight')
    return {key: tensor.T if key.endswith(matrices) else tensor for key, tensor in state.items()}


def polylm_without_prefix(state: State) -> State:
    return {key.removeprefix('transformer.'): tensor for key, tensor in state.items()}


@pytest.mark.parametrize('change', [polylm_transposed, polylm_without_prefix])
def test_other_layouts_of_polylm_give_the_same_model(change: Callable[[State], State], tmp_path: Path) -> None:
    config, state = read_golden('polylm-a')
    changed = change(state)
    assert any(changed.get(key) is not tensor for key, tensor in state.items())
    model = open_folder('polylm-a', write_folder(tmp_path / 'changed', config, changed))
    wanted = open_folder('polylm-a').state_dict()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items())


def test_polylm_takes_the_long_names_of_its_fields() -> None:
    from transformers import GPT2Config

    long = {'hidden_size': 40, 'num_hidden_layers': 3, 'num_attention_heads': 5, 'max_position_embeddings': 17}
    config = GPT2Config(**POLYLM.config({**long, 'vocab_size': 9, 'n_ctx': 17}))
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions, config.vocab_size) == (40, 3, 5, 17, 9)


def test_polylm_ends_with_its_tokenizers_token_and_is_used_by_name_only() -> None:
    config, _ = read_golden('polylm-a')
    assert config['eos_token_id'] == 319
    assert open_folder('polylm-a').generation_config.eos_token_id == 2
    assert not POLYLM.matches(config)


def test_seqgpt_without_prefix_and_tied_head_opens_to_the_same_logits(tmp_path: Path) -> None:
    config, state = read_golden('seqgpt-a')
    bare = {key.removeprefix('transformer.'): tensor for key, tensor in state.items() if key != 'lm_head.weight'}
    assert len(bare) == len(state) - 1
    model, ids = open_folder('seqgpt-a', write_folder(tmp_path / 'bare', config, bare)), expected('seqgpt-a').ids
    assert torch.equal(logits_of(model, ids), logits_of(open_folder('seqgpt-a'), ids))

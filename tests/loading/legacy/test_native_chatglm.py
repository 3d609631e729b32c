"""ChatGLM2: golden outputs of the original code, variants against a small computation, refusals, training, saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.runs import ROOT
from utils.base.errors import ConfigError
from utils.loading.legacy.families.chatglm2 import CHATGLM2, CHATGLM2_32K
from utils.loading.legacy.family import Config, Family, State
from utils.loading.legacy.opening import open_original

GOLDEN = ROOT / 'tests' / 'goldens' / 'chatglm2-a'
EXPECTED = load_file(GOLDEN / 'expected.safetensors')
CONFIG = json.loads((GOLDEN / 'config.json').read_text(encoding='utf-8'))
STATE = load_file(GOLDEN / 'model.safetensors')
FUSED = 'transformer.encoder.layers.1.self_attention.query_key_value.weight'
TOLERANCE = 1e-4


def open_golden(folder: Path = GOLDEN, family: Family = CHATGLM2, **options: Any) -> Any:
    return open_original(family, folder, **{'dtype': torch.float32, **options}).eval()


def write_folder(folder: Path, config: Config, state: State) -> Path:
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / 'model.safetensors')
    return folder


def logits_of(model: Any, ids: Any, mask: Any = None, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, attention_mask=mask, **options).logits


def greedy(model: Any, ids: Any, mask: Any) -> Any:
    options = {'max_new_tokens': 12, 'min_new_tokens': 12, 'do_sample': False, 'use_cache': True, 'pad_token_id': 0}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_logits_and_tokens_of_the_original_code(attention: str) -> None:
    model = open_golden(attn_implementation=attention)
    assert type(model).__name__ == 'GlmForCausalLM'
    ids, padded, mask = (EXPECTED[name] for name in ('input_ids', 'padded_input_ids', 'attention_mask'))
    assert (logits_of(model, ids) - EXPECTED['logits']).abs().max() <= TOLERANCE
    difference = (logits_of(model, padded, mask) - EXPECTED['padded_logits'])[mask == 1]
    assert 0 < len(difference) < mask.numel()
    assert difference.abs().max() <= TOLERANCE
    assert EXPECTED['generated'].shape == (2, 12)
    assert torch.equal(greedy(model, ids, torch.ones_like(ids)), EXPECTED['generated'])
    assert torch.equal(greedy(model, padded, mask), EXPECTED['padded_generated'])


def test_two_bin_shards_of_parameters_give_a_bit_equal_model(tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG), encoding='utf-8')
    files = [f'pytorch_model-0000{i}-of-00002.bin' for i in (1, 2)]
    places = {key: files[position % 2] for position, key in enumerate(sorted(STATE))}
    for file in files:
        torch.save({key: torch.nn.Parameter(STATE[key]) for key in STATE if places[key] == file}, tmp_path / file)
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': places}), encoding='utf-8')
    whole, sharded = open_golden().state_dict(), open_golden(tmp_path).state_dict()
    assert whole.keys() == sharded.keys()
    assert len(whole) == 25
    assert all(torch.equal(tensor, sharded[key]) for key, tensor in whole.items())


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({FUSED: None}, 'model.layers.1.self_attn.q_proj.weight'),
        ({FUSED: torch.ones(96, 64)}, FUSED),
        ({'transformer.output_layer.weight': torch.ones(320, 65)}, 'lm_head.weight'),
        ({'transformer.encoder.layers.1.mlp.scale': torch.ones(3)}, 'transformer.encoder.layers.1.mlp.scale'),
        (
            {'transformer.encoder.layers.1.self_attention.query_key_value.weight_scale': torch.ones(3)},
            'query_key_value.weight_scale',
        ),
        ({'transformer.prefix_encoder.embedding.weight': torch.ones(2, 4)}, 'transformer.prefix_encoder'),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in {**STATE, **change}.items() if tensor is not None}
    with pytest.raises(ConfigError) as caught:
        open_golden(write_folder(tmp_path / 'damaged', CONFIG, state))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('rmsnorm', False),
        ('post_layer_norm', False),
        ('multi_query_attention', False),
        ('add_bias_linear', True),
        ('apply_residual_connection_post_layernorm', True),
        ('fp32_residual_connection', True),
        ('pre_seq_len', 128),
        ('quantization_bit', 4),
        ('quantization_config', {'bits': 4}),
    ],
)
def test_variants_that_glm_is_not_are_refused_by_name(field: str, value: Any) -> None:
    for family in (CHATGLM2, CHATGLM2_32K):
        assert family.config(CONFIG)['num_key_value_heads'] == 2
        with pytest.raises(ConfigError, match=rf'{family.name}: config.json has {field} = '):
            family.config({**CONFIG, field: value})


def test_fields_left_out_are_those_of_the_original_class() -> None:
    config = CHATGLM2.config({'multi_query_attention': True, 'quantization_bit': 0, 'pre_seq_len': None})
    names = ('vocab_size', 'num_hidden_layers', 'head_dim', 'attention_bias', 'pad_token_id', 'eos_token_id')
    assert [config[name] for name in names] == [65024, 28, 128, False, 0, 2]


def test_the_32k_model_divides_positions(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / 'long', {**CONFIG, 'rope_ratio': 4}, STATE)
    assert CHATGLM2.matches(CONFIG) and not CHATGLM2_32K.matches({**CONFIG, 'rope_ratio': 4})
    with pytest.raises(ConfigError, match='chatglm2: config.json has rope_ratio = 4, .*chatglm2-6b-32k'):
        open_golden(folder)
    ids, places = EXPECTED['input_ids'], torch.arange(24)[None]
    plain = EXPECTED['logits']
    long = open_golden(folder, CHATGLM2_32K)
    assert (logits_of(long, ids, position_ids=places * 4) - plain).abs().max() <= TOLERANCE
    assert (logits_of(long, ids) - plain).abs().max() > 0.1
    # Without a ratio it is the 8k model.
    assert (logits_of(open_golden(GOLDEN, CHATGLM2_32K), ids) - plain).abs().max() <= TOLERANCE


def rotate(x: Any) -> Any:
    """Return (T, heads, d) with adjacent pairs in the first half of d rotated by position, as in ChatGLM2."""
    length, _, d = x.shape
    angle = torch.arange(length)[:, None] / 10000.0 ** (torch.arange(0, d // 2, 2) / (d // 2))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = torch.view_as_real(torch.view_as_complex(x[..., : d // 2].unflatten(-1, (-1, 2)).contiguous()) * turn)
    return torch.cat((turned.flatten(-2), x[..., d // 2 :]), dim=-1)


def compute(state: State, config: Config, ids: Any) -> Any:
    """Return the logits of one row, computed from the original tensors with the original's formulas."""
    heads, groups, d = (config[name] for name in ('num_attention_heads', 'multi_query_group_num', 'kv_channels'))

    def norm(x: Any, name: str) -> Any:
        return x * (x.pow(2).mean(-1, keepdim=True) + config['layernorm_epsilon']).rsqrt() * state[f'{name}.weight']

    hidden = state['transformer.embedding.word_embeddings.weight'][ids]
    future = torch.full((len(ids), len(ids)), float('-inf')).triu(1)
    for number in range(config['num_layers']):
        layer = f'transformer.encoder.layers.{number}'
        x = norm(hidden, f'{layer}.input_layernorm')
        fused = f'{layer}.self_attention.query_key_value'
        x = x @ state[f'{fused}.weight'].T + (state[f'{fused}.bias'] if config['add_qkv_bias'] else 0)
        q, k, v = (part.unflatten(-1, (-1, d)) for part in x.split([heads * d, groups * d, groups * d], -1))
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (rotate(k), v))
        scores = torch.einsum('qhd,khd->hqk', rotate(q), k) / d**0.5 + future
        mixed = torch.einsum('hqk,khd->qhd', scores.softmax(-1), v).flatten(1)
        hidden = hidden + mixed @ state[f'{layer}.self_attention.dense.weight'].T
        x = norm(hidden, f'{layer}.post_attention_layernorm') @ state[f'{layer}.mlp.dense_h_to_4h.weight'].T
        gate, up = x.chunk(2, -1)
        hidden = hidden + (gate * gate.sigmoid() * up) @ state[f'{layer}.mlp.dense_4h_to_h.weight'].T
    return norm(hidden, 'transformer.encoder.final_layernorm') @ state['transformer.output_layer.weight'].T


def random_state(config: Config) -> State:
    hidden, inner, d = config['hidden_size'], config['ffn_hidden_size'], config['kv_channels']
    query = config['num_attention_heads'] * d
    fused = query + 2 * config['multi_query_group_num'] * d
    shapes = {
        'embedding.word_embeddings.weight': (config['padded_vocab_size'], hidden),
        'encoder.final_layernorm.weight': (hidden,),
        'output_layer.weight': (config['padded_vocab_size'], hidden),
    }
    for number in range(config['num_layers']):
        leaves = {
            'input_layernorm.weight': (hidden,),
            'post_attention_layernorm.weight': (hidden,),
            'self_attention.query_key_value.weight': (fused, hidden),
            'self_attention.dense.weight': (hidden, query),
            'mlp.dense_h_to_4h.weight': (2 * inner, hidden),
            'mlp.dense_4h_to_h.weight': (hidden, inner),
        } | ({'self_attention.query_key_value.bias': (fused,)} if config['add_qkv_bias'] else {})
        shapes |= {f'encoder.layers.{number}.{leaf}': shape for leaf, shape in leaves.items()}
    torch.manual_seed(0)
    return {f'transformer.{name}': torch.randn(shape) * 0.2 for name, shape in shapes.items()}


@pytest.mark.parametrize(('heads', 'groups', 'bias'), [(6, 3, True), (5, 1, False), (4, 4, True)])
def test_other_heads_and_groups_give_the_formulas_logits(heads: int, groups: int, bias: bool, tmp_path: Path) -> None:
    config = {
        **CONFIG, 'num_attention_heads': heads, 'multi_query_group_num': groups, 'kv_channels': 8, 'num_layers': 3,
        'hidden_size': 40, 'ffn_hidden_size': 24, 'add_qkv_bias': bias,
    }  # fmt: skip
    state = random_state(config)
    model = open_golden(write_folder(tmp_path / 'model', config, state))
    ids = EXPECTED['input_ids'][0]
    by_hand = compute(state, config, ids)
    assert by_hand.std() > 0.1
    assert (logits_of(model, ids[None])[0] - by_hand).abs().max() <= TOLERANCE

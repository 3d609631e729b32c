"""Baichuan-13B, Baichuan2-13B and its 4 bits: goldens of the original code, ALiBi against its formula, saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.runs import ROOT
from utils.base.errors import ConfigError
from utils.loading.folder import read_config
from utils.loading.legacy.classes.alibi import AlibiLlamaForCausalLM, alibi_slopes
from utils.loading.legacy.families.baichuan import BAICHUAN2_7B
from utils.loading.legacy.families.baichuan_4bits import BAICHUAN2_7B_4BITS, BAICHUAN2_13B_4BITS, unpack_state
from utils.loading.legacy.families.baichuan_13b import BAICHUAN2_13B, BAICHUAN_13B
from utils.loading.legacy.family import Config, Family, State
from utils.loading.legacy.opening import open_original
from utils.loading.weight_files import read_state

GOLDENS = ROOT / 'tests' / 'goldens'
DENSE = {'baichuan_13b-a': BAICHUAN_13B, 'baichuan2_13b-a': BAICHUAN2_13B}
FAMILIES = {**DENSE, 'baichuan2_13b_4bits-a': BAICHUAN2_13B_4BITS}
FUSED = 'model.layers.1.self_attn.W_pack.weight'
TOLERANCE = 1e-4


def open_golden(name: str, folder: Path | None = None, **options: Any) -> Any:
    return open_original(FAMILIES[name], folder or GOLDENS / name, **{'dtype': torch.float32, **options}).eval()


def write_folder(folder: Path, config: Config, state: State) -> Path:
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / 'model.safetensors')
    return folder


def write_shards(folder: Path, config: Config, state: dict[str, Any]) -> Path:
    """Write a .bin checkpoint of two shards, with layers split across both."""
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    files = [f'pytorch_model-0000{i}-of-00002.bin' for i in (1, 2)]
    places = {key: files[position % 2] for position, key in enumerate(sorted(state, key=lambda key: key[::-1]))}
    for file in files:
        torch.save({key: state[key] for key in state if places[key] == file}, folder / file)
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': places}), encoding='utf-8')
    return folder


def logits_of(model: Any, ids: Any, mask: Any = None, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, attention_mask=mask, **options).logits


def greedy(model: Any, ids: Any, mask: Any, **options: Any) -> Any:
    settings = {'max_new_tokens': 12, 'min_new_tokens': 12, 'do_sample': False, 'use_cache': True, 'pad_token_id': 0}
    return model.generate(input_ids=ids, attention_mask=mask, **settings, **options)[:, ids.shape[1] :]


def batch() -> tuple[Any, Any, Any]:
    """Return ids, left-padded ids and their mask; they are the same in every golden file of 24 columns."""
    found = load_file(GOLDENS / 'baichuan_13b-a' / 'expected.safetensors')
    return found['input_ids'], found['padded_input_ids'], found['attention_mask']


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', FAMILIES)
def test_logits_and_tokens_of_the_original_code(name: str, attention: str) -> None:
    model = open_golden(name, attn_implementation=attention)
    expected = load_file(GOLDENS / name / 'expected.safetensors')
    ids, padded, mask = (expected[field] for field in ('input_ids', 'padded_input_ids', 'attention_mask'))
    assert type(model) is AlibiLlamaForCausalLM
    assert (logits_of(model, ids) - expected['logits']).abs().max() <= TOLERANCE
    difference = (logits_of(model, padded, mask) - expected['padded_logits'])[mask == 1]
    assert 0 < len(difference) < mask.numel()
    assert difference.abs().max() <= TOLERANCE
    assert expected['generated'].shape == (2, 12)
    for options in ({}, {'cache_implementation': 'static', 'disable_compile': True}):
        assert torch.equal(greedy(model, ids, torch.ones_like(ids), **options), expected['generated'])
        assert torch.equal(greedy(model, padded, mask, **options), expected['padded_generated'])


@pytest.mark.parametrize('name', DENSE)
def test_training_computes_what_the_original_trains_on(name: str) -> None:
    expected = load_file(GOLDENS / name / 'expected.safetensors')
    logits = open_golden(name).train()(expected['input_ids']).logits
    assert (logits - expected['train_logits']).abs().max() <= TOLERANCE


@pytest.mark.parametrize('name', FAMILIES)
def test_two_bin_shards_of_parameters_give_a_bit_equal_model(name: str, tmp_path: Path) -> None:
    state: dict[str, Any] = {
        key: torch.nn.Parameter(value) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in read_state(GOLDENS / name).items()
    }
    folder = write_shards(tmp_path / 'shards', read_config(GOLDENS / name), state)
    whole, sharded = open_golden(name).state_dict(), open_golden(name, folder).state_dict()
    assert whole.keys() == sharded.keys()
    assert len(whole) == 21
    assert all(torch.equal(tensor, sharded[key]) for key, tensor in whole.items())


@pytest.mark.parametrize('name', DENSE)
@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({FUSED: None}, 'model.layers.1.self_attn.k_proj.weight'),
        ({FUSED: torch.ones(191, 64)}, FUSED),
        ({FUSED: torch.ones(3)}, FUSED),
        ({'model.layers.1.mlp.up_proj.weight': torch.ones(88, 65)}, 'model.layers.1.mlp.up_proj.weight'),
        ({'model.layers.1.mlp.up_proj.bias': torch.ones(88)}, 'model.layers.1.mlp.up_proj.bias'),
        ({'model.layers.2.input_layernorm.weight': torch.ones(64)}, 'model.layers.2.input_layernorm.weight'),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    state = {**load_file(GOLDENS / name / 'model.safetensors'), **change}
    kept = {key: tensor for key, tensor in state.items() if tensor is not None}
    with pytest.raises(ConfigError) as caught:
        open_golden(name, write_folder(tmp_path / 'damaged', read_config(GOLDENS / name), kept))
    assert named in str(caught.value)


def test_other_baichuans_are_refused_by_name() -> None:
    plain = read_config(GOLDENS / 'baichuan_13b-a')
    changes: list[dict[str, Any]] = [
        {'architectures': ['BaiChuanForCausalLM']},
        {'max_position_embeddings': 4096},
        {'quantization_config': {'load_in_4bit': True}},
        {'num_attention_heads': 7},
    ]
    for family in (BAICHUAN_13B, BAICHUAN2_13B):
        assert family.config(plain)['max_position_embeddings'] == 32
        for change in changes:
            with pytest.raises(ConfigError, match=f'{family.name}: config.json has {next(iter(change))} = '):
                family.config({**plain, **change})
    assert BAICHUAN_13B.config({**plain, 'tie_word_embeddings': True})['tie_word_embeddings']
    with pytest.raises(ConfigError, match='baichuan2_13b: config.json has tie_word_embeddings = True'):
        BAICHUAN2_13B.config({**plain, 'tie_word_embeddings': True})


def test_the_vocabulary_tells_the_13b_models_apart() -> None:
    plain = {'model_type': 'baichuan', 'architectures': ['BaichuanForCausalLM'], 'model_max_length': 4096}
    packed = {'quantization_config': {'load_in_4bit': True}}
    rotary = {'max_position_embeddings': 4096}
    families = (BAICHUAN_13B, BAICHUAN2_13B, BAICHUAN2_13B_4BITS, BAICHUAN2_7B_4BITS)
    configs: list[tuple[dict[str, Any], list[Family]]] = [
        ({'vocab_size': 64000}, [BAICHUAN_13B]),
        ({'vocab_size': 125696}, [BAICHUAN2_13B]),
        ({'vocab_size': 125696, **packed}, [BAICHUAN2_13B_4BITS]),
        ({'vocab_size': 125696, **rotary, **packed}, [BAICHUAN2_7B_4BITS]),
        ({'vocab_size': 125696, **rotary}, []),
        ({'vocab_size': 320}, []),
    ]
    for fields, expected in configs:
        assert [family for family in families if family.matches({**plain, **fields})] == expected


def test_slopes_are_those_of_the_paper() -> None:
    def of_power(n: int) -> list[float]:
        first = 2 ** -(2 ** -(n.bit_length() - 1 - 3))
        return [first * first**i for i in range(n)]

    assert alibi_slopes(8) == [1 / 2**i for i in range(1, 9)]
    for heads, lower in ((1, 1), (2, 2), (4, 4), (5, 4), (6, 4), (7, 4), (12, 8), (32, 32), (40, 32)):
        paper = of_power(lower) + of_power(2 * lower)[0::2][: heads - lower]
        assert len(alibi_slopes(heads)) == heads
        assert alibi_slopes(heads) == pytest.approx(paper, rel=1e-12)


def compute(state: State, config: Config, ids: Any, *, normalised: bool) -> Any:
    """Return the logits of one row, computed from the original tensors with the original's formulas."""
    heads = config['num_attention_heads']
    d = config['hidden_size'] // heads

    def norm(x: Any, name: str) -> Any:
        return x * (x.pow(2).mean(-1, keepdim=True) + config['rms_norm_eps']).rsqrt() * state[f'{name}.weight']

    def linear(x: Any, name: str) -> Any:
        return x @ state[f'{name}.weight'].T

    # Eight heads have 2^-1 to 2^-8. Four heads have every second of them, and up to four more have those between.
    steps = range(1, 9) if heads == 8 else (2, 4, 6, 8, 1, 3, 5, 7)[:heads]
    slopes = torch.tensor([2.0**-step for step in steps])
    places = torch.arange(len(ids))
    bias = -slopes[:, None, None] * (places[:, None] - places) + torch.full((len(ids), len(ids)), -1e9).triu(1)
    hidden = state['model.embed_tokens.weight'][ids]
    for number in range(config['num_hidden_layers']):
        layer = f'model.layers.{number}'
        packed = linear(norm(hidden, f'{layer}.input_layernorm'), f'{layer}.self_attn.W_pack')
        q, k, v = (part.unflatten(-1, (heads, d)) for part in packed.chunk(3, -1))
        weights = (torch.einsum('qhd,khd->hqk', q, k) / d**0.5 + bias).softmax(-1)
        hidden = hidden + linear(torch.einsum('hqk,khd->qhd', weights, v).flatten(1), f'{layer}.self_attn.o_proj')
        x = norm(hidden, f'{layer}.post_attention_layernorm')
        gate = linear(x, f'{layer}.mlp.gate_proj')
        hidden = hidden + linear(gate * gate.sigmoid() * linear(x, f'{layer}.mlp.up_proj'), f'{layer}.mlp.down_proj')
    head = state['lm_head.weight']
    return norm(hidden, 'model.norm') @ (head / head.norm(dim=1, keepdim=True) if normalised else head).T


def random_state(config: Config) -> State:
    hidden, inner, vocabulary = config['hidden_size'], config['intermediate_size'], config['vocab_size']
    shapes: dict[str, tuple[int, ...]] = {
        'model.embed_tokens': (vocabulary, hidden), 'model.norm': (hidden,), 'lm_head': (vocabulary, hidden)
    }  # fmt: skip
    for number in range(config['num_hidden_layers']):
        shapes |= {
            f'model.layers.{number}.{leaf}': shape
            for leaf, shape in {
                'input_layernorm': (hidden,), 'post_attention_layernorm': (hidden,),
                'self_attn.W_pack': (3 * hidden, hidden), 'self_attn.o_proj': (hidden, hidden),
                'mlp.gate_proj': (inner, hidden), 'mlp.up_proj': (inner, hidden), 'mlp.down_proj': (hidden, inner),
            }.items()
        }  # fmt: skip
    torch.manual_seed(0)
    return {f'{name}.weight': torch.randn(shape) * 0.2 for name, shape in shapes.items()}


@pytest.mark.parametrize('name', DENSE)
@pytest.mark.parametrize('heads', [4, 5, 6, 8])
def test_other_head_counts_give_the_formulas_logits(name: str, heads: int, tmp_path: Path) -> None:
    config = {
        **read_config(GOLDENS / name), 'num_attention_heads': heads, 'hidden_size': heads * 8,
        'intermediate_size': 40, 'num_hidden_layers': 3,
    }  # fmt: skip
    state = random_state(config)
    model = open_golden(name, write_folder(tmp_path / 'model', config, state))
    ids, padded, mask = batch()
    by_hand = compute(state, config, ids[0], normalised=name.startswith('baichuan2'))
    assert by_hand.std() > 0.1
    assert (logits_of(model, ids[:1])[0] - by_hand).abs().max() <= TOLERANCE
    seen = mask[1] == 1
    by_hand = compute(state, config, padded[1][seen], normalised=name.startswith('baichuan2'))
    assert (logits_of(model, padded, mask)[1][seen] - by_hand).abs().max() <= TOLERANCE


def test_rows_laid_end_to_end_do_not_see_each_other() -> None:
    model = open_golden('baichuan2_13b-a')
    ids = batch()[0]
    places = torch.arange(24).repeat(2)[None]
    packed = logits_of(model, ids.flatten()[None], position_ids=places)
    assert (packed[0] - logits_of(model, ids).flatten(0, 1)).abs().max() <= TOLERANCE


def test_bf16_rows_of_padding_are_finite() -> None:
    _, padded, mask = batch()
    expected = load_file(GOLDENS / 'baichuan_13b-a' / 'expected.safetensors')['padded_logits']
    logits = logits_of(open_golden('baichuan_13b-a', dtype=torch.bfloat16), padded, mask).float()
    assert logits.isfinite().all()
    assert (logits - expected)[mask == 1].abs().mean() < 0.1


def test_an_attention_that_takes_no_bias_is_refused() -> None:
    with pytest.raises(ValueError, match='flex'):
        open_golden('baichuan_13b-a', attn_implementation='flex_attention')
    model = open_golden('baichuan_13b-a')
    model.config._attn_implementation = 'paged|sdpa'
    with pytest.raises(ValueError, match=r"attention 'paged\|sdpa' takes no ALiBi"):
        logits_of(model, batch()[0])


def pack(name: str, weight: Any, **settings: Any) -> tuple[dict[str, Any], Any]:
    """Return the two entries of 2023 for a weight, packed by bitsandbytes, and what bitsandbytes reads from them."""
    functional = pytest.importorskip('bitsandbytes').functional
    options = {'blocksize': 64, 'compress_statistics': True, 'quant_type': 'nf4', **settings}
    data, state = functional.quantize_4bit(weight, **options)
    nested: list[Any] | None = None
    if state.nested:
        outer = [state.state2.absmax, state.state2.code, state.state2.blocksize, False, torch.float32, None, None]
        nested = [state.offset, outer]
    layout = [state.absmax, weight.shape, weight.dtype, state.blocksize, nested, options['quant_type'], state.code]
    return {f'{name}.data': data, f'{name}.quant_state': layout}, functional.dequantize_4bit(data, state)


# On a CPU, bitsandbytes misreads blocks that are longer than a row.
@pytest.mark.optional
@pytest.mark.parametrize(
    ('shape', 'settings'),
    [
        ((384, 128), {}),
        ((88, 64), {}),
        ((300, 64), {'compress_statistics': False}),
        ((88, 64), {'quant_type': 'fp4'}),
        ((96, 128), {'blocksize': 128}),
    ],
)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_packed_weights_are_read_as_bitsandbytes_reads_them(
    shape: tuple[int, int], dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('utils.loading.legacy.lazy._BLOCK', 3000)  # several parts, with a short last one
    torch.manual_seed(0)
    entries, expected = pack('w.weight', torch.randn(shape, dtype=dtype), **settings)
    found = unpack_state({**entries, 'other': torch.ones(1)})
    assert found.keys() == {'w.weight', 'other'}
    assert torch.equal(found['w.weight'][...].to(dtype=dtype), expected)
    if shape[0] == 384:
        parts = [part.to(dtype=dtype) for part in found['w.weight'].chunk(3)]
        assert torch.equal(torch.cat(parts), expected)


def test_a_weight_that_ends_within_a_block_is_read() -> None:
    torch.manual_seed(0)
    whole, expected = pack('w.weight', torch.randn(8, 64))
    absmax, _, *rest = whole['w.weight.quant_state']
    cut = {'w.weight.data': whole['w.weight.data'][:245], 'w.weight.quant_state': [absmax, torch.Size((7, 70)), *rest]}
    assert torch.equal(unpack_state(cut)['w.weight'].to(), expected.flatten()[:490].view(7, 70))


def test_the_4_bits_of_7b_are_the_rotary_model(tmp_path: Path) -> None:
    config = {
        **read_config(GOLDENS / 'baichuan2_13b_4bits-a'),
        'hidden_size': 64, 'intermediate_size': 88, 'max_position_embeddings': 128,
    }  # fmt: skip
    dense = random_state(config)
    packed: dict[str, Any] = {}
    for key, tensor in list(dense.items()):
        if tensor.ndim == 2 and key.startswith('model.layers'):
            entries, dense[key] = pack(key, tensor.half())
            packed |= entries
        else:
            packed[key] = torch.nn.Parameter(tensor.half())
            dense[key] = tensor.half()
    folder = write_shards(tmp_path / 'packed', config, packed)
    full = write_folder(
        tmp_path / 'full', {key: value for key, value in config.items() if key != 'quantization_config'}, dense
    )
    found, expected = (
        open_original(family, where, dtype=torch.float32).eval()
        for family, where in ((BAICHUAN2_7B_4BITS, folder), (BAICHUAN2_7B, full))
    )
    assert type(found).__name__ == 'LlamaForCausalLM'
    assert not any('quant' in name for name in found.config.to_dict())
    assert torch.equal(logits_of(found, batch()[0]), logits_of(expected, batch()[0]))


@pytest.mark.optional
def test_the_4_bits_opened_in_4_bits_stay_near() -> None:
    bitsandbytes = pytest.importorskip('bitsandbytes')
    from transformers import BitsAndBytesConfig

    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)
    model = open_golden('baichuan2_13b_4bits-a', quantization_config=packing)
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7 and type(model.lm_head) is torch.nn.Linear
    for layer in layers:  # its kernel for these CPUs does not support such small layers
        layer.support_avx512bf16_for_cpu = False
    expected = load_file(GOLDENS / 'baichuan2_13b_4bits-a' / 'expected.safetensors')
    assert (logits_of(model, expected['input_ids']) - expected['logits']).abs().max() <= 0.1


def test_packed_weights_that_do_not_fit_are_named() -> None:
    state = read_state(GOLDENS / 'baichuan2_13b_4bits-a')
    data, quant = f'{FUSED}.data', f'{FUSED}.quant_state'
    layout: Any = state[quant]
    without_data, without_quant = ({key: state[key] for key in state if key != gone} for gone in (data, quant))
    damaged: list[tuple[dict[str, Any], str]] = [
        (without_data, f"'{quant}' describes the tensor '{data}', which is missing"),
        (without_quant, f"tensor '{data}' has no '{quant}'"),
        ({**state, data: state[data][:-1]}, f"tensor '{data}' has 24575 bytes"),
        ({**state, quant: [layout[0][:-1], *layout[1:]]}, f"tensor '{data}' has 24576 bytes and 767 scales"),
        ({**state, quant: [*layout[:4], [layout[4][0]], *layout[5:]]}, f"'{quant}' does not have the layout"),
        ({**state, quant: [torch.ones(5000), *layout[1:]]}, f"tensor '{data}' has 24576 bytes and 5000 scales"),
        ({**state, quant: [torch.full((768,), 999), *layout[1:]]}, f"'{quant}' does not have the layout"),
        ({**state, quant: layout[:4]}, f"'{quant}' does not have the layout"),
        ({**state, quant: torch.ones(3)}, f"'{quant}' does not have the layout"),
    ]
    assert len(unpack_state(state)) == 3 + 2 * 7
    for content, message in damaged:
        with pytest.raises(ConfigError) as caught:
            unpack_state(content)
        assert message in str(caught.value)

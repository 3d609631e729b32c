"""Qwen of 2023 in native classes: golden outputs of the original code, renamed fields, bitwise GPTQ, long contexts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.support.old_models import (
    PACKED,
    PLAIN,
    gptq_checkpoint,
    quantised,
    random_state,
    read_json,
    write_checkpoint,
)
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.loading.layers import ALL_LINEAR
from utils.loading.legacy import gptq
from utils.loading.legacy.families.qwen import QWEN, QWEN_GPTQ
from utils.loading.legacy.opening import open_original
from utils.loading.packed import packed_classes
from utils.loading.save import save_whole
from utils.model import load_model
from utils.train.prepare import prepare_model

OLD_NAMES = {
    'hidden_size': 'n_embd',
    'num_hidden_layers': 'n_layer',
    'num_attention_heads': 'n_head',
    'intermediate_size': 'ffn_hidden_size',
    'vocab_size': 'padded_vocab_size',
    'attn_dropout_prob': 'attn_pdrop',
}
SEQ = 64


@pytest.fixture(autouse=True)
def without_gptq_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpack weights on load, even if optimum and gptqmodel are installed."""
    monkeypatch.setattr('utils.loading.legacy.families.qwen.packed_available', lambda: False)


def reference(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], ids: torch.Tensor, *, prompt: int | None = None
) -> torch.Tensor:
    """Return the logits of one row, computed from the original tensors in plain fp64 arithmetic."""
    heads, seq, n = config['num_attention_heads'], config['seq_length'], len(ids)
    d = config['hidden_size'] // heads
    position = torch.arange(n, dtype=torch.float64)
    grown = 2 ** math.ceil(math.log((prompt or n) / seq, 2) + 1) - 1 if config['use_dynamic_ntk'] else 1
    base = config['rotary_emb_base'] * max(grown, 1) ** (d / (d - 2))
    angles = position[:, None] * base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    turn = torch.polar(torch.ones_like(angles), angles)
    logn = torch.tensor([math.log(i, seq) if config['use_logn_attn'] and i > seq else 1.0 for i in range(1, n + 1)])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config['layer_norm_epsilon']).sqrt() * state[name].double()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    x = state['transformer.wte.weight'].double()[ids]
    for i in range(config['num_hidden_layers']):
        w = {k.removeprefix(f'transformer.h.{i}.'): v.double() for k, v in state.items() if f'.h.{i}.' in k}
        h = norm(x, f'transformer.h.{i}.ln_1.weight')
        q, k, v = (h @ w['attn.c_attn.weight'].T + w['attn.c_attn.bias']).view(n, 3, heads, d).unbind(1)
        scores = torch.einsum('ihd,jhd->hij', rotate(q) * logn[:, None, None], rotate(k)) / d**0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
        x = x + torch.einsum('hij,jhd->ihd', scores.softmax(-1), v).reshape(n, -1) @ w['attn.c_proj.weight'].T
        h = norm(x, f'transformer.h.{i}.ln_2.weight')
        x = x + (h @ w['mlp.w1.weight'].T * F.silu(h @ w['mlp.w2.weight'].T)) @ w['mlp.c_proj.weight'].T
    return (norm(x, 'transformer.ln_f.weight') @ state['lm_head.weight'].double().T).float()


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, count: int = 12) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=count,
        min_new_tokens=count, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return out


def check_golden(model: Any, expected: dict[str, torch.Tensor], sides: tuple[str, ...]) -> None:
    """Compare logits, both paddings, the loss and greedy tokens of a batch with those of the original code."""
    ids = expected['input_ids']
    with torch.no_grad():
        out = model(ids, attention_mask=expected['attention_mask'], labels=ids)
        torch.testing.assert_close(out.logits, expected['logits'], atol=1e-4, rtol=0)
        assert abs(float(out.loss) - float(expected['loss'])) < 1e-5
        for side in sides:
            padded, mask = expected.get(f'input_ids_{side}', ids), expected[f'attention_mask_{side}']
            logits, kept = model(padded, attention_mask=mask).logits, mask.bool()
            torch.testing.assert_close(logits[kept], expected[f'logits_{side}'][kept], atol=1e-4, rtol=0)
    assert torch.equal(generate(model, ids[:, :16]), expected['generated'])


def test_the_original_code_and_the_native_class_agree() -> None:
    model = open_original(QWEN, PLAIN, dtype=torch.float32)
    expected = load_file(PLAIN / 'expected.safetensors')
    check_golden(model, expected, ('leftpad', 'rightpad'))
    padded, mask = expected['input_ids_leftpad'][:, :16], expected['attention_mask_leftpad'][:, :16]
    assert torch.equal(generate(model, padded, mask), expected['generated_leftpad'])
    model.train()
    loss = model(expected['input_ids'], labels=expected['input_ids']).loss
    loss.backward()
    assert abs(float(loss) - float(expected['train_loss'])) < 1e-5
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, expected['train_grad_embed'], atol=1e-5, rtol=0)


def test_names_of_august_2023_and_sharded_bin_files_give_the_same_model(tmp_path: Path) -> None:
    config, state = read_json(PLAIN), load_file(PLAIN / 'model.safetensors')
    old = {OLD_NAMES.get(name, name): value for name, value in config.items()}
    # That code embedded the padded size and ignored vocab_size; it also stored tables.
    old |= {'vocab_size': 300, 'n_positions': 512, 'activation': 'swiglu'}
    state |= {
        'transformer.h.0.attn.bias': torch.ones(1, 1, 4, 4), 'transformer.h.1.attn.masked_bias': torch.tensor(-1e4),
        'transformer.rotary_emb.inv_freq': torch.ones(8), 'transformer.h.0.attn.logn_tensor': torch.ones(4),
    }  # fmt: skip
    (tmp_path / 'config.json').write_text(json.dumps(old))
    shards = {name: f'pytorch_model-0000{i % 3 + 1}-of-00003.bin' for i, name in enumerate(state)}
    for shard in sorted(set(shards.values())):
        torch.save({name: state[name] for name in state if shards[name] == shard}, tmp_path / shard)
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': shards}))
    model = open_original(QWEN, tmp_path, dtype=torch.float32)
    check_golden(model, load_file(PLAIN / 'expected.safetensors'), ('leftpad', 'rightpad'))


def test_other_sizes_agree_with_plain_arithmetic(tmp_path: Path) -> None:
    """Six heads, three layers, another base and epsilon, against a computation that shares no code."""
    config = read_json(PLAIN) | {
        'hidden_size': 72, 'num_attention_heads': 6, 'kv_channels': 12, 'num_hidden_layers': 3,
        'intermediate_size': 208, 'rotary_emb_base': 50000, 'layer_norm_epsilon': 1e-5, 'vocab_size': 150,
    }  # fmt: skip
    state = random_state(config)
    model = open_original(QWEN, write_checkpoint(tmp_path / 'a', config, state), dtype=torch.float32)
    ids = torch.randint(150, (SEQ,))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], reference(state, config, ids), atol=1e-4, rtol=0)


def test_what_is_saved_opens_as_plain_qwen2_and_here_with_its_long_contexts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(PLAIN, torch_dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = read_json(tmp_path)
    assert saved['architectures'] == ['Qwen2ForCausalLM'] and saved['model_type'] == 'qwen2'
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(plain).__module__.startswith('transformers.')
    short, long = tokens(SEQ)[None], tokens(3 * SEQ)[None]
    with torch.no_grad():
        assert torch.equal(plain(short).logits, model(short).logits)
        assert not torch.allclose(plain(long).logits, model(long).logits, atol=0.1)
        for key in (None, 'qwen-7b'):
            again = load_model(tmp_path, model_type=key, torch_dtype=torch.float32)
            assert torch.equal(again(long).logits, model(long).logits)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('visual', {'width': 8}), ('audio', {'n': 1}), ('no_bias', False), ('rotary_pct', 0.5), ('kv_channels', 32),
        ('scale_attn_weights', False), ('quantization_config', {'quant_method': 'awq', 'bits': 4}),
    ],
)  # fmt: skip
def test_what_the_native_class_cannot_do_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        QWEN.config(read_json(PLAIN) | {field: value})


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'bits': 3}, 'bits = 3'), ({'quant_method': 'awq'}, "quant_method = 'awq'"),
        ({'checkpoint_format': 'marlin'}, "checkpoint_format = 'marlin'"),
    ],
)  # fmt: skip
def test_other_quantisations_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    config = read_json(PACKED)
    with pytest.raises(ConfigError, match=named):
        QWEN_GPTQ.config(config | {'quantization_config': config['quantization_config'] | changes})
    with pytest.raises(ConfigError, match='quantization_config = None'):
        QWEN_GPTQ.config(read_json(PLAIN))


def test_a_config_tells_its_family_and_gets_an_end_of_text() -> None:
    plain, packed = read_json(PLAIN), read_json(PACKED)
    assert [QWEN.matches(c) for c in (plain, packed, plain | {'visual': {}}, plain | {'audio': {}})] == [1, 0, 0, 1]
    assert [QWEN_GPTQ.matches(c) for c in (plain, packed, packed | {'visual': {}})] == [0, 1, 0]
    assert QWEN.config(plain)['eos_token_id'] is None
    assert QWEN.config(plain | {'vocab_size': 151936})['eos_token_id'] == 151643
    assert QWEN.config(plain | {'eos_token_id': 7})['eos_token_id'] == 7


@pytest.mark.parametrize(
    ('key', 'tensor', 'message'),
    [
        ('transformer.h.0.attn.c_rot.weight', torch.ones(2, 2), 'c_rot.weight'),
        ('transformer.h.0.mlp.w1.bias', torch.zeros(128), 'w1.bias'),
        ('transformer.h.2.ln_1.weight', torch.ones(64), 'unexpected'),
        ('transformer.h.0.attn.c_attn.weight', torch.ones(191, 64), '3 equal parts'),
        ('transformer.h.0.mlp.w2.weight', torch.ones(64, 64), 'gate_proj'),
        ('transformer.ln_f.weight', None, 'missing tensors: model.norm.weight'),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, key: str, tensor: torch.Tensor | None, message: str) -> None:
    state = load_file(PLAIN / 'model.safetensors')
    state = {k: v for k, v in state.items() if k != key} | ({key: tensor} if tensor is not None else {})
    with pytest.raises(ConfigError, match=message):
        open_original(QWEN, write_checkpoint(tmp_path / 'a', read_json(PLAIN), state), dtype=torch.float32)


GRID = [(b, s, a, o) for b in (4, 8) for s in (True, False) for a in (True, False) for o in (1, 0)]


@pytest.mark.parametrize(('bits', 'symmetric', 'act_order', 'offset'), GRID)
def test_parts_of_a_fused_layer_unpack_to_slices_of_it(
    bits: int, symmetric: bool, act_order: bool, offset: int
) -> None:
    assert len(GRID) == 16
    torch.manual_seed(bits)
    tensors, weight = quantised(
        3 * 136, 64, bits=bits, group=16, symmetric=symmetric, act_order=act_order, offset=offset
    )
    form = gptq.Format(bits=bits, zero_offset=offset)
    whole = gptq.PackedWeight(**tensors, format=form)
    whole.check('layer')
    # 408 outputs: several blocks, with a short last one.
    assert torch.equal(whole[...].to(dtype=torch.float32), weight)
    cut = {name: gptq.split_fused(f'c_attn.{name}', tensor, 3) for name, tensor in tensors.items()}
    for i in range(3):
        part = gptq.PackedWeight(**{name: parts[i] for name, parts in cut.items()}, format=form)
        part.check('part')
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(part.to(dtype=dtype), weight[136 * i : 136 * (i + 1)].to(dtype))


def test_quantised_weights_are_unpacked_on_load_after_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = open_original(QWEN_GPTQ, PACKED, dtype=torch.float32)
    expected = load_file(PACKED / 'expected.safetensors')
    check_golden(model, expected, ('leftpad',))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected['q_proj0_dequant'])
    assert 'quantization_config' not in model.config.to_dict()
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert f'{2 * layers / 2**30:.3g} GiB in 16 bits or {4 * layers / 2**30:.3g} GiB in fp32' in warning
    assert 'pip install optimum gptqmodel' in warning
    for dtype in (torch.float16, torch.bfloat16):
        half = open_original(QWEN_GPTQ, PACKED, dtype=dtype)
        assert torch.equal(half.model.layers[0].self_attn.q_proj.weight, expected['q_proj0_dequant'].to(dtype))


@pytest.mark.parametrize(('bits', 'group', 'act_order'), [(8, 16, True), (4, -1, False), (4, 32, True)])
def test_other_quantisation_settings_agree_with_plain_arithmetic(
    tmp_path: Path, bits: int, group: int, act_order: bool
) -> None:
    folder, plain = gptq_checkpoint(tmp_path / 'a', bits=bits, group=group, act_order=act_order)
    model = open_original(QWEN_GPTQ, folder, dtype=torch.float32)
    ids = torch.randint(320, (30,))
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids[None]).logits[0], reference(plain, read_json(PACKED), ids), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize('bits', [4, 8])
def test_adapters_on_unpacked_weights_are_computed_in_one_step(bits: int, tmp_path: Path) -> None:
    folder, _ = gptq_checkpoint(tmp_path / 'a', bits=bits, group=32, act_order=bits == 8)
    model = open_original(QWEN_GPTQ, folder, dtype=torch.float32)
    tuned = prepare_model(model, SftArguments(lora_target_modules=[ALL_LINEAR]))
    kinds = Counter(type(layer).__name__ for layer in tuned.modules() if isinstance(layer, LoraLayer))
    assert kinds == {'FusedLinear': 14}


@pytest.mark.parametrize(
    ('key', 'tensor', 'message'),
    [
        ('transformer.h.0.mlp.w1.scales', None, 'has no scales'),
        ('transformer.h.0.mlp.w1.qzeros', torch.ones(2, 15, dtype=torch.int32), r'qzeros \(2, 15\)'),
        ('transformer.h.1.attn.c_attn.g_idx', torch.full((64,), 9, dtype=torch.int32), 'do not fit each other'),
        ('transformer.h.0.mlp.w2.bias', torch.ones(128), 'is not zero'),
        ('transformer.h.0.mlp.w3.bias', torch.zeros(128), 'w3.bias'),
    ],
)
@pytest.mark.parametrize('packed', [False, True])
def test_damaged_quantised_layers_are_named(
    tmp_path: Path,
    key: str,
    tensor: torch.Tensor | None,
    message: str,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('utils.loading.legacy.families.qwen.packed_available', lambda: packed)
    state = load_file(PACKED / 'model.safetensors')
    state = {k: v for k, v in state.items() if k != key} | ({key: tensor} if tensor is not None else {})
    with pytest.raises(ConfigError, match=message):
        open_original(QWEN_GPTQ, write_checkpoint(tmp_path / 'a', read_json(PACKED), state), dtype=torch.float32)


def test_packed_weights_stay_packed_where_the_libraries_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('utils.loading.legacy.families.qwen.packed_available', lambda: True)
    config, state = read_json(PACKED), load_file(PACKED / 'model.safetensors')
    kept = QWEN_GPTQ.config(config)['quantization_config']
    assert {name: kept[name] for name in config['quantization_config']} == config['quantization_config']
    packed = QWEN_GPTQ.tensors(state, config)
    layers = {key.rpartition('.')[0] for key in packed if key.endswith('.qweight')}
    assert len(layers) == 14 and all(tensor.is_contiguous() for tensor in packed.values())
    assert sorted(key for key in packed if key.endswith('.bias')) == [
        f'model.layers.{i}.self_attn.{name}_proj.bias' for i in range(2) for name in 'kqv'
    ]
    form = gptq.read_format(config, 'qwen_gptq')
    weights = gptq.dequantise(packed, form)
    monkeypatch.setattr('utils.loading.legacy.families.qwen.packed_available', lambda: False)
    for key, weight in QWEN_GPTQ.tensors(state, config).items():
        assert torch.equal(weights[key][...].to(dtype=torch.float32), weight[...].to(dtype=torch.float32)), key


@pytest.mark.optional
@pytest.mark.parametrize(
    ('bits', 'group', 'act_order'),
    [(4, 16, False), (4, 32, True), (4, -1, False), (8, 32, True), (8, -1, False), (8, 16, False)],
)
def test_packed_weights_compute_what_unpacked_ones_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int, group: int, act_order: bool
) -> None:
    folder, _ = gptq_checkpoint(tmp_path / 'a', bits=bits, group=group, act_order=act_order)
    ids = load_file(PACKED / 'expected.safetensors')['input_ids']
    with torch.no_grad():
        expected = load_model(folder, torch_dtype=torch.float32)(ids).logits
        monkeypatch.setattr('utils.loading.legacy.families.qwen.packed_available', lambda: True)
        for dtype in (torch.float32, torch.float16):
            model = load_model(folder, torch_dtype=dtype)
            assert sum(isinstance(layer, packed_classes()) for layer in model.modules()) == 14
            torch.testing.assert_close(model(ids).logits.float(), expected, atol=5e-2, rtol=0)


@pytest.mark.optional
def test_packed_golden_through_the_public_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('utils.loading.legacy.families.qwen.packed_available', lambda: True)
    expected = load_file(PACKED / 'expected.safetensors')
    for dtype, bound in ((None, 5e-2), (torch.float32, 1e-2)):  # the default of the entry is fp16
        model = load_model(PACKED, model_type='qwen-7b-chat-int4', torch_dtype=dtype)
        with torch.no_grad():
            for side in ('', '_leftpad'):
                mask = expected[f'attention_mask{side}']
                found = model(expected[f'input_ids{side}'], attention_mask=mask).logits.float()
                assert (found - expected[f'logits{side}'])[mask == 1].abs().max() <= bound
        assert torch.equal(generate(model, expected['input_ids'][:, :16]), expected['generated'])


@pytest.mark.optional
def test_what_is_saved_packed_opens_packed_to_the_same_logits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """gptqmodel rewrites zero points while loading: a folder that still states the old format would be read wrongly."""
    from tests.support.tiny_models import make_tokenizer

    monkeypatch.setattr('utils.loading.legacy.families.qwen.packed_available', lambda: True)
    model, ids = load_model(PACKED, torch_dtype=torch.float32), tokens(20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        for name in ('once', 'twice'):
            save_whole(model, make_tokenizer(), tmp_path / name)
            model = load_model(tmp_path / name, torch_dtype=torch.float32)
            assert torch.equal(model(ids).logits, expected)
    settings = read_json(tmp_path / 'twice')['quantization_config']
    assert (settings['checkpoint_format'], settings['bits'], settings['backend']) == ('gptq_v2', 4, 'auto')


def test_packed_loading_needs_both_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[str] = set()
    monkeypatch.setattr('importlib.util.find_spec', lambda name: name if name in found else None)
    answers = []
    for installed in (set(), {'optimum'}, {'gptqmodel'}, {'optimum', 'gptqmodel'}):
        found = installed
        answers.append(gptq.packed_available())
    assert answers == [False, False, False, True]


def long_checkpoint(folder: Path, **changes: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    config, state = read_json(PLAIN) | changes, load_file(PLAIN / 'model.safetensors')
    return open_original(QWEN, write_checkpoint(folder, config, state), dtype=torch.float32), state, config


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(320, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('ntk', [False, True])
@pytest.mark.parametrize('logn', [False, True])
def test_long_contexts_are_scaled_as_in_the_original(tmp_path: Path, ntk: bool, logn: bool) -> None:
    model, state, config = long_checkpoint(tmp_path / 'a', use_dynamic_ntk=ntk, use_logn_attn=logn)
    with torch.no_grad():
        for length in (SEQ, SEQ + 1, 2 * SEQ, 2 * SEQ + 1, 4 * SEQ):
            ids = tokens(length)
            torch.testing.assert_close(model(ids[None]).logits[0], reference(state, config, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize('prompt', [SEQ - 4, SEQ + 1])
def test_the_factor_of_the_prompt_stays_while_tokens_are_added(tmp_path: Path, prompt: int) -> None:
    model, state, config = long_checkpoint(tmp_path / 'a')
    # An earlier, longer prompt must not change the result.
    generate(model, tokens(5 * SEQ)[None], count=2)
    row = tokens(prompt)
    made = generate(model, row[None])[0]
    for _ in range(12):
        row = torch.cat((row, reference(state, config, row, prompt=prompt)[-1].argmax()[None]))
    assert torch.equal(made, row)


def test_padding_does_not_change_a_long_row(tmp_path: Path) -> None:
    model, _, _ = long_checkpoint(tmp_path / 'a')
    short, long = tokens(SEQ - 10, seed=1), tokens(2 * SEQ + 5, seed=2)
    gap = len(long) - len(short)
    batch = torch.stack((F.pad(short, (gap, 0)), long))
    mask = torch.stack((F.pad(torch.ones_like(short), (gap, 0)), torch.ones_like(long)))
    together = generate(model, batch, mask, count=20)
    assert torch.equal(together[0, gap:], generate(model, short[None], count=20)[0])
    assert torch.equal(together[1], generate(model, long[None], count=20)[0])


def test_nothing_changes_within_the_training_length_nor_in_training(tmp_path: Path) -> None:
    from transformers import Qwen2ForCausalLM

    model, _, _ = long_checkpoint(tmp_path / 'a')
    plain = Qwen2ForCausalLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens(SEQ)[None]).logits, plain(tokens(SEQ)[None]).logits)
        assert not torch.allclose(model(tokens(SEQ + 1)[None]).logits, plain(tokens(SEQ + 1)[None]).logits, atol=0.1)
        assert torch.equal(model.train()(tokens(3 * SEQ)[None]).logits, plain.train()(tokens(3 * SEQ)[None]).logits)


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_an_adapter_is_scaled_as_the_weights_it_becomes(tmp_path: Path, attention: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, state, config = long_checkpoint(tmp_path / 'a')
    model.set_attn_implementation(attention)
    ids = tokens(3 * SEQ)
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules='all-linear', init_lora_weights=False, task_type='CAUSAL_LM')
    ).eval()
    with torch.no_grad():
        wrapped = adapted(ids[None]).logits
        merged = adapted.merge_and_unload()(ids[None]).logits
    torch.testing.assert_close(wrapped, merged, atol=1e-3, rtol=1e-4)
    natives = {
        f'{name}.weight': layer.weight for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    for i in range(2):
        prefix = f'model.layers.{i}'
        for old, new in (
            ('attn.c_proj', 'self_attn.o_proj'), ('mlp.w1', 'mlp.up_proj'), ('mlp.w2', 'mlp.gate_proj'),
            ('mlp.c_proj', 'mlp.down_proj'),
        ):  # fmt: skip
            state[f'transformer.h.{i}.{old}.weight'] = natives[f'{prefix}.{new}.weight'].detach()
        fused = [natives[f'{prefix}.self_attn.{name}_proj.weight'].detach() for name in 'qkv']
        state[f'transformer.h.{i}.attn.c_attn.weight'] = torch.cat(fused)
    torch.testing.assert_close(merged[0], reference(state, config, ids), atol=1e-3, rtol=1e-4)

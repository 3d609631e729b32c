"""Qwen-VL: golden outputs of the original code, variants against a slow independent computation, images, refusals."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.old_models import pack_text
from tests.support.runs import ROOT
from utils.base.errors import ConfigError
from utils.formats.images import BadImage, find_images, image_size, name_images, place_image, read_images, replace_tags
from utils.infer.generation import generate_batch
from utils.loading.legacy.families.qwen import QWEN, QWEN_GPTQ
from utils.loading.legacy.families.qwen_vl import QWEN_VL, QWEN_VL_GPTQ
from utils.loading.legacy.family import Family, State
from utils.loading.legacy.opening import open_original, open_saved

GOLDEN = ROOT / 'tests' / 'goldens' / 'qwenvl-a'
TOLERANCE = 1e-4
OLD_NAMES = {
    'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head',
    'intermediate_size': 'ffn_hidden_size', 'vocab_size': 'padded_vocab_size',
}  # fmt: skip


@pytest.fixture(scope='module')
def golden() -> State:
    return load_file(GOLDEN / 'expected.safetensors')


def read_golden() -> tuple[dict[str, Any], State]:
    return json.loads((GOLDEN / 'config.json').read_text(encoding='utf-8')), load_file(GOLDEN / 'model.safetensors')


def write_folder(folder: Path, config: dict[str, Any], state: State) -> Path:
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / 'model.safetensors')
    return folder


def open_folder(folder: Path = GOLDEN, family: Family = QWEN_VL, **options: Any) -> Any:
    return open_original(family, folder, **{'dtype': torch.float32, **options}).eval()


def logits_of(model: Any, ids: Any, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(ids, **inputs).logits


# Golden outputs of the original code


def test_features_and_logits_of_the_original_code(golden: State) -> None:
    model, pixels = open_folder(), golden['pixel_values']
    with torch.no_grad():
        assert (model.visual(pixels) - golden['image_features']).abs().max() <= TOLERANCE
    seen = logits_of(model, golden['input_ids'], pixel_values=pixels)
    assert (seen - golden['logits']).abs().max() <= TOLERANCE
    assert (logits_of(model, golden['text_input_ids']) - golden['text_logits']).abs().max() <= TOLERANCE
    mask = golden['attention_mask']
    padded = logits_of(model, golden['padded_input_ids'], attention_mask=mask, pixel_values=pixels)
    difference = (padded - golden['padded_logits'])[mask == 1]
    assert 0 < len(difference) < mask.numel()
    assert difference.abs().max() <= TOLERANCE


def test_what_the_images_show_matters(golden: State) -> None:
    swapped = logits_of(open_folder(), golden['input_ids'], pixel_values=golden['pixel_values'].flip(0))
    assert (swapped - golden['logits']).abs().max() > 0.1


@pytest.mark.parametrize('padded', [False, True])
def test_greedy_tokens_of_the_original_code(golden: State, padded: bool) -> None:
    ids = golden['padded_input_ids' if padded else 'input_ids']
    whole = open_folder().generate(
        input_ids=ids, attention_mask=golden['attention_mask'] if padded else torch.ones_like(ids),
        pixel_values=golden['pixel_values'], do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0,
    )  # fmt: skip
    expected = golden['padded_generated' if padded else 'generated']
    assert expected.shape == (2, 12)
    assert torch.equal(whole[:, ids.shape[1] :], expected)


def test_pixels_are_those_of_the_original_preprocessing(golden: State) -> None:
    pixels = read_images([GOLDEN / 'a.png', str(GOLDEN / 'b.png')], 56)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, golden['pixel_values'])
    assert read_images([], 56).shape == (0, 3, 56, 56)
    assert read_images([GOLDEN / 'a.png'], 448).shape == (1, 3, 448, 448)


# Variants against a slow computation in fp64 from the tensors of the original layout


def cubic(source: int, target: int) -> Any:
    """Return the matrix (target, source) of cubic convolution (Keys, a = -0.75) with repeated borders."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        place = (row + 0.5) * source / target - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - tap)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            weight = near if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(tap, 0), source - 1)] += weight
    return matrix


def positions(table: Any, count: int) -> Any:
    source, target = math.isqrt(len(table)), math.isqrt(count)
    if source == target:
        return table
    matrix = cubic(source, target)
    return torch.einsum('as,bt,stc->abc', matrix, matrix, table.view(source, source, -1)).flatten(0, 1)


def norm(x: Any, state: State, name: str) -> Any:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[f'{name}.weight'] + state[f'{name}.bias']


def linear(x: Any, state: State, name: str) -> Any:
    return x @ state[f'{name}.weight'].t() + state.get(f'{name}.bias', 0)


def attend(query: Any, key: Any, value: Any, mask: Any = 0) -> Any:
    return torch.softmax(query @ key.t() / math.sqrt(query.shape[-1]) + mask, dim=-1) @ value


def reference_features(visual: dict[str, Any], state: State, image: Any) -> Any:
    """Return the features (n_queries, output_dim) of one image."""
    v = 'transformer.visual'
    patch, width, heads, out = (visual[name] for name in ('patch_size', 'width', 'heads', 'output_dim'))
    grid = image.shape[-1] // patch
    cut = image[:, : grid * patch, : grid * patch].reshape(3, grid, patch, grid, patch)
    x = cut.permute(1, 3, 0, 2, 4).reshape(grid * grid, -1) @ state[f'{v}.conv1.weight'].reshape(width, -1).t()
    x = norm(x + positions(state[f'{v}.positional_embedding'], grid * grid), state, f'{v}.ln_pre')
    for layer in range(visual['layers']):
        block, size = f'{v}.transformer.resblocks.{layer}', width // heads
        fused = linear(norm(x, state, f'{block}.ln_1'), state, f'{block}.attn.in_proj')
        per_head = [fused[:, 3 * size * h : 3 * size * (h + 1)].split(size, dim=1) for h in range(heads)]
        x = x + linear(torch.cat([attend(*qkv) for qkv in per_head], dim=1), state, f'{block}.attn.out_proj')
        inner = linear(norm(x, state, f'{block}.ln_2'), state, f'{block}.mlp.c_fc')
        x = x + linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), state, f'{block}.mlp.c_proj')
    pool = f'{v}.attn_pool'
    x = norm(linear(x, state, f'{pool}.kv_proj') if f'{pool}.kv_proj.weight' in state else x, state, f'{pool}.ln_kv')
    table = state[f'{pool}.pos_embed']
    sides = (norm(state[f'{pool}.query'], state, f'{pool}.ln_q') + table, x + positions(table, len(x)), x)
    weights, biases = state[f'{pool}.attn.in_proj_weight'].chunk(3), state[f'{pool}.attn.in_proj_bias'].chunk(3)
    query, key, value = (side @ w.t() + b for side, w, b in zip(sides, weights, biases, strict=True))
    slices = [slice(128 * h, 128 * (h + 1)) for h in range(out // 128)]
    seen = torch.cat([attend(query[:, s], key[:, s], value[:, s]) for s in slices], dim=1)
    return norm(linear(seen, state, f'{pool}.attn.out_proj'), state, f'{v}.ln_post') @ state[f'{v}.proj']


def reference_logits(config: dict[str, Any], state: State, ids: list[int], images: list[Any]) -> Any:
    """Return the logits (T, vocabulary) of one row, with NTK and log-n where it is longer than seq_length."""
    state = {key: tensor.double() for key, tensor in state.items()}
    hidden, heads, trained = config['hidden_size'], config['num_attention_heads'], config['seq_length']
    size, length, start = hidden // heads, len(ids), config['visual']['image_start_id']
    x = state['transformer.wte.weight'][ids].clone()
    opened = [place for place, token in enumerate(ids) if token == start]
    for place, image in zip(opened, images, strict=True):
        features = reference_features(config['visual'], state, image.double())
        x[place + 1 : place + 1 + len(features)] = features
    alpha = max(2 ** math.ceil(math.log2(length / trained) + 1) - 1, 1)
    base = config['rotary_emb_base'] * alpha ** (size / (size - 2))
    places = torch.arange(length, dtype=torch.float64)
    angles = places[:, None] / base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turn = torch.polar(torch.ones_like(angles), angles)
    logn = ((places + 1).log() / math.log(trained)).clamp(min=1)[:, None]
    mask = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)

    def rms(values: Any, name: str) -> Any:
        return values / (values.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[name]

    def rotate(values: Any) -> Any:
        turned = torch.complex(values[:, : size // 2], values[:, size // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], dim=1)

    for layer in range(config['num_hidden_layers']):
        h = f'transformer.h.{layer}'
        fused = linear(rms(x, f'{h}.ln_1.weight'), state, f'{h}.attn.c_attn').split(hidden, dim=1)
        rows = [[side[:, size * n : size * (n + 1)] for side in fused] for n in range(heads)]
        seen = [attend(rotate(q) * logn, rotate(k), v, mask) for q, k, v in rows]
        x = x + linear(torch.cat(seen, dim=1), state, f'{h}.attn.c_proj')
        inner = rms(x, f'{h}.ln_2.weight')
        gate = linear(inner, state, f'{h}.mlp.w2')
        x = x + linear(linear(inner, state, f'{h}.mlp.w1') * gate * gate.sigmoid(), state, f'{h}.mlp.c_proj')
    return linear(rms(x, 'transformer.ln_f.weight'), state, 'lm_head')


def make_config(**visual: Any) -> dict[str, Any]:
    """Return a config.json of another size: 2 layers, 6 heads of 64, a grid of 3 x 3 patches with a remainder."""
    out = visual.get('output_dim', 384)
    return {
        **read_golden()[0], 'hidden_size': out, 'num_attention_heads': out // 64, 'kv_channels': 64,
        'num_hidden_layers': 2, 'intermediate_size': 80, 'vocab_size': 211, 'rotary_emb_base': 5000,
        'visual': {
            'heads': 3, 'image_size': 45, 'image_start_id': 205, 'layers': 3, 'mlp_ratio': 1.9, 'output_dim': out,
            'patch_size': 14, 'width': 24, 'n_queries': 4, **visual,
        },
    }  # fmt: skip


def make_state(config: dict[str, Any]) -> State:
    """Return random tensors in the original layout."""
    hidden, half, vocabulary = config['hidden_size'], config['intermediate_size'] // 2, config['vocab_size']
    visual = config['visual']
    w, out, queries = visual['width'], visual['output_dim'], visual['n_queries']
    inner = int(w * visual['mlp_ratio'])
    shapes: dict[str, tuple[int, ...]] = {
        'transformer.wte': (vocabulary, hidden), 'lm_head': (vocabulary, hidden), 'transformer.ln_f': (hidden,),
    }  # fmt: skip
    for n in range(config['num_hidden_layers']):
        h = f'transformer.h.{n}'
        shapes |= {
            f'{h}.ln_1': (hidden,), f'{h}.ln_2': (hidden,), f'{h}.attn.c_attn': (3 * hidden, hidden),
            f'{h}.attn.c_proj': (hidden, hidden), f'{h}.mlp.w1': (half, hidden), f'{h}.mlp.w2': (half, hidden),
            f'{h}.mlp.c_proj': (hidden, half),
        }  # fmt: skip
    shapes = {f'{name}.weight': shape for name, shape in shapes.items()}
    shapes |= {f'transformer.h.{n}.attn.c_attn.bias': (3 * hidden,) for n in range(config['num_hidden_layers'])}
    v, pool = 'transformer.visual', 'transformer.visual.attn_pool'
    both: dict[str, tuple[int, ...]] = {
        f'{v}.ln_pre': (w,), f'{v}.ln_post': (out,), f'{pool}.ln_q': (out,), f'{pool}.ln_kv': (out,),
        f'{pool}.attn.out_proj': (out, out),
    }  # fmt: skip
    for n in range(visual['layers']):
        block = f'{v}.transformer.resblocks.{n}'
        both |= {
            f'{block}.ln_1': (w,), f'{block}.ln_2': (w,), f'{block}.attn.in_proj': (3 * w, w),
            f'{block}.attn.out_proj': (w, w), f'{block}.mlp.c_fc': (inner, w), f'{block}.mlp.c_proj': (w, inner),
        }  # fmt: skip
    for name, shape in both.items():
        shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    shapes |= {
        f'{v}.conv1.weight': (w, 3, visual['patch_size'], visual['patch_size']), f'{v}.proj': (out, out),
        f'{v}.positional_embedding': (256, w), f'{pool}.query': (queries, out), f'{pool}.pos_embed': (queries, out),
        f'{pool}.attn.in_proj_weight': (3 * out, out), f'{pool}.attn.in_proj_bias': (3 * out,),
        **({} if w == out else {f'{pool}.kv_proj.weight': (out, w)}),
    }  # fmt: skip
    torch.manual_seed(0)
    return {
        name: torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3) + ('ln_' in name and 'weight' in name)
        for name, shape in shapes.items()
    }


def make_row(config: dict[str, Any], images: int, tail: int) -> tuple[list[int], Any]:
    """Return the ids of a row with images and their random pixels."""
    start, side = config['visual']['image_start_id'], config['visual']['image_size']
    slots = [start, *[start + 2] * config['visual']['n_queries'], start + 1]
    row = [7, 8]
    for n in range(images):
        row += [*slots, 20 + n]
    return row + [(11 * n) % 200 for n in range(tail)], torch.randn(images, 3, side, side)


VARIANTS: dict[str, dict[str, Any]] = {
    'other sizes': make_config(),
    'widths equal, no kv_proj': make_config(output_dim=128, width=128, heads=4, n_queries=9),
    'no table resized': make_config(image_size=64, patch_size=4, n_queries=256, layers=1, output_dim=128),
    'beyond the trained length': {**make_config(), 'seq_length': 16},
}


@pytest.mark.parametrize('name', VARIANTS)
def test_variants_agree_with_a_slow_computation(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    state = make_state(config)
    model = open_folder(write_folder(tmp_path / 'model', config, state))
    for images, tail in ((2, 5), (1, 31), (0, 12)):
        ids, pixels = make_row(config, images, tail)
        found = logits_of(model, torch.tensor([ids]), pixel_values=pixels if images else None)[0]
        expected = reference_logits(config, state, ids, list(pixels))
        assert expected.std() > 0.3
        assert (found - expected).abs().max() <= TOLERANCE


def test_old_field_names_and_shards_of_bin_open_to_the_same(tmp_path: Path) -> None:
    config, state = make_config(), make_state(make_config())
    model = open_folder(write_folder(tmp_path / 'new', config, state))
    old = tmp_path / 'old'
    old.mkdir()
    renamed = {OLD_NAMES.get(name, name): value for name, value in config.items()}
    assert len(set(renamed) - set(config)) == 5
    (old / 'config.json').write_text(json.dumps(renamed), encoding='utf-8')
    keys = sorted(state, key=lambda key: key[::-1])
    files = {f'pytorch_model-0000{n + 1}-of-00003.bin': keys[n::3] for n in range(3)}
    for file, names in files.items():
        torch.save({key: state[key] for key in names}, old / file)
    index = {'weight_map': {key: file for file, names in files.items() for key in names}}
    (old / 'pytorch_model.bin.index.json').write_text(json.dumps(index), encoding='utf-8')
    first, second = model.state_dict(), open_folder(old).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


# Saving, training, generating


def test_a_saved_model_opens_to_the_same_and_not_by_chance(golden: State, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = open_folder()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    assert saved['model_type'] == QWEN_VL.saved_model_type == 'assay_qwen_vl'
    assert 'auto_map' not in saved
    reopened = open_saved(QWEN_VL, tmp_path, dtype=torch.float32).eval()
    assert type(reopened) is type(model)
    ids, pixels = golden['input_ids'], golden['pixel_values']
    assert torch.equal(logits_of(reopened, ids, pixel_values=pixels), logits_of(model, ids, pixel_values=pixels))
    for plain in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match='assay_qwen_vl'):
            plain.from_pretrained(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(('dtype', 'rounding'), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_half_precision_differs_by_rounding(golden: State, dtype: torch.dtype, rounding: float) -> None:
    model = open_folder(dtype=dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    logits = logits_of(model, golden['input_ids'], pixel_values=golden['pixel_values'])
    assert logits.dtype == dtype
    assert golden['logits'].std() > 4
    assert 0 < (logits.float() - golden['logits']).abs().mean() < rounding


def test_lora_on_the_text_trains_and_leaves_the_tower(golden: State, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(open_folder(), LoraConfig(r=4, target_modules=['q_proj', 'k_proj', 'v_proj'])).train()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 6
    assert not any('visual' in name for name in trained)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if 'visual' in key}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    ids, pixels = golden['input_ids'], golden['pixel_values']
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=ids, pixel_values=pixels, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[5] < losses[0] - 0.1
    assert len(before) == 42
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())

    model.eval().save_pretrained(tmp_path)
    expected = logits_of(model, ids, pixel_values=pixels)
    again = PeftModel.from_pretrained(open_folder(), str(tmp_path)).eval()
    assert torch.equal(logits_of(again, ids, pixel_values=pixels), expected)
    merged = tmp_path / 'merged'
    again.merge_and_unload().save_pretrained(merged)
    found = logits_of(open_saved(QWEN_VL, merged, dtype=torch.float32).eval(), ids, pixel_values=pixels)
    assert (found - expected).abs().max() <= TOLERANCE


def test_lora_on_the_tower_reaches_every_layer_of_it(golden: State) -> None:
    from peft import LoraConfig, get_peft_model

    names = ['in_proj', 'out_proj', 'c_fc', 'c_proj', 'kv_proj']
    model = get_peft_model(open_folder(), LoraConfig(r=2, target_modules=names)).train()
    model(golden['input_ids'], pixel_values=golden['pixel_values'], labels=golden['input_ids']).loss.backward()
    outer = {name: w.grad for name, w in model.named_parameters() if 'lora_B' in name}
    assert len(outer) == 2 * 4 + 2
    assert all(grad is not None and grad.abs().max() > 0 for grad in outer.values())


def test_rows_with_an_adapter_leave_the_batch_when_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GenerationConfig

    model = get_peft_model(open_folder(), LoraConfig(r=4, target_modules=['q_proj', 'v_proj'])).eval()
    model.config.use_dynamic_ntk = False  # with it, no row leaves
    sizes: list[int] = []
    generate = model.generate
    monkeypatch.setattr(model, 'generate', lambda **words: sizes.append(len(words['input_ids'])) or generate(**words))

    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=list(range(40)), pad_token_id=0)
    prompts = [[60 + 7 * row, 50 + row, 40 + row] for row in range(8)]
    together = generate_batch(model, prompts, config)
    assert len(sizes) > 1 and sizes[0] == 8
    assert together == [generate_batch(model, [prompt], config)[0] for prompt in prompts]


@pytest.mark.parametrize('frozen', [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(golden: State, frozen: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Any]:
        model = open_folder().train()
        if frozen:
            model.visual.requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
            assert all(block.gradient_checkpointing for block in model.visual.transformer.resblocks)
        model(golden['input_ids'], pixel_values=golden['pixel_values'], labels=golden['input_ids']).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    towers = [name for name in plain if name.startswith('visual.')]
    assert (len(towers), len(plain) - len(towers)) == (0 if frozen else 41, 15)
    assert all(plain[name].abs().max() > 0 for name in towers)
    assert max(float((plain[name] - again[name]).abs().max()) for name in plain) <= 1e-6


def test_rows_without_images_give_a_trained_tower_zero_gradients(golden: State) -> None:
    model, ids = open_folder(), golden['text_input_ids']
    expected = model(ids, labels=ids).loss
    loss = model.train()(ids, labels=ids).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert {float(weight.grad.abs().max()) for weight in model.visual.parameters()} == {0.0}
    frozen = open_folder().train()
    frozen.visual.requires_grad_(False)
    frozen(ids, labels=ids).loss.backward()
    assert all(weight.grad is None for weight in frozen.visual.parameters())


def test_beams_keep_the_images_of_their_row(tmp_path: Path) -> None:
    config = make_config()
    model = open_folder(write_folder(tmp_path / 'model', config, make_state(config)))
    settings: dict[str, Any] = {
        'num_beams': 3, 'do_sample': False, 'max_new_tokens': 6, 'min_new_tokens': 6, 'pad_token_id': 0,
        'return_dict_in_generate': True, 'output_logits': True,
    }  # fmt: skip
    (long, two), (short, one) = make_row(config, 2, 2), make_row(config, 1, 9)
    assert len(long) == len(short)
    ids, pixels = torch.tensor([long, short]), torch.cat([two, one])
    together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **settings)
    swapped = logits_of(model, ids[:1], pixel_values=two.flip(0))[0, -1]
    for row, images in ((0, two), (1, one)):
        expected = logits_of(model, ids[row : row + 1], pixel_values=images)[0, -1]
        assert (swapped - expected).abs().max() > 0.01
        beams = together.logits[0][3 * row : 3 * row + 3]
        assert (beams - expected).abs().max() <= TOLERANCE
        alone = model.generate(
            input_ids=ids[row : row + 1], attention_mask=torch.ones(1, len(long), dtype=torch.long),
            pixel_values=images, **settings,
        )  # fmt: skip
        assert torch.equal(alone.sequences[0], together.sequences[row])


# GPTQ


def test_int4_is_unpacked_to_what_its_text_layers_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import utils.loading.legacy.families.qwen
    import utils.loading.legacy.families.qwen_vl
    import utils.loading.legacy.gptq

    for module in (
        utils.loading.legacy.gptq,
        utils.loading.legacy.families.qwen,
        utils.loading.legacy.families.qwen_vl,
    ):
        monkeypatch.setattr(module, 'packed_available', lambda: False)
    config = make_config()
    quantised, packed, plain = pack_text(config, make_state(config))
    assert sum(key.endswith('.qweight') for key in packed) == 2 * 5
    model = open_folder(write_folder(tmp_path / 'int4', quantised, packed), QWEN_VL_GPTQ)
    assert 'are unpacked' in caplog.text
    expected = open_folder(write_folder(tmp_path / 'plain', config, plain)).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


# Refusals


def test_families_are_told_apart() -> None:
    config = read_golden()[0]
    quantised = {**config, 'quantization_config': {'quant_method': 'gptq', 'bits': 4}}
    families = (QWEN, QWEN_GPTQ, QWEN_VL, QWEN_VL_GPTQ)
    assert [family.name for family in families if family.matches(config)] == ['qwen_vl']
    assert [family.name for family in families if family.matches(quantised)] == ['qwen_vl_gptq']


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'no_bias': False}, 'no_bias'),
        ({'rotary_pct': 0.25}, 'rotary_pct'),
        ({'kv_channels': 16}, 'kv_channels'),
        ({'audio': {}}, 'audio'),
        ({'visual': None}, 'visual = None'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config'),
        ({'visual.heads': 5}, 'visual.heads = 5'),
        ({'visual.width': None}, 'visual.width'),
        ({'visual.output_dim': 256}, 'visual.output_dim = 256'),
        ({'hidden_size': 192, 'kv_channels': 48, 'visual.output_dim': 192}, 'visual.output_dim = 192'),
        ({'visual.n_queries': 15}, 'visual.n_queries = 15'),
        ({'visual.image_size': 13}, 'visual.image_size = 13'),
        ({'visual.image_start_id': 302}, 'visual.image_start_id = 302'),
    ],
)
def test_what_cannot_be_done_exactly_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = read_golden()[0]
    for name, value in change.items():
        outer, _, inner = name.partition('.')
        config[outer] = {**config[outer], inner: value} if inner else value
    with pytest.raises(ConfigError) as error:
        QWEN_VL.config(config)
    assert named in str(error.value)


@pytest.mark.parametrize('kind', ['missing', 'unexpected', 'shape', 'unknown'])
def test_tensors_that_do_not_fit_are_named(kind: str, tmp_path: Path) -> None:
    config, state = read_golden()
    key = 'transformer.visual.attn_pool.pos_embed'
    named = key.removeprefix('transformer.')
    if kind == 'missing':
        del state[key]
    elif kind == 'shape':
        state[key] = state[key][:9]
    else:
        named = 'visual.class_embedding' if kind == 'unexpected' else 'transformer.h.0.attn.extra.weight'
        state[f'transformer.{named}' if kind == 'unexpected' else named] = torch.zeros(3)
    with pytest.raises(ConfigError, match=named.replace('.', r'\.')):
        open_folder(write_folder(tmp_path / 'model', config, state))


def test_images_and_slots_that_do_not_fit_are_refused(golden: State) -> None:
    model, ids, pixels = open_folder(), golden['input_ids'], golden['pixel_values']
    for given, images in ((None, 0), (pixels[:1], 1), (torch.cat([pixels, pixels]), 4)):
        with pytest.raises(ConfigError, match=rf'^{images} images need {images} x 16 image tokens, but .* contain 32'):
            model(ids, pixel_values=given)
    cut = int((ids[0] == 301).nonzero()[0])
    with pytest.raises(ConfigError, match='2 images need 2 x 16 image tokens, but the token ids contain 0'):
        model(ids[:1, :cut], pixel_values=pixels)
    with pytest.raises(ConfigError, match='pixel_values need input_ids'):
        model(inputs_embeds=torch.zeros(1, 3, 128), pixel_values=pixels)


# Tags and files


def test_tags_are_found_and_replaced() -> None:
    text = 'Picture 1: <img>a b/图.png</img>\nPicture 2: <img></img> what? <img src="x"> <img>open'
    assert find_images(text) == ['a b/图.png', '']
    assert replace_tags(text, r'\1') == 'Picture 1: \\1\nPicture 2: \\1 what? <img src="x"> <img>open'


def test_empty_tags_take_the_images_of_the_row_in_order() -> None:
    texts = ['<img></img> <img>b.png</img>', r'no \1 tag', '<img></img>']
    named = ['<img>a.png</img> <img>b.png</img>', r'no \1 tag', r'<img>c\1.png</img>']
    assert name_images(texts, ['a.png', 'b.png', r'c\1.png']) == named
    assert name_images(named, []) == named
    with pytest.raises(BadImage, match=r"image 'd.png' has no tag: the row has more images than tags"):
        name_images(texts, ['a.png', 'c.png', 'd.png'])
    with pytest.raises(BadImage, match='the row has fewer images than empty tags'):
        name_images(texts, ['a.png'])


def test_paths_start_at_the_data_file_and_stay_in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_image('pictures/../a.png', '/data') == '/data/a.png'
    assert place_image('..a/b.png', '/data') == '/data/..a/b.png'
    assert place_image('/elsewhere/a.png', '/data') == '/elsewhere/a.png'
    monkeypatch.setenv('HOME', '/home/me')
    assert [place_image(path, None) for path in ('~/a.png', '../a.png')] == ['/home/me/a.png', '../a.png']
    for path in ('../a.png', 'a/../../b.png', '..'):
        with pytest.raises(BadImage, match=r'leaves the folder of its data file'):
            place_image(path, '/data')
    for path in ('https://example.org/a.png', 'file:///a.png', 'data:image/png;base64,AAAA'):
        for folder in ('/data', None):
            with pytest.raises(BadImage, match='images are not downloaded'):
                place_image(path, folder)


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', '1'])
def test_every_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    source = Image.open(GOLDEN / 'a.png').convert(mode)
    path = tmp_path / ('image.jpg' if mode == 'CMYK' else 'image.png')
    source.save(path)
    pixels = read_images([path], 28)
    assert pixels.shape == (1, 3, 28, 28)
    assert pixels.std() > 0.1


def png_of_size(path: Path, width: int, height: int) -> Path:
    """Write a small PNG that claims many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    data = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + data)
    return path


def a_text(folder: Path) -> Path:
    (folder / 'text.png').write_text('not an image', encoding='utf-8')
    return folder / 'text.png'


def a_truncated_image(folder: Path) -> Path:
    (folder / 'cut.png').write_bytes((GOLDEN / 'a.png').read_bytes()[:3000])
    return folder / 'cut.png'


def a_program(folder: Path) -> Path:
    Image.open(GOLDEN / 'a.png').save(folder / 'page.eps')
    return (folder / 'page.eps').rename(folder / 'page.png')


@pytest.mark.parametrize(
    ('make', 'said'),
    [
        (a_text, 'cannot be read'),
        (a_truncated_image, 'cannot be read'),
        (a_program, 'cannot identify'),
        (lambda folder: folder / 'gone.png', 'does not exist'),
        (lambda folder: folder, 'does not exist'),
        (lambda folder: 'a\0b.png', 'does not exist'),
        (lambda folder: '', 'does not exist'),
        (lambda folder: png_of_size(folder / 'large.png', 9500, 9500), '9500 x 9500 pixels'),
        (lambda folder: png_of_size(folder / 'huge.png', 60000, 60000), 'too large to decode'),
    ],
)
def test_files_that_are_no_usable_image_are_named(make: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    path = str(make(tmp_path))
    with pytest.raises(ConfigError) as error:
        read_images([GOLDEN / 'b.png', path], 56)
    assert said in str(error.value)
    assert repr(path) in str(error.value)
    assert (error.value.path, path in error.value.reason) == (path, path == '')
    # As a data-loader process passes it on: after a traceback, with only its class kept.
    caught = (
        f'Caught BadImage in DataLoader worker process 0.\nTraceback:\nutils.formats.images.BadImage: {error.value}\n'
    )
    assert str(BadImage(caught)) == str(error.value)
    if make is not a_truncated_image:
        with pytest.raises(BadImage):
            image_size(path)

"""LoRA recipes and adapters of the fused 2023 layouts, on the native classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT
from tests.support.tiny_models import make_model
from utils.base.errors import ConfigError
from utils.loading.adapter import load_adapter
from utils.model import MODEL_MAPPING, load_model
from utils.train.prepare import find_targets

GOLDENS = ROOT / 'tests' / 'goldens'
QKV = ['q_proj', 'k_proj', 'v_proj']


def test_old_names_are_aliases_of_native_ones() -> None:
    model = make_model()
    assert find_targets(model, ['c_attn']) == (QKV, [])
    assert find_targets(model, ['W_pack', 'o_proj']) == ([*QKV, 'o_proj'], [])
    assert find_targets(model, ['c_attn', 'c_proj', 'w1', 'w2']) == (
        [*QKV, 'o_proj', 'down_proj', 'up_proj', 'gate_proj'],
        [],
    )
    assert find_targets(model, ['ALL']) == (sorted([*QKV, 'o_proj', 'gate_proj', 'up_proj', 'down_proj']), [])
    assert find_targets(model, ['all-linear']) == find_targets(model, ['ALL'])
    assert find_targets(model, ['q_proj', 'c_attn']) == (QKV, [])
    # With the parent module, which distinguishes Qwen's two c_proj layers.
    assert find_targets(model, ['attn.c_proj', 'mlp.w2', 'mlp.c_proj']) == (['o_proj', 'gate_proj', 'down_proj'], [])
    with pytest.raises(ConfigError, match="'c_attm' matches no linear layer of LlamaForCausalLM"):
        find_targets(model, ['c_attm'])


def save_old_adapter(folder: Path, modules: dict[str, tuple[int, int]], *, suffix: str) -> dict[str, tuple[Any, Any]]:
    """Write an adapter with the names of an original layout. Returns its (A, B) by module."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    matrices, state = {}, {}
    for name, (rows_in, rows_out) in modules.items():
        a = torch.randn((4, rows_in), generator=generator)
        b = 0.1 * torch.randn((rows_out, 4), generator=generator)
        matrices[name] = (a, b)
        state[f'base_model.model.{name}.lora_A.weight'] = a
        state[f'base_model.model.{name}.lora_B.weight'] = b
    if suffix == '.bin':
        torch.save(state, folder / 'adapter_model.bin')
    else:
        save_file(state, folder / 'adapter_model.safetensors')
    targets = sorted({name.rsplit('.', 1)[-1] for name in modules})
    config = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 4, 'lora_alpha': 8, 'target_modules': targets}
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    return matrices


@pytest.mark.parametrize('suffix', ['.safetensors', '.bin'])
@pytest.mark.parametrize(
    ('golden', 'key', 'fused'),
    [
        ('qwen-a', 'qwen-7b', 'transformer.h.{}.attn.c_attn'),
        ('qwen_gptq-a', 'qwen-7b-chat-int4', 'transformer.h.{}.attn.c_attn'),
        ('baichuan7b-a', 'baichuan-7b', 'model.layers.{}.self_attn.W_pack'),
        ('baichuan2_7b-a', 'baichuan2-7b', 'model.layers.{}.self_attn.W_pack'),
        ('baichuan_13b-a', 'baichuan-13b', 'model.layers.{}.self_attn.W_pack'),
        ('baichuan2_13b-a', 'baichuan2-13b', 'model.layers.{}.self_attn.W_pack'),
        ('baichuan2_13b_4bits-a', 'baichuan2-13b-chat-int4', 'model.layers.{}.self_attn.W_pack'),
        ('chatglm2-a', 'chatglm2-6b', 'transformer.encoder.layers.{}.self_attention.query_key_value'),
        ('chatglm2-a', 'chatglm2-6b-32k', 'transformer.encoder.layers.{}.self_attention.query_key_value'),
    ],
)
def test_an_adapter_of_the_fused_layout_computes_what_it_did(
    golden: str, key: str, fused: str, suffix: str, tmp_path: Path
) -> None:
    import torch

    base = GOLDENS / golden
    model = load_model(base, model_type=key, torch_dtype=torch.float32)
    attention = [layer.self_attn for layer in model.model.layers]
    parts = [attention[0].q_proj, attention[0].k_proj, attention[0].v_proj]
    width, rows = parts[0].in_features, sum(part.out_features for part in parts)
    names = {fused.format(n): (width, rows) for n in range(len(attention))}
    matrices = save_old_adapter(tmp_path / 'adapter', names, suffix=suffix)
    tuned = load_adapter(model, tmp_path / 'adapter', base, MODEL_MAPPING[key].family)
    x = torch.randn((3, width), generator=torch.Generator().manual_seed(1))
    compared = 0
    for layer, (a, b) in zip(tuned.base_model.model.model.layers, matrices.values(), strict=True):
        projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        found = torch.cat([p(x) - p.base_layer(x) for p in projections], dim=-1)
        assert float((found - 2 * x @ a.T @ b.T).abs().max()) < 1e-4
        compared += 1
    assert compared == len(attention) >= 2


def test_a_tensor_that_is_no_half_of_a_lora_is_named(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = GOLDENS / 'qwen-a'
    save_old_adapter(tmp_path / 'adapter', {'transformer.h.0.attn.c_attn': (64, 192)}, suffix='.safetensors')
    file = tmp_path / 'adapter' / 'adapter_model.safetensors'
    model = load_model(base, torch_dtype=torch.float32)
    whole = load_file(file)
    matrix_a, matrix_b = whole
    for content, named in (
        (
            {**whole, 'base_model.model.lm_head.weight': torch.ones(3)},
            "'base_model.model.lm_head.weight' is neither a lora_A",
        ),
        ({matrix_b: whole[matrix_b]}, 'without its lora_A'),
        ({matrix_a: whole[matrix_a]}, 'without its lora_B'),
    ):
        save_file(content, file)
        with pytest.raises(ConfigError, match=named):
            load_adapter(model, tmp_path / 'adapter', base)

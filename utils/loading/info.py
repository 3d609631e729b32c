"""ModelInfo, the registry entry of a model, and LoadOptions, the options for opening a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.loading.devices import Spread, resolve_device_map

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


QKV = ('q_proj', 'k_proj', 'v_proj')


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The options for opening a model. They do not depend on the model."""

    torch_dtype: torch.dtype
    device_map: str | Mapping[str, int] | Spread | None = None
    flash_attention: bool = False
    quantization_config: Any = None
    # A DistributedConfig of transformers. With it, weights are sharded while they are read.
    distributed_config: Any = None

    def keywords(self, build: Callable[[], PreTrainedModel] | None = None) -> dict[str, Any]:
        """Return these options as keyword arguments for from_pretrained.

        If `device_map` is a Spread, it is replaced by a device map for the model that `build` makes. Without `build`,
        the Spread is returned unchanged.
        """
        return {
            'dtype': self.torch_dtype,
            'device_map': resolve_device_map(self.device_map, build) if build else self.device_map,
            'quantization_config': self.quantization_config,
            'attn_implementation': 'flash_attention_2' if self.flash_attention else None,
            'distributed_config': self.distributed_config,
        }


GetFunction = Callable[[Path, 'ModelInfo', LoadOptions], 'tuple[PreTrainedModel, Any]']


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The registry entry of one model: its ids, and all settings that differ between models."""

    # The ModelScope id, a local folder or a GGUF file.
    model_id_or_path: str
    hf_model_id: str | None = None
    revision: str = 'master'
    # The function that opens the model and the tokenizer. If None, get_model_tokenizer_default is used: config.json
    # tells the class of the model.
    get_function: GetFunction | None = None
    # The name of the native class of the model, if `family` is None.
    model_class: str | None = None
    lora_target_modules: tuple[str, ...] = QKV
    template: str = 'default'
    # The file in trl's chat_templates that equals the template of this tokenizer. Tests of --template_type auto use it.
    chat_template: str | None = None
    # Files whose names match one of these regular expressions are not downloaded.
    ignore_file_pattern: tuple[str, ...] = ()
    # bf16, fp16 or fp32 if the weights need this dtype.
    torch_dtype: str | None = None
    # The storage format of quantised weights: gptq, nf4 (the 4-bit files of Baichuan2), awq or bitsandbytes. None if
    # the weights are not quantised.
    quantization: str | None = None
    # The Python packages that this model needs, with a version range if needed, e.g. 'transformers>=5.2'.
    requires: tuple[str, ...] = ()
    # For an original layout of 2023, the key in FAMILIES of utils/loading/legacy/registry.py.
    family: str | None = None
    # (package, file) of a GGUF file. If the package is installed, this file is used and nothing is downloaded.
    embedded: tuple[str, str] | None = None
    # False if model_id_or_path is an id or path that the user named. Such an id is looked up only on the chosen hub.
    registered: bool = True

    @property
    def public_id(self) -> str:
        """Return the id that is written into adapters: the Hugging Face id, or model_id_or_path if there is none."""
        return self.hf_model_id or self.model_id_or_path

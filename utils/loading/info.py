"""The entry of a model, ModelInfo, and the options with which a model is opened."""

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
    """How any model is opened."""

    torch_dtype: torch.dtype
    device_map: str | Mapping[str, int] | Spread | None = None
    flash_attention: bool = False
    quantization_config: Any = None
    # The DistributedConfig of transformers: weights are sharded while they are read.
    distributed_config: Any = None

    def keywords(self, build: Callable[[], PreTrainedModel] | None = None) -> dict[str, Any]:
        """Return the keyword arguments of from_pretrained.

        `build` makes the model without weights. A Spread device map needs it.
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
    """Everything that is special about one model."""

    # ModelScope id, or a local folder.
    model_id_or_path: str
    hf_model_id: str | None = None
    revision: str = 'master'
    # The function that opens it; None: get_model_tokenizer_default, which uses the class that config.json names.
    get_function: GetFunction | None = None
    # The native class that opens it, if `family` is None.
    model_class: str | None = None
    lora_target_modules: tuple[str, ...] = QKV
    template: str = 'default'
    # The file in trl's chat_templates that equals the template of this tokenizer. Tests prove template auto on it.
    chat_template: str | None = None
    # Regular expressions of files that are not downloaded.
    ignore_file_pattern: tuple[str, ...] = ()
    # bf16, fp16 or fp32 if the weights need one of them.
    torch_dtype: str | None = None
    # How quantised weights are stored: gptq, nf4 (the 4 bits of Baichuan2), awq, bitsandbytes.
    quantization: str | None = None
    # Python packages, with a version range if needed, e.g. 'transformers>=5.2'.
    requires: tuple[str, ...] = ()
    # Key of FAMILIES in utils/loading/legacy/registry.py, for an original layout of 2023.
    family: str | None = None
    # (package, file) of a GGUF file that is used, without network, if the package is installed.
    embedded: tuple[str, str] | None = None
    # False if model_id_or_path is the user's own id or folder. Such an id is searched on the chosen hub only.
    registered: bool = True

    @property
    def public_id(self) -> str:
        """Return the id that is written into adapters: the Hugging Face id if there is one."""
        return self.hf_model_id or self.model_id_or_path

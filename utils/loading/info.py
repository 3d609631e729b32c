"""One model entry: ModelInfo, and the options with which a model is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.loading.devices import Spread, place

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


QKV = ('q_proj', 'k_proj', 'v_proj')


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


GetFunction = Callable[[Path, 'ModelInfo', LoadOptions], 'tuple[PreTrainedModel, Any]']


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
    # Key of FAMILIES in utils/loading/legacy/registry.py, for an original 2023 layout that config.json does not tell.
    family: str | None = None
    # (package, file) of a GGUF file that serves without network where the package is installed.
    embedded: tuple[str, str] | None = None
    # False where the user's own id or folder stands in model_id_or_path: it is looked for on the chosen hub only.
    registered: bool = True

    @property
    def public_id(self) -> str:
        """Return the name written into adapters: the Hugging Face id where there is one."""
        return self.hf_model_id or self.model_id_or_path

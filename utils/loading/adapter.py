"""Loads an adapter onto the base model on which it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError, error_text
from utils.loading.layers import linear_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_adapter(model: PreTrainedModel, checkpoint: Path, base: Path | None = None, family: str | None = None) -> Any:
    """Return the base model with the adapter of a checkpoint. Raises ConfigError if the adapter does not fit the model.

    `base` is the folder of the base model. `family` is the name of the family if the base model has an original layout
    of 2023. It is needed only if config.json does not tell the family.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from utils.loading.legacy.adapter import native_adapter

    try:
        with native_adapter(checkpoint, linear_names(model), base, family) as folder:
            return PeftModel.from_pretrained(model, str(folder))
    except ConfigError:
        raise
    except (RuntimeError, ValueError, OSError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(
            f'{checkpoint}: the adapter cannot be loaded onto {type(model).__name__} {model.name_or_path}: '
            f'{error_text(error)[:300]} It is damaged, or was trained on another base model. Copy the checkpoint again '
            'or name its base model with --model_id_or_path.'
        ) from error

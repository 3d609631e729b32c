"""Loads an adapter onto the base model on which it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError, error_text
from utils.loading.layers import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_adapter(
    model: PreTrainedModel,
    checkpoint: Path,
    base: Path | None = None,
    family: str | None = None,
    *,
    dropout: float | None = None,
) -> Any:
    """Return the base model with the adapter of a checkpoint. Raises ConfigError if the adapter does not fit the model.

    `base` is the folder of the base model. `family` is the family of the base model in utils/loading/legacy, e.g.
    'qwen'. It is needed only if config.json of the base model does not tell the family.

    With `dropout`, the adapter is loaded for further training with this dropout. Then ConfigError is also raised if the
    file of the adapter lacks a tensor or has an additional tensor. Without `dropout`, PEFT only warns of both.
    """
    from peft import LoraConfig, PeftModel
    from safetensors import SafetensorError

    from utils.loading.legacy.adapter import native_adapter

    try:
        with native_adapter(checkpoint, linear_layers(model), base, family) as folder:
            if dropout is None:
                return PeftModel.from_pretrained(model, str(folder))
            config = LoraConfig.from_pretrained(str(folder))
            config.lora_dropout = dropout
            prepared = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True)
            _check_complete(prepared, folder, checkpoint)
            return prepared
    except ConfigError:
        raise
    except (RuntimeError, ValueError, OSError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(
            f'{checkpoint}: the adapter cannot be loaded onto {type(model).__name__} {model.name_or_path}: '
            f'{error_text(error)[:300]} The adapter is damaged, or was trained on another base model. Copy the '
            'checkpoint again, or name the base model of the adapter with --model_id_or_path.'
        ) from error


def restore_adapter(model: Any, checkpoint: Path) -> None:
    """Set all weights of an adapter to the exact weights in a checkpoint.

    Loading the adapter with PEFT is not enough, because PEFT rounds the layers of --lora_modules_to_save to the dtype
    of the model.
    """
    from peft import set_peft_model_state_dict

    from utils.loading.legacy.adapter import read_adapter

    set_peft_model_state_dict(model, read_adapter(checkpoint))


def _check_complete(model: Any, folder: Path, checkpoint: Path) -> None:
    """Raise ConfigError if the file of an adapter lacks a tensor or has an additional tensor.

    PEFT only warns of missing tensors, and keeps their initial values.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / 'adapter_model.safetensors', 'pt') as file:
        stored = set(file.keys())
    for names, what in ((wanted - stored, 'missing'), (stored - wanted, 'too many')):
        if names:
            raise ConfigError(
                f'--adapter {checkpoint}: the tensors of the adapter do not fit adapter_config.json and '
                f'{type(model.get_base_model()).__name__}: {len(names)} {what}, for example {min(names)}. Copy the '
                'complete checkpoint, or train a new adapter without --adapter.'
            )

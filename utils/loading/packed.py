"""Layers that compute with packed (quantised) weights: choice of their kernel, and what training and saving need."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def packed_classes() -> tuple[Any, ...]:
    """Return the classes of packed layers that do not derive from nn.Linear; none before gptqmodel is imported."""
    module = sys.modules.get('gptqmodel.nn_modules.qlinear')
    return (module.BaseQuantLinear,) if module else ()


def trainable_backend() -> str:
    """Return the kernel of gptqmodel that passes gradients to an adapter.

    By default gptqmodel uses TorchAtenLinear for 4 bits on a CPU, which has no backward pass and rounds about ten
    times more coarsely, and Marlin on a GPU, which refuses to train.
    """
    import torch

    return 'auto_trainable' if torch.cuda.is_available() else 'gptq_torch'


def loading_settings(config: Mapping[str, Any]) -> Any:
    """Return the quantization_config that opens a GPTQ folder with a trainable kernel; None for other folders."""
    stored = config.get('quantization_config')
    if not isinstance(stored, dict) or stored.get('quant_method') != 'gptq':
        return None

    from transformers import GPTQConfig

    return GPTQConfig(bits=stored.get('bits'), backend=trainable_backend())


def keep_trainable(model: Any) -> None:
    """Switch off two optimisations of packed layers on a CPU: one stops gradients, one needs a C++ compiler."""
    bitsandbytes = sys.modules.get('bitsandbytes')

    for module in model.modules():
        if bitsandbytes and isinstance(module, bitsandbytes.nn.Linear4bit):
            # With avx512_bf16, an evaluation repacks the weights in place, and later training steps get no gradient:
            # https://github.com/bitsandbytes-foundation/bitsandbytes, nn/modules.py, Linear4bit.forward.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, packed_classes()) and module.qweight.device.type == 'cpu':
            # gptqmodel compiles this method in each layer. That needs a C++ compiler and a minute, and is not faster:
            # https://github.com/ModelCloud/GPTQModel, nn_modules/qlinear/torch.py, TorchLinear.optimize.
            vars(module).pop('dequantize_weight', None)


def record_packed_format(model: Any) -> None:
    """Write into the model's config how packed weights are stored now, and leave the choice of a kernel open."""
    packed = next((module for module in model.modules() if isinstance(module, packed_classes())), None)
    if packed is None:
        return

    settings = model.config.quantization_config
    if packed.qzero_format() == 2:  # gptqmodel converts to this format on load and does not record it
        settings.format = 'gptq_v2'
    settings.backend = 'auto'

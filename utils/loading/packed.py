"""Layers that compute with packed weights: how they are chosen, kept trainable and saved."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def packed_classes() -> tuple[Any, ...]:
    """Return the classes of packed layers that are no nn.Linear; a model has them only once gptqmodel is imported."""
    module = sys.modules.get('gptqmodel.nn_modules.qlinear')
    return (module.BaseQuantLinear,) if module else ()


def trainable_backend() -> str:
    """Return the kernel of gptqmodel that an adapter can be trained through.

    Left to choose, it takes TorchAtenLinear for 4 bits on a CPU, which has no backward and rounds about ten times
    coarser, and Marlin on a GPU, which refuses to train.
    """
    import torch

    return 'auto_trainable' if torch.cuda.is_available() else 'gptq_torch'


def loading_settings(config: Mapping[str, Any]) -> Any:
    """Return the quantization_config to open a directory with: GPTQ's, which changes its kernel alone, or None."""
    stored = config.get('quantization_config')
    if not isinstance(stored, dict) or stored.get('quant_method') != 'gptq':
        return None
    from transformers import GPTQConfig

    return GPTQConfig(bits=stored.get('bits'), backend=trainable_backend())


def keep_trainable(model: Any) -> None:
    """Change what would leave an adapter on a CPU without gradients, or make its first step wait for a compiler."""
    bitsandbytes = sys.modules.get('bitsandbytes')
    for module in model.modules():
        if bitsandbytes and isinstance(module, bitsandbytes.nn.Linear4bit):
            # With avx512_bf16 an evaluation repacks the weights in place, and training after it has no gradient:
            # https://github.com/bitsandbytes-foundation/bitsandbytes, nn/modules.py, Linear4bit.forward.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, packed_classes()) and module.qweight.device.type == 'cpu':
            # gptqmodel compiles this method of each layer, which takes a C++ compiler and a minute and gains nothing
            # here: https://github.com/ModelCloud/GPTQModel, nn_modules/qlinear/torch.py, TorchLinear.optimize.
            vars(module).pop('dequantize_weight', None)


def name_format(model: Any) -> None:
    """Have config.json say how packed weights are stored from now on, and leave the choice of a kernel open."""
    packed = next((module for module in model.modules() if isinstance(module, packed_classes())), None)
    if packed is not None:
        settings = model.config.quantization_config
        if packed.qzero_format() == 2:  # rewritten while loading; never written back
            settings.format = 'gptq_v2'
        settings.backend = 'auto'

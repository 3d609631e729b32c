"""Settings for training and saving packed layers. A packed layer is a linear layer with quantised weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from utils.base import device


def packed_classes() -> tuple[Any, ...]:
    """Return the classes of packed layers that do not derive from nn.Linear.

    Returns an empty tuple if gptqmodel is not imported yet.
    """
    module = sys.modules.get('gptqmodel.nn_modules.qlinear')
    return (module.BaseQuantLinear,) if module else ()


def trainable_backend() -> str:
    """Return the name of a gptqmodel kernel that passes gradients to an adapter.

    The default kernels of gptqmodel cannot train. For 4 bits on a CPU, the default is TorchAtenLinear, which has no
    backward pass. Its rounding errors are also about ten times those of gptq_torch. On a GPU, the default is Marlin,
    which refuses to train.
    """
    return 'auto_trainable' if device.kind() == 'cuda' else 'gptq_torch'


def loading_settings(config: Mapping[str, Any]) -> Any:
    """Return the quantization_config with which from_pretrained opens a GPTQ folder, with a kernel that can train.

    Returns None if the folder does not hold GPTQ weights.
    """
    stored = config.get('quantization_config')
    if not isinstance(stored, dict) or stored.get('quant_method') != 'gptq':
        return None

    from transformers import GPTQConfig

    return GPTQConfig(bits=stored.get('bits'), backend=trainable_backend())


def keep_trainable(model: Any) -> None:
    """Switch off two optimisations of packed layers on a CPU. `model` is changed in place.

    The first optimisation stops gradients. The second optimisation needs a C++ compiler.
    """
    bitsandbytes = sys.modules.get('bitsandbytes')

    for module in model.modules():
        if bitsandbytes and isinstance(module, bitsandbytes.nn.Linear4bit):
            # On a CPU with avx512_bf16, an evaluation repacks the weights in place. Later training steps then get no
            # gradient. See https://github.com/bitsandbytes-foundation/bitsandbytes, nn/modules.py, Linear4bit.forward.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, packed_classes()) and module.qweight.device.type == 'cpu':
            # gptqmodel compiles this method in each layer. Compiling needs a C++ compiler and takes a minute, and the
            # compiled method is not faster. See https://github.com/ModelCloud/GPTQModel, nn_modules/qlinear/torch.py,
            # TorchLinear.optimize.
            vars(module).pop('dequantize_weight', None)


def record_packed_format(model: Any) -> None:
    """Write the current storage format of packed weights into the model's config.

    Does nothing if the model has no layer of `packed_classes`, for example if bitsandbytes packed the weights.

    The kernel is set to 'auto', so that whoever opens the saved model can choose a different kernel.
    """
    packed = next((module for module in model.modules() if isinstance(module, packed_classes())), None)
    if packed is None:
        return

    settings = model.config.quantization_config
    if packed.qzero_format() == 2:  # gptqmodel converts the weights to this format on loading and does not record it.
        settings.format = 'gptq_v2'
    settings.backend = 'auto'

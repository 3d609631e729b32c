"""Compare the Triton kernels with the steps that they replace. On a CPU, the variable TRITON_INTERPRET must be 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from utils.fast.kernel_trial import _difference, _values
from utils.fast.norm import _KINDS, _NormStep
from utils.fast.triton_kernels import GateKernel, NormKernel

CPU = torch.device('cpu')


def main() -> None:
    """Print one line for each case: what it is, and the difference or None."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for weight_dtype in {dtype, torch.float32}:
            for kind, width in ((kind, width) for kind in _KINDS for width in (48, 896)):
                inputs = [_values(5, width, dtype, CPU), 0.7 + 0.2 * _values(1, width, weight_dtype, CPU)[0]]

                def kernel(x: torch.Tensor, weight: torch.Tensor, kind: str = kind) -> torch.Tensor:
                    return NormKernel.apply(x, weight, 1e-6, kind)  # type: ignore[no-any-return]

                def step(x: torch.Tensor, weight: torch.Tensor, kind: str = kind) -> torch.Tensor:
                    return _NormStep.apply(x, weight, 1e-6, kind)  # type: ignore[no-any-return]

                print(f'norm {kind} {width} {dtype} {weight_dtype}: {_difference(kernel, step, inputs)}')
        inputs = [_values(5, 300, dtype, CPU) * factor for factor in (3, 1)]
        print(f'gate {dtype}: {_difference(GateKernel.apply, lambda gate, up: F.silu(gate) * up, inputs)}')
        wrong = _difference(GateKernel.apply, lambda gate, up: F.gelu(gate) * up, inputs)
        assert wrong is not None, 'another activation is noticed'


if __name__ == '__main__':
    main()

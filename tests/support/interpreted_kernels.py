"""Compare the Triton kernels with the steps that they replace. On a CPU, the variable TRITON_INTERPRET must be 1."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3
from triton import language as tl
from triton.runtime import interpreter

from utils.fast.kernel_trial import (
    RotaryCase,
    Rotation,
    _difference,
    _values,
    joined,
    loss_difference,
    rotary_inputs,
)
from utils.fast.norm import _KINDS, _NormStep
from utils.fast.triton_kernels import GateKernel, NormKernel, RotaryKernel, loss_and_gradient

CPU = torch.device('cpu')
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads, key heads, width and rotated width. They are no powers of 2, where a kernel needs one.
HEADS = {modeling_llama: (6, 2, 8, 8), modeling_olmo2: (3, 3, 24, 24), modeling_phi3: (5, 1, 16, 6)}


def round_to_bf16() -> None:
    """Make the interpreter round from fp32 to bf16, as GPUs do. It would cut the digits off."""
    convert = interpreter._convert_float

    def rounding(values: Any, input_dtype: Any, output_dtype: Any, mode: Any) -> Any:
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
            return convert(values, input_dtype, output_dtype, mode)
        exact = torch.from_numpy(np.array(values, dtype=np.float32))
        return exact.bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = rounding


def norms_and_gates() -> None:
    """Print one line for each norm and gate."""
    for dtype in DTYPES:
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


def rotations() -> None:
    """Print one line for each function of a class and each pair of dtypes.

    Output and gradients must be bitwise equal. There are two rows of tokens, which share the tables or not.
    """
    for module, widths in HEADS.items():
        plain = module.apply_rotary_pos_emb
        for dtype, table_dtype in ((x, table) for x in DTYPES for table in sorted({x, torch.float32}, key=str)):
            query, key, cos, sin = rotary_inputs(RotaryCase(*widths, dtype, table_dtype), CPU, tokens=8)
            query, key = (x.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1) for x in (query, key))
            for tables in ([x[:, :4] for x in (cos, sin)], [x.unflatten(1, (2, 4))[0] for x in (cos, sin)]):
                out_dtype = plain(query, key, *tables)[0].dtype

                def kernel(*given: torch.Tensor, dtype: torch.dtype = out_dtype) -> Any:
                    return RotaryKernel.apply(*given, dtype)

                differing = differences(kernel, plain, [query, key], tables)
                name = f'{module.__name__.rpartition(".")[2]} {dtype} {table_dtype} {len(tables[0])} tables'
                print(f'rotary {name}: {differing}')
                assert differences(kernel, plain, [query, -key], tables) is None
                wrong = _difference(joined(kernel, tables[1], tables[0]), joined(plain, *tables), [query, key])
                assert wrong is not None, 'other angles are noticed'


def differences(ours: Rotation, plain: Rotation, given: list[torch.Tensor], tables: list[torch.Tensor]) -> str | None:
    """Return which of the outputs and gradients are not bitwise equal, or None."""
    found = []
    for rotate in (ours, plain):
        leaves = [x.detach().clone().requires_grad_() for x in given]
        out = rotate(*leaves, *tables)
        directions = [torch.linspace(-1, 2, x.numel()).cos().view_as(x).to(x.dtype) for x in out]
        found.append([*out, *torch.autograd.grad(out, leaves, directions)])
    names = ('query', 'key', 'gradient of query', 'gradient of key')
    unequal = [name for name, a, b in zip(names, *found, strict=True) if a.dtype != b.dtype or not torch.equal(a, b)]
    return ', '.join(unequal) or None


def losses() -> None:
    """Print one line for each size of a vocabulary, scale and cap. The largest is wider than a block of the kernel."""
    for dtype in DTYPES:
        for vocabulary in (100, 20_000):
            for scale, cap in ((1.0, None), (0.25, 30.0)):
                kernel = partial(loss_and_gradient, scale=scale, cap=cap)
                found = loss_difference(kernel, dtype, vocabulary, scale, cap, CPU)
                print(f'loss {dtype} {vocabulary} {scale} {cap}: {found}')
                assert loss_difference(kernel, dtype, vocabulary, 2 * scale, cap, CPU) is not None, 'another scale'


def main() -> None:
    """Print one line for each case: what it is, and the difference or None."""
    round_to_bf16()
    norms_and_gates()
    rotations()
    losses()


if __name__ == '__main__':
    main()

"""Compile the Triton kernels for an A100. This needs no GPU, but the variable TRITON_INTERPRET must not be set.

The interpreter accepts code that does not compile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from utils.fast import triton_kernels as kernels

A100 = GPUTarget('cuda', 80, 32)
# The parameters that are no tensors and no integers.
NUMBERS = {'epsilon', 'factor', 'scale', 'cap'}
# The tensors of each kernel that are in the dtype of the model. The others are in the dtype after it, by default fp32.
TENSORS: dict[str, tuple[str, dict[str, str]]] = {
    '_norm_forward': ('x weight y', {'scales': '*fp32'}),
    '_norm_backward': ('grad x weight x_grad', {'scales': '*fp32', 'weight_grad': '*fp32'}),
    '_gate_forward': ('gate up out', {}),
    '_gate_backward': ('grad gate up gate_grad up_grad', {}),
    '_rotate': ('x y cos sin', {}),
    '_loss_and_gradient': ('logits', {'targets': '*i64', 'losses': '*fp32'}),
}


def constants(name: str, dtype: str) -> list[dict[str, Any]]:
    """Return the values of the constants of a kernel, for each of its variants."""
    if name == '_norm_forward':
        return [{'KIND': kind, 'BLOCK': 4096} for kind in kernels.KINDS.values()]
    if name == '_norm_backward':
        return [{'KIND': 2, 'TRAINS': trains, 'BLOCK': 4096} for trains in (False, True)]
    if name == '_rotate':
        sizes = [{'HALF': 64, 'HEADS': 32, 'BLOCK': 64, 'REST': 0}, {'HALF': 24, 'HEADS': 1, 'BLOCK': 32, 'REST': 64}]
        rounded = {'fp32': tl.float32, 'bf16': tl.bfloat16}[dtype]
        return [{**size, 'ROUNDED': rounded, 'BACK': back} for size in sizes for back in (False, True)]
    if name == '_loss_and_gradient':
        return [{'CAPPED': capped, 'BLOCK': 8192} for capped in (False, True)]
    return [{'BLOCK': 4096}]


def main() -> None:
    """Print one line for each variant of a kernel that compiles."""
    found = {name for name, value in vars(kernels).items() if isinstance(value, triton.JITFunction)}
    assert found == {*TENSORS, '_head_logit'}, 'all kernels are compiled'
    for name, (tensors, others) in TENSORS.items():
        function = getattr(kernels, name)
        for dtype in ('fp32', 'bf16'):
            for given in constants(name, dtype):
                types = {parameter: 'fp32' if parameter in NUMBERS else 'i32' for parameter in function.arg_names}
                types |= others | dict.fromkeys(tensors.split(), f'*{dtype}') | dict.fromkeys(given, 'constexpr')
                source = ASTSource(fn=function, signature=types, constexprs=given)
                compiled = triton.compile(source, target=A100, options={'enable_fp_fusion': name != '_rotate'})
                fused = compiled.asm['ptx'].count('fma.rn.f32')
                assert name != '_rotate' or fused == 0, 'a product and a sum are rounded together'
                print(f'{name} {dtype} {given}')


if __name__ == '__main__':
    main()

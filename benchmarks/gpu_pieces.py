"""Parts 0 to 3 of benchmarks/gpu.py: the device, the pieces of the fast path, whole classes, quantised layers.

Errors are relative: the norm of the difference, divided by the norm of the exact value. Exact values are computed in
fp64 on the same device. Without a GPU, the same checks run on the CPU, on smaller tensors and fewer classes.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_case import Case, Found
from torch import nn

SMALL_KEYS = ('llama3.2-1b-instruct', 'qwen3.5-0.8b')
BF16_KEYS = ('qwen-7b-chat', 'internlm-7b', 'chatglm2-6b', 'baichuan2-13b', 'polylm-13b', 'qwen3-0.6b',
             'gemma3-1b-it', 'gpt-oss-20b')  # fmt: skip
CHECKPOINTED = ('llama3.2-1b-instruct', 'gemma3-1b-it', 'qwen-7b-chat', 'qwen3-30b-a3b')
# Rows of all kinds: shorter and longer than the blocks of the kernels.
LENGTHS = (1, 2, 127, 128, 129, 679)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Heads, key heads, width of a query, width of a value, window, sinks, softcap.
ATTENTION = {
    'GQA 14/2, 64': (14, 2, 64, 64, None, False, None),
    'GQA 12/2, 128': (12, 2, 128, 128, None, False, None),
    'GQA 28/4, 128, window': (28, 4, 128, 128, 64, False, None),
    'heads of 256': (8, 4, 256, 256, None, False, None),
    'sinks and window': (16, 2, 64, 64, 64, True, None),
    'latent, 192 and 128': (8, 8, 192, 128, None, False, None),
    'capped scores, window': (8, 4, 256, 256, 64, False, 50.0),
}


def device() -> torch.device:
    """Return the GPU, or the CPU if there is none."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative error. It is inf if a value is NaN."""
    error = float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))
    return error if error == error else math.inf


def judged(found: Found, limits: dict[str, float]) -> Found:
    """Return what was found, and whether each named value is at most its limit."""
    return {'ok': all(found[name] <= limit for name, limit in limits.items()), **found}


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the median time of 10 calls, after 3 calls that are not counted."""
    times = []
    for _ in range(13):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[3:])[5]


def ceilings() -> Found:
    """Return what this device multiplies and copies. The speeds are also given as shares of it."""
    gpu = torch.cuda.is_available()
    size = 8192 if gpu else 256
    a = torch.randn(size, size, device=device()).bfloat16()
    source = torch.empty(2**31 if gpu else 2**20, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)

    found: Found = {'ok': True, 'device': torch.cuda.get_device_name() if gpu else 'cpu'}
    if gpu:
        found['capability'] = '.'.join(map(str, torch.cuda.get_device_capability()))
    tflops = 2 * size**3 / seconds_of(lambda: a @ a) / 1e12
    return {
        **found,
        'bf16_tflops': tflops,
        'copy_tb_s': 2 * source.numel() / seconds_of(lambda: target.copy_(source)) / 1e12,
    }


def gradients(out: torch.Tensor, inputs: list[torch.Tensor], direction: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and the gradients of the inputs, in fp64."""
    grads = torch.autograd.grad(out, inputs, direction.to(out.dtype))
    return [x.detach().double() for x in (out, *grads)]


def compare(
    plain: Callable[..., torch.Tensor], ours: Callable[..., torch.Tensor], exact: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
) -> Found:  # fmt: skip
    """Return the largest errors of the class's own function and of ours, each compared with fp64.

    `forward_ulps` is the largest difference of both outputs, in units of the last place of the dtype.
    """
    leaves = [x.requires_grad_() for x in inputs]
    double = [x.detach().double().requires_grad_() for x in inputs]
    direction = torch.randn_like(plain(*leaves))
    wanted = gradients(exact(*double), double, direction)
    of_class = gradients(plain(*leaves), leaves, direction)
    found = gradients(ours(*leaves), leaves, direction)
    step = torch.finfo(inputs[0].dtype).eps
    ulps = ((found[0] - of_class[0]).abs() / (of_class[0].abs().clamp_min(1e-3) * step)).max()
    errors = [max(map(apart, values, wanted)) for values in (found, of_class)]
    return {'error': errors[0], 'error_of_class': errors[1], 'forward_ulps': float(ulps)}


def is_as_good(found: Found, dtype: torch.dtype) -> bool:
    """Return whether our error is small, and not larger than that of the class by more than a fifth."""
    bound = max(1.2 * found['error_of_class'], 1e-6)
    # In fp32, sums in another order differ by more units of the last place.
    ulps = 16.01 if dtype == torch.float32 else 2.01
    return bool(found['error'] <= bound and found['error'] <= BOUND[dtype] and found['forward_ulps'] <= ulps)


def norms() -> Found:
    """Compare the fused norms with the classes, for three kinds and all widths."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    from utils.fast.norm import fuse_norms

    found: Found = {'ok': True}
    for kind, dtype in ((k, d) for k in (LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm) for d in BOUND):
        for width in (896, 1536, 3584, 5120, 128) if torch.cuda.is_available() else (96,):
            layer = kind(width, eps=1e-6).to(device(), dtype)
            nn.init.normal_(layer.weight, mean=0.7, std=0.2)
            fused = copy.deepcopy(layer)
            assert fuse_norms(fused) == 1
            shift = 1.0 if kind is Gemma3RMSNorm else 0.0

            def by_definition(x: torch.Tensor, weight: torch.Tensor, shift: float = shift) -> torch.Tensor:
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (weight + shift)

            def of(module: nn.Module) -> Callable[..., torch.Tensor]:
                return lambda x, weight: torch.func.functional_call(module, {'weight': weight}, (x,))

            inputs = [torch.randn(300, width, device=device(), dtype=dtype), layer.weight.detach().clone()]
            result = compare(of(layer), of(fused), by_definition, inputs)
            found['ok'] &= is_as_good(result, dtype)
            found['worst'] = max(found.get('worst', 0.0), result['error'] / max(result['error_of_class'], 1e-9))
    return found


def gates() -> Found:
    """Compare the fused gated MLP with the class."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    from utils.fast.gated_mlp import fuse_gates

    found: Found = {'ok': True}
    for dtype in BOUND:
        width = 1536 if torch.cuda.is_available() else 64
        block = LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=4 * width)).to(device(), dtype)
        fused = copy.deepcopy(block)
        exact = copy.deepcopy(block).double()
        assert fuse_gates(fused) == 1
        result = compare(block, fused, exact, [torch.randn(300, width, device=device(), dtype=dtype)])
        found['ok'] &= is_as_good(result, dtype)
        found[str(dtype)] = result
    return found


def rotations() -> Found:
    """Compare the rotary embedding in one pass with the functions of three classes, and measure it."""
    from transformers.models.llama import modeling_llama
    from transformers.models.olmo2 import modeling_olmo2
    from transformers.models.phi3 import modeling_phi3

    from utils.fast.kernel_trial import RotaryCase, joined, rotary_inputs
    from utils.fast.rotation import find_kernel, rotation_over

    found: Found = {'ok': True, 'worst_ulps': 0.0}
    # Heads, key heads, width of a head, width of its rotated part.
    sizes = {modeling_llama: (28, 4, 128, 128), modeling_olmo2: (16, 16, 128, 128), modeling_phi3: (24, 8, 128, 96)}
    for module, widths in sizes.items():
        plain = module.apply_rotary_pos_emb
        ours = rotation_over(plain)
        for dtype in BOUND:
            query, key, *tables = rotary_inputs(RotaryCase(*widths, dtype, dtype), device(), tokens=300)
            exact = joined(plain, *(x.double() for x in tables))
            result = compare(joined(plain, *tables), joined(ours, *tables), exact, [query, key])
            found['ok'] &= is_as_good(result, dtype) and find_kernel(query, key, *tables, 1, plain) is not None
            found['worst_ulps'] = max(found['worst_ulps'], result['forward_ulps'])

    case = RotaryCase(32, 8, 128, 128, torch.bfloat16, torch.bfloat16)
    query, key, cos, sin = rotary_inputs(case, device(), tokens=16_384)
    inputs = [x.requires_grad_() for x in (query, key)]
    directions = [torch.randn_like(x) for x in inputs]
    plain = modeling_llama.apply_rotary_pos_emb
    for name, rotate in (('ms', rotation_over(plain)), ('ms_of_class', plain)):

        def step(rotate: Callable[..., Any] = rotate) -> Any:
            return torch.autograd.grad(rotate(*inputs, cos, sin), inputs, directions)

        found[name] = 1000 * seconds_of(step)
    return found


def loss_in_place() -> Found:
    """Compare the kernel that overwrites logits with their gradient with fp64, and measure it."""
    from utils.fast.constants import chunk_rows
    from utils.fast.kernel_trial import loss_kernel

    found: Found = {'ok': True}
    for vocabulary, scale, cap in ((152_064, 1.0, None), (50_257, 0.25, 30.0)):
        for dtype in BOUND:
            rows = chunk_rows(vocabulary, dtype.itemsize, on_gpu=True)
            logits = 3 * torch.randn(rows, vocabulary, device=device()).to(dtype)
            targets = torch.randint(vocabulary, (rows,), device=device())
            exact = logits.double().requires_grad_()
            capped = scale * exact if cap is None else cap * torch.tanh(scale * exact / cap)
            wanted = nn.functional.cross_entropy(capped, targets, reduction='none')
            (gradient,) = torch.autograd.grad(wanted.sum(), exact)
            kernel = loss_kernel(dtype, vocabulary, scale, cap, device())
            if kernel is None:
                return {'ok': False, 'says': f'no kernel for {vocabulary} logits in {dtype}'}

            losses = kernel(logits, targets, 1.0)
            errors = (apart(losses, wanted.detach()), apart(logits, gradient))
            found['ok'] &= errors[0] <= 1e-5 and errors[1] <= BOUND[dtype]
            found[f'{vocabulary} {dtype}'] = max(errors)

    logits = torch.randn(chunk_rows(152_064, 2, on_gpu=True), 152_064, device=device()).bfloat16().requires_grad_()
    targets = torch.randint(152_064, (len(logits),), device=device())
    kernel = loss_kernel(torch.bfloat16, 152_064, 1.0, None, device())
    assert kernel is not None
    low = logits.detach().clone()

    def step() -> Any:
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction='sum')
        return torch.autograd.grad(loss, logits)

    found['ms'] = 1000 * seconds_of(lambda: kernel(low, targets, 1.0))
    found['ms_of_torch'] = 1000 * seconds_of(step)
    return found


def head_and_loss() -> Found:
    """Compare the loss in chunks with the loss of whole logits in fp64, with a scale, a cap and a bias."""
    from utils.fast.chunked_loss import Head, summed_loss

    gpu = torch.cuda.is_available()
    found: Found = {'ok': True}
    for vocabulary in (152_064, 50_257) if gpu else (5_000, 1_009):
        for dtype, scale, cap, bias in ((d, *v) for d in BOUND for v in ((1.0, None, False), (0.25, 3.0, True))):
            width, positions = (1536, 2000) if gpu else (64, 300)
            linear = nn.Linear(width, vocabulary, bias=bias, device=device(), dtype=dtype)
            hidden = torch.randn(positions, width, device=device()).to(dtype).requires_grad_()
            targets = torch.randint(vocabulary, (positions,), device=device())
            inputs = [hidden, *linear.parameters()]
            loss = summed_loss(hidden, targets, Head(linear, scale=scale, cap=cap), positions)
            ours = [loss, *torch.autograd.grad(loss, inputs)]

            exact = [x.detach().double().requires_grad_() for x in inputs]
            logits = scale * nn.functional.linear(exact[0], exact[1], exact[2] if bias else None)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            wanted_loss = nn.functional.cross_entropy(logits, targets)
            wanted = [wanted_loss, *torch.autograd.grad(wanted_loss, exact)]
            error = max(map(apart, ours, wanted))
            found['ok'] &= error <= (1e-5 if dtype == torch.float32 else 1.5e-2)
            found[str(dtype)] = max(found.get(str(dtype), 0.0), error)
    return found


def adapters(base: Callable[[int, int], nn.Module] | None = None) -> Found:
    """Compare the LoRA layer in one step with the layer of PEFT, on a plain layer or on a layer made by `base`."""
    from peft import LoraConfig, get_peft_model

    from utils.fast.lora import fuse_lora

    width = 1536 if torch.cuda.is_available() else 64
    found: Found = {'ok': True}
    for dtype in BOUND:
        torch.manual_seed(0)
        layer = base(width, 2 * width) if base else nn.Linear(width, 2 * width, dtype=dtype)
        holder = nn.Sequential()
        holder.add_module('layer', layer.to(device()))
        holder.is_loaded_in_4bit = base is not None
        model = get_peft_model(holder, LoraConfig(target_modules=['layer'], r=8, lora_dropout=0.0))
        adapted = model.base_model.model.layer
        nn.init.normal_(adapted.lora_B['default'].weight, std=0.05)
        x = torch.randn(300, width, device=device(), dtype=dtype).requires_grad_()
        inputs = [x, adapted.lora_A['default'].weight, adapted.lora_B['default'].weight]
        direction = torch.randn(300, 2 * width, device=device())
        wanted = gradients(adapted(x), inputs, direction)
        assert fuse_lora(model)[0] == 1, 'the layer is not fused'
        error = max(map(apart, gradients(adapted(x), inputs, direction), wanted))
        found['ok'] &= error <= (1e-5 if dtype == torch.float32 and base is None else 2e-2)
        found[str(dtype)] = error
    return found


def attention(name: str) -> Found:
    """Compare the kernel that serves a case with fp64, and a row with the same row among other neighbours."""
    from utils.fast.attention import Inputs, kernel_for
    from utils.fast.rows import RowMask

    heads, key_heads, query_width, value_width, window, has_sinks, cap = ATTENTION[name]
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    lengths = LENGTHS if gpu else (1, 2, 127, 130)
    torch.manual_seed(0)
    tokens = sum(lengths)
    shapes = [(tokens, heads, query_width), (tokens, key_heads, query_width), (tokens, key_heads, value_width)]
    given = [torch.randn(s, device=device()).to(dtype).transpose(0, 1).requires_grad_() for s in shapes]
    sinks = torch.randn(heads, device=device()).to(dtype).requires_grad_() if has_sinks else None
    leaves = [*given, *([sinks] if sinks is not None else [])]
    inputs = Inputs(*given, sinks, RowMask(lengths, window), query_width**-0.5, cap)
    kernel = kernel_for(inputs.case(), device())
    direction = torch.randn(tokens, heads, value_width, device=device())
    out, *grads = gradients(inputs.attend_by(kernel), leaves, direction)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    reference = Inputs(*exact[:3], exact[3] if has_sinks else None, inputs.rows, inputs.scaling, cap)
    wanted = gradients(reference.attend_by('rows'), exact, direction)

    changed = [x.detach().clone() for x in given]
    for x in changed:
        x[:, : sum(lengths[:-1])] *= -1.5
    other = inputs._replace(query=changed[0], key=changed[1], value=changed[2]).attend_by(kernel)
    last = slice(sum(lengths[:-1]), None)
    found = {
        'kernel': kernel,
        'out': apart(out, wanted[0]),
        'gradient': max(map(apart, grads, wanted[1:])),
        'bits_change_with_neighbours': float(not torch.equal(out[last], other[last].double())),
    }
    bounds = (5e-3, 1e-2) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    return judged(found, {'out': bounds[0], 'gradient': bounds[1], 'bits_change_with_neighbours': 0})


def no_wait() -> Found:
    """Compute loss and gradients of a concatenated batch while torch raises an error for each wait for the GPU."""
    from tests.support.exactness import make_rows, open_tiny, prepared
    from utils.data.collator import Collator, on_device
    from utils.fast.layout import exact_head, use_padding_free
    from utils.fast.scoring import Scorer

    with tempfile.TemporaryDirectory() as folder:
        base = open_tiny('llama3.2-1b-instruct', Path(folder) / 'model').to(device(), torch.bfloat16)
    model, args = prepared(base, 'llama3.2-1b-instruct', 'lora')
    inner = model.get_base_model()
    assert use_padding_free(inner, args, longest=30)
    scorer = Scorer(inner, exact_head(inner, args))
    batch = on_device(Collator(5, pads=False)(make_rows(400)), device())
    scorer.loss(model, batch, 40).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        scorer.loss(model, batch, 40).backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return {'ok': True}


def errors_of_class(key: str, dtype: torch.dtype, *, checkpointing: bool = False) -> Iterator[tuple[str, float]]:
    """Yield for LoRA and for full fine-tuning the largest error of a gradient, relative to the largest gradient.

    In bf16, it is divided by the error that the class itself has. With `checkpointing`, gradients with and without it
    are compared.
    """
    from tests.support.exactness import make_rows, open_tiny, plain_gradients, prepared
    from utils.data.collator import Collator, on_device
    from utils.fast.layout import exact_head, use_padding_free
    from utils.fast.scoring import Scorer

    with tempfile.TemporaryDirectory() as folder:
        base = open_tiny(key, Path(folder) / 'model').to(device())
    rows = make_rows(base.get_input_embeddings().weight.shape[0])
    count = sum(row['trained'][1] - max(1, row['trained'][0]) for row in rows)
    plain_flags = {'tuner_backend': 'peft', 'fused_norms': False, 'fused_mlp': False, 'fused_rotary': False}

    def ours(model: Any, args: Any, kind: str) -> dict[str, torch.Tensor]:
        inner = model.get_base_model() if kind == 'lora' else model
        laid = use_padding_free(inner, args, longest=30)
        batch = on_device(Collator(5, pads=not laid)(rows), device())
        Scorer(inner, exact_head(inner, args)).loss(model, batch, count).backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    with torch.device(device()):
        for kind in ('lora', 'full'):
            plain, _ = prepared(copy.deepcopy(base), key, kind, **plain_flags)
            exact = {name: grad.double() for name, grad in plain_gradients(plain, rows, count)[1].items()}
            fast, args = prepared(copy.deepcopy(base).to(dtype), key, kind, gradient_checkpointing=checkpointing)
            found = ours(fast, args, kind)
            if checkpointing:
                whole, args = prepared(copy.deepcopy(base).to(dtype), key, kind)
                exact = ours(whole, args, kind)
            largest = max(float(grad.abs().max()) for grad in exact.values())
            error = max(float((found[name] - grad).abs().max()) for name, grad in exact.items()) / max(1.0, largest)
            if dtype != torch.float32:
                low, _ = prepared(copy.deepcopy(base).to(dtype), key, kind, **plain_flags)
                of_class = plain_gradients(low, rows, count)[1]
                own = max(float((of_class[name].double() - grad).abs().max()) for name, grad in exact.items())
                error /= own / max(1.0, largest)
            yield kind, error


def classes(keys: tuple[str, ...], dtype: torch.dtype, bound: float, checkpointing: bool) -> Found:
    """Check whole models of these keys of MODEL_MAPPING."""
    found: Found = {'ok': True, 'worst': 0.0}
    for key in keys:
        for kind, error in errors_of_class(key, dtype, checkpointing=checkpointing):
            if not error <= bound:
                found['ok'] = False
                found[f'{key} {kind}'] = error
            found['worst'] = max(found['worst'], error)
    return {**found, 'classes': len(keys)}


def four_bits(kind: str) -> Found:
    """Compare the LoRA layer in one step on a layer of bitsandbytes with that of PEFT."""
    import bitsandbytes as bnb

    def base(inputs: int, outputs: int) -> nn.Module:
        plain = nn.Linear(inputs, outputs, bias=False)
        layer = bnb.nn.Linear4bit(
            inputs,
            outputs,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type='nf4',
            compress_statistics=kind == 'double',
        )
        layer.load_state_dict(plain.state_dict())
        return layer

    return adapters(base)


def cases(gpu: bool) -> list[Case]:
    """Return the cases of parts 0 to 3. Without a GPU, few small classes are checked."""
    from tests.support.modern_models import PLAIN, SEEING
    from tests.support.old_models import PROVEN
    from utils.model import MODEL_MAPPING

    every = tuple(k for k in (*PLAIN, *SEEING, *PROVEN) if MODEL_MAPPING[k].quantization is None)
    keys = every if gpu else SMALL_KEYS
    size = -(-len(keys) // 4)
    parts = [keys[i : i + size] for i in range(0, len(keys), size)]
    work = functools.partial
    return [
        Case('device', 'ceilings', ceilings, 40, 0, False),
        Case('pieces', 'norms', norms, 40, 1, False),
        Case('pieces', 'gated MLP', gates, 30, 1, False),
        Case('pieces', 'rotary embedding', rotations, 30, 1, True),
        Case('pieces', 'head and loss', head_and_loss, 40, 1, False),
        Case('pieces', 'loss in place', loss_in_place, 30, 1, True),
        Case('pieces', 'LoRA layer', adapters, 30, 1, False),
        *(Case('pieces', f'attention: {name}', work(attention, name), 60, 1, False) for name in ATTENTION),
        Case('pieces', 'no wait for the GPU', no_wait, 40, 1, True),
        *(
            Case(
                'classes',
                f'fp32, {part[0]} to {part[-1]}',
                work(classes, part, torch.float32, 1e-5, False),
                40,
                4,
                False,
            )
            for part in parts
        ),
        Case('classes', 'bf16', work(classes, BF16_KEYS, torch.bfloat16, 1.3, False), 40, 4, True),
        Case('classes', 'checkpointing', work(classes, CHECKPOINTED, torch.float32, 0.0, True), 30, 4, True),
        Case('quantised', 'nf4', work(four_bits, 'plain'), 30, 5, True),
        Case('quantised', 'nf4, double', work(four_bits, 'double'), 30, 5, True),
    ]

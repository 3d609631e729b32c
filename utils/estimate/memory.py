"""The memory of a training step on one device, in bytes, computed from the sizes of the model.

benchmarks/estimate.py compares the results with measurements. In the formulas, `c` is the number of bytes of a value in
the compute dtype. Full fine-tuning has fp32 weights by default. If --dtype is bf16 or fp16, it computes under autocast,
which copies the weights and the inputs of linear layers to the compute dtype. With --full_weights bf16, full
fine-tuning has bf16 weights and needs no autocast. With DeepSpeed, the weights have the compute dtype. LoRA computes in
the dtype of the base model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from utils.estimate.model_shape import Shape
from utils.fast.constants import (
    GROUP_SCORES,
    KEPT_KEYS,
    QUERY_BLOCK,
    STEP_CHUNK,
    chunk_memory,
    chunk_rows,
    padded,
)
from utils.loading.layers import adapter_size, named_by

GIB = 2**30
# Bytes per weight of a quantised linear layer. nf4: 4 bits, and an fp32 scale for each 64 weights. nf4x2: 4 bits, an
# 8-bit scale for each 64 weights, and an fp32 scale for each 256 of the 8-bit scales. GPTQ: 4 or 8 bits, and an fp16
# scale and a packed zero point for each 128 weights.
PACKED = {
    'nf4': 0.5 + 4 / 64,
    'nf4x2': 0.5 + 1 / 64 + 4 / 64 / 256,
    'int8': 1.0,
    'gptq4': 0.5 + 2.5 / 128,
    'gptq8': 1.0 + 3 / 128,
}
# Memory of a CPU process that holds no tensors: kernels that are compiled at first use. benchmarks/estimate.py measured
# 12 to 48 MB.
_KERNELS = 2**25
# Defaults of DeepSpeed: the number of parameters that ZeRO-3 keeps gathered, and the number of parameters that ZeRO-2
# gathers together after a step.
_LIVE = 10**9
_GATHERED = 2 * 10**8
# Temporary bytes for each value of the chunk that the optimizer of bf16 weights updates, with its random words.
_STEP_BYTES = 32
# Groups of layers that have the same input. The input is saved once for each group.
_SHARED = (
    ('q_proj', 'k_proj', 'v_proj', 'qkv_proj', 'query_key_value', 'c_attn', 'in_proj_qkv', 'in_proj_z', 'in_proj_a'),
    ('gate_proj', 'up_proj', 'gate_up_proj', 'w1', 'w3', 'c_fc', 'dense_h_to_4h'),
)


@dataclass(frozen=True, kw_only=True)
class Mode:
    """The settings of a run that determine its memory, except the model and the batch."""

    full: bool
    # Bytes of a trained weight and of its gradient: 2 with --full_weights bf16.
    trained: int = 4
    # Bytes of a value in the compute dtype, and the quantisation of linear layers: a key of PACKED, or '' for none.
    compute: int
    packed: str = ''
    # Names or paths of the linear layers that LoRA adapts, and the rank of the adapter.
    targets: tuple[str, ...] = ()
    rank: int = 8
    # Whether the adapter is a DoRA adapter.
    dora: bool = False
    # Whether the input embedding and the output head are trained whole beside the adapter. If they are tied, both are.
    trains_embedding: bool = False
    trains_head: bool = False
    # Number of parameters in the rows of new tokens that are trained.
    token_rows: int = 0
    # Other linear layers that are trained whole, by name or path.
    saved: tuple[str, ...] = ()
    # True: base layer and adapter are one fused operation (fast/lora.py). False: the layers of PEFT are used. They
    # cast their input to fp32.
    fused: bool = True
    # Whether each packed layer saves its unpacked weight for the backward pass, as the layers of gptqmodel do. False:
    # the weight is unpacked again (fast/frozen.py).
    saves_weights: bool = False
    checkpointing: bool = False
    # Whether RMSNorm saves only its input for the backward pass (fast/norm.py).
    fused_norms: bool = True
    # Whether the activation in the MLP, act(gate), is recomputed in the backward pass (fast/gated_mlp.py).
    fused_mlp: bool = True
    # Bytes of optimizer state per trained parameter. DeepSpeed keeps an additional fp32 copy of the parameter.
    optimizer_bytes: int = 8
    # Whether gradients of earlier batches are in memory when a batch begins.
    accumulates: bool = True
    # Whether rows are concatenated instead of padded.
    padding_free: bool = True
    # Whether the loss is computed in chunks.
    chunked: bool = True
    # Whether the device is a GPU. On a GPU, a library computes attention.
    gpu: bool = True
    # How tensors are sharded over the processes: zero2, zero3, fsdp, or '' if they are not sharded.
    sharding: str = ''
    # Whether the optimizer state is kept in CPU memory. With ZeRO-3, the weights can be kept there too.
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    processes: int = 1
    # Number of GPUs among which the layers of one process are divided.
    devices: int = 1

    @property
    def autocasts(self) -> bool:
        """Return whether autocast copies fp32 weights to a smaller compute dtype."""
        return self.full and self.compute < self.trained and not self.deepspeed

    @property
    def deepspeed(self) -> bool:
        """Return whether DeepSpeed is used."""
        return self.sharding.startswith('zero')

    def shards(self, *stages: str) -> int:
        """Return the number of shards of a tensor.

        It is the number of processes if self.sharding is one of `stages`, else 1.
        """
        return self.processes if self.sharding in stages else 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sizes of a batch that determine its memory.

    `tokens` is the number of its tokens. If rows are padded, the padding is included. `longest` is the length of its
    longest row, and `trained` the number of its trained tokens.
    """

    tokens: int
    longest: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The memory of one device in bytes. `peak` is the most memory that is in use at one time.

    `peak` is not the sum of the other items, because they do not all exist at the same time.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int


def trained_parameters(shape: Shape, mode: Mode) -> int:
    """Return the number of parameters that a run trains.

    The parameters of vision towers, and those of norms in --lora_modules_to_save, are not counted.
    """
    if mode.full:
        return shape.parameters - shape.tower
    adapter = lora_parameters(shape, mode.targets, mode.rank, dora=mode.dora)
    layers = sum(math.prod(shape.paths[path]) for path in named_by(mode.saved, shape.paths))
    tables = shape.embedding if mode.trains_embedding else 0
    if mode.trains_head and shape.head:
        tables += shape.head
    return adapter + layers + tables + mode.token_rows


def lora_parameters(shape: Shape, targets: Sequence[str], rank: int, *, dora: bool = False) -> int:
    """Return the number of parameters of a LoRA adapter of this rank on the layers `targets`.

    Every stacked expert has its own adapter weights.
    """
    linear = sum(adapter_size(*shape.paths[path], rank, dora=dora) for path in named_by(targets, shape.paths))
    stacked = (shape.stacked[name] for name in targets if name in shape.stacked)
    return linear + sum(layers * experts * rank * (i + o) for layers, experts, i, o in stacked)


def footprint(shape: Shape, mode: Mode, batch: Batch) -> Footprint:
    """Return the memory that one device needs for a training step.

    The field `peak` is the largest of four values: at the loss, in the backward pass, after the backward pass, and in
    the optimizer step.
    """
    trained = trained_parameters(shape, mode)
    own = trained // mode.shards('zero3', 'fsdp') // mode.devices
    width = mode.compute if mode.deepspeed else mode.trained
    weights = _weights(shape, mode)
    adapter = 0 if mode.full else own * width

    gradients = own * width // mode.shards('zero2')
    if mode.offloads_optimizer:
        gradients = 0

    optimizer = 0
    if not mode.offloads_optimizer:
        optimizer = trained // mode.shards('zero2', 'zero3', 'fsdp') // mode.devices
        optimizer *= mode.optimizer_bytes + 4 * mode.deepspeed

    saved, layer = _saved(shape, mode, batch)
    logits, head_gradient = _head(shape, mode, batch)
    copies = mode.autocasts and not mode.sharding
    cached = mode.compute * shape.linear_parameters // mode.devices if copies else 0
    gathered = _gathered(shape, mode, trained)
    held = weights + adapter + _low_copies(shape, mode) + optimizer + gathered
    before = gradients if mode.accumulates else 0

    if mode.token_rows:  # PEFT puts the trained rows into a copy of the whole table
        logits += mode.compute * shape.vocabulary * shape.hidden
    at_loss = held + before + saved + logits
    in_backward = held + before + saved + head_gradient + _backward(shape, mode, batch)
    if mode.checkpointing:
        at_loss += cached
        in_backward += layer
    after_backward = held + gradients + head_gradient
    if head_gradient and not shape.head:
        after_backward += (
            mode.trained * shape.embedding
        )  # the gradient of a tied head is added to a separate gradient of the embedding
    in_step = held + gradients + _step(shape, mode, own)
    peak = max(at_loss, in_backward, after_backward, in_step)

    return Footprint(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=saved,
        logits=logits,
        peak=peak + (0 if mode.gpu else _KERNELS),
    )


def _low_copies(shape: Shape, mode: Mode) -> int:
    """Return the bytes of the copies of LoRA weights in the compute dtype (see utils/fast/low_copies.py)."""
    if mode.full or not mode.fused or mode.deepspeed or mode.compute >= mode.trained:
        return 0
    return mode.compute * lora_parameters(shape, mode.targets, mode.rank) // mode.devices


def _weights(shape: Shape, mode: Mode) -> int:
    if mode.offloads_weights:
        return 0
    width: float = mode.trained if mode.full and not mode.deepspeed else mode.compute
    packed = shape.linear_parameters if mode.packed else 0
    whole = (shape.parameters - packed) * width + packed * PACKED.get(mode.packed, 0)
    return int(whole / mode.shards('zero3', 'fsdp') / mode.devices)


def _saved(shape: Shape, mode: Mode, batch: Batch) -> tuple[int, int]:
    """Return two sizes of the activations that are saved for the backward pass, in bytes.

    The first size is that of all layers on one device. With gradient checkpointing, these are only the inputs of the
    layers. The second size is that of one layer without gradient checkpointing.
    """
    c = mode.compute
    heads = shape.heads * shape.head_dim
    residual = mode.trained if mode.full else c

    norm = residual
    if not mode.fused_norms:
        norm = 4 + (residual if mode.full else 0)
    per_token = shape.normed * norm + _inputs(shape, mode)

    fused = mode.fused_mlp and 'gate_proj' in shape.linear and not shape.stacked
    per_token += (3 if shape.gated and not fused else 2) * shape.inner * c

    per_token += shape.layers * (heads + 2 * shape.kv_heads * shape.head_dim) * c
    if mode.gpu or not mode.padding_free:
        # The library's attention saves fp32 sums and its output. The output needs no additional memory if the
        # next layer saves the same tensor as its input.
        shared = not mode.padding_free and (mode.full or ('o_proj' in mode.targets and not mode.packed))
        per_token += shape.layers * (4 * shape.heads + (0 if shared else heads * c))
    else:
        per_token += shape.layers * shape.heads * _kept(batch.longest) * c
    if shape.attention == 'eager':
        per_token += shape.layers * shape.heads * batch.longest * (4 + c)

    every = per_token * batch.tokens
    if mode.saves_weights or (mode.autocasts and not mode.sharding):
        every += c * shape.linear_parameters
    mask = batch.tokens * batch.longest * shape.heads * c if shape.attention == 'alibi' else 0
    layer = every // shape.layers
    if mode.checkpointing:
        every = batch.tokens * (shape.layers + 1) * shape.hidden * residual
    return every // mode.devices + mask, layer


def _kept(longest: int) -> int:
    """Return how many attention weights a CPU saves for the backward pass, per token and head.

    `longest` is the number of tokens in the longest row of the batch.
    """
    kept = 0
    for start in range(0, longest, QUERY_BLOCK):
        queries = padded(min(QUERY_BLOCK, longest - start))
        if start + queries <= KEPT_KEYS:
            kept += queries * (start + queries)
    return kept // longest


def _inputs(shape: Shape, mode: Mode) -> int:
    """Return the bytes per token of all inputs of linear layers that are saved for the backward pass."""
    c = mode.compute
    if mode.full and (mode.autocasts or mode.sharding):
        return sum(n * i * c for sizes in shape.linear.values() for n, i, _ in sizes)

    linear = shape.linear if mode.full else shape.sizes_of(named_by(mode.targets, shape.paths))
    between = 0 if mode.full else sum(n * mode.rank for sizes in linear.values() for n, _, _ in sizes)
    if mode.dora:  # The outputs of the base layer and, in fp32, of the adapter are saved for the magnitude.
        between += sum(n * o * (c + 4) // 4 for sizes in linear.values() for n, _, o in sizes)
    if not mode.full and not mode.fused and not mode.deepspeed:
        return sum(4 * n * i for sizes in linear.values() for n, i, _ in sizes) + 4 * between

    # Layers of a group in _SHARED save one input together.
    firsts = [next((name for name in group if name in linear), None) for group in _SHARED]
    others = [name for name in linear if not any(name in group for group in _SHARED)]
    counted = (*others, *filter(None, firsts))
    return c * (sum(n * i for name in counted for n, i, _ in linear[name]) + between)


def _head(shape: Shape, mode: Mode, batch: Batch) -> tuple[int, int]:
    """Return the memory that the computation of the loss adds, and the size of the head's gradient, in bytes.

    Weights, optimizer and the saved activations of the layers are not included. The first number includes the second.

    The gradient is in fp32 and remains in memory after the loss. Its size is 0 if the head is not trained, or if the
    loss is not computed in chunks.
    """
    c = mode.compute
    table = shape.vocabulary * shape.hidden
    if not mode.chunked:
        return batch.trained * shape.vocabulary * (2 * c + 8), 0

    in_chunk = chunk_rows(shape.vocabulary, c, on_gpu=mode.gpu)
    chunk = chunk_memory(min(batch.trained, in_chunk), shape.vocabulary, c, on_gpu=mode.gpu)
    hidden = 3 * batch.trained * shape.hidden * c
    if not mode.full and not mode.trains_head:
        return chunk + hidden, 0

    # Each chunk computes a part of the head's gradient. The first part, in fp32, becomes the sum, and later parts are
    # added to it. A CPU computes a part in the compute dtype, and then converts it.
    computed = 0 if mode.gpu or c == 4 else c
    adding = chunk + table * (computed + (4 if batch.trained > in_chunk else 0))
    # The sum is fp32. Under autocast, torch and chunked_loss.py each make a copy of the head's weights.
    copies = 2 * c if mode.autocasts else 0
    if not mode.full and c < 4:
        copies = c
    return adding + hidden + table * (4 + copies), 4 * table


def _backward(shape: Shape, mode: Mode, batch: Batch) -> int:
    """Return the temporary bytes in the backward pass of one layer. Saved activations are not included."""
    c = mode.compute
    layers = shape.layers
    mlp = 3 * shape.inner // layers * c * batch.tokens
    attention = batch.tokens * shape.head_dim * (shape.heads * c + 8 * shape.kv_heads)
    if not mode.gpu and mode.padding_free:
        scores = shape.heads * padded(min(QUERY_BLOCK, batch.longest)) * padded(batch.longest)
        grouped = min(GROUP_SCORES, batch.tokens // batch.longest * scores)
        attention += 4 * c * max(scores, grouped)
    largest = max((i * o for sizes in shape.linear.values() for _, i, o in sizes), default=0)
    weight = 0
    if mode.dora:
        weight = _dora(shape, mode)
    elif mode.full:
        weight = largest * (c + mode.trained)
    elif mode.packed:
        weight = largest * c
    return max(mlp, attention) + weight


def _dora(shape: Shape, mode: Mode) -> int:
    """Return the temporary bytes of the largest DoRA layer.

    PEFT computes the product of A and B from an identity matrix, and adds it to a copy of the weight, all in fp32.
    """
    sizes = [shape.paths[path] for path in named_by(mode.targets, shape.paths)]
    return max((4 * (i * i + 3 * i * o) for i, o in sizes), default=0)


def _gathered(shape: Shape, mode: Mode, trained: int) -> int:
    """Return the bytes of weights and gradients that ZeRO or FSDP gathers temporarily from all processes.

    `trained` is the number of parameters that the run trains.
    """
    c = mode.compute
    bucket = min(shape.hidden**2, trained)
    if mode.sharding == 'zero2':
        return (2 * bucket + min(_GATHERED, trained)) * c
    if mode.sharding == 'zero3':
        return (2 * bucket + min(_LIVE, shape.parameters)) * c
    if mode.sharding == 'fsdp':
        layer = (shape.parameters - shape.embedding - shape.head - shape.tower) // shape.layers
        return 2 * layer * c + (shape.embedding + shape.head) * c + (4 * layer if mode.full else 0)
    return 0


def _step(shape: Shape, mode: Mode, own: int) -> int:
    """Return the temporary bytes of the optimizer step. `own` is the number of trained parameters on one device.

    The optimizer for bf16 weights needs temporary memory for one chunk of values. Other optimizers are fused and need
    none, except with FSDP. With FSDP on a GPU, they need temporary memory for all trained tensors together. With FSDP
    on a CPU, they need it for the largest tensor.
    """
    if mode.full and mode.trained == 2:
        return _STEP_BYTES * min(own, STEP_CHUNK)
    if mode.sharding != 'fsdp':
        return 0
    largest = max(shape.embedding, *(i * o for sizes in shape.linear.values() for _, i, o in sizes))
    return 4 * own if mode.gpu else 8 * min(own, largest)

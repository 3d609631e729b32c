"""What a training step asks of one device: pure arithmetic on the shape of a model, in bytes (benchmarks/estimate.py).

`c` is the width of the compute dtype. Full fine-tuning holds fp32 weights and computes under autocast, which makes
copies in the compute dtype of weights and of every linear layer's input; LoRA computes in the dtype of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.estimate.model_shape import Shape
from utils.fast.constants import CHUNK_LOGITS, KEPT_KEYS, QUERY_BLOCK

GIB = 2**30
# Bytes per weight of a linear layer: 4 bits with an fp32 scale for 64 weights, or with 8-bit scales that have an fp32
# scale for 256 of them; 8 bits; GPTQ with fp16 scales and packed zeros for 128 weights.
PACKED = {
    'nf4': 0.5 + 4 / 64,
    'nf4x2': 0.5 + 1 / 64 + 4 / 64 / 256,
    'int8': 1.0,
    'gptq4': 0.5 + 2.5 / 128,
    'gptq8': 1.0 + 3 / 128,
}
# What a CPU takes beside tensors: kernels compiled at their first use, 12 to 48 MB in benchmarks/estimate.py.
_KERNELS = 2**25
# DeepSpeed's defaults: parameters that ZeRO-3 keeps gathered; those that ZeRO-2 gathers at once after a step.
_LIVE, _GATHERED = 10**9, 2 * 10**8
# Layers that have one input: what is saved of it is saved once.
_SHARED = (
    ('q_proj', 'k_proj', 'v_proj', 'qkv_proj', 'query_key_value', 'c_attn', 'in_proj_qkv', 'in_proj_z', 'in_proj_a'),
    ('gate_proj', 'up_proj', 'gate_up_proj', 'w1', 'w3', 'c_fc', 'dense_h_to_4h'),
)


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What of a run decides its memory, but the model and the batch."""

    full: bool
    # Bytes of the compute dtype, and how linear layers are packed: a key of PACKED, or ''.
    compute: int
    packed: str = ''
    # Names of linear layers that LoRA is on, and its rank.
    targets: tuple[str, ...] = ()
    rank: int = 8
    # Base and adapter in one step (lora.py); else PEFT's layers, which copy their input to the adapter's dtype.
    fused: bool = True
    checkpointing: bool = False
    # RMSNorm keeps its input alone (norm.py).
    fused_norms: bool = True
    # act(gate) is computed again (gated.py).
    fused_mlp: bool = True
    # What the optimizer keeps of each trained parameter; DeepSpeed an fp32 copy of it besides.
    optimizer_bytes: int = 8
    # Gradients are there already when a batch begins.
    accumulates: bool = True
    # Rows end to end; the loss in chunks; a GPU, whose attention is a library's.
    laid: bool = True
    chunked: bool = True
    gpu: bool = True
    # '', zero2, zero3 or fsdp; optimizer in main memory; weights and optimizer there (ZeRO-3).
    sharding: str = ''
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    processes: int = 1
    # GPUs that the layers of one process are spread over.
    devices: int = 1

    @property
    def autocasts(self) -> bool:
        """Return whether fp32 weights are computed with in a smaller dtype."""
        return self.full and self.compute < 4 and not self.deepspeed

    @property
    def deepspeed(self) -> bool:
        """Return whether DeepSpeed shards."""
        return self.sharding.startswith('zero')

    def shards(self, *stages: str) -> int:
        """Return over how many processes something is shared out that these stages share out."""
        return self.processes if self.sharding in stages else 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The batch that asks for most: its tokens with padding, its longest row, the tokens with loss."""

    tokens: int
    longest: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on each device. What is held all the time, then what comes and goes; `peak` is the most at once."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int


def lora_parameters(shape: Shape, targets: Sequence[str], rank: int) -> int:
    """Return the parameters of an adapter; on stacked experts each expert has its own."""
    linear = sum(n * rank * (i + o) for name in targets for n, i, o in shape.linear.get(name, ()))
    stacked = (shape.stacked[name] for name in targets if name in shape.stacked)
    return linear + sum(layers * experts * rank * (i + o) for layers, experts, i, o in stacked)


def footprint(shape: Shape, mode: Mode, batch: Batch) -> Footprint:
    """Return what a device holds and its peak in a step: at the loss, in the backward pass, or in the optimizer."""
    trained = shape.parameters - shape.tower if mode.full else lora_parameters(shape, mode.targets, mode.rank)
    own = trained // mode.shards('zero3', 'fsdp') // mode.devices
    wide = mode.compute if mode.deepspeed else 4
    weights = _weights(shape, mode)
    adapter = 0 if mode.full else own * wide
    gradients = own * wide // mode.shards('zero2')
    if mode.offloads_optimizer:
        gradients = 0
    elif mode.processes > 1 and not mode.sharding:
        gradients *= 2  # DistributedDataParallel sends them from buckets of its own
    optimizer = 0 if mode.offloads_optimizer else trained // mode.shards('zero2', 'zero3', 'fsdp') // mode.devices
    optimizer *= mode.optimizer_bytes + 4 * mode.deepspeed
    saved, layer = _saved(shape, mode, batch)
    logits, kept = _head(shape, mode, batch)
    copies = mode.autocasts and not mode.sharding
    cached = mode.compute * shape.linear_parameters // mode.devices if copies else 0
    gathered = _gathered(shape, mode, trained)
    held = weights + adapter + optimizer + gathered
    before = gradients if mode.accumulates else 0
    moments = (
        held + before + saved + logits + (cached if mode.checkpointing else 0),
        held + before + saved + kept + _backward(shape, mode, batch) + (layer if mode.checkpointing else 0),
        held + gradients + kept + (4 * shape.embedding if kept and not shape.head else 0),
        held + gradients + _step(shape, mode, own),
    )
    return Footprint(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=saved,
        logits=logits,
        peak=max(moments) + (0 if mode.gpu else _KERNELS),
    )


def _weights(shape: Shape, mode: Mode) -> int:
    if mode.offloads_weights:
        return 0
    width: float = 4 if mode.full and not mode.deepspeed else mode.compute
    packed = shape.linear_parameters if mode.packed else 0
    whole = (shape.parameters - packed) * width + packed * PACKED.get(mode.packed, 0)
    return int(whole / mode.shards('zero3', 'fsdp') / mode.devices)


def _saved(shape: Shape, mode: Mode, batch: Batch) -> tuple[int, int]:
    """Return what the layers save for the backward pass, and what one layer saves, per device."""
    c, heads = mode.compute, shape.heads * shape.head_dim
    wide = 4 if mode.full else c
    per_token = shape.normed * (wide if mode.fused_norms else 8 if mode.full else 4) + _inputs(shape, mode)
    fused = mode.fused_mlp and 'gate_proj' in shape.linear and not shape.stacked
    per_token += (3 if shape.gated and not fused else 2) * shape.inner * c
    per_token += shape.layers * (heads + 2 * shape.kv_heads * shape.head_dim) * c
    if mode.gpu or not mode.laid:  # the library's attention keeps its sums and its output, which goes on as it is
        shared = not mode.laid and (mode.full or ('o_proj' in mode.targets and not mode.packed))
        per_token += shape.layers * (4 * shape.heads + (0 if shared else heads * c))
    else:
        per_token += shape.layers * shape.heads * _kept(batch.longest) * c
    if shape.attention == 'eager':
        per_token += shape.layers * shape.heads * batch.longest * (4 + c)
    every = per_token * batch.tokens
    if mode.autocasts and not mode.sharding:
        every += c * shape.linear_parameters
    mask = batch.tokens * batch.longest * shape.heads * c if shape.attention == 'alibi' else 0
    layer = every // shape.layers
    if mode.checkpointing:
        every = batch.tokens * (shape.layers + 1) * shape.hidden * wide
    return every // mode.devices + mask, layer


def _kept(longest: int) -> int:
    """Return the keys per token whose weights a CPU keeps, where all rows are as long."""
    blocks = ((start, min(start + QUERY_BLOCK, longest)) for start in range(0, min(longest, KEPT_KEYS), QUERY_BLOCK))
    return sum((end - start) * end for start, end in blocks if end <= KEPT_KEYS) // longest


def _inputs(shape: Shape, mode: Mode) -> int:
    """Return the bytes per token that linear layers save of their inputs, in all layers."""
    c = mode.compute
    if mode.full and (mode.autocasts or mode.sharding):
        return sum(n * i * c for sizes in shape.linear.values() for n, i, _ in sizes)
    names = list(shape.linear) if mode.full else [name for name in mode.targets if name in shape.linear]
    between = 0 if mode.full else sum(n * mode.rank for name in names for n, _, _ in shape.linear[name])
    if not mode.full and not mode.fused and not mode.deepspeed:
        return sum(4 * n * i for name in names for n, i, _ in shape.linear[name]) + 4 * between
    firsts = [next((name for name in group if name in names), None) for group in _SHARED]
    alone = [name for name in names if not any(name in group for group in _SHARED)]
    return c * (sum(n * i for name in (*alone, *filter(None, firsts)) for n, i, _ in shape.linear[name]) + between)


def _head(shape: Shape, mode: Mode, batch: Batch) -> tuple[int, int]:
    """Return what the loss takes at its peak, and the fp32 gradient of the head that is kept until it is summed."""
    c, table = mode.compute, shape.vocabulary * shape.hidden
    if not mode.chunked:
        return batch.trained * shape.vocabulary * (2 * c + 8), 0
    rows = min(batch.trained, max(16, CHUNK_LOGITS // shape.vocabulary))
    chunk = rows * shape.vocabulary * (4 if c == 4 else 4 + c)
    hidden = 3 * batch.trained * shape.hidden * c
    if not mode.full:
        return chunk + hidden, 0
    # A chunk's share of the head's gradient, which a CPU widens before it adds it to the sum.
    adding = chunk + table * (c + (0 if mode.gpu else 4))
    # The sum in fp32; under autocast two copies of the weights, torch's and our own.
    return adding + hidden + table * (4 + (2 * c if mode.autocasts else 0)), 4 * table


def _backward(shape: Shape, mode: Mode, batch: Batch) -> int:
    """Return what the backward pass of one layer takes beside what was saved."""
    c, layers = mode.compute, shape.layers
    mlp = 3 * shape.inner // layers * c * batch.tokens
    attention = batch.tokens * shape.head_dim * (shape.heads * c + 8 * shape.kv_heads)
    if not mode.gpu and mode.laid:
        attention += 4 * c * min(QUERY_BLOCK, batch.longest) * batch.longest * shape.heads
    largest = max((i * o for sizes in shape.linear.values() for _, i, o in sizes), default=0)
    weight = largest * (c + 4) if mode.full else largest * c if mode.packed else 0
    return max(mlp, attention) + weight


def _gathered(shape: Shape, mode: Mode, trained: int) -> int:
    """Return the weights and gradients of other processes that are here for a moment."""
    c, bucket = mode.compute, min(shape.hidden**2, trained)
    if mode.sharding == 'zero2':
        return (2 * bucket + min(_GATHERED, trained)) * c
    if mode.sharding == 'zero3':
        return (2 * bucket + min(_LIVE, shape.parameters)) * c
    if mode.sharding == 'fsdp':
        layer = (shape.parameters - shape.embedding - shape.head - shape.tower) // shape.layers
        return 2 * layer * c + (shape.embedding + shape.head) * c + (4 * layer if mode.full else 0)
    return 0


def _step(shape: Shape, mode: Mode, own: int) -> int:
    """Return what the optimizer's arithmetic takes: fused nothing, else on a GPU as all tensors, on a CPU as one."""
    if mode.sharding != 'fsdp':
        return 0
    largest = max(shape.embedding, *(i * o for sizes in shape.linear.values() for _, i, o in sizes))
    return 4 * own if mode.gpu else 8 * min(own, largest)

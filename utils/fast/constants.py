"""Sizes of blocks and chunks. The memory estimate uses them without torch, so this module imports nothing."""

from __future__ import annotations

# The number of queries in one block of attention. The scores of such a block fit in the CPU cache. No scores are
# computed for keys after the block.
QUERY_BLOCK = 128
# The numbers of queries and keys of a block are padded to a multiple of this. With 16-bit scores, torch's softmax is
# fast only for such numbers of keys. Blocks of equal padded shapes are computed together.
PADDED = 32
# The largest number of attention scores of blocks that are computed together: 8 MiB in 16 bits.
GROUP_SCORES = 2**22
# The attention weights of a block are saved for the backward pass if the block has at most this many keys. The weights
# of all other blocks are computed again.
KEPT_KEYS = 384
# The number of bytes of the logits in one chunk of the loss on a CPU: 32 MiB. Each chunk reads the weight of the head,
# so smaller chunks are slower. Larger chunks need more memory.
CHUNK_BYTES = 2**25
# On a GPU, the number of logits in one chunk: 0.5 GiB in 16 bits. Matrix products on a GPU are fast only with many
# positions. Their number is a multiple of GPU_ROWS, the size of a tile of these products.
GPU_CHUNK_LOGITS = 2**28
GPU_ROWS = 128
# The number of logits of a chunk that are converted to fp32 together: 4 MiB on a CPU, which fits in its cache. On a GPU
# this is done only if the kernel for the loss cannot be used.
PART_LOGITS = 2**20
GPU_PART_LOGITS = 2**26
# The number of values that the optimizer of bf16 weights updates together. Each takes about 32 temporary bytes.
STEP_CHUNK = 2**21


def padded(count: int) -> int:
    """Return `count`, rounded up to a multiple of PADDED (32)."""
    return -(-count // PADDED) * PADDED


def chunk_rows(vocabulary: int, compute: int, *, on_gpu: bool) -> int:
    """Return the number of positions in one chunk of the loss.

    `vocabulary` is the number of logits of a position, and `compute` is the number of bytes of a logit.
    """
    if on_gpu:
        return max(GPU_ROWS, GPU_CHUNK_LOGITS // vocabulary // GPU_ROWS * GPU_ROWS)
    return max(16, CHUNK_BYTES // (vocabulary * compute))


def part_rows(vocabulary: int, *, on_gpu: bool) -> int:
    """Return the number of positions whose logits are converted to fp32 at the same time.

    `vocabulary` is the number of logits of a position.
    """
    return max(1, (GPU_PART_LOGITS if on_gpu else PART_LOGITS) // vocabulary)


def chunk_memory(rows: int, vocabulary: int, compute: int, *, on_gpu: bool) -> int:
    """Return the number of bytes that the loss of a chunk needs.

    The chunk has `rows` positions with `vocabulary` logits each. A logit has `compute` bytes. The gradient needs no
    memory, because it overwrites the logits. On a CPU, 16-bit logits need more memory, because some of them are also
    held in fp32. On a GPU, the kernel for the loss is assumed, which needs no logits in fp32.
    """
    logits = rows * vocabulary * compute
    if on_gpu or compute == 4:
        return logits
    return logits + 4 * min(rows, part_rows(vocabulary, on_gpu=False)) * vocabulary

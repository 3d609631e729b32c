"""Sizes of blocks and chunks. The memory estimate uses them without torch, so this module imports nothing."""

from __future__ import annotations

# The number of queries in one block of attention. The scores of such a block fit in the CPU cache. No scores are
# computed for keys after the block.
QUERY_BLOCK = 128
# The numbers of queries and keys of a block are padded to a multiple of this. With 16-bit scores, torch's softmax is
# fast only for such numbers of keys. Blocks of equal padded shapes are computed together.
PADDED = 32
# The largest number of attention scores of such a group: 8 MiB in 16 bits.
GROUP_SCORES = 2**22
# The attention weights of a block are saved for the backward pass if the block has at most this many keys. The weights
# of all other blocks are computed again.
KEPT_KEYS = 384
# The number of logits in one chunk of the loss on a CPU: 32 MiB in fp32. Smaller chunks make matrix products slower.
# Larger chunks need more memory and are not faster.
CHUNK_LOGITS = 2**23
# The same on a GPU: 0.5 GiB in 16 bits. A GPU reads the weight of the head once for each chunk, and its matrix products
# are fast only with many positions. Their number is a multiple of GPU_ROWS, the size of a tile of these products.
GPU_CHUNK_LOGITS = 2**28
GPU_ROWS = 128
# The number of values that the optimizer of bf16 weights updates together. Each takes about 32 temporary bytes.
STEP_CHUNK = 2**21


def padded(count: int) -> int:
    """Return a number of queries or keys, rounded up to a multiple of PADDED."""
    return -(-count // PADDED) * PADDED


def chunk_rows(vocabulary: int, *, on_gpu: bool) -> int:
    """Return the number of positions in one chunk of the loss."""
    if on_gpu:
        return max(GPU_ROWS, GPU_CHUNK_LOGITS // vocabulary // GPU_ROWS * GPU_ROWS)
    return max(16, CHUNK_LOGITS // vocabulary)


def logit_bytes(compute: int, *, on_gpu: bool) -> int:
    """Return the bytes that the loss needs for each logit of a chunk.

    `compute` is the number of bytes of a value in the compute dtype. A kernel on a GPU overwrites the logits with their
    gradient. Elsewhere, 16-bit logits are copied to fp32.
    """
    return compute if on_gpu or compute == 4 else compute + 4

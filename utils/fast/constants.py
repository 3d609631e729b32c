"""Sizes of the fast path. The estimate of memory uses them too, so this module imports nothing."""

from __future__ import annotations

# Queries that are attended in one block. The scores of a block fit in the CPU cache, and keys after it are skipped.
QUERY_BLOCK = 128
# Attention weights of a block with at most this many keys are saved for the backward pass; others are recomputed.
KEPT_KEYS = 384
# Logits of one chunk of the loss: 32 MiB in fp32. Smaller chunks make the matrix products slower, larger ones only cost
# memory.
CHUNK_LOGITS = 2**23

"""Sizes of blocks and chunks. The memory estimate uses them without torch, so this module imports nothing."""

from __future__ import annotations

# The number of queries in one block of attention. The scores of a block fit in the CPU cache, and keys after the block
# are not computed.
QUERY_BLOCK = 128
# The attention weights of a block are saved for the backward pass if the block has at most this many keys. Otherwise
# they are computed again.
KEPT_KEYS = 384
# The number of logits in one chunk of the loss: 32 MiB in fp32. Smaller chunks make the matrix products slower. Larger
# chunks only need more memory.
CHUNK_LOGITS = 2**23

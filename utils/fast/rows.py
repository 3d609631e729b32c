"""The rows of a concatenated batch, as attention layers and recurrent layers get them.

A concatenated batch has its rows of tokens one after the other, without padding. Attention and recurrent layers compute
it in one of two ways:

- In groups of rows. Rows of similar length form a group, and each row is padded to the longest row of its group.
- In groups of blocks. A block is at most 128 consecutive queries of a row, with all keys that they may see. Its queries
  and keys are padded to a multiple of 32. Blocks of equal shape form a group.

The letters at the end of a name are the dimensions of the tensor. For example, `index_BL` has the shape
[rows of a group, length of its longest row].

    T: tokens of all rows
    B: rows of a group of rows, or blocks of a group of blocks
    L: length of the longest row of a group of rows
    G: key heads
    R: query heads that share one key head
    H: query heads
    Q: queries of a block, with padding
    K: keys of a block, with padding
    N: pairs of a query and a head in all blocks, with padding
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch

from utils.base.device import send
from utils.fast.constants import GROUP_SCORES, KEPT_KEYS, QUERY_BLOCK, padded
from utils.fast.flex_rows import row_block_mask

T = TypeVar('T')


class Block(NamedTuple):
    """A block of queries of one row, with the keys that they may see.

    The queries are the tokens `start` to `end` - 1 of the batch. The keys are the tokens `first_key` to `end` - 1.
    """

    first_key: int
    start: int
    end: int


class BlockGroup(NamedTuple):
    """Blocks of queries that have the same shape after padding, so that one matrix product computes all of them.

    After padding, each block has `queries` queries and `keys` keys. The first `earlier` keys are before the first query
    of the block. Padding is at the end, so that causal attention hides the padded keys.

    `first` is the number of queries that one head has in all groups before this group. Padding is included.
    """

    blocks: tuple[Block, ...]
    queries: int
    earlier: int
    keys: int
    first: int

    def part(self, padded_ND: torch.Tensor, heads: int, repeats: int) -> torch.Tensor:
        """Return a view of `padded_ND` with only the vectors of this group.

        `padded_ND` [vectors, width] has one vector for each pair of a query and a query head, for the blocks of all
        groups. Padded queries are included. The order is (group, block, key head, query head of this key head, query).

        `heads` is the number of key heads. `repeats` is the number of query heads that share one key head. It is 1 if
        `padded_ND` has only one vector for each pair of a query and a key head. The view has the shape
        [blocks of this group * heads, repeats * self.queries, width].
        """
        start = self.first * heads * repeats
        part_ND = padded_ND[start : start + len(self.blocks) * heads * repeats * self.queries]
        return part_ND.view(-1, repeats * self.queries, padded_ND.shape[-1])


class QueryIndices(NamedTuple):
    """Indices that copy the queries of a batch into padded blocks, and indices that copy them back.

    Let x [tokens * heads, width] be the queries of the rows. Then y = x[take] are the queries of all padded blocks, and
    y[place] is x again. At padding, `take` repeats the last query of the block.

    `is_real` [len(take), 1] is False at padding and True elsewhere. If no block is padded, `is_real` is None.
    """

    # The order of the padded queries is (group, block, key head, query head of this key head, query).
    take: torch.Tensor
    place: torch.Tensor
    is_real: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The plan by which attention computes the rows of a batch in blocks.

    A block is at most 128 queries of a row, with all keys that they may see. `groups` has the blocks of all rows,
    grouped by shape. `heads` is the number of key heads. The other fields are indices into tensors of the batch:

    - `queries` copies queries into the blocks, and back.
    - `place_keys` copies the gradients of keys from the blocks back into the order of the tokens.
    - `few_keys` has, for each group, the indices that copy keys into its blocks. For a group with many keys, it has
      None, because these indices would need much memory.
    """

    groups: list[BlockGroup]
    heads: int
    queries: QueryIndices
    place_keys: torch.Tensor
    few_keys: list[torch.Tensor | None]

    def keys(self, number: int) -> torch.Tensor:
        """Return the indices that copy keys into the blocks of `self.groups[number]`.

        For example, let x [tokens * key heads, width] be the keys of the batch. Then x[indices] are the keys of the
        blocks.
        """
        stored = self.few_keys[number]
        if stored is not None:
            return stored
        return key_indices(self.groups[number], self.heads, self.queries.take.device)


class DeviceTensors:
    """Stores tensors that are made from the row lengths of a batch, so that all layers use the same tensors.

    Each tensor is made once for each device.
    """

    def __init__(self, cu_seqlens: torch.Tensor | None = None) -> None:
        """Store the tensor `cu_seqlens` if it is given.

        Layers on the device of this tensor then use it. For other devices, RowMask.cu_seqlens makes a new tensor.
        """
        self._made: dict[tuple[str, torch.device], Any] = {}
        if cu_seqlens is not None:
            self._made['cu_seqlens', cu_seqlens.device] = cu_seqlens

    def get(self, name: str, device: torch.device, make: Callable[[], T]) -> T:
        """Return the tensor with this name on the device. If there is none, store and return what `make` returns."""
        key = (name, device)
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found


@dataclass(frozen=True)
class RowMask:
    """The row lengths of a concatenated batch. Attention layers get this object instead of a mask tensor.

    A query sees the key at its own position and the earlier keys of its row. If `window` is not None, it sees only the
    last `window` of these keys.
    """

    lengths: tuple[int, ...]
    window: int | None
    tensors: DeviceTensors = field(default_factory=DeviceTensors, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all rows.

        The batch can have further tokens at its end, which are not counted.
        """
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Return the length of the longest row."""
        return max(self.lengths)

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """Return the index of the first token of each row, and then the number of all tokens, as an int32 tensor.

        For example, rows of 3 and 2 tokens give [0, 3, 5].
        """
        ends = [0, *accumulate(self.lengths)]
        return self.tensors.get('cu_seqlens', device, lambda: torch.tensor(ends, dtype=torch.int32, device=device))

    def block_mask(self, device: torch.device) -> Any:
        """Return the mask for flex_attention."""
        name = f'block_mask {self.window}'
        return self.tensors.get(name, device, lambda: row_block_mask(self.lengths, self.window, device))

    def group_indices(self, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return indices that copy a batch into padded groups of rows, and indices that copy it back.

        Rows of similar length form a group. In this example, `batch` is [tokens, width]:

            indices, place = mask.group_indices(device)
            groups = [batch[index] for index in indices]
            batch = torch.cat([group.flatten(0, 1) for group in groups])[place]

        Each tensor in `indices` is [rows of the group, length of the longest row]. The padding is at the end of a row,
        and repeats the first token of the row. `place` is [tokens].
        """

        def make() -> tuple[list[torch.Tensor], torch.Tensor]:
            groups = []
            real = []
            for group in self.groups():
                offset_L = torch.arange(group[0][1])
                start_B1, length_B1 = torch.tensor(group).t()[:, :, None]
                is_real_BL = offset_L < length_B1
                groups.append(torch.where(is_real_BL, start_B1 + offset_L, start_B1))
                real.append(is_real_BL)

            is_real = torch.cat([x.flatten() for x in real])
            order_T = torch.cat([x.flatten() for x in groups])[is_real].argsort()
            place_T = is_real.nonzero().squeeze(-1)[order_T]
            by_name = {str(number): index_BL for number, index_BL in enumerate(groups)}
            *sent, place = send({**by_name, 'place': place_T}, device).values()
            return sent, place

        return self.tensors.get('group_indices', device, make)

    def blocks(self) -> Iterator[Block]:
        """Yield all rows, cut into blocks of at most QUERY_BLOCK queries.

        Each block has all keys that its queries may see.
        """
        row_start = 0
        for length in self.lengths:
            row_end = row_start + length
            for start in range(row_start, row_end, QUERY_BLOCK):
                first_key = row_start
                if self.window is not None:
                    first_key = max(row_start, start - self.window + 1)
                yield Block(first_key, start, min(start + QUERY_BLOCK, row_end))
            row_start = row_end

    def block_groups(self, heads: int) -> list[BlockGroup]:
        """Return the blocks of all rows, in groups of blocks that have the same shape after padding.

        The numbers of queries and keys of a block are padded to a multiple of PADDED. If a group would have more than
        GROUP_SCORES attention scores in `heads` query heads, it is split, because its scores would need much memory.
        """
        by_shape: dict[tuple[int, int], list[Block]] = {}
        for block in self.blocks():
            queries = padded(block.end - block.start)
            by_shape.setdefault((block.start - block.first_key, queries), []).append(block)

        groups = []
        first = 0
        for (earlier, queries), blocks in sorted(by_shape.items()):
            keys = padded(earlier + queries)
            most = max(1, GROUP_SCORES // (heads * queries * keys))
            for start in range(0, len(blocks), most):
                chosen = tuple(blocks[start : start + most])
                groups.append(BlockGroup(chosen, queries, earlier, keys, first))
                first += len(chosen) * queries
        return groups

    def block_plan(self, heads: int, repeats: int, device: torch.device) -> BlockPlan:
        """Return the plan by which attention computes the rows in blocks.

        It is made once per device, and used by all layers with the same window and the same numbers of heads. `heads`
        is the number of key heads. `repeats` is the number of query heads that share one key head.
        """

        def make() -> BlockPlan:
            groups = self.block_groups(heads * repeats)
            return BlockPlan(
                groups=groups,
                heads=heads,
                queries=self._query_indices(groups, heads, repeats, device),
                place_keys=self._query_indices(groups, heads, 1, device).place,
                few_keys=[key_indices(group, heads, device) if group.keys <= KEPT_KEYS else None for group in groups],
            )

        return self.tensors.get(f'block_plan {self.window} {heads} {repeats}', device, make)

    def _query_indices(self, groups: list[BlockGroup], heads: int, repeats: int, device: torch.device) -> QueryIndices:
        count = heads * repeats
        head_GR1 = torch.arange(count).view(heads, repeats, 1)
        place_TH = torch.empty(self.tokens, count, dtype=torch.long)
        take = []
        real = []
        for group in groups:
            start_B1 = torch.tensor([block.start for block in group.blocks])[:, None]
            last_B1 = torch.tensor([block.end - 1 for block in group.blocks])[:, None]
            position_BQ = start_B1 + torch.arange(group.queries)
            is_real_BQ = position_BQ <= last_B1
            shape_BGRQ = (len(group.blocks), heads, repeats, group.queries)
            take.append((position_BQ.minimum(last_B1)[:, None, None] * count + head_GR1).flatten())
            real.append(is_real_BQ[:, None, None].expand(shape_BGRQ).flatten())
            index_BGRQ = torch.arange(take[-1].numel()).view(shape_BGRQ) + group.first * count
            place_TH[position_BQ[is_real_BQ]] = index_BGRQ.permute(0, 3, 1, 2).flatten(2)[is_real_BQ]

        is_real = torch.cat(real)
        tensors = {'take': torch.cat(take), 'place': place_TH.flatten(), 'is_real': is_real[:, None]}
        if bool(is_real.all()):
            del tensors['is_real']
        sent = send(tensors, device)
        return QueryIndices(sent['take'], sent['place'], sent.get('is_real'))

    def groups(self) -> Iterator[list[tuple[int, int]]]:
        """Yield groups of rows of similar length. A group is a list of (index of the first token, length), one per row.

        A group starts with its longest row, which is less than twice as long as its shortest row.
        """
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        by_length = sorted(zip(starts, self.lengths, strict=True), key=lambda row: -row[1])

        group: list[tuple[int, int]] = []
        for start, length in by_length:
            if group and group[0][1] >= 2 * length:
                yield group
                group = []
            group.append((start, length))
        yield group


def key_indices(group: BlockGroup, heads: int, device: torch.device) -> torch.Tensor:
    """Return the indices that copy keys into the blocks of `group`. `heads` is the number of key heads.

    Let x [tokens * heads, width] be the keys of the batch. Then x[indices] are the keys of the blocks, in the order
    (block, key head, key). If a block has fewer than `group.keys` keys, the index of its last key is repeated.
    """
    offset_K = torch.arange(group.keys, device=device)
    position_BK = torch.stack([(block.first_key + offset_K).clamp_(max=block.end - 1) for block in group.blocks])
    return (position_BK[:, None] * heads + torch.arange(heads, device=device)[:, None]).flatten()


# The rows of the batch that is computed now, as a RowMask whose `window` is None.
_ROWS: ContextVar[RowMask | None] = ContextVar('rows', default=None)


@contextmanager
def concatenated_rows(lengths: Sequence[int], cu_seqlens: torch.Tensor | None = None) -> Iterator[None]:
    """A context in which a model takes its input as rows of these lengths, without padding between them.

    It has an effect on models that were passed to `attend_by_rows`. If `cu_seqlens` is given, layers on the device of
    this tensor use it. For other devices, RowMask.cu_seqlens makes a new tensor.
    """
    token = _ROWS.set(RowMask(tuple(lengths), None, DeviceTensors(cu_seqlens)))
    try:
        yield
    finally:
        _ROWS.reset(token)


def rows_of_batch() -> RowMask | None:
    """Return the row lengths that the context `concatenated_rows` has set, or None outside of this context.

    The `window` of the returned RowMask is None.
    """
    return _ROWS.get()

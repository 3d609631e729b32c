"""The rows of a concatenated batch, as attention layers and recurrent layers get them.

Shapes in names: T tokens of all rows, B rows or blocks of a group, L length of its longest row, G key heads, R query
heads per key head, H = G * R, Q queries of a block, K keys of a block, N padded queries of all blocks and heads.
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
    """A block of queries at the positions `start` to `end` - 1, with keys at `first_key` to `end` - 1."""

    first_key: int
    start: int
    end: int


class BlockGroup(NamedTuple):
    """Blocks of different rows that have the same shape after padding, so that one matrix product computes all.

    Each block has `queries` queries, `earlier` keys before its first query, and `keys` keys. Padding is at the end, so
    that causal attention hides the padded keys. `first` is the index of the group's first query in `QueryIndices`.
    """

    blocks: tuple[Block, ...]
    queries: int
    earlier: int
    keys: int
    first: int

    def part(self, padded_ND: torch.Tensor, heads: int, repeats: int) -> torch.Tensor:
        """Return the part (B * G, R * Q, D) of padded queries that belongs to the group. G is `heads`, R `repeats`."""
        start = self.first * heads * repeats
        part_ND = padded_ND[start : start + len(self.blocks) * heads * repeats * self.queries]
        return part_ND.view(-1, repeats * self.queries, padded_ND.shape[-1])


class QueryIndices(NamedTuple):
    """Indices that turn queries (T * H, D) into padded queries (N, D), which all groups of blocks share.

    The order of the N padded queries is (group, block, key head, query head of this key head, query). So the queries of
    a group are (B, G, R, Q, D), where B is the number of blocks. The keys at these positions have such indices too,
    with R = 1.

    queries[take] are the padded queries. At padding, `take` has the last query of the block, and `is_real` (N, 1) is
    False. `is_real` is None without padding. padded[place] are the T * H queries again.
    """

    take: torch.Tensor
    place: torch.Tensor
    is_real: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The groups of blocks of a batch, and the indices that attention with `heads` key heads needs to compute them.

    `place_keys` is `place` for the keys at the positions of the queries. `few_keys` has the indices of all keys of
    each group, or None for a group with many keys per block: stored, they would take more memory than the keys.
    """

    groups: list[BlockGroup]
    heads: int
    queries: QueryIndices
    place_keys: torch.Tensor
    few_keys: list[torch.Tensor | None]

    def keys(self, number: int) -> torch.Tensor:
        """Return the indices of the keys of the group with this number."""
        stored = self.few_keys[number]
        if stored is not None:
            return stored
        return key_indices(self.groups[number], self.heads, self.queries.take.device)


class DeviceTensors:
    """Tensors that are made from the row lengths of a batch, once per device. All layers use the same tensors."""

    def __init__(self, cu_seqlens: torch.Tensor | None = None) -> None:
        """Set up the store. If `cu_seqlens` is given, RowMask.cu_seqlens returns it and does not make a new tensor."""
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

    A query sees the key at its own position and the keys before it in its row, at most `window` keys in all. If
    `window` is None, the number of keys is not limited.
    """

    lengths: tuple[int, ...]
    window: int | None
    tensors: DeviceTensors = field(default_factory=DeviceTensors, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all rows. The batch can have more tokens, which belong to no row."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Return the length of the longest row."""
        return max(self.lengths)

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """Return the positions at which rows start, and the end of the last row, (B + 1), in int32."""
        ends = [0, *accumulate(self.lengths)]
        return self.tensors.get('cu_seqlens', device, lambda: torch.tensor(ends, dtype=torch.int32, device=device))

    def block_mask(self, device: torch.device) -> Any:
        """Return the mask for flex_attention."""
        name = f'block_mask {self.window}'
        return self.tensors.get(name, device, lambda: row_block_mask(self.lengths, self.window, device))

    def group_indices(self, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the indices that turn the batch into padded groups of rows, and the indices that reverse this.

        The first value has an index tensor (B, L) for each group, so that batch[index] is the padded group. At padding,
        the index is the position of the first token of the row. The second value is an index tensor (T). If all groups
        are flattened and joined, joined[index] is the batch again.
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
        """Yield the blocks of each row. A block has at most QUERY_BLOCK queries and all keys that they may see."""
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
        """Return all blocks in groups of equal padded shapes. The numbers of queries and keys are padded to PADDED.

        The scores of a group, of all `heads` query heads, are at most GROUP_SCORES, so that they need little memory.
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
        """Return how attention with `heads` key heads, each with `repeats` query heads, computes the blocks."""

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
        """Yield groups of rows of similar length. A group is a list of (start, length), with the longest row first.

        The longest row of a group is less than twice as long as its shortest row.
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
    """Return the indices (B * heads * K) of the keys of a group of blocks in a tensor (T * heads, D).

    At padding, the index is that of the last key of the block.
    """
    offset_K = torch.arange(group.keys, device=device)
    position_BK = torch.stack([(block.first_key + offset_K).clamp_(max=block.end - 1) for block in group.blocks])
    return (position_BK[:, None] * heads + torch.arange(heads, device=device)[:, None]).flatten()


# The rows of the batch that is computed now, as a RowMask whose `window` is None.
_ROWS: ContextVar[RowMask | None] = ContextVar('rows', default=None)


@contextmanager
def concatenated_rows(lengths: Sequence[int], cu_seqlens: torch.Tensor | None = None) -> Iterator[None]:
    """A context in which models that were passed to `attend_by_rows` treat their input as rows of these lengths.

    If `cu_seqlens` is given, RowMask.cu_seqlens returns it and does not make a new tensor.
    """
    token = _ROWS.set(RowMask(tuple(lengths), None, DeviceTensors(cu_seqlens)))
    try:
        yield
    finally:
        _ROWS.reset(token)


def rows_of_batch() -> RowMask | None:
    """Return the rows of the context `concatenated_rows`, as a RowMask whose `window` is None.

    Returns None outside of the context.
    """
    return _ROWS.get()

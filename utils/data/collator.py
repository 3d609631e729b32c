"""Makes the tensors of a batch from rows of token ids. The rows are padded or concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.base import device
from utils.data.packing import pack_evenly
from utils.encode.encoded import IGNORE_INDEX, row_labels
from utils.loading.image_processors import Images

if TYPE_CHECKING:
    import torch

# Keys of a batch with one value per row.
_PER_ROW = frozenset({'row_lengths', 'prompt_lengths', 'rows'})
# Keys of a batch that `with_plan` computes from the others.
_PLAN = frozenset({'positions', 'targets', 'owners', 'cu_seqlens'})
# Keys of a batch that stay on the CPU, where reading them does not wait for the device.
_ON_CPU = _PER_ROW | {'labels'}
# Keys of a batch that are not inputs of the model.
NOT_FOR_THE_MODEL = _ON_CPU | _PLAN


class Collator:
    """Makes a batch from rows or from packs. A pack is a list of rows that together have at most max_length tokens.

    If `pads` is True, rows are padded on the right to the length of the longest row. Otherwise, rows are concatenated.
    """

    def __init__(self, pad_token_id: int, images: Images | None = None, *, pads: bool = True) -> None:
        self.pad_token_id = pad_token_id
        self.images = images
        self.pads = pads

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the tensors of one batch of B rows.

        Every batch contains row_lengths and prompt_lengths (numbers of tokens), and rows (the indices of the rows in
        their data set, -1 for a filler), each (B,).
        A padded batch also contains input_ids, labels and attention_mask, each (B, T), and the image inputs of a model
        that accepts images.
        A concatenated batch also contains input_ids, labels and position_ids, each (1, sum of T). The position_ids of
        each row start at 0.
        Every batch also contains the tensors that the docstring of `with_plan` lists.

        row_lengths is the first key, because the trainer takes the number of rows from the first tensor.
        """
        import torch

        rows = [row for item in items for row in item.get('rows', [item])]
        lengths = [len(row['input_ids']) for row in rows]
        per_row = {
            'row_lengths': torch.tensor(lengths),
            'prompt_lengths': torch.tensor([row['prompt_length'] for row in rows]),
            'rows': torch.tensor([row.get('row', -1) for row in rows]),
        }
        ids = [torch.tensor(row['input_ids']) for row in rows]
        labels = [torch.tensor(row_labels(row)) for row in rows]

        if not self.pads:
            return with_plan(
                {
                    **per_row,
                    'input_ids': torch.cat(ids)[None],
                    'position_ids': torch.cat([torch.arange(length) for length in lengths])[None],
                    'labels': torch.cat(labels)[None],
                }
            )

        pad = torch.nn.utils.rnn.pad_sequence
        padded = pad(ids, batch_first=True, padding_value=self.pad_token_id)
        paths = [path for row in rows for path in row.get('images', ())]
        return with_plan(
            {
                **per_row,
                'input_ids': padded,
                'attention_mask': pad([torch.ones_like(x) for x in ids], batch_first=True),
                'labels': pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
                **(self.images.inputs(padded, paths) if self.images else {}),
            }
        )


def with_plan(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch with the tensors that the loss and the attention need.

    They are computed on the CPU, because reading the number of trained tokens from a GPU would wait for the GPU. With P
    trained tokens in B rows, the tensors are:

    positions (P,): for each trained token, the index of the token before it in the flattened input_ids. The model
    predicts the trained token there.
    targets (P,): the ids of the trained tokens.
    owners (P,): the index of the row of each trained token.
    cu_seqlens (B + 1,): int32, for each row the index of its first token, and then the number of all tokens. Only in a
    concatenated batch.
    """
    import torch

    labels = batch['labels']
    positions = predicting_positions(labels)
    plan = {'positions': positions, 'targets': labels.flatten()[positions + 1]}
    if 'attention_mask' in batch:
        return {**batch, **plan, 'owners': positions // labels.shape[1]}

    ends = batch['row_lengths'].cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return {**batch, **plan, 'owners': torch.searchsorted(ends, positions, right=True), 'cu_seqlens': cu_seqlens}


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the indices (P,) of the tokens directly before a trained token, in the flattened labels."""
    # The first position of a row has no label, so the position before a label belongs to the same row.
    return (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(-1) - 1


def on_device(batch: dict[str, torch.Tensor], target: torch.device) -> dict[str, torch.Tensor]:
    """Return the batch with its tensors on the device `target`, except those that are only read on the CPU."""
    return {**batch, **device.send({name: x for name, x in batch.items() if name not in _ON_CPU}, target)}


def refill(batches: list[dict[str, torch.Tensor]], capacity: int) -> list[dict[str, torch.Tensor]]:
    """Move the rows of concatenated batches into fewer concatenated batches of at most `capacity` tokens.

    The returned list has the same length as `batches`. It starts with an empty dictionary for each batch that is no
    longer needed. If the rows do not fit into fewer batches, `batches` is returned unchanged.
    """
    lengths = [length for batch in batches for length in batch['row_lengths'].tolist()]
    packs = pack_evenly(lengths, capacity)
    if len(packs) >= len(batches):
        return batches

    rows = [row for batch in batches for row in _split_concatenated(batch)]
    joined = [_concatenate([rows[i] for i in sorted(pack)]) for pack in packs]
    unused: list[dict[str, torch.Tensor]] = [{} for _ in range(len(batches) - len(packs))]
    return unused + joined


def take_rows(batch: dict[str, torch.Tensor], indices: list[int]) -> dict[str, torch.Tensor]:
    """Return a new batch with only the rows of `batch` at `indices`, in this order. `batch` must have no images.

    The new batch is padded or concatenated like `batch`. Padding beyond the longest of these rows is cut. The tensors
    that `with_plan` adds are on the CPU. All other tensors stay on their device.
    """
    if 'attention_mask' not in batch:
        rows = _split_concatenated(batch)
        return _concatenate([rows[index] for index in indices])

    lengths = batch['row_lengths'].tolist()
    width = max(lengths[index] for index in indices)
    own = {name: x for name, x in batch.items() if name not in _PLAN}
    return with_plan({name: x[indices] if name in _PER_ROW else x[indices, :width] for name, x in own.items()})


def split_rows(batch: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """Split the tensor `name` of a batch into its rows. Returns a list with one tensor per row, without padding.

    The tensor must have one value for each token, like input_ids.
    """
    lengths = batch['row_lengths'].tolist()
    if 'attention_mask' not in batch:
        return list(batch[name][0].split(lengths))
    return [row[:length] for row, length in zip(batch[name], lengths, strict=True)]


def _split_concatenated(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the rows of a concatenated batch, each as a dictionary.

    A dictionary has the keys of the batch, except those that `with_plan` adds.

    Tensors with one value per row get the shape (1,), all other tensors the shape (row length,).
    """
    lengths = batch['row_lengths'].tolist()
    own = {name: x for name, x in batch.items() if name not in _PLAN}
    parts = {name: x.split(1) if name in _PER_ROW else x[0].split(lengths) for name, x in own.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(len(lengths))]


def _concatenate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return one concatenated batch, made from rows that `_split_concatenated` returned."""
    import torch

    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return with_plan({name: x if name in _PER_ROW else x[None] for name, x in joined.items()})

"""Rows of ids to the tensors of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.data.packing import fewest
from utils.encode.encoded import IGNORE_INDEX, row_labels
from utils.loading.image_processors import Images

if TYPE_CHECKING:
    import torch

# What a batch holds beside the model's own inputs.
_OF_ROWS = frozenset({'row_lengths', 'prompt_lengths', 'rows'})
NOT_FOR_THE_MODEL = _OF_ROWS | {'labels'}


class Collator:
    """Lays the rows of a batch end to end, or pads them on the right to the longest. A row may be a pack of rows."""

    def __init__(self, pad_token_id: int, images: Images | None = None, *, pads: bool = True) -> None:
        self.pad_token_id = pad_token_id
        self.images = images
        self.pads = pads

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return row_lengths, prompt_lengths and rows, their indices (B); input_ids, labels, attention_mask (B, T).

        Laid end to end these are (1, sum of T) with position_ids, which start at 0 for each row, for attention_mask.
        Images add the model's own inputs to padded rows. row_lengths come first: from it the trainer tells how many
        rows a batch has.
        """
        import torch

        rows = [row for item in items for row in item.get('rows', [item])]
        lengths = [len(row['input_ids']) for row in rows]
        of_rows = {
            'row_lengths': torch.tensor(lengths),
            'prompt_lengths': torch.tensor([row['prompt_length'] for row in rows]),
            'rows': torch.tensor([row.get('row', -1) for row in rows]),
        }
        ids = [torch.tensor(row['input_ids']) for row in rows]
        labels = [torch.tensor(row_labels(row)) for row in rows]
        if not self.pads:
            return {
                **of_rows,
                'input_ids': torch.cat(ids)[None],
                'position_ids': torch.cat([torch.arange(length) for length in lengths])[None],
                'labels': torch.cat(labels)[None],
            }
        pad = torch.nn.utils.rnn.pad_sequence
        padded = pad(ids, batch_first=True, padding_value=self.pad_token_id)
        paths = [path for row in rows for path in row.get('images', ())]
        return {
            **of_rows,
            'input_ids': padded,
            'attention_mask': pad([torch.ones_like(x) for x in ids], batch_first=True),
            'labels': pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            **(self.images.inputs(padded, paths) if self.images else {}),
        }


def refill(batches: list[dict[str, torch.Tensor]], capacity: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of rows laid end to end with the same rows in fewer ones of at most `capacity` tokens.

    There are as many as before: those that are not needed any more come first and are empty.
    """
    import torch

    lengths = [length for batch in batches for length in batch['row_lengths'].tolist()]
    packs = fewest(lengths, capacity)
    if len(packs) >= len(batches):
        return batches
    parts = {
        name: [
            part
            for batch in batches
            for part in (
                batch[name].split(1) if name in _OF_ROWS else batch[name][0].split(batch['row_lengths'].tolist())
            )
        ]
        for name in batches[0]
    }
    joined = [{name: torch.cat([found[i] for i in sorted(pack)]) for name, found in parts.items()} for pack in packs]
    laid = [{name: x if name in _OF_ROWS else x[None] for name, x in batch.items()} for batch in joined]
    return [{} for _ in range(len(batches) - len(packs))] + laid


def take_rows(batch: dict[str, torch.Tensor], indices: list[int]) -> dict[str, torch.Tensor]:
    """Return the batch of some rows of a batch of text, laid out as it is, padded no further than they need."""
    import torch

    lengths = batch['row_lengths'].tolist()
    if 'attention_mask' in batch:
        width = max(lengths[index] for index in indices)
        return {name: x[indices] if name in _OF_ROWS else x[indices, :width] for name, x in batch.items()}
    taken = {}
    for name, x in batch.items():
        parts = x.split(1) if name in _OF_ROWS else x[0].split(lengths)
        joined = torch.cat([parts[index] for index in indices])
        taken[name] = joined if name in _OF_ROWS else joined[None]
    return taken


def split_rows(batch: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """Return one tensor of a batch as its rows, without padding."""
    lengths = batch['row_lengths'].tolist()
    if 'attention_mask' not in batch:
        return list(batch[name][0].split(lengths))
    return [row[:length] for row, length in zip(batch[name], lengths, strict=True)]

"""Rows of ids to the tensors of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.native.image_readers import Images
from utils.preprocess import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


class Collator:
    """Pads a batch to its longest row, on the right."""

    def __init__(self, pad_token_id: int, images: Images | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.images = images

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask, labels (each B x T) and prompt_lengths (B), and what images add.

        Labels are IGNORE_INDEX outside the trained span and at position 0, which no position predicts: so the number
        of labels is the number of predictions, and a mean over them is over what is really trained.
        """
        import torch

        width = max(len(row['input_ids']) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            ids = torch.tensor(row['input_ids'])
            start, end = max(row['trained'][0], 1), row['trained'][1]
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            labels[index, start:end] = ids[start:end]
        paths = [path for row in rows for path in row.get('images', ())]
        return {
            'input_ids': input_ids,
            'attention_mask': attention_mask,
            'labels': labels,
            'prompt_lengths': torch.tensor([row['prompt_length'] for row in rows]),
            **(self.images.inputs(input_ids, paths) if self.images else {}),
        }

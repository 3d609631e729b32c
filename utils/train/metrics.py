"""The metrics of an evaluation: loss and accuracy, or ROUGE and BLEU of generated answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.infer.scores import score_texts

if TYPE_CHECKING:
    from transformers import EvalPrediction


def compute_loss_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return {'loss': ..., 'acc': ...}: the means of loss and token accuracy over all trained validation tokens."""
    import numpy as np

    loss, hits, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    return {'loss': float(loss / tokens), 'acc': float(hits / tokens)}


def generation_metrics(tokenizer: Any) -> Any:
    """Return a function for the trainer that scores generated ids against the labels, by ROUGE and BLEU (0 to 100)."""
    import numpy as np

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        def texts(rows: Any) -> list[str]:
            return [tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True).strip() for row in rows]

        return score_texts(texts(np.asarray(prediction.predictions)), texts(np.asarray(prediction.label_ids)))

    return compute

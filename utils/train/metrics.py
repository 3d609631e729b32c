"""The metrics of an evaluation: loss and accuracy, or the scores of generated answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.infer.scores import Scores, means

if TYPE_CHECKING:
    from transformers import EvalPrediction

    from utils.formats.conversation import Row


def compute_loss_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return {'loss': ..., 'acc': ...}: the means of loss and token accuracy over all trained validation tokens."""
    import numpy as np

    loss, hits, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    return {'loss': float(loss / tokens), 'acc': float(hits / tokens)}


class GenerationMetrics:
    """Scores generated ids against the ids of the labels. The trainer calls it after each evaluation.

    The main process computes the scores and sends them to the others, because a function of the user may return
    different numbers in each process. If it fails, every process raises the ConfigError.
    """

    def __init__(self, tokenizer: Any, scores: Scores, row: Callable[[int], Row]) -> None:
        self.tokenizer = tokenizer
        self.scores = scores
        # Returns the validation row with an index.
        self.row = row

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the mean scores by name.

        `prediction.inputs` are the indices of the rows. If it is None, the rows are all validation rows in their order.
        """
        answers = self._texts(prediction.predictions)
        labels = self._texts(prediction.label_ids)
        indices = range(len(answers)) if prediction.inputs is None else prediction.inputs
        return dist.from_main(lambda: means(self._by_row(answers, labels, indices)))

    def _by_row(self, answers: list[str], labels: list[str], indices: Sequence[int]) -> list[dict[str, float]]:
        rows = [self.row(index) for index in indices] if self.scores.functions else []
        return self.scores.by_row(answers, labels, rows)

    def _texts(self, ids: Any) -> list[str]:
        import numpy as np

        return [
            self.tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True).strip() for row in np.asarray(ids)
        ]

"""The metrics of an evaluation: loss and accuracy, or ROUGE and BLEU of generated answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.data.encoded_rows import EncodedRows
from utils.infer.scores import score_texts

if TYPE_CHECKING:
    from transformers import EvalPrediction

Metrics = Callable[['EvalPrediction'], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class ValidationSets:
    """The rows of an evaluation, and the names of the sets of --val_dataset by the number of their part.

    Without names, only the rows of all sets together are evaluated.
    """

    rows: EncodedRows
    names: Mapping[int, str]

    def groups(self, indices: Any) -> Iterator[tuple[str, Any]]:
        """Yield (prefix of the metrics, positions in `indices`) for all rows together, and then for each set.

        `indices` are indices of rows, with shape (rows,). A set without rows in `indices` is not yielded.
        """
        import numpy as np

        yield '', np.arange(len(indices))
        parts = self.rows.parts()[indices] if self.names else np.empty(0)
        for number, name in self.names.items():
            positions = np.flatnonzero(parts == number)
            if len(positions):
                yield f'{name}_', positions


def loss_metrics(sets: ValidationSets) -> Metrics:
    """Return a function for the trainer that computes `loss` and `acc` (token accuracy) from the sums of each row.

    Each is a mean over all trained tokens: of all rows, and of each set (`<name>_loss`). The first column of the labels
    has the index of the row.
    """
    import numpy as np

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        sums = np.asarray(prediction.predictions, dtype=np.float64)
        metrics: dict[str, float] = {}
        for prefix, positions in sets.groups(np.asarray(prediction.label_ids)[:, 0]):
            loss, hits, tokens = sums[positions].sum(axis=0)
            metrics[f'{prefix}loss'] = float(loss / tokens)
            metrics[f'{prefix}acc'] = float(hits / tokens)
        return metrics

    return compute


def generation_metrics(tokenizer: Any, sets: ValidationSets) -> Metrics:
    """Return a function for the trainer that computes ROUGE and BLEU scores of generated ids against the labels.

    The scores are means over all rows, and over each set (`<name>_rouge-l`). The first column of the labels has the
    index of the row.
    """
    import numpy as np

    def texts(rows: Any) -> list[str]:
        return [tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True).strip() for row in rows]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        labels = np.asarray(prediction.label_ids)
        answers = texts(np.asarray(prediction.predictions))
        wanted = texts(labels[:, 1:])
        metrics: dict[str, float] = {}
        for prefix, positions in sets.groups(labels[:, 0]):
            scores = score_texts([answers[i] for i in positions], [wanted[i] for i in positions])
            metrics |= {f'{prefix}{name}': value for name, value in scores.items()}
        return metrics

    return compute

"""The metrics of an evaluation: loss and accuracy, or the scores of generated answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.data.encoded_rows import EncodedRows
from utils.infer.scores import Scores, means

if TYPE_CHECKING:
    from transformers import EvalPrediction

    from utils.formats.conversation import Row

Metrics = Callable[['EvalPrediction'], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class ValidationSets:
    """The rows of an evaluation, and the names of the sets of --val_dataset.

    `names` is a dict from the number of a set to its name. `rows.parts()` returns the number of the set of each row. If
    `names` is empty, there are only metrics over all rows together.
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
    """Return a function for the trainer that computes `loss` and `acc` (token accuracy).

    Both are means over the trained tokens of all rows. If the sets have names, the means of each set are added, as
    `<set>_loss` and `<set>_acc`.

    The returned function takes predictions of shape (N, 3). Each of the N rows has its summed loss, its hits (correctly
    predicted tokens) and its trained tokens. The first column of the labels has the index of each row.
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


class GenerationMetrics:
    """Scores generated ids against the ids of the labels. The trainer calls it after each evaluation.

    The main process computes the scores and sends them to the other processes, because a score function of the user can
    return different numbers in each process. If the scores raise a ConfigError in the main process, every process
    raises it.

    `held_out` is for score functions of the user. It is a dict from the origin of a validation row (its file and line)
    to the row.
    """

    def __init__(self, tokenizer: Any, scores: Scores, sets: ValidationSets, held_out: Mapping[str, Row]) -> None:
        self.tokenizer = tokenizer
        self.scores = scores
        self.sets = sets
        self.held_out = held_out

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the mean of each score over all rows (`rouge-l`), and over the rows of each set (`<set>_rouge-l`).

        The first column of the labels has the index of each row.
        """
        import numpy as np

        labels = np.asarray(prediction.label_ids)
        indices = labels[:, 0]
        answers = self._texts(np.asarray(prediction.predictions))
        wanted = self._texts(labels[:, 1:])

        def scored() -> dict[str, float]:
            by_row = self.scores.by_row(answers, wanted, self._rows(indices))
            return {
                f'{prefix}{name}': value
                for prefix, positions in self.sets.groups(indices)
                for name, value in means([by_row[i] for i in positions]).items()
            }

        return dist.from_main(scored)

    def _rows(self, indices: Any) -> list[Row]:
        """Return the row of each index, or an empty list if no score function uses rows."""
        if not self.scores.functions:
            return []
        return [self.held_out[self.sets.rows.origin(index)] for index in indices]

    def _texts(self, ids: Any) -> list[str]:
        return [self.tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True).strip() for row in ids]

"""Draws the curves of a run as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from utils.cli.scores import score_name
from utils.data.sources import val_set_names

# The keys of the log history that are drawn, each with the title of its picture.
_CURVES = {
    'loss': 'training loss',
    'grad_norm': 'gradient norm',
    'learning_rate': 'learning rate',
    'eval_loss': 'validation loss',
    'eval_acc': 'validation token accuracy',
    'eval_rouge-l': 'validation ROUGE-L',
    'eval_bleu-4': 'validation BLEU-4',
    'eval_drift_kl': 'drift from the base on neutral texts, nats',
}

# Further values of a score that are drawn, by the word of --score.
_ALSO = {'rouge': ('bleu-4',)}
_NO_FLAGS: Mapping[str, Any] = MappingProxyType({})

# A smoothed curve is drawn only if there are more points than this. With fewer points it would only lag behind them.
_SMOOTHED_FROM = 50


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Return an exponential moving average of the values, with bias correction as in Adam."""
    smoothed = []
    average = 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def scores_of(flags: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics that have a curve for each validation set, for example ['loss', 'acc'].

    `flags` are the flags in the run's record.
    """
    if not flags.get('predict_with_generate'):
        return ['loss', 'acc']
    words = flags.get('score', ['rouge'])  # the record of an older run has no scores
    return list(dict.fromkeys(name for word in words for name in (score_name(word), *_ALSO.get(word, ()))))


def curves_of_scores(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict from keys of the log history to titles of curves, for the scores of generated answers.

    Loss, accuracy, ROUGE and BLEU are left out, because their titles are fixed. `flags` are the flags in the run's
    record.
    """
    keys = (f'eval_{score}' for score in scores_of(flags))
    return {key: f'validation {key.removeprefix("eval_")}' for key in keys if key not in _CURVES}


def curves_of_sets(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict from keys of the log history to titles of curves, for each data set of --val_dataset.

    If there are fewer than two data sets, returns {}. `flags` are the flags in the run's record.
    """
    names = val_set_names(flags.get('val_dataset') or ())
    if len(names) < 2:
        return {}
    titles = {**curves_of_scores(flags), **_CURVES}
    return {
        f'eval_{name}_{score}': f'{titles["eval_" + score]}: {name}' for name in names for score in scores_of(flags)
    }


def plot_curves(log_history: list[dict[str, Any]], folder: Path, flags: Mapping[str, Any] = _NO_FLAGS) -> list[Path]:
    """Write one PNG file for each curve that the run logged, and return the paths of the files.

    `flags` are the flags in the run's record. They name the validation sets and the scores of generated answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key, title in {**curves_of_scores(flags), **_CURVES, **curves_of_sets(flags)}.items():
        points = [(entry['step'], entry[key]) for entry in log_history if key in entry and math.isfinite(entry[key])]
        if points:
            path = folder / f'{key.replace("/", "_")}.png'
            draw(path, title, points)
            paths.append(path)
    return paths


def draw(path: Path, title: str, points: list[tuple[float, float]]) -> None:
    """Write a PNG file with the curve through the points (step, value)."""
    from matplotlib.figure import Figure

    steps = [step for step, _ in points]
    values = [value for _, value in points]
    figure = Figure(figsize=(7, 4))
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.13, top=0.91)
    axes = figure.subplots()
    if len(points) > _SMOOTHED_FROM:
        axes.plot(steps, values, color='#9ecae1', label=title)
        axes.plot(steps, _smooth(values), color='#08519c', label='smoothed')
        axes.legend()
    else:
        axes.plot(steps, values, color='#08519c', marker='.')
    axes.set(xlabel='step', ylabel=title, title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)

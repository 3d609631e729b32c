"""Draws the curves of a run as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

# A smoothed curve is drawn only if there are more points than this. With fewer points it would only lag behind them.
_SMOOTHED_FROM = 50


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving averages of the values, one for each value, corrected for the start at zero."""
    smoothed = []
    average = 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def plot_curves(log_history: list[dict[str, Any]], folder: Path, scores: Sequence[str] = ()) -> list[Path]:
    """Write one PNG file for each curve that the run logged, and return the paths of the files.

    `scores` are the names of the scores of generated answers.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    curves = {f'eval_{name}': f'validation {name}' for name in scores} | _CURVES
    for key, title in curves.items():
        entries = [entry for entry in log_history if key in entry and math.isfinite(entry[key])]
        if not entries:
            continue
        steps = [entry['step'] for entry in entries]
        values = [entry[key] for entry in entries]

        figure = Figure(figsize=(7, 4), layout='tight')
        axes = figure.subplots()
        if len(entries) > _SMOOTHED_FROM:
            axes.plot(steps, values, color='#9ecae1', label=title)
            axes.plot(steps, _smooth(values), color='#08519c', label='smoothed')
            axes.legend()
        else:
            axes.plot(steps, values, color='#08519c', marker='.')
        axes.set(xlabel='step', ylabel=title, title=title)
        axes.grid(alpha=0.3)

        path = folder / f'{key.replace("/", "_")}.png'
        figure.savefig(path, dpi=110)
        paths.append(path)
    return paths

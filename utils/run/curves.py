"""Loss curves as pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

# What is drawn when a run has it, and what the axis says.
_CURVES = {
    'loss': 'training loss',
    'grad_norm': 'gradient norm',
    'learning_rate': 'learning rate',
    'eval_loss': 'validation loss',
    'eval_acc': 'validation token accuracy',
    'eval_rouge-l': 'validation ROUGE-L',
    'eval_bleu-4': 'validation BLEU-4',
}

# Fewer points are drawn as they are: an average over them would only lag.
_SMOOTHED_FROM = 50


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Return an exponential moving average without the bias of its start."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def plot_curves(log_history: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write one PNG per curve that the run logged; returns their paths."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key, title in _CURVES.items():
        points = [(e['step'], e[key]) for e in log_history if key in e and math.isfinite(e[key])]
        if not points:
            continue
        steps, values = [p[0] for p in points], [p[1] for p in points]
        figure = Figure(figsize=(7, 4), layout='tight')
        axes = figure.subplots()
        smooths = len(points) > _SMOOTHED_FROM
        raw = axes.plot(steps, values, color='#9ecae1' if smooths else '#08519c', label=title)
        raw[0].set_marker('' if smooths else '.')
        if smooths:
            axes.plot(steps, _smooth(values), color='#08519c', label='smoothed')
            axes.legend()
        axes.set(xlabel='step', ylabel=title, title=title)
        axes.grid(alpha=0.3)
        path = folder / f'{key.replace("/", "_")}.png'
        figure.savefig(path, dpi=110)
        paths.append(path)
    return paths

"""Draws the curves of a run as PNG files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
}

# The keys of the history for one set of --val_dataset, with the name of the set.
_OF_A_SET = re.compile(r'eval_(?P<name>.+)_(?P<score>loss|acc|rouge-l|bleu-4)')

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


def curves_of_sets(log_history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the keys of the history that belong to one set of --val_dataset, each with the title of its curve."""
    found: dict[str, str] = {}
    for key in dict.fromkeys(key for entry in log_history for key in entry):
        if match := _OF_A_SET.fullmatch(key):
            found[key] = f'{_CURVES["eval_" + match["score"]]}: {match["name"]}'
    return found


def plot_curves(log_history: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write one PNG file for each curve that the run logged, and return the paths of the files."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key, title in {**_CURVES, **curves_of_sets(log_history)}.items():
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

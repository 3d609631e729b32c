"""The comparison of two runs (`python -m utils.report RUN OTHER`), as text and as a page with the curves of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.report.html import curves_of
from utils.report.page import Markup, page, section, table
from utils.report.svg import Series, chart
from utils.run.read_back import RunFiles, read_run

# The results that are compared, in their order, after the metrics of the last evaluation.
_RESULTS = ('train_loss', 'steps', 'train_tokens_per_second', 'peak_memory_gib', 'seconds')
# Names with these ends say how long an evaluation took. The values are not compared, because they differ in every run.
_TIMINGS = ('_runtime', '_per_second')

# Names of other values that are not compared. They hold paths and messages of the run.
_NOT_COMPARED = {'output_dir', 'resume_from_checkpoint', 'best_checkpoint', 'decisions', 'warnings'}

Change = tuple[str, Any, Any]


def _flat(value: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """Return the values of a nested dict as a flat dict, for example {'a': {'b': 1}} as {'a.b': 1}.

    The values in _NOT_COMPARED, such as `output_dir`, are left out.
    """
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flat(item, f'{prefix}{key}.')
        elif key not in _NOT_COMPARED:
            flat[f'{prefix}{key}'] = item
    return flat


def changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """Return (name, value in a, value in b) for each value that differs, sorted by name. A missing value is None."""
    left = _flat(a)
    right = _flat(b)
    return [(key, left.get(key), right.get(key)) for key in sorted(left | right) if left.get(key) != right.get(key)]


def compare(a: RunFiles, b: RunFiles) -> dict[str, list[Change]]:
    """Return the differences of two runs, as lists under the keys flags, data, versions and results.

    A list is empty if there is no difference of its kind. The results begin with the validation loss.
    """
    return {
        'flags': changes(a.record.to_json(), b.record.to_json()),
        'data': changes(a.outcome.get('data', {}), b.outcome.get('data', {})),
        'versions': changes(a.outcome.get('versions', {}), b.outcome.get('versions', {})),
        'results': _result_changes(_results(a), _results(b)),
    }


def _results(run: RunFiles) -> dict[str, Any]:
    """Return the results of a run by name, rounded to 4 digits: validation loss, other metrics, then _RESULTS."""
    last = run.outcome.get('last_evaluation') or {}
    metrics = {key: value for key, value in last.items() if key.startswith('eval_') and not key.endswith(_TIMINGS)}
    found = {'eval_loss': None, **metrics, **{name: run.outcome.get(name) for name in _RESULTS}}
    return {key: float(f'{value:.4g}') if isinstance(value, float) else value for key, value in found.items()}


def _result_changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    names = dict.fromkeys([name for name in (*a, *b) if name not in _RESULTS] + list(_RESULTS))
    return [(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def render(a: RunFiles, b: RunFiles) -> str:
    """Return the comparison as HTML. Each chart shows both runs."""
    charts = []
    for title, lines in curves_of(a, b):
        for line, key in lines:
            both = [Series(name=name, points=run.curve(key), colour=i) for i, name, run in ((1, 'A', a), (2, 'B', b))]
            charts.append(chart(f'{title}: {line}' if len(lines) > 1 else title, both))

    tables = [
        section(f'Different {title}', table(['', 'A', 'B'], rows)) for title, rows in compare(a, b).items() if rows
    ]
    return page(
        'Two runs compared',
        Markup('<h1>Two runs compared</h1>'),
        table(['', 'folder'], [['A', a.folder], ['B', b.folder]]),
        section('Curves', Markup(f'<div class="charts">{"".join(charts)}</div>')),
        *tables,
    )


def compare_runs(run_a: Path, run_b: Path, target: Path) -> None:
    """Print the differences between two run folders, and write the page to `target`.

    Raises ConfigError if a run folder cannot be read or if `target` cannot be written.
    """
    a = read_run(run_a)
    b = read_run(run_b)
    for title, rows in compare(a, b).items():
        print(f'{title}: ' + (f'{len(rows)} differ' if rows else 'the same'))
        for name, left, right in rows:
            print(f'  {name}: {left} -> {right}')
    try:
        target.write_text(render(a, b), encoding='utf-8')
    except OSError as error:
        raise ConfigError(
            f'--html: {target} cannot be written: {error.strerror}. Name another file with --html.'
        ) from error
    print(f'curves: {target}')

"""The table and the pictures of benchmarks/train.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from speed_cases import CONTESTANTS, NAMES, SETTINGS

Taken = list[dict[str, Any]]


def _rounds(taken: Taken, **wanted: Any) -> Taken:
    """Return the results of the cases with these values."""
    return [t for t in taken if all(t['case'][name] == value for name, value in wanted.items())]


def table(content: dict[str, Any], middle: Callable[[list[float]], float]) -> str:
    """Return the results in Markdown: medians, and the ratio of each to plain Trainer + PEFT."""
    taken, about = content['taken'], content['machine']
    lines = [', '.join(f'{name} {value}' for name, value in about.items()), '']
    for threads in (2, 1):
        for setting in SETTINGS:
            rows = {
                name: _rounds(taken, threads=threads, setting=setting, contestant=name, length=0)
                for name in CONTESTANTS
            }
            rows = {name: found for name, found in rows.items() if found}
            if not {'plain', 'fast'} <= rows.keys():
                continue
            lines += [
                f'**{setting}, {threads} threads**, rows of alpaca lengths, medians of {len(rows["plain"])}', '',
                '| | real tokens/s | ratio | tokens/CPU-s | peak MiB | ratio | of matmul limit | first step s |',
                '|---|---|---|---|---|---|---|---|',
            ]  # fmt: skip
            m = {n: {k: middle([t['result'][k] for t in r]) for k in r[0]['result']} for n, r in rows.items()}
            for name, r in m.items():
                speed, memory = (r[key] / m['plain'][key] for key in ('tokens_per_second', 'peak_mib'))
                lines.append(
                    f'| {NAMES[name]} | {r["tokens_per_second"]:.0f} | {speed:.2f} | '
                    f'{r["tokens_per_cpu_second"]:.0f} | {r["peak_mib"]:.0f} | {memory:.2f} | '
                    f'{r["limit_share"]:.0%} | {r["first_step_seconds"]:.1f} |'
                )
            lines.append('')
    lines += ['Single rows, LoRA on q, k, v, 2 threads', '', '| model | rows x tokens | | real tokens/s | peak MiB |',
              '|---|---|---|---|---|']  # fmt: skip
    for t in _rounds(taken, accumulation=1):
        case, r = t['case'], t['result']
        lines.append(
            f'| {case["model"]} | {case["rows"]} x {case["length"]} | {NAMES[case["contestant"]]} | '
            f'{r["tokens_per_second"]:.0f} | {r["peak_mib"]:.0f} |'
        )
    return '\n'.join(lines) + '\n'


def pictures(content: dict[str, Any], target: Path) -> None:
    """Write speed by contestant, and growth with length and rows, as a picture next to `target`."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    taken = content['taken']
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4))
    for place, name in enumerate(CONTESTANTS):
        found = [_rounds(taken, threads=2, setting=s, contestant=name, length=0) for s in SETTINGS]
        middles = [median(t['result']['tokens_per_second'] for t in r) if r else 0 for r in found]
        axes[0].bar([x + 0.16 * place for x in range(len(SETTINGS))], middles, width=0.16, label=NAMES[name])
        for axis, key, fixed in ((axes[1], 'length', {'rows': 1}), (axes[2], 'rows', {'length': 256})):
            grown = sorted(
                (t['case'][key], t['result']) for t in _rounds(taken, accumulation=1, model='smollm2', **fixed)
                if t['case']['contestant'] == name
            )  # fmt: skip
            if grown:
                xs = [x for x, _ in grown]
                axis.plot(xs, [r['peak_mib'] / 1024 for _, r in grown], marker='o', label=f'{NAMES[name]}, GiB')
                per_token = [1000 / r['tokens_per_second'] for _, r in grown]
                axis.plot(xs, per_token, marker='x', linestyle='--', label=f'{NAMES[name]}, ms per token')
    axes[0].set_xticks([x + 0.32 for x in range(len(SETTINGS))], SETTINGS)
    axes[0].legend(fontsize=7)
    axes[0].set_title('real tokens/s, 2 threads')
    axes[1].set_title('growth with the length of a row')
    axes[2].set_title('growth with rows of 256 tokens')
    for axis in axes:
        if axis.lines:
            axis.legend(fontsize=7)
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(target.with_suffix('.png'), dpi=110)

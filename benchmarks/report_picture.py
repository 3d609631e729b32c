"""The picture in the READMEs: the first screen of a run's report.html, as SVG.

`python benchmarks/report_picture.py RUN_DIR` writes docs/img/report.svg from the files of the run folder.
"""

from __future__ import annotations

import json
import sys
import textwrap
from html import escape
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / 'docs' / 'img' / 'report.svg'
WIDTH = 860
INK, FAINT, GOOD, LINE, FILL = '#1b1f24', '#57606a', '#1a7f37', '#d0d7de', '#f6f8fa'
TRAIN, VAL = '#0550ae', '#bc4c00'
Point = tuple[float, float]


def text(x: float, y: float, content: object, *, size: int = 13, colour: str = INK, weight: int = 400) -> str:
    """Return one line of text whose baseline is at y."""
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(str(content))}</text>'


def tiles(run: dict[str, Any], y: float) -> list[str]:
    """Return the figures of the run in a row of boxes."""
    last = run['last_evaluation']
    shown = {
        'steps': run['steps'],
        'training loss': f'{run["train_loss"]:.4g}',
        'validation loss': f'{last["eval_loss"]:.4g}',
        'token accuracy': f'{last["eval_acc"]:.4g}',
        'peak memory, GiB': run['peak_memory_gib'],
    }
    parts = []
    for i, (name, value) in enumerate(shown.items()):
        x = 20 + i * 165
        parts.append(f'<rect x="{x}" y="{y}" width="155" height="54" rx="6" fill="{FILL}"/>')
        parts.append(text(x + 10, y + 20, name, size=12, colour=FAINT))
        parts.append(text(x + 10, y + 43, value, size=17, weight=600))
    return parts


def proofs(found: dict[str, dict[str, Any]], y: float) -> tuple[list[str], float]:
    """Return the table of proofs and the y below it."""
    parts = [text(20, y, 'What was proven', size=16, weight=600)]
    y += 12
    for name, outcome in found.items():
        parts.append(f'<path d="M20 {y:g}H{WIDTH - 20}" stroke="{LINE}"/>')
        lines = textwrap.wrap(outcome['says'], 106)
        parts.append(text(20, y + 20, name.replace('_', ' ')))
        word, colour = ('holds', GOOD) if outcome['passed'] else ('fails', VAL)
        parts.append(text(115, y + 20, word, colour=colour, weight=600))
        parts += [text(170, y + 20 + 17 * i, line) for i, line in enumerate(lines)]
        y += 12 + 17 * len(lines)
    return parts, y


def curve(points: list[Point], colour: str, *, box: tuple[float, float, float, float], top: float, right: float) -> str:
    """Return a line through (step, value) points in a box of x, y, width, height."""
    x, y, width, height = box
    where = ' '.join(f'{x + width * step / right:.1f},{y + height * (1 - value / top):.1f}' for step, value in points)
    return f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="1.8"/>'


def losses(history: list[dict[str, Any]], y: float) -> list[str]:
    """Return the chart of training and validation loss."""
    box = (50, y + 24, 300, 120)
    train = [(entry['step'], entry['loss']) for entry in history if 'loss' in entry]
    val = [(entry['step'], entry['eval_loss']) for entry in history if 'eval_loss' in entry]
    top = max(value for _, value in train)
    right = max(step for step, _ in train)
    parts = [text(20, y, 'Loss', size=16, weight=600), text(70, y, 'training', colour=TRAIN)]
    parts.append(text(130, y, 'validation', colour=VAL))
    parts.append(f'<path d="M{box[0]} {box[1]}v{box[3]}h{box[2]}" fill="none" stroke="{LINE}"/>')
    parts.append(text(18, box[1] + 8, f'{top:.2g}', size=11, colour=FAINT))
    parts.append(text(box[0] + box[2] - 50, box[1] + box[3] + 16, f'step {right}', size=11, colour=FAINT))
    parts.append(curve(train, TRAIN, box=box, top=top, right=right))
    parts += [
        f'<circle cx="{box[0] + box[2] * step / right:.1f}" cy="{box[1] + box[3] * (1 - value / top):.1f}" r="3.5" '
        f'fill="{VAL}"/>'
        for step, value in val
    ]
    return parts


def answers(row: dict[str, Any], y: float) -> list[str]:
    """Return one validation row with the answers before and after training."""
    parts = [text(390, y, 'Before and after', size=16, weight=600)]
    y += 22
    for name in ('asked', 'wanted', 'before', 'after'):
        said = row['messages'][-2]['content'].splitlines()[-1] if name == 'asked' else row[name].splitlines()[0]
        lines = textwrap.wrap(said, 52)[:3]
        parts.append(text(390, y, name, colour=FAINT))
        parts += [text(450, y + 17 * i, line, size=12) for i, line in enumerate(lines)]
        y += 10 + 17 * len(lines)
    return parts


def draw(folder: Path) -> str:
    """Return the picture of a run folder."""
    run, history, found, rows, arguments = (
        json.loads((folder / f'{name}.json').read_text(encoding='utf-8'))
        for name in ('run', 'history', 'proofs', 'answers', 'sft_args')
    )
    how = f'{"LoRA" if arguments["sft_type"] == "lora" else "all weights"} on {", ".join(arguments["dataset"])}'
    name = arguments['model_type'] or Path(arguments['model_id_or_path']).name
    parts = [text(20, 38, name, size=20, weight=600), text(20, 60, how, colour=FAINT)]
    parts += tiles(run, 76)
    table, below = proofs(found, 162)
    parts += table
    parts += losses(history, below + 34)
    parts += answers(rows[0], below + 34)
    height = below + 215
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'font-family="Helvetica, Arial, sans-serif"><rect width="100%" height="100%" fill="#ffffff"/>'
        + '\n'.join(parts)
        + '</svg>\n'
    )


def main(argv: list[str]) -> int:
    """Write the picture; returns the exit code."""
    if len(argv) != 1:
        print('usage: python benchmarks/report_picture.py RUN_DIR', file=sys.stderr)
        return 2
    TARGET.write_text(draw(Path(argv[0])), encoding='utf-8')
    print(TARGET)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""Line charts as inline SVG. They use no script, and support phones and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Size and margins of a chart in units of the viewBox. A phone screen has about this width, so its text is not scaled.
_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart: its name, its points (step, value), and the number of its colour in page.css."""

    name: str
    points: Sequence[Point]
    colour: int = 1


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers with equal distances. They cover the range from `low` to `high`."""
    span = high - low
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.floor(low / step)
    return [round((first + i) * step, 12) for i in range(math.ceil(high / step - first - 1e-9) + 1)]


def _number(value: float) -> str:
    """Return the label of a tick of the vertical axis."""
    return f'{value:.0e}'.replace('e-0', 'e-') if 0 < abs(value) < 1e-3 else f'{value:,.10g}'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    # Space above and below the line. It is more than 0 also for a flat line.
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - room if low - room > 0 or low < 0 else 0.0, high + room


def chart(title: str, series: Sequence[Series]) -> str:
    """Return a line chart as an HTML figure. NaN and infinite points are skipped. Returns '' if no points remain."""
    drawn = [Series(name=s.name, points=[p for p in s.points if math.isfinite(p[1])], colour=s.colour) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ''

    steps = [p[0] for s in drawn for p in s.points]
    ticks = _ticks(*_range([p[1] for s in drawn for p in s.points]))
    low = ticks[0]
    high = ticks[-1]
    left = min(steps)
    right = max(steps)

    def x(step: float) -> float:
        return _LEFT + (step - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    grid = ''.join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{_number(t)}</text>'
        for t in ticks
    )
    axis = f'<text x="{_LEFT}" y="{_HEIGHT - 16}">{left:g}</text>'
    if right > left:
        axis += f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 16}" text-anchor="end">{right:g}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    axis += f'<text x="{middle:g}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>'
    lines = ''.join(_line(s, [(x(a), y(b)) for a, b in s.points]) for s in drawn)
    keys = [f'<span class="key key{s.colour}">{escape(s.name)}</span>' for s in drawn if len(drawn) > 1]
    return (
        f'<figure><figcaption>{escape(title)} {" ".join(keys)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f'{grid}{axis}{lines}</svg></figure>'
    )


def _line(series: Series, drawn: Sequence[Point]) -> str:
    """Return an SVG line through the points `drawn`, which are in units of the viewBox.

    If there are at most 60 points, each point also gets a dot. The dot shows the value when the pointer is on it.
    """
    path = ' '.join(f'{a:.1f},{b:.1f}' for a, b in drawn)
    dots = ''
    if len(drawn) <= 60:
        dots = ''.join(
            f'<circle class="dot{series.colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.5">'
            f'<title>{escape(series.name)}, step {point[0]:g}: {point[1]:.6g}</title></circle>'
            for (a, b), point in zip(drawn, series.points, strict=True)
        )
    return f'<polyline class="line{series.colour}" points="{path}"/>{dots}'
